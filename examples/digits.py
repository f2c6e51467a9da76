"""Data, model and training loop shared by the examples: handwritten digits and a small CNN.

Nothing here is about quantization. The model is written the way a rimet user writes one: every
operation that should get its own quantizer is a module, so `x + y` is `custom.Add()` and
`torch.cat` is `custom.Concat()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rimet.nn.modules import custom
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Split:
    """Images `[n, 1, 8, 8]` (float32, standardized) and labels `[n]` (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Split]:
        """Consecutive batches, in random order if a generator is given."""
        order = torch.arange(len(self))
        if generator is not None:
            order = order[torch.randperm(len(self), generator=generator)]
        for index in order.split(size):
            yield Split(self.images[index], self.labels[index])

    def first(self, count: int) -> Split:
        return Split(self.images[:count], self.labels[:count])


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: 1197 to train on, 600 to test on.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998. The data ships with
    scikit-learn, so nothing is downloaded. The split is fixed.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=600, random_state=0, stratify=digits.target
    )
    mean, std = float(train_x.mean()), float(train_x.std())

    def split(images: object, labels: object) -> Split:
        x = torch.tensor(images, dtype=torch.float32).unsqueeze(1)
        return Split((x - mean) / std, torch.tensor(labels, dtype=torch.int64))

    return split(train_x, train_y), split(test_x, test_y)


def conv_bn(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """MobileNetV1's block: depthwise 3x3, then 1x1."""
    depthwise = conv_bn(inputs, inputs, 3, groups=inputs)
    return nn.Sequential(*depthwise, nn.ReLU6(), *conv_bn(inputs, outputs, 1), nn.ReLU6())


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1 without activation, add."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        hidden = expansion * channels
        self.expand = nn.Sequential(*conv_bn(channels, hidden, 1), nn.ReLU())
        self.depthwise = nn.Sequential(*conv_bn(hidden, hidden, 3, groups=hidden), nn.ReLU())
        self.project = nn.Sequential(*conv_bn(hidden, channels, 1))
        self.add = custom.Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.project(self.depthwise(self.expand(x))))


class DigitsNet(nn.Module):
    """A CNN in miniature that has the parts of a real one, for images `[n, 1, 8, 8]`.

    Stem; separable and inverted residual block; strided grouped convolution; two more separable
    blocks; a depthwise and a 1x1 branch joined by a concat; 1x1 fusion; global pooling; Linear.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        double = 2 * width
        self.stem = nn.Sequential(*conv_bn(1, width, 3), nn.ReLU6())
        self.separable1 = separable(width, width)
        self.residual = InvertedResidual(width)
        self.down = nn.Sequential(*conv_bn(width, double, 3, stride=2, groups=4), nn.ReLU6())
        self.separable2 = nn.Sequential(separable(double, double), separable(double, double))
        self.branch1 = nn.Sequential(*conv_bn(double, double, 3, groups=double), nn.ReLU6())
        self.branch2 = nn.Sequential(*conv_bn(double, width, 1), nn.ReLU6())
        self.concat = custom.Concat(axis=1)
        self.fuse = nn.Sequential(*conv_bn(double + width, 2 * double, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(2 * double, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(self.separable1(self.stem(x)))
        x = self.separable2(self.down(x))
        x = self.concat(self.branch1(x), self.branch2(x))
        x = self.pool(self.fuse(x))
        return self.classifier(self.flatten(x))


def train(
    model: nn.Module,
    data: Split,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    description: str = "training",
) -> float:
    """Train with cross entropy and one learning-rate cycle; return the last epoch's mean loss.

    The cycle peaks at the optimizer's own learning rate. The loop knows nothing of quantization:
    quantization-aware training runs the same one.
    """
    generator = torch.Generator().manual_seed(seed)
    peak = optimizer.param_groups[0]["lr"]
    steps = epochs * -(-len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    model.train()
    loss = float("nan")
    with tqdm(total=epochs, desc=description, unit="epoch", leave=False) as bar:
        for _ in range(epochs):
            total = 0.0
            for batch in data.batches(batch_size, generator):
                optimizer.zero_grad()
                error = nn.functional.cross_entropy(model(batch.images), batch.labels)
                error.backward()
                optimizer.step()
                schedule.step()
                total += error.item() * len(batch)
            loss = total / len(data)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
    model.eval()
    return loss


def train_float_model(data: Split, *, epochs: int = 24, seed: int = 0) -> DigitsNet:
    """A trained `DigitsNet` with its batch norms, in eval mode.

    SGD with a high learning rate and weight decay on every parameter, the usual recipe for models
    of this kind, and for the usual reason hard to quantize afterwards: weight decay shrinks the
    channels that matter least, so the folded weights of one layer differ by orders of magnitude.
    """
    torch.manual_seed(seed)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2)
    train(model, data, optimizer, epochs=epochs, seed=seed, description="training FP32")
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of images classified correctly, in percent."""
    model.eval()
    correct = sum(
        int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in data.batches(200)
    )
    return 100.0 * correct / len(data)
