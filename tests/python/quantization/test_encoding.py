"""Encodings as values: construction, properties, use, files."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from rimet.quantization.affine import AffineEncoding, GroupedBlockEncoding, VectorEncoding
from rimet.quantization.base import EncodingBase
from rimet.quantization.float import FloatEncoding

SCALE, OFFSET = torch.tensor(0.1), torch.tensor(-3.0)


@pytest.mark.parametrize(
    ("args", "qmin", "qmax", "dtype", "bits"),
    [
        ((8,), 0, 255, torch.uint8, 8),
        ((8, True), -128, 127, torch.int8, 8),
        ((0, 15), 0, 15, torch.uint8, 4),
        ((-8, 7), -8, 7, torch.int8, 4),
        ((16,), 0, 65535, torch.int32, 16),
        ((16, True), -(2**15), 2**15 - 1, torch.int16, 16),
        ((32, True), -(2**31), 2**31 - 1, torch.int32, 32),
        ((32,), 0, 2**32 - 1, torch.int64, 32),
    ],
)
def test_forms(args: Any, qmin: int, qmax: int, dtype: torch.dtype, bits: int) -> None:
    encoding = AffineEncoding(SCALE, OFFSET, *args)
    assert (encoding.qmin, encoding.qmax, encoding.dtype) == (qmin, qmax, dtype)
    assert (encoding.bitwidth, encoding.signed, encoding.num_steps) == (bits, qmin < 0, qmax - qmin)
    assert (encoding.mapping, encoding.granularity, encoding.symmetry) == (
        "affine",
        "pertensor",
        False,
    )
    torch.testing.assert_close(encoding.min, (OFFSET + qmin) * SCALE)
    torch.testing.assert_close(encoding.max, (OFFSET + qmax) * SCALE)


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((), {}, TypeError),
        ((8,), {"foo": 1}, TypeError),
        (("8",), {}, TypeError),
        ((0,), {}, ValueError),
        ((7, -8), {}, ValueError),
    ],
)
def test_bad_arguments(args: Any, kwargs: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        AffineEncoding(SCALE, OFFSET, *args, **kwargs)


@pytest.mark.parametrize(
    ("shape", "block_size", "granularity"),
    [
        ((), None, "pertensor"),
        ((1,), None, "perchannel"),
        ((3, 1), None, "perchannel"),
        ((1, 3, 1), None, "perchannel"),
        ((3, 2), None, "unknown"),
        ((3, 2), (1, 4), "blockwise"),
    ],
)
def test_granularity(shape: Any, block_size: Any, granularity: str) -> None:
    scale = torch.ones(shape)
    made = AffineEncoding(scale, torch.zeros(shape), 8, block_size=block_size)
    assert made.granularity == granularity
    assert FloatEncoding(3, 4, True, False, scale, block_size).granularity == granularity


def test_strict_grid_has_no_bitwidth() -> None:
    encoding = AffineEncoding(SCALE, OFFSET, -127, 127, True)
    assert encoding.dtype == torch.int8
    for attribute in ("bitwidth", "signed"):
        with pytest.raises(RuntimeError, match=attribute):
            getattr(encoding, attribute)
    assert encoding.to_qnn_encoding_dict("2.0.0")["output_dtype"] == "int8"  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="bitwidth"):
        encoding.to_qnn_encoding_dict("1.0.0")


def every_kind() -> list[EncodingBase]:
    scale = torch.rand(3, 2) + 0.1
    return [
        AffineEncoding(scale, torch.zeros(3, 2), 4, True, True, (1, 4)),
        AffineEncoding(SCALE, OFFSET, 8, zero_point_shift=0.5),
        GroupedBlockEncoding(
            scale, torch.zeros(3, 2), 4, True, True, (1, 4), (1, 2), 8, scale.amax(1, True) / 16
        ),
        VectorEncoding(
            torch.rand(3, 1), torch.zeros(3, 1), 8, True, True,
            rows_per_block=32, cols_per_block=256, vector_dim=2, vector_stride=1, index_bw=6,
        ),
        FloatEncoding(1, 2, True, False, scale, (1, 4)),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", every_kind(), ids=repr)
def test_values(encoding: Any) -> None:
    wide = encoding.to(torch.float64)
    assert type(wide) is type(encoding) and wide is not encoding
    assert wide.scale.dtype == torch.float64 and encoding.scale.dtype == torch.float32
    if isinstance(encoding, GroupedBlockEncoding):
        assert wide.per_channel_scale.dtype == torch.float64
    assert encoding.to("cpu").scale.dtype == torch.float32
    assert encoding.to(device="cpu", dtype=torch.float16).scale.dtype == torch.float16
    for bad in (torch.int8, torch.bool):
        with pytest.raises(RuntimeError, match="floating"):
            encoding.to(bad)
    x = torch.randn(3, 8)
    expected = encoding.quantize_dequantize(x)
    for duplicate in (
        copy.deepcopy(encoding),
        pickle.loads(pickle.dumps(encoding)),
        encoding._clone(),
    ):
        assert torch.equal(duplicate.quantize_dequantize(x), expected)
        assert repr(duplicate) == repr(encoding)
    if getattr(encoding, "zero_point_shift", 0):
        with pytest.raises(RuntimeError, match="zero_point_shift"):
            encoding.quantize(x)
    else:
        torch.testing.assert_close(encoding.dequantize(encoding.quantize(x)), expected)
    # Idempotent: what is on the grid stays.
    torch.testing.assert_close(encoding.quantize_dequantize(expected), expected)


@pytest.mark.parametrize("encoding", every_kind(), ids=repr)
@pytest.mark.parametrize("version", ["0.6.0", "9", None, 2.0])
def test_unknown_version(encoding: Any, version: Any) -> None:
    with pytest.raises(ValueError, match=r"0\.6\.1, 1\.0\.0, 2\.0\.0, 2\.1\.0"):
        encoding.to_qnn_encoding_dict(version)


def test_axes_follow_from_the_block_size() -> None:
    """Without the input's shape, except where a block is the rest of an axis."""
    scale = torch.rand(3, 2) + 0.1
    entry: Any = AffineEncoding(scale, scale * 0, 4, True, True, (1, 4)).to_qnn_encoding_dict(
        "2.0.0"
    )
    assert (entry["axis"], entry["block_size"]) == (-1, 4)
    entry = AffineEncoding(torch.ones(3, 1), torch.zeros(3, 1), 8).to_qnn_encoding_dict("2.0.0")
    assert entry["axis"] == -2 and "y_zero_point" not in entry and "block_size" not in entry
    rest = AffineEncoding(scale, scale * 0, 4, True, True, (1, -1))
    with pytest.raises(RuntimeError, match="_hint_input_shape"):
        rest.to_qnn_encoding_dict("1.0.0")
    entry = rest._hint_input_shape((3, 8)).to_qnn_encoding_dict("1.0.0")
    assert (entry["enc_type"], entry["block_size"]) == ("PER_BLOCK", 4)
    whole = AffineEncoding(torch.ones(3, 1), torch.zeros(3, 1), 8, block_size=(1, 8))
    entry = whole._hint_input_shape((3, 8)).to_qnn_encoding_dict("1.0.0")
    assert entry["enc_type"] == "PER_CHANNEL"


@pytest.mark.parametrize(
    ("shape", "block_size", "words"),
    [
        ((3, 2), None, "channel axis"),
        ((3, 2), (2, 4), "block axis"),
        ((1, 2), (3, 4), "without a channel"),
    ],
)
def test_axes_that_files_cannot_express(shape: Any, block_size: Any, words: str) -> None:
    encoding = AffineEncoding(torch.ones(shape), torch.zeros(shape), 8, block_size=block_size)
    with pytest.raises(RuntimeError, match=words):
        encoding.to_qnn_encoding_dict("2.0.0")


def test_zero_point_is_minus_offset() -> None:
    entry: Any = AffineEncoding(SCALE, torch.tensor(5.0), -128, 127).to_qnn_encoding_dict("2.0.0")
    assert entry == {"output_dtype": "int8", "y_scale": SCALE.item(), "y_zero_point": -5}
    entry = AffineEncoding(SCALE, torch.tensor(5.0), -128, 127).to_qnn_encoding_dict("1.0.0")
    assert entry["offset"] == [-123], "files before 2.0.0 count from an unsigned grid"


def test_float_formats_of_files() -> None:
    half = FloatEncoding(10, 5, False, False, torch.tensor(1.0))
    assert half.to_qnn_encoding_dict("0.6.1") == [{"bitwidth": 16, "dtype": "float"}]
    assert half.to_qnn_encoding_dict("2.0.0") == {}
    with pytest.raises(RuntimeError, match="scale"):
        FloatEncoding(10, 5, False, False, torch.tensor(0.5)).to_qnn_encoding_dict("1.0.0")
    with pytest.raises(RuntimeError, match="float8_e4m3fn"):
        FloatEncoding(3, 4, True, False, torch.tensor(1.0)).to_qnn_encoding_dict("1.0.0")
    with pytest.raises(RuntimeError, match="float6_e3m2fn"):
        FloatEncoding(2, 3, True, False, torch.tensor(1.0)).to_qnn_encoding_dict("2.0.0")


def test_vector_properties_are_required() -> None:
    with pytest.raises(KeyError, match="rows_per_block"):
        VectorEncoding(SCALE, OFFSET, 8)


def test_grouped_encoding_without_its_second_level() -> None:
    encoding = GroupedBlockEncoding(torch.ones(3, 2), torch.zeros(3, 2), 4)
    with pytest.raises(RuntimeError, match="per_channel_scale"):
        _ = encoding.per_block_int_scale
