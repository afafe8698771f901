"""From a Gram matrix of gradients to the coefficients of their sum: a family of rules a file."""

from collections.abc import Callable

from torch import Tensor

from mmpareto_optim.rules.evaluation import applied_gamma, check_gamma, solver_dtype
from mmpareto_optim.rules.mmpareto import (
    min_norm_weights,
    mmpareto_coefficients,
    pareto_coefficients,
)
from mmpareto_optim.rules.named import NAMES, Rounding, coefficients_of_blocks, default_gamma
from mmpareto_optim.rules.others import (
    config_coefficients,
    dualproj_coefficients,
    uniform_coefficients,
    upgrad_coefficients,
)

Rule = Callable[[Tensor], Tensor]
"""A Gram matrix ``(m, m)`` in, coefficients ``(m,)`` out."""

__all__ = [
    "NAMES",
    "Rounding",
    "Rule",
    "applied_gamma",
    "check_gamma",
    "coefficients_of_blocks",
    "config_coefficients",
    "default_gamma",
    "dualproj_coefficients",
    "min_norm_weights",
    "mmpareto_coefficients",
    "pareto_coefficients",
    "solver_dtype",
    "uniform_coefficients",
    "upgrad_coefficients",
]
