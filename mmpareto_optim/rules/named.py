"""The rules that have a name, as ``integration=`` takes it, for all blocks of a step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.rules import mmpareto, others
from mmpareto_optim.rules.evaluation import Formulas, applied_gamma, evaluate, solver_dtype

NAMES = ("mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj")


class Rounding(NamedTuple):
    """What rounding does to a block, which "mmpareto" keeps clear of in conflict.

    The machine epsilon of the arithmetic in which gradients are combined; the unit roundoff of the
    dtype that this is ``written`` in, 0 if that is the same; a bound of the error of the Gram
    matrix's ``products``, over those of the gradients' norms.
    """

    combined: float
    written: float = 0.0
    products: float = 0.0


def default_gamma(integration: object) -> float:
    """The factor on the result where the user names none: the authors' for their own rule."""
    return 1.5 if integration == "mmpareto" else 1.0


def coefficients_of_blocks(
    name: str,
    grams: Sequence[Tensor],
    gamma: float,
    roundings: Sequence[Rounding],
    *,
    stretched: bool = True,
) -> list[Tensor]:
    """``gamma`` times the coefficients ``(m,)`` of a named rule, for each of some blocks.

    From Gram matrices ``(m, m)`` on any device; there, in float64 (float32 on mps). Where at most
    one gradient is not zero they are 1, without ``gamma``. ``roundings`` says what rounding does to
    each block, ``stretched=False`` is "mmpareto" before a stretch tensor by tensor. ValueError for
    an unknown name.
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
    fixed = (mmpareto.UNSTRETCHED, mmpareto.PARETO, others.UPGRAD, others.DUALPROJ)
    return dict(zip(("mmpareto", "pareto", "upgrad", "dualproj"), fixed, strict=True))[name]
