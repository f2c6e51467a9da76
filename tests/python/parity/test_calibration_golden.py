"""Min-max calibration of degenerate data against aimet-torch 2.42.0 (``tests/data/affine``)."""

from __future__ import annotations

import warnings

import pytest
import torch
from rimet.quantization.affine import QuantizeDequantize
from rimet.quantization.encoding_analyzer import MinMaxEncodingAnalyzer

from .golden import Case, select


def tolerance(case: Case) -> dict[str, float]:
    # The rule is a handful of operations, each correctly rounded; AIMET does them in the data's
    # dtype, rimet in float32 or better: two units in the last place of the data's dtype.
    return {"rtol": 2 * torch.finfo(case.x.dtype).eps, "atol": 0.0}


@pytest.mark.parametrize("case", select("calibrate", where=lambda case: case.x.numel() > 0))
def test_analyzer(case: Case) -> None:
    analyzer = MinMaxEncodingAnalyzer((1,))
    analyzer.update_stats(case.x)
    # A shifted grid is fitted as if it had one step less, so that it is symmetric about zero.
    steps = case.qmax - case.qmin - int(2 * case.shift)
    low, high = analyzer.compute_encodings(steps, case.symmetric)
    for actual, key in ((low, "analyzer_min"), (high, "analyzer_max")):
        expected = case.outputs[key]
        torch.testing.assert_close(actual, expected, **tolerance(case), equal_nan=True)


@pytest.mark.parametrize("case", select("calibrate"))
def test_quantizer(case: Case) -> None:
    quantizer = QuantizeDequantize(
        (1,), case.qmin, case.qmax, case.symmetric, zero_point_shift=case.shift
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with quantizer.compute_encodings():
            quantizer(case.x)
    assert quantizer.is_initialized() == case.outputs["initialized"]
    if not case.outputs["initialized"]:
        return
    found = {
        "min": quantizer.min,
        "max": quantizer.max,
        "scale": quantizer.get_scale(),
        "offset": quantizer.get_offset(),
    }
    for key, actual in found.items():
        expected = case.outputs[key]
        if key == "scale" and expected.isinf().all() and case.qmax - case.qmin > 2**24:
            # The widest range of float32 overflows in AIMET's float32 subtraction. On grids that
            # float32 cannot hold rimet subtracts in float64, where it does not.
            widest = 2 * torch.finfo(torch.float32).max / (case.qmax - case.qmin)
            assert actual.item() == pytest.approx(widest, rel=2**-23)  # get_scale is float32
            continue
        torch.testing.assert_close(
            actual.detach().float(), expected.float(), **tolerance(case), equal_nan=True
        )


@pytest.mark.parametrize("case", select("calibrate", where=lambda case: case.x.numel() == 0))
def test_no_elements_are_no_statistics(case: Case) -> None:
    analyzer = MinMaxEncodingAnalyzer((1,))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        analyzer.update_stats(case.x)
