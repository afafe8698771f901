"""The trainings and the convex problems behind docs/evidence_paper.md; each is a job with a result.

A job names all that determines its result, and a finished one is kept as a JSON file under the
hash of that, of the versions and of the code: it is run once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "examples"))

import audio_visual_digits  # noqa: E402
import colored_gray_digits  # noqa: E402
import multimnist  # noqa: E402
from common import Split, accuracy, batches, epochs  # noqa: E402

from mmpareto_optim import (  # noqa: E402
    ConflictRecorder,
    MMParetoOptimizer,
    gradient_noise,
    loss_slices,
)

Result = dict[str, Any]

# What the optimizer is given; "alone" trains each encoder by its own loss, without the joint one.
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"integration": "uniform"},
    "uniform x 1.5": {"integration": "uniform", "gamma": 1.5},
    "conventional Pareto": {"integration": "pareto"},
    "MMPareto": {},
    "alone": {"integration": "uniform", "check": False},  # which tells of losses that never meet
    "MMPareto, gamma 1": {"gamma": 1.0},
    "MMPareto, gamma 2": {"gamma": 2.0},
    "MMPareto, by tensor": {"rescale": "tensor"},
    "MMPareto, at features": {},
}
ALONE, AT_FEATURES = "alone", "MMPareto, at features"
NOISE_POINTS = (0.1, 0.5, 1.0)  # shares of the training after which the noise is measured
NOISE_BATCHES = 16
SHARPNESS_SAMPLES = 512


@dataclass(frozen=True)
class Task:
    """A data set with its model, the heads that are scored and how it is trained."""

    title: str
    module: str
    heads: tuple[str, ...]
    modalities: tuple[str, ...]  # none where the losses are tasks on one trunk
    rates: tuple[float, ...]
    epochs: int
    split: str = ""
    seeds: int = 10

    @property
    def main_heads(self) -> tuple[str, ...]:
        """Heads whose mean accuracy is what a method is judged and tuned by."""
        return ("mm",) if self.modalities else self.heads


MODULES = {
    module.__name__: module for module in (colored_gray_digits, multimnist, audio_visual_digits)
}
_SPOKEN = ("audio_visual_digits", ("mm", "audio", "visual"), ("audio", "visual"))
TASKS = {
    "colored_gray_digits": Task(
        "coloured and gray digits",
        "colored_gray_digits",
        ("mm", "gray", "colour"),
        ("gray", "colour"),
        (0.025, 0.05, 0.1, 0.2),
        20,
    ),
    "multimnist": Task(
        "overlaid digits", "multimnist", ("left", "right"), (), (0.025, 0.05, 0.1, 0.2), 20
    ),
    "spoken_by_recording": Task(
        "spoken and written digits, by recording", *_SPOKEN, (0.01, 0.03, 0.1), 4, "recording"
    ),
    "spoken_by_speaker": Task(
        "spoken and written digits, by speaker",
        *_SPOKEN,
        (0.01, 0.03, 0.1),
        4,
        "speaker",
        seeds=5,  # a speaker each; the sixth is the validation's
    ),
}
SPOKEN = tuple(name for name, task in TASKS.items() if task.split)


@dataclass(frozen=True)
class Training:
    """One training of one method; ``validate`` scores it without the test set."""

    task: str
    method: str
    lr: float
    seed: int
    validate: bool
    epochs: int

    @property
    def cost(self) -> float:
        return self.epochs * (3.0 if self.task in SPOKEN else 0.3)

    def run(self, data: Path | None) -> Result:
        return train(self, data)


@dataclass(frozen=True)
class Convex:
    """MMPareto on a random pair of quadratics from a random start, as seed and schedule say."""

    seed: int
    decay: bool
    noise: float
    steps: int = 1000
    dimensions: int = 5
    lr: float = 0.1

    @property
    def cost(self) -> float:
        return self.steps / 1500

    def run(self, data: Path | None) -> Result:
        return minimise(self)


Job = Training | Convex


@lru_cache
def code() -> str:
    """Hash of the sources that results depend on, and the versions."""
    root = FOLDER.parent
    names = ("common", *MODULES)
    paths = [
        *sorted((root / "mmpareto_optim").rglob("*.py")),
        *(root / "examples" / f"{name}.py" for name in names),
        Path(__file__),
    ]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    versions = (torch.__version__, np.__version__, platform.machine())
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def place(job: Job, folder: Path) -> Path:
    key = {"kind": type(job).__name__, "code": code(), **asdict(job)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return folder / f"{name}.json"


def find(job: Job, folder: Path) -> Result | None:
    """The result of a finished job."""
    path = place(job, folder)
    if not path.is_file():
        return None
    result: Result = json.loads(path.read_text())["result"]
    return result


def perform(job: Job, folder: Path, data: Path | None) -> None:
    """Run the job and keep its result; half a file is never left under its name."""
    torch.set_num_threads(1)  # the result must not depend on the number of cores
    result = job.run(data)
    path = place(job, folder)
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps({"job": asdict(job), "result": result}))
    half.replace(path)


@lru_cache(maxsize=2)
def splits(
    module: str, split: str, seed: int, validate: bool, data: Path | None
) -> tuple[Split, Split]:
    options = argparse.Namespace(data=None, validate=validate)
    if split:
        options = argparse.Namespace(data=data, split=split, validate=validate, quick=False)
    found: tuple[Split, Split] = MODULES[module].make_data(options, seed)
    return found


def losses_of(model: nn.Module, heads: tuple[str, ...], batch: Split) -> dict[str, Tensor]:
    logits = model(*batch.inputs)
    return {head: cross_entropy(logits[head], batch.labels[head]) for head in heads}


def train(job: Training, data: Path | None) -> Result:
    """Accuracy in % by head; of a run for the report also what was seen in training and after."""
    task = TASKS[job.task]
    train_split, test_split = splits(task.module, task.split, job.seed, job.validate, data)
    torch.manual_seed(job.seed)  # one start and one order of the batches for all methods
    model = MODULES[task.module].make_model(False)
    options = argparse.Namespace(lr=job.lr, epochs=job.epochs)
    sgd = torch.optim.SGD(model.parameters(), lr=job.lr, momentum=0.9)
    optimizer = MMParetoOptimizer(sgd, **METHODS[job.method])
    recorder = ConflictRecorder()
    noise: list[Result] = []
    points = {max(1, round(share * job.epochs)) for share in NOISE_POINTS}
    observed = not job.validate
    take_step = partial(_step, model, optimizer, task, job.method, recorder)
    for epoch in epochs(model, optimizer, train_split, options, take_step):
        recorder.epoch = epoch + 1
        if observed and job.method == "uniform" and task.modalities and epoch + 1 in points:
            noise.append(noise_now(model, task, train_split, job.seed))
    scored = accuracy(model, batches(test_split, torch.arange(len(test_split)), 1000))
    result: Result = {"accuracy": scored}
    if observed:
        result["curves"] = curves(recorder)
        result["noise"] = noise
        if job.method in ("uniform", "MMPareto"):
            result["sharpness"] = sharpness(model, task, train_split, job.seed)
    return result


def _step(
    model: Any,
    optimizer: MMParetoOptimizer,
    task: Task,
    method: str,
    recorder: ConflictRecorder,
    batch: Split,
) -> None:
    features = model.features(*batch.inputs)
    logits = model.logits(features)
    heads = task.modalities if method == ALONE else task.heads
    losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in heads}
    optimizer.zero_grad()
    optimizer.step(losses=losses, features=features if method == AT_FEATURES else None)
    recorder.record(optimizer)


def noise_now(model: Any, task: Task, split: Split, seed: int) -> Result:
    """By modality, length and covariance's trace of the joint and of its own gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(split), (64,), generator=generator) for _ in range(NOISE_BATCHES)]
    found: Result = {}
    for modality in task.modalities:
        encoder = model.encoders[modality]
        sources = [split[index] for index in drawn]
        seen = gradient_noise(model, partial(losses_of, model, task.heads), sources, encoder)
        found[modality] = {
            kind: {"norm": seen[head].norm, "trace": seen[head].trace}
            for kind, head in (("joint", "mm"), ("own", modality))
        }
    return found


def sharpness(model: nn.Module, task: Task, split: Split, seed: int) -> float:
    """Of the sum of all losses on some training data, along 10 filter-normalised lines."""
    index = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    some = split[index[:SHARPNESS_SAMPLES]]

    def loss() -> Tensor:
        return torch.stack(list(losses_of(model, task.heads, some).values())).sum()

    return loss_slices(model.eval(), loss, points=3, seed=seed).sharpness


def curves(recorder: ConflictRecorder) -> Result:
    """Columns of each block, a number a step."""
    found: Result = {}
    for row in recorder.rows():
        block = found.setdefault(row["block"], {})
        for column, value in row.items():
            if column in ("epoch", "conflict", "cosine", "min_norm") or column[:5] == "norm/":
                kept = value if isinstance(value, int) else float(f"{value or 0:.5g}")
                block.setdefault(column, []).append(kept)
    return found


def minimise(job: Convex) -> Result:
    """Distance to the Pareto set at the start and at the end.

    The losses are ``(x - a) . A (x - a) / 2`` and the same with b, B: their Pareto set is the
    curve of the minima of ``s`` times the one plus ``1 - s`` times the other, s in 0..1.
    """
    generator = torch.Generator().manual_seed(job.seed)
    hessians = [_hessian(job.dimensions, generator) for _ in range(2)]
    minima = [_normal(job.dimensions, generator) for _ in range(2)]
    x = nn.Parameter(3 * _normal(job.dimensions, generator))
    start = distance_to_pareto_set(x.detach(), hessians, minima)
    optimizer = MMParetoOptimizer(torch.optim.SGD([x], lr=job.lr))
    for step in range(job.steps):
        if job.decay:  # the steps' sum diverges, that of their squares does not
            optimizer.param_groups[0]["lr"] = job.lr / (1 + step / 30)
        losses = {}
        for name, hessian, minimum in zip("ab", hessians, minima, strict=True):
            away = x - minimum
            error = job.noise * _normal(job.dimensions, generator)
            losses[name] = away @ hessian @ away / 2 + error @ x
        optimizer.zero_grad()
        optimizer.step(losses=losses)
    end = distance_to_pareto_set(x.detach(), hessians, minima)
    return {"start": start, "end": end}


def distance_to_pareto_set(x: Tensor, hessians: list[Tensor], minima: list[Tensor]) -> float:
    """Euclidean, by a grid of the curve that is refined about its nearest point."""
    low, high = 0.0, 1.0
    for _ in range(6):
        shares = torch.linspace(low, high, 201, dtype=torch.float64)
        first, second = shares[:, None, None], 1 - shares[:, None, None]
        weighted = first * hessians[0] + second * hessians[1]
        right = first[..., 0] * (hessians[0] @ minima[0]) + second[..., 0] * (
            hessians[1] @ minima[1]
        )
        curve = torch.linalg.solve(weighted, right.unsqueeze(-1)).squeeze(-1)
        distances = torch.linalg.vector_norm(curve - x, dim=1)
        nearest = int(distances.argmin())
        low, high = float(shares[max(nearest - 1, 0)]), float(shares[min(nearest + 1, 200)])
    return float(distances.min())


def _normal(dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.randn(dimensions, generator=generator, dtype=torch.float64)


def _hessian(dimensions: int, generator: torch.Generator) -> Tensor:
    """Positive definite in random directions, with eigenvalues from 0.2 to 2."""
    square = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(square).Q
    values = torch.linspace(0.2, 2, dimensions, dtype=torch.float64)
    return directions @ values.diag() @ directions.mT
