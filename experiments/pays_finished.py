"""The finished runs of pays.py: what validation chose, and the report's scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

import numpy as np
from pays_settings import ALONE, MMPARETO, REPLAYS, SETTINGS, Job, Result, find


class Finished:
    """The finished runs of a folder: what validation chose, and the report's scores."""

    def __init__(self, folder: Path, seeds: int | None) -> None:
        self.folder = folder
        self._seeds = seeds

    def seeds(self, setting: str) -> range:
        return range(self._seeds or SETTINGS[setting].seeds)

    def validations(self, setting: str, method: str, lr: float) -> list[Job]:
        source = self.lr(setting, MMPARETO) if method in REPLAYS else None
        seeds = SETTINGS[setting].tuning
        return [Job(setting, method, lr, seed, True, source) for seed in seeds]

    def validated(self, setting: str, method: str, lr: float, head: str = "mm") -> float:
        """Mean score on validation data, the higher the better; -inf of what is unfinished."""
        runs = [find(job, self.folder) for job in self.validations(setting, method, lr)]
        found = [score(run, head) for run in runs if run is not None]
        return mean(found) if len(found) == len(runs) else -np.inf

    def lr(self, setting: str, method: str, head: str = "mm") -> float:
        """The best for the joint head; of what is trained alone, for the head itself."""
        rates = SETTINGS[setting].rates
        head = head if method == ALONE else "mm"
        return max(rates, key=lambda lr: self.validated(setting, method, lr, head))

    def best(self, setting: str, among: Iterable[str]) -> str:
        """The method of the best validation score, each at its rate."""
        return max(among, key=lambda m: self.validated(setting, m, self.lr(setting, m)))

    def report_job(self, setting: str, method: str, seed: int, head: str = "mm") -> Job:
        source = self.lr(setting, MMPARETO) if method in REPLAYS else None
        return Job(setting, method, self.lr(setting, method, head), seed, False, source)

    def report(self, setting: str, method: str, head: str = "mm") -> list[Result]:
        """The report's runs by seed; none while one is missing."""
        jobs = [self.report_job(setting, method, seed, head) for seed in self.seeds(setting)]
        runs = [find(job, self.folder) for job in jobs]
        return [] if None in runs else [run for run in runs if run is not None]

    def scores(self, setting: str, method: str, head: str = "mm") -> list[float]:
        return [score(run, head) for run in self.report(setting, method, head)]

    def alone(self, setting: str, head: str) -> list[float]:
        """Of the encoder that was trained alone, at the rate that is best for its own head."""
        return self.scores(setting, ALONE, head)

    def all(self, setting: str) -> Iterator[tuple[Job, Result]]:
        """Every finished run of a setting, in the order of the files' names."""
        for path in sorted(self.folder.glob(f"{setting}_*.json")):
            job = Job(**json.loads(path.read_text())["job"])
            result = find(job, self.folder)
            if job.setting == setting and result is not None:
                yield job, result


def score(run: Result, head: str = "mm") -> float:
    """Accuracy in %, or the negative decimal logarithm of the relative error."""
    return float(run["accuracy"][head]) if "accuracy" in run else float(-np.log10(run["error"]))
