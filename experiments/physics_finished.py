"""The finished trainings of physics.py, and what they decide: who is in the race, and rates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
from physics_runs import (
    CONSTANT,
    HARD,
    IN_METRIC,
    METHODS,
    SUM,
    WEIGHTS,
    Job,
    Result,
)

RATES = (2e-3, 5e-3, 1.25e-2)
# An earlier run showed 3e-2 to be too large for all that was any good on the others.
RATES_OF = {"klein_gordon": (*RATES, 3e-2), "inverse": (5e-3, 1.25e-2, 3e-2, 7.5e-2)}
FIRST, SECOND = (100, 101), (102, 103)  # seeds of validation
GROUP = 4  # seeds that are trained at once
PROJECTIONS = ("UPGrad", "UPGrad, metric", "dual projection", "dual projection, metric")
ALWAYS = (SUM, "MMPareto", *PROJECTIONS)
WEIGHTS_LEFT = 3  # the best weights, which always stay in the race
RACE = 2.0  # times their smallest error after the first round: what else is left in it
CLOSE = 1.5  # times the best weight's error: what else is reported
EXPLAINED = ("helmholtz", "Adam")  # where constant coefficients are tried
WITHOUT_CONDITIONS = ("inverse",)  # nothing to constrain: its data are noisy
Key = tuple[str, str, str, float]


class Finished:
    """By equation, base, method and rate the results by seed; a file has a line for each."""

    def __init__(self, path: Path, seeds: int | None = None) -> None:
        self.path, self._seeds = path, seeds
        self.runs: dict[Key, dict[int, Result]] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            run = json.loads(line)
            key = (run.pop("equation"), run.pop("base"), run.pop("method"), run.pop("lr"))
            self.runs.setdefault(key, {})[run.pop("seed")] = run

    def __contains__(self, job: Job) -> bool:
        return set(job.seeds) <= set(self.of(job.equation, job.base, job.method, job.lr))

    def keep(self, job: Job, results: list[Result]) -> None:
        told = {"equation": job.equation, "base": job.base, "method": job.method, "lr": job.lr}
        with self.path.open("a") as file:
            for seed, result in zip(job.seeds, results, strict=True):
                file.write(json.dumps(told | {"seed": seed} | result) + "\n")
        self.of(job.equation, job.base, job.method, job.lr).update(
            zip(job.seeds, results, strict=True)
        )

    def of(self, equation: str, base: str, method: str, lr: float) -> dict[int, Result]:
        return self.runs.setdefault((equation, base, method, lr), {})

    def error(self, key: Key, seeds: Iterable[int] = (*FIRST, *SECOND)) -> float:
        """Geometric mean of the errors of those seeds that are finished."""
        runs = self.of(*key)
        found = [np.log(runs[seed]["error"]) for seed in seeds if seed in runs]
        return float(np.exp(fmean(found))) if found else np.inf

    def ranked(self, equation: str, base: str, method: str) -> list[float]:
        """Rates by their error in the first round."""
        rates = rates_of(equation)
        return sorted(rates, key=lambda lr: self.error((equation, base, method, lr), FIRST))

    def lr(self, equation: str, base: str, method: str) -> float:
        """The best rate: of the two that the second round tried, if it did."""
        rates = self.ranked(equation, base, method)[:2]
        tried = [lr for lr in rates if SECOND[0] in self.of(equation, base, method, lr)]
        return min(tried or rates, key=lambda lr: self.error((equation, base, method, lr)))

    def validated(self, equation: str, base: str, method: str) -> float:
        return self.error((equation, base, method, self.lr(equation, base, method)))

    def methods(self, equation: str, base: str) -> list[str]:
        """All with Adam as usual; with other bases the best weight there, its neighbours, rules."""
        if base == "Adam":
            return [m for m in METHODS if m != HARD or equation not in WITHOUT_CONDITIONS]
        weights = list(WEIGHTS)
        best = weights.index(self.best_weight(equation, "Adam"))
        near = weights[max(0, best - 1) : best + 2]
        rules = [rule for rule in PROJECTIONS if base != "SOAP" or rule not in IN_METRIC]
        return [SUM, *near, *rules]

    def best_weight(self, equation: str, base: str) -> str:
        return min(
            (m for m in WEIGHTS if self.ran(equation, base, m)),
            key=lambda method: self.validated(equation, base, method),
        )

    def ran(self, equation: str, base: str, method: str) -> bool:
        return any(self.of(equation, base, method, lr) for lr in rates_of(equation))

    def race(self, equation: str, base: str) -> list[str]:
        """What the first round left; of other bases than Adam all, as few are tried."""
        methods = self.methods(equation, base)
        if base != "Adam":
            return methods
        errors = {
            method: self.error(
                (equation, base, method, self.ranked(equation, base, method)[0]), FIRST
            )
            for method in methods
        }
        weights = sorted((m for m in methods if m in WEIGHTS), key=errors.__getitem__)
        left = weights[:WEIGHTS_LEFT]
        limit = RACE * errors[left[0]]
        return [m for m in methods if m in {*ALWAYS, *left} or errors[m] <= limit]

    def reported(self, equation: str, base: str) -> list[str]:
        """What is trained with the report's seeds."""
        race, best = self.race(equation, base), self.best_weight(equation, base)
        limit = CLOSE * self.validated(equation, base, best)
        also = [m for m in race if m not in WEIGHTS and self.validated(equation, base, m) <= limit]
        kept = {*ALWAYS, best, *also}
        return [m for m in self.methods(equation, base) if m in kept]

    def seeds(self, base: str) -> range:
        return range(self._seeds or (20 if base == "Adam" else 8))

    def first_round(self, equation: str, base: str) -> Iterator[Job]:
        for method in self.methods(equation, base):
            yield from (Job(equation, base, method, lr, FIRST) for lr in rates_of(equation))

    def second_round(self, equation: str, base: str) -> Iterator[Job]:
        if base != "Adam":
            return
        for method in self.race(equation, base):
            rates = self.ranked(equation, base, method)[:2]
            yield from (Job(equation, base, method, lr, SECOND) for lr in rates)

    def report_jobs(self, equation: str, base: str) -> Iterator[Job]:
        """Seeds first, so that what is cut off is whole for fewer seeds."""
        seeds = self.seeds(base)
        for start in seeds[::GROUP]:
            group = tuple(seeds[start : start + GROUP])
            for method in self.reported(equation, base):
                yield Job(equation, base, method, self.lr(equation, base, method), group)

    def constant_jobs(self, equation: str, base: str) -> Iterator[Job]:
        """The mean coefficients of each seed's training, held from its first step to the last."""
        for method, source in CONSTANT.items():
            if (equation, base) == EXPLAINED and source in PROJECTIONS:
                lr = self.lr(equation, base, source)
                runs = self.of(equation, base, source, lr)
                for start in self.seeds(base)[::GROUP]:
                    group = tuple(range(start, start + GROUP))
                    rows = tuple(tuple(runs[seed]["coefficients"]) for seed in group)
                    yield Job(equation, base, method, lr, group, rows)

    def report(self, equation: str, base: str, method: str) -> list[Result]:
        """By seed, of those seeds that all methods of the report have; none of what was not run."""
        source = CONSTANT.get(method, method)
        runs = self.of(equation, base, method, self.lr(equation, base, source))
        seeds = self.common_seeds(equation, base)
        return [runs[seed] for seed in seeds] if seeds and set(seeds) <= set(runs) else []

    def common_seeds(self, equation: str, base: str) -> list[int]:
        every = [
            self.of(equation, base, method, self.lr(equation, base, method))
            for method in self.reported(equation, base)
        ]
        return [seed for seed in self.seeds(base) if all(seed in runs for runs in every)]


def rates_of(equation: str) -> tuple[float, ...]:
    return RATES_OF.get(equation, RATES)
