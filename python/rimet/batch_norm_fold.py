r"""Batch-norm folding: the layer before or behind a batch normalization takes over what it does.

With :math:`a = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`c = \beta - \mu a` a normalization
in evaluation mode is the affine map :math:`x \mapsto a x + c` per channel, so

.. math::
    \text{layer, norm:}\quad W' = a_{out} W,\quad b' = a b + c \qquad\qquad
    \text{norm, layer:}\quad W' = W a_{in},\quad b' = b + \sum_{in,\,taps} W c

([jacob2018], section 3.2). Computed in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from torch import nn

from rimet import _core
from rimet._graph import Recording, example_inputs
from rimet._graph.parameters import (
    LAYERS,
    Layer,
    engine_layer,
    entangled,
    is_padded,
    set_parameter,
)
from rimet._graph.recorder import is_frozen_batch_norm
from rimet.meta.connectedgraph import ConnectedGraph, record_model
from rimet.meta.operation import Op
from rimet.nn import BaseQuantizationMixin
from rimet.quantization.affine.quantizer import AffineQuantizerBase
from rimet.quantsim import QuantizationSimModel

__all__ = [
    "find_all_batch_norms_to_fold",
    "find_standalone_batchnorm_ops",
    "fold_all_batch_norms",
    "fold_all_batch_norms_to_scale",
    "fold_given_batch_norms",
]

BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
Pair: TypeAlias = tuple[Layer, BatchNorm]


class Folds(NamedTuple):
    """What becomes of the batch normalizations of a model."""

    backward: list[Pair]
    """(layer, normalization behind it)"""
    forward: list[tuple[BatchNorm, Layer]]
    """(normalization, layer behind it)"""
    standalone: list[BatchNorm]


def fold_all_batch_norms(
    model: nn.Module,
    input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None,
    dummy_input: Any = None,
) -> list[Pair]:
    """Folds every batch normalization that can be folded, in place; the model computes what it did.

    A folded normalization becomes ``nn.Identity``. One that stays is turned into its affine form:
    mean 0, variance 1, and a weight and bias that do the rest. ``torchvision.ops.FrozenBatchNorm2d``
    is folded like any other, and left as it is where it stays.

    The model runs once, in evaluation mode, to record its graph. Folded are Conv1d, Conv2d, Conv3d,
    their transposed forms and Linear, with any number of groups, if both modules ran once and
    nothing else sees the tensor between them or their parameters; backward (layer, then norm)
    where possible, else forward into layers without padding.

    Args:
        model: any module; the running statistics of its normalizations are what counts, whatever
            its mode.
        input_shapes: shape of the input, or a list of shapes; used without ``dummy_input``.
        dummy_input: example input, as for :class:`rimet.QuantizationSimModel`.

    Returns:
        The folded pairs ``(layer, norm)``, backward folds first, each in order of execution. The
        normalizations keep their parameters, as cross-layer equalization and bias correction need
        them.

    Raises:
        ValueError: neither ``input_shapes`` nor ``dummy_input``.
    """
    folds, _ = fold_all(model, input_shapes, dummy_input)
    return folds.backward + [(layer, norm) for norm, layer in folds.forward]


def fold_all(model: nn.Module, input_shapes: Any, dummy_input: Any) -> tuple[Folds, Recording]:
    """:func:`fold_all_batch_norms` that says which folds were made in which direction, and hands on
    the record (of the model before folding)."""
    folds, recording = _find(model, input_shapes, dummy_input)
    _fold(model, folds.backward, folds.forward)
    for norm in folds.standalone:
        # The ranges of a quantized norm belong to the parameters it has; a frozen one has none.
        if not isinstance(norm, BaseQuantizationMixin) and not is_frozen_batch_norm(norm):
            _to_affine_form(norm)
    return folds, recording


def find_all_batch_norms_to_fold(
    model: nn.Module,
    input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None,
    dummy_input: Any = None,
) -> tuple[list[Pair], list[tuple[BatchNorm, Layer]]]:
    """What :func:`fold_all_batch_norms` would fold: pairs ``(layer, norm)`` and ``(norm, layer)``.

    Arguments and errors as there; the model is left as it is.
    """
    folds, _ = _find(model, input_shapes, dummy_input)
    return folds.backward, folds.forward


def find_standalone_batchnorm_ops(connected_graph: ConnectedGraph) -> set[Op]:
    """The operations of a graph that are batch normalizations and cannot be folded."""
    recording = connected_graph._recording
    model = connected_graph._model
    norms = _match(model, recording.graph, dict(model.named_modules())).standalone
    return {op for op in connected_graph.ordered_ops if any(op.get_module() is n for n in norms)}


def fold_given_batch_norms(
    model: nn.Module, layer_pairs: Iterable[tuple[nn.Module, nn.Module]]
) -> None:
    """Folds the given pairs, in place.

    Args:
        model: the module that holds them. If their layers are quantized, folds are made as by
            :func:`fold_all_batch_norms_to_scale`.
        layer_pairs: ``(layer, norm)`` to fold backward, ``(norm, layer)`` to fold forward. That
            the pair stands in this order in the graph, and that nothing stands between, is taken
            on trust.

    Raises:
        ValueError: a pair that is not one layer and one normalization with running statistics; a
            fold that would change what the model computes (forward into a padded or transposed
            convolution; parameters that other modules share). Nothing is folded then.
        RuntimeError: a fold forward into a quantized layer.
    """
    paths = {module: path for path, module in model.named_modules()}
    backward: list[Pair] = []
    forward: list[tuple[BatchNorm, Layer]] = []
    for first, second in layer_pairs:
        is_forward = _is_norm(first)
        layer, norm = (second, first) if is_forward else (first, second)
        where = " and ".join(
            paths.get(module, "(not in the model)") or "the model itself"
            for module in (first, second)
        )
        if not isinstance(layer, LAYERS) or not _is_norm(norm):
            raise ValueError(
                f"layer_pairs, {where}: expected a layer ({', '.join(c.__name__ for c in LAYERS)}) "
                "and a batch normalization, "
                f"got {type(first).__name__} and {type(second).__name__}"
            )
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"layer_pairs, {where}: expected a norm with running statistics")
        if entangled(model, None, {path: m for m, path in paths.items() if m in (layer, norm)}):
            raise ValueError(
                f"layer_pairs, {where}: expected parameters that no other module shares"
            )
        if is_forward and is_padded(layer):
            raise ValueError(
                f"layer_pairs, {where}: expected a layer without padding, since a fold forward "
                f"into it would be wrong at the border, got {layer}"
            )
        if is_forward:
            forward.append((norm, layer))
        else:
            backward.append((layer, norm))
    _fold(model, backward, forward)


def fold_all_batch_norms_to_scale(sim: QuantizationSimModel) -> list[Pair]:
    """Folds batch normalizations of a calibrated simulation into its weights and the scales of
    their quantizers, in place.

    The weight is multiplied by ``gamma / sqrt(var + eps)`` of its output channel and so is the
    range of its quantizer (its ends change places where the factor is negative), so that the
    integers stay as they are: quantization-aware training with batch normalization, usually
    followed by :func:`rimet.bn_reestimation.reestimate_bn_stats`, loses nothing. (Weights on the
    lowest level of a signed grid move to the highest where the factor is negative: one level less.)
    The output quantizer of the normalization becomes the layer's.

    Args:
        sim: a simulation whose foldable layers have per-channel (or blockwise) weight quantizers,
            or none.

    Returns:
        The folded pairs ``(layer, norm)``.

    Raises:
        RuntimeError: a normalization that could be folded forward only; a weight quantizer that is
            per-tensor, or not calibrated, or not affine, or of a transposed convolution with
            groups. The simulation is left as it was.
    """
    modules = dict(sim.model.named_modules())
    folds = _match(sim.model, sim._recording.graph, modules)
    _fold(sim.model, folds.backward, folds.forward)
    return folds.backward


def _find(model: nn.Module, input_shapes: Any, dummy_input: Any) -> tuple[Folds, Recording]:
    args, kwargs = example_inputs(model, input_shapes, dummy_input)
    recording = record_model(model, args, kwargs)
    return _match(model, recording.graph, recording.modules), recording


def _match(model: nn.Module, graph: _core.Graph, modules: dict[str, nn.Module]) -> Folds:
    fixed = entangled(model, graph, modules)
    fixed.update(
        path
        for path, module in modules.items()
        if isinstance(module, nn.Identity)
        or (isinstance(module, BatchNorm) and module.running_mean is None)
    )
    padded = [path for path, m in modules.items() if isinstance(m, LAYERS) and is_padded(m)]
    backward, forward, standalone = _core.find_batch_norms_to_fold(graph, list(fixed), padded)
    return Folds(
        [(modules[layer], modules[norm]) for layer, norm in backward],  # type: ignore[misc]
        [(modules[norm], modules[layer]) for norm, layer in forward],  # type: ignore[misc]
        [modules[norm] for norm in standalone],  # type: ignore[misc]
    )


def _fold(
    model: nn.Module, backward: Sequence[Pair], forward: Sequence[tuple[BatchNorm, Layer]]
) -> None:
    """Folds and deletes. Everything that can fail comes before the first change."""
    paths = {module: path for path, module in model.named_modules()}
    for norm, layer in forward:
        if isinstance(layer, BaseQuantizationMixin):
            raise RuntimeError(
                f"{paths.get(norm)}: a batch norm cannot be folded forward into a quantized layer "
                f"({paths.get(layer)}): the channels of one weight share a scale there. "
                "Fold before making the simulation"
            )
    for layer, _ in backward:
        if isinstance(layer, BaseQuantizationMixin):
            _check_weight_quantizer(layer, paths.get(layer, "?"))
    # A layer may take a fold from either side, so each one sees the result of the last.
    for norm, layer in forward:
        _fold_one(layer, norm, "forward")
    for layer, norm in backward:
        if isinstance(layer, BaseQuantizationMixin):
            _fold_to_scale(layer, norm)
        _fold_one(layer, norm, "backward")
    _replace_by_identity(model, [norm for _, norm in backward] + [norm for norm, _ in forward])


def _is_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    return isinstance(module, BatchNorm) or is_frozen_batch_norm(module)


def _engine_norm(norm: BatchNorm) -> tuple[Any, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps


def _fold_one(layer: Layer, norm: BatchNorm, direction: str) -> None:
    weight, bias = _core.fold_batch_norm(engine_layer(layer), _engine_norm(norm), direction)
    set_parameter(layer, "weight", weight)
    set_parameter(layer, "bias", bias)


def _to_affine_form(norm: BatchNorm) -> None:
    scale, shift = _core.batch_norm_affine(_engine_norm(norm))
    assert norm.running_mean is not None and norm.running_var is not None
    # What remains of the normalization divides by sqrt(1 + eps).
    scale = (scale * (1.0 + norm.eps) ** 0.5).to(norm.running_mean.dtype)
    norm.affine = True
    set_parameter(norm, "weight", scale)
    set_parameter(norm, "bias", shift.to(scale.dtype))
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    norm.track_running_stats = False


def _replace_by_identity(model: nn.Module, norms: Sequence[nn.Module]) -> None:
    gone = set(norms)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in gone:
                parent._modules[name] = nn.Identity()


def _check_weight_quantizer(layer: Any, path: str) -> None:
    quantizer = layer.param_quantizers["weight"]
    if quantizer is None:
        return
    if not isinstance(quantizer, AffineQuantizerBase) or not quantizer.is_initialized():
        raise RuntimeError(
            f"{path}: expected a calibrated affine weight quantizer to fold a batch norm into, got "
            f"{quantizer}"
        )
    channels = engine_layer(layer)[0].shape
    axis = 1 if engine_layer(layer)[3] else 0
    shape = (1,) * (len(channels) - len(quantizer.shape)) + tuple(quantizer.shape)
    if shape[axis] != channels[axis]:
        raise RuntimeError(
            f"{path}: expected a weight quantizer with a scale per output channel (shape "
            f"{channels[axis]} in dimension {axis}) to fold a batch norm into, got shape "
            f"{tuple(quantizer.shape)}. Use a per-channel configuration, or fold before making "
            "the simulation"
        )
    if axis == 1 and layer.groups > 1:
        raise RuntimeError(
            f"{path}: a batch norm cannot be folded into the scales of a transposed convolution "
            f"with {layer.groups} groups: each scale serves a channel of every group. Fold before "
            "making the simulation"
        )


def _fold_to_scale(layer: Any, norm: Any) -> None:
    quantizer = layer.param_quantizers["weight"]
    if quantizer is not None:
        scale, _ = _core.batch_norm_affine(_engine_norm(norm))
        shape = [1] * len(quantizer.shape)
        shape[1 if engine_layer(layer)[3] else 0] = -1
        quantizer.set_range(
            *_core.scale_quantizer_range(quantizer.min, quantizer.max, scale.reshape(shape))
        )
    if isinstance(norm, BaseQuantizationMixin):
        layer.output_quantizers[0] = norm.output_quantizers[0]
