"""Time of one step on several processes, each with a batch of its own; writes RANKS.md and JSON.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --network "one machine"
    torchrun --nproc-per-node 8 benchmarks/ranks.py --device cuda --network "NVLink"
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        benchmarks/ranks.py --network "two machines, 1 Gbit/s"

What is in the JSON for the same machine, network and commit is not measured again, so that a run
goes on where one has failed. It has not been run on GPUs yet.

The published tables are of two network namespaces on one machine, joined by a veth pair (iproute2),
each with a process on a core of its own; ``tc qdisc add dev ... root tbf rate 1gbit burst 512kb
latency 100ms`` on both ends is the limit.

Ratios are to a floor that differentiates each loss and, while the next one is differentiated, adds
up its gradient over the ranks, in one collective; gradients are merely added. Steps are
interleaved in an order drawn at random for each round; ratios are medians of those within a round,
with the interval of that median by order statistics. Times are rank 0's, from one barrier to the
next. The tables of commit c0818d6 have two more rows: that version could average gradients "one by
one", while the next loss is differentiated, or "at the end", after the last backward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from many_losses import Task, base_of, convolutions, detector, small_mlp, wide_mlp
from methods import Step
from step_time import are_of_one_run, commit_here, interleaved, line_of, ratio
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmpareto_optim import MMParetoOptimizer

FOLDER = Path(__file__).parent
CASES: dict[str, tuple[Callable[[int], Task], int, int]] = {
    "convolutions, 3 losses": (convolutions, 3, 20),
    "convolutions, 10 losses": (convolutions, 10, 12),
    "wide mlp, 3 losses": (wide_mlp, 3, 12),
    "wide mlp, 10 losses": (wide_mlp, 10, 12),
    "small mlp, 3 losses": (small_mlp, 3, 100),
    "detector, 6 losses": (detector, 6, 12),
}
"""Builder, losses, rounds."""


class Sum(nn.Module):
    """The sum of a task's losses, as DistributedDataParallel wants to have it called."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._losses_of = task.losses_of

    def forward(self) -> Tensor:
        return torch.stack(self._losses_of(self.model)).sum()


def plain(task: Task) -> Step:
    optimizer = base_of(task.model)
    total = DistributedDataParallel(Sum(task))

    def step() -> None:
        optimizer.zero_grad()
        total().backward()
        optimizer.step()

    return step


def floor(task: Task) -> Step:
    optimizer = base_of(task.model)
    params = list(task.model.parameters())

    def step() -> None:
        losses = task.losses_of(task.model)
        begun = []
        for loss in losses:
            retain = loss is not losses[-1]
            found = torch.autograd.grad(loss, params, retain_graph=retain, allow_unused=True)
            flat = torch.cat([gradient.reshape(-1) for gradient in found if gradient is not None])
            flat /= dist.get_world_size()
            begun.append((dist.all_reduce(flat, async_op=True), flat, found))
        optimizer.zero_grad()
        for work, flat, found in begun:
            work.wait()
            reached = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
            means = flat.split([gradient.numel() for _, gradient in reached])
            for (param, gradient), mean in zip(reached, means, strict=True):
                mean = mean.view(gradient.shape)
                param.grad = mean if param.grad is None else param.grad + mean
        optimizer.step()

    return step


def ours(task: Task, *, features: bool = False, reduce_dtype: torch.dtype | None = None) -> Step:
    optimizer = MMParetoOptimizer(base_of(task.model), reduce_dtype=reduce_dtype)
    trunk = task.model["trunk"]  # type: ignore[index]
    seen: dict[str, Tensor] = {}
    trunk.register_forward_hook(lambda _, __, output: seen.update(trunk=output))

    def step() -> None:
        losses = {str(i): loss for i, loss in enumerate(task.losses_of(task.model))}
        optimizer.zero_grad()
        optimizer.step(losses=losses, features=seen if features else None)

    return step


PLAIN, FLOOR = "DDP, one backward of the sum", "floor"
METHODS: dict[str, Callable[[Task], Step]] = {
    PLAIN: plain,
    FLOOR: floor,
    "ours": ours,
    "ours, in bfloat16": lambda task: ours(task, reduce_dtype=torch.bfloat16),
    "ours, features": lambda task: ours(task, features=True),
}


def start(device_type: str) -> torch.device:
    """Join the other ranks; the device of this one."""
    if device_type == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def wait_for_all() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier()


def measure(case: str, rounds: int | None, device: torch.device) -> dict[str, list[float]]:
    build, losses, usual = CASES[case]
    torch.manual_seed(0)
    with device:
        task = build(losses)
    steps = {m: make(Task(deepcopy(task.model), task.losses_of)) for m, make in METHODS.items()}
    for step in [*steps.values()] * 2:
        step()
    return interleaved(steps, rounds or usual, wait=wait_for_all)


def table(case: str, seconds: dict[str, list[float]]) -> str:
    build, losses, _ = CASES[case]
    parameters = sum(param.numel() for param in build(losses).model.parameters())
    lines = [
        f"## {case}\n",
        f"{parameters / 1e6:.2f} M parameters: one gradient is {parameters * 4 / 1e6:.1f} MB.\n",
        "| | ms | middle half | x floor | its 95 % interval | x DDP |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        x_plain = f"{np.median(np.divide(times, seconds[PLAIN])):.2f}"
        lines.append(line_of(method, times, *ratio(times, seconds[FLOOR]), x_plain))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--network", required=True, help="what lies between the ranks, in words")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "RANKS.md")
    options = parser.parse_args()
    device = start(options.device)
    each = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} core"
    )
    facts = {
        "machine": f"{dist.get_world_size()} ranks of one {each}, {dist.get_backend()}",
        "network": options.network,
        "commit": commit_here(),
    }
    results = measured_before(options.output, facts)
    for case in options.cases:
        if case not in results:
            results[case] = measure(case, options.rounds, device)
        if dist.get_rank() == 0:
            write(options.output, facts, results)
    dist.destroy_process_group()


def measured_before(output: Path, facts: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """What rank 0 finds in the JSON, on all ranks."""
    kept = output.with_suffix(".json")
    is_there = dist.get_rank() == 0 and kept.exists()
    found = [json.loads(kept.read_text()) if is_there else {}]
    dist.broadcast_object_list(found)
    seconds: dict[str, dict[str, list[float]]] = found[0].pop("s", {})
    return seconds if are_of_one_run(found[0], facts) else {}


def write(output: Path, facts: dict[str, str], results: dict[str, dict[str, list[float]]]) -> None:
    head = (
        f"# Time of one step on several processes, {facts['network']}\n\n"
        f"{facts['machine']}, PyTorch {torch.__version__}, commit {facts['commit']}. Written by\n"
        "`benchmarks/ranks.py`; its docstring says how ratios are made.\n"
    )
    tables = (table(case, seconds) for case, seconds in results.items())
    output.write_text("\n".join([head, *tables]))
    output.with_suffix(".json").write_text(json.dumps(facts | {"s": results}))


if __name__ == "__main__":
    main()
