"""The finished runs of pays.py, a line of JSON each: what is to do, what validation chose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean

from pays_settings import (
    AT_SUMS_RATE,
    FIRST_SEEDS,
    SETTINGS,
    SHORTLISTED,
    TUNING_SEEDS,
    UNIFORM,
    Job,
    Result,
    source,
)


class Finished:
    """Every finished run is kept; an *entry* is a line of a setting's table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.results = dict(map(parsed, lines))
        self._rates: dict[tuple[str, str], float] = {}

    def add(self, job: Job, result: Result) -> None:
        self.results[job] = result
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(job) | result) + "\n")

    def stages(self, setting: str, seeds: int) -> Iterator[list[Job]]:
        """Three, each of which needs the one before: two rounds of tuning, and the report."""
        s = SETTINGS[setting]
        every = [(method, lr) for method in s.methods for lr in s.rates]
        yield [Job(setting, *each, seed, True) for seed in FIRST_SEEDS for each in every]
        few = [(source(e)[0], lr) for e in s.entries for lr in self.shortlist(setting, e)]
        yield [Job(setting, *each, seed, True) for seed in TUNING_SEEDS for each in unique(few)]
        chosen = self.chosen(setting)
        yield [Job(setting, *each, seed, False) for seed in range(seeds) for each in chosen]

    def chosen(self, setting: str) -> list[tuple[str, float]]:
        """The methods and rates of the report."""
        entries = SETTINGS[setting].entries
        return unique((source(entry)[0], self.rate(setting, entry)) for entry in entries)

    def seeds(self, setting: str) -> range:
        """Those of the report that every line of the table has."""
        try:
            chosen = self.chosen(setting)
        except KeyError:  # tuning is not finished
            return range(0)
        seeds = 0
        while all(Job(setting, *each, seeds, False) in self.results for each in chosen):
            seeds += 1
        return range(seeds)

    def shortlist(self, setting: str, entry: str) -> list[float]:
        """The rates that are best with the first seeds."""

        def loss(lr: float) -> float:
            return -self.validated(setting, entry, lr, FIRST_SEEDS)

        return sorted(SETTINGS[setting].rates, key=loss)[:SHORTLISTED]

    def rate(self, setting: str, entry: str) -> float:
        """The best of the shortlisted with all seeds; or the plain sum's."""
        if entry.endswith(AT_SUMS_RATE):
            return self.rate(setting, UNIFORM)
        if (setting, entry) not in self._rates:
            self._rates[setting, entry] = max(
                self.shortlist(setting, entry),
                key=lambda lr: self.validated(setting, entry, lr, TUNING_SEEDS),
            )
        return self._rates[setting, entry]

    def best(self, setting: str, among: Iterable[str]) -> str:
        """The entry of the best validation score, each at its rate."""
        return max(
            (entry for entry in among if entry in SETTINGS[setting].entries),
            key=lambda e: self.validated(setting, e, self.rate(setting, e), TUNING_SEEDS),
        )

    def validated(self, setting: str, entry: str, lr: float, seeds: Sequence[int]) -> float:
        """Mean accuracy on validation data."""
        return mean(self.scores(setting, entry, lr, seeds, True))

    def report(self, setting: str, entry: str) -> list[float]:
        """Test accuracies by seed."""
        rate = self.rate(setting, entry)
        return self.scores(setting, entry, rate, self.seeds(setting), False)

    def scores(
        self, setting: str, entry: str, lr: float, seeds: Iterable[int], validate: bool
    ) -> list[float]:
        method, head = source(entry)
        jobs = (Job(setting, method, lr, seed, validate) for seed in seeds)
        return [float(self.results[job]["accuracy"][head]) for job in jobs]


def unique(pairs: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    return list(dict.fromkeys(pairs))


def parsed(line: str) -> tuple[Job, Result]:
    found = json.loads(line)
    job = Job(**{field.name: found.pop(field.name) for field in fields(Job)})
    return job, found
