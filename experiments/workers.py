"""Runs that are kept on disk, worked off in processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any

from rich.progress import Progress


def results(
    left: Sequence[Any], work: Callable[[Any], Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Jobs with their results, from worker processes or, with one worker, from this one."""
    if workers == 1:
        for job in left:
            yield job, work(job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(work, job): job for job in left}
        for done in as_completed(running):
            yield running[done], done.result()


def work_off(
    left: Sequence[Any],
    perform: Callable[..., Any],
    title: str,
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    """Jobs with a cost, which keep their results themselves."""
    bar = progress.add_task(title, total=sum(job.cost for job in left))
    work = partial(perform, folder=options.results, data=options.data)
    for job, _ in results(left, work, options.workers):
        progress.advance(bar, job.cost)
