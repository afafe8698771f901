"""The rules that have a name, as ``integration=`` takes it, for all blocks of a step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.cone import DUALPROJ, UPGRAD
from mmpareto_optim.rules.config import config_formulas
from mmpareto_optim.rules.evaluation import (
    Formulas,
    applied_gamma,
    of_one,
    of_pairs,
    solver_dtype,
)
from mmpareto_optim.rules.mmpareto import UNSTRETCHED, mmpareto_formulas
from mmpareto_optim.rules.pareto import PARETO

NAMES = ("mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj")


class Rounding(NamedTuple):
    """What rounding does to a block, which "mmpareto" keeps clear of in conflict.

    Attributes:
        combined: machine epsilon of the arithmetic in which gradients are combined.
        written: unit roundoff of the dtype that the combination is rounded to once more, 0 if it
            is not.
        products: bound of the error of an entry of the Gram matrix, over the product of the two
            gradients' norms.
    """

    combined: float
    written: float = 0.0
    products: float = 0.0


def default_gamma(integration: object) -> float:
    """The factor on the result where the user names none: the authors' for their own rule."""
    return 1.5 if integration == "mmpareto" else 1.0


@torch.no_grad()
def coefficients_of_blocks(
    name: str,
    grams: Sequence[Tensor],
    gamma: float,
    roundings: Sequence[Rounding],
    *,
    stretched: bool = True,
) -> list[Tensor]:
    """``gamma`` times the coefficients of a named rule, for each of some blocks.

    Of two gradients by operations on their device; those of equal ``Rounding`` as one stack. Of
    more on the host: all matrices of a device are copied there at once, which waits for the device,
    and the coefficients come back at once.

    Args:
        name: one of ``NAMES``.
        grams: for each block its Gram matrix, shape ``(m, m)``, on any device.
        gamma: factor on the result, positive and finite.
        roundings: for each block what rounding does to it.
        stretched: False for "mmpareto" before a stretch tensor by tensor; the others have none.

    Returns:
        For each block its coefficients ``(m,)`` on the Gram matrix's device, in float64 (float32
        on mps). Where at most one gradient is not zero they are 1, without ``gamma``.

    Raises:
        ValueError: an unknown name; otherwise as for the rules themselves.
    """
    if name not in NAMES:
        raise ValueError(f"integration must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "uniform":
        return [_uniform(gram, gamma) for gram in grams]
    found: dict[int, Tensor] = {}
    pairs: dict[tuple[torch.device, Formulas], list[int]] = {}
    away: dict[torch.device, list[int]] = {}
    formulas = [_formulas(name, rounding, stretched) for rounding in roundings]
    for index, (gram, formula) in enumerate(zip(grams, formulas, strict=True)):
        if gram.device.type == "cpu" and type(gram) is Tensor:
            matrix = gram.to(torch.float64).numpy()
            found[index] = torch.from_numpy(np.asarray(of_one(matrix, formula, gamma)))
        elif len(gram) == 2:
            pairs.setdefault((gram.device, formula), []).append(index)
        elif len(gram) == 1 or gram.is_meta:
            found[index] = torch.ones_like(gram[0], dtype=solver_dtype(gram))
        else:
            away.setdefault(gram.device, []).append(index)
    for (_, formula), members in pairs.items():
        stack = torch.stack([grams[i].to(solver_dtype(grams[i])) for i in members])
        found.update(zip(members, of_pairs(stack, formula, gamma).unbind(), strict=True))
    for members in away.values():
        chosen = [formulas[i] for i in members]
        solved = _on_the_host([grams[i] for i in members], chosen, gamma)
        found.update(zip(members, solved, strict=True))
    return [found[index] for index in range(len(grams))]


def _on_the_host(
    grams: Sequence[Tensor], formulas: Sequence[Formulas], gamma: float
) -> list[Tensor]:
    """Coefficients of Gram matrices on one device, by a copy to the host and one back."""
    sizes = [len(gram) for gram in grams]
    dtype = solver_dtype(grams[0])
    entries = torch.cat([gram.to(dtype).flatten() for gram in grams]).cpu().double().numpy()
    matrices = np.split(entries, np.cumsum([size**2 for size in sizes])[:-1])
    solved = [
        of_one(matrix.reshape(size, size), formula, gamma)
        for matrix, size, formula in zip(matrices, sizes, formulas, strict=True)
    ]
    found = torch.from_numpy(np.concatenate(solved)).to(dtype)
    return list(found.to(grams[0].device, non_blocking=True).split(sizes))


def _uniform(gram: Tensor, gamma: float) -> Tensor:
    gram = gram.to(solver_dtype(gram))
    return applied_gamma(gram, gamma).expand(len(gram))


@lru_cache
def _formulas(name: str, rounding: Rounding, stretched: bool) -> Formulas:
    if name == "mmpareto" and stretched:
        return mmpareto_formulas(rounding.combined, rounding.written + rounding.products)
    fixed = {"mmpareto": UNSTRETCHED, "pareto": PARETO, "upgrad": UPGRAD, "dualproj": DUALPROJ}
    return fixed[name] if name in fixed else config_formulas(rounding.products)
