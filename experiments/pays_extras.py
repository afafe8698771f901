"""Beside the question whether it pays: one loss scaled, other batches, sweeps of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean

import numpy as np
from pays_finished import Finished, score
from pays_settings import BATCH, MMPARETO, RULES, SETTINGS, UNIFORM, Job, Result, find

SCALED = ("utd_mhad", "helmholtz")
SCALES = tuple(10.0**k for k in range(-3, 4))
METHODS = (UNIFORM, MMPARETO, "ConFIG", "UPGrad")
SMALL_TO_LARGE = "utd_mhad"
BATCHES = (8, 16, 32, 64, 128, 256)
SEEDS = range(5)
SWEPT_AGAINST = (MMPARETO, *RULES)


def scaled_jobs(setting: str, method: str, scale: float, finished: Finished) -> list[Job]:
    """At the rate that validation chose for the losses as they are."""
    jobs = [finished.report_job(setting, method, seed) for seed in SEEDS]
    return [replace(job, scale=scale) for job in jobs]


def batch_jobs(method: str, size: int, finished: Finished, parts: int = 1) -> list[Job]:
    jobs = [finished.report_job(SMALL_TO_LARGE, method, seed) for seed in SEEDS]
    return [replace(job, batch=size, parts=parts) for job in jobs]


def jobs_of(settings: Sequence[str], finished: Finished) -> Iterator[Job]:
    for size in BATCHES if SMALL_TO_LARGE in settings else ():
        for method in (UNIFORM, MMPARETO):
            yield from batch_jobs(method, size, finished)
        yield from batch_jobs(UNIFORM, size, finished, parts=2)
    for setting in (setting for setting in SCALED if setting in settings):
        for scale in SCALES:
            for method in METHODS:
                yield from scaled_jobs(setting, method, scale, finished)


def done(jobs: Sequence[Job], finished: Finished) -> list[Result]:
    """The results; none while one is missing."""
    found = [find(job, finished.folder) for job in jobs]
    return [] if None in found else [result for result in found if result is not None]


def scale_lines(setting: str, finished: Finished) -> Iterator[list[str]]:
    """A line a method: the mean accuracy or the median error at each scale."""
    for method in METHODS:
        line = [method]
        for scale in SCALES:
            runs = done(scaled_jobs(setting, method, scale, finished), finished)
            scores = [score(run) for run in runs]
            if not scores:
                line.append("")
            elif SETTINGS[setting].physics:
                line.append(f"{10 ** -np.median(scores):.2g}")
            else:
                line.append(f"{np.mean(scores):.1f}")
        yield line


def batch_lines(finished: Finished) -> Iterator[list[str]]:
    """A line a size: conflicts and harmful steps by block, the accuracy, MMPareto's gain."""
    from pays_statistics import compared  # statsmodels takes seconds to import

    for size in BATCHES:
        plain, other = (done(batch_jobs(m, size, finished), finished) for m in (UNIFORM, MMPARETO))
        if plain and other:
            shares = [f"{value:.1f} %" for value in by_block(plain, ("conflict", "harmful"))]
            scores = [[score(run) for run in runs] for runs in (other, plain)]
            gain = compared("batches", SMALL_TO_LARGE, MMPARETO, *scores).measured
            yield [_named(size), *shares, f"{np.mean(scores[1]):.1f}", gain]


def noise_lines(finished: Finished) -> Iterator[list[str]]:
    """A line a size: cosines by block, and those of different halves of the batches."""
    for size in BATCHES:
        runs = done(batch_jobs(UNIFORM, size, finished, parts=2), finished)
        if runs:
            yield [_named(size), *(f"{x:.2f}" for x in by_block(runs, ("cosine", "cosine_across")))]


def by_block(runs: Sequence[Result], kinds: Sequence[str]) -> Iterator[float]:
    """Means over the runs, by block for one kind after the other."""
    for kind in kinds:
        for block in runs[0][kind]:
            yield float(np.mean([run[kind][block] for run in runs]))


def _named(size: int) -> str:
    return f"{size}" + " (tuned)" * (size == BATCH)


def sweep_lines(setting: str, finished: Finished) -> Iterator[list[str]]:
    """The error on validation seeds of the best of k weights, over all choices of k; then of rules.

    Each with its own rate; geometric means.
    """
    swept = [_validated(setting, method, finished) for method in SETTINGS[setting].scalarizations]
    sizes = range(1, len(swept) + 1)
    best = [mean(map(max, combinations(swept, size))) for size in sizes]
    yield ["the plain sum, best of so many weights", *(f"{10**-score:.2g}" for score in best)]
    for method in SWEPT_AGAINST:
        cells = [f"{10 ** -_validated(setting, method, finished):.2g}", *[""] * (len(swept) - 1)]
        yield [method, *cells]


def _validated(setting: str, method: str, finished: Finished) -> float:
    return finished.validated(setting, method, finished.lr(setting, method))
