"""Running exported models with onnxruntime, and comparing with the simulation."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
import rimet.onnx
import torch
from rimet.quantsim import QuantizationSimModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def calibrated(
    model: nn.Module, *args: Any, setup: Any = None, **kwargs: Any
) -> QuantizationSimModel:
    """A simulation of a model, calibrated on its example inputs; ``setup`` changes it before that."""
    sim = QuantizationSimModel(model.eval(), args, **kwargs)
    if setup is not None:
        setup(sim)
    with torch.no_grad():
        sim.compute_encodings(lambda simulated: simulated(*args))
    return sim


def exported(model: Any, *args: Any, **kwargs: Any) -> onnx.ModelProto:
    """The checked QDQ model of a simulation."""
    if kwargs.get("dynamo", True):
        kwargs = {"verbose": False, **kwargs}
    file = io.BytesIO()
    rimet.onnx.export(model, args, file, **kwargs)
    proto = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, *args: Tensor) -> list[np.ndarray[Any, Any]]:
    """Outputs of a model in onnxruntime, operator by operator as they stand in the file: its optimizer
    would replace them by integer kernels, which round elsewhere.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    feed = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feed)
    return outputs


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of a model's result."""
    return [tensor.detach() for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]


def output_steps(proto: onnx.ModelProto) -> list[float]:
    """The scale of each graph output; 0 for one that is not quantized."""
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    return [float(constants.get(f"{o.name}_scale", np.zeros(()))) for o in proto.graph.output]


def different(
    proto: onnx.ModelProto, sim: QuantizationSimModel, *args: Tensor
) -> list[tuple[float, float]]:
    """For each output, how far onnxruntime is from the simulation at most, in steps of the output's
    grid, and the share of elements that differ at all.
    """
    with torch.no_grad():
        expected = tensors(sim.model(*args))
    result = []
    for got, want, step in zip(run(proto, *args), expected, output_steps(proto), strict=True):
        distance = np.abs(got.astype(np.float64) - want.double().numpy())
        assert got.shape == tuple(want.shape)
        unit = step or float(want.abs().max()) * 2**-23
        result.append((float(distance.max(initial=0)) / unit, float((distance > unit / 2).mean())))
    return result


def assert_equal(
    proto: onnx.ModelProto, sim: QuantizationSimModel, *args: Tensor, steps: float = 1.0
) -> None:
    """That onnxruntime computes what the simulation computes.

    Its convolutions and matrix products add up in another order than torch's, which moves values by
    some 1e-7 of their size. Where one lies that close to the middle between two steps of the next grid,
    it goes to the other one: seldom with 8 bits (a step is 4e-3 of the range), for up to a tenth of
    the values with 16 (1.5e-5). What comes of such a flip is at most a step of the output's grid in
    these small models.
    """
    for distance, share in different(proto, sim, *args):
        assert distance <= steps + 1e-3, (distance, share)
        assert share <= 0.25, (distance, share)
