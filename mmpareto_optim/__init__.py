"""MMPareto as a drop-in wrapper around any ``torch.optim`` optimizer."""

from mmpareto_optim.heads import UnimodalHeads
from mmpareto_optim.integrator import GradientIntegrator
from mmpareto_optim.monitoring.flatness import LossSlices, loss_slices
from mmpareto_optim.monitoring.gradient_noise import GradientNoise, gradient_noise
from mmpareto_optim.monitoring.plots import plot_conflict, plot_slices
from mmpareto_optim.monitoring.recorder import ConflictRecorder
from mmpareto_optim.monitoring.summary import BlockSummary, PhaseSummary, Summary
from mmpareto_optim.optimizer import MMParetoOptimizer
from mmpareto_optim.rules.mmpareto import (
    min_norm_weights,
    mmpareto_coefficients,
    pareto_coefficients,
)
from mmpareto_optim.rules.others import (
    config_coefficients,
    dualproj_coefficients,
    uniform_coefficients,
    upgrad_coefficients,
)
from mmpareto_optim.stats import BlockStats

__version__ = "0.1.0"

__all__ = [
    "BlockStats",
    "BlockSummary",
    "ConflictRecorder",
    "GradientIntegrator",
    "GradientNoise",
    "LossSlices",
    "MMParetoOptimizer",
    "PhaseSummary",
    "Summary",
    "UnimodalHeads",
    "config_coefficients",
    "dualproj_coefficients",
    "gradient_noise",
    "loss_slices",
    "min_norm_weights",
    "mmpareto_coefficients",
    "pareto_coefficients",
    "plot_conflict",
    "plot_slices",
    "uniform_coefficients",
    "upgrad_coefficients",
]
