"""Models and calibration data of the weight-quantization benchmarks.

Needs torch and torchvision alone: rimet's process and AIMET's both build from here, with the same bits.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class EncoderLayer(nn.Module):
    """A transformer encoder layer of plain modules: attention, feed-forward, layer norms behind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.final_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        split = (samples, length, self.heads, width // self.heads)
        query, key, value = (
            part(x).view(split).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5
        mixed = F.softmax(scores, dim=-1) @ value
        x = self.norm(x + self.output(mixed.transpose(1, 2).reshape(samples, length, width)))
        return self.final_norm(x + self.down(self.gelu(self.up(x))))


def encoder(layers: int, width: int) -> nn.Module:
    return nn.Sequential(*(EncoderLayer(width, max(1, width // 64)) for _ in range(layers)))


def resnet18(folded: bool) -> nn.Module:
    """torchvision's ResNet-18; ``folded``: batch norms folded into the convolutions."""
    import torchvision

    model = torchvision.models.resnet18().eval()
    if folded:
        for module in list(model.modules()):
            for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
                if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                    setattr(module, conv, fused)
                    setattr(module, norm, nn.Identity())
    return model


def chain(depth: int, width: int) -> nn.Module:
    """Equal layers, one after the other. Weights keep the signal's size: with torch's own, all samples
    become one and the same vector within thirty layers, and what a layer's error is, chance.
    """
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


MODELS = {"encoder": encoder, "resnet18": resnet18, "chain": chain}


def build(
    name: str, arguments: list[int], shape: list[int], num_batches: int
) -> tuple[nn.Module, list[Tensor]]:
    """A model with random weights, and batches of normal numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name](*arguments).eval()
        return model, [torch.randn(shape) for _ in range(num_batches)]


LAYERS = (nn.Linear, nn.Conv2d)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each Linear and Conv2d."""
    return {
        path: module.weight.detach().as_subclass(Tensor).clone()
        for path, module in model.named_modules()
        if isinstance(module, LAYERS)
    }


@torch.no_grad()
def quantized_weights(simulation: nn.Module) -> dict[str, Tensor]:
    """The weights of a simulation on their grids."""
    return {
        path: module.param_quantizers["weight"](module.weight).as_subclass(Tensor).clone()
        for path, module in simulation.named_modules()
        if isinstance(module, LAYERS)
    }


@torch.no_grad()
def reconstruction_errors(
    model: nn.Module, batches: list[Tensor], rounded: dict[str, Tensor]
) -> dict[str, float]:
    """For each layer the mean squared error of its output in the model with the rounded weights,
    against the original's, each with its own inputs.
    """
    quantized = copy.deepcopy(model)
    for path, weight in rounded.items():
        quantized.get_submodule(path).weight.copy_(weight)
    outputs: list[dict[str, Tensor]] = [{}, {}]
    handles = []
    for one, kept in zip((model, quantized), outputs, strict=True):
        for path, module in one.named_modules():
            if isinstance(module, LAYERS):

                def keep(_: nn.Module, __: object, out: Tensor, path=path, kept=kept) -> None:
                    kept[path] = out

                handles.append(module.register_forward_hook(keep))
    sums = dict.fromkeys(rounded, 0.0)
    try:
        for batch in batches:
            model(batch)
            quantized(batch)
            for path in sums:
                sums[path] += F.mse_loss(outputs[1][path], outputs[0][path]).item()
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / len(batches) for path, total in sums.items()}
