"""Physics-informed networks: residual, boundary and initial conditions are losses that fight.

A network of 4 hidden layers of 50 tanh is trained to solve a partial differential equation by the
mean square of each condition, at points drawn anew in each step: Helmholtz and Klein-Gordon as in
Wang, Teng & Perdikaris (2021, arXiv 2001.04536), Burgers as in Raissi et al. (2019), and Poisson.
All losses share one network, which is found to be one block. Prints the relative L2 error on a
grid, the steps in conflict and those in which the plain sum harms a loss; needs no data.

    python pinn.py                      # Helmholtz, 3 seeds of 2000 steps: about 6 minutes
    python pinn.py --problem burgers --steps 10000
    python pinn.py --optimizer lbfgs --steps 200
    python pinn.py --problem poisson --blocks net   # the network named as one block by hand
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pinn_problems import PROBLEMS, Losses, Network, Points, Problem, relative_error
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from mmpareto_optim import BlockStats, MMParetoOptimizer

try:
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed: pip install '.[examples]' in a checkout brings it"
    ) from error

# Adam divides by the gradient's own size: a factor on all losses, such as gamma, changes nothing.
METHODS: dict[str, dict[str, Any]] = {
    "sum": {"integration": "uniform"},
    "sum, conditions x 100": {"integration": "uniform"},
    "conventional Pareto": {"integration": "pareto"},
    "ConFIG": {"integration": "config"},
    "UPGrad": {"integration": "upgrad"},
    "MMPareto": {"integration": "mmpareto"},
}
WEIGHTED = "sum, conditions x 100"
BLOCKS: dict[str, Callable[[Network], dict[str, Any] | None]] = {
    "found": lambda net: None,
    "net": lambda net: {"net": net},
    "bias apart": lambda net: {
        "net": [*net.hidden.parameters(), net.last.weight],
        "last bias": [net.last.bias],
    },
}
CHECKS = 40  # errors along a training


@dataclass
class Run:
    """One training: relative L2 error now and then, share of steps in conflict and harmful."""

    errors: list[float] = field(default_factory=list)
    conflict: float = 0.0
    harmful: float = 0.0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], usage="%(prog)s [--problem PROBLEM] [more options]"
    )
    parser.add_argument("--problem", choices=PROBLEMS, default="helmholtz")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help="default: all; sums for lbfgs",
    )
    parser.add_argument("--blocks", choices=BLOCKS, default="found", help="default: found")
    parser.add_argument("--optimizer", choices=["adam", "lbfgs"], default="adam")
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method (default: 3)")
    parser.add_argument("--steps", type=int, default=2000, help="of a run (default: 2000)")
    parser.add_argument("--lr", type=float, help="default: 5e-3 for adam, 1 for lbfgs")
    parser.add_argument("--points", type=int, default=256, help="of the residual (default: 256)")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if options.methods is None:
        # LBFGS searches along the line by the sum: what is integrated is not its gradient.
        sums = [name for name, given in METHODS.items() if given["integration"] == "uniform"]
        options.methods = sums if options.optimizer == "lbfgs" else list(METHODS)
    if options.lr is None:
        options.lr = 5e-3 if options.optimizer == "adam" else 1.0
    return options


def weighted(losses: Losses, weight: float) -> Losses:
    """All losses but the residual times ``weight``."""
    return {name: loss if name == "residual" else weight * loss for name, loss in losses.items()}


def base_optimizer(net: Network, options: argparse.Namespace) -> torch.optim.Optimizer:
    if options.optimizer == "lbfgs":
        return torch.optim.LBFGS(net.parameters(), options.lr, line_search_fn="strong_wolfe")
    return torch.optim.Adam(net.parameters(), options.lr)


def schedule_of(optimizer: MMParetoOptimizer, options: argparse.Namespace) -> LRScheduler:
    """A cosine to zero, so that the last error is not one of Adam's jumps; LBFGS searches."""
    if options.optimizer == "lbfgs":
        return LambdaLR(optimizer, lambda step: 1.0)
    return CosineAnnealingLR(optimizer, options.steps)


def take_step(
    net: Network, optimizer: MMParetoOptimizer, losses_of: Callable[[], Losses]
) -> dict[str, BlockStats]:
    """One step; the closure may be called again, as LBFGS does."""

    def closure() -> Losses:
        optimizer.zero_grad()
        return losses_of()

    optimizer.step(closure)
    return optimizer.stats


def train(
    problem: Problem,
    method: str,
    options: argparse.Namespace,
    after_step: Callable[[], object],
) -> Run:
    net = Network()
    blocks = BLOCKS[options.blocks](net)
    optimizer = MMParetoOptimizer(base_optimizer(net, options), blocks, **METHODS[method])
    schedule = schedule_of(optimizer, options)
    weight = 100.0 if method == WEIGHTED else 1.0

    fixed = problem.points(options.points)

    def losses_at(points: Points) -> Losses:
        return weighted(problem.losses(net, points), weight)

    run = Run()
    grams = []
    for step in range(options.steps):
        # LBFGS compares losses of several steps: they must be at the same points.
        points = fixed if options.optimizer == "lbfgs" else problem.points(options.points)
        losses_of = partial(losses_at, points)
        stats = take_step(net, optimizer, losses_of)
        grams.append(next(iter(stats.values())).gram)  # of the network, the first block
        schedule.step()
        if (step + 1) % max(1, options.steps // CHECKS) == 0 or step + 1 == options.steps:
            run.errors.append(relative_error(problem, net))
        after_step()
    run.conflict, run.harmful = shares(grams)
    return run


def shares(grams: Iterable[Tensor]) -> tuple[float, float]:
    """Share in % of the steps in conflict, and of those whose plain sum harms a loss."""
    gram = torch.stack(list(grams))
    conflict = (gram < 0).flatten(1).any(1)
    harmful = (gram.sum(-1) < 0).any(1)
    return 100 * float(conflict.float().mean()), 100 * float(harmful.float().mean())


def compare(options: argparse.Namespace) -> dict[str, list[Run]]:
    """The same start and the same points for each method, by seed."""
    problem = PROBLEMS[options.problem]
    found: dict[str, list[Run]] = {method: [] for method in options.methods}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(found) * options.seeds * options.steps)
        for seed in range(options.seed, options.seed + options.seeds):
            for method, runs in found.items():
                progress.update(bar, description=f"{method}, seed {seed}")
                torch.manual_seed(seed)
                runs.append(train(problem, method, options, partial(progress.advance, bar)))
    return found


def report(found: dict[str, list[Run]], options: argparse.Namespace, started: float) -> Path:
    """Print the table and save the runs; gives the path for the picture."""
    title = (
        f"{options.problem}: median relative error, {options.seeds} seeds, {options.steps} steps"
    )
    table = Table(title=title)
    for column in ("", "error", "range", "conflict %", "harmful %"):
        table.add_column(column, no_wrap=True)
    for method, runs in found.items():
        last = [run.errors[-1] for run in runs]
        errors = (f"{np.median(last):.3g}", f"{min(last):.3g} to {max(last):.3g}")
        steps = (np.mean([run.conflict for run in runs]), np.mean([run.harmful for run in runs]))
        table.add_row(method, *errors, *(f"{share:.0f}" for share in steps))
    console = Console()
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path: Path = options.output / f"pinn_{options.problem}"
    seconds = perf_counter() - started
    document = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "torch": torch.__version__,
        "seconds": seconds,
        "runs": {method: [vars(run) for run in runs] for method, runs in found.items()},
    }
    path.with_suffix(".json").write_text(json.dumps(document))
    console.print(f"{seconds:.0f} s. Runs: {path.with_suffix('.json')}")
    return path.with_suffix(".png")


def plot(found: dict[str, list[Run]], options: argparse.Namespace, path: Path) -> None:
    """The error along the training, median and range over the seeds, beside the solution."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, runs in found.items():
        errors = np.array([run.errors for run in runs])
        steps = np.linspace(0, options.steps, errors.shape[1] + 1)[1:]
        (line,) = left.plot(steps, np.median(errors, 0), label=method)
        left.fill_between(steps, errors.min(0), errors.max(0), color=line.get_color(), alpha=0.15)
    left.set(yscale="log", xlabel="step", ylabel="relative L2 error")
    left.set_title("Error: median and range over the seeds")
    left.legend(fontsize="small")
    problem = PROBLEMS[options.problem]
    grid = problem.grid()
    image = right.tripcolor(*grid.T, problem.solution(grid), cmap="RdBu_r", shading="gouraud")
    right.set(
        title=f"Solution: {options.problem.replace('_', ' ')}",
        xlabel=problem.axes[0],
        ylabel=problem.axes[1],
    )
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(arguments)
    found = compare(options)
    plot(found, options, report(found, options, started))


if __name__ == "__main__":
    main()
