"""Every registered module class: its quantized twin against an independent composition of
quantizers and the original.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import rimet.nn as rnn
import torch
from rimet.nn import QuantizationMixin
from rimet.nn.registry import REGISTRY
from rimet.quantization.affine import QuantizeDequantize
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nn.samples import ALL, SAMPLES, WITHOUT_SAMPLE, Sample

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
EACH = pytest.mark.parametrize("sample", ALL, ids=str)


def quantizer(low: float = -1.7, high: float = 1.9, bitwidth: int = 5) -> QuantizeDequantize:
    made = QuantizeDequantize((), bitwidth, False)
    made.set_range(torch.tensor(low), torch.tensor(high))
    return made


def flat(values: Any) -> list[Any]:
    if isinstance(values, PackedSequence):
        return [values.data]
    if isinstance(values, (tuple, list)):
        return [leaf for value in values for leaf in flat(value)]
    return [values]


def same(a: Any, b: Any) -> None:
    a, b = flat(a), flat(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            assert type(x) is Tensor
            assert x.dtype == y.dtype
            assert torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9))
        else:
            assert x == y


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(3)
    return module(*inputs)


def turn_on(twin: Any, params: bool = True) -> None:
    """A quantizer in each slot, each with a grid of its own."""
    number = 0
    for container in (twin.input_quantizers, twin.output_quantizers):
        for i in range(len(container)):
            container[i] = quantizer(-1.7 - number / 10, 1.9 + number / 7)
            number += 1
    if params:
        for name in twin.param_quantizers:
            twin.param_quantizers[name] = quantizer(-0.6 - number / 50, 0.5 + number / 40)
            number += 1


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def composition(sample: Sample, twin: Any, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What the twin has to compute, put together from the original module and single calls of its
    quantizers.
    """

    def through(quantizers: Any, values: Any, slot: int) -> Any:
        if sample.label == "custom.BatchNorm" and quantizers is qin and slot in (1, 2):
            return quantizers[slot]._forward_tensor(values).detach()
        if isinstance(values, PackedSequence):
            return values._replace(data=quantizers[slot]._forward_tensor(values.data))
        return quantizers[slot]._forward_tensor(values) if floating(values) else values

    qin, qout = twin.input_quantizers, twin.output_quantizers
    arguments: list[Any] = []
    slot = 0
    for position, value in enumerate(inputs):
        if isinstance(module, nn.EmbeddingBag):
            slot = position - 2
        elif (
            isinstance(module, (nn.RNNBase, nn.RNNCellBase))
            and isinstance(value, tuple)
            and not isinstance(value, PackedSequence)
        ):
            arguments.append(tuple(through(qin, v, position + i) for i, v in enumerate(value)))
            continue
        else:
            slot = position
        arguments.append(through(qin, value, slot) if 0 <= slot < len(qin) else value)
    params = {
        name: twin.param_quantizers[name]._forward_tensor(p)
        for name, p in module.named_parameters()
    }
    torch.manual_seed(3)
    if isinstance(module, nn.RNNBase):
        # functional_call does not reach the list that these modules keep.
        module = copy.deepcopy(module)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(params[name])
        output = module(*arguments)
    else:
        output = torch.func.functional_call(module, params, tuple(arguments))
    if isinstance(output, PackedSequence) or not isinstance(output, tuple):
        return through(qout, output, 0)
    if isinstance(output, tuple) and sample.label.startswith("custom.Split"):
        return tuple(through(qout, x, 0) for x in output)
    leaves, results = 0, []
    for value in output:
        if isinstance(value, tuple) and not isinstance(value, PackedSequence):
            results.append(tuple(through(qout, v, leaves + i) for i, v in enumerate(value)))
            leaves += len(value)
        else:
            results.append(through(qout, value, leaves) if leaves < len(qout) else value)
            leaves += 1
    return tuple(results)


def test_every_twin_has_a_sample() -> None:
    missing = [
        cls.__name__
        for cls in REGISTRY
        if cls not in SAMPLES and cls.__name__ not in WITHOUT_SAMPLE
    ]
    assert not missing
    assert set(SAMPLES) <= set(REGISTRY)


def test_names_of_twins() -> None:
    for cls, twin_cls in QuantizationMixin.cls_to_qcls.items():
        if cls not in REGISTRY:
            continue
        assert twin_cls.__name__ == f"Quantized{cls.__name__}"
        assert QuantizationMixin.qcls_to_cls[twin_cls] is cls
        assert issubclass(twin_cls, QuantizationMixin)
        assert twin_cls.__doc__ and cls.__name__ in twin_cls.__doc__
        assert pickle.loads(pickle.dumps(twin_cls)) is twin_cls


@EACH
def test_without_quantizers_equals_the_original(sample: Sample) -> None:
    module, inputs = sample.make()
    twin = QuantizationMixin.from_module(copy.deepcopy(module))
    same(run(twin, inputs), run(module, inputs))
    module.eval(), twin.eval()
    same(run(twin, inputs), run(module, inputs))


@EACH
def test_with_quantizers_equals_the_composition(sample: Sample) -> None:
    module, inputs = sample.make()
    twin = QuantizationMixin.from_module(module)
    if sample.label.startswith("custom.Concat"):
        twin.input_quantizers = nn.ModuleList([None] * len(inputs))
    turn_on(twin)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = composition(sample, twin, copy.deepcopy(module), inputs)
    same(run(twin, inputs), expected)
    for name, param in module.named_parameters():
        assert torch.equal(param, before[name])
        assert twin._parameters[name] is module._parameters[name]


@EACH
def test_single_slots(sample: Sample) -> None:
    """One quantizer at a time changes nothing but its own tensor: the others are off."""
    module, inputs = sample.make()
    twin = QuantizationMixin.from_module(copy.deepcopy(module))
    plain_output = run(module, inputs)
    for i, slot in enumerate([None] * len(twin.output_quantizers)):
        twin.output_quantizers[i] = quantizer()
        leaves = flat(run(twin, inputs))
        expected = flat(plain_output)
        for number, (x, y) in enumerate(zip(leaves, expected, strict=True)):
            mine = number == i or sample.label.startswith("custom.Split")
            if mine and floating(y):
                y = quantizer()._forward_tensor(y)
            same(x, y)
        twin.output_quantizers[i] = slot


@EACH
def test_gradients(sample: Sample) -> None:
    if sample.label == "custom.FloorDivide":
        pytest.skip("torch.floor_divide has no derivative")
    module, inputs = sample.make()
    twin = QuantizationMixin.from_module(module)
    turn_on(twin)
    if isinstance(module, nn.RNNBase):
        # Its reference above has no gradient; that of the weights is compared with one by autograd
        # through _VF.
        output = run(twin, inputs)
        sum(x.sum() for x in flat(output) if floating(x)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        return
    outputs = [x for x in flat(run(twin, inputs)) if floating(x) and x.requires_grad]
    if not outputs:
        pytest.skip("nothing differentiable") if not list(module.parameters()) else pytest.fail()
    sum((x * x).sum() for x in outputs).backward()
    got = {name: p.grad for name, p in twin.named_parameters()}
    for p in twin.parameters():
        p.grad = None
    reference = [
        x
        for x in flat(composition(sample, twin, module, inputs))
        if floating(x) and x.requires_grad
    ]
    sum((x * x).sum() for x in reference).backward()
    for name, p in twin.named_parameters():
        if p.grad is None:
            assert got[name] is None or not got[name].abs().sum(), name
        else:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name, _ in module.named_parameters():
        assert got[name] is not None, name


@EACH
def test_twin_keeps_what_the_module_has(sample: Sample) -> None:
    module, inputs = sample.make()
    module.eval()
    module.note = ["mine"]
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    twin = QuantizationMixin.from_module(module)
    assert type(twin) is QuantizationMixin.cls_to_qcls[type(module)]
    assert isinstance(twin, type(module)) or isinstance(module, nn.NLLLoss)
    assert twin.training is False and twin.note is module.note
    assert dict(twin.named_buffers()).keys() == dict(module.named_buffers()).keys()
    for name, param in module.named_parameters():
        assert twin.get_parameter(name) is param
    for name, buffer in module.named_buffers():
        assert twin.get_buffer(name) is buffer
    run(twin, inputs)
    assert calls == ["pre", "forward"]
    original = twin.get_original_module()
    assert type(original) is type(module)
    assert original.state_dict().keys() == module.state_dict().keys()
    assert not hasattr(original, "input_quantizers")
    same(run(original, inputs), run(module, inputs))


@EACH
def test_copies(sample: Sample) -> None:
    module, inputs = sample.make()
    module.eval()
    twin = QuantizationMixin.from_module(module)
    turn_on(twin)
    expected = run(twin, inputs)
    copied = copy.deepcopy(twin)
    same(run(copied, inputs), expected)
    same(run(pickle.loads(pickle.dumps(twin)), inputs), expected)
    for p in copied.parameters():
        p.data.mul_(3)
    same(run(twin, inputs), expected)

    other = QuantizationMixin.from_module(sample.module()).eval()
    turn_on(other)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    same(run(other, inputs), expected)


@EACH
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trace(sample: Sample) -> None:
    module, inputs = sample.make()
    module.eval()
    if not any(isinstance(x, Tensor) for x in inputs):
        pytest.skip("torch.jit.trace takes no packed sequences")
    if isinstance(module, nn.CTCLoss):
        pytest.skip("cannot be traced without quantizers either")

    class Bound(nn.Module):
        """Passes on what is not a tensor: the tracer takes tensors only."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: Tensor) -> Any:
            given = iter(tensors)
            return self.inner(*(next(given) if isinstance(x, Tensor) else x for x in inputs))

    twin = QuantizationMixin.from_module(module)
    turn_on(twin)
    tensors = tuple(x for x in inputs if isinstance(x, Tensor))
    with torch.no_grad():
        expected = run(twin, inputs)
        if not all(isinstance(x, Tensor) for x in flat(expected)):
            pytest.skip("no tensor comes out")
        traced = torch.jit.trace(Bound(twin), tensors, check_trace=False)
        torch.manual_seed(3)
        got = traced(*tensors)
    for x, y in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9))
    number = sum(q is not None for q in rnn.slots.flatten(twin.param_quantizers))
    assert str(traced.inlined_graph).count("rimet::") >= number
