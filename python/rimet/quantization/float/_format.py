"""Floating-point formats: their largest value and finest step. No tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from rimet import _core

__all__ = ["TORCH_FORMATS", "FloatFormat"]


# The engine says what a format is; encodings are made at every call of a quantizer.
_limits = functools.cache(_core.float_format)


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

    #: Largest value.
    max: float = field(init=False, compare=False, repr=False)
    #: Exponent of the smallest normal value.
    min_exponent: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        largest, min_exponent = _limits(*self.fields)
        object.__setattr__(self, "max", largest)
        object.__setattr__(self, "min_exponent", min_exponent)

    @property
    def fields(self) -> tuple[int, int, bool, bool]:
        """What tells formats apart, in the order in which the engine's ops take it."""
        return self.exponent_bits, self.mantissa_bits, self.finite, self.unsigned_zero

    @property
    def bitwidth(self) -> int:
        """Number of bits, the sign's included."""
        return self.exponent_bits + self.mantissa_bits + 1

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """torch's dtype of this format, if it has one."""
        return next((dtype for dtype, known in TORCH_FORMATS.items() if known == self), None)

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


TORCH_FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float16: FloatFormat(5, 10),
    torch.bfloat16: FloatFormat(8, 7),
    torch.float8_e4m3fn: FloatFormat(4, 3, finite=True),
    torch.float8_e4m3fnuz: FloatFormat(4, 3, finite=True, unsigned_zero=True),
    torch.float8_e5m2: FloatFormat(5, 2),
    torch.float8_e5m2fnuz: FloatFormat(5, 2, finite=True, unsigned_zero=True),
}
