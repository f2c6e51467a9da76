"""A simulated model as an ONNX graph in which every use of a quantizer is a mark.

While the model is exported, each quantizer's kernel calls the op ``rimet_onnx::mark``, which computes
what the quantizer computes and which both of torch's exporters translate into a mark
(:mod:`rimet._onnx.marked`). So what an exporter does to the model around the quantizers is what it
does to a model without any.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import version_converter
from torch import nn
from torch.onnx import symbolic_helper

from rimet._graph.recorder import evaluating
from rimet._onnx.marked import DOMAIN, OP_TYPE, Mark, MarkedModel, unused_name
from rimet.nn import BaseQuantizationMixin
from rimet.nn.slots import plain
from rimet.quantization.affine import (
    AffineEncoding,
    GroupedBlockEncoding,
    GroupedBlockQuantizeDequantize,
    QuantizeDequantize,
)
from rimet.quantization.affine.encoding import VectorEncoding
from rimet.quantization.base import EncodingBase, QuantizerBase
from rimet.quantization.float import FloatEncoding, FloatQuantizeDequantize

__all__ = ["DEFAULT_OPSET", "MAX_OPSET", "MIN_OPSET", "trace"]

#: Opsets of the standard domain: torch's default, and what can be asked for.
DEFAULT_OPSET, MIN_OPSET, MAX_OPSET = 20, 7, 25
# Beyond these a graph is exported at the limit, and converted.
_TORCHSCRIPT_MAX_OPSET, _DYNAMO_MAX_OPSET = 20, 23

_exporting = threading.Lock()
#: What the quantizers compute, by key, while a model is being exported.
_kernels: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

_library = torch.library.Library("rimet_onnx", "DEF")
_library.define("mark(Tensor input, int quantizer) -> Tensor")
_library.impl("mark", lambda input, key: _kernels[key](input), "CompositeExplicitAutograd")
torch.library.register_fake(
    "rimet_onnx::mark", lambda input, key: torch.empty_like(input), lib=_library
)
_mark_op = torch.ops.rimet_onnx.mark.default


@contextlib.contextmanager
def trace(
    model: nn.Module, args: Any, *, dynamo: bool, opset_version: int, **kwargs: Any
) -> Iterator[MarkedModel]:
    """Export a model, and give the graph with its marks for as long as the context is open.

    :param model: a simulation's model, calibrated; it is what it was afterwards, also on an error
    :param args, dynamo, kwargs: as of ``torch.onnx.export``
    :param opset_version: opset of the result, 7 to 25
    :raises Exception: whatever ``torch.onnx.export`` raises
    """
    marks: dict[int, Mark] = {}
    with contextlib.ExitStack() as stack:
        # The file of the TorchScript exporter: large tensors stay in it until they are written.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="rimet-onnx-")))
        with contextlib.ExitStack() as changes:
            changes.enter_context(_exporting)
            changes.enter_context(torch.no_grad())
            if kwargs.get("training") in (None, torch.onnx.TrainingMode.EVAL):
                changes.enter_context(evaluating(model))
            changes.callback(_kernels.clear)
            for key, (quantizer, mark) in enumerate(_quantizers(model, changes)):
                marks[key] = mark
                changes.enter_context(_marking(quantizer, key))
            export = _export_dynamo if dynamo else _export_torchscript
            exported = export(model, args, folder, opset_version, kwargs)
        if exported.opset_imports[""] < opset_version:
            version_converter.convert_version(exported, opset_version, fallback=True)
        exported.opset_imports.pop(DOMAIN, None)
        yield MarkedModel(exported, marks, _name_transposed(exported, model))


def _export_torchscript(
    model: nn.Module, args: Any, folder: Path, opset_version: int, kwargs: Mapping[str, Any]
) -> ir.Model:
    path = folder / "model.onnx"
    # The exporter detaches whatever is in the state dict; quantizers have dicts there.
    hidden = model.register_state_dict_post_hook(_drop_extra_state)
    torch.onnx.register_custom_op_symbolic("rimet_onnx::mark", _symbolic, MIN_OPSET)
    try:
        torch.onnx.export(
            model,
            args,
            str(path),
            dynamo=False,
            opset_version=min(opset_version, _TORCHSCRIPT_MAX_OPSET),
            **kwargs,
        )
    finally:
        torch.onnx.unregister_custom_op_symbolic("rimet_onnx::mark", MIN_OPSET)
        hidden.remove()
    return ir.load(path)


def _export_dynamo(
    model: nn.Module, args: Any, folder: Path, opset_version: int, kwargs: Mapping[str, Any]
) -> ir.Model:
    table = {**(kwargs.get("custom_translation_table") or {}), _mark_op: _translate}
    program = torch.onnx.export(
        model,
        args,
        None,
        dynamo=True,
        opset_version=min(opset_version, _DYNAMO_MAX_OPSET),
        **{**kwargs, "custom_translation_table": table},
    )
    assert program is not None
    return program.model


def _name_transposed(
    exported: ir.Model, model: nn.Module
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Call matrices after the parameters whose transposes they are: the TorchScript exporter folds the
    transposition of an unquantized weight, and calls the result ``onnx::MatMul_15``.

    :return: name -> original name, permutation
    """
    initializers = exported.graph.initializers
    nameless = [value for name, value in initializers.items() if name.startswith("onnx::")]
    named: dict[str, tuple[str, tuple[int, ...]]] = {}
    for value in nameless:
        if value.const_value is None or value.shape is None or len(value.shape) != 2:
            continue
        matrix = torch.from_numpy(np.array(value.const_value.numpy()))
        for path, parameter in model.named_parameters():
            if _is_transpose(parameter, matrix):
                value.name = unused_name(exported.graph, f"{path}_0")
                named[value.name] = path, (1, 0)
                break
    return named


def _is_transpose(parameter: nn.Parameter, matrix: torch.Tensor) -> bool:
    if parameter.dtype != matrix.dtype or parameter.shape != matrix.T.shape:
        return False
    tensor = plain(parameter.detach()).T
    # One row first: a model has many weights of one shape.
    return all(torch.equal(tensor[:rows].cpu(), matrix[:rows]) for rows in (1, None))


def _drop_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.endswith("_extra_state")]:
        del state[key]


@symbolic_helper.parse_args("v", "i")  # type: ignore[untyped-decorator]
def _symbolic(g: Any, input: Any, quantizer: int) -> Any:
    """A mark, for the TorchScript exporter."""
    output = g.op(f"{DOMAIN}::{OP_TYPE}", input, quantizer_i=quantizer)
    output.setType(input.type())
    return output


def _make_op() -> Any:
    schema = onnx.defs.OpSchema
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        OP_TYPE,
        schema(
            OP_TYPE,
            DOMAIN,
            1,
            inputs=[schema.FormalParameter("input", "T")],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[
                ("T", [f"tensor({t})" for t in ("float", "float16", "double", "bfloat16")], "")
            ],
            attributes=[schema.Attribute("quantizer", schema.AttrType.INT, "")],
        ),
    )


_op = _make_op()


def _translate(input, quantizer: int):  # type: ignore[no-untyped-def]
    """A mark, for the exporter on ``torch.export``."""
    return _op(input, quantizer=quantizer)


# -- quantizers ------------------------------------------------------------------------------------


def _quantizers(
    model: nn.Module, changes: contextlib.ExitStack
) -> list[tuple[QuantizerBase, Mark]]:
    """The quantizers of a model and their marks, and for the time of ``changes`` quantizers for
    parameters that were folded into their quantized values.
    """
    params: dict[int, str] = {}
    found: list[tuple[QuantizerBase, Mark]] = []
    for path, module in model.named_modules():
        if isinstance(module, BaseQuantizationMixin):
            for name, quantizer in list(module.param_quantizers.items()):
                where = f"{path}.{name}" if path else name
                if quantizer is not None:
                    params[id(quantizer)] = where
                    continue
                encoding = getattr(getattr(module, name, None), "encoding", None)
                unfolded = None if encoding is None else _quantizer_of(encoding)
                if unfolded is not None:
                    changes.enter_context(_unfolded(module, name, unfolded))
                    params[id(unfolded)] = where
                    found.append((unfolded, Mark(encoding.to("cpu")._detach(), True, where)))
    known = {id(quantizer) for quantizer, _ in found}
    for path, module in model.named_modules():
        if isinstance(module, QuantizerBase) and id(module) not in known:
            encoding = module.get_encodings()
            if encoding is not None:
                mark = Mark(
                    encoding.to("cpu")._detach(), id(module) in params, params.get(id(module), path)
                )
                found.append((module, mark))
    return found


def _quantizer_of(encoding: EncodingBase) -> QuantizerBase | None:
    if isinstance(encoding, VectorEncoding):
        return None  # values of a codebook, on no grid that ONNX knows
    if isinstance(encoding, GroupedBlockEncoding):
        return GroupedBlockQuantizeDequantize.from_encodings(encoding)
    if isinstance(encoding, AffineEncoding):
        return QuantizeDequantize.from_encodings(encoding)
    if isinstance(encoding, FloatEncoding):
        return FloatQuantizeDequantize.from_encodings(encoding)
    return None


@contextlib.contextmanager
def _unfolded(module: Any, name: str, quantizer: QuantizerBase) -> Iterator[None]:
    folded = module._parameters[name]
    module._parameters[name] = nn.Parameter(plain(folded.data), requires_grad=False)
    module.param_quantizers[name] = quantizer
    try:
        yield
    finally:
        module._parameters[name] = folded
        module.param_quantizers[name] = None


@contextlib.contextmanager
def _marking(quantizer: Any, key: int) -> Iterator[None]:
    """Within this context, a quantizer puts a mark where it computes."""
    kernel = quantizer._kernel

    def mark(input: torch.Tensor, *ends: torch.Tensor) -> Any:
        _kernels[key] = lambda tensor: kernel(tensor, *ends)
        return _mark_op(input, key)

    quantizer._kernel = mark
    try:
        yield
    finally:
        del quantizer._kernel
