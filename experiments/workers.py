"""Runs that are kept on disk, worked off in processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from rich.progress import Progress


def work_off(
    left: Sequence[Any],
    perform: Callable[..., Any],
    title: str,
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    """Jobs with a cost, in worker processes or, with one worker, in this one."""
    bar = progress.add_task(title, total=sum(job.cost for job in left))
    if options.workers == 1:
        for job in left:
            perform(job, options.results, options.data)
            progress.advance(bar, job.cost)
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        running = {pool.submit(perform, job, options.results, options.data): job for job in left}
        for done in as_completed(running):
            done.result()
            progress.advance(bar, running[done].cost)
