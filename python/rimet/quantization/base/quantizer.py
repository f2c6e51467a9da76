"""Base of all quantizers: parameters that know whether they were ever set, calibration, state."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rimet.common.utils import deprecated
from rimet.quantization.base.encoding import EncodingBase

if TYPE_CHECKING:
    from rimet.quantization.encoding_analyzer import EncodingAnalyzer
    from rimet.quantization.tensor import QuantizedTensorBase

__all__ = ["QuantizerBase"]

_get_tracing_state = torch._C._get_tracing_state


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(
        torch.eq(a, b.to(a)).logical_or_(a.isnan() & b.to(a).isnan()).all()
    )


def _is_opaque(param: torch.Tensor) -> bool:
    """Whether the values of a parameter cannot be read: meta, fake and functional tensors, and
    under compilation.
    """
    return param.is_meta or torch.compiler.is_compiling() or type(param.data) is not torch.Tensor


class QuantizerBase(ABC, nn.Module):
    """A module that maps a tensor onto a quantization grid.

    Called in plain eager mode it returns a tensor that knows its encoding
    (:class:`rimet.quantization.QuantizedTensor` or :class:`rimet.quantization.DequantizedTensor`).
    Under ``torch.jit.trace``, ``torch.compile`` and ``torch.export`` it returns a
    plain tensor.

    Quantization parameters start as NaN, which no finite data yields: a parameter that still holds
    what it was registered with has not been initialized. That is a property of the values, so it
    survives copying, pickling, moving and in-place writes of any kind.
    """

    encoding_analyzer: EncodingAnalyzer[Any] | None

    # True once all parameters were seen initialized: spares the forward pass a look at their
    # values.
    _ready: bool
    # True within `compute_encodings()`.
    _calibrating: bool
    # Whether a call gives its input back while calibrating.
    _pass_through: bool
    # True once calibration of a whole model ended without data for this quantizer: until it has a
    # range, a call gives its input back.
    _unreached: bool

    def __init__(self) -> None:
        super().__init__()
        self._ready = False
        self._calibrating = False
        self._pass_through = False
        self._unreached = False
        self._initial_values: dict[str, torch.Tensor | None] = {}
        self._is_overwrite_allowed: dict[str, bool] = {}

    # -- forward -----------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, input: torch.Tensor) -> QuantizedTensorBase:
        """Quantize a tensor.

        :param input: floating-point tensor
        """

    @abstractmethod
    def _forward_tensor(self, input: torch.Tensor) -> torch.Tensor:
        """The numerics of :meth:`forward` on plain tensors; while calibrating, observes and
        returns ``input``.
        """

    def __prepare_scriptable__(self) -> QuantizerBase:
        raise RuntimeError(
            f"torch.jit.script cannot take a {type(self).__name__}, which calibrates in Python; "
            "use torch.jit.trace, or script functions that call torch.ops.rimet"
        )

    # -- calibration -------------------------------------------------------------------------------

    def compute_encodings(self) -> contextlib.AbstractContextManager[None]:
        """Within this context, observe every input; on leaving it, set the range from all of them.

        Meanwhile a call quantizes with the range of its own input alone. Nothing changes if no data
        came, or if the block is left by an exception. If :meth:`allow_overwrite` forbids all
        changes, nothing is observed. A context inside another one of the same quantizer leaves
        everything to the outer one.
        """
        return self._calibrate(pass_through=False)

    @contextlib.contextmanager
    def _calibrate(self, pass_through: bool) -> Iterator[None]:
        """:meth:`compute_encodings`, with a choice of what calls give meanwhile.

        :param pass_through: the input as it is, so that calibrating one quantizer of a model does
            not change what the next one sees
        """
        if self._calibrating or self.encoding_analyzer is None or not self.is_overwrite_allowed():
            yield
            return
        self.encoding_analyzer.reset_stats()
        self._calibrating = True
        self._pass_through = pass_through
        try:
            yield
            self._apply_statistics()
        finally:
            self._calibrating = False
            self.encoding_analyzer.reset_stats()

    @abstractmethod
    def _apply_statistics(self) -> None:
        """Set the range from the analyzer's statistics; leave it as it is if they are empty."""

    # -- encodings ---------------------------------------------------------------------------------

    @abstractmethod
    def get_encodings(self) -> EncodingBase | None:
        """The grid as a value, or ``None`` before initialization."""

    @deprecated("Use get_encodings instead")
    def get_encoding(self) -> EncodingBase | None:
        """Old name of :meth:`get_encodings`."""
        return self.get_encodings()

    def set_encodings(self, encodings: EncodingBase) -> None:
        """Take over the grid and range of ``encodings``.

        :raises TypeError: the encodings are of a kind that this quantizer cannot hold
        :raises ValueError: they are of another shape
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take over encodings")

    @classmethod
    @abstractmethod
    def from_encodings(cls, encodings: EncodingBase) -> QuantizerBase:
        """A quantizer with exactly this grid."""

    @abstractmethod
    def get_legacy_encodings(self) -> list[dict[str, Any]] | None:
        """The grid as the list of an encodings file of version 0.6.1, or ``None`` before
        initialization.
        """

    @abstractmethod
    def set_legacy_encodings(self, encodings: list[dict[str, Any]]) -> None:
        """Take over what :meth:`get_legacy_encodings` gives."""

    # -- parameters --------------------------------------------------------------------------------

    def register_quantization_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter that counts as uninitialized for as long as it holds its present
        values.

        :param name: attribute name
        :param param: the parameter, or ``None``
        """
        self.register_parameter(name, param)
        self._initial_values.pop(name, None)
        if param is not None:
            values = param.detach()
            # NaN needs no copy, it is recognized by itself; a meta tensor has no values to keep.
            known = values.is_meta or bool(values.isnan().all())
            self._initial_values[name] = None if known else values.clone()
            self._is_overwrite_allowed.setdefault(name, True)
        self._ready = False

    def is_initialized(self) -> bool:
        """Whether every quantization parameter has been set."""
        if self._ready:
            return True
        initialized = all(
            self._is_parameter_initialized(name, param)
            for name, param in self._parameters.items()
            if param is not None
        )
        # Nothing is concluded from parameters whose values cannot be read.
        if initialized and not any(
            param is not None and _is_opaque(param) for param in self._parameters.values()
        ):
            self._ready = True
            self._unreached = False
        return initialized

    def _is_idle(self) -> bool:
        """Whether a call gives its input back because calibration never came here."""
        if self._ready or not self._unreached:
            return False
        if torch.compiler.is_compiling() or _get_tracing_state() is not None:
            return True  # a look at the values is impossible, or would be recorded
        return any(map(_is_opaque, self.parameters())) or not self.is_initialized()

    def _end_calibration(self) -> bool:
        """Take note that the calibration of a whole model has ended.

        :return: whether it brought no data here, so that there is no range
        """
        self._unreached = not self.is_initialized()
        return self._unreached

    def _is_parameter_initialized(self, name: str, param: torch.Tensor) -> bool:
        if name not in self._initial_values:
            return True
        if _is_opaque(param):
            # Values that cannot be read (meta, fake, traced) belong to a model whose shape is of
            # interest.
            return True
        initial = self._initial_values[name]
        with torch.no_grad():
            values = param.detach()
            if initial is None:
                return not values.numel() or not bool(values.isnan().all())
            return not _same_values(values, initial)

    def _forget_parameter(self, name: str) -> None:
        """Make a parameter uninitialized again."""
        param = self._parameters[name]
        if param is None or name not in self._initial_values:
            return
        initial = self._initial_values[name]
        with torch.no_grad():
            if initial is None:
                param.fill_(float("nan"))
            else:
                param.copy_(initial)

    #: Path of the quantizer in a simulated model, for messages.
    _where: str | None = None

    def _raise_uninitialized(self) -> None:
        if self._where:
            name = f"{self._where}: {self}"
            remedy = "Call the simulation's compute_encodings() with representative data"
        else:
            name = str(self)
            remedy = (
                "Run representative data through it within `with quantizer.compute_encodings():`"
            )
        raise RuntimeError(
            f"{name} was called before its range was set. {remedy}, call its set_range(min, max), "
            "or load a state dict or encodings."
        )

    # -- overwriting -------------------------------------------------------------------------------

    def allow_overwrite(self, *args: bool, **kwargs: bool) -> None:
        """Say whether calibration and loading of encodings may change parameters.

        ``allow_overwrite(flag)`` sets it for all parameters, ``allow_overwrite(min=flag)`` for
        those named.

        :raises TypeError: a flag is not a bool, or more than one positional flag is given
        :raises KeyError: there is no quantization parameter of a given name
        """
        mode = kwargs.pop("mode", None)
        if mode is not None:
            args = (*args, mode)
        if len(args) > 1:
            raise TypeError(
                f"allow_overwrite: expected at most one positional flag, got {len(args)}"
            )
        for flag in (*args, *kwargs.values()):
            if not isinstance(flag, bool):
                raise TypeError(f"allow_overwrite: expected a bool, got {flag!r}")
        for name in kwargs:
            if name not in self._is_overwrite_allowed:
                raise KeyError(
                    f"allow_overwrite: expected one of {list(self._is_overwrite_allowed)}, got "
                    f"{name!r}"
                )
        for flag in args:
            self._is_overwrite_allowed.update(dict.fromkeys(self._is_overwrite_allowed, flag))
        self._is_overwrite_allowed.update(kwargs)

    def is_overwrite_allowed(self, name: str | None = None) -> bool:
        """Whether the named parameter, or any parameter if no name is given, may be changed by
        calibration.
        """
        if name is not None:
            return self._is_overwrite_allowed[name]
        return any(self._is_overwrite_allowed.values())

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Parameters, and under ``_extra_state`` the grid and which parameters are initialized."""
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`state_dict` gives. Without ``_extra_state`` the grid stays, and what is
        loaded is initialized.
        """
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Per parameter, whether it is initialized; ``unreached`` if calibration never came here."""
        state = {
            name: torch.tensor(self._ready or self._is_parameter_initialized(name, param))
            for name, param in self._parameters.items()
            if param is not None
        }
        if self._unreached and not self.is_initialized():
            state["unreached"] = torch.tensor(True)
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Undo the initialization of every parameter that ``state`` marks as uninitialized."""
        for name, param in self._parameters.items():
            if param is not None and name in state and not bool(state[name]):
                self._forget_parameter(name)
        self._unreached = bool(state.get("unreached", False))
        self._ready = False

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        extra_key = f"{prefix}_extra_state"
        # Ranges without the grid are complete: the grid is then the one this quantizer was made
        # with.
        if extra_key in missing_keys:
            missing_keys.remove(extra_key)
        self._ready = False
        if extra_key not in state_dict and any(
            f"{prefix}{name}" in state_dict for name in self._parameters
        ):
            self._unreached = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy made while the original is calibrating does not calibrate.
        return {**self.__dict__, "_calibrating": False}
