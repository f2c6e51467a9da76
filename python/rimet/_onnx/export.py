"""The steps of an export, one after the other."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

import rimet
from rimet._graph import bind_inputs
from rimet._onnx.encodings import TensorEncodings, take_out
from rimet._onnx.int32_bias import quantize_biases
from rimet._onnx.marked import Mark, MarkedModel
from rimet._onnx.names import name_nodes
from rimet._onnx.qdq import lower, minimum_opset
from rimet._onnx.trace import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET, trace
from rimet.quantization.affine import AffineQuantizerBase, Dequantize, Quantize
from rimet.quantization.base import QuantizerBase
from rimet.quantization.float import FloatEncoding, FloatQuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim._files import uncalibrated, write_text

__all__ = ["export_named_by_modules", "export_qdq", "export_with_encodings", "save"]

_BITWIDTHS = (2, 4, 8, 16, 32)
# Of the 2 GiB that a protocol buffer may take, some are left for the graph.
_LARGEST_FILE = 2**31 - 2**26


def export_qdq(
    model: nn.Module,
    args: Any,
    f: str | os.PathLike[str] | io.BytesIO,
    *,
    export_int32_bias: bool,
    prequantize_constants: bool,
    force_activation_as: str | None,
    kwargs: dict[str, Any],
) -> None:
    """:func:`rimet.onnx.export`."""
    external_data = bool(kwargs.pop("external_data", False))
    with _traced(model, args, kwargs, force_activation_as, is_qdq=True) as marked:
        if export_int32_bias:
            quantize_biases(marked)
        lower(marked, prequantize_constants)
        marked.model.metadata_props["producer"] = f"rimet {rimet.__version__}"
        save(marked.model, f, external_data)


def export_with_encodings(
    sim: QuantizationSimModel,
    args: Any,
    f: str | os.PathLike[str],
    *,
    encoding_version: str,
    export_int32_bias: bool,
    force_activation_as: str | None,
    kwargs: dict[str, Any],
) -> None:
    """``sim.onnx.export``: the floating-point graph, and the encodings of its tensors beside it."""
    path = Path(f)
    encodings_path = path.with_suffix(".encodings")
    if encodings_path == path:
        raise ValueError(f"f: expected the path of an ONNX file, got that of its encodings: {path}")
    external_data = bool(kwargs.pop("external_data", False))
    with _traced(sim.model, args, kwargs, force_activation_as, is_qdq=False) as marked:
        if export_int32_bias:
            quantize_biases(marked)
        encodings = take_out(marked)
        text = encodings.to_json(encoding_version, sim.quant_args, sim._excluded_layer_names)
        save(marked.model, path, external_data)
        write_text(encodings_path, text)


def export_named_by_modules(
    original_model: nn.Module,
    sim_model: nn.Module,
    args: Any,
    f: str | os.PathLike[str] | None,
    *,
    propagate_encodings: bool,
    encoding_version: str,
    quantizer_args: Mapping[str, Any],
    excluded_layers: Collection[str],
    kwargs: dict[str, Any],
) -> str:
    """``sim.export``: a floating-point graph whose nodes are called as modules.

    :param original_model: the model without quantizers, whose parameters are written
    :param f: path of the ONNX file; ``None``: none is written
    :return: text of the encodings file
    """
    opset_version = kwargs.pop("opset_version", None)
    opset_version = DEFAULT_OPSET if opset_version is None else opset_version
    dynamo = kwargs.pop("dynamo", False)
    _check_arguments(sim_model, opset_version, None, kwargs)
    _check_quantizers(sim_model, None)
    args = _positional(sim_model, args, kwargs)
    with trace(sim_model, args, dynamo=dynamo, opset_version=opset_version, **kwargs) as marked:
        marked.merge_equal()
        marked.fold_transposes()
        encodings = take_out(marked, copies=False)
        RemoveUnusedNodesPass()(marked.model)
        _take_parameters(marked, original_model)
        nodes = name_nodes(marked.model.graph, sim_model)
        text = encodings.to_json(encoding_version, quantizer_args, excluded_layers)
        if propagate_encodings:
            text = _with_inner_tensors(text, nodes, encodings)
        if f is not None:
            save(marked.model, f)
    return text


def _take_parameters(marked: MarkedModel, model: nn.Module) -> None:
    """Give the graph's parameters the values that they have in a model, and their names."""
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    initializers = marked.model.graph.initializers
    for name, value in list(initializers.items()):
        origin, perm = marked.transposed.get(name, (name, None))
        tensor = values.get(origin)
        if tensor is None or tensor.dtype != torch.float32:
            continue
        tensor = tensor.detach().as_subclass(torch.Tensor).cpu()
        tensor = tensor if perm is None else tensor.permute(perm)
        if value.shape is None or tuple(value.shape) != tuple(tensor.shape):
            continue  # what the exporter made of it
        if origin != name and origin not in initializers:
            value.name = name = origin
        value.const_value = ir.Tensor(tensor.contiguous().numpy(), name=name)


def _with_inner_tensors(
    text: str, nodes: Mapping[str, list[ir.Node]], encodings: TensorEncodings
) -> str:
    """An encodings file of format 0.6.1 with the bit-width of tensors between the nodes of a module:
    that of the module's output.
    """
    known = {id(value): mark for value, mark in encodings.activations}
    document = json.loads(text)
    for group in nodes.values():
        mark = known.get(id(group[-1].outputs[0]))
        if mark is None:
            continue
        is_float = isinstance(mark.encoding, FloatEncoding)
        entry = {"bitwidth": mark.encoding.bitwidth, "dtype": "float" if is_float else "int"}
        for node in group[:-1]:
            for output in node.outputs:
                if output.dtype in (None, ir.DataType.FLOAT) and node.op_type != "Shape":
                    document["activation_encodings"].setdefault(output.name, [entry])
    return json.dumps(document, indent=4, sort_keys=True)


@contextmanager
def _traced(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    force_activation_as: str | None,
    is_qdq: bool,
) -> Iterator[MarkedModel]:
    """The model's graph with marks where a runtime quantizes, derived ones included."""
    opset_version = kwargs.pop("opset_version", None)
    opset_version = DEFAULT_OPSET if opset_version is None else opset_version
    dynamo = kwargs.pop("dynamo", True)
    _check_arguments(model, opset_version, force_activation_as, kwargs)
    _check_quantizers(model, opset_version if is_qdq else None, has_integers=True)
    args = _positional(model, args, kwargs)
    with trace(model, args, dynamo=dynamo, opset_version=opset_version, **kwargs) as marked:
        # A cast, which runtimes do for a whole model.
        marked.drop(_is_half)
        if force_activation_as is not None:
            marked.force_sign(force_activation_as == "signed")
        marked.flatten_single_scales()
        marked.merge_equal()
        marked.fold_transposes()
        marked.quantize_parameters()
        marked.propagate()
        yield marked


def _positional(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional ones of example inputs; the others are added to ``kwargs["kwargs"]``, where
    ``torch.onnx.export`` takes them.
    """
    if isinstance(args, tuple):
        if args and isinstance(args[-1], dict) and not args[-1]:
            args = args[:-1]  # how torch.onnx.export is told that a dict in front is positional
        if not args:
            return args
    positional, keywords = bind_inputs(model, args)
    keywords = {**keywords, **(kwargs.pop("kwargs", None) or {})}
    if keywords:
        kwargs["kwargs"] = keywords
    elif isinstance(positional[-1], dict):
        return *positional, {}  # or the exporters take it for keywords
    return positional


def _is_half(mark: Mark) -> bool:
    encoding = mark.encoding
    return isinstance(encoding, FloatEncoding) and encoding.format.torch_dtype in (
        torch.float16,
        torch.bfloat16,
    )


def _check_arguments(
    model: nn.Module, opset_version: int, force_activation_as: str | None, kwargs: dict[str, Any]
) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(
            "model: expected a torch.nn.Module or a QuantizationSimModel, got "
            f"{type(model).__name__}"
        )
    if not isinstance(opset_version, int) or not MIN_OPSET <= opset_version <= MAX_OPSET:
        raise ValueError(
            f"opset_version: expected {MIN_OPSET} to {MAX_OPSET}, got {opset_version!r}"
        )
    if force_activation_as not in ("unsigned", "signed", None):
        raise ValueError(
            f"force_activation_as: expected 'unsigned', 'signed' or None, got {force_activation_as!r}"
        )
    for name, only in (
        ("export_params", True),
        ("keep_initializers_as_inputs", False),
        ("do_constant_folding", True),
    ):
        if kwargs.get(name, only) != only:
            raise NotImplementedError(f"{name}: models with quantizers support {only} only")
    if kwargs.get("verify"):
        raise ValueError(
            "verify: expected False, got True: torch would run the graph before its quantizers are "
            "QuantizeLinear and DequantizeLinear; compare the written file with the model in onnxruntime"
        )


def _check_quantizers(
    model: nn.Module, opset_version: int | None, has_integers: bool = False
) -> None:
    """Raise a RuntimeError that names all quantizers that stand in the way.

    :param opset_version: opset whose operators have to express the grids; ``None``: none has to
    :param has_integers: whether integer grids have to be all of an integer type
    """
    problems = [
        f"{path}: is not calibrated; run compute_encodings, or load encodings"
        for path in uncalibrated(model)
    ]
    quantizers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, QuantizerBase)
    ]
    for path, quantizer in quantizers:
        if isinstance(quantizer, Quantize | Dequantize):
            problems.append(
                f"{path}: expected a QuantizeDequantize, got a {type(quantizer).__name__}, which "
                "does half of it"
            )
            continue
        if has_integers and not _is_integer_type(quantizer):
            problems.append(
                f"{path}: expected a grid that is all of an integer type, got "
                f"[{quantizer.qmin}, {quantizer.qmax}]"
            )
            continue
        if opset_version is None or not quantizer.is_initialized():
            continue
        if isinstance(quantizer, AffineQuantizerBase) and quantizer.bitwidth not in _BITWIDTHS:
            problems.append(f"{path}: expected 2, 4, 8, 16 or 32 bits, got {quantizer.bitwidth}")
            continue
        if isinstance(quantizer, FloatQuantizeDequantize) and (
            quantizer.is_float16() or quantizer.is_bfloat16()
        ):
            continue
        encoding = quantizer.get_encodings()
        assert encoding is not None
        needed, what = minimum_opset(encoding)
        if opset_version < needed:
            problems.append(
                f"{path}: QuantizeLinear has {what} from opset {needed} on, got opset_version "
                f"{opset_version}"
            )
    dtypes = {
        str(parameter.dtype)
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype != torch.float32
    }
    if quantizers and dtypes:
        problems.append(f"the model: expected float32 parameters, got {', '.join(sorted(dtypes))}")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise RuntimeError("cannot be exported to ONNX:\n" + "\n".join(f"  - {p}" for p in shown))


def _is_integer_type(quantizer: QuantizerBase) -> bool:
    """Whether a quantizer's grid, if it is one of integers, is that of a signed or unsigned type."""
    if not isinstance(quantizer, AffineQuantizerBase):
        return True
    steps = quantizer.qmax - quantizer.qmin + 1
    return steps & (steps - 1) == 0 and quantizer.qmin in (0, -steps // 2)


def save(
    model: ir.Model, f: str | os.PathLike[str] | io.BytesIO, external_data: bool = False
) -> None:
    """Write a model, whole or not at all.

    :param f: a path, whose folders are made, or a buffer
    :param external_data: whether tensors go into a second file, ``{f}.data``; models beyond 2 GiB
        have one in any case
    """
    RemoveUnusedNodesPass()(model)
    if isinstance(f, io.BytesIO):
        f.write(ir.to_proto(model).SerializeToString())
        return
    path = Path(f)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        data = f"{path.name}.data"
        is_external = external_data or size > _LARGEST_FILE
        ir.save(model, part, external_data=data if is_external else None)
        if is_external and (part.parent / data).exists():
            os.replace(part.parent / data, path.parent / data)
        os.replace(part, path)
