r"""Bias correction: what quantization adds to a layer's output on average leaves through its bias.

With :math:`\epsilon = W_q - W`, the output of channel :math:`o` is off by
:math:`\sum_{in,\,taps} \epsilon\, E[x]` on average ([nagel2019], section 4.2). *Analytic*
correction computes :math:`E[x]` from the batch normalization in front, without data; *empirical*
correction compares mean outputs on data, activation quantization included.

AIMET had this up to its 2.0 releases.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rimet import _core
from rimet._graph import bind_inputs, example_inputs, tensors_in, without_labels
from rimet._graph.parameters import LAYERS, engine_layer, set_parameter
from rimet._graph.streaming import StreamingWalk, Visit
from rimet.common.bias_correction import ConvBnInfoType
from rimet.common.defs import ActivationType
from rimet.meta.connectedgraph import record_model
from rimet.quantsim import QuantizationSimModel, QuantParams

__all__ = ["ConvBnInfoType", "correct_bias", "find_all_conv_bn_with_activation"]

logger = logging.getLogger(__name__)


def correct_bias(
    model: nn.Module,
    quant_params: QuantParams,
    num_quant_samples: int,
    data_loader: Iterable[Any],
    num_bias_correct_samples: int,
    conv_bn_dict: Mapping[nn.Module, ConvBnInfoType] | None = None,
    perform_only_empirical_bias_corr: bool = True,
    layers_to_ignore: Sequence[nn.Module] | None = None,
) -> None:
    """Corrects the biases of a model's convolutions and Linears for quantization, in place.

    A simulation of the model is made and calibrated; then the layers are visited in order of
    execution, each with what the layers before it put out once corrected. A layer without bias gets
    one. All batches go through both models once, side by side, in memory for one layer at a time
    (see ``rimet._graph.streaming``): the time grows with the depth, not with its square.

    Fold batch normalizations first; after cross-layer equalization use empirical correction, since
    the normalizations' parameters no longer say what the layers put out.

    Args:
        model: the floating-point model.
        quant_params: how it is going to be quantized.
        num_quant_samples: samples to calibrate the simulation with.
        data_loader: iterated over once. A batch is a tensor, a tuple or list of positional
            arguments, or a dict of keyword arguments; what a tuple holds beyond the positional
            arguments of ``forward`` (labels) is left out. Samples are counted in dimension 0.
        num_bias_correct_samples: samples to compare means on.
        conv_bn_dict: layer to its neighbouring normalizations, from
            :func:`find_all_conv_bn_with_activation` before folding; for analytic correction.
        perform_only_empirical_bias_corr: if False, layers that ``conv_bn_dict`` knows an
            ``input_bn`` for are corrected analytically. Zero padding is not taken into account
            there.
        layers_to_ignore: modules whose bias stays.

    Raises:
        ValueError: no data, a ``round_mode`` other than ``"nearest"``, or ``layers_to_ignore`` that
            are no modules of the model.
        RuntimeError: the simulation cannot be made; see :class:`rimet.QuantizationSimModel`.

    The model is unchanged after an error.
    """
    ignored = set(layers_to_ignore or ())
    foreign = ignored.difference(model.modules())
    if foreign:
        raise ValueError(
            "layers_to_ignore: expected modules of the model, got "
            f"{', '.join(sorted(type(layer).__name__ for layer in foreign))} from elsewhere"
        )
    if quant_params.round_mode != "nearest":
        raise ValueError(
            f"quant_params.round_mode: expected 'nearest', got {quant_params.round_mode!r}"
        )
    batches = _take(model, data_loader, max(num_quant_samples, num_bias_correct_samples))
    args, kwargs = bind_inputs(model, batches[0])
    sim = QuantizationSimModel(
        model,
        (*args, kwargs) if kwargs else args,
        quant_scheme=quant_params.quant_scheme,
        default_output_bw=quant_params.act_bw,
        default_param_bw=quant_params.weight_bw,
        config_file=quant_params.config_file,
    )

    def calibrate(quantized: nn.Module) -> None:
        for batch in _first(batches, num_quant_samples):
            args, kwargs = bind_inputs(model, batch)
            quantized(*args, **kwargs)

    sim.compute_encodings(calibrate)

    calls = {entry["path"]: len(entry["calls"]) for entry in sim._recording.graph.modules()}
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LAYERS) or module in ignored or not calls.get(path):
            continue
        if calls[path] > 1:
            logger.warning("%s runs %d times: its bias is not corrected", path, calls[path])
            continue
        layers[path] = module

    known = {} if perform_only_empirical_bias_corr else (conv_bn_dict or {})
    walk = StreamingWalk(
        model, sim.model, _first(batches, num_bias_correct_samples), progress="bias correction"
    )
    biases: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for visit in walk.visit(layers):
            info = known.get(layers[visit.path])
            if info is not None and info.input_bn is not None:
                bias = _analytic(visit, info)
            else:
                bias = _empirical(visit)
            quantized: Any = visit.quant_module
            set_parameter(quantized, "bias", bias)
            biases[visit.path] = bias
    for path, bias in biases.items():
        set_parameter(layers[path], "bias", bias)


def find_all_conv_bn_with_activation(
    model: nn.Module, input_shape: tuple[int, ...] | list[tuple[int, ...]]
) -> dict[nn.Module, ConvBnInfoType]:
    """The convolutions and Linears of a model that have batch normalizations next to them.

    Args:
        model: any module; it runs once, in evaluation mode, on noise.
        input_shape: shape of the input, or a list of shapes.

    Returns:
        layer to its neighbours, in order of execution. Call this before folding; the entries stay
        valid afterwards.
    """
    args, kwargs = example_inputs(model, input_shape)
    recording = record_model(model, args, kwargs)
    modules = recording.modules
    found: dict[nn.Module, ConvBnInfoType] = {}
    for layer, input_bn, before, output_bn, behind in _core.find_batch_norm_neighbours(
        recording.graph
    ):
        found[modules[layer]] = ConvBnInfoType(
            None if input_bn is None else modules[input_bn],
            None if output_bn is None else modules[output_bn],
            ActivationType[before],
            ActivationType[behind],
        )
    return found


def _take(model: nn.Module, data_loader: Iterable[Any], samples: int) -> list[Any]:
    """The first batches of a loader that hold so many samples."""
    batches: list[Any] = []
    taken = 0
    for batch in data_loader:
        if taken >= samples:
            break
        batches.append(without_labels(model, batch))
        taken += _samples(batches[-1])
    if not batches:
        raise ValueError(
            "data_loader, num_quant_samples, num_bias_correct_samples: expected at least one "
            "sample, got none"
        )
    return batches


def _first(batches: Sequence[Any], samples: int) -> Sequence[Any]:
    """The first of the batches, so many that they hold the samples; at least one."""
    taken = 0
    for number, batch in enumerate(batches):
        taken += _samples(batch)
        if taken >= samples:
            return batches[: number + 1]
    return batches


def _samples(batch: Any) -> int:
    tensor = next(tensors_in(batch), None)
    return 1 if tensor is None or tensor.ndim == 0 else len(tensor)


def _channel_dim(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return -1
    return -1 - len(layer.kernel_size)  # type: ignore[arg-type]


def _empirical(visit: Visit) -> torch.Tensor:
    layer: Any = visit.float_module
    quantized: Any = visit.quant_module
    dim = _channel_dim(layer)
    float_mean, quant_mean = _core.ChannelMean(), _core.ChannelMean()
    for output in visit.float_outputs:
        float_mean.update(output, dim)
    # The range of the output's own quantizer was found before the layers in front were corrected, and
    # would clip.
    with quantized._remove_output_quantizers():
        for index, input in enumerate(visit.quant_inputs):
            args, kwargs = visit.float_arguments(index)
            if args:
                args = (input, *args[1:])
            else:
                kwargs = {**kwargs, "input": input}
            quant_mean.update(quantized(*args, **kwargs), dim)
    return _core.correct_bias_empirically(engine_layer(layer), float_mean, quant_mean)


def _analytic(visit: Visit, info: ConvBnInfoType) -> torch.Tensor:
    layer: Any = visit.float_module
    quantized: Any = visit.quant_module
    quantizer = quantized.param_quantizers["weight"]
    weight = quantized.weight if quantizer is None else quantizer(quantized.weight)
    norm = info.input_bn
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    mean_input = _core.expected_input(gamma, beta, info.in_activation_type.name)
    return _core.correct_bias_analytically(
        engine_layer(layer), weight.as_subclass(torch.Tensor), mean_input
    )
