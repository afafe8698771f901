"""From the recorded steps of a block to its summary."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mmpareto_optim.monitoring.history import BlockHistory
from mmpareto_optim.monitoring.summary import BlockSummary, PhaseSummary, Summary

Columns = dict[str, Tensor]
"""A tensor of shape ``(steps, ...)`` for each quantity."""


def summarize(histories: Iterable[BlockHistory]) -> Summary:
    """The summary of some histories, those of one block and the same losses together."""
    by_block: dict[tuple[str, tuple[str, ...]], list[BlockHistory]] = {}
    for history in histories:
        by_block.setdefault((history.key.block, history.key.objectives), []).append(history)
    summaries = [_summarize_block(*key, group) for key, group in by_block.items()]
    return Summary(tuple(summary for summary in summaries if summary is not None))


def _summarize_block(
    block: str, objectives: tuple[str, ...], histories: list[BlockHistory]
) -> BlockSummary | None:
    columns = [_columns(history) for history in histories]
    steps = {name: torch.cat([each[name] for each in columns]) for name in columns[0]}
    steps = _select(steps, steps["number"].argsort())
    # Losses meet where two gradients are not zero. A loss times zero is a loss left out, of which
    # there is no record.
    steps = _select(steps, steps["several"])
    count = len(steps["step"])
    if count == 0:
        return None
    third = max(1, count // 3)
    finite = _select(steps, steps["finite"])
    harmed = finite["harmed"].double().mean(0).tolist()
    opposed = finite["opposed"].double().mean(0)
    first, second = divmod(int(opposed.argmax()), len(objectives))
    share = float(opposed[first, second])
    return BlockSummary(
        block,
        objectives,
        _summarize_phase(steps),
        _summarize_phase(_select(steps, slice(third))),
        _summarize_phase(_select(steps, slice(-third, None))),
        harmed=dict(zip(objectives, harmed, strict=True)),
        worst_pair=(objectives[first], objectives[second]) if share > 0 else None,
        worst_pair_conflict=share,
        turned=_mean(finite["turned"]),
    )


def _columns(history: BlockHistory) -> Columns:
    stats = history.stats()
    norms, coefficients = stats.norms, stats.coefficients
    shortest = norms.masked_fill(norms == 0, math.inf).amin(-1)
    numbers = torch.tensor([step[:2] for step in history.steps], dtype=torch.int64, device="cpu")
    return {
        "number": numbers[:, 0],
        "step": numbers[:, 1],
        "several": (norms != 0).sum(-1) > 1,
        "finite": stats.gram.isfinite().flatten(-2).all(-1),
        "conflict": stats.conflict,
        "harmful": stats.harmful,
        "harmed": stats.harmed,
        "opposed": stats.gram.triu(1) < 0,
        "norm_ratio": norms.amax(-1) / shortest,
        "cosine": stats.cosines.nan_to_num(nan=math.inf).flatten(-2).amin(-1),
        "turned": (coefficients != coefficients[:, :1]).any(-1),
        "zero": (coefficients == 0).all(-1),
        "largest_coefficient": history.largest_coefficients(),
    }


def _summarize_phase(steps: Columns) -> PhaseSummary:
    # A step whose gradients are not finite shows neither conflict nor the lack of one.
    finite = _select(steps, steps["finite"])
    count = len(finite["step"])
    return PhaseSummary(
        steps=len(steps["step"]),
        conflict=_mean(finite["conflict"]),
        harmful=_mean(finite["harmful"]),
        norm_ratio=float(finite["norm_ratio"].median()),
        cosine=float(finite["cosine"].median()),
        zero=int(finite["zero"].sum()),
        largest_coefficient=float(finite["largest_coefficient"].max()) if count else math.nan,
        not_finite=len(steps["step"]) - count,
        first_step=int(steps["step"][0]),
        last_step=int(steps["step"][-1]),
    )


def _select(steps: Columns, which: Tensor | slice) -> Columns:
    return {name: values[which] for name, values in steps.items()}


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())
