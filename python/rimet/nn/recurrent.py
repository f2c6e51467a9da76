"""Quantized recurrent layers and cells. A step of a layer's recurrence is not quantized, its
arguments and results are.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rimet.nn.mixin as mixin
from rimet.nn.registry import twin
from rimet.nn.slots import plain, quantize

__all__ = [
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedRNN",
    "QuantizedRNNCell",
]


def _through(module: Any, kind: str, first: int, value: Any) -> Any:
    """A tensor, a packed sequence or a tuple of states through the quantizers from number ``first``
    on."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(_through(module, kind, first + i, v) for i, v in enumerate(value))
    quantizer = module._modules[kind]._modules.get(str(first))
    data = value.data if isinstance(value, PackedSequence) else value
    data = plain(data) if quantizer is None else quantize(module, kind, first, quantizer, data)
    return value._replace(data=data) if isinstance(value, PackedSequence) else data


def _initial_state(module: nn.RNNBase, x: Any) -> Any:
    """The zeros that the layer starts from when no state is given; a quantizer of the state has to
    see them.
    """
    batch: tuple[int, ...]
    if isinstance(x, PackedSequence):
        x, batch = x.data, (int(x.batch_sizes[0]),)
    else:
        batch = (x.shape[0 if module.batch_first else 1],) if x.dim() == 3 else ()
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = x.new_zeros(layers, *batch, module.proj_size or module.hidden_size)
    if isinstance(module, nn.LSTM):
        return h, x.new_zeros(layers, *batch, module.hidden_size)
    return h


def _initial_cell_state(module: nn.RNNCellBase, x: Tensor) -> Any:
    h = x.new_zeros(*x.shape[:-1], module.hidden_size)
    return (h, h) if isinstance(module, nn.LSTMCell) else h


def _functions(module_cls: type[nn.Module]) -> frozenset[str]:
    """Names of the torch functions that a kernel takes the place of."""
    name = {
        "RNN": ("rnn_tanh", "rnn_relu"),
        "RNNCell": ("rnn_tanh_cell", "rnn_relu_cell"),
        "LSTMCell": ("lstm_cell",),
        "GRUCell": ("gru_cell",),
    }
    return frozenset(name.get(module_cls.__name__, (module_cls.__name__.lower(),)))


def _build_forward(module_cls: Any) -> Any:
    base_forward = module_cls.forward
    layer = issubclass(module_cls, nn.RNNBase)
    functions = _functions(module_cls)

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        if mixin._any_kernel and (kernel := self._active_kernel()) is not None:
            return mixin.run_kernel(self, kernel, functions, base_forward, (input, hx), {})
        input = _through(self, "input_quantizers", 0, input)
        states = list(self._modules["input_quantizers"]._modules.values())[1:]
        if hx is None and any(q is not None for q in states):
            hx = (_initial_state if layer else _initial_cell_state)(self, input)
        if hx is not None:
            hx = _through(self, "input_quantizers", 1, hx)
        tensors = self._quantized_parameters()
        if tensors and layer:
            # The layer reads its parameters from this list.
            tensors["_flat_weights"] = [
                tensors[name] if name in tensors else plain(getattr(self, name))
                for name in self._flat_weights_names
            ]
        if tensors:
            output = mixin.run_with_parameters(self, base_forward, tensors, (input, hx), {}, True)
        else:
            output = base_forward(self, input, hx)
        if layer:
            sequence, state = output
            return (
                _through(self, "output_quantizers", 0, sequence),
                _through(self, "output_quantizers", 1, state),
            )
        return _through(self, "output_quantizers", 0, output)

    forward.__signature__ = inspect.signature(base_forward)  # type: ignore[attr-defined]
    forward.__doc__ = f"Forward of :class:`{module_cls.__qualname__}` on quantized tensors."
    return forward


def _recurrent(module_cls: Any, states: tuple[str, ...], outputs: int) -> Any:
    number = 1 + len(states)

    def __quant_init__(self: Any) -> None:
        self._quant_init_slots(number, outputs)
        if "_flat_weights" in self.__dict__:
            # A list of its own, for setting a parameter writes into it.
            self.__dict__["_flat_weights"] = list(self.__dict__["_flat_weights"])

    return twin(
        module_cls,
        ("input", *states),
        outputs,
        home=__name__,
        namespace={"__quant_init__": __quant_init__, "forward": _build_forward(module_cls)},
        function=_functions(module_cls),
    )


QuantizedGRU = _recurrent(nn.GRU, ("h_0",), 2)
QuantizedGRUCell = _recurrent(nn.GRUCell, ("h_0",), 1)
QuantizedLSTM = _recurrent(nn.LSTM, ("h_0", "c_0"), 3)
QuantizedLSTMCell = _recurrent(nn.LSTMCell, ("h_0", "c_0"), 2)
QuantizedRNN = _recurrent(nn.RNN, ("h_0",), 2)
QuantizedRNNCell = _recurrent(nn.RNNCell, ("h_0",), 1)
