"""From what was recorded of a block, step by step, to its summary."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mmpareto_optim.insight.summary import BlockSummary, PhaseSummary, Summary
from mmpareto_optim.insight.tracks import Track
from mmpareto_optim.stats import BlockStats, in_conflict, is_harmful


def summary_of(tracks: Iterable[Track]) -> Summary:
    """The summary of what some tracks hold, those of one block and objectives together."""
    together: dict[tuple[str, tuple[str, ...]], list[Track]] = {}
    for track in tracks:
        together.setdefault((track.kind.block, track.kind.objectives), []).append(track)
    return Summary(tuple(_block(*key, members) for key, members in together.items()))


def _block(block: str, objectives: tuple[str, ...], tracks: list[Track]) -> BlockSummary:
    order = torch.tensor([when.number for track in tracks for when in track.when]).argsort()
    columns = [_columns(track) for track in tracks]
    steps = {name: torch.cat([each[name] for each in columns])[order] for name in columns[0]}
    third = max(1, len(order) // 3)
    early = {name: values[:third] for name, values in steps.items()}
    late = {name: values[-third:] for name, values in steps.items()}
    finite = steps["finite"]
    harmed = steps["harmed"][finite].double().mean(0).tolist()
    pair, share = _worst_pair(steps["opposed"][finite].double().mean(0))
    return BlockSummary(
        block,
        objectives,
        _phase(steps),
        _phase(early),
        _phase(late),
        harmed=dict(zip(objectives, harmed, strict=True)),
        worst_pair=(objectives[pair[0]], objectives[pair[1]]) if share > 0 else None,
        worst_pair_conflict=share,
        turned=float(steps["turned"][finite].double().mean()),
    )


def _worst_pair(shares: Tensor) -> tuple[tuple[int, int], float]:
    """Where the largest of ``(m, m)`` shares is, and that share; NaN where no step is left."""
    place = divmod(int(shares.argmax()), len(shares))
    return place, float(shares[place])


def _columns(track: Track) -> dict[str, Tensor]:
    """What a phase is made of, for each step; NaN where it is not known."""
    stats = track.stats()
    gram = stats.gram
    several, norm_ratio, cosine = _present(stats)
    across = torch.full_like(gram, torch.nan) if stats.gram_across is None else stats.gram_across
    unknown = ~across.isfinite().flatten(-2).all(-1)
    conflict, harmful = stats.conflict & in_conflict(across), stats.harmful & is_harmful(across)
    return {
        "step": torch.tensor([when.step for when in track.when]),
        "finite": gram.isfinite().flatten(-2).all(-1),
        "conflict": stats.conflict,
        "harmful": stats.harmful,
        "harmed": stats.harmed,
        "opposed": gram.triu(1) < 0,
        "norm_ratio": norm_ratio.masked_fill(~several, torch.nan),
        "cosine": cosine.masked_fill(~several, torch.nan),
        "turned": (stats.coefficients != stats.coefficients[..., :1]).any(-1),
        "zero": (stats.coefficients == 0).all(-1),
        "largest_coefficient": stats.coefficients.nan_to_num(nan=-math.inf).amax(-1),
        "conflict_across": conflict.double().masked_fill(unknown, torch.nan),
        "harmful_across": harmful.double().masked_fill(unknown, torch.nan),
        "across": across,
    }


def _present(stats: BlockStats) -> tuple[Tensor, Tensor, Tensor]:
    """Whether several gradients are not zero; of these the norms' ratio and the least cosine."""
    norms = stats.norms.masked_fill(stats.norms == 0, torch.nan)
    longest = norms.nan_to_num(nan=-math.inf).amax(-1)
    shortest = norms.nan_to_num(nan=math.inf, posinf=math.inf).amin(-1)
    smallest = stats.cosines.nan_to_num(nan=math.inf).flatten(-2).amin(-1)
    return norms.isfinite().sum(-1) > 1, longest / shortest, smallest


def _smallest_cosine(gram: Tensor) -> Tensor:
    """NaN where the estimate of a square is not positive."""
    lengths = gram.diagonal().sqrt()
    return (gram / lengths.unsqueeze(0) / lengths.unsqueeze(1)).amin()


def _phase(steps: dict[str, Tensor]) -> PhaseSummary:
    # A step whose gradients are not finite shows neither conflict nor the lack of one.
    finite = steps["finite"]
    counted = {name: values[finite] for name, values in steps.items()}
    coefficients = counted["largest_coefficient"]
    coefficients = coefficients[coefficients != -math.inf]
    known = bool(counted["conflict_across"].isfinite().any())
    return PhaseSummary(
        steps=len(finite),
        conflict=float(counted["conflict"].double().mean()),
        harmful=float(counted["harmful"].double().mean()),
        norm_ratio=float(counted["norm_ratio"].nanmedian()),
        cosine=float(counted["cosine"].nanmedian()),
        zero=int(counted["zero"].sum()),
        largest_coefficient=float(coefficients.max()) if len(coefficients) else math.nan,
        not_finite=int((~finite).sum()),
        first_step=int(steps["step"][0]),
        last_step=int(steps["step"][-1]),
        conflict_across=float(counted["conflict_across"].nanmean()) if known else None,
        harmful_across=float(counted["harmful_across"].nanmean()) if known else None,
        cosine_across=float(_smallest_cosine(counted["across"].nanmean(0))) if known else None,
    )
