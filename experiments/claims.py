"""Reruns the evidence for each claim of the paper; writes docs/evidence_paper.md, .json.

    python experiments/claims.py                  # scikit-learn's digits
    python experiments/claims.py --data DIR   # and spoken with written digits (FSDD, MNIST)

A learning rate is chosen for each method on validation data with three seeds of their own; then
every method is trained with the report's seeds. Finished runs are kept in --results and not redone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from claim_runs import (
    ALONE,
    FOLDER,
    METHODS,
    SPOKEN,
    TASKS,
    Convex,
    Job,
    Result,
    Training,
    find,
    perform,
)
from evidence import Row, compared, page, spread
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from workers import work_off

import mmpareto_optim

sys.path.insert(0, str(FOLDER.parent / "benchmarks"))

from step_time import commit_here

PAIR = ("uniform", "uniform x 1.5", "conventional Pareto", "MMPareto", ALONE)
ABLATIONS = tuple(method for method in METHODS if method not in PAIR)
# Of 6 speakers the report's seeds test the first 5; these seeds validate on the sixth.
TUNING = (10, 16, 22)
SCHEDULES = {
    "constant rate, exact gradients": (False, 0.0),
    "decaying rate, exact gradients": (True, 0.0),
    "decaying rate, noisy gradients": (True, 0.5),
}


def methods_of(task: str, among: tuple[str, ...]) -> list[str]:
    return [method for method in among if method != ALONE or TASKS[task].modalities]


def training(
    options: argparse.Namespace, task: str, method: str, lr: float, seed: int, validate: bool
) -> Training:
    return Training(task, method, lr, seed, validate, options.epochs or TASKS[task].epochs)


def tuning_jobs(options: argparse.Namespace, among: tuple[str, ...]) -> list[Job]:
    return [
        job
        for task in options.tasks
        for method in methods_of(task, among)
        for lr in TASKS[task].rates
        for job in validations(options, task, method, lr)
    ]


def validations(options: argparse.Namespace, task: str, method: str, lr: float) -> list[Job]:
    return [training(options, task, method, lr, options.seed + s, True) for s in TUNING]


def chosen(options: argparse.Namespace, task: str, method: str, head: str = "") -> float:
    """The learning rate of the best mean validation accuracy; alone, for each head its own."""
    heads = (head,) if method == ALONE else TASKS[task].main_heads

    def score(lr: float) -> float:
        found = [find(job, options.results) for job in validations(options, task, method, lr)]
        scored = [mean(run["accuracy"][h] for h in heads) for run in found if run is not None]
        return mean(scored) if scored else -1.0

    return max(TASKS[task].rates, key=score)


def report_jobs(options: argparse.Namespace, among: tuple[str, ...]) -> list[Job]:
    jobs: dict[Job, None] = {}
    for task in options.tasks:
        for seed in seeds(options, task):
            for method in methods_of(task, among):
                for head in TASKS[task].modalities if method == ALONE else ("",):
                    lr = chosen(options, task, method, head)
                    jobs[training(options, task, method, lr, seed, False)] = None
    return list(jobs)


def convex_jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Convex(seed, decay, noise, 50 if options.epochs else 1000)
        for decay, noise in SCHEDULES.values()
        for seed in range(options.seed, options.seed + 8)
    ]


def seeds(options: argparse.Namespace, task: str) -> range:
    return range(options.seed, options.seed + (options.seeds or TASKS[task].seeds))


def run_all(options: argparse.Namespace) -> None:
    options.results.mkdir(parents=True, exist_ok=True)
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        run(tuning_jobs(options, PAIR), "tuning", options, progress)
        run(report_jobs(options, PAIR) + convex_jobs(options), "claims", options, progress)
        run(tuning_jobs(options, ABLATIONS), "tuning of the ablations", options, progress)
        run(report_jobs(options, ABLATIONS), "ablations", options, progress)


def run(jobs: list[Job], title: str, options: argparse.Namespace, progress: Progress) -> None:
    """Those that are not finished."""
    left = [job for job in jobs if find(job, options.results) is None]
    work_off(left, perform, title, options, progress)


def results(options: argparse.Namespace, task: str, method: str, head: str = "") -> list[Result]:
    """Of all seeds, in their order; none where one of them, or of the tuning, is missing."""
    tuned = tuning_jobs(argparse.Namespace(**{**vars(options), "tasks": [task]}), (method,))
    if any(find(job, options.results) is None for job in tuned):
        return []
    lr = chosen(options, task, method, head)
    jobs = [training(options, task, method, lr, seed, False) for seed in seeds(options, task)]
    found = [find(job, options.results) for job in jobs]
    return [] if None in found else [result for result in found if result is not None]


def scores(options: argparse.Namespace, task: str, method: str, head: str = "") -> list[float]:
    """Accuracy by seed of one head, or the mean of the main ones."""
    heads = (head,) if head else TASKS[task].main_heads
    return [mean(r["accuracy"][h] for h in heads) for r in results(options, task, method, head)]


def rows_of(options: argparse.Namespace, task: str) -> Iterator[Row]:
    uniform = results(options, task, "uniform")
    mmpareto = results(options, task, "MMPareto")
    if not uniform or not mmpareto:
        return
    title = TASKS[task].title
    yield from conflict_rows(title, uniform)
    for modality in TASKS[task].modalities:
        for kind, name in (("norm", "length"), ("trace", "covariance")):
            values = tuple(excess(result, modality, kind) for result in uniform)
            yield Row(2, title, f"{name}, {modality} encoder", "", values)
    yield from accuracy_rows(options, task)
    sharp = [[r["sharpness"] for r in side] for side in (uniform, mmpareto)]
    yield compared(7, title, "sharpness: uniform minus MMPareto", *sharp)
    for block in mmpareto[0]["curves"]:
        parts = [thirds(stationarity(r["curves"][block])) for r in mmpareto]
        first, last = zip(*parts, strict=True)
        yield compared(8, title, f"{block}: first third minus last", first, last)


def conflict_rows(title: str, runs: list[Result]) -> Iterator[Row]:
    for block in runs[0]["curves"]:
        curves = [100 * np.array(r["curves"][block]["conflict"], dtype=float) for r in runs]
        shares = tuple(float(c.mean()) for c in curves)
        yield Row(1, title, f"{block}: steps in conflict, %", spread(shares), shares)
        first, last = zip(*(thirds(c) for c in curves), strict=True)
        yield compared(1, title, f"{block}: first third minus last, %", first, last)


def thirds(curve: np.ndarray) -> tuple[float, float]:
    """Mean of the first and of the last third."""
    part = max(1, len(curve) // 3)
    return float(curve[:part].mean()), float(curve[-part:].mean())


def stationarity(block: Result) -> np.ndarray:
    norms = np.mean([values for name, values in block.items() if name[:5] == "norm/"], axis=0)
    ratio: np.ndarray = np.array(block["min_norm"]) / np.maximum(norms, 1e-30)
    return ratio


def excess(result: Result, modality: str, kind: str) -> float:
    """By how much the unimodal quantity exceeds the joint one, over their sum; -1 to 1."""
    points = [point[modality] for point in result["noise"]]
    pairs = [(point["own"][kind], point["joint"][kind]) for point in points]
    return mean((own - joint) / (own + joint) if own + joint else 0.0 for own, joint in pairs)


def accuracy_rows(options: argparse.Namespace, task: str) -> Iterator[Row]:
    title, modalities = TASKS[task].title, TASKS[task].modalities

    def row(claim: int, head: str, above: str, below: str) -> Row:
        sides = [scores(options, task, method, head) for method in (above, below)]
        return compared(claim, title, f"{head or 'mean'}: {above} minus {below}, %", *sides)

    yield row(3, "mm" if modalities else "", "uniform", "conventional Pareto")
    for other in ("uniform", "uniform x 1.5"):
        for head in TASKS[task].heads if modalities else ("", *TASKS[task].heads):
            yield row(4 if modalities else 6, head, "MMPareto", other)
    for modality in modalities:
        yield row(5, modality, "MMPareto", ALONE)


def convex_rows(options: argparse.Namespace) -> Iterator[Row]:
    jobs = iter(convex_jobs(options))
    for title in SCHEDULES:
        found = [find(next(jobs), options.results) for _ in range(8)]
        done = [result for result in found if result is not None]
        if len(done) == 8:
            nearer = [float(np.log10(r["start"] / max(r["end"], 1e-16))) for r in done]
            values = tuple(orders - 2 for orders in nearer)
            yield Row(8, "two quadratics", title, spread(nearer), values)


def ablation_rows(options: argparse.Namespace) -> Iterator[Row]:
    pairs = [(method, "MMPareto") for method in ABLATIONS] + [("MMPareto, gamma 1", "uniform")]
    for task in options.tasks:
        for method, other in pairs:
            sides = [scores(options, task, name) for name in (method, other)]
            if all(sides):
                quantity = f"{method} minus {other}"
                yield compared(0, TASKS[task].title, quantity, *sides)


def write_page(options: argparse.Namespace) -> None:
    measured = [row for task in options.tasks for row in rows_of(options, task)]
    rows = sorted([*measured, *convex_rows(options)], key=lambda row: row.claim)
    ablations = list(ablation_rows(options))
    rates = {task: rates_of(options, task) for task in options.tasks}
    rates = {task: found for task, found in rates.items() if found}
    document = {
        "mmpareto-optim": mmpareto_optim.__version__,
        "torch": torch.__version__,
        "commit": commit_here(otherwise=""),
        "seeds": {task: list(seeds(options, task)) for task in rates},
        "epochs": {task: options.epochs or TASKS[task].epochs for task in rates},
        "learning_rates": rates,
        "rows": [described(row) for row in rows],
        "ablations": [described(row) for row in ablations],
    }
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    command = "python experiments/claims.py  # --data DIR adds the spoken digits"
    options.output.write_text(page(rows, ablations, notes(options, document), command))


def rates_of(options: argparse.Namespace, task: str) -> dict[str, float]:
    """The chosen learning rates by method; those of unfinished methods are left out."""
    return {
        f"{method} ({head})" if head else method: chosen(options, task, method, head)
        for method in methods_of(task, tuple(METHODS))
        for head in (TASKS[task].modalities if method == ALONE else ("",))
        if results(options, task, method, head)
    }


def notes(options: argparse.Namespace, document: Result) -> list[str]:
    """How it was run, one sentence or a few an item."""
    tuned = ", ".join(str(options.seed + s) for s in TUNING)
    found = [
        f"mmpareto-optim {document['mmpareto-optim']}, commit {document['commit'] or 'unknown'}, "
        f"PyTorch {document['torch']}, {platform.machine()} CPU, one thread a run. The same "
        "weights and batches for every method.",
        "A seed is one start, one order of the batches and one drawing of the colours, noise and "
        "pairs, or one speaker left out. Which images and recordings are tested is otherwise the "
        "same for all seeds: the intervals do not cover another choice of them.",
        "SGD with momentum 0.9, one-cycle schedule. Learning rate: the best on validation data "
        f"held out of training, for each method by the mean of seeds {tuned}, of the joint head "
        "or of the mean of the tasks.",
    ]
    for name, task in TASKS.items():
        rates = document["learning_rates"].get(name)
        if rates is None:
            found.append(f"Not run: {task.title}.")
            continue
        first, *_, last = document["seeds"][name]
        chosen_rates = ", ".join(f"{method} {lr}" for method, lr in rates.items())
        found.append(
            f"{task.title[0].upper()}{task.title[1:]}: seeds {first} to {last}, "
            f"{document['epochs'][name]} epochs. Learning rates, of "
            f"{', '.join(map(str, task.rates))}: {chosen_rates}. {at_chance(options, name)}"
        )
    return [*found, "Small networks on small data: no statement about larger ones."]


def at_chance(options: argparse.Namespace, task: str) -> str:
    """Trainings of the report that ended within 5 points of guessing, by method."""
    counts = {}
    for method in methods_of(task, tuple(METHODS)):
        found = [] if method == ALONE else scores(options, task, method)
        counts[method] = sum(score < 15 for score in found)
    ended = ", ".join(f"{method} {count}" for method, count in counts.items() if count)
    if not ended:
        return "No run ended at chance."
    return f"Runs that ended at chance: {ended}. They count in every row of that method."


def described(row: Row) -> Result:
    middle, low, high = row.interval
    return {**asdict(row), "mean": middle, "low": low, "high": high, "verdict": row.verdict}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="MNIST and FSDD; see audio_visual_digits.py")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, help="at least 2 (default: 10; 5 by speaker)")
    parser.add_argument("--epochs", type=int, help="of every training, to see it run")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--results", type=Path, default=Path("results/claims"))
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "docs" / "evidence_paper.md")
    parser.add_argument("--page", action="store_true", help="only write it, of what is finished")
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 2:
        parser.error("--seeds must be at least 2: an interval takes two")
    options.tasks = options.tasks or [t for t in TASKS if t not in SPOKEN or options.data]
    if options.data is None and any(task in SPOKEN for task in options.tasks):
        parser.error("spoken digits need --data")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.page:
        run_all(options)
    write_page(options)


if __name__ == "__main__":
    main()
