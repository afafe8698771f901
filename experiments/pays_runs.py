"""The trainings behind "does it pay?" (pays.py); each is a job whose result is a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import audio_visual_digits
import avletters
import colored_gray_digits
import utd_mhad
from common import LateFusion, Split, accuracy, batches, epochs
from pays_settings import (
    ALONE,
    INTEGRATIONS,
    JOINT,
    MMPARETO,
    REPLAYS,
    SETTINGS,
    SHUFFLED,
    WEIGHTS,
    Job,
    Result,
)
from pinn import take_step
from pinn_problems import PROBLEMS, Network, relative_error
from torch.optim.lr_scheduler import CosineAnnealingLR

from mmpareto_optim import MMParetoOptimizer

Coefficients = dict[str, list[list[float]]]  # by block, a row a step

POINTS = 196  # of a residual, drawn anew in each step
WORST_ERROR = 1e3  # what a diverged solution counts as
DIGITS = 5  # significant ones that are kept of coefficients
EXAMPLES = {
    module.__name__: module
    for module in (utd_mhad, avletters, colored_gray_digits, audio_visual_digits)
}


def coefficients_of(job: Job, folder: Path) -> Coefficients:
    found: Coefficients = json.loads(job.path(folder).read_text())["result"]["coefficients"]
    return found


def perform(job: Job, folder: Path, data: Path | None) -> None:
    """Run the job and keep its result; half a file is never left under its name."""
    torch.set_num_threads(1)  # the result must not depend on the number of cores
    started = perf_counter()
    replayed = replay(job, folder) if job.method in REPLAYS else None
    train = train_physics if SETTINGS[job.setting].physics else train_modalities
    result = train(job, replayed, data) | {"seconds": round(perf_counter() - started, 2)}
    versions = {"torch": torch.__version__, "machine": platform.machine()}
    path = job.path(folder)
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps({"job": asdict(job), "versions": versions, "result": result}))
    half.replace(path)


def replay(job: Job, folder: Path) -> dict[str, Tensor]:
    """By block the coefficients of MMPareto's run, (steps, objectives): their mean, or shuffled."""
    found = {}
    generator = torch.Generator().manual_seed(job.seed)
    for block, rows in coefficients_of(job.source, folder).items():
        values = torch.tensor(rows)
        order = torch.randperm(len(values), generator=generator)
        found[block] = values[order] if job.method == SHUFFLED else values.mean(0).expand_as(values)
    return found


class Watch:
    """What the steps of one training saw, by block."""

    def __init__(self) -> None:
        self.grams: dict[str, list[Tensor]] = {}
        self.coefficients: dict[str, list[Tensor]] = {}

    def look(self, optimizer: MMParetoOptimizer) -> None:
        for block, stats in optimizer.stats.items():
            self.grams.setdefault(block, []).append(stats.gram)
            self.coefficients.setdefault(block, []).append(stats.coefficients)

    def result(self, *, keep: bool) -> Result:
        """Shares in % by block: of conflict, and of steps whose plain sum harms an objective."""
        found: Result = {"conflict": {}, "harmful": {}, "mean_coefficients": {}}
        for block, grams in self.grams.items():
            gram = torch.stack(grams)
            found["conflict"][block] = _share((gram < 0).flatten(1).any(1))
            found["harmful"][block] = _share((gram.sum(-1) < 0).any(1))
            mean = torch.stack(self.coefficients[block]).mean(0)
            found["mean_coefficients"][block] = _rounded(mean)
        if keep:
            found["coefficients"] = {
                block: _rounded(torch.stack(rows)) for block, rows in self.coefficients.items()
            }
        return found


class AcrossParts:
    """Products of gradients of different parts of a batch, by block; they share no noise."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """One step: for each part the gradients of a block's losses, a row each."""
        for block in parts[0] if parts else ():
            rows = torch.stack([part[block] for part in parts])
            whole = rows.sum(0)
            across = whole @ whole.T - (rows @ rows.mT).sum(0)
            self.sums[block] = self.sums.get(block, 0) + across

    def result(self, watch: Watch) -> Result:
        """The median cosine of single steps, and that of the mean products of different parts."""
        return {
            "cosine": {
                block: float(_cosine(torch.stack(grams)).nanmedian())
                for block, grams in watch.grams.items()
            },
            "cosine_across": {block: float(_cosine(gram)) for block, gram in self.sums.items()},
        }


def _cosine(grams: Tensor) -> Tensor:
    """Of two gradients; NaN where an estimated square is not positive."""
    return grams[..., 0, 1] / (grams[..., 0, 0] * grams[..., 1, 1]).sqrt()


def encoder_gradients(model: LateFusion, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """By block the gradients of the joint loss and of the encoder's own, a row each."""
    found = {}
    for name, encoder in model.encoders.items():
        params = list(encoder.parameters())
        rows = [
            torch.autograd.grad(losses[head], params, retain_graph=True) for head in ("mm", name)
        ]
        found[f"mm+{name}"] = torch.stack(
            [torch.cat([piece.flatten().double() for piece in row]) for row in rows]
        )
    return found


def _share(steps: Tensor) -> float:
    return round(100 * float(steps.float().mean()), 3)


def _rounded(values: Tensor) -> Any:
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{float(values):.{DIGITS}g}")


@lru_cache(maxsize=2)
def splits(setting: str, validation_seed: int | None, data: Path | None) -> tuple[Split, Split]:
    """Training and test data; without a validation seed they are the same for all seeds."""
    s = SETTINGS[setting]
    options = argparse.Namespace(
        data=data if s.file else None,
        split=s.split,
        modalities=s.modalities,
        validate=validation_seed is not None,
        quick=False,
    )
    found: tuple[Split, Split] = module_of(setting).make_data(options, validation_seed or 0)
    return found


def module_of(setting: str) -> Any:
    return EXAMPLES[SETTINGS[setting].example]


def train_modalities(job: Job, replayed: dict[str, Tensor] | None, data: Path | None) -> Result:
    """Accuracy in % by head, and what the steps saw."""
    setting = SETTINGS[job.setting]
    train, test = splits(job.setting, job.seed if job.validate else None, data)
    torch.manual_seed(job.seed)  # one start and one order of the batches for all methods
    model = module_of(job.setting).make_model(job.method == JOINT)
    sgd = torch.optim.SGD(model.parameters(), lr=job.lr, momentum=0.9)
    settings = INTEGRATIONS.get(job.method, {})
    optimizer = MMParetoOptimizer(sgd, **settings)
    watch, products = Watch(), AcrossParts()
    steps = iter(range(10**9))

    def take(batch: Split) -> None:
        coefficients = None if replayed is None else at_step(replayed, next(steps))
        optimizer.zero_grad()
        rows = []
        for part in torch.arange(len(batch)).chunk(job.parts):
            share = len(part) / len(batch)
            losses = modal_losses(model, batch[part], job, coefficients)
            losses = {head: share * loss for head, loss in losses.items()}
            if job.parts > 1:
                rows.append(encoder_gradients(model, losses))
            optimizer.backward(losses)
        optimizer.step()
        watch.look(optimizer)
        products.add(rows)

    options = argparse.Namespace(lr=job.lr, epochs=setting.length)
    for _ in epochs(model, optimizer, train, options, take, job.batch):
        pass
    scored = accuracy(model, batches(test, torch.arange(len(test)), 1000))
    across = products.result(watch) if job.parts > 1 else {}
    return {"accuracy": scored, **watch.result(keep=job.method == MMPARETO), **across}


def at_step(replayed: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {block: rows[step] for block, rows in replayed.items()}


def modal_losses(
    model: LateFusion, batch: Split, job: Job, coefficients: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The losses by head; replayed, their sum, with the coefficients at the encoders."""
    features = model.features(*batch.inputs)
    if coefficients is None:
        logits = model.logits(features)
    else:
        logits = logits_with(model, features, coefficients)
    heads = list(model.encoders) if job.method == ALONE else list(logits)
    losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in heads}
    losses[heads[-1]] = job.scale * losses[heads[-1]]
    return losses if coefficients is None else {"sum": torch.stack(list(losses.values())).sum()}


def logits_with(
    model: LateFusion, features: dict[str, Tensor], coefficients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The logits, whose gradients reach each encoder times its block's coefficients."""
    joint, own = {}, {}
    for name, feature in features.items():
        to_joint, to_own = coefficients[f"mm+{name}"]
        joint[name] = with_gradient_times(to_joint, feature)
        own[name] = with_gradient_times(to_own, feature)
    logits = {"mm": model.mm_head(torch.cat(list(joint.values()), dim=1))}
    return logits | {name: head(own[name]) for name, head in model.heads.items()}


def with_gradient_times(factor: Tensor, x: Tensor) -> Tensor:
    """``x``, whose gradient arrives ``factor`` times."""
    return x.detach() + factor * (x - x.detach())


def train_physics(job: Job, replayed: dict[str, Tensor] | None, data: Path | None) -> Result:
    """Relative L2 error at the end, and what the steps saw."""
    problem = PROBLEMS[job.setting]
    setting = SETTINGS[job.setting]
    torch.manual_seed(job.seed)  # the same start and the same points for all methods
    net = Network()
    adam = torch.optim.Adam(net.parameters(), job.lr)
    # Named as one block: derivatives do not reach the last bias, which belongs to it all the same.
    optimizer = MMParetoOptimizer(adam, {"net": net}, **INTEGRATIONS.get(job.method, {}))
    schedule = CosineAnnealingLR(optimizer, setting.length)
    weight = WEIGHTS.get(job.method, 1.0) * job.scale
    watch = Watch()
    for step in range(setting.length):
        points = problem.points(POINTS)
        coefficients = None if replayed is None else replayed["net"][step]
        losses_of = partial(physics_losses, problem.losses, net, points, weight, coefficients)
        take_step(net, optimizer, losses_of if job.method not in WEIGHTS else summed(losses_of))
        watch.look(optimizer)
        schedule.step()
    error = relative_error(problem, net)
    error = min(error, WORST_ERROR) if error == error else WORST_ERROR
    return {"error": error, **watch.result(keep=job.method == MMPARETO)}


def physics_losses(
    losses_of: Callable[..., dict[str, Tensor]],
    net: Network,
    points: dict[str, Tensor],
    weight: float,
    coefficients: Iterable[Tensor] | None,
) -> dict[str, Tensor]:
    """The losses by name, all but the residual times ``weight``; replayed, their sum."""
    losses = losses_of(net, points)
    losses = {k: loss if k == "residual" else weight * loss for k, loss in losses.items()}
    if coefficients is None:
        return losses
    terms = [c * x for c, x in zip(coefficients, losses.values(), strict=True)]
    return {"sum": torch.stack(terms).sum()}


def summed(losses_of: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """One backward for what is a plain sum."""
    return lambda: {"sum": torch.stack(list(losses_of().values())).sum()}
