"""Where weight gradients that stay factors pay: exact steps with and without them.

    python benchmarks/factored_weights.py

Wide encoders (four linear layers each) at several widths and batches. *Cost* is that of the
Gram matrix from factors over that of the weight gradient which they save, as the library counts
it: below 1 it takes them, and above it is made to here. Prints medians of the times over the
floor's, and of one time over the other, from rounds in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from time import perf_counter
from unittest.mock import patch

import numpy as np
import torch
from methods import Step, exact, losses_of, two_backward_floor
from models import build
from torch import Tensor

from mmpareto_optim import optimizer
from mmpareto_optim.factors import Layer, Layers, layers_of

SETTINGS = {
    512: (16, 48, 80, 112),
    1024: (16, 64, 160, 224),
    2048: (32, 192, 320, 448),
}
"""Batches by width."""
SECONDS = 8.0
"""For each setting and way."""


def none(losses: Iterable[Tensor], params: Sequence[Tensor]) -> Layers:
    return {}


def all_of(losses: Iterable[Tensor], params: Sequence[Tensor]) -> Layers:
    with patch.object(Layer, "pays", lambda layer: True):
        return layers_of(losses, params)


def with_layers(step: Step, find: Callable[..., Layers]) -> Step:
    def run() -> None:
        with patch.object(optimizer, "layers_of", find):
            step()

    return run


def main() -> None:
    print("width batch  cost | without x floor | with x floor | with x without")
    orders = np.random.default_rng(0)
    for width, batches in SETTINGS.items():
        for batch in batches:
            torch.manual_seed(0)
            model, inputs = build("wide mlp", batch, width)
            steps = {
                "floor": two_backward_floor(deepcopy(model), inputs),
                "without": with_layers(exact(deepcopy(model), inputs), none),
                "with": with_layers(exact(deepcopy(model), inputs), all_of),
            }
            times = measure(steps, orders)
            ratios = [
                np.median(np.divide(times[one], times[other]))
                for one, other in (("without", "floor"), ("with", "floor"), ("with", "without"))
            ]
            layers = all_of(losses_of(model, inputs).values(), list(model.parameters()))
            cost = max(layer.cost() for layer in layers.values())
            print(f"{width:5} {batch:5} {cost:5.2f} |", " | ".join(f"{r:.3f}" for r in ratios))


def measure(steps: dict[str, Step], orders: np.random.Generator) -> dict[str, list[float]]:
    """Seconds of each step; as many rounds as fit into the time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    while sum(map(sum, times.values())) < SECONDS * len(steps):
        for name in orders.permutation(list(steps)):
            started = perf_counter()
            steps[name]()
            times[name].append(perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
