"""What UnimodalHeads and a loss for each modality add to a step with one joint loss.

    python benchmarks/unimodal_heads.py
    python benchmarks/unimodal_heads.py --rounds 5 --cases "transformer, batch 16"

Interleaved rounds as in step_time.py; a ratio is the median of the ratios within a round, with
its 95 % interval.
"""

from __future__ import annotations

import argparse
from copy import deepcopy

import numpy as np
import torch
from methods import Step
from models import CLASSES, Inputs, LateFusion
from step_time import CASES as STEP_CASES
from step_time import interleaved, ratio, setting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer, UnimodalHeads

CASES = ("mlp, width 512, batch 16", "transformer, batch 16", "two ResNet-18, batch 16")
JOINT = "one joint loss"


class Joint(nn.Module):
    """The encoders and the joint head of a model."""

    def __init__(self, model: LateFusion) -> None:
        super().__init__()
        self.audio, self.visual, self.fusion = model.audio, model.visual, model.fusion

    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        dimension = -1 if isinstance(self.fusion, nn.Linear) else 1
        logits: Tensor = self.fusion(torch.cat([self.audio(spec), self.visual(image)], dimension))
        return logits


def joint_loss(model: Joint, inputs: Inputs) -> Step:
    spec, image, label = inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        loss = cross_entropy(model(spec, image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def with_heads(model: Joint, inputs: Inputs, how: str) -> Step:
    spec, image, label = inputs
    pool = 1 if isinstance(model.fusion, nn.Sequential) else None  # tokens
    heads = UnimodalHeads(model, {"audio": "audio", "visual": "visual"}, CLASSES, pool=pool)
    heads(spec, image)
    sgd = torch.optim.SGD(heads.parameters(), lr=1e-6, momentum=0.9)
    optimizer = MMParetoOptimizer(sgd)

    def step() -> None:
        output, unimodal = heads(spec, image)
        logits = {"mm": output, **unimodal}
        losses = {name: cross_entropy(each, label) for name, each in logits.items()}
        optimizer.zero_grad()
        if how == "sum":
            torch.stack(list(losses.values())).sum().backward()
            sgd.step()
        else:
            optimizer.step(losses=losses, features=heads.features if how == "features" else None)

    return step


def measure(case: str, rounds: int | None) -> dict[str, list[float]]:
    """Seconds of each step."""
    model, inputs = setting(case)
    joint = Joint(model)
    steps = {
        JOINT: joint_loss(deepcopy(joint), inputs),
        "heads, plain sum": with_heads(deepcopy(joint), inputs, "sum"),
        "heads, MMPareto": with_heads(deepcopy(joint), inputs, "exact"),
        "heads, MMPareto with features=": with_heads(deepcopy(joint), inputs, "features"),
    }
    for step in [*steps.values()] * 3:
        step()
    return interleaved(steps, rounds or STEP_CASES[case][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=STEP_CASES, default=CASES)
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    options = parser.parse_args()
    for case in options.cases:
        seconds = measure(case, options.rounds)
        print(f"{case}: times as long as a step with {JOINT}")
        for name, times in seconds.items():
            middle, interval = ratio(times, seconds[JOINT])
            print(f"  {name:32}{1000 * float(np.median(times)):9.2f} ms  {middle}  {interval}")


if __name__ == "__main__":
    main()
