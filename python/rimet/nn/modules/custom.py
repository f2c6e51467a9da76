"""Torch functions as modules, so that their inputs and outputs can be quantized.

``Add()(x, y)`` is ``x + y``; each class here has a twin ``Quantized<Class>``, made by the rows at
the end of the file. A
module that stands for one function takes the arguments of that function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rimet.nn.mixin import QuantizationMixin, quantize_outputs
from rimet.nn.registry import stateless, twin
from rimet.nn.slots import quantize_each

# -- one function, one module ----------------------------------------------------------------------


def forward_function_wrapper(functional: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` method that calls ``functional`` with its arguments.

    :param functional: function of tensors
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return functional(*args, **kwargs)

    forward.__doc__ = f"``{_name_of(functional)}(*args, **kwargs)``"
    return forward


def create_wrapper_module(class_name: str, functional: Callable[..., Any]) -> Any:
    """An ``nn.Module`` class whose forward pass is one call of ``functional``.

    :param class_name: name of the class. To be pickled, it has to be assigned to that name in the
        calling module
    :param functional: function of tensors
    """
    frame = inspect.currentframe()
    caller = None if frame is None or frame.f_back is None else frame.f_back.f_globals["__name__"]
    return type(
        class_name,
        (nn.Module,),
        {
            "__module__": caller or __name__,
            "__doc__": f"``{_name_of(functional)}`` as a module.",
            "forward": forward_function_wrapper(functional),
        },
    )


def _name_of(functional: Callable[..., Any]) -> str:
    return getattr(functional, "__name__", repr(functional))


Subtract = create_wrapper_module("Subtract", torch.sub)
Divide = create_wrapper_module("Divide", torch.div)
FloorDivide = create_wrapper_module("FloorDivide", torch.floor_divide)
MatMul = create_wrapper_module("MatMul", torch.matmul)
Bmm = create_wrapper_module("Bmm", torch.bmm)
Baddbmm = create_wrapper_module("Baddbmm", torch.baddbmm)
Addmm = create_wrapper_module("Addmm", torch.addmm)
Outer = create_wrapper_module("Outer", torch.outer)
Remainder = create_wrapper_module("Remainder", torch.remainder)
Fmod = create_wrapper_module("Fmod", torch.fmod)
Maximum = create_wrapper_module("Maximum", torch.maximum)
Minimum = create_wrapper_module("Minimum", torch.minimum)

Abs = create_wrapper_module("Abs", torch.abs)
Asin = create_wrapper_module("Asin", torch.asin)
Atan = create_wrapper_module("Atan", torch.atan)
Cos = create_wrapper_module("Cos", torch.cos)
ElementwiseCeil = create_wrapper_module("ElementwiseCeil", torch.ceil)
ElementwiseFloor = create_wrapper_module("ElementwiseFloor", torch.floor)
ElementwiseUnarySign = create_wrapper_module("ElementwiseUnarySign", torch.sign)
Erf = create_wrapper_module("Erf", torch.erf)
Exponential = create_wrapper_module("Exponential", torch.exp)
Log = create_wrapper_module("Log", torch.log)
Neg = create_wrapper_module("Neg", torch.neg)
Round = create_wrapper_module("Round", torch.round)
RSqrt = create_wrapper_module("RSqrt", torch.rsqrt)
Sin = create_wrapper_module("Sin", torch.sin)
Sqrt = create_wrapper_module("Sqrt", torch.sqrt)
Square = create_wrapper_module("Square", torch.square)

AMax = create_wrapper_module("AMax", torch.amax)
AMin = create_wrapper_module("AMin", torch.amin)
Argmax = create_wrapper_module("Argmax", torch.argmax)
Argmin = create_wrapper_module("Argmin", torch.argmin)
CumSum = create_wrapper_module("CumSum", torch.cumsum)
Max = create_wrapper_module("Max", torch.max)
Mean = create_wrapper_module("Mean", torch.mean)
Min = create_wrapper_module("Min", torch.min)
Norm = create_wrapper_module("Norm", torch.norm)
Prod = create_wrapper_module("Prod", torch.prod)
Sum = create_wrapper_module("Sum", torch.sum)
TopK = create_wrapper_module("TopK", torch.topk)

Equal = create_wrapper_module("Equal", torch.eq)
Greater = create_wrapper_module("Greater", torch.gt)
GreaterEqual = create_wrapper_module("GreaterEqual", torch.ge)
Less = create_wrapper_module("Less", torch.lt)
LessEqual = create_wrapper_module("LessEqual", torch.le)
LogicalAnd = create_wrapper_module("LogicalAnd", torch.logical_and)
LogicalNot = create_wrapper_module("LogicalNot", torch.logical_not)
LogicalOr = create_wrapper_module("LogicalOr", torch.logical_or)
NotEqual = create_wrapper_module("NotEqual", torch.ne)
Where = create_wrapper_module("Where", torch.where)

Gather = create_wrapper_module("Gather", torch.gather)
IndexSelect = create_wrapper_module("IndexSelect", torch.index_select)
# Out of place, unlike in AIMET: an input that other modules use stays as it is.
MaskedFill = create_wrapper_module("MaskedFill", torch.masked_fill)
NonZero = create_wrapper_module("NonZero", torch.nonzero)
Permute = create_wrapper_module("Permute", torch.permute)
Reshape = create_wrapper_module("Reshape", torch.reshape)
Select = create_wrapper_module("Select", torch.select)
Shape = create_wrapper_module("Shape", torch.Tensor.size)
Split = create_wrapper_module("Split", torch.split)
Tile = create_wrapper_module("Tile", torch.tile)

AdaptiveAvgPool2d = create_wrapper_module("AdaptiveAvgPool2d", F.adaptive_avg_pool2d)
AvgPool2d = create_wrapper_module("AvgPool2d", F.avg_pool2d)
BatchNorm = create_wrapper_module("BatchNorm", F.batch_norm)
GridSample = create_wrapper_module("GridSample", F.grid_sample)
GroupNorm = create_wrapper_module("GroupNorm", F.group_norm)
Interpolate = create_wrapper_module("Interpolate", F.interpolate)
MaxPool2d = create_wrapper_module("MaxPool2d", F.max_pool2d)
Normalize = create_wrapper_module("Normalize", F.normalize)
Pad = create_wrapper_module("Pad", F.pad)
ScaledDotProductAttention = create_wrapper_module(
    "ScaledDotProductAttention", F.scaled_dot_product_attention
)

# -- modules with a signature or state of their own ------------------------------------------------


class Add(nn.Module):
    """``x + y``, for tensors and numbers."""

    def forward(self, x: Any, y: Any) -> Any:
        """Sum of two tensors (broadcast), a tensor and a number, or two numbers."""
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return torch.add(x, y)
        return x + y


class Multiply(nn.Module):
    """``x * y``, for tensors and numbers."""

    def forward(self, x: Any, y: Any) -> Any:
        """Product of two tensors (broadcast), a tensor and a number, or two numbers."""
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return torch.mul(x, y)
        return x * y


class Pow(nn.Module):
    """``x ** y``, for tensors and numbers."""

    def forward(self, x: Any, y: Any) -> Any:
        """Power of two tensors (broadcast), a tensor and a number, or two numbers."""
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return torch.pow(x, y)
        return x**y


class Concat(nn.Module):
    """``torch.cat`` of any number of tensors.

    :param axis: dimension to join along
    """

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self._axis = axis

    def forward(self, *x: Tensor) -> Tensor:
        """The tensors one after the other along ``axis``."""
        return torch.cat(x, dim=self._axis)

    def extra_repr(self) -> str:
        """The axis, in ``repr``."""
        return f"axis={self._axis}"


class DynamicConv2d(nn.Module):
    """2-d convolution whose weight is an input. Arguments as of ``torch.nn.Conv2d``."""

    def __init__(
        self,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve ``x`` ``[n, c_in, h, w]`` with ``weight`` ``[c_out, c_in / groups, kh, kw]``;
        ``bias`` is flattened.
        """
        if bias is not None:
            bias = bias.reshape(-1)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicLinear(nn.Module):
    """Linear layer whose weight is an input."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``, with ``weight`` ``[out_features, in_features]``."""
        return F.linear(x, weight, bias)


class CustomSiLU(nn.Module):
    """``x * sigmoid(x)`` as two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.mul = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        """SiLU of ``x``."""
        product: Tensor = self.mul(x, self.sigmoid(x))
        return product


class StridedSlice(nn.Module):
    """``x[start:stop:step, ...]``."""

    def forward(self, *args: Any) -> Tensor:
        """``args`` are a tensor and ``(start, stop, step)`` for each of its first dimensions."""
        x, ranges = args
        sliced: Tensor = x[tuple(slice(*one) for one in ranges)]
        return sliced


class ChannelShuffle(nn.Module):
    """Exchange channels between groups.

    :param groups: number of groups; divides the number of channels
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, *args: Tensor) -> Tensor:
        """``[n, groups * k, h, w]``: channel ``g * k + i`` goes to ``i * groups + g``."""
        (x,) = args
        n, c, h, w = x.shape
        return x.reshape(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Cast(nn.Module):
    """Conversion to another dtype.

    :param dtype: ``torch.dtype`` of the result
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in ``dtype``."""
        return x.to(self.dtype)


class CustomGather(nn.Module):
    """ONNX ``Gather``: whole slices along one axis."""

    def forward(self, data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
        """``data`` with dimension ``axis`` replaced by those of ``indices``; negative indices count
        from the end.
        """
        axis = axis % data.dim()
        wrapped = torch.where(indices < 0, indices + data.shape[axis], indices)
        shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
        return torch.index_select(data, axis, wrapped.reshape(-1)).reshape(shape)


class DepthToSpaceCRDMode(nn.Module):
    """ONNX ``DepthToSpace``, mode CRD (``torch.pixel_shuffle`` with a block of any shape).

    :param block_size: height and width of the block
    """

    def __init__(self, block_size: Sequence[int]) -> None:
        super().__init__()
        self.block_size_h, self.block_size_w = block_size[0], block_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c * bh * bw, h, w]`` to ``[n, c, h * bh, w * bw]``."""
        n, c, h, w = x.shape
        bh, bw = self.block_size_h, self.block_size_w
        blocks = x.reshape(n, c // (bh * bw), bh, bw, h, w)
        return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // (bh * bw), h * bh, w * bw)


class DepthToSpaceDCRMode(nn.Module):
    """ONNX ``DepthToSpace``, mode DCR.

    :param block_size: height and width of the (square) block
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """``[n, b * b * c, h, w]`` to ``[n, c, h * b, w * b]``."""
        n, c, h, w = x.shape
        b = self.block_size
        blocks = x.reshape(n, b, b, c // (b * b), h, w)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


class ScatterND(nn.Module):
    """ONNX ``ScatterND``.

    :param reduction: 0: the updates replace, 1: are added to, 2: are multiplied with what is there
    """

    def __init__(self, reduction: int = 0) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        """A copy of ``data``, updated at ``indices`` ``[..., k]``, whose last dimension addresses
        the first ``k`` of ``data``.
        """
        where = indices.to(torch.int64).unbind(-1)
        current = data[where]
        updates = updates.reshape(current.shape)
        if self.reduction == 1:
            updates = current + updates
        elif self.reduction == 2:
            updates = current * updates
        return data.index_put(where, updates)


class ScatterElements(nn.Module):
    """ONNX ``ScatterElements``.

    :param dim: dimension that the indices address
    :param reduce: ``"sum"``, ``"prod"``, ``"mean"``, ``"amax"``, ``"amin"``, or ``None``: the
        source replaces
    """

    def __init__(self, dim: int, reduce: str | None = None) -> None:
        super().__init__()
        self.dim, self.reduce = dim, reduce

    def forward(self, x: Any, index: Any, src: Any) -> Tensor:
        """``x`` with ``src`` scattered to ``index``. Lists are taken as tensors."""
        if isinstance(index, list):
            index = torch.tensor(index, dtype=torch.int64)
        if isinstance(src, list):
            src = torch.tensor(src)
        if isinstance(x, list):
            x = torch.tensor(x, dtype=src.dtype)
        scattered: Tensor
        if not self.reduce:
            scattered = torch.scatter(x, self.dim, index, src)
        elif isinstance(src, Tensor):
            scattered = torch.scatter_reduce(x, self.dim, index, src, self.reduce)
        else:
            scattered = torch.scatter(x, self.dim, index, src, reduce=self.reduce)
        return scattered


class GatherNd(nn.Module):
    """ONNX ``GatherND``.

    :param batch_dim: number of leading dimensions that data and indices share
    """

    def __init__(self, batch_dim: int) -> None:
        super().__init__()
        self.batch_dims = batch_dim

    def forward(self, data: Tensor, indices: Tensor) -> Tensor:
        """Elements or slices of ``data`` at ``indices`` ``[..., k]``, whose last dimension
        addresses the ``k`` dimensions after the batch.
        """
        batch, k = self.batch_dims, indices.shape[-1]
        if k > data.dim() - batch:
            raise ValueError(
                f"GatherNd: indices: expected at most {data.dim() - batch} in the last dimension, "
                f"got {k}"
            )
        where = indices.to(torch.int64).unbind(-1)
        # An index of its own for each batch dimension, shaped to broadcast against the others.
        free = indices.dim() - 1
        own = tuple(
            torch.arange(data.shape[i], device=data.device).reshape(
                [-1 if j == i else 1 for j in range(free)]
            )
            for i in range(batch)
        )
        return data[own + where]


class OneHot(nn.Module):
    """ONNX ``OneHot`` along a new last axis.

    :param num_classes: length of that axis
    :param off_value: value elsewhere
    :param on_value: value at the index
    """

    def __init__(self, num_classes: int, off_value: float, on_value: float) -> None:
        super().__init__()
        self.num_classes, self.off_value, self.on_value = num_classes, off_value, on_value

    def forward(self, inputs: Tensor) -> Tensor:
        """One-hot vectors of the integer tensor ``inputs``."""
        hot = F.one_hot(inputs, self.num_classes)
        if (self.off_value, self.on_value) != (0, 1):
            hot = hot * (self.on_value - self.off_value) + self.off_value
        return hot


class Expand(nn.Module):
    """``tensor.expand``."""

    def forward(self, tensor: Tensor, *args: Any) -> Tensor:
        """``tensor`` broadcast to a shape."""
        return tensor.expand(*args)


class NullRequant(Reshape):  # type: ignore[misc, valid-type]
    """Identity that is a reshape in a traced graph."""

    def forward(self, input: Tensor, shape: Any) -> Tensor:
        """``input``; while ``torch.jit`` traces, reshaped to ``shape``."""
        return torch.reshape(input, shape if torch.jit.is_tracing() else input.shape)


class RmsNorm(nn.Module):
    """Division by the root of the mean square, with scale and shift.

    :param input_shape: shape of the input
    :param axes: dimensions to normalize over
    :param epsilon: added to the mean square
    """

    def __init__(self, input_shape: Sequence[int], axes: Sequence[int], epsilon: float) -> None:
        super().__init__()
        self.epsilon, self.axes = epsilon, axes
        shape = [input_shape[i] for i in axes]
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """``x / sqrt(mean(x^2) + epsilon) * weight + bias``, computed in float32."""
        wide = x.to(torch.float32)
        root = torch.sqrt(
            torch.mean(wide * wide, dim=tuple(self.axes), keepdim=True) + self.epsilon
        )
        return (wide / root * self.weight + self.bias).to(x.dtype)


class HadamardRotation(nn.Module):
    """Product of the last dimension with a Hadamard matrix of the greatest power of two that
    divides it.

    :param size: length of the last dimension
    :param scale: factor; by default the one that makes the rotation orthogonal
    """

    hadamard: Tensor

    def __init__(self, size: int, scale: float | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"HadamardRotation: size: expected a positive number, got {size}")
        order = size & -size
        # Sylvester's construction: entry (i, j) is -1 to the number of bits that i and j share.
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < order:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        self.register_buffer("hadamard", matrix)
        self.scale = scale or 1 / math.sqrt(order)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate each group of ``2^k`` values in the last dimension of ``x``."""
        order = self.hadamard.shape[0]
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // order, order)
        return (F.linear(groups, self.hadamard) * self.scale).reshape(x.shape)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of the first values of each head.

    :param interleaved: whether the two values that rotate together are neighbours; otherwise half
        the dimension apart
    :param rotary_embedding_dim: how many values rotate
    :param head_size: length of the last dimension
    """

    def __init__(self, interleaved: bool, rotary_embedding_dim: int, head_size: int) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.rotary_embedding_dim = rotary_embedding_dim
        self.head_size = head_size

    def forward(
        self,
        x: Tensor,
        cos_cache: Tensor,
        sin_cache: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Rotate ``x`` ``[batch, heads, length, head_size]`` by the angles whose cosine and sine
        are given.

        :param cos_cache: ``[batch, length, dim / 2]``, or ``[positions, dim / 2]`` with
            ``position_ids`` ``[batch, length]``
        :param sin_cache: likewise
        """
        rotating, rest = x.split(
            [self.rotary_embedding_dim, self.head_size - self.rotary_embedding_dim], dim=-1
        )
        if self.interleaved:
            a, b = rotating[..., 0::2], rotating[..., 1::2]
        else:
            a, b = rotating.chunk(2, dim=-1)
        if position_ids is not None:
            cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
        cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)
        real, imaginary = cos * a - sin * b, sin * a + cos * b
        if self.interleaved:
            rotated = torch.stack((real, imaginary), dim=-1).reshape(rotating.shape)
        else:
            rotated = torch.cat((real, imaginary), dim=-1)
        return torch.cat((rotated, rest), dim=-1)


def _torchvision_ops(needed_by: str) -> Any:
    try:
        import torchvision.ops
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs torchvision; install it with `pip install torchvision`"
        ) from error
    return torchvision.ops


class RoiAlign(nn.Module):
    """ONNX ``RoiAlign``. Needs torchvision.

    :param output_size: height and width of what is cut out
    :param spatial_scale: from box coordinates to those of the input
    :param sampling_ratio: samples per bin and axis
    """

    def __init__(self, output_size: Any, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, inp: Tensor, roi: Tensor, batch_indices: Tensor) -> Tensor:
        """Cut boxes ``roi`` ``[k, 4]`` out of the images ``batch_indices`` ``[k]`` of ``inp``."""
        boxes = torch.cat((batch_indices.reshape(-1, 1).to(roi.dtype), roi), dim=1)
        aligned: Tensor = _torchvision_ops("RoiAlign").roi_align(
            inp, boxes, self.output_size, self.spatial_scale, self.sampling_ratio
        )
        return aligned


class NonMaxSuppression(nn.Module):
    """ONNX ``NonMaxSuppression``. Needs torchvision.

    :param iou_threshold: boxes that overlap a better one by more are dropped
    :param score_threshold: boxes with a lower score are dropped
    :param max_output_boxes_per_class: how many boxes of an image and class are kept
    """

    def __init__(
        self, iou_threshold: float, score_threshold: float, max_output_boxes_per_class: int
    ) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.max_output_boxes_per_class = max_output_boxes_per_class

    def forward(self, *args: Tensor) -> Tensor:
        """Rows ``(image, class, box)``, padded with zeros to the greatest possible number.

        :param args: boxes ``[images, n, 4]`` as ``(y1, x1, y2, x2)`` and scores ``[images, classes,
            n]``
        """
        boxes, scores = args[0], args[1]
        limit = self.max_output_boxes_per_class
        images, classes = scores.shape[:2]
        rows = torch.zeros(images * classes * limit, 3, dtype=torch.int64, device=boxes.device)
        filled = 0
        for image in range(images):
            for label in range(classes):
                kept = self.perform_nms_per_class(boxes[image], scores[image, label])[:limit]
                block = rows[filled : filled + len(kept)]
                block[:, 0], block[:, 1], block[:, 2] = image, label, kept
                filled += len(kept)
        return rows

    def perform_nms_per_class(self, boxes: Tensor, classes_score: Tensor) -> Tensor:
        """Indices of the boxes ``[n, 4]`` that survive, best score ``[n]`` first."""
        candidates = (classes_score > self.score_threshold).nonzero()[:, 0]
        corners = boxes[candidates][:, [1, 0, 3, 2]]
        kept = _torchvision_ops("NonMaxSuppression").nms(
            corners, classes_score[candidates], self.iou_threshold
        )
        return candidates[kept]


# -- quantized twins -------------------------------------------------------------------------------

QuantizedAMax = stateless(AMax)
QuantizedAMin = stateless(AMin)
QuantizedAbs = stateless(Abs)
QuantizedAdaptiveAvgPool2d = stateless(AdaptiveAvgPool2d)
QuantizedAdd = stateless(Add, 2, fresh=True)
QuantizedAddmm = stateless(Addmm, 3)
QuantizedArgmax = stateless(Argmax)
QuantizedArgmin = stateless(Argmin)
QuantizedAsin = stateless(Asin)
QuantizedAtan = stateless(Atan)
QuantizedAvgPool2d = stateless(AvgPool2d)
QuantizedBaddbmm = stateless(Baddbmm, 3)


def _quantized_batch_norm(
    self: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``torch.nn.functional.batch_norm`` on quantized tensors.

    :raises RuntimeError: in training mode with a quantizer for the running statistics: these are
        updated in place
    """
    slots = self._modules["input_quantizers"]._modules
    if training and (slots["1"] is not None or slots["2"] is not None):
        raise RuntimeError(
            "QuantizedBatchNorm: input_quantizers[1], input_quantizers[2]: the running statistics "
            "cannot be quantized while they are updated (training=True)"
        )
    # Statistics have no gradient, and torch refuses those that ask for one.
    with torch.no_grad():
        mean, variance = quantize_each(
            self,
            "input_quantizers",
            {"0": slots["1"], "1": slots["2"]},
            (running_mean, running_var),
        )
    others = {"0": slots["0"], "1": slots["3"], "2": slots["4"]}
    x, weight, bias = quantize_each(self, "input_quantizers", others, (input, weight, bias))
    output = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    return quantize_outputs(self, output)


_quantized_batch_norm.__name__ = "forward"
QuantizedBatchNorm = stateless(
    BatchNorm,
    ("input", "running_mean", "running_var", "weight", "bias"),
    namespace={"forward": _quantized_batch_norm},
)
QuantizedBmm = stateless(Bmm, 2, fresh=True)
QuantizedChannelShuffle = stateless(ChannelShuffle)
QuantizedConcat = stateless(Concat, variadic=True, function=torch.cat)
QuantizedCos = stateless(Cos)
QuantizedCumSum = stateless(CumSum)
QuantizedCustomGather = stateless(CustomGather)
QuantizedCustomSiLU = stateless(CustomSiLU)
QuantizedDepthToSpaceCRDMode = stateless(DepthToSpaceCRDMode)
QuantizedDepthToSpaceDCRMode = stateless(DepthToSpaceDCRMode)
QuantizedDivide = stateless(Divide, ("input", "other"), fresh=True)
QuantizedDynamicConv2d = stateless(DynamicConv2d, 3, function=F.conv2d)
QuantizedDynamicLinear = stateless(DynamicLinear, 3, function=F.linear)
QuantizedElementwiseCeil = stateless(ElementwiseCeil)
QuantizedElementwiseFloor = stateless(ElementwiseFloor)
QuantizedErf = stateless(Erf)
QuantizedExpand = stateless(Expand, like=lambda self, x, *args: None)
QuantizedExponential = stateless(Exponential)
QuantizedFloorDivide = stateless(FloorDivide, ("input", "other"))
QuantizedFmod = stateless(Fmod, ("input", "other"))
QuantizedGather = stateless(Gather)
QuantizedGatherNd = stateless(GatherNd)
QuantizedGridSample = stateless(GridSample, ("input", "grid"))
QuantizedGroupNorm = stateless(GroupNorm)
QuantizedHadamardRotation = stateless(HadamardRotation)
QuantizedIndexSelect = stateless(IndexSelect)
QuantizedInterpolate = stateless(Interpolate)
QuantizedLog = stateless(Log)
QuantizedLogicalAnd = stateless(LogicalAnd, 2)
QuantizedLogicalNot = stateless(LogicalNot)
QuantizedLogicalOr = stateless(LogicalOr, 2)
# The mask is boolean, the value a number or a tensor.
QuantizedMaskedFill = stateless(
    MaskedFill, ("x", "mask", "value"), like=lambda self, x, mask, value: None
)
QuantizedMatMul = stateless(MatMul, ("input", "other"), fresh=True)
QuantizedMax = stateless(Max)
QuantizedMaxPool2d = stateless(MaxPool2d)
QuantizedMaximum = stateless(Maximum, ("input", "other"))
QuantizedMean = stateless(Mean)
QuantizedMin = stateless(Min)
QuantizedMinimum = stateless(Minimum, ("input", "other"))
QuantizedMultiply = stateless(Multiply, 2, fresh=True)
QuantizedNeg = stateless(Neg)
QuantizedNorm = stateless(Norm)
QuantizedNormalize = stateless(Normalize)
QuantizedNullRequant = stateless(NullRequant, like=lambda self, x, shape: None)
QuantizedOneHot = stateless(OneHot)
QuantizedOuter = stateless(Outer, 2)
QuantizedPad = stateless(Pad)
QuantizedPermute = stateless(Permute)
QuantizedPow = stateless(Pow, 2)
QuantizedProd = stateless(Prod)
QuantizedRSqrt = stateless(RSqrt)
QuantizedRemainder = stateless(Remainder, ("input", "other"))
QuantizedReshape = stateless(Reshape)
QuantizedRmsNorm = twin(RmsNorm)
QuantizedRoiAlign = stateless(RoiAlign, 2)
QuantizedRotaryEmbedding = stateless(RotaryEmbedding, 4)
QuantizedRound = stateless(Round)
QuantizedScatterElements = stateless(ScatterElements, 3)
QuantizedScatterND = stateless(ScatterND, 3)
QuantizedSelect = stateless(Select)
QuantizedSin = stateless(Sin)
# One quantizer for all parts: they are one tensor still.
QuantizedSplit = stateless(
    Split, shared_output=True, like=lambda self, tensor, *args, **kwargs: None
)
QuantizedSqrt = stateless(Sqrt)
QuantizedSquare = stateless(Square)
QuantizedStridedSlice = stateless(StridedSlice)
QuantizedSubtract = stateless(Subtract, ("input", "other"), fresh=True)
QuantizedSum = stateless(Sum)
QuantizedTile = stateless(Tile)

for _module_cls in (Cast, ElementwiseUnarySign, Shape):
    QuantizationMixin.ignore(_module_cls)

__all__ = [
    _name
    for _name, _value in list(globals().items())
    if not _name.startswith("_") and getattr(_value, "__module__", None) == __name__
]
