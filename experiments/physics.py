"""Rules in Euclidean space and in the metric of the optimizer's step, on four equations.

    python experiments/physics.py           # all: about three hours on two cores
    python experiments/physics.py --page    # only write the page of what is finished

Takes no data. Every method gets its rate by validation: all rates with two seeds; then, for what
is left in the race, the best two with two seeds more. Finished trainings are lines of
docs/evidence_physics.jsonl and are not redone; delete the file when the code that trains changed.
SOAP comes from pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from physics_finished import Finished
from physics_problems import EQUATIONS
from physics_runs import BASES, Job, train
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from workers import results

COLUMNS = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
FOLDER = Path(__file__).resolve().parent.parent / "docs"


def stages(options: argparse.Namespace, finished: Finished) -> Iterator[tuple[str, list[Job]]]:
    """What needs what: the race is decided by the first round, rates by the second."""
    for base in options.bases:
        cells = [(equation, base) for equation in options.equations]
        for title, jobs_of in (
            ("first round", finished.first_round),
            ("second round", finished.second_round),
            ("report", finished.report_jobs),
            ("constant coefficients", finished.constant_jobs),
        ):
            for cell in cells:
                yield f"{base}, {cell[0]}: {title}", list(jobs_of(*cell))


def run(jobs: list[Job], title: str, workers: int, finished: Finished, progress: Progress) -> None:
    """Those that are not finished; each is kept as soon as it ends."""
    left = [job for job in jobs if job not in finished]
    minutes = sum(job.cost for job in left) / workers / 60
    progress.console.print(f"{title}: {len(left)} jobs to do, about {minutes:.0f} minutes")
    bar = progress.add_task(title, total=sum(job.cost for job in left))
    for job, found in results(left, train, workers):
        finished.keep(job, found)
        progress.advance(bar, job.cost)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--equations", nargs="+", choices=EQUATIONS, default=list(EQUATIONS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--seeds", type=int, help="of the report (default: 20, and 8)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the page and the runs")
    parser.add_argument("--page", action="store_true", help="only write it, of what is finished")
    parser.add_argument("--runs-only", action="store_true", help="do not write the page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    finished = Finished(options.folder / "evidence_physics.jsonl", options.seeds)
    if not options.page:
        with Progress(*COLUMNS) as progress:
            for title, jobs in stages(options, finished):
                run(jobs, title, options.workers, finished, progress)
    if not options.runs_only:
        from physics_page import write_page

        write_page(options.folder / "evidence_physics.md", finished)


if __name__ == "__main__":
    main()
