"""Simulation of a quantized model: :class:`QuantizationSimModel` and what goes with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from rimet import _core
from rimet._graph import Recording, bind_inputs, record
from rimet._graph.recorder import evaluating
from rimet.common.defs import QuantizationDataType, QuantScheme
from rimet.common.quant_utils import get_conv_accum_bounds
from rimet.common.quantsim_config.utils import resolve_config
from rimet.nn import BaseQuantizationMixin
from rimet.nn import compute_encodings as observing
from rimet.nn.functional_ops import make_opaque, restore
from rimet.nn.generic import is_generic
from rimet.quantization.base import QuantizerBase
from rimet.quantsim import _files, _placing
from rimet.quantsim.report import SimulationReport

if TYPE_CHECKING:
    from rimet.meta.connectedgraph import ConnectedGraph

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

__all__ = [
    "QuantParams",
    "QuantScheme",
    "QuantizationDataType",
    "QuantizationSimModel",
    "QuantizationSimModelOnnxExporter",
    "check_accumulator_overflow",
    "compute_encodings_for_sims",
    "load_checkpoint",
    "load_encodings_to_sim",
    "save_checkpoint",
]


class _NotSpecified:
    def __repr__(self) -> str:
        return "<not specified>"


_NOT_SPECIFIED = _NotSpecified()

_SCHEME_NAMES = {
    "tf": QuantScheme.post_training_tf,
    "tf_enhanced": QuantScheme.post_training_tf_enhanced,
    "percentile": QuantScheme.post_training_percentile,
}


class QuantParams:
    """Settings of a simulation, bundled.

    Args:
        weight_bw: bits of parameters.
        act_bw: bits of activations.
        round_mode: ``"nearest"``.
        quant_scheme: how ranges are found.
        config_file: path or alias of a quantsim configuration.
    """

    def __init__(
        self,
        weight_bw: int = 8,
        act_bw: int = 8,
        round_mode: str = "nearest",
        quant_scheme: str | QuantScheme = QuantScheme.post_training_tf_enhanced,
        config_file: str | None = None,
    ) -> None:
        self.weight_bw = weight_bw
        self.act_bw = act_bw
        self.round_mode = round_mode
        self.quant_scheme = quant_scheme
        self.config_file = config_file


def _checked_scheme(scheme: str | QuantScheme | None) -> QuantScheme:
    if scheme is None:
        return QuantScheme.min_max
    if isinstance(scheme, QuantScheme):
        return scheme
    if isinstance(scheme, str) and scheme in _SCHEME_NAMES:
        return _SCHEME_NAMES[scheme]
    raise ValueError(
        f"quant_scheme: expected a QuantScheme or one of {', '.join(_SCHEME_NAMES)}, got {scheme!r}"
    )


def _check_bitwidth(name: str, value: Any, low: int, is_float: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if is_float and value not in (16, 32):
        raise ValueError(f"{name}: expected 16 or 32 with default_data_type float, got {value}")
    if not low <= value <= 32:
        raise ValueError(f"{name}: expected {low} to 32 bits, got {value}")


def _check_precision(output_bw: Any, param_bw: Any, data_type: Any) -> bool:
    """Whether grids are floating-point ones; a ValueError for precisions that there are not."""
    if data_type not in (QuantizationDataType.int, QuantizationDataType.float):
        raise ValueError(
            "default_data_type: expected QuantizationDataType.int or QuantizationDataType.float, "
            f"got {data_type!r}"
        )
    is_float = bool(data_type == QuantizationDataType.float)
    _check_bitwidth("default_output_bw", output_bw, 4, is_float)
    _check_bitwidth("default_param_bw", param_bw, 2, is_float)
    return is_float


def _read_config(config_file: str | None) -> tuple[str, _core.QuantSimConfig]:
    """The path of a configuration and its content; what is wrong with it names the file."""
    path = resolve_config(config_file)
    try:
        return path, _core.QuantSimConfig(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: quantsim configuration is not UTF-8 text: {error}") from None
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from None


def _quantized_parts(model: nn.Module) -> list[str]:
    """A list with what is wrong with a model that holds quantizers already."""
    quantized = [
        path or "the model itself"
        for path, module in model.named_modules()
        if isinstance(module, BaseQuantizationMixin)
    ]
    # Quantizers inside of quantized modules say nothing new.
    quantizers = [
        path or "the model itself"
        for path, module in model.named_modules()
        if isinstance(module, QuantizerBase)
    ]
    for what, paths in (("quantized modules", quantized), ("quantizers", quantizers)):
        if paths:
            shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
            return [
                f"model: expected a model without quantizers, but it holds {what}: {shown}. "
                "QuantizationSimModel.get_original_model gives the model without them"
            ]
    return []


class _RecordingError(RuntimeError):
    """A model failed on its example input."""


class QuantizationSimModel:
    """A model that computes as its quantized counterpart would.

    The model is run once on ``dummy_input`` to record its graph; the configuration then says where
    quantizers belong; each supported module becomes its quantized twin (:mod:`rimet.nn`). The
    result, :attr:`model`, is an
    ordinary module: it trains, copies, moves, saves and exports like any other.

    Typical use::

        sim = QuantizationSimModel(model, dummy_input)
        sim.compute_encodings(lambda m: [m(x) for x in calibration_batches])
        accuracy = evaluate(sim.model)
        sim.export("out", "model", dummy_input, export_to_torchscript=True)

    Args:
        model: any module that runs; left as it is unless ``in_place``.
        dummy_input: example input on the model's device: a tensor, a tuple or list of positional
            arguments, or a dict of keyword arguments; nested as the model wants them.
        quant_scheme: how ranges are found: a :class:`QuantScheme` or ``"tf"``, ``"tf_enhanced"``,
            ``"percentile"``. None stands for minimum and maximum.
        default_output_bw: bits of activations, 4 to 32.
        default_param_bw: bits of parameters, 2 to 32. Biases are not quantized by the default
            configuration.
        in_place: turn ``model`` itself into the simulation instead of a copy.
        config_file: path of a quantsim configuration, or an alias (``"default"``, ``"htp_v73"``,
            ...).
        default_data_type: integer or floating-point grids; floating point needs 16 or 32 bits.
        quantize_functional_ops: whether torch functions that the model's own forward methods call
            (``F.relu(x)``, ``x + y``, ``torch.cat``) have quantizers where the configuration asks
            for them, as modules have. They are children ``functional`` of the modules that call
            them. Without, as in AIMET, the next module quantizes its input instead where it can.
        quantize_unknown_modules: whether modules without parts whose class has no quantized twin
            are quantized by the rules that hold for all modules. Without, as in AIMET, they are an
            error.

    Attributes:
        model: the simulation.
        report: what has quantizers, and what is left in floating point and why.
        quant_args: the global settings, as encodings files state them.

    Raises:
        ValueError: a scheme, bit-width, data type or configuration that does not exist.
        FileNotFoundError: ``config_file`` is neither a file nor an alias.
        NotImplementedError: ``training_range_learning`` alone, or a configuration that asks for
            what has no meaning.
        UnknownModuleError: modules without a quantized twin, unless ``quantize_unknown_modules``;
            all are named, with the remedy.
        RuntimeError: no tensors in ``dummy_input``; the model holds quantizers already, or fails on
            ``dummy_input``. Such problems and unknown modules are named together, in one error.

    ``model`` is unchanged after an error.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        quant_scheme: str | QuantScheme | None = None,
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: str | None = None,
        default_data_type: QuantizationDataType = QuantizationDataType.int,
        *,
        quantize_functional_ops: bool = True,
        quantize_unknown_modules: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        scheme = _checked_scheme(quant_scheme)
        is_float = _check_precision(default_output_bw, default_param_bw, default_data_type)
        _placing.analyzer_for(scheme, ())
        path, config = _read_config(config_file)
        problems = _quantized_parts(model)
        args, kwargs = bind_inputs(model, dummy_input)

        if not in_place:
            model = copy.deepcopy(model)
        twins = _placing.make_twins(
            model, quantize_unknown_modules, masks_are_functions=quantize_functional_ops
        )
        if quantize_functional_ops and is_generic(twins.of.get("", model)):
            del twins.of[""]  # a model is more than one operation, even if it has no parts
        with _placing.put_wholes(model, twins) as model:
            cause = None
            if not problems:
                try:
                    recording = self._record(model, args, kwargs, twins, quantize_functional_ops)
                except _RecordingError as error:
                    problems, cause = [str(error)], error.__cause__
            problem = _placing.problems_of(twins, problems)
            if problem is not None:
                raise problem from cause
            if quantize_functional_ops:
                # One module in several places would have one range for different tensors: its calls
                # are taken for those of the functions that it calls, which have quantizers of their own.
                reused = _placing.reused_without_parameters(recording, twins.of)
                if reused:
                    for path in reused:
                        del twins.of[path]
                    recording = self._record(model, args, kwargs, twins, True, reused.values())
            for path in recording.hands_on:
                if path in twins.of and is_generic(twins.of[path]):
                    del twins.of[path]
            plan = recording.graph.place(
                config, default_output_bw, default_param_bw, is_float, quantize_functional_ops
            )
            maker = _placing.QuantizerMaker(model, plan, scheme)
            _placing.apply_plan(twins.of, plan, maker)
        # Nothing fails from here on, so that an error leaves the model as it was.
        functional_ops: list[str] = []
        if quantize_functional_ops:
            functional_ops = _placing.make_functional(recording, twins, plan, maker)
        replacements = {id(recording.modules[path]): twin for path, twin in twins.of.items()}
        self.model = _placing.replace_modules(model, replacements)
        _placing.forbid_fast_paths(self.model)
        # The unquantized modules have served their purpose; where they stood is kept.
        self._recording = dataclasses.replace(recording, modules={}, scopes={})
        self._paths = {
            "twins": list(twins.of),
            "ignored": list(twins.ignored),
            "modules": list(recording.modules),
            "scopes": list(recording.scopes),
        }
        self._quantize_functional_ops = quantize_functional_ops
        self._quant_scheme = scheme
        self._percentile_value = 100.0
        self._excluded_layer_names: list[str] = []
        self._note_placement(
            recording,
            twins,
            plan,
            functional_ops,
            config,
            path,
            default_output_bw,
            default_param_bw,
            default_data_type,
        )

    def _note_placement(
        self,
        recording: Recording,
        twins: _placing.Twins,
        plan: _core.Plan,
        functional_ops: list[str],
        config: _core.QuantSimConfig,
        config_file: str,
        default_output_bw: int,
        default_param_bw: int,
        default_data_type: QuantizationDataType,
    ) -> None:
        """What is said of the quantizers once they are in the model."""
        for path, quantizer in self.named_quantizers():
            quantizer._where = path
        self.report = SimulationReport._of(self, recording, twins, plan, functional_ops)
        for line in self.report.warnings():
            logger.warning(line)
        self._connected_graph: ConnectedGraph | None = None
        self._default_output_bw = default_output_bw
        self._default_param_bw = default_param_bw
        self._config_file = config_file
        self._hw_version = config.hw_version
        self._supported_kernels = config.supported_kernels
        self.quant_args: dict[str, Any] = {
            "quant_scheme": self._quant_scheme.name,
            "param_bitwidth": default_param_bw,
            "activation_bitwidth": default_output_bw,
            "dtype": default_data_type.name,
            "is_symmetric": config.symmetric_params,
            "per_channel_quantization": config.any_per_channel,
        }

    def configure_quantization_ops(
        self,
        config_file: str | None,
        default_output_bw: int,
        default_param_bw: int,
        default_data_type: QuantizationDataType,
    ) -> None:
        """Places the quantizers anew, by another configuration: as if the simulation had been made
        with these arguments.

        All quantizers are new ones without a range; parameters stay as they are.

        Args:
            config_file, default_output_bw, default_param_bw, default_data_type: as of the
                constructor.

        Raises:
            ValueError, FileNotFoundError, NotImplementedError: as the constructor; the simulation
                is unchanged then.
        """
        is_float = _check_precision(default_output_bw, default_param_bw, default_data_type)
        path, config = _read_config(config_file)
        plan = self._recording.graph.place(
            config, default_output_bw, default_param_bw, is_float, self._quantize_functional_ops
        )
        maker = _placing.QuantizerMaker(self.model, plan, self._quant_scheme)
        maker.make_all()
        at = self.model.get_submodule
        places = {kind: {p: at(p) for p in paths} for kind, paths in self._paths.items()}
        # Nothing fails from here on.
        restore(self.model)
        twins = _placing.Twins(places["twins"], places["ignored"], {}, {})
        recording = dataclasses.replace(
            self._recording, modules=places["modules"], scopes=places["scopes"]
        )
        for module in self.qmodules():
            for name in module.param_quantizers:
                module.param_quantizers[name] = None  # type: ignore[assignment]
        _placing.apply_plan(twins.of, plan, maker)
        functional_ops: list[str] = []
        if self._quantize_functional_ops:
            functional_ops = _placing.make_functional(recording, twins, plan, maker)
        self._note_placement(
            recording,
            twins,
            plan,
            functional_ops,
            config,
            path,
            default_output_bw,
            default_param_bw,
            default_data_type,
        )

    @staticmethod
    def _record(
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        twins: _placing.Twins,
        look_at_values: bool,
        transparent: Collection[nn.Module] = (),
    ) -> Recording:
        described = {path: _placing.describe_twin(twin) for path, twin in twins.of.items()}
        leaves = [m for m in twins.ignored.values() if next(m.children(), None) is None]
        try:
            return record(
                model,
                args,
                kwargs,
                twin_of=lambda path, module: described.get(path),
                class_of=_placing.plain_class,
                nodes=leaves,
                transparent=transparent,
                look_at_values=look_at_values,
            )
        except Exception as error:
            raise _RecordingError(
                f"{type(model).__name__} failed on dummy_input, so its graph could not be "
                "recorded: "
                f"{type(error).__name__}: {error}"
            ) from error

    # Modules and quantizers

    @property
    def connected_graph(self) -> ConnectedGraph:
        """The recorded graph in AIMET's form."""
        if self._connected_graph is None:
            from rimet.meta.connectedgraph import ConnectedGraph

            self._connected_graph = ConnectedGraph._from_recording(self._recording, self.model)
        return self._connected_graph

    def named_qmodules(self) -> Iterator[tuple[str, BaseQuantizationMixin]]:
        """Yields (path, module) of the quantized modules."""
        for path, module in self.model.named_modules():
            if isinstance(module, BaseQuantizationMixin):
                yield path, module

    def qmodules(self) -> Iterator[BaseQuantizationMixin]:
        """Yields the quantized modules."""
        for _, module in self.named_qmodules():
            yield module

    def quant_wrappers(self) -> Iterator[tuple[str, BaseQuantizationMixin]]:
        """Old name of :meth:`named_qmodules`."""
        return self.named_qmodules()

    def named_quantizers(self) -> Iterator[tuple[str, QuantizerBase]]:
        """Yields (path, quantizer) of the enabled quantizers; a shared one comes once."""
        for path, module in self.model.named_modules():
            if isinstance(module, QuantizerBase):
                yield path, module

    def quantizers(self) -> Iterator[QuantizerBase]:
        """Yields the enabled quantizers; a shared one comes once."""
        for _, quantizer in self.named_quantizers():
            yield quantizer

    def named_quantizer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name in the state dict, parameter) of the quantizers' parameters."""
        for path, quantizer in self.named_quantizers():
            yield from quantizer.named_parameters(prefix=path)

    def quantizer_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the quantizers' parameters, for an optimizer that trains ranges."""
        for _, parameter in self.named_quantizer_parameters():
            yield parameter

    def quantizer_state_dict(self) -> dict[str, Any]:
        """The part of ``model.state_dict()`` that belongs to quantizers."""
        prefixes = tuple(
            f"{path}." if path else ""
            for path, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, QuantizerBase)
        )
        state = self.model.state_dict()
        return {key: value for key, value in state.items() if prefixes and key.startswith(prefixes)}

    def get_supported_kernels(self) -> dict[str, list[Any]]:
        """Operator type (and ``"defaults"``) to the number formats that the target has kernels
        for.
        """
        return dict(self._supported_kernels)

    def set_percentile_value(self, percentile_value: float) -> None:
        """Sets the percentile that ranges are cut at, for the percentile scheme.

        Args:
            percentile_value: 90 to 100.

        Raises:
            ValueError: outside of 90 to 100.
        """
        if not 90 <= percentile_value <= 100:
            raise ValueError(f"percentile_value: expected 90 to 100, got {percentile_value}")
        self._percentile_value = float(percentile_value)
        for quantizer in self.quantizers():
            set_percentile = getattr(quantizer.encoding_analyzer, "set_percentile", None)
            if set_percentile is not None:
                set_percentile(percentile_value)

    def exclude_param_from_quantization(self, param_name_to_exclude: str) -> None:
        """Removes the quantizers of all parameters of that name (``"weight"``, ``"bias"``)."""
        for module in self.qmodules():
            if param_name_to_exclude in module.param_quantizers:
                module.param_quantizers[param_name_to_exclude] = None  # type: ignore[assignment]

    def exclude_layers_from_quantization(self, layers_to_exclude: Sequence[nn.Module]) -> None:
        """Turns modules of :attr:`model`, and all modules inside of them, back into unquantized
        ones.

        Args:
            layers_to_exclude: modules of :attr:`model`.

        Raises:
            ValueError: one of them is not a module of the model.
        """
        chosen = {id(module) for module in layers_to_exclude}
        missing = chosen - {id(module) for module in self.model.modules()}
        if missing:
            kinds = [type(m).__name__ for m in layers_to_exclude if id(m) in missing]
            raise ValueError(
                f"layers_to_exclude: expected modules of the simulation, got {', '.join(kinds)} "
                "from elsewhere"
            )
        parts = {id(part) for module in layers_to_exclude for part in module.modules()}
        replacements = {}
        for path, qmodule in list(self.named_qmodules()):
            if id(qmodule) in parts:
                module: Any = qmodule
                has_steps = bool(_placing.steps_of(module))
                if has_steps:  # functions between them may have quantizers
                    restore(module)
                original = module.get_original_module()
                if has_steps:  # nor are its functions those of the module around it
                    make_opaque(original)
                replacements[id(qmodule)] = original
                self._excluded_layer_names.append(path)
        self.model = _placing.replace_modules(self.model, replacements)

    # Calibration

    def compute_encodings(
        self,
        forward_pass_callback: Callable[..., Any],
        forward_pass_callback_args: Any = _NOT_SPECIFIED,
    ) -> None:
        """Calibrates: sets the range of every quantizer from what it sees.

        Parameters are calibrated from their own data first. Then the callback runs the model on
        representative inputs while the quantizers of activations observe without quantizing.
        Evaluation mode and ``no_grad`` are on meanwhile; each module gets its own mode back.

        Quantizers that saw no data (an expert without tokens, a mask head without detections) do
        nothing until they have a range; one warning and :attr:`report` name their modules.

        Args:
            forward_pass_callback: called as ``callback(model)``, or ``callback(model, args)`` if
                args are given.
            forward_pass_callback_args: second argument of the callback.

        Raises:
            TypeError: the callback is not callable.
            RuntimeError: the callback did not run the model: no quantizer saw data.
        """
        if not callable(forward_pass_callback):
            raise TypeError(
                "forward_pass_callback: expected a function of the model, got "
                f"{type(forward_pass_callback).__name__}"
            )
        args = () if forward_pass_callback_args is _NOT_SPECIFIED else (forward_pass_callback_args,)
        with self._calibrating():
            forward_pass_callback(self.model, *args)

    @staticmethod
    def prepare_sim_for_compute_encodings(sim: QuantizationSimModel) -> None:
        """Does nothing but log that it is no longer needed, as in AIMET."""
        logger.warning(
            "QuantizationSimModel.prepare_sim_for_compute_encodings is deprecated and does nothing: "
            "remove the call"
        )

    @contextlib.contextmanager
    def _calibrating(self) -> Iterator[None]:
        seen = [False]

        def note(*_: Any) -> None:
            seen[0] = True

        # Data reaches a quantizer only through the module that holds it.
        handles = [
            module.register_forward_pre_hook(note)  # type: ignore[attr-defined]
            for module in self.qmodules()
            if any(q is not None for q in (*module.input_quantizers, *module.output_quantizers))
        ]
        try:
            with evaluating(self.model), observing(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if handles and not seen[0]:
            raise RuntimeError(
                "compute_encodings: the callback did not run the model, so no quantizer of an "
                "activation saw data"
            )
        expected = {
            f"{path}.{name}" if path else name
            for path, module in self.named_qmodules()
            for name in getattr(module, "_optional_steps", ())
        }
        expected.update(self.report.bypassed)
        self.report.unreached = [
            path
            for path, module in self.named_qmodules()
            if any([q._end_calibration() for q in module._activation_quantizers()])
            and path not in expected
        ]
        if self.report.unreached:
            logger.warning("%s", self.report.unreached_warning())

    # Encodings files

    def get_activation_param_encodings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Encodings by module names, as :meth:`save_encodings_to_json` writes them."""
        sections = json.loads(_core.encodings_sections(*_files.collect(self.model)))
        return sections["activation_encodings"], sections["param_encodings"]

    def save_encodings_to_json(self, path: str, filename_prefix: str) -> None:
        """Writes ``{path}/{filename_prefix}.json`` with ``activation_encodings`` and
        ``param_encodings``.

        The file names modules and is what :meth:`load_encodings` reads. It is written whole or not
        at all.
        """
        text = _core.encodings_sections(*_files.collect(self.model))
        _files.write_text(Path(path) / f"{filename_prefix}.json", text)

    def load_encodings(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        strict: bool = True,
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool = True,
    ) -> None:
        """Sets ranges from an encodings file by module names, or from its content.

        Args:
            encodings: path, or the content as a dict: ``activation_encodings``,
                ``param_encodings``.
            strict: an entry for a module, parameter or quantizer that is not there is an error;
                otherwise it is left out.
            partial: quantizers without an entry keep their state; otherwise they are removed.
            requires_grad: whether the ranges train; None leaves that as it is.
            allow_overwrite: whether :meth:`compute_encodings` may change the ranges later.

        Raises:
            RuntimeError: ``strict`` and nothing to load, or entries without a place; all of them
                are named.
            ValueError: content that is not an encodings file; the message has the file and the
                JSON path, or line and column of what is not JSON.

        Nothing is changed if an error is raised.
        """
        self._load(encodings, strict, partial, requires_grad, allow_overwrite)

    def _load(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool,
        only_params: bool = False,
    ) -> None:
        named, activations, params = _files.read_encodings(encodings)
        if only_params:
            named, activations = [], []
        if strict and not named and not activations and not params:
            raise RuntimeError(
                "encodings: expected activation_encodings or param_encodings, got none"
            )
        modules = dict(self.named_qmodules())
        all_modules = dict(self.model.named_modules(remove_duplicate=False))
        found: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
            path: ({}, {}, {}) for path in modules
        }
        problems: list[str] = []

        def place(module: str, kind: int, key: str, entry: list[Any], what: str) -> None:
            path = module
            if path not in found and path in all_modules:
                # The same module by its other name.
                same = (p for p, m in modules.items() if m is all_modules[path])
                path = next(same, path)
            if path not in found:
                state = "is not quantized" if module in all_modules else "does not exist"
                problems.append(f"{what}: module {module!r} {state}")
                return
            qmodule = modules[path]
            slots: Any = (
                qmodule.input_quantizers,
                qmodule.output_quantizers,
                qmodule.param_quantizers,
            )[kind]
            quantizer = slots._modules.get(key)
            if quantizer is None:
                problems.append(f"{what}: there is no quantizer")
                return
            shape = getattr(quantizer, "shape", None)
            count = 1
            for size in shape or ():
                count *= size
            if entry and entry[0]["dtype"] == "int" and len(entry) != count:
                problems.append(
                    f"{what}: expected {count} encodings for a quantizer of shape "
                    f"{tuple(shape or ())}, "
                    f"got {len(entry)}"
                )
                return
            found[path][kind][key] = entry

        with_entries = {module for module, *_ in activations}
        for module in named:
            if module not in all_modules and module not in with_entries:
                problems.append(f"{module}: module {module!r} does not exist")
        for module, is_input, index, entry in activations:
            side = "input" if is_input else "output"
            place(module, 0 if is_input else 1, str(index), entry, f"{module}, {side} {index}")
        for name, entry in params:
            module, _, param = name.rpartition(".")
            place(module, 2, param, entry, f"{name}")
        shape_problems = [p for p in problems if "expected" in p]
        if strict and problems or shape_problems:
            listed = "\n".join(
                f"  - {problem}" for problem in (problems if strict else shape_problems)
            )
            raise RuntimeError(f"encodings that have no place in the model:\n{listed}")
        for path, (inputs, outputs, parameters) in found.items():
            qmodule = modules[path]
            flags = (strict, partial, requires_grad, allow_overwrite)
            if not only_params:
                qmodule.import_input_encodings(inputs, *flags)
                qmodule.import_output_encodings(outputs, *flags)
            qmodule.import_param_encodings(parameters, *flags)

    def load_and_freeze_encodings(
        self, encoding_path: str, ignore_when_quantizer_disabled: bool = False
    ) -> None:
        """Loads encodings by module names and fixes the ranges: calibration and training leave them
        alone.

        Args:
            encoding_path: file as :meth:`save_encodings_to_json` writes it.
            ignore_when_quantizer_disabled: leave out entries for which there is no quantizer.

        Raises:
            RuntimeError: see :meth:`load_encodings`.
        """
        self._load(encoding_path, not ignore_when_quantizer_disabled, True, False, False)

    def set_and_freeze_param_encodings(self, encoding_path: str) -> None:
        """Loads the encodings of parameters (as AdaRound writes them) and fixes their ranges.

        Args:
            encoding_path: JSON file with ``param_encodings``.

        Raises:
            RuntimeError: see :meth:`load_encodings`.
        """
        self._load(encoding_path, True, True, False, False, only_params=True)

    # Results

    def fold_param_quantizers(self) -> None:
        """Replaces every quantized parameter by its quantized values and removes its quantizer.

        The forward pass computes the same, faster; ranges of parameters no longer train.
        """
        for module in self.qmodules():
            module.fold_param_quantizers()

    @classmethod
    def get_original_model(cls, model: nn.Module, qdq_weights: bool = False) -> nn.Module:
        """A copy of a simulated model without quantizers.

        Args:
            model: the model of a simulation.
            qdq_weights: whether the parameters have their quantized values.

        Returns:
            An ordinary model of the classes that the simulation was made from.
        """
        model = copy.deepcopy(model)
        restore(model)
        replacements = {}
        for module in model.modules():
            if not isinstance(module, BaseQuantizationMixin):
                continue
            if qdq_weights:
                module.fold_param_quantizers()
            for name, parameter in list(module.named_parameters(recurse=False)):  # type: ignore[attr-defined]
                if type(parameter.data) is not torch.Tensor:
                    plain = parameter.data.as_subclass(torch.Tensor)
                    setattr(module, name, nn.Parameter(plain, parameter.requires_grad))
            replacements[id(module)] = module.get_original_module()
        model = _placing.replace_modules(model, replacements)
        _placing.allow_fast_paths(model)
        return model

    def export(
        self,
        path: str,
        filename_prefix: str,
        dummy_input: Any,
        onnx_export_args: Any = None,
        propagate_encodings: bool = False,
        export_to_torchscript: bool = False,
        use_embedded_encodings: bool = False,
        export_model: bool = True,
        filename_prefix_encodings: str | None = None,
        apply_param_qdq: bool = True,
    ) -> None:
        """Writes the model and its encodings, each file whole or not at all.

        ``{prefix}.pth`` holds the model without quantizers, ``{prefix}_torch.encodings`` the
        encodings by module names (format 0.6.1).

        ``{prefix}.onnx`` holds the model without quantizers, its nodes called as the modules
        (``layer1.conv``; where a module is several nodes ``fc``, ``fc#1.end``), and
        ``{prefix}.encodings`` the encodings by the names of its tensors, in the format that
        ``rimet.common.quantsim.encoding_version`` names. :func:`rimet.onnx.export` writes a model
        that a runtime needs no encodings file for.

        With ``export_to_torchscript``: ``{prefix}.torchscript.pth`` holds the simulation with
        rimet's ops in it. It runs wherever the ops library is loaded, without Python too, and
        computes what :attr:`model` computes. Tensors are then called ``conv1.input.0``,
        ``conv1.output.0``, ``conv1.weight``.

        Args:
            path: folder; made if it is not there.
            filename_prefix: first part of the files' names.
            dummy_input: example input, as for the constructor.
            onnx_export_args: arguments of ``torch.onnx.export``: a dict, or
                :class:`rimet.onnx_utils.OnnxExportApiArgs`. By default the TorchScript exporter
                and opset 20.
            propagate_encodings: give tensors between the nodes of one module an entry with the
                bit-width of the module's output, too; ONNX, format 0.6.1 only.
            export_to_torchscript: TorchScript instead of ONNX.
            use_embedded_encodings: refused, as by AIMET.
            export_model: whether the model itself is written, too.
            filename_prefix_encodings: another prefix for the encodings files.
            apply_param_qdq: whether the parameters in ``{prefix}.pth`` and ``{prefix}.onnx`` have
                their quantized values.

        Raises:
            RuntimeError: ``use_embedded_encodings``; ``propagate_encodings`` with another format
                than 0.6.1; ONNX with formats 2.0.0 and 2.1.0, which ``sim.onnx.export`` writes;
                quantizers that were not calibrated.
            ImportError: the packages of the extra ``rimet[onnx]`` are missing.
        """
        from rimet.common import quantsim

        if use_embedded_encodings:
            raise RuntimeError(
                "use_embedded_encodings: no longer supported; the TorchScript file holds rimet's "
                "ops instead"
            )
        version = quantsim.encoding_version
        if propagate_encodings and version != "0.6.1":
            raise RuntimeError(
                "propagate_encodings: needs rimet.common.quantsim.encoding_version 0.6.1, got "
                f"{version}"
            )
        _check_calibrated(self.model)
        original = self.get_original_model(self.model, qdq_weights=apply_param_qdq)
        if export_to_torchscript:
            self._export_torchscript(
                path,
                filename_prefix,
                filename_prefix_encodings or filename_prefix,
                self.model,
                dummy_input,
                self._excluded_layer_names,
                self.quant_args,
                export_model,
            )
        else:
            self.export_onnx_model_and_encodings(
                path,
                filename_prefix,
                original,
                self.model,
                dummy_input,
                onnx_export_args,
                propagate_encodings,
                excluded_layer_names=self._excluded_layer_names,
                quantizer_args=self.quant_args,
                export_model=export_model,
                filename_prefix_encodings=filename_prefix_encodings,
            )
        if export_model:
            pth = Path(path) / f"{filename_prefix}.pth"
            # Given a path, torch would write the temporary file's name into the file.
            with _files.atomic_path(pth) as part, open(part, "wb") as file:
                torch.save(original, file)

    @classmethod
    def export_onnx_model_and_encodings(
        cls,
        path: str,
        filename_prefix: str,
        original_model: nn.Module,
        sim_model: nn.Module,
        dummy_input: Any,
        onnx_export_args: Any,
        propagate_encodings: bool,
        module_marker_map: Mapping[str, Any] | None = None,
        is_conditional: bool = False,
        excluded_layer_names: Sequence[str] | None = None,
        quantizer_args: Mapping[str, Any] | None = None,
        export_model: bool = True,
        filename_prefix_encodings: str | None = None,
    ) -> None:
        """Writes ``{prefix}.onnx``, ``{prefix}.encodings`` and ``{prefix}_torch.encodings``: the ONNX
        part of :meth:`export`, for any model with quantizers.

        Args:
            path, filename_prefix, dummy_input, onnx_export_args, propagate_encodings, export_model,
                filename_prefix_encodings: see :meth:`export`.
            original_model: the model without quantizers; its parameters are written.
            sim_model: the model with quantizers.
            module_marker_map, is_conditional: for AIMET's callers; names come from the exporter's
                scopes, which need no second run of the model.
            excluded_layer_names: as the encodings file lists them.
            quantizer_args: global settings, as the encodings file states them.

        Raises:
            RuntimeError, ImportError: see :meth:`export`.
        """
        from rimet._onnx._require import require_onnx
        from rimet.common import quantsim
        from rimet.onnx_utils import _export_kwargs

        version = quantsim.encoding_version
        if version not in ("0.6.1", "1.0.0"):
            raise RuntimeError(
                "rimet.common.quantsim.encoding_version: export writes formats 0.6.1 and 1.0.0, got "
                f"{version}; sim.onnx.export writes the others"
            )
        kwargs = _export_kwargs(onnx_export_args)
        require_onnx()
        from rimet._onnx.export import export_named_by_modules

        folder = Path(path)
        text = export_named_by_modules(
            original_model,
            sim_model,
            dummy_input,
            folder / f"{filename_prefix}.onnx" if export_model else None,
            propagate_encodings=propagate_encodings,
            encoding_version=version,
            quantizer_args=quantizer_args or {},
            excluded_layers=excluded_layer_names or (),
            kwargs=kwargs,
        )
        prefix = filename_prefix_encodings or filename_prefix
        _files.write_text(folder / f"{prefix}.encodings", text)
        by_module = _encodings_by_module(sim_model, excluded_layer_names, quantizer_args)
        _files.write_text(folder / f"{prefix}_torch.encodings", by_module)

    @classmethod
    def export_torch_script_model_and_encodings(
        cls,
        path: str,
        filename_prefix: str,
        filename_prefix_encodings: str,
        original_model: nn.Module,
        sim_model: nn.Module,
        dummy_input: Any,
        excluded_layer_names: Sequence[str] | None = None,
    ) -> None:
        """Writes ``{prefix}.torchscript.pth``, ``{prefix}.encodings`` and
        ``{prefix}_torch.encodings``: the TorchScript part of :meth:`export`, for any model with
        quantizers.

        Args:
            path, filename_prefix, filename_prefix_encodings, dummy_input: see :meth:`export`.
            original_model: the model without quantizers; the file holds the one with quantizers.
            sim_model: the model with quantizers.
            excluded_layer_names: as the encodings file lists them.

        Raises:
            RuntimeError: quantizers that were not calibrated.
        """
        _check_calibrated(sim_model)
        cls._export_torchscript(
            path,
            filename_prefix,
            filename_prefix_encodings,
            sim_model,
            dummy_input,
            excluded_layer_names,
            None,
            True,
        )

    @staticmethod
    def find_op_names_for_layer(
        layer_name: str,
        op_to_io_tensor_map: Mapping[str, Any],
        tensor_to_consumer_map: Mapping[str, str] | None,
        layers_to_onnx_op_names: Mapping[str, Sequence[str]] | None,
    ) -> tuple[list[str], list[str]]:
        """The nodes of an exported graph that a module became.

        Args:
            layer_name: path of the module.
            op_to_io_tensor_map: the graph's nodes, as
                :meth:`rimet.onnx_utils.OnnxSaver.get_onnx_node_to_io_tensor_names_map` gives them
                for a file of :meth:`export`.
            tensor_to_consumer_map, layers_to_onnx_op_names: for AIMET's callers; the names of the
                nodes say it all.

        Returns:
            The node that gives the module's result, and all its nodes; empty lists if there are
            none.
        """
        nodes = [name for name in op_to_io_tensor_map if name.partition("#")[0] == layer_name]
        return nodes[-1:], nodes

    def run_modules_for_traced_custom_marker(
        self, module_list: Sequence[nn.Module], dummy_input: Any
    ) -> None:
        """Traces modules of this simulation, without quantizers, each on the inputs that it gets
        when the model runs.

        The traced modules are kept for :meth:`export_onnx_model_and_encodings`, as AIMET's callers
        expect; the export itself does not need them.

        Args:
            module_list: modules of :attr:`model`.
            dummy_input: example input, as for the constructor.

        Raises:
            RuntimeError: a module that did not run.
        """
        from rimet.onnx_utils import CustomMarker

        inputs: dict[str, tuple[Any, ...]] = {}
        paths = {id(module): path for path, module in self.model.named_modules()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for module in module_list:

                def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                    inputs.setdefault(paths[id(module)], args)

                stack.callback(module.register_forward_pre_hook(keep).remove)
            args, kwargs = bind_inputs(self.model, dummy_input)
            with torch.no_grad():
                self.model(*args, **kwargs)
        self._module_marker_map: dict[str, Any] = {}
        for module in module_list:
            path = paths.get(id(module))
            if path is None or path not in inputs:
                raise RuntimeError(f"module_list: {path or type(module).__name__} did not run")
            marker = CustomMarker(self.get_original_model(module).eval(), path, "True")
            self._module_marker_map[path] = torch.jit.trace(
                marker, inputs[path], check_trace=False, strict=False
            )

    @staticmethod
    def _export_torchscript(
        path: str,
        filename_prefix: str,
        filename_prefix_encodings: str,
        sim_model: nn.Module,
        dummy_input: Any,
        excluded_layer_names: Sequence[str] | None,
        quantizer_args: Mapping[str, Any] | None,
        export_model: bool,
    ) -> None:
        from rimet.common import quantsim

        folder = Path(path)
        settings = (excluded_layer_names, quantizer_args)
        by_module = _encodings_by_module(sim_model, *settings)
        by_tensor = _encodings_by_module(sim_model, *settings, quantsim.encoding_version)
        if export_model:
            script = _traced(sim_model, dummy_input)
            with _files.atomic_path(folder / f"{filename_prefix}.torchscript.pth") as part:
                torch.jit.save(script, str(part))
        prefix = filename_prefix_encodings
        _files.write_text(folder / f"{prefix}_torch.encodings", by_module)
        _files.write_text(folder / f"{prefix}.encodings", by_tensor)

    def export_weights_to_safetensors(self, path: str, filename_prefix: str) -> None:
        """Writes the parameters and buffers of the original model, with their quantized values, to
        ``{path}/{filename_prefix}.safetensors``."""
        from safetensors.torch import save_file

        original = self.get_original_model(self.model, qdq_weights=True)
        seen: set[int] = set()
        tensors = {}
        for name, tensor in original.state_dict().items():
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
                if tensor.numel():
                    seen.add(tensor.data_ptr())
                tensors[name] = tensor.detach().contiguous()
        with _files.atomic_path(Path(path) / f"{filename_prefix}.safetensors") as part:
            save_file(tensors, part)

    @property
    def onnx(self) -> QuantizationSimModelOnnxExporter:
        """Export of this simulation as a floating-point ONNX model with an encodings file."""
        return QuantizationSimModelOnnxExporter(self)

    def __str__(self) -> str:
        enabled = sum(1 for _ in self.quantizers())
        modules = sum(1 for _ in self.qmodules())
        return f"QuantizationSimModel({enabled} quantizers in {modules} modules)\n{self.model}"

    def __getstate__(self) -> dict[str, Any]:
        # The view refers to modules of this object's model; a copy makes its own.
        return {**self.__dict__, "_connected_graph": None}


def _encodings_by_module(
    model: nn.Module,
    excluded_layers: Sequence[str] | None,
    quantizer_args: Mapping[str, Any] | None,
    version: str | None = None,
) -> str:
    """Text of an encodings file by module names, or with ``version`` in the form of files by tensor
    names."""
    activations, params = _files.collect(model)
    text: str = _core.encodings_file(
        activations,
        params,
        version=version,
        quantizer_args=json.dumps(quantizer_args or {}),
        excluded_layers=list(excluded_layers or ()),
        producer_version=_version(),
    )
    return text


def _traced(model: nn.Module, dummy_input: Any) -> Any:
    """A model as TorchScript."""
    args, kwargs = bind_inputs(model, dummy_input)
    with evaluating(model):
        if kwargs and not args:
            return torch.jit.trace(
                model, example_kwarg_inputs=kwargs, check_trace=False, strict=False
            )
        if kwargs:
            raise RuntimeError(
                "dummy_input: TorchScript takes either positional or keyword arguments, got both"
            )
        return torch.jit.trace(model, args, check_trace=False, strict=False)


def _check_calibrated(model: nn.Module) -> None:
    empty = _files.uncalibrated(model)
    if empty:
        shown = ", ".join(empty[:8]) + (f" and {len(empty) - 8} more" if len(empty) > 8 else "")
        raise RuntimeError(
            f"{len(empty)} quantizers are not calibrated: {shown}. Run compute_encodings on data "
            "that reaches them, load encodings, or exclude their layers with "
            "exclude_layers_from_quantization"
        )


class QuantizationSimModelOnnxExporter:
    """ONNX export of a simulation, for runtimes that take encodings as a file. ``sim.onnx`` is one.

    :func:`rimet.onnx.export` writes the encodings into the graph instead.

    Args:
        sim: the simulation.
    """

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim

    def export(
        self,
        args: Any,
        f: str | os.PathLike[str],
        *,
        encoding_version: str | None = None,
        export_int32_bias: bool | None = None,
        force_activation_as: Literal["unsigned", "signed"] | None = "unsigned",
        **kwargs: Any,
    ) -> None:
        """Writes the model without quantizers to ``f``, and the encodings by the names of its
        tensors beside it, with the suffix ``.encodings``.

        Tensors that hold elements of quantized ones only (reshaped, transposed, cut) have an
        encoding, too. float16 and bfloat16 quantizers are left out.

        Args:
            args: example inputs, as for the constructor of the simulation.
            f: path of the ONNX file; not one that ends in ``.encodings``.
            encoding_version: format of the encodings file; by default
                ``rimet.common.quantsim.encoding_version``.
            export_int32_bias: whether biases have encodings, of 32-bit integers in units of input
                scale times weight scale; by default from format 2.0.0 on.
            force_activation_as: see :func:`rimet.onnx.export`.
            **kwargs: of ``torch.onnx.export``, as for :func:`rimet.onnx.export`.

        Raises:
            ImportError: the packages of the extra ``rimet[onnx]`` are missing.
            RuntimeError: quantizers that are not calibrated, or that the format cannot express.
            ValueError: another ``f``, ``encoding_version``, ``opset_version`` or ``force_activation_as``.
            NotImplementedError: see :func:`rimet.onnx.export`.
        """
        from rimet._onnx._require import require_onnx
        from rimet.common import quantsim
        from rimet.quantization.affine.encoding import check_encoding_version

        version = check_encoding_version(
            quantsim.encoding_version if encoding_version is None else encoding_version
        )
        require_onnx()
        from rimet._onnx.export import export_with_encodings

        is_version_2 = version.startswith("2.")
        export_with_encodings(
            self.sim,
            args,
            f,
            encoding_version=version,
            export_int32_bias=is_version_2 if export_int32_bias is None else export_int32_bias,
            force_activation_as=force_activation_as,
            kwargs=kwargs,
        )


def _version() -> str:
    import rimet

    return str(getattr(rimet, "__version__", "0"))


def compute_encodings_for_sims(
    sim_list: Sequence[QuantizationSimModel],
    forward_pass_callback: Callable[..., Any],
    forward_pass_callback_args: Any = _NOT_SPECIFIED,
) -> None:
    """Calibrates several simulations with one callback, called as ``callback([sim.model, ...],
    args)``.

    For models that work together, such as parts of a pipeline.

    Raises:
        RuntimeError: the callback did not run one of the models.
    """
    args = () if forward_pass_callback_args is _NOT_SPECIFIED else (forward_pass_callback_args,)
    with contextlib.ExitStack() as stack:
        for sim in sim_list:
            stack.enter_context(sim._calibrating())
        forward_pass_callback([sim.model for sim in sim_list], *args)


def load_encodings_to_sim(
    quant_sim_model: QuantizationSimModel, pytorch_encoding_path: str
) -> None:
    """Loads encodings by module names into a simulation; quantizers without an entry are removed.

    Args:
        quant_sim_model: the simulation.
        pytorch_encoding_path: path of a ``_torch.encodings`` file.

    Raises:
        RuntimeError: entries without a place in the model.
    """
    quant_sim_model.load_encodings(pytorch_encoding_path, strict=True, partial=False)


def save_checkpoint(quant_sim_model: QuantizationSimModel, file_path: str) -> None:
    """Pickles a simulation. Load it with :func:`load_checkpoint`, and only from files you trust."""
    with _files.atomic_path(file_path) as part, open(part, "wb") as file:
        pickle.dump(quant_sim_model, file)


def load_checkpoint(file_path: str) -> QuantizationSimModel:
    """Unpickles a simulation that :func:`save_checkpoint` wrote. Unpickling runs code: only load
    files you trust.

    Raises:
        TypeError: the file holds something else.
    """
    with open(file_path, "rb") as file:
        sim = pickle.load(file)
    if not isinstance(sim, QuantizationSimModel):
        raise TypeError(f"{file_path}: expected a QuantizationSimModel, got {type(sim).__name__}")
    return sim


def check_accumulator_overflow(
    model: nn.Module, quant_bw: int, accum_bw: int
) -> tuple[str | None, float]:
    """How much of an integer accumulator the layers of a model can use up.

    Convolutions and linear layers are looked at, each by
    :func:`rimet.common.quant_utils.get_conv_accum_bounds`.

    Args:
        model: a floating-point model.
        quant_bw: bits of weights and activations.
        accum_bw: bits of the accumulator.

    Returns:
        The path of the layer that needs most (``None`` without such layers), and the part of the
        accumulator's range that it can use: above 1, it can overflow. Layers that can are logged.
    """
    worst, most = None, 0.0
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            continue
        exceeded, used = get_conv_accum_bounds(
            module.weight.detach().cpu().double().numpy(), quant_bw, accum_bw
        )
        if exceeded:
            logger.info("%s: its accumulator can overflow (%.0f%%)", path, 100 * used)
        if used > most:
            worst, most = path, used
    return worst, most
