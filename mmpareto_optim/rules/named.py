"""The rules that have a name, as ``integration=`` takes it."""

from torch import Tensor

from mmpareto_optim.rules.cone import dualproj_coefficients, upgrad_coefficients
from mmpareto_optim.rules.config import config_coefficients
from mmpareto_optim.rules.gram import applied_gamma
from mmpareto_optim.rules.mmpareto import mmpareto_coefficients, unstretched_coefficients
from mmpareto_optim.rules.pareto import pareto_coefficients
from mmpareto_optim.rules.uniform import uniform_coefficients

NAMES = ("mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj")


def default_gamma(integration: object) -> float:
    """The factor on the result where the user names none: the authors' for their own rule."""
    return 1.5 if integration == "mmpareto" else 1.0


def named_coefficients(
    name: str,
    gram: Tensor,
    gamma: float,
    *,
    eps: float,
    written: float = 0.0,
    stretched: bool = True,
) -> Tensor:
    """``gamma`` times the coefficients of a named rule.

    Args:
        name: one of ``NAMES``.
        gram: Gram matrices, shape ``(..., m, m)``.
        gamma: factor on the result, positive and finite.
        eps: machine epsilon of the arithmetic that will combine the gradients.
        written: unit roundoff of the dtype to which the combination is rounded once more.
        stretched: False for "mmpareto" before a stretch tensor by tensor; the others have none.

    Returns:
        Coefficients ``(..., m)`` on the Gram matrix's device and in its dtype. Where at most one
        gradient is not zero they are 1, without ``gamma``.

    Raises:
        ValueError: an unknown name; otherwise as for the rules themselves.
    """
    if name not in NAMES:
        raise ValueError(f"integration must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "mmpareto" and stretched:
        return mmpareto_coefficients(gram, gamma, eps=eps, written=written)
    if name == "mmpareto":
        return unstretched_coefficients(gram, gamma)
    return applied_gamma(gram, gamma).unsqueeze(-1) * _WITHOUT_GAMMA[name](gram)


_WITHOUT_GAMMA = {
    "pareto": pareto_coefficients,
    "uniform": uniform_coefficients,
    "config": config_coefficients,
    "upgrad": upgrad_coefficients,
    "dualproj": dualproj_coefficients,
}
