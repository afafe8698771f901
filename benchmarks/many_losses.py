"""Time and memory of a step with many losses on one trunk; writes MANY_LOSSES.md and JSON.

    python benchmarks/many_losses.py          # TorchJD is measured where it is installed
    python benchmarks/many_losses.py --rounds 5 --cases "wide mlp, 20 losses"

The *floor* is one backward pass a loss whose gradients are merely added, and the base's step.
"backwards, read twice" has those passes, keeps the gradients, reads each of them twice (a sum of
its numbers), and adds nothing: coefficients need inner products, so no exact method reads less.
Methods are interleaved, in an order drawn at random for each round; ratios are medians of the
ratios within a round, with the interval of that median by order statistics. TorchJD takes its
MGDA on the losses one at a time, and on all of them in one pass under ``torch.vmap`` ("batched").
Peak memory is what two steps of one method take beyond the model and the batch, in a process of
its own, with what PyTorch loads on first use, and where memory that is freed goes back to the
system (otherwise glibc's heap keeps holes, which are no method's).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from methods import Step, backward_floor
from models import mlp, resnet18
from step_time import (
    commit_here,
    installed,
    interleaved,
    line_of,
    megabytes,
    ratio,
    resident_high_water,
)
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer

FOLDER = Path(__file__).parent
LossesOf = Callable[[nn.Module], list[Tensor]]


@dataclass
class Task:
    """A model, and its losses on a batch."""

    model: nn.Module
    losses_of: LossesOf


def heads_on(trunk: nn.Module, width: int, given: Tensor, losses: int) -> Task:
    """One trunk, and a linear head with a squared error of its own for each loss."""
    heads = nn.ModuleList(nn.Linear(width, 4) for _ in range(losses))
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    targets = torch.randn(losses, len(given), 4)

    def losses_of(model: nn.Module) -> list[Tensor]:
        assert isinstance(model, nn.ModuleDict)
        features, heads = model["trunk"](given), model["heads"]
        assert isinstance(heads, nn.ModuleList)
        pairs = zip(heads, targets, strict=True)
        return [(head(features) - target).square().mean() for head, target in pairs]

    return Task(model, losses_of)


def wide_mlp(losses: int) -> Task:
    return heads_on(mlp(1024, 1024, 4), 1024, torch.randn(128, 1024), losses)


def small_mlp(losses: int) -> Task:
    return heads_on(mlp(32, 64, 3), 64, torch.randn(16, 32), losses)


def convolutions(losses: int) -> Task:
    widths = [3, 64, 128, 256]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return heads_on(trunk, 256, torch.randn(16, 3, 32, 32), losses)


def physics_informed(losses: int) -> Task:
    """Laplace's equation by a 4x50 network: residual, boundary and data, 2000 points."""
    assert losses == 3
    widths = [2, 50, 50, 50, 50]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(50, 1))
    inside = torch.rand(2000, 2)
    border, seen = torch.rand(200, 2).round(decimals=0), torch.rand(100, 2)
    values = seen.sin().sum(1, keepdim=True)

    def losses_of(model: nn.Module) -> list[Tensor]:
        points = inside.detach().requires_grad_()
        (first,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        second = [
            torch.autograd.grad(first[:, k].sum(), points, create_graph=True)[0][:, k]
            for k in range(2)
        ]
        residual = (second[0] + second[1]).square().mean()
        return [residual, model(border).square().mean(), (model(seen) - values).square().mean()]

    return Task(model, losses_of)


def detector(losses: int) -> Task:
    """A small detector's proportions: ResNet-18 under many losses, two images of 64 x 64."""
    return heads_on(resnet18(3), 512, torch.randn(2, 3, 64, 64), losses)


Case = tuple[Callable[[int], Task], int, int]
"""Builder, losses, rounds."""
CASES: dict[str, Case] = {
    "convolutions, 5 losses": (convolutions, 5, 20),
    "convolutions, 20 losses": (convolutions, 20, 8),
    "wide mlp, 5 losses": (wide_mlp, 5, 40),
    "wide mlp, 10 losses": (wide_mlp, 10, 24),
    "wide mlp, 20 losses": (wide_mlp, 20, 16),
    "wide mlp, 40 losses": (wide_mlp, 40, 10),
    "small mlp, 3 losses": (small_mlp, 3, 300),
    "small mlp, 20 losses": (small_mlp, 20, 100),
    "physics-informed, 3 losses": (physics_informed, 3, 60),
    "detector, 3 losses": (detector, 3, 20),
    "detector, 6 losses": (detector, 6, 12),
    "detector, 12 losses": (detector, 12, 8),
    "detector, 18 losses": (detector, 18, 6),
}


def base_of(model: nn.Module) -> torch.optim.SGD:
    # Slow enough that no method learns the one batch by heart while it is timed.
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)


def plain(task: Task) -> Step:
    optimizer = base_of(task.model)

    def step() -> None:
        losses = task.losses_of(task.model)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def floor(task: Task) -> Step:
    return backward_floor(base_of(task.model), lambda: task.losses_of(task.model))


def read_twice(task: Task) -> Step:
    """The floor, and each gradient read twice: for inner products, and with coefficients."""
    optimizer = base_of(task.model)
    params = list(task.model.parameters())

    def step() -> None:
        losses = task.losses_of(task.model)
        optimizer.zero_grad()
        last = losses[-1]
        found = [
            torch.autograd.grad(each, params, retain_graph=each is not last, allow_unused=True)
            for each in losses
        ]
        for gradient in [*found, *found]:
            for piece in gradient:
                if piece is not None:
                    piece.sum()
        for row in found:
            for param, piece in zip(params, row, strict=True):
                if piece is not None and param.grad is None:
                    param.grad = piece
        optimizer.step()

    return step


def torchjd(task: Task, at_once: int | None) -> Step:
    from torchjd.aggregation import MGDA
    from torchjd.autojac import backward, jac_to_grad

    optimizer, aggregator = base_of(task.model), MGDA()

    def step() -> None:
        losses = task.losses_of(task.model)
        optimizer.zero_grad()
        backward(losses, parallel_chunk_size=at_once)
        jac_to_grad(task.model.parameters(), aggregator)
        optimizer.step()

    return step


def ours(task: Task) -> Step:
    optimizer = MMParetoOptimizer(base_of(task.model))

    def step() -> None:
        losses = task.losses_of(task.model)
        optimizer.zero_grad()
        optimizer.step(losses={str(i): loss for i, loss in enumerate(losses)})

    return step


METHODS: dict[str, Callable[[Task], Step]] = {
    "plain training": plain,
    "m-backward floor": floor,
    "backwards, read twice": read_twice,
    "TorchJD, one at a time": lambda task: torchjd(task, 1),
    "TorchJD, batched": lambda task: torchjd(task, None),
    "ours": ours,
}
FLOOR, PLAIN, RIVALS = "m-backward floor", "plain training", [n for n in METHODS if "JD" in n]


CLOCKS = {"wall": perf_counter, "cpu": process_time}


def task_of(case: str) -> Task:
    build, losses, _ = CASES[case]
    torch.manual_seed(0)
    return build(losses)


def peak_here(case: str, method: str) -> float:
    """MB that two steps take in this process; ask in a fresh one."""
    step = METHODS[method](task_of(case))
    before = resident_high_water()
    for _ in range(2):
        step()
    return resident_high_water() - before


def peak(case: str, method: str) -> float:
    command = [sys.executable, __file__, "--peak", case, method]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout)


def measure(case: str, rounds: int | None, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each step, by method."""
    task = task_of(case)
    steps = {m: METHODS[m](Task(deepcopy(task.model), task.losses_of)) for m in installed(METHODS)}
    for step in [*steps.values()] * 2:
        step()
    return interleaved(steps, rounds or CASES[case][-1], clock=clock, description=case)


def table(case: str, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    parameters = sum(param.numel() for param in task_of(case).model.parameters())
    lines = [
        f"## {case}\n",
        f"{parameters / 1e6:.2f} M parameters: one gradient is {parameters * 4 / 2**20:.1f} MB.\n",
        "| | ms | middle half | x floor | its 95 % interval | x TorchJD | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rivals = [seconds[name] for name in RIVALS if name in seconds]
    fastest = min(rivals, key=np.median) if rivals else None
    for method, times in seconds.items():
        x_rival = f"{np.median(np.divide(times, fastest)):.2f}" if fastest else ""
        cells = (*ratio(times, seconds[FLOOR]), x_rival, megabytes(peaks, method))
        lines.append(line_of(method, times, *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "MANY_LOSSES.md")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the process's own time, where others share the machine",
    )
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help="print MB and end")
    options = parser.parse_args()
    if options.peak:
        print(peak_here(*options.peak))
        return

    commit = commit_here()
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    results = {case: measure(case, options.rounds, CLOCKS[options.clock]) for case in options.cases}
    peaks = {case: {m: peak(case, m) for m in installed(METHODS)} for case in options.cases}
    head = (
        "# Time and memory with many losses\n\n"
        f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit}, {options.clock} time. Written "
        "by `benchmarks/many_losses.py`; its docstring says\nhow "
        "ratios are made. *x TorchJD* is over the faster of its two ways.\n"
    )
    tables = (table(case, seconds, peaks[case]) for case, seconds in results.items())
    options.output.write_text("\n".join([head, *tables]))
    document = {"machine": machine, "commit": commit, "s": results, "peak_mb": peaks}
    options.output.with_suffix(".json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
