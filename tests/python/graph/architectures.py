"""Small, randomly initialized models of usual architectures, with batches of any size for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

Architecture = tuple[nn.Module, Callable[[int], Any]]


def bert() -> Architecture:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
    )

    def batch(size: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(size, 24, dtype=torch.long)
        mask[:, 20:] = 0
        return {"input_ids": torch.randint(0, 99, (size, 24)), "attention_mask": mask}

    return transformers.BertModel(config).eval(), batch


def gpt2() -> Architecture:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, lambda size: {"input_ids": torch.randint(0, 99, (size, 24))}


def swin() -> Architecture:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=10,
    )
    # 40 pixels: windows are padded and shifted.
    return model.eval(), lambda size: torch.randn(size, 3, 40, 40)


def shufflenet() -> Architecture:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=10)
    return model.eval(), lambda size: torch.randn(size, 3, 32, 32)


ARCHITECTURES = [bert, gpt2, swin, shufflenet]
