"""Analyzers: statistics, merging, hostile data. Goldens are in test_golden.py."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rimet.quantization import encoding_analyzer as analyzers
from rimet.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    MseEncodingAnalyzer,
    PercentileEncodingAnalyzer,
    SqnrEncodingAnalyzer,
    StatisticsNotFoundError,
    TfEnhancedEncodingAnalyzer,
    adjust_min_max,
)

Make = Callable[..., EncodingAnalyzer[Any]]
HISTOGRAMS: list[Make] = [
    lambda shape, block_size=None: PercentileEncodingAnalyzer(shape, 128, 99.5, block_size),
    SqnrEncodingAnalyzer,
    TfEnhancedEncodingAnalyzer,
    MseEncodingAnalyzer,
]
ALL: list[Make] = [MinMaxEncodingAnalyzer, *HISTOGRAMS]
IDS = ["min_max", "percentile", "sqnr", "tf_enhanced", "mse"]
every_analyzer = pytest.mark.parametrize("make", ALL, ids=IDS)
every_histogram = pytest.mark.parametrize("make", HISTOGRAMS, ids=IDS[1:])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ends(analyzer: EncodingAnalyzer[Any], num_steps: int = 255, symmetric: bool = False) -> Any:
    return torch.stack(analyzer.compute_encodings(num_steps, symmetric))


@every_analyzer
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layout_is_its_groups_one_by_one(make: Make, symmetric: bool) -> None:
    """Channels on any axis, blocks and memory orders, against one analyzer per slice (several batches)."""
    batches = [normal(6, 4, 8, seed=seed) * (1 + seed) for seed in range(3)]

    def one(parts: list[torch.Tensor]) -> torch.Tensor:
        analyzer = make((1,))
        for part in parts:
            analyzer.update_stats(part.contiguous())
        return ends(analyzer, 15, symmetric)[:, 0]

    channel = make((4, 1))
    swapped = make((4, 1))
    blocks = make((3, 1, 2), block_size=(2, -1, 4))
    for batch in batches:
        channel.update_stats(batch)
        swapped.update_stats(batch.permute(2, 1, 0).contiguous().permute(2, 1, 0))
        blocks.update_stats(batch)
    expected = torch.stack([one([b[:, c] for b in batches]) for c in range(4)], -1)
    assert torch.equal(ends(channel, 15, symmetric)[..., 0], expected)
    assert torch.equal(ends(swapped, 15, symmetric)[..., 0], expected)
    expected = torch.stack(
        [
            one([b[2 * i : 2 * i + 2, :, 4 * j : 4 * j + 4] for b in batches])
            for i in range(3)
            for j in range(2)
        ],
        -1,
    )
    assert torch.equal(ends(blocks, 15, symmetric).flatten(1), expected)


@every_analyzer
def test_shorter_block_size_broadcasts_the_leading_dimensions(make: Make) -> None:
    x = normal(6, 8)
    short, full = make((6, 2), block_size=(4,)), make((6, 2), block_size=(1, 4))
    short.update_stats(x)
    full.update_stats(x)
    assert torch.equal(ends(short), ends(full))


@every_analyzer
def test_order_and_split_of_the_data_do_not_matter(make: Make) -> None:
    batches = [normal(4, 50, seed=seed) * (1 + seed % 3) for seed in range(6)]
    whole, reverse, left, right = (make((4, 1)) for _ in range(4))
    if isinstance(whole, TfEnhancedEncodingAnalyzer):
        # Growth is limited by the first batch; within the limits the order is of no account.
        wide = torch.cat([normal(4, 49, seed=9), torch.full((4, 1), -7.0)], 1).clamp(-7, 7)
        batches = [torch.cat([wide, torch.full((4, 1), 7.0)], 1), *batches]
        for analyzer in (whole, reverse, left, right):
            analyzer.update_stats(batches[0])
        left_start, batches = batches[0], batches[1:]
        whole.update_stats(left_start)
        reverse.update_stats(left_start)
    for batch in batches:
        whole.update_stats(batch)
    for batch in batches[::-1]:
        reverse.update_stats(batch)
    for i, batch in enumerate(batches):
        (left, right)[i % 2].update_stats(batch)
    right.merge(left)
    for num_steps, symmetric in ((15, True), (255, False)):
        expected = ends(whole, num_steps, symmetric)
        assert torch.equal(ends(reverse, num_steps, symmetric), expected)
        assert torch.equal(ends(right, num_steps, symmetric), expected)


@every_analyzer
def test_state_survives(make: Make) -> None:
    analyzer = make((4, 1))
    assert analyzer.state_dict() == {}
    for seed in range(2):
        analyzer.update_stats(normal(4, 50, seed=seed).bfloat16())
    fresh = make((4, 1))
    fresh.load_state_dict(analyzer.state_dict())
    for other in (fresh, copy.deepcopy(analyzer), pickle.loads(pickle.dumps(analyzer))):
        assert torch.equal(ends(other), ends(analyzer))
        assert ends(other).dtype == torch.bfloat16
        other.update_stats(normal(4, 50) * 9)
        assert not torch.equal(ends(other), ends(analyzer))
    with pytest.raises(ValueError):
        make((3, 1)).load_state_dict(analyzer.state_dict())


@every_histogram
def test_broken_state_is_refused(make: Make) -> None:
    analyzer = make((1,))
    analyzer.update_stats(normal(50))
    before = ends(analyzer)
    for name, value in (("count", -1), ("index", 1 << 30), ("start", 5), ("level", 99)):
        state = {k: v.clone() for k, v in analyzer.state_dict().items()}
        state[name][-1] = value
        with pytest.raises(ValueError, match="parts"):
            analyzer.load_state_dict(state)
    assert torch.equal(ends(analyzer), before)


@every_analyzer
def test_dynamic_encodings_leave_the_statistics_alone(make: Make) -> None:
    analyzer, other = make((1,)), make((1,))
    analyzer.update_stats(normal(100))
    before = ends(analyzer)
    wide = normal(100, seed=1) * 20
    other.update_stats(wide)
    dynamic = torch.stack(analyzer.compute_dynamic_encodings(wide, 255, False))
    assert torch.equal(dynamic, ends(other))
    assert torch.equal(ends(analyzer), before)
    analyzer.reset_stats()
    with pytest.raises(StatisticsNotFoundError):
        analyzer.compute_encodings(255, False)


@every_analyzer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_data(make: Make, dtype: torch.dtype) -> None:
    x = normal(4, 200).to(dtype)
    analyzer, exact = make((4, 1)), make((4, 1))
    analyzer.update_stats(x)
    exact.update_stats(x.float())
    result = ends(analyzer)
    assert result.dtype == dtype
    # The same range but for rounding to the dtype.
    torch.testing.assert_close(
        result.float(), ends(exact), rtol=torch.finfo(dtype).eps * 2 + 1e-6, atol=0
    )


@every_analyzer
def test_bad_input_names_what_is_wrong(make: Make) -> None:
    analyzer = make((4, 1))
    for bad in (normal(5, 3), normal(3)):
        with pytest.raises((ValueError, RuntimeError), match="input|scale|shape"):
            analyzer.update_stats(bad)
    with pytest.raises(StatisticsNotFoundError):
        analyzer.compute_encodings(255, False)
    analyzer.update_stats(normal(4, 9))
    for num_steps in (0, -1, math.nan):
        with pytest.raises(ValueError, match="num_steps"):
            analyzer.compute_encodings(num_steps, False)
    with pytest.raises(ValueError, match="shape"):
        make((0, 1))
    with pytest.raises(ValueError, match="block_size"):
        make((4,), block_size=(1, 2))


@every_histogram
def test_special_values(make: Make) -> None:
    analyzer = make((1,))
    for hopeless in (torch.full((5,), math.nan), torch.tensor([math.inf, -math.inf])):
        with pytest.raises(ValueError, match="finite"):
            analyzer.update_stats(hopeless)
    with pytest.raises(ValueError, match="empty"):
        analyzer.update_stats(torch.empty(0))
    with pytest.raises(TypeError, match="float"):
        analyzer.update_stats(torch.arange(4))
    x = normal(400)
    analyzer.update_stats(torch.cat([x, torch.full((3,), math.nan)]))
    clean = make((1,))
    clean.update_stats(x)
    assert torch.equal(ends(analyzer), ends(clean))
    for value in (0.0, 3.0, -3.0, 1e9, 1e-30, 3e38):
        constant = make((1,))
        constant.update_stats(torch.full((7,), value))
        for symmetric in (False, True):
            low, high = ends(constant, 255, symmetric)
            assert low.isfinite() and high.isfinite() and low <= 0 <= high and low < high


def test_merging_what_does_not_fit() -> None:
    sqnr = SqnrEncodingAnalyzer((4, 1))
    with pytest.raises(TypeError, match="merge"):
        sqnr.merge(MinMaxEncodingAnalyzer((4, 1)))
    with pytest.raises(ValueError, match="shape"):
        sqnr.merge(SqnrEncodingAnalyzer((3, 1)))
    other = SqnrEncodingAnalyzer((4, 1), 64)
    other.update_stats(normal(4, 9))
    with pytest.raises(ValueError, match="bins"):
        sqnr.merge(other)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PercentileEncodingAnalyzer((1,), percentile=49), "percentile"),
        (lambda: PercentileEncodingAnalyzer((1,), percentile=101), "percentile"),
        (lambda: PercentileEncodingAnalyzer((1,), num_bins=0), "num_bins"),
        (lambda: SqnrEncodingAnalyzer((1,), 0), "num_bins"),
        (lambda: SqnrEncodingAnalyzer((1,), symmetric_delta_candidates=1), "symmetric_delta"),
        (lambda: SqnrEncodingAnalyzer((1,), asymmetric_delta_candidates=1), "asymmetric_delta"),
        (lambda: SqnrEncodingAnalyzer((1,), offset_candidates=2), "offset_candidates"),
        (lambda: SqnrEncodingAnalyzer((1,), gamma=math.nan), "gamma"),
        (lambda: MseEncodingAnalyzer((1,), refinement_rounds=9), "refinement_rounds"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_growth_limit() -> None:
    with pytest.raises(RuntimeError, match="growth_limit"):
        SqnrEncodingAnalyzer((1,), histogram_growth_limit=0.5)
    with pytest.raises(RuntimeError, match="growth_limit"):
        TfEnhancedEncodingAnalyzer.set_growth_limit(0.9)
    analyzer = SqnrEncodingAnalyzer((1,), histogram_growth_limit=3.0)
    analyzer.update_stats(torch.linspace(-1, 1, 100))
    analyzer.update_stats(torch.tensor([1000.0, -1000.0]))
    (stats,) = analyzer.observer.get_stats()
    assert (stats.min.item(), stats.max.item()) == (-4.0, 4.0)
    assert stats.histogram.sum() == 102


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_at_least_as_good_as_sqnr_on_the_data(bits: int, symmetric: bool) -> None:
    x = normal(8, 4000) / normal(8, 4000, seed=1).abs().clamp(min=0.1)

    def error(analyzer: EncodingAnalyzer[Any]) -> torch.Tensor:
        analyzer.update_stats(x)
        low, high = analyzer.compute_encodings(2**bits - 1, symmetric)
        delta = (high - low) / (2**bits - 1)
        return (((x.clamp(low, high) - low) / delta).round() * delta + low - x).pow(2).mean(1)

    fine = error(MseEncodingAnalyzer((8, 1)))
    coarse = error(SqnrEncodingAnalyzer((8, 1), gamma=1.0))
    assert (fine <= coarse * 1.005).all()
    assert fine.mean() < error(MinMaxEncodingAnalyzer((8, 1))).mean()


def test_adjust_min_max_is_the_engine_s() -> None:
    """The Python and the Rust form of the fit, through percentile 100."""
    for low, high in ((-1.0, 2.0), (1.0, 3.0), (-3.0, -1.0), (0.0, 1e-9), (-1e-5, 0.0)):
        for num_steps in (1, 2, 3, 15, 255, 65535, 2**32 - 1):
            for symmetric in (False, True):
                analyzer = PercentileEncodingAnalyzer((1,), 64)
                analyzer.update_stats(torch.tensor([low, high]))
                expected = adjust_min_max(
                    torch.tensor([low]), torch.tensor([high]), num_steps, symmetric
                )
                found = analyzer.compute_encodings(num_steps, symmetric)
                torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize(
    "x",
    [
        normal(6, 40) * 3 + 1,
        torch.full((6, 40), 2.0),
        torch.cat([normal(6, 38), torch.tensor([[math.inf, math.nan]] * 6)], 1),
        torch.linspace(-1, 1, 240).view(6, 40) * 3.4e38,
    ],
    ids=["normal", "constant", "special", "widest"],
)
def test_counting_with_torch_operations_gives_the_same(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of tensors on other devices, here on the CPU, in many small portions."""
    for shape, blocks in (((1,), None), ((6, 1), None), ((3, 4), [2, 10])):
        observer = SqnrEncodingAnalyzer(
            shape, 64, histogram_growth_limit=2.0, block_size=blocks
        ).observer
        onto = observer.stats.native
        for batch in (x, x * 0.5, x.flip(0)):
            expected = onto.collect(batch, shape, blocks, limited=True)
            for step in (1 << 24, 128):
                monkeypatch.setattr(analyzers, "_STEP", step)
                found = analyzers._count_with_torch(
                    onto, analyzers._by_encoding(batch, shape, blocks)
                )
                for a, b in zip(found.to_parts(), expected.to_parts(), strict=True):
                    assert torch.equal(a, b)
            onto.merge(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_analyzer
def test_cuda_gives_the_same(make: Make) -> None:
    cpu, gpu = make((64, 1, 1)), make((64, 1, 1))
    for seed in range(2):
        x = normal(8, 64, 14, 14, seed=seed)
        cpu.update_stats(x)
        gpu.update_stats(x.cuda())
    assert ends(gpu).is_cuda
    assert torch.equal(ends(gpu).cpu(), ends(cpu))
