"""rimet.common: enumerations, number formats, logging, deprecation, encoding arithmetic."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rimet.common import defs, quantsim, utils
from rimet.common.defs import (
    CallbackFunc,
    Float,
    Int,
    QuantDtypeBwInfo,
    QuantizationDataType,
    QuantScheme,
    qtype,
)


def test_quant_schemes() -> None:
    assert QuantScheme.post_training_tf is QuantScheme.min_max
    assert QuantScheme.from_str("tf") is QuantScheme.min_max
    assert QuantScheme.from_str("tf_enhanced").value == 2
    assert QuantScheme.from_str("percentile").value == 6
    for bad in ("post_training_tf", "x", 3, QuantScheme.min_max, None, []):
        with pytest.raises(ValueError, match="tf_enhanced"):
            QuantScheme.from_str(bad)  # type: ignore[arg-type]


def test_number_formats() -> None:
    assert (
        defs.int8 == Int(8) == qtype.int(8) == qtype.from_string("int8")
        and str(defs.int8) == "int8"
    )
    assert defs.float16 == qtype.float(5, 10) and len({defs.float16, qtype.float(5, 10)}) == 1
    assert defs.int8 != defs.int16 and defs.float16 != defs.int16
    assert qtype.as_qtype("float8e4m3fn") is defs.float8e4m3fn
    assert qtype.as_qtype(defs.int4) is defs.int4
    assert repr(qtype.float(3, 2, True)) == "float6e3m2fn"
    assert qtype.from_legacy_repr(*defs.float16.to_legacy_repr()) == defs.float16
    assert qtype.from_legacy_repr(QuantizationDataType.int, 5) == Int(5)
    assert qtype.from_legacy_repr(QuantizationDataType.float, 8) == defs.float8e4m3fn
    assert set(defs.QTYPE_ALIASES) >= {"int2", "int4", "int8", "int16", "float16", "float32"}
    with pytest.raises(ValueError, match="undefined"):
        qtype.from_legacy_repr(QuantizationDataType.undefined, 8)
    for bits in (0, -1):
        with pytest.raises(ValueError, match="bits"):
            Int(bits)
    for wrong in ("8", 8.5, True):
        with pytest.raises(TypeError, match="bits"):
            Int(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mantissa_bits"):
        Float(4, -1, False, False)
    with pytest.raises(ValueError, match="uint8"):
        qtype.from_string("uint8")
    with pytest.raises(TypeError, match="8"):
        qtype.as_qtype(8)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        qtype()  # type: ignore[abstract]


def test_callbacks() -> None:
    assert CallbackFunc(lambda model, args: (model, args), 5)("m") == ("m", 5)
    assert CallbackFunc(lambda model, args: (model, args))("m") == ("m", None)


def test_layer_formats() -> None:
    info = QuantDtypeBwInfo(QuantizationDataType.int, 8)
    assert info.get_param() == (QuantizationDataType.undefined, 0)
    assert info.is_same_activation(QuantizationDataType.int, 8)
    assert not info.is_same_param(QuantizationDataType.int, 8)
    assert info == QuantDtypeBwInfo(QuantizationDataType.int, 8)
    with pytest.raises(ValueError, match="act_bw"):
        QuantDtypeBwInfo(QuantizationDataType.float, 8)
    with pytest.raises(ValueError, match="param_bw"):
        QuantDtypeBwInfo(QuantizationDataType.int, 8, QuantizationDataType.float, 8)


def test_compression_records() -> None:
    layer = SimpleNamespace(name="conv")
    assert "conv" in str(defs.LayerCompRatioPair(layer, None))
    assert "0.7" in str(defs.LayerCompRatioEvalScore(layer, None, 0.7))
    stats = defs.CompressionStats(
        1, 0.9, 0.5, 0.4, [defs.CompressionStats.LayerStats("conv", 0.5)], None
    )
    assert stats.compressed_model_accuracy == "0.900000" and "conv: 0.5" in str(stats)


# -- utils -----------------------------------------------------------------------------------------


def test_loggers(caplog: pytest.LogCaptureFixture) -> None:
    areas = utils.AimetLogger.LogAreas
    logger = utils.AimetLogger.get_area_logger(areas.CrosslayerEqualization)
    assert logger.name == "rimet.CrossLayerEqualization"
    utils.AimetLogger.set_level_for_all_areas(logging.ERROR)
    try:
        assert {utils.AimetLogger.get_area_logger(area).level for area in areas} == {logging.ERROR}
        utils.AimetLogger.set_area_logger_level(areas.Quant, logging.INFO)
        assert utils.AimetLogger.get_area_logger(areas.Quant).level == logging.INFO
    finally:
        utils.AimetLogger.set_level_for_all_areas(logging.NOTSET)
    with pytest.raises(TypeError, match="Quant"):
        utils.AimetLogger.get_area_logger("Quant")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="boo"):
        utils.log_with_error_and_assert_if_false(False, logger, "boo")
    assert "boo" in caplog.text
    utils.log_with_error_and_assert_if_false(True, logger, "quiet")
    assert "quiet" not in caplog.text


def test_deprecation_points_at_the_caller() -> None:
    @utils.deprecated("Use g", deletion_planned="2.0")
    def f(x: int) -> int:
        """Doc."""
        return x + 1

    @utils.deprecated()
    class Old:
        def __init__(self, x: int) -> None:
            self.x = x

    with pytest.warns(
        DeprecationWarning, match=r"f is deprecated and will be deleted in 2\.0\. Use g"
    ) as seen:
        assert f(1) == 2
    assert seen[0].filename == __file__ and f.__doc__ == "Doc." and f.__name__ == "f"
    with pytest.warns(DeprecationWarning, match="Old is deprecated"):
        assert Old(3).x == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(Old, type)


def test_handle_cleans_up_once() -> None:
    calls: list[int] = []
    handle = utils.Handle(lambda: calls.append(1))
    handle.remove()
    handle.remove()
    with utils.Handle(lambda: calls.append(2)):
        pass
    with pytest.raises(KeyError), utils.Handle(lambda: calls.append(3)):
        raise KeyError
    assert calls == [1, 2, 3]


@pytest.mark.parametrize(
    ("multiplicity", "num", "down"), [(8, 17, 16), (8, 16, 16), (8, 5, 5), (4, 0, 0)]
)
def test_round_down(multiplicity: int, num: int, down: int) -> None:
    assert utils.round_down_to_multiplicity(multiplicity, num) == down


@pytest.mark.parametrize(("num", "most", "up"), [(17, 64, 24), (16, 64, 16), (61, 62, 62)])
def test_round_up(num: int, most: int, up: int) -> None:
    assert utils.round_up_to_multiplicity(8, num, most) == up


def test_small_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: Any = {"a": "True", "b": {"c": "False", "d": "x"}, "e": [{"f": "True"}], "g": 3}
    utils.convert_configs_values_to_bool(config)
    assert config == {"a": True, "b": {"c": False, "d": "x"}, "e": [{"f": True}], "g": 3}
    assert utils.compute_psnr(np.ones(4), np.ones(4)) == 100.0
    assert utils.compute_psnr(np.ones(4), np.full(4, 0.5)) == pytest.approx(6.0206, abs=1e-4)
    with pytest.raises(ValueError, match="shape"):
        utils.compute_psnr(np.ones(4), np.ones(5))
    log = tmp_path / "log.txt"
    with utils.profile("first", log):
        pass
    with utils.profile("second", log, new_file=True):
        pass
    assert log.read_text().startswith("second: 0.0") and "first" in capsys.readouterr().out
    with pytest.warns(DeprecationWarning):
        utils.save_json_yaml(tmp_path / "x.json", {"a": 1})
    assert '"a": 1' in (tmp_path / "x.json").read_text()
    assert utils.docstring("hello")(lambda: 0).__doc__ == "hello"


# -- quantsim --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "delta", "offset", "ends"),
    [
        # Recorded from aimet-torch 2.42.0.
        ((-1.0, 2.0, 8, False, False), 0.011764705882352941, -85, (-1.0, 2.0)),
        ((-1.0, 2.0, 8, True, False), 0.015748031496062992, -128, (-2.0157480239868164, 2.0)),
        ((-1.0, 2.0, 8, True, True), 0.015748031496062992, -127, (-2.0, 2.0)),
        ((0, 0, 8, False, False), 3.921568627450981e-08, 0, (0.0, 9.999999747378752e-06)),
        ((1.0, 2.0, 8, False, False), 0.00784313725490196, 0, (0.0, 2.0)),
        ((-3.0, -1, 4, False, False), 0.2, -15, (-3.0, 0.0)),
        ((1.0, 2.0, 4, True, False), 0.13333333333333333, 0, (0.0, 2.0)),
        ((-2.0, 1.0, 8, True, True), 0.007874015748031496, -127, (-1.0, 1.0)),
        ((0.0, 2.0, 8, True, True), 0.007874015748031496, 0, (0.0, 2.0)),
        ((-1.3, 0.7, 2, True, False), 0.7, -2, (-1.399999976158142, 0.699999988079071)),
        (
            (-1.3, 0.7, 8, False, False),
            0.00784313725490196,
            -166,
            (-1.301960825920105, 0.6980392336845398),
        ),
    ],
)
def test_delta_and_offset(args: Any, delta: float, offset: int, ends: tuple[float, float]) -> None:
    found = quantsim.calculate_delta_offset(*args)
    assert found == (pytest.approx(delta), offset)
    assert quantsim.compute_min_max_given_delta_offset(*found, *args[2:]) == pytest.approx(ends)
    encoding = quantsim.create_encoding_from_min_max(*args)
    assert (encoding.offset, encoding.bw) == (offset, args[2])
    precise = quantsim.create_encoding_from_min_max_for_precision(
        *args[:2], Int(args[2]), *args[3:]
    )
    assert precise == encoding


def test_delta_and_offset_of_arrays() -> None:
    delta, offset = quantsim.calculate_delta_offset(
        np.array([0.0, -2.0]), np.array([1.0, 2.0]), 8, True, False
    )
    assert (delta.dtype, offset.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(delta, [1 / 127, 2 / 127], rtol=1e-6)
    assert offset.tolist() == [-128, -128]


def test_requantizing_an_encoding() -> None:
    encoding = quantsim.create_encoding_from_min_max(-1.0, 2.0, 8, False, False)
    smaller = quantsim.recompute_grid_params(encoding, 4, False)
    assert smaller.bw == 4 and smaller.delta == pytest.approx(0.2)
    symmetric = quantsim.recompute_grid_params(encoding, 8, True, True)
    assert (symmetric.min, symmetric.max) == pytest.approx((-2.0, 2.0))
    with pytest.raises(TypeError, match="integer"):
        quantsim.create_encoding_from_min_max_for_precision(-1.0, 1.0, defs.float16, False)


def test_kinds_of_symmetry() -> None:
    assert quantsim.is_non_strict_symmetric(True, False, False)
    assert not quantsim.is_non_strict_symmetric(True, True, False)
    assert not quantsim.is_non_strict_symmetric(True, False, True)
    assert not quantsim.is_non_strict_symmetric(False, False, False)


INT, FLOAT = QuantizationDataType.int, QuantizationDataType.float


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("x", "nearest", 8, 8), "quant_scheme"),
        (("min_max", "nearest", 8, 8), "quant_scheme"),
        ((3, "nearest", 8, 8), "quant_scheme"),
        ((QuantScheme.min_max, "up", 8, 8), "rounding_mode"),
        ((QuantScheme.min_max, "nearest", 3, 8), "default_output_bw"),
        ((QuantScheme.min_max, "nearest", 33, 8), "default_output_bw"),
        ((QuantScheme.min_max, "nearest", 8, 1), "default_param_bw"),
        ((QuantScheme.min_max, "nearest", 8, 33), "default_param_bw"),
        ((QuantScheme.min_max, "nearest", 8, 16, FLOAT), "default_output_bw"),
        ((QuantScheme.min_max, "nearest", 16, 8, FLOAT), "default_param_bw"),
    ],
)
def test_refused_settings(args: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantsim.validate_quantsim_inputs(*args)


@pytest.mark.parametrize(
    "args",
    [
        ("tf", "nearest", 4, 2),
        (QuantScheme.min_max, "stochastic", 32, 32),
        ("tf", "nearest", 16, 16, FLOAT),
    ],
)
def test_accepted_settings(args: Any) -> None:
    quantsim.validate_quantsim_inputs(*args)


@pytest.mark.parametrize(("version", "ok"), [("2.1.0", True), ("3.0.0", False)])
def test_encoding_version_comes_from_the_environment(version: str, ok: bool) -> None:
    code = "from rimet.common import quantsim; print(quantsim.encoding_version)"
    import os

    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AIMET_ENCODING_VERSION": version},
        capture_output=True,
        text=True,
    )
    assert (run.returncode == 0) is ok
    assert version in (run.stdout if ok else run.stderr)
