"""The mixin: calibration, parameters, user classes, errors, kernels, reuse, and the compilers."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import rimet.nn as rnn
import torch
import torch.nn.functional as F
from rimet.nn import QuantizationMixin, UnknownModuleError, custom, reuse_quantized_params
from rimet.nn.reuse import _blocks
from rimet.quantization.affine import Quantize, QuantizeDequantize
from torch import Tensor, nn


def affine(shape: tuple[int, ...] = (), bitwidth: int = 4, symmetric: bool = False) -> Any:
    return QuantizeDequantize(shape, bitwidth, symmetric)


def fixed(low: float = -1.0, high: float = 1.0, bitwidth: int = 4) -> Any:
    quantizer = affine((), bitwidth)
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    return quantizer


def quantized_linear(*, calibrated: bool = True) -> Any:
    torch.manual_seed(0)
    linear = rnn.QuantizedLinear(6, 5)
    linear.input_quantizers[0] = affine()
    linear.output_quantizers[0] = affine()
    linear.param_quantizers["weight"] = affine((5, 1), 4, True)
    if calibrated:
        with torch.no_grad(), linear.compute_encodings():
            linear(torch.randn(8, 6))
    return linear


class Scale(nn.Module):
    """A module of a user: state, a helper, an argument with a default."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.1, 1.3, size))
        self.shift = nn.Parameter(torch.full((size,), 0.37))
        self.calls = 0

    def apply_shift(self, x: Tensor) -> Tensor:
        return x + self.shift

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        self.calls += 1
        return self.apply_shift(x * self.scale * times)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


class Unknown(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor, flag: bool = False, **others: Any) -> Tensor:
        return first


@pytest.fixture
def registry() -> Any:
    """Registrations made by a test go away with it."""
    kept = (
        dict(QuantizationMixin.cls_to_qcls),
        dict(QuantizationMixin.qcls_to_cls),
        set(QuantizationMixin._ignored_module_types),
    )
    yield
    for mapping, before in zip(
        (QuantizationMixin.cls_to_qcls, QuantizationMixin.qcls_to_cls), kept, strict=False
    ):
        mapping.clear()
        mapping.update(before)
    QuantizationMixin._ignored_module_types.clear()
    QuantizationMixin._ignored_module_types.update(kept[2])
    QuantizationMixin.ignore_unknown_modules(False)


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_passes_activations_and_quantizes_parameters() -> None:
    linear = quantized_linear(calibrated=False)
    x = torch.randn(8, 6) * 3
    with torch.no_grad(), linear.compute_encodings():
        weight_quantizer = linear.param_quantizers["weight"]
        assert weight_quantizer.is_initialized()
        output = linear(x)
        expected = F.linear(x, weight_quantizer._forward_tensor(linear.weight), linear.bias)
        assert torch.equal(output, expected)
        assert not linear.input_quantizers[0].is_initialized()
    for quantizer, tensor in (
        (linear.input_quantizers[0], x),
        (linear.output_quantizers[0], expected),
    ):
        reference = affine()
        with reference.compute_encodings():
            reference._forward_tensor(tensor)
        assert torch.equal(quantizer.min, reference.min)
        assert torch.equal(quantizer.max, reference.max)


def test_model_calibration_covers_everything_once() -> None:
    model = nn.Sequential(quantized_linear(calibrated=False), affine(), rnn.QuantizedReLU())
    shared = affine()
    model[2].output_quantizers[0] = shared
    model.append(rnn.QuantizedSigmoid())
    model[3].input_quantizers[0] = shared
    with torch.no_grad(), rnn.compute_encodings(model):
        for _ in range(2):
            model(torch.randn(4, 6))
    assert all(q.is_initialized() for q in model.modules() if isinstance(q, QuantizeDequantize))
    assert not any(getattr(m, "_calibrating", False) for m in model.modules())


def test_frozen_quantizers_keep_their_range() -> None:
    linear = quantized_linear()
    for quantizer in (linear.param_quantizers["weight"], linear.input_quantizers[0]):
        quantizer.allow_overwrite(False)
    before = copy.deepcopy(linear.state_dict())
    with torch.no_grad():
        linear.weight.mul_(7)
        with rnn.compute_encodings(linear):
            linear(torch.randn(9, 6) * 50)
    after = linear.state_dict()
    for name in ("param_quantizers.weight.max", "input_quantizers.0.min"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["output_quantizers.0.max"], after["output_quantizers.0.max"])


def test_parameters_are_calibrated_when_first_needed_activations_are_not() -> None:
    linear = rnn.QuantizedLinear(6, 5)
    linear.param_quantizers["weight"] = affine((5, 1), 4, True)
    linear(torch.randn(2, 6))
    assert linear.param_quantizers["weight"].is_initialized()
    linear.output_quantizers[0] = affine()
    with pytest.raises(RuntimeError, match="before its range was set"):
        linear(torch.randn(2, 6))


def test_exception_while_calibrating_leaves_ranges_alone() -> None:
    linear = quantized_linear()
    before = copy.deepcopy(linear.state_dict())
    with pytest.raises(ZeroDivisionError), torch.no_grad(), rnn.compute_encodings(linear):
        linear(torch.randn(2, 6) * 99)
        raise ZeroDivisionError
    for name in ("input_quantizers.0.max", "output_quantizers.0.max"):
        assert torch.equal(before[name], linear.state_dict()[name])


# -- parameters ------------------------------------------------------------------------------------


def test_fold() -> None:
    linear = quantized_linear()
    x = torch.randn(3, 6)
    expected = linear(x)
    quantized = linear.param_quantizers["weight"]._forward_tensor(linear.weight)
    exported = linear.export_param_encodings("0.6.1")["weight"]
    linear.fold_param_quantizers()
    assert linear.param_quantizers["weight"] is None
    assert isinstance(linear.weight, nn.Parameter)
    assert torch.equal(linear.weight.as_subclass(Tensor), quantized)
    output = linear(x)
    assert type(output) is Tensor
    assert torch.equal(output, expected)
    assert linear.export_param_encodings("0.6.1")["weight"] == exported


def test_module_without_slots_for_a_parameter_made_later() -> None:
    linear = rnn.QuantizedLinear(6, 5, bias=False)
    assert list(linear.param_quantizers) == ["weight"]
    assert linear(torch.randn(2, 6)).shape == (2, 5)


def test_weight_norm() -> None:
    with pytest.warns(FutureWarning):
        linear = nn.utils.weight_norm(nn.Linear(6, 5))
    twin = QuantizationMixin.from_module(linear)
    x = torch.randn(2, 6)
    assert torch.equal(twin(x), linear(x))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest_fp4(weight: Tensor, scale: Tensor) -> Tensor:
    grid = torch.cat((-E2M1.flip(0), E2M1))
    distance = (weight[..., None] / scale[..., None] - grid).abs()
    return grid[distance.argmin(-1)] * scale


@pytest.mark.parametrize("spatial", [(), (3,), (3, 2)])
def test_mxfp4(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cls = (rnn.QuantizedLinear, rnn.QuantizedConv1d, rnn.QuantizedConv2d)[len(spatial)]
    module = cls(8, 5, *([spatial] if spatial else []))
    with torch.no_grad():
        module.weight[0, :4] = 0
    weight = module.weight.detach().clone()
    # Blocks of four input channels by all of the kernel's positions.
    largest = weight.reshape(5, 2, -1).abs().amax(2).reshape(5, 2, *(1 for _ in spatial))
    scale = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-9) / 4)))
    scale[largest == 0] = 1
    module.set_weight_quantizer_to_mxfp4_int8(block_size=4)
    scale = scale.repeat_interleave(4, 1).expand_as(weight)
    expected = nearest_fp4(weight, scale)
    torch.testing.assert_close(module.weight.as_subclass(Tensor).detach(), expected)
    quantizer = module.param_quantizers["weight"]
    assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-128, 127, True)
    assert quantizer.shape == (5, 1, *(1 for _ in spatial))
    x = torch.randn(2, 8, *(4 for _ in spatial))
    module(x).sum().backward()
    assert module.weight.grad is not None
    with pytest.raises(RuntimeError, match="block_size"):
        module.set_weight_quantizer_to_mxfp4_int8(3)
    with pytest.raises(RuntimeError, match="expected Linear"):
        rnn.QuantizedEmbedding(4, 32).set_weight_quantizer_to_mxfp4_int8()
    rnn.QuantizedReLU().set_weight_quantizer_to_mxfp4_int8()


def test_nvfp4() -> None:
    torch.manual_seed(0)
    module = rnn.QuantizedLinear(32, 3)
    weight = module.weight.detach().clone()
    scale_q = (torch.rand(3, 2) + 0.5).to(torch.float8_e4m3fn)
    module.set_weight_quantizer_to_nvfp4_int8(scale_q, 0.05)
    scale = (scale_q.float() * 0.05).repeat_interleave(16, 1)
    torch.testing.assert_close(
        module.weight.as_subclass(Tensor).detach(), nearest_fp4(weight, scale)
    )
    for bad in (scale_q.float(), scale_q[:, :1]):
        with pytest.raises(RuntimeError, match="scale_q"):
            module.set_weight_quantizer_to_nvfp4_int8(bad, 0.05)
    conv = rnn.QuantizedConv2d(32, 3, 2)
    weight = conv.weight.detach().clone()
    conv.set_weight_quantizer_to_nvfp4_int8(scale_q[..., None, None], 0.05)
    expected = nearest_fp4(weight, scale[..., None, None].expand_as(weight))
    torch.testing.assert_close(conv.weight.as_subclass(Tensor).detach(), expected)
    assert conv.weight.encoding.block_size == (1, 16, 2, 2)
    with pytest.raises(RuntimeError, match="meta_scale"):
        module.set_weight_quantizer_to_nvfp4_int8(scale_q, torch.ones(2))


def test_removal_of_quantizers() -> None:
    linear = quantized_linear()
    quantizers = [
        linear.input_quantizers[0],
        linear.output_quantizers[0],
        linear.param_quantizers["weight"],
    ]

    def present() -> list[bool]:
        return [
            linear.input_quantizers[0] is quantizers[0],
            linear.output_quantizers[0] is quantizers[1],
            linear.param_quantizers["weight"] is quantizers[2],
        ]

    with linear._remove_input_quantizers(0):
        assert present() == [False, True, True]
    with linear._remove_activation_quantizers():
        assert present() == [False, False, True]
    with pytest.raises(ZeroDivisionError), linear._remove_all_quantizers():
        assert present() == [False, False, False]
        raise ZeroDivisionError
    assert present() == [True, True, True]
    with linear._remove_param_quantizers("weight"):
        assert present() == [True, True, False]
    with pytest.raises(KeyError):
        linear._remove_output_quantizers(3)
    linear._remove_output_quantizers()
    assert present() == [True, False, True]


# -- encodings -------------------------------------------------------------------------------------


def test_encodings_round_trip() -> None:
    source, target = quantized_linear(), quantized_linear(calibrated=False)
    options: dict[str, Any] = {
        "strict": True,
        "partial": True,
        "requires_grad": False,
        "allow_overwrite": False,
    }
    inputs = dict(enumerate(source.export_input_encodings("0.6.1")))
    outputs = dict(enumerate(source.export_output_encodings("0.6.1")))
    params = source.export_param_encodings("0.6.1")
    assert params["bias"] is None
    target.import_input_encodings({str(k): v for k, v in inputs.items()}, **options)
    target.import_output_encodings({str(k): v[0] for k, v in outputs.items()}, **options)
    target.import_param_encodings(params, **options)
    for kind in ("input_quantizers", "output_quantizers", "param_quantizers"):
        for a, b in zip(
            rnn.slots.flatten(getattr(source, kind)),
            rnn.slots.flatten(getattr(target, kind)),
            strict=True,
        ):
            if a is None:
                continue
            torch.testing.assert_close(a.get_scale(), b.get_scale())
            assert torch.equal(a.get_offset(), b.get_offset())
            assert not b.min.requires_grad
            assert not b.is_overwrite_allowed()
    before = target.input_quantizers[0].min.clone()
    target.import_input_encodings({}, **{**options, "partial": False})
    assert torch.equal(target.input_quantizers[0].min, before), "frozen quantizers stay"


def test_import_refuses_or_removes() -> None:
    source = quantized_linear()
    encodings = {"0": source.export_input_encodings("0.6.1")[0]}
    empty = rnn.QuantizedLinear(6, 5)
    with pytest.raises(RuntimeError, match=r"input_quantizers\['0'\]"):
        empty.import_input_encodings(encodings, True, True, None, True)
    empty.import_input_encodings(encodings, False, True, None, True)
    assert empty.input_quantizers[0] is None
    source.import_output_encodings({}, True, False, None, True)
    assert source.output_quantizers[0] is None
    source.import_param_encodings({}, True, True, None, True)
    assert source.param_quantizers["weight"] is not None


# -- user classes ----------------------------------------------------------------------------------


def expected_scale(twin: Any, x: Tensor) -> Tensor:
    scale = twin.param_quantizers["scale"]._forward_tensor(twin.scale)
    shift = twin.param_quantizers["shift"]._forward_tensor(twin.shift)
    x = twin.input_quantizers[0]._forward_tensor(x)
    return twin.output_quantizers[0]._forward_tensor(x * scale * 2 + shift)


def test_wrap(registry: Any) -> None:
    cls = QuantizationMixin.wrap(Scale)
    assert QuantizationMixin.wrap(Scale) is cls
    assert QuantizationMixin.wrap(nn.Linear) is rnn.QuantizedLinear
    module = Scale()
    twin = QuantizationMixin.from_module(module)
    assert type(twin) is cls and twin.scale is module.scale
    for name in twin.param_quantizers:
        twin.param_quantizers[name] = fixed(-1, 1)
    twin.input_quantizers[0], twin.output_quantizers[0] = fixed(-2, 2), fixed(-3, 3)
    x = torch.randn(3, 4)
    assert torch.equal(twin(x, times=2), expected_scale(twin, x))
    assert torch.equal(twin(x=x, times=2), expected_scale(twin, x))
    assert twin.calls == 2, "attributes set by the forward pass stay set"
    assert set(twin._parameters) == {"scale", "shift"} and "scale" not in twin.__dict__
    with pytest.raises(TypeError, match="wrap"):
        QuantizationMixin.wrap(int)  # type: ignore[arg-type]


def test_implements_with_own_forward(registry: Any) -> None:
    @QuantizationMixin.implements(Scale)
    class QuantizedScale(QuantizationMixin, Scale):
        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            x = self.input_quantizers[0](x)
            with self._patch_quantized_parameters():
                seen.append(self.scale)
                x = super().forward(x, times)
            return self.output_quantizers[0](x)  # type: ignore[no-any-return]

    seen: list[Tensor] = []
    twin = QuantizationMixin.from_module(Scale())
    assert type(twin) is QuantizedScale
    for name in twin.param_quantizers:
        twin.param_quantizers[name] = fixed(-1, 1)
    twin.input_quantizers[0], twin.output_quantizers[0] = fixed(-2, 2), fixed(-3, 3)
    x = torch.randn(3, 4)
    output = twin(x, 2)
    assert torch.equal(output.as_subclass(Tensor), expected_scale(twin, x))
    assert seen[0] is not twin.scale and isinstance(twin.scale, nn.Parameter)
    output.as_subclass(Tensor).sum().backward()
    assert twin.scale.grad is not None and twin.scale.grad.abs().sum() > 0
    for calibration in (twin.compute_encodings(), rnn.compute_encodings(twin)):
        with torch.no_grad(), calibration:
            # Own forward methods call the quantizers, and these give back what they got.
            assert torch.equal(
                twin(x), x * seen[-1] + twin.param_quantizers["shift"]._forward_tensor(twin.shift)
            )


def test_patch_is_undone_by_exceptions(registry: Any) -> None:
    for cls in (QuantizationMixin.wrap(Failing),):
        twin = cls()
        twin.param_quantizers["weight"] = fixed()
        weight = twin.weight
        with pytest.raises(ZeroDivisionError):
            twin(torch.ones(3))
        with pytest.raises(ZeroDivisionError), twin._patch_quantized_parameters():
            assert twin.weight is not weight
            with twin._patch_quantized_parameters(["weight"]):
                pass
            assert twin.weight is not weight
            raise ZeroDivisionError
        assert twin.weight is weight and "weight" not in twin.__dict__


def test_original_of_a_class_with_own_parameters(registry: Any) -> None:
    QuantizationMixin.wrap(Scale)
    module = Scale()
    original = QuantizationMixin.from_module(module).get_original_module()
    assert type(original) is Scale and original.scale is module.scale


def test_unknown_module(registry: Any) -> None:
    with pytest.raises(UnknownModuleError) as error:
        QuantizationMixin.from_module(Unknown())
    message = str(error.value)
    for part in ("Unknown", "QuantizationMixin.implements(Unknown)", "QuantizationMixin.ignore"):
        assert part in message
    assert isinstance(error.value, RuntimeError)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == message and again.module_cls is Unknown
    # The example in the message is code that works.
    scope: dict[str, Any] = {
        "QuantizationMixin": QuantizationMixin,
        "Unknown": Unknown,
        "nn": nn,
        "Tensor": Tensor,
        "Any": Any,
    }
    exec(error.value.generate_code_example(), scope)
    twin = QuantizationMixin.from_module(Unknown())
    assert type(twin).__name__ == "QuantizedUnknown"
    assert torch.equal(twin(torch.ones(2), torch.zeros(1), flag=True), torch.ones(2))


def test_ignore(registry: Any) -> None:
    module = Unknown()
    assert QuantizationMixin.ignore(Unknown) is Unknown
    assert QuantizationMixin.from_module(module) is module
    QuantizationMixin.ignore(nn.ReLU)
    relu = nn.ReLU()
    assert QuantizationMixin.from_module(relu) is relu
    identity = nn.Identity()
    assert QuantizationMixin.from_module(identity) is identity
    failing = Failing()
    QuantizationMixin.ignore_unknown_modules()
    assert QuantizationMixin.from_module(failing) is failing
    QuantizationMixin.ignore_unknown_modules(False)
    with pytest.raises(UnknownModuleError):
        QuantizationMixin.from_module(failing)
    for method in (QuantizationMixin.ignore, QuantizationMixin.implements):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module class"):
            method(3)  # type: ignore[arg-type]


def test_forward_set_on_the_instance_is_reported() -> None:
    relu = nn.ReLU()
    relu.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="QuantizedReLU"):
        QuantizationMixin.from_module(relu)


# -- what stands in slots, and what is quantized ---------------------------------------------------


@pytest.mark.parametrize("kind", ["input_quantizers", "output_quantizers", "param_quantizers"])
def test_wrong_thing_in_a_slot(kind: str) -> None:
    linear = rnn.QuantizedLinear(6, 5)
    getattr(linear, kind)["weight" if kind == "param_quantizers" else 0] = nn.ReLU()
    message = rf"QuantizedLinear\.{kind}\[.*expected a quantizer.*got ReLU"
    with pytest.raises(TypeError, match=message):
        linear(torch.randn(2, 6))
    with pytest.raises(TypeError, match=message), linear.compute_encodings():
        pass


def test_attribute_errors_of_quantizers_are_their_own() -> None:
    class Broken(QuantizeDequantize):
        def _forward_tensor(self, input: Tensor) -> Tensor:
            return input.nonsense  # type: ignore[attr-defined,no-any-return]

    relu = rnn.QuantizedReLU()
    relu.input_quantizers[0] = Broken((), 8, False)
    with pytest.raises(AttributeError, match="nonsense"):
        relu(torch.ones(2))


def test_only_floating_point_is_quantized() -> None:
    add = custom.QuantizedAdd()
    for i in range(2):
        add.input_quantizers[i] = fixed()
    add.output_quantizers[0] = fixed()
    integers = torch.arange(4)
    assert torch.equal(add(integers, integers), integers * 2)
    assert add(2, 3) == 5
    x = torch.randn(4)
    quantizer = fixed()
    assert torch.equal(add(x, 0.5), quantizer._forward_tensor(quantizer._forward_tensor(x) + 0.5))


def test_arguments_by_name() -> None:
    linear = quantized_linear()
    x = torch.randn(2, 6)
    assert torch.equal(linear(input=x), linear(x))
    add = custom.QuantizedAdd()
    add.input_quantizers[1] = fixed()
    assert torch.equal(add(x=x, y=x), x + fixed()._forward_tensor(x))
    with pytest.raises(TypeError):
        linear(x, x)
    with pytest.raises(TypeError):
        linear(nonsense=x)


def test_quantized_tensors_come_in_dequantized_and_plain_ones_go_out() -> None:
    quantize = Quantize((), 8, False)
    quantize.set_range(torch.tensor(-2.0), torch.tensor(2.0))
    x = torch.randn(4, 6)
    quantized = quantize(x)
    expected = quantized.dequantize().as_subclass(Tensor)
    for twin in (rnn.QuantizedLinear(6, 5), rnn.QuantizedReLU(), rnn.QuantizedBatchNorm1d(6)):
        for given in (quantized, quantized.dequantize()):
            output = twin(given)
            assert type(output) is Tensor
            torch.testing.assert_close(output, twin(expected))
    twin.output_quantizers[0] = quantize
    output = twin(x)
    assert type(output) is Tensor
    assert output.abs().max() <= 2.1, "an output quantizer of any kind leaves values, not bins"
    linear = rnn.QuantizedLinear(6, 5)
    linear.param_quantizers["weight"] = Quantize((5, 1), 8, True)
    linear.compute_param_encodings()
    weight = linear.param_quantizers["weight"](linear.weight).dequantize().as_subclass(Tensor)
    assert torch.equal(linear(x), F.linear(x, weight, linear.bias))


def test_masked_fill_leaves_its_input_alone() -> None:
    x = torch.randn(3)
    custom.MaskedFill()(x, torch.tensor([True, False, True]), 5.0)
    assert not (x == 5.0).any()


# -- kernels ---------------------------------------------------------------------------------------


def test_kernels() -> None:
    seen: list[Any] = []

    def kernel(x: Any, weight: Any, bias: Any = None, *, output_encodings: Any = None) -> Any:
        seen.append((x, weight, output_encodings))
        return F.linear(x.dequantize(), weight.dequantize(), bias) + 100

    linear = quantized_linear()
    other = quantized_linear()
    x = torch.randn(2, 6)
    plain_output = linear(x)
    assert linear.get_kernel() is None
    linear.set_kernel(kernel)
    try:
        assert linear.get_kernel() is kernel and other.get_kernel() is None
        output = linear(x)
        assert type(output) is Tensor and (output > 50).all()
        given, weight, encoding = seen[0]
        assert given.encoding.bitwidth == 4 and weight.encoding.scale.shape == (5, 1)
        assert encoding.scale == linear.output_quantizers[0].get_encodings().scale
        assert torch.equal(other(x), plain_output)
        with torch.no_grad(), linear.compute_encodings():
            assert (linear(x) < 50).all(), "no kernel while calibrating"
        assert copy.deepcopy(linear).get_kernel() is None
        pickle.loads(pickle.dumps(linear))
        linear.set_kernel(None)
        rnn.QuantizedLinear.set_default_kernel(kernel)
        assert rnn.QuantizedLinear.get_default_kernel() is kernel
        assert (other(x) > 50).all()
        assert rnn.QuantizedReLU.get_default_kernel() is None
    finally:
        rnn.QuantizedLinear.set_default_kernel(None)
    assert torch.equal(other(x), plain_output)
    with pytest.raises(TypeError, match="callable"):
        linear.set_kernel(3)


@pytest.mark.parametrize(
    ("twin", "inputs"),
    [
        (rnn.QuantizedReLU(), (torch.randn(3),)),
        (
            rnn.QuantizedConv2d(2, 3, 3, padding=1, padding_mode="reflect"),
            (torch.randn(1, 2, 4, 4),),
        ),
        (rnn.QuantizedLSTM(3, 4), (torch.randn(5, 2, 3),)),
        (rnn.QuantizedGRUCell(3, 4), (torch.randn(2, 3),)),
        (rnn.QuantizedBatchNorm1d(4), (torch.randn(3, 4),)),
        (custom.QuantizedConcat(), (torch.randn(3), torch.randn(3))),
        (custom.QuantizedMatMul(), (torch.randn(3, 3), torch.randn(3, 3))),
        (custom.QuantizedMultiply(), (torch.randn(3, 3), torch.randn(3, 3))),
    ],
    ids=lambda v: type(v).__name__,
)
def test_kernel_takes_the_place_of_the_function(twin: Any, inputs: Any) -> None:
    functions = {
        "QuantizedReLU": F.relu,
        "QuantizedConv2d": F.conv2d,
        "QuantizedLSTM": torch.lstm,
        "QuantizedGRUCell": torch.gru_cell,
        "QuantizedBatchNorm1d": F.batch_norm,
        "QuantizedConcat": torch.cat,
        "QuantizedMatMul": torch.matmul,
        "QuantizedMultiply": torch.mul,
    }
    function = functions[type(twin).__name__]
    calls: list[Any] = []

    def kernel(*args: Any, output_encodings: Any, **kwargs: Any) -> Any:
        calls.append(output_encodings)
        return function(*args, **kwargs)

    torch.manual_seed(1)
    expected = twin(*inputs)
    twin.set_kernel(kernel)
    torch.manual_seed(1)
    output = twin(*inputs)
    assert len(calls) == 1
    for a, b in zip(
        torch.utils._pytree.tree_leaves(output),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert torch.equal(a, b)


# -- threads ---------------------------------------------------------------------------------------


def test_threads_share_a_module(registry: Any) -> None:
    """Neither way of putting quantized parameters in place shows in other threads, or stays."""
    modules = [
        QuantizationMixin.wrap(Scale)(64),
        rnn.QuantizedPReLU(64),
        rnn.QuantizedBatchNorm1d(64),
    ]

    @QuantizationMixin.implements(Failing)
    class Patching(QuantizationMixin, Scale):
        def forward(self, x: Tensor) -> Tensor:
            with self._patch_quantized_parameters():
                return Scale.forward(self, x)

    modules.append(Patching(64))
    x = torch.randn(32, 64)
    errors: list[Any] = []
    for module in modules:
        module.eval()
        for name in module.param_quantizers:
            module.param_quantizers[name] = fixed(-1, 1)
        params = dict(module.named_parameters())
        with torch.no_grad():
            expected = module(x)

            def work(module: Any = module, expected: Tensor = expected) -> None:
                with torch.no_grad():
                    for _ in range(60):
                        if not torch.equal(module(x), expected):
                            errors.append(module)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert dict(module.named_parameters()).keys() == params.keys()
        assert all(p is params[name] for name, p in module.named_parameters())
    assert not errors


# -- reuse -----------------------------------------------------------------------------------------


class Counting(QuantizeDequantize):
    calls = 0

    def _forward_tensor(self, input: Tensor) -> Tensor:
        type(self).calls += 1
        return super()._forward_tensor(input)


def counted() -> tuple[Any, Tensor]:
    linear = rnn.QuantizedLinear(6, 5)
    linear.param_quantizers["weight"] = Counting((5, 1), 4, True)
    linear.compute_param_encodings()
    Counting.calls = 0
    return linear, torch.randn(2, 6)


def test_reuse() -> None:
    linear, x = counted()
    expected = linear(x)
    assert Counting.calls == 1
    with torch.no_grad(), reuse_quantized_params(nn.Sequential(linear)):
        for _ in range(3):
            assert torch.equal(linear(x), expected)
        assert Counting.calls == 2
        with reuse_quantized_params(linear):
            linear(x)
        assert torch.equal(linear(x), expected)
        assert Counting.calls == 2
        with torch.enable_grad():
            linear(x).sum().backward()
            assert linear.weight.grad is not None
        assert Counting.calls == 3
        # Nothing of it in copies, pickles, state dicts.
        copied = copy.deepcopy(linear)
        assert torch.equal(copied(x), expected)
        assert Counting.calls == 4
        assert set(linear.state_dict()) == set(copied.state_dict())
        pickle.dumps(linear.get_original_module())
        assert not [v for v in linear.__dict__.values() if isinstance(v, Tensor)]
        # Calibration is noticed.
        linear.weight.mul_(2)
        linear.compute_param_encodings()
        torch.testing.assert_close(linear(x) - linear.bias, 2 * (expected - linear.bias))
        # Other threads have nothing to do with it.
        before = Counting.calls
        thread = threading.Thread(target=lambda: torch.no_grad()(linear)(x))
        thread.start()
        thread.join()
        assert Counting.calls == before + 1
    assert not _blocks.entries
    with torch.no_grad():
        before = Counting.calls
        linear(x)
    assert Counting.calls == before + 1


def test_reuse_never_while_tracing_or_exporting() -> None:
    linear, x = quantized_linear(), torch.randn(2, 6)
    with torch.no_grad(), reuse_quantized_params(linear):
        expected = linear(x)
        traced = torch.jit.trace(linear, (x,))
        exported = torch.export.export(linear, (x,))
        compiled = torch.compile(linear, fullgraph=True, backend="eager")
        for other in (traced, exported.module(), compiled):
            assert torch.equal(other(x), expected)
        linear.weight.mul_(2)
        assert not torch.equal(traced(x), expected)
        assert not torch.equal(compiled(x), expected)
    assert "rimet" in str(traced.inlined_graph)
    assert "rimet" in str(exported.graph)


def test_reuse_ends_with_exceptions_and_wants_a_module() -> None:
    linear, x = counted()
    with pytest.raises(ZeroDivisionError), reuse_quantized_params(linear):
        raise ZeroDivisionError
    assert not _blocks.entries
    not_a_module: Any = 3
    with pytest.raises(TypeError, match="model"), reuse_quantized_params(not_a_module):
        pass


# -- compilers -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.act = nn.PReLU()
        self.add = custom.Add()
        self.cat = custom.Concat(1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        y = self.act(self.up(x))[..., :-1, :-1]
        x = self.cat(self.add(x, y), y)
        logits: Tensor = self.fc(self.norm(self.flat(self.pool(x))))
        return logits


def quantized_net() -> Any:
    torch.manual_seed(0)
    net = Net().eval()
    for name, child in list(net.named_children()):
        twin = QuantizationMixin.from_module(child)
        for container in (twin.input_quantizers, twin.output_quantizers):
            for i in range(len(container)):
                container[i] = affine((), 8)
        if "weight" in twin.param_quantizers:
            twin.param_quantizers["weight"] = affine((), 8, True)
        setattr(net, name, twin)
    with torch.no_grad(), rnn.compute_encodings(net):
        net(torch.randn(4, 3, 6, 6))
    return net


@pytest.mark.parametrize("training", [False, True])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    net, x = quantized_net(), torch.randn(2, 3, 6, 6)
    net.train(training)
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected, output = net(x), compiled(x)
    torch.testing.assert_close(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert all(isinstance(p, nn.Parameter) for p in other.parameters())


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    net, x = quantized_net(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = net(x)
    program = torch.export.export(net, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected)
    number = sum(isinstance(m, QuantizeDequantize) for m in net.modules())
    assert sum("rimet" in str(node.target) for node in program.graph.nodes) >= number
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_compile_patching_and_wrapped_modules(registry: Any) -> None:
    torch._dynamo.reset()

    @QuantizationMixin.implements(Failing)
    class Patching(QuantizationMixin, nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with self._patch_quantized_parameters():
                return nn.Linear.forward(self, x)

    for module in (Patching(4, 4), rnn.QuantizedPReLU(4), rnn.QuantizedBilinear(4, 4, 3)):
        for name in module.param_quantizers:
            module.param_quantizers[name] = fixed(-1, 1)
        x = (torch.randn(3, 4),) * (2 if isinstance(module, nn.Bilinear) else 1)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*x), module(*x))


def test_training_moves_weights_and_ranges() -> None:
    net, x = quantized_net(), torch.randn(4, 3, 6, 6)
    net.train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {"conv.weight", "fc.weight", "bn.weight"} <= moved
    assert {"conv.param_quantizers.weight.max", "fc.output_quantizers.0.max"} <= moved


def test_data_parallel_replicas() -> None:
    from torch.nn.parallel.replicate import _replicatable_module

    net = quantized_net()
    assert _replicatable_module(net)
    x = torch.randn(2, 3, 6, 6)
    replica_children = {}
    for name, module in net.named_modules():
        replica = module._replicate_for_data_parallel()
        replica_children[name] = replica
    # What DataParallel does: replicas hold plain tensors, as attributes.
    for name, replica in replica_children.items():
        for key in replica._modules:
            child = f"{name}.{key}" if name else key
            if replica._modules[key] is not None:
                replica._modules[key] = replica_children[child]
        for key, param in list(net.get_submodule(name)._parameters.items()):
            if param is not None:
                replica._parameters.pop(key, None)
                setattr(replica, key, param * 1)
    assert torch.equal(replica_children[""](x), net(x))


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_data_parallel_training(process_group: Any, kind: str) -> None:
    """The wrappers in one process: hooks, replaced classes, sharded parameters."""
    net, x = quantized_net().train(), torch.randn(4, 3, 6, 6)
    expected = net(x)
    other: Any = copy.deepcopy(net)
    expected.square().sum().backward()
    if kind == "ddp":
        parallel = nn.parallel.DistributedDataParallel(other)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        ranges = {
            p for m in other.modules() if isinstance(m, QuantizeDequantize) for p in m.parameters()
        }
        for child in other.children():
            if any(p not in ranges for p in child.parameters()):
                fully_shard(child, mesh=mesh, ignored_params=ranges)
        parallel = fully_shard(other, mesh=mesh, ignored_params=ranges)
    output = parallel(x)
    assert torch.equal(output, expected.detach())
    output.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
            torch.testing.assert_close(grad, p.grad)
