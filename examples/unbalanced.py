"""A model whose channels have very uneven ranges, though it computes what it did before.

Real models come out of training like this now and then (MobileNets are known for it), and one scale
per weight tensor then serves the small channels badly. Here it is done on purpose, so that what
cross-layer equalization undoes is known.
"""

from __future__ import annotations

import copy

import torch
from rimet.batch_norm_fold import find_all_batch_norms_to_fold, fold_all_batch_norms
from rimet.cross_layer_equalization import GraphSearchUtils
from torch import nn

INPUT_SHAPE = (1, 1, 8, 8)


def with_relu(model: nn.Module) -> nn.Module:
    """A copy with ReLU in place of ReLU6, which would see the scale of its input."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, nn.ReLU())
    return model


@torch.no_grad()
def unbalance(model: nn.Module, octaves: float = 3.0, seed: int = 0) -> None:
    """Multiplies channels by random factors up to `2 ** octaves` either way, and divides the next
    layer's weights by them, in place.

    The factors go into the batch norm behind the first layer of each pair.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = dict(find_all_batch_norms_to_fold(model, INPUT_SHAPE)[0])
    # Pairs are neighbours only once the norms between them are gone.
    folded = copy.deepcopy(model)
    fold_all_batch_norms(folded, INPUT_SHAPE)
    paths = {module: path for path, module in folded.named_modules()}
    for group in GraphSearchUtils(folded, INPUT_SHAPE).find_layer_groups_to_scale():
        layers = [model.get_submodule(paths[layer]) for layer in group]
        for first, second in zip(layers, layers[1:], strict=False):
            if second.groups not in (1, second.in_channels):
                continue
            exponents = octaves * (2 * torch.rand(first.out_channels, generator=generator) - 1)
            factors = exponents.exp2()
            norms[first].weight.mul_(factors)
            norms[first].bias.mul_(factors)
            channel = 1 if second.groups == 1 else 0  # a depthwise layer has one input per output
            shape = [1, 1, 1, 1]
            shape[channel] = -1
            second.weight.div_(factors.view(shape))
