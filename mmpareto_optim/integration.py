"""From several gradients for each parameter to one: blocks, coefficients, combination."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.flat import FlatBlock
from mmpareto_optim.gradients import Gradient
from mmpareto_optim.rules import (
    Rule,
    applied_gamma,
    mmpareto_coefficients,
    mmpareto_on_the_host,
    pareto_coefficients,
    uniform_coefficients,
    unstretched_coefficients,
)
from mmpareto_optim.sharded import ShardedBlock
from mmpareto_optim.stats import BlockStats

Integration = Literal["mmpareto", "pareto", "uniform"] | Rule


@dataclass(frozen=True)
class Method:
    """How gradients are integrated; see :class:`MMParetoOptimizer` for the fields."""

    integration: Integration
    gamma: float
    rescale: Literal["encoder", "tensor"]


Flat = FlatBlock | ShardedBlock


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Ranks:
    """How several processes integrate as one.

    Attributes:
        total: from this rank's Gram matrices to those of the whole.
        same: from what a function of the user's returned here to what all ranks take: it may
            be random.
    """

    total: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    same: Callable[[Tensor], Tensor] = _itself


ONE_PROCESS = Ranks()


def integrate(
    blocks: Sequence[Block],
    params: Sequence[Tensor],
    rows: Mapping[str, Gradient],
    method: Method,
    *,
    keep: bool,
    flatten: Callable[..., Flat] = FlatBlock,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[dict[int, Tensor], dict[str, BlockStats]]:
    """One gradient for each parameter that is in a block.

    Args:
        blocks: groups of parameters.
        params: all parameters, which the positions of a block count.
        rows: for each objective its gradient, one tensor or None for each of ``params``.
        method: how the blocks that are to be integrated are; the others' rows are added.
        keep: whether ``rows`` are needed afterwards; otherwise they are emptied.
        flatten: makes of a block's gradients what has the methods of :class:`FlatBlock`.
        ranks: how several processes do it as one.

    Returns:
        By position one new tensor in the parameter's shape, and by name what was seen of
        each integrated block.

    Raises:
        ValueError: an integration function of the user's returns another shape, or has a
            ``reset()`` and would serve several blocks.
    """
    gradients = _of_one_objective(blocks, params, rows, keep=keep, flatten=flatten)
    flats: dict[Block, Flat] = {}
    for block in blocks:
        if len(block.objectives) > 1:
            taken = [_take(rows[name], block.positions, keep=keep) for name in block.objectives]
            members = [params[position] for position in block.positions]
            flats[block] = flatten(members, taken, keep=keep)
    integrated = [block for block in blocks if block.integrated]
    whole = ranks.total is ONE_PROCESS.total
    totals = ranks.total([flats[block].gram(quick=whole) for block in integrated])
    grams = dict(zip(integrated, totals, strict=True))
    coefficients = _coefficients(method, flats, grams, ranks.same)
    stats: dict[str, BlockStats] = {}
    for block, flat in flats.items():
        if not block.integrated:
            gradients.update(zip(block.positions, flat.sum(), strict=True))
            continue
        factors, stretch = coefficients[block], None
        if method.integration == "mmpareto" and method.rescale == "tensor":
            gamma_here = applied_gamma(grams[block], method.gamma)
            combined, stretch = flat.combine_and_stretch(factors, gamma_here)
        else:
            combined = flat.combine(factors)
        gradients.update(zip(block.positions, combined, strict=True))
        gamma = method.gamma if method.integration == "mmpareto" else 1.0
        stats[block.name] = BlockStats(block.objectives, grams[block], factors, gamma, stretch)
    return gradients, stats


def _of_one_objective(
    blocks: Sequence[Block],
    params: Sequence[Tensor],
    rows: Mapping[str, Gradient],
    *,
    keep: bool,
    flatten: Callable[..., Flat],
) -> dict[int, Tensor]:
    """The gradients of all blocks that have one, copied together."""
    positions: list[int] = []
    gradient: Gradient = []
    for block in blocks:
        if len(block.objectives) == 1:
            positions += block.positions
            gradient += _take(rows[block.objectives[0]], block.positions, keep=keep)
    copies = flatten([params[position] for position in positions], [gradient]).sum()
    return dict(zip(positions, copies, strict=True))


def _take(row: Gradient, positions: Sequence[int], *, keep: bool) -> Gradient:
    taken = [row[position] for position in positions]
    if not keep:
        for position in positions:
            row[position] = None
    return taken


def _coefficients(
    method: Method,
    flats: Mapping[Block, Flat],
    grams: Mapping[Block, Tensor],
    same: Callable[[Tensor], Tensor],
) -> dict[Block, Tensor]:
    if callable(method.integration):
        _check_memory(method.integration, list(grams))
        return {
            block: same(_of_users_rule(method.integration, block, gram.to(flats[block].dtype)))
            for block, gram in grams.items()
        }
    coefficients: dict[Block, Tensor] = {}
    # Other blocks of the same kind are solved together: a rule is many small operations.
    alike: dict[tuple[int, torch.device, torch.dtype], list[Block]] = {}
    for block, gram in grams.items():
        dtype = flats[block].dtype
        if _is_for_the_host(method, gram):
            eps = torch.finfo(dtype).eps
            coefficients[block] = mmpareto_on_the_host(gram, method.gamma, eps)
        else:
            kind = (len(block.objectives), gram.device, dtype)
            alike.setdefault(kind, []).append(block)
    for (_, _, dtype), members in alike.items():
        batch = torch.stack([grams[block] for block in members])
        solved = _of_method(method, batch, torch.finfo(dtype).eps).unbind()
        coefficients |= dict(zip(members, solved, strict=True))
    return coefficients


def _is_for_the_host(method: Method, gram: Tensor) -> bool:
    return (
        method.integration == "mmpareto"
        and method.rescale == "encoder"
        and gram.shape[-1] == 2
        and type(gram) is Tensor
        and gram.device.type == "cpu"
    )


def _of_method(method: Method, grams: Tensor, eps: float) -> Tensor:
    if method.integration == "uniform":
        return uniform_coefficients(grams)
    if method.integration == "pareto":
        return pareto_coefficients(grams)
    if method.rescale == "tensor":
        return unstretched_coefficients(grams, method.gamma)
    return mmpareto_coefficients(grams, method.gamma, eps=eps)


def _check_memory(rule: Rule, blocks: Sequence[Block]) -> None:
    """Raise if a rule with a memory, which a ``reset()`` tells of, would serve several blocks."""
    if len(blocks) > 1 and callable(getattr(rule, "reset", None)):
        names = ", ".join(repr(block.name) for block in blocks)
        raise ValueError(
            f"integration {type(rule).__name__} keeps a state from step to step (it has a "
            f"reset()), which blocks {names} would mix up: make them one with "
            "param_groups_by_modality, or take a rule without a state"
        )


def _of_users_rule(rule: Rule, block: Block, gram: Tensor) -> Tensor:
    coefficients = rule(gram)
    expected = (len(block.objectives),)
    if not isinstance(coefficients, Tensor) or coefficients.shape != expected:
        found = getattr(coefficients, "shape", type(coefficients).__name__)
        raise ValueError(
            f"the integration function must return coefficients of shape {expected} for "
            f"block {block.name!r} of objectives {block.objectives}, got {found}"
        )
    return coefficients
