"""The two terms that AdaRound minimizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["AdaroundHyperParameters", "AdaroundLoss"]


class AdaroundHyperParameters:
    """Settings of the optimization of one layer.

    Args:
        num_iterations: steps.
        reg_param: weight of the rounding regularizer.
        beta_range: first and last exponent of the regularizer.
        warm_start: share of the steps without regularizer.
    """

    def __init__(
        self,
        num_iterations: int,
        reg_param: float,
        beta_range: tuple[float, float],
        warm_start: float,
    ) -> None:
        self.num_iterations = num_iterations
        self.reg_param = reg_param
        self.beta_range = beta_range
        self.warm_start = warm_start


class AdaroundLoss:
    """The loss as functions of tensors, for looking into; the engine has it built in."""

    @staticmethod
    def compute_recon_loss(ada_quantized_output: Tensor, orig_output: Tensor) -> Tensor:
        """Squared error, summed over dimension 1 and averaged over the others."""
        return (ada_quantized_output - orig_output).square().sum(1).mean()

    @classmethod
    def compute_round_loss(
        cls, alpha: Tensor, opt_params: AdaroundHyperParameters, cur_iter: int
    ) -> Tensor:
        """The rounding regularizer, weighted (Nagel et al. 2020, equation 24).

        Args:
            alpha: rounding variables.
            opt_params: settings.
            cur_iter: number of the iteration, from 0; the exponent falls with it.
        """
        warm = opt_params.warm_start * opt_params.num_iterations
        if cur_iter < warm:
            return torch.zeros((), device=alpha.device)
        progress = (cur_iter - warm) / (opt_params.num_iterations - warm)
        start, end = opt_params.beta_range
        beta = end + 0.5 * (start - end) * (1 + math.cos(progress * math.pi))
        undecided: Tensor = torch.ops.rimet.adaround_regularizer(alpha, beta)
        return opt_params.reg_param * undecided
