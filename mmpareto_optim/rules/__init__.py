"""From a Gram matrix of gradients to the coefficients of their sum: a family of rules a file."""

from collections.abc import Callable

from torch import Tensor

from mmpareto_optim.rules.cone import dualproj_coefficients, upgrad_coefficients
from mmpareto_optim.rules.config import config_coefficients
from mmpareto_optim.rules.gram import applied_gamma, check_gamma, check_gram, solver_dtype
from mmpareto_optim.rules.mmpareto import mmpareto_coefficients, unstretched_coefficients
from mmpareto_optim.rules.named import NAMES, default_gamma, named_coefficients
from mmpareto_optim.rules.pareto import pareto_coefficients
from mmpareto_optim.rules.solver import min_norm_weights
from mmpareto_optim.rules.uniform import uniform_coefficients

Rule = Callable[[Tensor], Tensor]
"""A Gram matrix ``(m, m)`` in, coefficients ``(m,)`` out."""

__all__ = [
    "NAMES",
    "Rule",
    "applied_gamma",
    "check_gamma",
    "check_gram",
    "config_coefficients",
    "default_gamma",
    "dualproj_coefficients",
    "min_norm_weights",
    "mmpareto_coefficients",
    "named_coefficients",
    "pareto_coefficients",
    "solver_dtype",
    "uniform_coefficients",
    "unstretched_coefficients",
    "upgrad_coefficients",
]


from typing import NamedTuple as _NT  # noqa: E402

from mmpareto_optim.rules.host import mmpareto_on_the_host, uniform_on_the_host  # noqa: E402


class Rounding(_NT):
    combined: float
    written: float = 0.0
    products: float = 0.0


def coefficients_of_blocks(name, grams, gamma, roundings, *, stretched=True):
    found = []
    for gram, r in zip(grams, roundings):
        host = name in ("mmpareto", "uniform") and stretched and gram.device.type == "cpu"
        if host and name == "uniform":
            found.append(uniform_on_the_host(gram, gamma))
        elif host:
            found.append(mmpareto_on_the_host(gram, gamma, r.combined, r.written + r.products))
        else:
            found.append(
                named_coefficients(
                    name,
                    gram[None],
                    gamma,
                    eps=r.combined,
                    written=r.written + r.products,
                    stretched=stretched,
                )[0]
            )
    return found
