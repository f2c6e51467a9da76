"""Sequential MSE of one layer: the choice of the direct computation, and AIMET's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import rimet.nn
import torch
from rimet import _core
from rimet._weight_layers import linear_map
from rimet.quantization.affine import QuantizeDequantize
from torch import Tensor, nn
from torch.func import functional_call

from .layers import LAYERS, axes, quantized

# torch says so of the reference's own forward.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CANDIDATES = 12


def search(layer: Any, x: list[Tensor], xq: list[Tensor], **changes: Any) -> dict[str, Any]:
    quantizer = layer.param_quantizers["weight"]
    grouping = None
    if hasattr(quantizer, "block_grouping"):
        levels = 2 ** (quantizer.decompressed_bw - quantizer.bitwidth)
        grouping = (list(quantizer.block_grouping), levels)
    arguments: dict[str, Any] = {
        "qmin": quantizer.qmin,
        "qmax": quantizer.qmax,
        "symmetric": quantizer.symmetric,
        "shape": list(quantizer.shape),
        "block_size": None if quantizer.block_size is None else list(quantizer.block_size),
        "grouping": grouping,
        "num_candidates": CANDIDATES,
        "inp_symmetry": "symqt",
        "loss": "mse",
    }
    result: dict[str, Any] = _core.seq_mse_layer(
        linear_map(layer),
        layer.weight,
        quantizer.get_min(),
        quantizer.get_max(),
        x,
        xq,
        **{**arguments, **changes},
    )
    return result


def direct_losses(
    layer: Any, x: Tensor, xq: Tensor, inp_symmetry: str = "symqt", loss: str = "mse"
) -> Tensor:
    """Loss of every candidate and encoding: the layer run in float64 on one block of input channels
    at a time. Shape ``[candidates, *encodings]``."""
    quantizer = layer.param_quantizers["weight"]
    original = copy.deepcopy(layer.get_original_module()).double()
    low, high = quantizer.get_min().clone(), quantizer.get_max().clone()
    weight = original.weight.detach()
    out_axis, in_axis = axes(layer)
    shape = [1] * (weight.dim() - len(quantizer.shape)) + list(quantizer.shape)
    blocks = shape[in_axis]
    groups = getattr(layer, "groups", 1)
    pair = {"symqt": (xq, xq), "symfp": (x, x), "asym": (x, xq)}[inp_symmetry]
    xt, xo = (t.double() for t in pair)
    channel = -1 if isinstance(layer, nn.Linear) else 1

    def output(w: Tensor, inputs: Tensor, block: int) -> Tensor:
        """Output that comes from one block of the weight's input channels."""
        size = w.shape[in_axis] // blocks
        keep = torch.zeros_like(w)
        keep.narrow(in_axis, block * size, size).fill_(1)
        bias = {} if original.bias is None else {"bias": torch.zeros_like(original.bias)}
        y: Tensor = functional_call(original, {"weight": w * keep, **bias}, (inputs,))
        return y.movedim(channel, -1).reshape(-1, y.shape[channel])

    losses = []
    for i in range(1, CANDIDATES + 1):
        _set(quantizer, low / CANDIDATES * i, high / CANDIDATES * i)
        rounded = quantizer(layer.weight.detach().float()).as_subclass(torch.Tensor).double()
        found = torch.zeros(shape, dtype=torch.float64)
        for block in range(blocks):
            a, b = output(weight, xt, block), output(rounded, xo, block)
            error = (a - b).square() if loss != "l1" else (a - b).abs()
            per_channel = error.sum(0)
            if loss == "sqnr":
                per_channel = 10 * torch.log10(per_channel / a.square().sum(0))
            if out_axis == 1:  # transposed: encodings count the outputs of one group
                per_channel = per_channel.reshape(groups, -1).sum(0)
            per_channel = per_channel.reshape(shape[out_axis], -1).sum(1)
            target = found.select(in_axis, block)
            target += per_channel.reshape(target.shape)
        losses.append(found.reshape(quantizer.shape))
    _set(quantizer, low, high)
    return torch.stack(losses)


def _set(quantizer: Any, low: Tensor, high: Tensor) -> None:
    """The range that min-max calibration makes of two numbers."""
    analyzer = type(quantizer.encoding_analyzer)(quantizer.shape)
    analyzer.update_stats(low)
    analyzer.update_stats(high)
    quantizer.set_range(
        *analyzer.compute_encodings(quantizer.qmax - quantizer.qmin, quantizer.symmetric)
    )


def check(name: str, grid: str, **settings: Any) -> dict[str, Any]:
    symmetric = settings.pop("symmetric", True)
    return check_layer(*quantized(name, grid, symmetric=symmetric), **settings)


def check_layer(layer: Any, x: Tensor, xq: Tensor, **settings: Any) -> dict[str, Any]:
    with torch.no_grad():
        losses = direct_losses(layer, x, xq, **settings)
    cut = max(1, len(x) // 3)
    result = search(layer, [x[:cut], x[cut:]], [xq[:cut], xq[cut:]], **settings)
    chosen = losses.gather(0, (result["candidate"] - 1)[None])[0]
    best = losses.min(0).values
    # float32 products: a loss closer than this to the least may be taken for it.
    slack = 1e-5 * best.abs() + 1e-9
    assert bool((chosen <= best + slack).all()), (chosen / best).max()
    assert result["loss_after"] == pytest.approx(float(chosen.sum()), rel=1e-4)
    # An estimate where a bound excludes the full range; never below what was chosen.
    assert result["loss_before"] == pytest.approx(float(losses[-1].sum()), rel=0.1)
    if settings.get("loss") != "sqnr":
        assert result["loss_before"] >= result["loss_after"] * (1 - 1e-6)
    quantizer: Any = layer.param_quantizers["weight"]
    factor = result["candidate"] / CANDIDATES
    torch.testing.assert_close(result["max"], quantizer.max.detach() * factor)
    return result


@pytest.mark.parametrize("name", LAYERS)
def test_the_choice_is_that_of_the_direct_computation(name: str) -> None:
    check(name, "per-channel")


@pytest.mark.parametrize("grid", ["per-tensor", "blocks", "lpbq"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "depthwise", "transposed1d"])
def test_for_every_grid(name: str, grid: str) -> None:
    if name == "depthwise" and grid in ("blocks", "lpbq"):
        pytest.skip("one input channel to a filter: nothing to cut into blocks")
    check(name, grid)


@pytest.mark.parametrize("loss", ["mse", "l1", "sqnr"])
@pytest.mark.parametrize("inp_symmetry", ["symqt", "symfp", "asym"])
@pytest.mark.parametrize("name", ["conv2d", "conv2d with few places"])
def test_for_every_loss_and_symmetry(name: str, inp_symmetry: str, loss: str) -> None:
    result = check(name, "blocks", inp_symmetry=inp_symmetry, loss=loss, symmetric=False)
    few = name == "conv2d with few places"
    assert result["method"] == ("rows" if few or loss == "l1" else "gram")


@pytest.mark.parametrize("grid", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("loss", ["mse", "sqnr"])
@pytest.mark.parametrize("inp_symmetry", ["symqt", "symfp", "asym"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d with few places", "transposed1d"])
def test_one_block_for_every_quadratic_loss(
    name: str, inp_symmetry: str, loss: str, grid: str
) -> None:
    check(name, grid, inp_symmetry=inp_symmetry, loss=loss, symmetric=False)


@pytest.mark.parametrize("seed", range(6))
def test_candidates_that_are_not_computed_could_not_win(seed: int) -> None:
    """On inputs as activations are: few directions hold most of the energy, so that bounds are close and leave
    out almost all; and on those where they are not.
    """
    layer, _, _ = quantized("linear, wide", "per-channel", seed=seed)
    columns, rank = layer.weight.shape[1], 1 + seed % 3
    mixed = torch.randn(400, rank) @ torch.randn(rank, columns)
    x = mixed + 3 * torch.rand(columns) + 10.0 ** -(seed // 2) * torch.randn(400, columns)
    for rows in (8, 400):
        xq = x[:rows] + 0.05 * torch.randn(rows, columns)
        for inp_symmetry in ("symqt", "asym"):
            check_layer(layer, x[:rows], xq, inp_symmetry=inp_symmetry)


@pytest.mark.parametrize("loss", ["mse", "sqnr"])
@pytest.mark.parametrize("grid", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("tail", [1.0, 0.05])
def test_candidates_left_halfway_could_not_win(tail: float, grid: str, loss: str) -> None:
    """On inputs in all directions alike, and on those of which the last columns, with which quadratic forms of the
    Gram matrix begin, say little.
    """
    layer, _, _ = quantized("linear, square", grid)
    x = torch.randn(800, 256) * torch.linspace(1, tail, 256)
    assert check_layer(layer, x, x, loss=loss)["method"] == "gram"


@pytest.mark.parametrize(("rows", "method"), [(64, "rows"), (1024, "gram")])
@pytest.mark.parametrize("inp_symmetry", ["symqt", "asym"])
def test_inputs_that_are_all_alike(inp_symmetry: str, rows: int, method: str) -> None:
    """A channel's loss is the square of one dot product, which is almost zero for a good candidate: bounds
    lose digits there, and so does the Gram matrix.
    """
    layer, _, _ = quantized("linear, square", "per-channel")
    x, xq = (torch.rand(1, 256) + 1e-6 * torch.randn(rows, 256) for _ in range(2))
    with torch.no_grad():
        losses = direct_losses(layer, x, xq, inp_symmetry)
    result = search(layer, [x], [xq], inp_symmetry=inp_symmetry)
    assert result["method"] == method
    chosen = losses.gather(0, (result["candidate"] - 1)[None])[0]
    # What float32 makes of a dot product of 256 terms: 1e-7 of the lengths, squared over all rows.
    rounding = rows * (1e-7 * x[0].norm() * layer.weight.detach().norm(dim=1, keepdim=True)) ** 2
    assert bool((chosen <= 1.001 * losses.min(0).values + rounding).all())


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_changes_at_a_right_angle_to_what_the_inputs_have_in_common(spread: float) -> None:
    """Quadratic forms of the Gram matrix, which many rows are reduced to, lose their digits there."""
    torch.manual_seed(0)
    layer: Any = rimet.nn.QuantizedLinear(256, 200, bias=False)
    quantizer = QuantizeDequantize([200, 1], 4, True)
    layer.param_quantizers["weight"] = quantizer
    layer.compute_param_encodings()
    low, high = quantizer.get_min(), quantizer.get_max()
    best = 10 + torch.arange(200)[:, None] % 3
    with torch.no_grad():
        _set(quantizer, low / CANDIDATES * best, high / CANDIDATES * best)
        changes = (quantizer(layer.weight) - layer.weight).as_subclass(Tensor).double()
        _set(quantizer, low, high)
        directions = torch.linalg.qr(changes.T)[0]
        common = torch.rand(256, dtype=torch.float64)
        common -= directions @ (directions.T @ common)
        x = (common + spread * torch.randn(1600, 256)).float()
        losses = direct_losses(layer, x, x)
    result = search(layer, [], [x])
    assert result["method"] == "gram"
    assert torch.equal(result["candidate"], best)
    least = losses.gather(0, best[None] - 1)
    # 5e-8 of the lengths is lost of a float32 dot product that is `spread` of them.
    assert result["loss_after"] == pytest.approx(float(least.sum()), rel=1e-3)


def test_inputs_that_are_not_finite_choose_as_all_candidates_do() -> None:
    layer, x, _ = quantized("linear", "per-channel")
    x[0, 0] = torch.nan
    assert bool((search(layer, [x], [x])["candidate"] >= 1).all())


def test_more_rows_than_a_piece_holds_are_summed_over_pieces() -> None:
    torch.manual_seed(0)
    layer, _, _ = quantized("linear", "per-channel")
    x = torch.randn(3 * 2**20 // 2, 12)
    whole = search(layer, [x], [x])
    parts = search(layer, [], list(x.split(10_007)))
    assert torch.equal(whole["candidate"], parts["candidate"])
    # Sums of 1.5 million rows in pieces of other sizes.
    assert whole["loss_after"] == pytest.approx(parts["loss_after"], rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("grid", ["per-channel", "blocks", "lpbq"])
@pytest.mark.parametrize("name", ["linear of tokens", "conv2d", "grouped", "transposed1d"])
def test_memory_cuts_batches_and_changes_no_choice(name: str, grid: str, loss: str) -> None:
    layer, x, xq = quantized(name, grid)
    # The least memory holds the whole: so that it does not, a layer sees its inputs many times over.
    times = 1 + (1 << 18) // x.numel()
    x, xq = (t.repeat(times, *[1] * (t.dim() - 1)) for t in (x, xq))
    settings: dict[str, Any] = {"inp_symmetry": "asym", "loss": loss}
    whole = search(layer, [x], [xq], **settings)
    parts = search(layer, [x], [xq], memory=0, **settings)
    assert torch.equal(whole["candidate"], parts["candidate"])
    # float32 sums of up to 260,000 terms within a piece.
    assert whole["loss_after"] == pytest.approx(parts["loss_after"], rel=2e-4)


@pytest.mark.parametrize("inp_symmetry", ["symqt", "asym"])
@pytest.mark.parametrize("grid", ["per-channel", "blocks"])
@pytest.mark.parametrize("name", ["linear, wide", "conv2d", "transposed1d"])
def test_encodings_of_a_shared_axis_get_the_widest_choice(
    name: str, grid: str, inp_symmetry: str
) -> None:
    layer, x, xq = quantized(name, grid)
    axis = axes(layer)[0]
    with torch.no_grad():
        losses = direct_losses(layer, x, xq, inp_symmetry)
    own = search(layer, [x], [xq], inp_symmetry=inp_symmetry)["candidate"]
    result = search(layer, [x], [xq], inp_symmetry=inp_symmetry, shared_axis=axis)
    widest = own.amax(axis, keepdim=True).expand_as(own)
    assert torch.equal(result["candidate"], widest)
    expected = losses.gather(0, (widest - 1)[None])
    assert result["loss_after"] == pytest.approx(float(expected.sum()), rel=1e-4)


def test_an_exception_in_the_progress_function_ends_the_work() -> None:
    layer, x, _ = quantized("linear", "per-channel")

    def progress(done: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(layer, [x], [x], progress=progress)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_candidates": 0}, ["num_candidates"]),
        ({"loss": "l2"}, ["loss_fn", "l2"]),
        ({"inp_symmetry": "both"}, ["inp_symmetry", "both"]),
        ({"shape": [6]}, ["range", "[6]"]),
        ({"block_size": [5, 5], "shape": [6, 1]}, ["block_size"]),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], words: list[str]) -> None:
    layer, x, _ = quantized("linear", "per-channel")
    with pytest.raises(ValueError) as caught:
        search(layer, [x], [x], **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(ValueError, match="batch"):
        search(layer, [], [])
