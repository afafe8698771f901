"""An experiment below the two-backward floor: both backward passes as one batched pass.

    python benchmarks/batched_backward.py

The losses are differentiated down to the features, one by one, and their gradients there are
sent through each encoder together (``is_grads_batched``, that is ``torch.vmap`` over the
backward pass), which gives the exact gradient of each loss. Prints the time over the floor's,
medians of interleaved rounds.
"""

from __future__ import annotations

from copy import deepcopy
from time import perf_counter

import numpy as np
import torch
from methods import Step, sgd, two_backward_floor
from models import Inputs, LateFusion
from step_time import CPU_CASES, setting


def batched(model: LateFusion, inputs: Inputs) -> Step:
    optimizer = sgd(model)
    encoders = {name: list(getattr(model, name).parameters()) for name in ("audio", "visual")}
    encoded = {param for params in encoders.values() for param in params}
    heads = [param for param in model.parameters() if param not in encoded]

    def step() -> None:
        spec, image, label = inputs
        features = model.features(spec, image)
        losses = model.losses(features, label)
        optimizer.zero_grad()
        targets = [*features.values(), *heads]
        found = [
            torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
            for loss in losses.values()
        ]
        for param, *gradients in zip(heads, *(f[len(features) :] for f in found), strict=True):
            param.grad = sum(g for g in gradients if g is not None)
        for index, (name, feature) in enumerate(features.items()):
            rows = torch.stack([f[index] for f in found if f[index] is not None])
            params = encoders[name]
            for param, both in zip(
                params,
                torch.autograd.grad(feature, params, rows, is_grads_batched=True),
                strict=True,
            ):
                param.grad = both.sum(0)
        optimizer.step()

    return step


def main() -> None:
    for case, (*_, rounds) in CPU_CASES.items():
        model, inputs = setting(case, torch.device("cpu"))
        steps = [make(deepcopy(model), inputs) for make in (two_backward_floor, batched)]
        times: list[list[float]] = []
        for _ in range(rounds + 2):
            times.append([])
            for step in steps:
                started = perf_counter()
                step()
                times[-1].append(perf_counter() - started)
        ratios = [both / floor for floor, both in times[2:]]
        print(f"{case}: {np.median(ratios):.2f} x floor", flush=True)


if __name__ == "__main__":
    main()
