"""Floating-point formats: their largest value and finest step. No tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TORCH_FORMATS", "FloatFormat"]


@dataclass(frozen=True)
class FloatFormat:
    r"""A binary floating-point format with one sign bit.

    Subnormals have the step :math:`2^{min\_exponent - mantissa\_bits}`; a value :math:`\ge
    2^{min\_exponent}` the step
    :math:`2^{\lfloor \log_2 |x| \rfloor - mantissa\_bits}`; the largest is :attr:`max`.

    :param exponent_bits: at least 0
    :param mantissa_bits: at least 0
    :param finite: without infinities
    :param unsigned_zero: with one zero, and NaN in place of the other; implies ``finite``
    :raises TypeError: numbers of bits that are no ints
    :raises ValueError: negative or too large ones, or ``unsigned_zero`` without ``finite``

    Without ``finite``, and if torch has no such dtype, the format has the largest value of the IEEE
    754 format of these fields, and the codes that IEEE 754 keeps for infinity and NaN go to one
    more binade at the lower end, as in AIMET. The finite formats follow OCP: of those with 8 or
    more bits the highest code is NaN (E4M3: 448), the shorter ones have none (E2M1: 6, E3M2: 28,
    E2M3: 7.5).
    """

    exponent_bits: int
    mantissa_bits: int
    finite: bool = False
    unsigned_zero: bool = False

    def __post_init__(self) -> None:
        for name, bits, most in (
            ("exponent_bits", self.exponent_bits, 8),
            ("mantissa_bits", self.mantissa_bits, 23),
        ):
            if isinstance(bits, bool) or not isinstance(bits, int):
                raise TypeError(f"{name}: expected an int, got {bits!r}")
            if not 0 <= bits <= most:
                raise ValueError(f"{name}: expected 0 to {most}, got {bits}")
        if self.exponent_bits + self.mantissa_bits == 0:
            raise ValueError(
                "exponent_bits and mantissa_bits: expected at least one bit, got 0 and 0"
            )
        if self.unsigned_zero and not self.finite:
            raise ValueError(
                "unsigned_zero: expected only with finite=True; there is no such format"
            )

    @property
    def bitwidth(self) -> int:
        """Number of bits, the sign's included."""
        return self.exponent_bits + self.mantissa_bits + 1

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """torch's dtype of this format, if it has one."""
        return next((dtype for dtype, known in TORCH_FORMATS.items() if known == self), None)

    @property
    def _max_exponent(self) -> int:
        codes = 2**self.exponent_bits
        if self.unsigned_zero:
            return codes - 1 - 2 ** (self.exponent_bits - 1) if self.exponent_bits else 0
        bias = 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0
        if self.finite:
            return codes - 1 - bias
        return max(codes - 2, 0) - bias if self.exponent_bits else -1

    @property
    def max(self) -> float:
        """Largest value."""
        ulps = 1
        if self.finite and not self.unsigned_zero and self.bitwidth >= 8:
            ulps = 2  # the highest code is NaN
        return math.ldexp(2 - ulps * 2.0**-self.mantissa_bits, self._max_exponent)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        if self.torch_dtype in _IEEE_DTYPES:
            return 2 - 2 ** (self.exponent_bits - 1)
        return self._max_exponent - (2**self.exponent_bits - 2)

    @property
    def name(self) -> str:
        """Name by the fields, such as ``float8_e4m3fn``."""
        suffix = ("fn" if self.finite else "") + ("uz" if self.unsigned_zero else "")
        return f"float{self.bitwidth}_e{self.exponent_bits}m{self.mantissa_bits}{suffix}"

    @classmethod
    def of_dtype(cls, dtype: torch.dtype) -> FloatFormat:
        """The format of one of torch's dtypes of 8 or 16 bits.

        :raises ValueError: another dtype
        """
        if dtype not in TORCH_FORMATS:
            raise ValueError(f"dtype: expected one of {list(TORCH_FORMATS)}, got {dtype}")
        return TORCH_FORMATS[dtype]


_IEEE_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e5m2)

TORCH_FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float16: FloatFormat(5, 10),
    torch.bfloat16: FloatFormat(8, 7),
    torch.float8_e4m3fn: FloatFormat(4, 3, finite=True),
    torch.float8_e4m3fnuz: FloatFormat(4, 3, finite=True, unsigned_zero=True),
    torch.float8_e5m2: FloatFormat(5, 2),
    torch.float8_e5m2fnuz: FloatFormat(5, 2, finite=True, unsigned_zero=True),
}
