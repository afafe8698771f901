"""Does it pay? MMPareto against well-tuned plain sums, on multimodal data and physics.

    python experiments/pays.py --data DIR  # utd_mhad.npz, avletters.npz, fsdd.npz, mnist/: all
    python experiments/pays.py --settings helmholtz digits  # need no data

Every method gets the learning rate that is best on validation data (held-out training subjects,
talkers or repetitions; for physics other seeds), then the report's seeds. Finished runs are kept in
--results and not redone; delete the folder when the code that trains has changed. Writes
docs/evidence.md, its picture and its runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from pays_extras import jobs_of
from pays_finished import Finished
from pays_runs import perform
from pays_settings import ALONE, REPLAYS, SETTINGS, WEIGHTS, Job, find
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from workers import work_off

FOLDER = Path(__file__).resolve().parent
COLUMNS = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())


def stages(setting: str, finished: Finished) -> Iterator[tuple[str, list[Job]]]:
    """What needs what: replays need MMPareto's runs, the report needs the chosen rates."""
    methods = SETTINGS[setting].methods
    first = [method for method in methods if method not in REPLAYS]
    for title, among in (("tuning", first), ("tuning replays", REPLAYS)):
        yield title, [job for method in among for job in tuning(setting, method, finished)]
    kept = [method for method in first if shown(setting, method, finished)]
    for title, among in (("report", kept), ("replays", REPLAYS)):
        yield (
            title,
            [
                job
                for seed in finished.seeds(setting)
                for method in among
                for job in reported(setting, method, seed, finished)
            ],
        )


def shown(setting: str, method: str, finished: Finished) -> bool:
    """Of the weights that were swept, the report trains the one that validation chose."""
    return method not in WEIGHTS or method == finished.best(setting, WEIGHTS)


def tuning(setting: str, method: str, finished: Finished) -> list[Job]:
    rates = SETTINGS[setting].rates
    return [job for lr in rates for job in finished.validations(setting, method, lr)]


def reported(setting: str, method: str, seed: int, finished: Finished) -> list[Job]:
    """One run; of what is trained alone, one for each modality's rate."""
    heads = SETTINGS[setting].modalities if method == ALONE else ("mm",)
    jobs = (finished.report_job(setting, method, seed, head) for head in heads)
    return list(dict.fromkeys(jobs))


def run_all(options: argparse.Namespace) -> None:
    options.results.mkdir(parents=True, exist_ok=True)
    finished = Finished(options.results, options.seeds)
    with Progress(*COLUMNS) as progress:
        for setting in options.settings:
            for title, jobs in stages(setting, finished):
                run(jobs, f"{setting}: {title}", options, progress)
        if options.extras:
            jobs = list(jobs_of(options.settings, finished))
            run(jobs, "scales and batches", options, progress)


def run(jobs: list[Job], title: str, options: argparse.Namespace, progress: Progress) -> None:
    """Those that are not finished."""
    left = [job for job in jobs if find(job, options.results) is None]
    minutes = sum(job.cost for job in left) / options.workers / 60
    progress.console.print(f"{title}: {len(left)} runs to do, about {minutes:.0f} minutes")
    work_off(left, perform, title, options, progress)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of utd_mhad.npz and so on")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, help="of the report (default: 10 or 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--results", type=Path, default=Path("results/pays"))
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "docs" / "evidence.md")
    parser.add_argument("--extras", action="store_true", help="one loss scaled, other batches")
    parser.add_argument("--page", action="store_true", help="only write it, of what is finished")
    parser.add_argument("--runs-only", action="store_true", help="do not write the page")
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 3:
        parser.error("--seeds must be at least 3: an interval takes some")
    with_data = options.data is not None or options.page
    if options.settings is None:
        options.settings = [s for s in SETTINGS if with_data or not SETTINGS[s].file]
    elif not with_data and any(SETTINGS[s].file for s in options.settings):
        parser.error("these settings need --data")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.page:
        run_all(options)
    if not options.runs_only:
        from pays_page import write_page  # statsmodels takes seconds to import

        write_page(options.settings, Finished(options.results, options.seeds), options.output)


if __name__ == "__main__":
    main()
