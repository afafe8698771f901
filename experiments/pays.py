"""Does it pay on several modalities? MMPareto against well-tuned sums, and simple competitors.

    python experiments/pays.py --data DIR  # utd_mhad.npz, htad.npz, rosmap.npz and so on
    python experiments/pays.py --data DIR --settings htad --seeds 25  # five more

Every method gets the learning rate that is best on validation data, then the report's seeds.
Finished runs are lines of docs/evidence_modalities.jsonl and are not redone; delete the lines when
the code that trains has changed. Fills the tables of docs/evidence_modalities.md. From nothing, all
of it takes about two hours on one core; with all runs finished, a few seconds.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from pays_finished import Finished
from pays_page import write_page
from pays_runs import perform
from pays_settings import SETTINGS
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from workers import results

PAGE = Path(__file__).resolve().parent.parent / "docs" / "evidence_modalities.md"
COLUMNS = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())


def run_all(options: argparse.Namespace, finished: Finished) -> None:
    """What is not finished."""
    work = partial(perform, data=options.data)
    with Progress(*COLUMNS) as progress:
        for setting in options.settings:
            for stage in finished.stages(setting, options.seeds or SETTINGS[setting].seeds):
                left = [job for job in stage if job not in finished.results]
                minutes = sum(job.cost for job in left) / options.workers / 60
                progress.console.print(f"{setting}: {len(left)} runs, about {minutes:.0f} minutes")
                bar = progress.add_task(setting, total=len(left))
                for job, result in results(left, work, options.workers):
                    finished.add(job, result)
                    progress.advance(bar)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of utd_mhad.npz and so on")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, help="of the report, at least 3 (default: 10 or 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--output", type=Path, default=PAGE, help="page; its runs lie beside it")
    parser.add_argument("--page", action="store_true", help="only write it, of what is finished")
    options = parser.parse_args(arguments)
    if not options.page and options.data is None:
        parser.error("--data DIR is missing")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    finished = Finished(options.output.with_suffix(".jsonl"))
    if not options.page:
        run_all(options, finished)
    write_page(finished, options.output)


if __name__ == "__main__":
    main()
