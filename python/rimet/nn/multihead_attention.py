"""Quantized multi-head attention: one quantized module for each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rimet.nn.mixin import QuantizationMixin
from rimet.nn.modules import custom
from rimet.nn.registry import twin
from rimet.nn.torch_modules import QuantizedLinear, QuantizedSoftmax

__all__ = ["QuantizedMultiheadAttention"]

_STEPS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qk_matmul",
    "mask_add",
    "key_padding_mask_add",
    "softmax",
    "qkv_matmul",
    "mean",
    "cat_bias_k",
    "cat_bias_v",
)

_MASK_STEPS = ("mask_add", "key_padding_mask_add")
"""Steps that put on masks. A range that holds minus infinity has no steps left for the scores."""

_OPTIONAL_STEPS = (*_MASK_STEPS, "mean", "cat_bias_k", "cat_bias_v")
"""Steps that run for some arguments only: that no data comes there says nothing of the data."""


def _quant_init(self: Any) -> None:
    """No slots of its own: the steps of the computation become quantized modules."""
    in_weights = (
        (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is None
        else self.in_proj_weight.chunk(3)
    )
    in_biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    for name, weight, bias in zip("qkv", in_weights, in_biases, strict=True):
        setattr(self, f"{name}_proj", _projection(weight, bias))
    self.out_proj = _projection(self.out_proj.weight, self.out_proj.bias)
    # The projections hold them now (in the same memory).
    for name in (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ):
        if name in self._parameters:
            self._parameters[name] = None
    self.qk_matmul = custom.QuantizedMatMul()
    self.mask_add = custom.QuantizedAdd()
    self.key_padding_mask_add = custom.QuantizedAdd()
    self.softmax = QuantizedSoftmax(dim=-1)
    self.qkv_matmul = custom.QuantizedMatMul()
    self.mean = custom.QuantizedMean()
    self.cat_bias_k = custom.QuantizedConcat(axis=0)
    self.cat_bias_v = custom.QuantizedConcat(axis=0)
    self.param_quantizers = nn.ModuleDict()
    self.input_quantizers = nn.ModuleList()
    self.output_quantizers = nn.ModuleList()


def _projection(weight: Tensor, bias: Tensor | None) -> nn.Module:
    linear = QuantizedLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear  # type: ignore[no-any-return]


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _get_original_module(self: Any) -> nn.Module:
    """The ``torch.nn.MultiheadAttention`` with the parameters of the projections."""
    original = QuantizationMixin.get_original_module(self)
    for name in _STEPS:
        del original._modules[name]
    projections = [self._modules[f"{name}_proj"] for name in "qkv"]
    weights = [p.weight for p in projections]
    if self._qkv_same_embed_dim:
        original._parameters["in_proj_weight"] = _joined(weights)
    else:
        for name, weight in zip("qkv", weights, strict=True):
            original._parameters[f"{name}_proj_weight"] = weight
    biases = [p.bias for p in projections]
    original._parameters["in_proj_bias"] = None if biases[0] is None else _joined(biases)
    linear = self.out_proj.get_original_module()
    out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
    )
    out_proj.weight, out_proj.bias = linear.weight, linear.bias
    original._modules["out_proj"] = out_proj
    return original


def _joined(tensors: list[Any]) -> nn.Parameter:
    return nn.Parameter(
        torch.cat([t.detach() for t in tensors]), requires_grad=tensors[0].requires_grad
    )


def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
    """Takes state dicts of ``torch.nn.MultiheadAttention`` too."""
    for kind in ("weight", "bias"):
        joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if joined is not None:
            for name, part in zip("qkv", joined.chunk(3), strict=True):
                state_dict[f"{prefix}{name}_proj.{kind}"] = part
    for name in "qkv":
        weight = state_dict.pop(f"{prefix}{name}_proj_weight", None)
        if weight is not None:
            state_dict[f"{prefix}{name}_proj.weight"] = weight
    nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def _setstate(self: Any, state: Mapping[str, Any]) -> None:
    # That of the original adds an attribute to what very old versions of torch saved; these are no
    # quantized modules.
    nn.Module.__setstate__(self, dict(state))


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to the scores; boolean ones are minus infinity where true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q k^T / sqrt(head_dim) + mask) v``, per head; arguments as of
    ``torch.nn.MultiheadAttention``.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("MultiheadAttention: is_causal is a hint about attn_mask, and needs one")
    heads, head_dim = self.num_heads, self.head_dim
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif self.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    length, batch, embed = query.shape
    _check_masks(attn_mask, key_padding_mask, heads, batch, length, key.shape[0])

    q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
    mask, padding = _as_bias(attn_mask, q), _as_bias(key_padding_mask, q)
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    added = 0
    if self.bias_k is not None and self.bias_v is not None:
        k = self.cat_bias_k(k, self.bias_k.repeat(1, batch, 1))
        v = self.cat_bias_v(v, self.bias_v.repeat(1, batch, 1))
        added += 1
    # [length, batch, embed] -> [batch * heads, length, head_dim]
    q = q.reshape(length, batch * heads, head_dim).transpose(0, 1)
    k = k.reshape(k.shape[0], batch * heads, head_dim).transpose(0, 1)
    v = v.reshape(v.shape[0], batch * heads, head_dim).transpose(0, 1)
    if self.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    if added:
        mask = None if mask is None else F.pad(mask, (0, added))
        padding = None if padding is None else F.pad(padding, (0, added))
    if padding is not None:
        padding = padding[:, None, None, :].expand(-1, heads, -1, -1).reshape(batch * heads, 1, -1)
        mask = padding if mask is None else self.key_padding_mask_add(mask, padding)

    scores = self.qk_matmul(q, k.transpose(-2, -1)) / head_dim**0.5
    if mask is not None:
        scores = self.mask_add(scores, mask)
    weights = self.softmax(scores)
    dropped = F.dropout(weights, self.dropout) if self.training and self.dropout > 0 else weights
    attended = self.qkv_matmul(dropped, v).transpose(0, 1).reshape(length * batch, embed)
    output = self.out_proj(attended).reshape(length, batch, -1)
    if not batched:
        output = output.squeeze(1)
    elif self.batch_first:
        output = output.transpose(0, 1)
    if not need_weights:
        return output, None
    weights = dropped.reshape(batch, heads, length, -1)
    if average_attn_weights:
        weights = self.mean(weights, dim=1)
    return output, weights if batched else weights.squeeze(0)


def _check_masks(
    mask: Tensor | None, padding: Tensor | None, heads: int, batch: int, length: int, source: int
) -> None:
    if mask is not None:
        allowed = ((length, source), (batch * heads, length, source))
        if tuple(mask.shape) not in allowed:
            raise RuntimeError(
                f"MultiheadAttention: attn_mask: expected shape {allowed[0]} or {allowed[1]}, "
                f"got {tuple(mask.shape)}"
            )
    if padding is not None and tuple(padding.shape) != (batch, source):
        raise RuntimeError(
            f"MultiheadAttention: key_padding_mask: expected shape {(batch, source)}, "
            f"got {tuple(padding.shape)}"
        )


_forward.__name__ = "forward"

QuantizedMultiheadAttention = twin(
    nn.MultiheadAttention,
    0,
    0,
    namespace={
        "__quant_init__": _quant_init,
        "__setstate__": _setstate,
        "_load_from_state_dict": _load_from_state_dict,
        "forward": _forward,
        "get_original_module": _get_original_module,
        "_mask_steps": _MASK_STEPS,
        "_optional_steps": _OPTIONAL_STEPS,
    },
)
