"""Small models on which rimet's quantizer placement and encodings are compared with AIMET's.

Used by the script that records the golden file (with AIMET) and by the test (with rimet): ``ops``
is the namespace of elementwise modules of either. Weights and inputs are made by a formula, so both
see the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class ConvBnRelu(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.relu2 = nn.ReLU()
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.avg(self.relu2(self.conv2(x)))
        return self.fc(self.drop(self.flatten(x)))


class Block(nn.Module):
    """A residual block with a functional or a modular addition."""

    def __init__(self, ops: Any, channels: int, out: int, stride: int, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.add = None if functional else ops.Add()
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.add is None:
            y += identity
        else:
            y = self.add(y, identity)
        return self.relu2(y)


class ResNet(nn.Module):
    def __init__(self, ops: Any, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(
            Block(ops, 8, 8, 1, functional), Block(ops, 8, 8, 1, functional)
        )
        self.layer2 = nn.Sequential(
            Block(ops, 8, 16, 2, functional), Block(ops, 16, 16, 1, functional)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        self.use_residual = stride == 1 and channels == out
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [
                nn.Conv2d(channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(),
            ]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
            nn.Sequential(nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        return self.classifier(x)


class Concat(nn.Module):
    """Concatenation as a module, with a functional addition, a depthwise convolution and the
    model's input.
    """

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.relu = nn.ReLU()
        self.cat = ops.Concat(1)
        self.head = nn.Conv2d(19, 4, 1)
        self.sig = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.relu(self.b(a))
        return self.sig(self.head(self.cat(a, b, x)))


class DenseFunctional(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv0(x)
        y = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(torch.cat([x, y], 1))))


class Mlp(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.bn = nn.BatchNorm1d(32)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(32, 16)
        self.prelu = nn.PReLU()
        self.fc3 = nn.Linear(16, 4, bias=False)
        self.tanh = nn.Tanh()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.fc2(self.relu(self.bn(self.fc1(x)))))
        return self.softmax(self.tanh(self.fc3(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.Hardswish()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(8, 4, 1)
        self.relu = nn.ReLU()
        self.up = nn.Conv2d(4, 8, 1)
        self.gate = nn.Hardsigmoid()
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        scale = self.gate(self.up(self.relu(self.down(self.pool(x)))))
        return self.out(x * scale)


class UNet(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)
        self.leaky = nn.LeakyReLU()
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.bn = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU()
        self.last = nn.Conv2d(8, 2, 1)
        self.resize = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.relu(self.down(x))
        b = self.relu2(self.bn(self.up(self.leaky(self.mid(self.pool(a))))))
        return self.resize(self.last(torch.cat((a, b), dim=1)))


class Shuffle(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(y)


class Transformer(nn.Module):
    """An encoder block with modular matrix products and a functional residual path."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1 = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.scores = ops.MatMul()
        self.scale = ops.Divide()
        self.softmax = nn.Softmax(dim=-1)
        self.mix = ops.MatMul()
        self.out = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.gelu = nn.GELU()
        self.down = nn.Linear(16, 8)
        self.norm3 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        n = self.norm1(x)
        q, k, v = (
            part.reshape(-1, 5, 2, 4).permute(0, 2, 1, 3)
            for part in (self.q(n), self.k(n), self.v(n))
        )
        scores = self.softmax(self.scale(self.scores(q, k.transpose(-1, -2)), 2.0))
        y = self.mix(scores, v).permute(0, 2, 1, 3).reshape(-1, 5, 8)
        x = x + self.out(y)
        x = x + self.down(self.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


class Modular(nn.Module):
    """Elementwise modules of all kinds, constants among their inputs."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.mul = ops.Multiply()
        self.sub = ops.Subtract()
        self.sigmoid = nn.Sigmoid()
        self.reshape = ops.Reshape()
        self.relu = nn.ReLU()
        self.mul2 = ops.Multiply()
        self.maximum = ops.Maximum()
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        y = self.mul(y, self.sigmoid(y))
        y = self.mul2(y, 0.5)
        y = self.reshape(y, (-1, 4))
        y = self.sub(self.relu(y), y)
        return self.out(self.maximum(y, self.relu.weight if hasattr(self.relu, "weight") else y))


class Reused(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.bn(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class PreAct(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.add = ops.Add()
        self.gn = nn.GroupNorm(2, 4)
        self.elu = nn.ELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return self.elu(self.gn(self.add(x, y)))


class Conv1dNet(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.bn1 = nn.BatchNorm1d(4)
        self.relu = nn.ReLU()
        self.pad = nn.ConstantPad1d(1, 0.0)
        self.conv2 = nn.Conv1d(4, 4, 3, groups=2)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool1d(2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.conv2(self.pad(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.pool(x).mean(-1))


class Conv3dNet(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)
        self.bn = nn.BatchNorm3d(2)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool3d(2)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        return self.fc(x.flatten(2).sum(2))


class TwoInputs(nn.Module):
    """Inputs that are only moved before the first layer, and one that feeds two layers."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)
        self.add = ops.Add()
        self.relu = nn.ReLU()
        self.identity = nn.Identity()
        self.fc3 = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.fc1(x.reshape(-1, 4))
        b = self.fc2(self.identity(y.transpose(0, 1)))
        c = self.relu(self.add(a, b))
        return self.fc3(c), self.relu(a) + y.transpose(0, 1)


class StartsWithRelu(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(3, 4, 3)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.softplus = nn.Softplus()
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.softplus(self.instance(self.conv(self.relu(x)))))


class Unused(nn.Module):
    """A module that does not run, and a convolution whose output goes two ways."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.never = nn.Conv2d(4, 4, 3)
        self.sub = ops.Subtract()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.sub(self.relu(y), y / 3.0)


class Recurrent(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.embed(tokens))
        z, _ = self.gru(y)
        return self.fc(z[:, -1])


class Activations(nn.Module):
    """Activations with and without ONNX names, pads and pools, one after the other."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Hardtanh(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU6(),
            nn.ZeroPad2d(1),
            nn.Conv2d(4, 4, 1),
            nn.Sigmoid(),
            nn.Conv2d(4, 4, 1),
            nn.SiLU(),
            nn.Conv2d(4, 4, 1),
            nn.PReLU(4),
            nn.Dropout2d(0.1),
            nn.LogSoftmax(1),
            nn.Softsign(),
            nn.AvgPool2d(2),
            nn.MaxPool2d(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _image(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (wave(shape, 0.37, 1.5),)


def wave(shape: tuple[int, ...], step: float, amplitude: float) -> torch.Tensor:
    """Numbers that look random enough and are the same everywhere."""
    count = math.prod(shape)
    steps = torch.arange(count, dtype=torch.float64)
    values = amplitude * torch.sin(step * steps + 0.01 * step * steps * steps)
    return values.to(torch.float32).reshape(shape)


MODELS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "conv_bn_relu": (ConvBnRelu, _image(2, 3, 8, 8)),
    "resnet_functional": (lambda ops: ResNet(ops, True), _image(2, 3, 32, 32)),
    "resnet_modular": (lambda ops: ResNet(ops, False), _image(2, 3, 32, 32)),
    "mobilenet_v2": (MobileNetV2, _image(2, 3, 16, 16)),
    "concat": (Concat, _image(2, 3, 6, 6)),
    "dense_functional": (DenseFunctional, _image(2, 3, 6, 6)),
    "mlp": (Mlp, _image(4, 16)),
    "squeeze_excite": (SqueezeExcite, _image(2, 3, 6, 6)),
    "unet": (UNet, _image(2, 3, 8, 8)),
    "shuffle": (Shuffle, _image(2, 3, 6, 6)),
    "transformer": (Transformer, lambda: (torch.arange(10).reshape(2, 5) % 11,)),
    "recurrent": (Recurrent, lambda: (torch.arange(8).reshape(2, 4) % 7,)),
    "activations": (Activations, _image(2, 3, 10, 10)),
    "modular": (Modular, _image(4, 8)),
    "reused": (Reused, _image(2, 3, 6, 6)),
    "preact": (PreAct, _image(2, 3, 6, 6)),
    "conv1d": (Conv1dNet, _image(2, 2, 12)),
    "conv3d": (Conv3dNet, _image(1, 1, 6, 6, 6)),
    "two_inputs": (TwoInputs, lambda: (wave((2, 2, 2), 0.9, 1.0), wave((4, 2), 0.7, 2.0))),
    "starts_with_relu": (StartsWithRelu, _image(1, 3, 6, 6)),
    "unused": (Unused, _image(1, 3, 6, 6)),
}


#: Models with functional operations or reused modules, to be compared after `prepare_model`, too. (AIMET looks into its own
#: elementwise modules and replaces them as well; rimet leaves them, so models with such are not in this list.)
PREPARED = (
    "resnet_functional",
    "mobilenet_v2",
    "dense_functional",
    "squeeze_excite",
    "unet",
    "shuffle",
    "reused",
)


def build(name: str, ops: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model in evaluation mode with its formula weights, and its input."""
    make, inputs = MODELS[name]
    model = make(ops).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(wave(tuple(parameter.shape), 0.31 + 0.17 * i, 0.4 + 0.03 * (i % 5)))
        for i, (key, buffer) in enumerate(model.named_buffers()):
            if key.endswith("running_var"):
                buffer.copy_(0.6 + wave(tuple(buffer.shape), 0.5 + 0.1 * i, 0.3).abs())
            elif key.endswith("running_mean"):
                buffer.copy_(wave(tuple(buffer.shape), 0.4 + 0.1 * i, 0.2))
    return model, inputs()


def describe(model: nn.Module, is_qmodule: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Where quantizers are, of which kind, with which ranges; shared quantizers by the path of
    their first place.
    """
    first: dict[int, str] = {}
    description: dict[str, Any] = {}

    def one(quantizer: Any, place: str) -> Any:
        if quantizer is None:
            return None
        if id(quantizer) in first:
            return first[id(quantizer)]
        first[id(quantizer)] = place
        result: dict[str, Any] = {
            "bitwidth": int(quantizer.bitwidth),
            "symmetric": bool(quantizer.symmetric),
            "shape": list(quantizer.shape),
        }
        if quantizer.is_initialized():
            result["min"] = quantizer.get_min().detach().flatten().tolist()
            result["max"] = quantizer.get_max().detach().flatten().tolist()
        return result

    for path, module in model.named_modules():
        if not is_qmodule(module):
            continue
        description[path] = {
            "inputs": [one(q, f"{path}.input.{i}") for i, q in enumerate(module.input_quantizers)],
            "outputs": [
                one(q, f"{path}.output.{i}") for i, q in enumerate(module.output_quantizers)
            ],
            "params": {
                name: one(q, f"{path}.{name}")
                for name, q in sorted(module.param_quantizers.items())
            },
        }
    return description
