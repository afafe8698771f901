"""The rules that have a name, as ``integration=`` takes it, for all blocks of a step."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.rules import mmpareto, others
from mmpareto_optim.rules.evaluation import Formulas, applied_gamma, evaluate, solver_dtype

Rule = Callable[[Tensor], Tensor]
"""A Gram matrix ``(m, m)`` in, coefficients ``(m,)`` out."""
NAMES = ("mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj")


class Rounding(NamedTuple):
    """What rounding does to a block, which "mmpareto" keeps clear of in conflict.

    The machine epsilon of the arithmetic that combines gradients; the unit roundoff of the dtype
    that the result is rounded to once more, 0 if it is not; a bound of the error of an entry of the
    Gram matrix, over the product of the two gradients' norms.
    """

    combined: float
    written: float = 0.0
    products: float = 0.0


def coefficients_of_blocks(
    name: str,
    grams: Sequence[Tensor],
    gamma: float,
    roundings: Sequence[Rounding],
    *,
    stretched: bool = True,
) -> list[Tensor]:
    """``gamma`` times the coefficients ``(m,)`` of a named rule, for each of some blocks.

    On the devices of their Gram matrices, in float64 (float32 on mps); 1, without ``gamma``, where
    at most one gradient is not zero. ``stretched=False``: before a stretch tensor by tensor.
    """
    if name not in NAMES:
        raise ValueError(f"integration must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "uniform":
        return [_uniform(gram, gamma) for gram in grams]
    formulas = [_formulas(name, rounding, stretched) for rounding in roundings]
    return evaluate(grams, formulas, gamma)


def _uniform(gram: Tensor, gamma: float) -> Tensor:
    dtype = solver_dtype(gram)
    if not gram.is_cpu or type(gram) is not Tensor:
        return applied_gamma(gram.to(dtype), gamma).expand(len(gram))
    several = sum(not square <= 0 for square in gram.diagonal().tolist()) > 1
    return torch.full((len(gram),), gamma if several else 1.0, dtype=dtype, device="cpu")


@lru_cache
def _formulas(name: str, rounding: Rounding, stretched: bool) -> Formulas:
    if name == "mmpareto" and stretched:
        return mmpareto.formulas(rounding.combined, rounding.written + rounding.products)
    if name == "config":
        return others.config_formulas(rounding.products)
    fixed = {"pareto": mmpareto.PARETO, "upgrad": others.UPGRAD, "dualproj": others.DUALPROJ}
    return fixed.get(name, mmpareto.UNSTRETCHED)
