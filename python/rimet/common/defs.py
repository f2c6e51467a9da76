"""Enumerations and small records of the public interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from numbers import Integral
from typing import Any, Optional

from rimet.common.libpymo import QuantizationMode, RoundingMode

__all__ = [
    "MAP_QUANT_SCHEME_TO_PYMO",
    "MAP_ROUND_MODE_TO_PYMO",
    "QTYPE_ALIASES",
    "RANGE_LEARNING_SCHEMES",
    "ActivationType",
    "AdaroundConstants",
    "CallbackFunc",
    "CompressionScheme",
    "CompressionStats",
    "CostMetric",
    "EncodingType",
    "EvalFunction",
    "Float",
    "GreedyCompressionRatioSelectionStats",
    "GreedySelectionParameters",
    "Int",
    "LayerCompRatioEvalScore",
    "LayerCompRatioPair",
    "QuantDtypeBwInfo",
    "QuantScheme",
    "QuantizationDataType",
    "RankSelectScheme",
    "SupportedKernelsAction",
    "TarCompressionRatioSelectionStats",
    "float8e4m3fn",
    "float8e5m2",
    "float16",
    "float32",
    "int2",
    "int4",
    "int8",
    "int16",
    "qtype",
]


class QuantScheme(Enum):
    """How the range of a grid is found from data."""

    min_max = 1
    post_training_tf = 1
    post_training_tf_enhanced = 2
    training_range_learning_with_tf_init = 3
    training_range_learning_with_tf_enhanced_init = 4
    training_range_learning = 5
    post_training_percentile = 6

    @classmethod
    def from_str(cls, alias: str) -> QuantScheme:
        """The scheme of one of the names ``min_max``, ``tf``, ``tf_enhanced``, ``percentile``.

        :raises ValueError: another name
        """
        scheme = _SCHEME_NAMES.get(alias) if isinstance(alias, str) else None
        if scheme is None:
            raise ValueError(f"quant scheme: expected one of {list(_SCHEME_NAMES)}, got {alias!r}")
        return scheme


_SCHEME_NAMES = {
    "min_max": QuantScheme.min_max,
    "tf": QuantScheme.post_training_tf,
    "tf_enhanced": QuantScheme.post_training_tf_enhanced,
    "percentile": QuantScheme.post_training_percentile,
}

RANGE_LEARNING_SCHEMES = {
    QuantScheme.training_range_learning_with_tf_init,
    QuantScheme.training_range_learning_with_tf_enhanced_init,
}

MAP_QUANT_SCHEME_TO_PYMO = {
    QuantScheme.post_training_tf: QuantizationMode.QUANTIZATION_TF,
    QuantScheme.post_training_tf_enhanced: QuantizationMode.QUANTIZATION_TF_ENHANCED,
    QuantScheme.training_range_learning_with_tf_init: QuantizationMode.QUANTIZATION_TF,
    QuantScheme.training_range_learning_with_tf_enhanced_init: (
        QuantizationMode.QUANTIZATION_TF_ENHANCED
    ),
    QuantScheme.post_training_percentile: QuantizationMode.QUANTIZATION_PERCENTILE,
}

MAP_ROUND_MODE_TO_PYMO = {
    "nearest": RoundingMode.ROUND_NEAREST,
    "stochastic": RoundingMode.ROUND_STOCHASTIC,
}


class QuantizationDataType(Enum):
    """Kind of number on a grid."""

    undefined = 0
    int = 1
    float = 2


class SupportedKernelsAction(Enum):
    """What to do about a configuration that the target has no kernel for."""

    allow_error = 1
    warn_on_error = 2
    assert_on_error = 3


class EncodingType(Enum):
    """Granularity of an encoding in files of version 1.0.0."""

    PER_TENSOR = 0
    PER_CHANNEL = 1
    PER_BLOCK = 2
    LPBQ = 3
    VECTOR = 4


class ActivationType(Enum):
    """Activation function behind a layer."""

    no_activation = 0
    relu = 1
    relu6 = 2


class CostMetric(Enum):
    """What compression is to save."""

    mac = 1
    memory = 2


class CompressionScheme(Enum):
    """How a model is compressed."""

    weight_svd = 1
    spatial_svd = 2
    channel_pruning = 3


class RankSelectScheme(Enum):
    """How compression ratios are chosen."""

    greedy = 1


class AdaroundConstants:
    """Ends of AdaRound's stretched sigmoid (Nagel et al. 2020, arXiv 2004.10568)."""

    GAMMA = -0.1
    ZETA = 1.1


class CallbackFunc:
    """A function with a fixed second argument.

    :param func: called as ``func(arg, func_callback_args)``
    :param func_callback_args: the second argument
    """

    def __init__(self, func: Callable[..., Any], func_callback_args: Any = None) -> None:
        self.func = func
        self.args = func_callback_args

    def __call__(self, arg: Any) -> Any:
        """``func(arg, func_callback_args)``."""
        return self.func(arg, self.args)


@dataclass
class QuantDtypeBwInfo:
    """Number formats of a layer's activations and parameters.

    :raises ValueError: a float with other than 16 or 32 bits
    """

    act_dtype: QuantizationDataType
    act_bw: int
    param_dtype: QuantizationDataType = QuantizationDataType.undefined
    param_bw: int = 0

    def __post_init__(self) -> None:
        for what, dtype, bitwidth in (
            ("act", self.act_dtype, self.act_bw),
            ("param", self.param_dtype, self.param_bw),
        ):
            if dtype is QuantizationDataType.float and bitwidth not in (16, 32):
                raise ValueError(f"{what}_bw: expected 16 or 32 for a float, got {bitwidth}")

    def __str__(self) -> str:
        return (
            f"activation:({self.act_dtype}, {self.act_bw}) "
            f"param:({self.param_dtype}, {self.param_bw})"
        )

    __repr__ = __str__

    def get_activation(self) -> tuple[QuantizationDataType, int]:
        """``(act_dtype, act_bw)``."""
        return self.act_dtype, self.act_bw

    def get_param(self) -> tuple[QuantizationDataType, int]:
        """``(param_dtype, param_bw)``."""
        return self.param_dtype, self.param_bw

    def is_same_activation(self, dtype: QuantizationDataType, bw: int) -> bool:
        """Whether activations have this format."""
        return (dtype, bw) == self.get_activation()

    def is_same_param(self, dtype: QuantizationDataType, bw: int) -> bool:
        """Whether parameters have this format."""
        return (dtype, bw) == self.get_param()


# -- compression -----------------------------------------------------------------------------------

# Called as f(model, iterations, use_cuda); gives a score, the higher the better.
EvalFunction = Callable[[Any, Optional[int], bool], float]  # noqa: UP045 (evaluated at run time on 3.10)


class LayerCompRatioPair:
    """A layer and its compression ratio (``None``: not compressed)."""

    def __init__(self, layer: Any, comp_ratio: Decimal | None) -> None:
        self.layer = layer
        self.comp_ratio = comp_ratio

    def __str__(self) -> str:
        return f"LayerCompRatioPair: layer={self.layer.name}, comp-ratio={self.comp_ratio}"


class LayerCompRatioEvalScore:
    """Score of a model with one layer compressed by a ratio."""

    def __init__(self, layer: Any, comp_ratio: Decimal | None, eval_score: Any) -> None:
        self.layer = layer
        self.comp_ratio = comp_ratio
        self.eval_score = eval_score

    def __str__(self) -> str:
        return (
            f"LayerCompRatioEvalScore: layer={self.layer.name}, comp-ratio={self.comp_ratio}, "
            f"eval_score={self.eval_score}"
        )


class GreedySelectionParameters:
    """How greedy search chooses compression ratios.

    :param target_comp_ratio: cost of the compressed model over that of the original, between 0 and
        1
    :param num_comp_ratio_candidates: ratios ``i / N`` are tried
    :param use_monotonic_fit: smooth the scores by a monotonic fit
    :param saved_eval_scores_dict: file with scores of a former run
    """

    def __init__(
        self,
        target_comp_ratio: float,
        num_comp_ratio_candidates: int = 10,
        use_monotonic_fit: bool = False,
        saved_eval_scores_dict: str | None = None,
    ) -> None:
        self.target_comp_ratio = target_comp_ratio
        self.num_comp_ratio_candidates = num_comp_ratio_candidates
        self.use_monotonic_fit = use_monotonic_fit
        self.saved_eval_scores_dict = saved_eval_scores_dict


class GreedyCompressionRatioSelectionStats:
    """Scores that greedy search was based on: per layer, per ratio."""

    def __init__(self, eval_scores_dict: dict[str, dict[Decimal, float]]) -> None:
        self.eval_scores_dictionary = eval_scores_dict

    def __str__(self) -> str:
        lines = ["Greedy Eval Scores"]
        for layer, scores in self.eval_scores_dictionary.items():
            lines.append(f"  {layer}")
            lines += [f"    ratio = {ratio}: {score}" for ratio, score in scores.items()]
        return "\n".join(lines)


class TarCompressionRatioSelectionStats:
    """Scores that TAR rank selection was based on: per rank index."""

    def __init__(self, layers_comp_ratio_eval_score_per_rank_index: list[Any]) -> None:
        self.layers_comp_ratio_eval_score_per_rank_index = (
            layers_comp_ratio_eval_score_per_rank_index
        )

    def __str__(self) -> str:
        lines = ["TAR Eval Scores"]
        for index, entry in enumerate(self.layers_comp_ratio_eval_score_per_rank_index):
            lines.append(f"  rank index {index}: {entry}")
        return "\n".join(lines)


class CompressionStats:
    """What compression came to. Numbers are kept as text with six decimals."""

    class LayerStats:
        """Compression ratio of one layer."""

        def __init__(self, name: str, comp_ratio: Any) -> None:
            self.name = name
            self.compression_ratio = comp_ratio

    def __init__(
        self,
        base_accuracy: float,
        comp_accuracy: float,
        mem_comp_ratio: float,
        mac_comp_ratio: float,
        per_layer_stats: list[CompressionStats.LayerStats],
        comp_ratio_select_stats: Any,
    ) -> None:
        self.baseline_model_accuracy = f"{base_accuracy:f}"
        self.compressed_model_accuracy = f"{comp_accuracy:f}"
        self.memory_compression_ratio = f"{mem_comp_ratio:f}"
        self.mac_compression_ratio = f"{mac_comp_ratio:f}"
        self.per_layer_stats = per_layer_stats
        self.compression_ratio_selection_stats = comp_ratio_select_stats

    def __str__(self) -> str:
        lines = [
            "Compressed model",
            f"  accuracy: {self.compressed_model_accuracy} (before: "
            f"{self.baseline_model_accuracy})",
            f"  memory: {self.memory_compression_ratio} of the original",
            f"  multiplications: {self.mac_compression_ratio} of the original",
            "Layers",
        ]
        lines += [f"  {layer.name}: {layer.compression_ratio}" for layer in self.per_layer_stats]
        if self.compression_ratio_selection_stats is not None:
            lines.append(str(self.compression_ratio_selection_stats))
        return "\n".join(lines)


# -- number formats --------------------------------------------------------------------------------


# `qtype.int` hides the builtin within the class below and its heirs.
_Integer = int


class qtype(ABC):
    """A number format: :class:`Int` or :class:`Float`."""

    @staticmethod
    def int(bits: _Integer) -> Int:
        """An integer of that many bits.

        :raises ValueError: not positive
        """
        return Int(bits)

    @staticmethod
    def float(
        exponent_bits: _Integer,
        mantissa_bits: _Integer,
        finite: bool = False,
        unsigned_zero: bool = False,
    ) -> Float:
        """A float with these fields.

        :raises ValueError: a negative number of bits
        """
        return Float(exponent_bits, mantissa_bits, finite, unsigned_zero)

    @staticmethod
    def from_string(name: str) -> qtype:
        """The format of a name in :data:`QTYPE_ALIASES`.

        :raises ValueError: no such name
        """
        if name not in QTYPE_ALIASES:
            raise ValueError(f"qtype: expected one of {list(QTYPE_ALIASES)}, got {name!r}")
        return QTYPE_ALIASES[name]

    @staticmethod
    def as_qtype(dtype: qtype | str) -> qtype:
        """A format as it is, or by its name.

        :raises TypeError: neither
        :raises ValueError: no such name
        """
        if isinstance(dtype, qtype):
            return dtype
        if isinstance(dtype, str):
            return qtype.from_string(dtype)
        raise TypeError(f"qtype: expected a qtype or its name, got {dtype!r}")

    @staticmethod
    def from_legacy_repr(dtype: QuantizationDataType, bitwidth: _Integer) -> qtype:
        """The format of a kind of number and its bit-width.

        :raises ValueError: there is none
        """
        if dtype is QuantizationDataType.int:
            return Int(bitwidth)
        if dtype is QuantizationDataType.float:
            for known in (float16, float32, float8e4m3fn):
                if known.to_legacy_repr()[1] == bitwidth:
                    return known
        raise ValueError(
            f"qtype: expected an int, or a float of 8, 16 or 32 bits, got {dtype}, {bitwidth}"
        )

    @abstractmethod
    def to_legacy_repr(self) -> tuple[QuantizationDataType, _Integer]:
        """``(kind of number, bit-width)``."""

    @abstractmethod
    def __repr__(self) -> str: ...


@dataclass(frozen=True, repr=False)
class Int(qtype):
    """An integer of ``bits`` bits.

    :raises ValueError: not positive
    """

    bits: _Integer

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, Integral):
            raise TypeError(f"bits: expected an int, got {self.bits!r}")
        if self.bits <= 0:
            raise ValueError(f"bits: expected a positive number, got {self.bits}")

    def to_legacy_repr(self) -> tuple[QuantizationDataType, _Integer]:
        """``(QuantizationDataType.int, bits)``."""
        return QuantizationDataType.int, self.bits

    def __repr__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True, repr=False)
class Float(qtype):
    """A float with one sign bit and these fields.

    :param finite: without infinities
    :param unsigned_zero: without a negative zero
    :raises ValueError: a negative number of bits
    """

    exponent_bits: _Integer
    mantissa_bits: _Integer
    finite: bool
    unsigned_zero: bool

    def __post_init__(self) -> None:
        for name, bits in (
            ("exponent_bits", self.exponent_bits),
            ("mantissa_bits", self.mantissa_bits),
        ):
            if bits < 0:
                raise ValueError(f"{name}: expected at least 0, got {bits}")

    def to_legacy_repr(self) -> tuple[QuantizationDataType, _Integer]:
        """``(QuantizationDataType.float, 1 + exponent_bits + mantissa_bits)``."""
        return QuantizationDataType.float, self.exponent_bits + self.mantissa_bits + 1

    def __repr__(self) -> str:
        for alias, known in QTYPE_ALIASES.items():
            if known == self:
                return alias
        suffix = ("fn" if self.finite else "") + ("uz" if self.unsigned_zero else "")
        bits = self.exponent_bits + self.mantissa_bits + 1
        return f"float{bits}e{self.exponent_bits}m{self.mantissa_bits}{suffix}"


int2, int4, int8, int16 = Int(2), Int(4), Int(8), Int(16)
float16 = Float(5, 10, False, False)
float32 = Float(8, 23, False, False)
float8e4m3fn = Float(4, 3, True, False)
float8e5m2 = Float(5, 2, False, False)

QTYPE_ALIASES: dict[str, qtype] = {
    "int2": int2,
    "int4": int4,
    "int8": int8,
    "int16": int16,
    "float16": float16,
    "float32": float32,
    "float8e4m3fn": float8e4m3fn,
    "float8e5m2": float8e5m2,
}
