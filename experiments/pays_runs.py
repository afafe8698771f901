"""The trainings behind "does it pay?" (pays.py)."""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import audio_visual_digits
import avletters
import colored_gray_digits
import tabular
import utd_mhad
from common import LateFusion, Split, batches, epochs
from pays_settings import ENSEMBLE, INTEGRATIONS, SETTINGS, SUMS, Job, Result

from mmpareto_optim import BlockStats, MMParetoOptimizer

EXAMPLES: dict[str, Any] = {
    "utd_mhad": utd_mhad,
    "htad": tabular.HTAD,
    "rosmap": tabular.ROSMAP,
    "avletters": avletters,
    "audio_visual_digits": audio_visual_digits,
    "colored_gray_digits": colored_gray_digits,
}


def perform(job: Job, data: Path | None) -> Result:
    """Test accuracy in % by head and of the ensemble; what the steps saw, by block."""
    torch.set_num_threads(1)  # the result must not depend on the number of cores
    setting = SETTINGS[job.setting]
    train, test = splits(job.setting, job.seed, job.validate, data)
    torch.manual_seed(job.seed)  # one start and one order of the batches for all methods
    model = EXAMPLES[setting.example].make_model(joint=False)
    model.to(memory_format=torch.channels_last)  # half the time of a convolution of images
    optimizer = make_optimizer(model, job)
    seen: dict[str, list[BlockStats]] = {}

    def take_step(batch: Split) -> None:
        losses = losses_of(model, batch, *SUMS.get(job.method, (1.0, 1.0)))
        optimizer.zero_grad()
        if isinstance(optimizer, MMParetoOptimizer):
            optimizer.step(losses=losses)
            for block, stats in optimizer.stats.items():
                seen.setdefault(block, []).append(stats)
        else:
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()

    options = argparse.Namespace(lr=job.lr, epochs=setting.epochs)
    for _ in epochs(model, optimizer, train, options, take_step):
        pass
    return {"accuracy": accuracies(model, test), **shares(seen)}


@lru_cache(maxsize=2)
def splits(setting: str, seed: int, validate: bool, data: Path | None) -> tuple[Split, Split]:
    """Training and test data."""
    s = SETTINGS[setting]
    options = argparse.Namespace(
        data=data if s.file else None,
        split=s.split,
        modalities=s.modalities,
        validate=validate,
        quick=False,
    )
    found: tuple[Split, Split] = EXAMPLES[s.example].make_data(options, seed)
    return found


def make_optimizer(model: LateFusion, job: Job) -> torch.optim.Optimizer:
    """A plain one for sums, ours around it for rules."""
    base: torch.optim.Optimizer
    if SETTINGS[job.setting].adamw:
        base = torch.optim.AdamW(model.parameters(), job.lr, weight_decay=0.01)
    else:
        base = torch.optim.SGD(model.parameters(), job.lr, momentum=0.9)
    if job.method in SUMS:
        return base
    return MMParetoOptimizer(base, **INTEGRATIONS[job.method])


def losses_of(model: LateFusion, batch: Split, joint: float, own: float) -> dict[str, Tensor]:
    """By head; encoders get the joint loss's gradient and their own so many times."""
    features = model.features(*batch.inputs)
    shared = [with_gradient_times(joint, x) for x in features.values()]
    logits = {"mm": model.mm_head(torch.cat(shared, dim=1))}
    for name, head in model.heads.items():
        logits[name] = head(with_gradient_times(own, features[name]))
    return {head: cross_entropy(output, batch.labels[head]) for head, output in logits.items()}


def with_gradient_times(factor: float, x: Tensor) -> Tensor:
    """``x``, whose gradient arrives ``factor`` times."""
    if factor == 1:
        return x
    return x.detach() + factor * (x - x.detach()) if factor else x.detach()


@torch.no_grad()
def accuracies(model: LateFusion, test: Split) -> dict[str, float]:
    """In %, by head; the ensemble is the mean of the single heads' probabilities."""
    model.eval()
    parts = [model(*part.inputs) for part in batches(test, torch.arange(len(test)), 1000)]
    outputs = {head: torch.cat([part[head] for part in parts]) for head in parts[0]}
    outputs[ENSEMBLE] = torch.stack([outputs[name].softmax(-1) for name in model.heads]).mean(0)
    right = {head: output.argmax(-1) == test.labels["mm"] for head, output in outputs.items()}
    return {head: percentage(hits) for head, hits in right.items()}


def shares(seen: dict[str, list[BlockStats]]) -> Result:
    """In % of the steps, by block: of conflict, and of steps whose plain sum harms a loss."""
    return {
        kind: {
            block: percentage(torch.stack([getattr(stats, kind) for stats in each]))
            for block, each in seen.items()
        }
        for kind in ("conflict", "harmful")
    }


def percentage(hits: Tensor) -> float:
    return round(100 * float(hits.double().mean()), 3)
