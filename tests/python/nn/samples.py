"""For every registered module class: instances and inputs to try its quantized twin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rimet.nn.modules import custom
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import pack_padded_sequence


@dataclass(frozen=True)
class Sample:
    label: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]

    def __str__(self) -> str:
        return self.label

    def make(self) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(7)
        return self.module(), self.inputs()


SAMPLES: dict[type[nn.Module], list[Sample]] = {}


def _add(
    cls: type[nn.Module],
    make: tuple[Any, ...] | dict[str, Any] | Callable[[], nn.Module],
    *inputs: Any,
) -> None:
    """``inputs``: shapes (lists) of random tensors, tensors, or whatever else is passed on."""
    factory: Callable[[], nn.Module]
    if isinstance(make, dict):
        factory = lambda: cls(**make)  # noqa: E731
    elif isinstance(make, tuple):
        factory = lambda: cls(*make)  # noqa: E731
    else:
        factory = make

    def arguments() -> tuple[Any, ...]:
        def one(x: Any) -> Any:
            if isinstance(x, list) and all(isinstance(n, int) for n in x):
                return torch.randn(x)
            if isinstance(x, torch.Tensor):
                return x.clone()
            return x() if callable(x) else x

        return tuple(one(x) for x in inputs)

    rows = SAMPLES.setdefault(cls, [])
    module = "custom." if cls.__module__.endswith("custom") else ""
    label = f"{module}{cls.__name__}" + (f"-{len(rows)}" if rows else "")
    rows.append(Sample(label, factory, arguments))


def _rand(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(shape) * 0.9 + 0.05


def _int(high: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(high, shape)


def _bool(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(shape) > 0.5


# linear, convolution
_add(nn.Linear, (6, 5), [4, 6])
_add(nn.Linear, {"in_features": 6, "out_features": 5, "bias": False}, [2, 3, 6])
_add(NonDynamicallyQuantizableLinear, (6, 5), [4, 6])
_add(nn.Bilinear, (3, 4, 5), [2, 3], [2, 4])
for _d, _conv, _transposed in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    _size = [7, 6, 5][:_d]
    _add(_conv, (4, 6, 3), [2, 4, *_size])
    _add(
        _conv,
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 3,
            "padding": 1,
            "groups": 2,
            "bias": False,
            "padding_mode": "circular" if _d < 3 else "zeros",
        },
        [2, 4, *_size],
    )
    _add(_transposed, (4, 6, 3), [2, 4, *_size])
    _add(
        _transposed,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "groups": 2},
        [2, 4, *_size],
        [2 * n + 2 for n in _size] and tuple(2 * n + 2 for n in _size),
    )
_add(nn.Fold, ((4, 5), (2, 2)), [1, 12, 12])
_add(nn.Unfold, ((2, 2),), [1, 3, 4, 5])

# normalization
for _d in (1, 2, 3):
    _size = [7, 6, 5][:_d]
    for _kind in ("BatchNorm", "InstanceNorm"):
        _cls = getattr(nn, f"{_kind}{_d}d")
        _add(_cls, {"num_features": 4, "affine": True}, [3, 4, *_size])
        _add(_cls, {"num_features": 4, "affine": False}, [3, 4, *_size])
# In training mode it wants a process group and CUDA.
_add(nn.SyncBatchNorm, lambda: nn.SyncBatchNorm(4).eval(), [3, 4, 5])
_add(nn.LayerNorm, (6,), [3, 6])
_add(nn.LayerNorm, {"normalized_shape": (5, 6), "elementwise_affine": False}, [3, 5, 6])
_add(nn.GroupNorm, (2, 4), [3, 4, 5])
_add(nn.RMSNorm, (6,), [3, 6])
_add(nn.LocalResponseNorm, (2,), [3, 4, 5])

# activations
for _cls in (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.GLU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
):
    _add(_cls, (), [3, 8])
_add(nn.LogSoftmax, (1,), [3, 8])
_add(nn.Softmax, (1,), [3, 8])
_add(nn.Softmin, (1,), [3, 8])
_add(nn.Softmax2d, (), [1, 3, 4, 4])
_add(nn.Threshold, (0.1, 0.5), [3, 8])

# pooling
for _d in (1, 2, 3):
    _size = [8, 6, 4][:_d]
    _add(getattr(nn, f"AdaptiveAvgPool{_d}d"), (2,), [2, 3, *_size])
    _add(getattr(nn, f"AdaptiveMaxPool{_d}d"), (2,), [2, 3, *_size])
    _add(getattr(nn, f"AdaptiveMaxPool{_d}d"), (2, True), [2, 3, *_size])
    _add(getattr(nn, f"AvgPool{_d}d"), (2,), [2, 3, *_size])
    _add(getattr(nn, f"LPPool{_d}d"), (2, 2), _rand(2, 3, *_size))
    _add(getattr(nn, f"MaxPool{_d}d"), (2,), [2, 3, *_size])
    _add(getattr(nn, f"MaxPool{_d}d"), {"kernel_size": 2, "return_indices": True}, [2, 3, *_size])
    _add(
        getattr(nn, f"MaxUnpool{_d}d"),
        (2,),
        [1, 1, *(n // 2 for n in _size)],
        (
            lambda size=_size: torch.arange(torch.Size(n // 2 for n in size).numel()).reshape(
                1, 1, *(n // 2 for n in size)
            )
        ),
    )
_add(nn.FractionalMaxPool2d, (2, 3), [2, 3, 8, 6])
_add(nn.FractionalMaxPool3d, (2, 2), [2, 3, 8, 6, 4])

# padding, resizing, rearranging
for _d in (1, 2, 3):
    _size = [5, 4, 3][:_d]
    _add(getattr(nn, f"CircularPad{_d}d"), (1,), [2, 3, *_size])
    _add(getattr(nn, f"ConstantPad{_d}d"), (1, 0.5), [2, 3, *_size])
    _add(getattr(nn, f"ReflectionPad{_d}d"), (1,), [2, 3, *_size])
    _add(getattr(nn, f"ReplicationPad{_d}d"), (1,), [2, 3, *_size])
    _add(getattr(nn, f"ZeroPad{_d}d"), (1,), [2, 3, *_size])
_add(nn.ChannelShuffle, (2,), [1, 4, 3, 3])
_add(nn.Flatten, (), [2, 3, 4])
_add(nn.PixelShuffle, (2,), [1, 8, 3, 3])
_add(nn.PixelUnshuffle, (2,), [1, 2, 4, 4])
_add(nn.Unflatten, (1, (2, 3)), [2, 6])
_add(nn.Upsample, {"scale_factor": 2}, [1, 2, 3, 3])
_add(nn.UpsamplingBilinear2d, {"scale_factor": 2}, [1, 2, 3, 3])
_add(nn.UpsamplingNearest2d, {"scale_factor": 2}, [1, 2, 3, 3])

# dropout
_add(nn.AlphaDropout, (), [3, 8])
_add(nn.Dropout, (), [3, 8])
_add(nn.Dropout1d, (), [3, 4, 5])
_add(nn.Dropout2d, (), [3, 4, 5, 5])
_add(nn.Dropout3d, (), [3, 4, 5, 5, 5])
_add(nn.FeatureAlphaDropout, (), [3, 4, 5])

# embedding
_add(nn.Embedding, (10, 4), _int(10, 2, 3))
_add(nn.EmbeddingBag, {"num_embeddings": 10, "embedding_dim": 4, "mode": "mean"}, _int(10, 2, 3))
_add(
    nn.EmbeddingBag,
    {"num_embeddings": 10, "embedding_dim": 4, "mode": "sum"},
    _int(10, 6),
    torch.tensor([0, 2]),
    _rand(6),
)

# recurrent
_add(nn.RNN, (4, 5), [6, 2, 4])
_add(
    nn.RNN,
    {"input_size": 4, "hidden_size": 5, "num_layers": 2, "nonlinearity": "relu"},
    [6, 2, 4],
    [2, 2, 5],
)
_add(nn.GRU, {"input_size": 4, "hidden_size": 5, "bidirectional": True}, [6, 4])
_add(nn.GRU, {"input_size": 4, "hidden_size": 5, "bias": False}, [6, 2, 4], [1, 2, 5])
_add(
    nn.LSTM,
    {"input_size": 4, "hidden_size": 5, "proj_size": 3, "batch_first": True},
    [2, 6, 4],
)
_add(nn.LSTM, (4, 5), [6, 2, 4], lambda: (torch.randn(1, 2, 5), torch.randn(1, 2, 5)))
_add(nn.LSTM, (4, 5), lambda: pack_padded_sequence(torch.randn(6, 2, 4), torch.tensor([6, 3])))
_add(nn.RNNCell, (4, 5), [2, 4])
_add(nn.GRUCell, (4, 5), [2, 4], [2, 5])
_add(nn.LSTMCell, (4, 5), [2, 4], lambda: (torch.randn(2, 5), torch.randn(2, 5)))
_add(nn.LSTMCell, (4, 5), [4])

# distances, losses
_add(nn.CosineSimilarity, (), [3, 4], [3, 4])
_add(nn.PairwiseDistance, (), [3, 4], [3, 4])
_add(nn.BCELoss, (), _rand(3, 4), _rand(3, 4))
_add(nn.BCEWithLogitsLoss, (), [3, 4], _rand(3, 4))
_add(
    nn.CTCLoss,
    (),
    lambda: torch.randn(8, 2, 5).log_softmax(-1),
    lambda: torch.randint(1, 5, (2, 3)),
    torch.tensor([8, 8]),
    torch.tensor([3, 3]),
)
_add(nn.CosineEmbeddingLoss, (), [3, 4], [3, 4], torch.tensor([1, -1, 1]))
_add(nn.CrossEntropyLoss, (), [3, 4], _int(4, 3))
_add(nn.CrossEntropyLoss, (), [3, 4], _rand(3, 4))
_add(nn.GaussianNLLLoss, (), [3, 4], [3, 4], _rand(3, 4))
_add(nn.HingeEmbeddingLoss, (), [3], torch.tensor([1, -1, 1]))
_add(nn.HuberLoss, (), [3, 4], [3, 4])
_add(nn.KLDivLoss, {"reduction": "batchmean"}, [3, 4], _rand(3, 4))
_add(nn.L1Loss, (), [3, 4], [3, 4])
_add(nn.MSELoss, (), [3, 4], [3, 4])
_add(nn.MarginRankingLoss, (), [3], [3], torch.tensor([1, -1, 1]))
_add(nn.MultiLabelMarginLoss, (), [3, 4], torch.tensor([[3, 0, -1, 1]] * 3))
_add(nn.MultiLabelSoftMarginLoss, (), [3, 4], lambda: (torch.rand(3, 4) > 0.5).float())
_add(nn.MultiMarginLoss, (), [3, 4], _int(4, 3))
_add(nn.NLLLoss, (), [3, 4], _int(4, 3))
_add(nn.PoissonNLLLoss, (), [3, 4], [3, 4])
_add(nn.SmoothL1Loss, (), [3, 4], [3, 4])
_add(nn.SoftMarginLoss, (), [3], torch.tensor([1.0, -1.0, 1.0]))
_add(nn.TripletMarginLoss, (), [3, 4], [3, 4], [3, 4])
_add(nn.TripletMarginWithDistanceLoss, (), [3, 4], [3, 4], [3, 4])

# elementwise modules
for _cls in (
    custom.Abs,
    custom.Atan,
    custom.Cos,
    custom.ElementwiseCeil,
    custom.ElementwiseFloor,
    custom.Erf,
    custom.Exponential,
    custom.Neg,
    custom.Round,
    custom.Sin,
    custom.Square,
    custom.Mean,
    custom.Sum,
    custom.Prod,
    custom.Norm,
    custom.Max,
    custom.Min,
    custom.AMax,
    custom.AMin,
    custom.Argmax,
    custom.Argmin,
    custom.CustomSiLU,
    custom.LogicalNot,
    custom.Normalize,
):
    _add(_cls, (), [3, 4])
for _cls in (custom.Asin, custom.Log, custom.RSqrt, custom.Sqrt):
    _add(_cls, (), _rand(3, 4))
for _cls in (custom.Max, custom.Min):
    _add(_cls, (), [3, 4], 1)
for _cls in (
    custom.Add,
    custom.Multiply,
    custom.Subtract,
    custom.Divide,
    custom.FloorDivide,
    custom.Fmod,
    custom.Remainder,
    custom.Maximum,
    custom.Minimum,
    custom.LogicalAnd,
    custom.LogicalOr,
):
    _add(_cls, (), [3, 4], [3, 4])
_add(custom.Add, (), [3, 4], 1.5)
_add(custom.Multiply, (), 2, [3, 4])
_add(custom.Pow, (), _rand(3, 4), [3, 4])
_add(custom.Pow, (), [3, 4], 2)
_add(custom.MatMul, (), [3, 4], [4, 5])
_add(custom.Outer, (), [3], [4])
_add(custom.Bmm, (), [2, 3, 4], [2, 4, 5])
_add(custom.Baddbmm, (), [2, 3, 5], [2, 3, 4], [2, 4, 5])
_add(custom.Addmm, (), [3, 5], [3, 4], [4, 5])
_add(custom.Concat, (), [3, 4], [2, 4], [1, 4])
_add(custom.Concat, (1,), [3, 4], [3, 2])
_add(custom.CumSum, (), [3, 4], 1)
_add(custom.Gather, (), [3, 4], 1, _int(4, 3, 2))
_add(custom.IndexSelect, (), [3, 4], 1, torch.tensor([0, 2]))
_add(custom.MaskedFill, (), [3, 4], _bool(3, 4), 0.5)
_add(custom.MaskedFill, (), [3, 4], _bool(3, 4), torch.tensor(0.5))
_add(custom.Permute, (), [3, 4, 5], (2, 0, 1))
_add(custom.Reshape, (), [3, 4], (2, 6))
_add(custom.NullRequant, (), [3, 4], (3, 4))
_add(custom.Select, (), [3, 4], 1, 2)
_add(custom.Split, (), [3, 4], 2, 1)
_add(custom.Tile, (), [3, 4], (2, 1))
_add(custom.Expand, (), [3, 1], 3, 4)
_add(custom.StridedSlice, (), [5, 6], ((0, 4, 2), (1, 5, 3)))
_add(custom.AdaptiveAvgPool2d, (), [1, 2, 4, 4], 2)
_add(custom.AvgPool2d, (), [1, 2, 4, 4], 2)
_add(custom.MaxPool2d, (), [1, 2, 4, 4], 2)
_add(custom.Interpolate, (), [1, 2, 4, 4], 8)
_add(custom.Pad, (), [1, 2, 4, 4], (1, 1))
_add(custom.GridSample, (), [1, 2, 4, 4], [1, 3, 3, 2], "bilinear", "zeros", False)
_add(custom.BatchNorm, (), [3, 4, 5], [4], _rand(4), [4], [4])
_add(custom.GroupNorm, (), [3, 4, 5], 2)
_add(custom.DynamicConv2d, {"padding": 1}, [1, 2, 4, 4], [3, 2, 3, 3], [1, 3])
_add(custom.DynamicLinear, (), [3, 4], [5, 4], [5])
_add(custom.ChannelShuffle, (2,), [1, 4, 3, 3])
_add(custom.CustomGather, (), [3, 4], torch.tensor([[0, -1], [2, 1]]), 1)
_add(custom.DepthToSpaceCRDMode, ([2, 3],), [1, 12, 2, 2])
_add(custom.DepthToSpaceDCRMode, (2,), [1, 8, 2, 2])
_add(custom.ScatterND, (), [3, 4], torch.tensor([[0], [2]]), [2, 4])
_add(custom.ScatterND, (1,), [3, 4], torch.tensor([[0, 1], [2, 2]]), [2])
_add(custom.ScatterND, (2,), [3, 4], torch.tensor([[0, 1], [2, 2]]), [2])
_add(custom.ScatterElements, (1,), [3, 4], torch.tensor([[0, 2]]), [1, 2])
_add(custom.ScatterElements, (1, "sum"), [3, 4], torch.tensor([[0, 2]]), [1, 2])
_add(custom.GatherNd, (0,), [3, 4, 5], torch.tensor([[0, 1], [2, 3]]))
_add(custom.GatherNd, (1,), [2, 4, 5], torch.tensor([[[1]], [[3]]]))
_add(custom.OneHot, (4, 0, 1), _int(4, 3))
_add(custom.OneHot, (4, -0.5, 2.0), _int(4, 3))
_add(custom.RmsNorm, ([3, 4, 5], [1, 2], 1e-6), [3, 4, 5])
_add(custom.HadamardRotation, (12,), [3, 12])
_add(custom.RotaryEmbedding, (False, 4, 6), [1, 2, 3, 6], [1, 3, 2], [1, 3, 2])
_add(custom.RotaryEmbedding, (True, 4, 6), [1, 2, 3, 6], [5, 2], [5, 2], torch.tensor([[4, 0, 1]]))

# Twins without a sample of their own, each for a reason.
WITHOUT_SAMPLE = {
    "NLLLoss2d": "another name of NLLLoss, whose constructor warns",
    "MultiheadAttention": "has tests of its own",
    "RoiAlign": "needs torchvision; has a test of its own",
}

ALL = [sample for rows in SAMPLES.values() for sample in rows]
