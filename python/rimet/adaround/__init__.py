"""AdaRound: weights rounded up or down so that each layer's output stays close (Nagel et al. 2020,
arXiv 2004.10568).
"""

from rimet.adaround.adaround_weight import (
    Adaround,
    AdaroundParameters,
    AdaroundSupportedModules,
)
from rimet.adaround.adaround_wrapper import AdaroundWrapper

__all__ = [
    "Adaround",
    "AdaroundParameters",
    "AdaroundSupportedModules",
    "AdaroundWrapper",
]
