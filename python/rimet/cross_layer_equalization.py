r"""Cross-layer equalization: per-tensor weight quantization for models with uneven channels.

Between two layers with only a positively homogeneous activation (:math:`f(s x) = s f(x)`, such as
ReLU) between them, each channel has a scale of its own that nobody sees: with a diagonal :math:`S`,

.. math::
    W_2 f(W_1 x + b_1) = (W_2 S) f(S^{-1} W_1 x + S^{-1} b_1)

and :math:`s_i = \sqrt{r_{1,i}\, r_{2,i}} / r_{2,i}` makes the ranges :math:`r` of channel :math:`i`
equal on both sides ([nagel2019], eq. 11). High-bias absorption then moves what is always there of a
layer's output into the next layer's bias ([nagel2019], section 4.1.3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from rimet import _core
from rimet._graph import Recording, example_inputs
from rimet._graph.parameters import engine_layer, entangled, set_parameter
from rimet.batch_norm_fold import BatchNorm, fold_all
from rimet.common.cross_layer_equalization import ClsLayerType, ClsSetInfo, ScaleFactor
from rimet.meta.connectedgraph import ConnectedGraph, record_model

__all__ = [
    "ClsLayerType",
    "ClsSet",
    "ClsSetInfo",
    "ClsSupportedLayer",
    "CrossLayerScaling",
    "GraphSearchUtils",
    "HighBiasFold",
    "ScaleFactor",
    "cls_supported_activations",
    "cls_supported_layers",
    "equalize_bn_folded_model",
    "equalize_model",
    "equalize_norm_linears",
    "get_ordered_list_of_conv_modules",
]

logger = logging.getLogger(__name__)

ClsSupportedLayer: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Conv1d | nn.ConvTranspose1d
ClsSet: TypeAlias = tuple[ClsSupportedLayer, ...]
"""Two layers, or three with a depthwise one in the middle, each feeding the next."""

cls_supported_layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.ConvTranspose1d)
cls_supported_activations = (nn.ReLU, nn.PReLU)


def equalize_model(
    model: nn.Module,
    input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None = None,
    dummy_input: Any = None,
) -> None:
    """Folds batch normalizations, equalizes layers and absorbs high biases, in place.

    Folding and scaling change nothing of what the model computes. Absorbing changes little: what a
    ReLU cuts off with a probability of 0.1%, and the border of layers that pad with zeros.

    Args:
        model: any module; put into evaluation mode by the caller, since what remains of a batch
            normalization would normalize in training mode.
        input_shapes: shape of the input, or a list of shapes; used without ``dummy_input``.
        dummy_input: example input, as for :class:`rimet.QuantizationSimModel`.

    Raises:
        ValueError: neither ``input_shapes`` nor ``dummy_input``.
    """
    folds, recording = fold_all(model, input_shapes, dummy_input)
    norms = [*(norm for _, norm in folds.backward), *(norm for norm, _ in folds.forward)]
    # The fold's record serves here, too: the model need not run again.
    infos = _scale(GraphSearchUtils._of_recording(model, recording, norms))
    HighBiasFold.bias_fold(infos, dict(folds.backward))  # type: ignore[arg-type]


def equalize_bn_folded_model(
    model: nn.Module,
    input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None,
    folded_pairs: Iterable[tuple[nn.Module, BatchNorm]],
    dummy_input: Any = None,
) -> None:
    """:func:`equalize_model` for a model whose batch normalizations are folded already.

    Args:
        folded_pairs: ``(layer, norm)`` of the folds backward; the norms with their parameters.
    """
    infos = CrossLayerScaling.scale_model(model, input_shapes, dummy_input)
    HighBiasFold.bias_fold(infos, dict(folded_pairs))  # type: ignore[arg-type]


def equalize_norm_linears(
    model: nn.Module,
    input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None = None,
    dummy_input: Any = None,
) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Equalizes LayerNorms and RMSNorms with the Linears behind them, in place.

    No part of :func:`equalize_model`, nor of AIMET. A normalization ends with a factor (and shift)
    per channel, which the columns of all Linears that it feeds can share: the factor takes the part
    of the first layer in cross-layer equalization, so that no column of a weight is much larger
    than others. What the model computes stays.

    Arguments and errors as for :func:`equalize_model`.

    Returns:
        ``(norm, linears)`` of what was equalized: norms with a weight per channel that feed nothing
        but Linears, which share their parameters with nobody.
    """
    args, kwargs = example_inputs(model, input_shapes, dummy_input)
    recording = record_model(model, args, kwargs)
    modules = recording.modules
    fixed = list(entangled(model, recording.graph, modules))
    done: list[tuple[nn.Module, list[nn.Linear]]] = []
    for path, paths in _core.find_norm_linears(recording.graph, fixed):
        norm, linears = modules[path], [modules[p] for p in paths]
        weight: Any = norm.weight
        bias = getattr(norm, "bias", None)
        diagonal = (weight.unsqueeze(1), bias, len(weight), False)
        layers, _ = _core.equalize_layers([diagonal], [engine_layer(x) for x in linears])  # type: ignore[arg-type]
        set_parameter(norm, "weight", layers[0][0].squeeze(1))
        if bias is not None:
            set_parameter(norm, "bias", layers[0][1])
        for linear, (new, _) in zip(linears, layers[1:], strict=True):
            set_parameter(linear, "weight", new)
        done.append((norm, linears))  # type: ignore[arg-type]
    return done


class GraphSearchUtils:
    """Finds the layers of a model that can be scaled together.

    Args:
        model: any module; it runs once, in evaluation mode.
        input_shapes: shape of the input, or a list of shapes; used without ``dummy_input``.
        dummy_input: example input, as for :class:`rimet.QuantizationSimModel`.

    Raises:
        ValueError: neither ``input_shapes`` nor ``dummy_input``.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None,
        dummy_input: Any = None,
    ) -> None:
        args, kwargs = example_inputs(model, input_shapes, dummy_input)
        self._search(model, record_model(model, args, kwargs), ())

    @classmethod
    def _of_recording(
        cls, model: nn.Module, recording: Recording, folded: Iterable[nn.Module]
    ) -> GraphSearchUtils:
        """A search on a record made before the normalizations ``folded`` went out of the model."""
        search = cls.__new__(cls)
        search._search(model, recording, folded)
        return search

    def _search(self, model: nn.Module, recording: Recording, folded: Iterable[nn.Module]) -> None:
        gone = set(folded)
        modules = {path: m for path, m in recording.modules.items() if m not in gone}
        groups = _core.find_layer_groups_to_scale(
            recording.graph,
            list(entangled(model, recording.graph, modules)),
            [path for path, m in recording.modules.items() if m in gone],
        )
        self._groups: list[list[ClsSupportedLayer]] = [
            [modules[path] for path, _ in group]  # type: ignore[misc]
            for group in groups
        ]
        self._activation = {
            modules[path]: activation for group in groups for path, activation in group
        }

    def find_layer_groups_to_scale(self) -> list[list[ClsSupportedLayer]]:
        """Chains of two or more convolutions, each the only one to see the last one's output, with
        nothing but ReLU or PReLU between them.

        Modules that run more than once, and modules whose parameters others compute with, are in
        none.
        """
        return [list(group) for group in self._groups if len(group) > 1]

    @staticmethod
    def convert_layer_group_to_cls_sets(layer_group: Sequence[ClsSupportedLayer]) -> list[ClsSet]:
        """Cuts a chain into sets: pairs of convolutions, or three layers where the middle one is
        depthwise. Neighbouring sets share a layer; grouped convolutions that are not depthwise are
        in none.
        """
        shapes = [(x.in_channels, x.out_channels, x.groups) for x in layer_group]
        return [tuple(layer_group[i] for i in cut) for cut in _core.cut_layer_group(shapes)]

    def is_relu_activation_present_in_cls_sets(
        self, cls_sets: Sequence[ClsSet]
    ) -> list[bool | tuple[bool, ...]]:
        """Per set: whether an activation follows its first layer; of three layers, the first two."""
        flags: list[bool | tuple[bool, ...]] = []
        for cls_set in cls_sets:
            present = tuple(self._activation[layer] for layer in cls_set[:-1])
            flags.append(present[0] if len(present) == 1 else present)
        return flags

    @staticmethod
    def does_module_have_relu_activation(
        connected_graph: ConnectedGraph, module: nn.Module
    ) -> bool:
        """Whether ReLU or PReLU alone takes what a module of the graph puts out.

        Raises:
            KeyError: the module did not run.
        """
        following = connected_graph._module_to_op_dict[module].output_ops
        return len(following) == 1 and isinstance(
            following[0].get_module(), cls_supported_activations
        )


class CrossLayerScaling:
    """Equalizes the channels of consecutive layers, in place; the function stays what it was."""

    @staticmethod
    def scale_model(
        model: nn.Module,
        input_shapes: tuple[int, ...] | list[tuple[int, ...]] | None = None,
        dummy_input: Any = None,
    ) -> list[ClsSetInfo]:
        """Equalizes every set of layers of a model that :class:`GraphSearchUtils` finds.

        Arguments and errors as for :func:`equalize_model`.

        Returns:
            What was done, set by set, in the order in which it was done.
        """
        return _scale(GraphSearchUtils(model, input_shapes, dummy_input))

    def scale_cls_sets(self, cls_sets: Sequence[ClsSet]) -> list[ScaleFactor]:
        """Equalizes sets one after the other; see :meth:`scale_cls_set`."""
        return [self.scale_cls_set(cls_set) for cls_set in cls_sets]

    def scale_cls_set(self, cls_set: ClsSet) -> ScaleFactor:
        """Equalizes a set.

        Args:
            cls_set: two layers, or three with a depthwise one in the middle. That each feeds the
                next, with nothing but positively homogeneous functions between, is taken on trust.

        Returns:
            float32 ``[channels]``, one array for two layers, two for three. 1 for channels that are
            zero in one of the layers.

        Raises:
            ValueError: not two or three one- or two-dimensional (transposed) convolutions, channels
                that do not fit, or a middle layer that is not depthwise. Nothing is changed then.
        """
        for layer in cls_set:
            if not isinstance(layer, cls_supported_layers):
                raise ValueError(
                    "cls_set: expected layers of "
                    f"{', '.join(c.__name__ for c in cls_supported_layers)}, got {layer}"
                )
        if len(cls_set) not in (2, 3):
            raise ValueError(f"cls_set: expected 2 or 3 layers, got {len(cls_set)}")
        chain = [engine_layer(layer) for layer in cls_set]
        parameters, factors = _core.equalize_layers(chain[:-1], chain[-1:])
        for layer, (weight, bias) in zip(cls_set, parameters, strict=True):
            set_parameter(layer, "weight", weight)
            if bias is not None:
                set_parameter(layer, "bias", bias)
        arrays = tuple(np.asarray(f.float().cpu().numpy()) for f in factors)
        return arrays[0] if len(arrays) == 1 else arrays

    def scale_cls_set_with_conv_layers(self, cls_set: ClsSet) -> np.ndarray:
        """:meth:`scale_cls_set` of two layers."""
        if len(cls_set) != 2:
            raise ValueError(f"cls_set: expected 2 layers, got {len(cls_set)}")
        factor = self.scale_cls_set(cls_set)
        assert isinstance(factor, np.ndarray)
        return factor

    def scale_cls_set_with_depthwise_layers(self, cls_set: ClsSet) -> tuple[np.ndarray, ...]:
        """:meth:`scale_cls_set` of three layers."""
        if len(cls_set) != 3:
            raise ValueError(f"cls_set: expected 3 layers, got {len(cls_set)}")
        factors = self.scale_cls_set(cls_set)
        assert isinstance(factors, tuple)
        return factors

    @staticmethod
    def create_cls_set_info_list(
        cls_sets: Sequence[ClsSet],
        scale_factors: Sequence[ScaleFactor],
        is_relu_activation_in_cls_sets: Sequence[bool | tuple[bool, ...]],
    ) -> list[ClsSetInfo]:
        """Puts sets, factors and activations together."""
        infos = []
        for cls_set, factors, flags in zip(
            cls_sets, scale_factors, is_relu_activation_in_cls_sets, strict=True
        ):
            if len(cls_set) == 2:
                factors, flags = (factors,), (flags,)  # type: ignore[assignment]
            pairs = [
                ClsSetInfo.ClsSetLayerPairInfo(*pair)
                for pair in zip(cls_set[:-1], cls_set[1:], factors, flags, strict=True)  # type: ignore[arg-type]
            ]
            infos.append(ClsSetInfo(*pairs))
        return infos


class HighBiasFold:
    """Moves what is always there of a layer's output into the bias of the next layer."""

    @classmethod
    def bias_fold(
        cls,
        cls_set_info_list: Iterable[ClsSetInfo],
        bn_layers: Mapping[nn.Module, BatchNorm],
    ) -> None:
        """Absorbs high biases, in place.

        Of channel ``i``, with ``beta`` and ``gamma`` of the normalization once folded into the
        first layer, divided by the scale factor, ``max(0, beta - 3 |gamma|)`` is moved where an
        activation stands between the layers, else all of ``beta``.

        Args:
            cls_set_info_list: what :meth:`CrossLayerScaling.scale_model` returned.
            bn_layers: layer to the normalization folded backward into it. Pairs without one, or
                without a bias in both layers, are left as they are.
        """
        for info in cls_set_info_list:
            for pair in info.cls_pair_info_list:
                norm = bn_layers.get(pair.layer1)
                if norm is None or pair.layer1.bias is None or pair.layer2.bias is None:
                    continue
                if norm.weight is None or norm.bias is None:
                    logger.info("%s has no weight and bias: its bias is not absorbed", norm)
                    continue
                bias1, bias2 = _core.absorb_bias(
                    engine_layer(pair.layer1),
                    engine_layer(pair.layer2),
                    (norm.weight, norm.bias),
                    norm.weight.new_tensor(pair.scale_factor),
                    bool(pair.relu_activation_between_layers),
                )
                set_parameter(pair.layer1, "bias", bias1)
                set_parameter(pair.layer2, "bias", bias2)


def get_ordered_list_of_conv_modules(model: nn.Module, dummy_input: Any) -> list[list[Any]]:
    """``[path, module]`` of the convolutions that can be scaled, in the order in which they run."""
    args, kwargs = example_inputs(model, None, dummy_input)
    recording = record_model(model, args, kwargs)
    entries = [entry for entry in recording.graph.modules() if entry["calls"]]
    entries.sort(key=lambda entry: entry["calls"][0])
    listed = [[entry["path"], recording.modules[entry["path"]]] for entry in entries]
    return [entry for entry in listed if isinstance(entry[1], cls_supported_layers)]


def _scale(search: GraphSearchUtils) -> list[ClsSetInfo]:
    """Equalizes every set of layers that a search found."""
    sets = [
        cls_set
        for group in search.find_layer_groups_to_scale()
        for cls_set in search.convert_layer_group_to_cls_sets(group)
    ]
    factors = CrossLayerScaling().scale_cls_sets(sets)
    return CrossLayerScaling.create_cls_set_info_list(
        sets, factors, search.is_relu_activation_present_in_cls_sets(sets)
    )
