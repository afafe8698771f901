"""What the examples share: digits, the methods, training, the table and the options."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from mmpareto_optim import MMParetoOptimizer
from mmpareto_optim.integration import Integration

GAMMA = 1.5


def longer_sum(gram: Tensor) -> Tensor:
    """A control: the plain sum times gamma, so that only the step is longer."""
    return torch.full_like(gram[0], GAMMA)


# The first trains the shared parts by the joint loss alone (the other heads read detached
# features, so that they can be scored too); the others differ in how they integrate gradients.
METHODS: dict[str, Integration] = {
    "one joint loss": "uniform",
    "uniform": "uniform",
    "uniform x 1.5": longer_sum,
    "conventional Pareto": "pareto",
    "MMPareto": "mmpareto",
}
JOINT = "one joint loss"
BATCH_SIZE = 64

Tensors = dict[str, Tensor]


@dataclass
class Split:
    """Inputs of the model and the label that each of its heads should tell."""

    inputs: tuple[Tensor, ...]
    labels: Tensors

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: Tensor) -> Split:
        return Split(
            tuple(x[index] for x in self.inputs), {k: y[index] for k, y in self.labels.items()}
        )


@dataclass
class Run:
    """One training: accuracy in % for each head, the cosine of each block step by step."""

    accuracy: dict[str, float]
    cosines: dict[str, list[float]]


@dataclass
class Comparison:
    """All runs of one example, by method; a list entry a seed."""

    options: argparse.Namespace
    runs: dict[str, list[Run]] = field(default_factory=lambda: {name: [] for name in METHODS})

    def accuracies(self, method: str, head: str) -> list[float]:
        return [run.accuracy[head] for run in self.runs[method]]

    def summary(self, method: str, head: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds, 0 for a single one."""
        values = self.accuracies(method, head)
        return mean(values), stdev(values) if len(values) > 1 else 0.0

    def conflicting(self, method: str, block: str) -> float | None:
        """Share in % of the steps with cos < 0; None where several losses never met."""
        cosines = [cosine for run in self.runs[method] for cosine in run.cosines.get(block, ())]
        return 100 * mean(cosine < 0 for cosine in cosines) if cosines else None


def parse_options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of the four MNIST IDX files (.gz)")
    parser.add_argument("--seeds", type=int, help="runs a method (default: digits 5, mnist 3)")
    parser.add_argument("--epochs", type=int, help="default: digits 30, mnist 3")
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the schedule, all methods")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.data == "mnist" and options.data_dir is None:
        parser.error("--data mnist needs --data-dir, a folder with train-images-idx3-ubyte.gz ...")
    if options.seeds is None:
        options.seeds = 5 if options.data == "digits" else 3
    if options.epochs is None:
        options.epochs = 30 if options.data == "digits" else 3
    return options


def load(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, height, width) in 0..1 and labels, then those for the test."""
    if options.data == "mnist":
        return (
            _idx(options.data_dir / "train-images-idx3-ubyte.gz") / 255,
            _idx(options.data_dir / "train-labels-idx1-ubyte.gz").long(),
            _idx(options.data_dir / "t10k-images-idx3-ubyte.gz") / 255,
            _idx(options.data_dir / "t10k-labels-idx1-ubyte.gz").long(),
        )
    digits = load_digits()
    parts = train_test_split(
        digits.images / 16, digits.target, test_size=0.3, stratify=digits.target, random_state=0
    )
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return train_x.float(), train_y, test_x.float(), test_y


def _idx(path: Path) -> Tensor:
    """Read an IDX file: two zero bytes, type (8: unsigned byte), rank, sizes, values."""
    with gzip.open(path) as file:
        _, _, kind, rank = file.read(4)
        if kind != 8:
            raise ValueError(f"{path} does not hold unsigned bytes")
        sizes = np.frombuffer(file.read(4 * rank), dtype=">u4")
        return torch.tensor(np.frombuffer(file.read(), dtype=np.uint8).reshape(sizes))


class Encoder(nn.Sequential):
    """Images (n, channels, height, width) to features (n, 64)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
        )


def compare(
    options: argparse.Namespace,
    make_data: Callable[[argparse.Namespace, int], tuple[Split, Split]],
    make_model: Callable[[bool], nn.Module],
) -> Comparison:
    """Train and score every method for every seed; the same data and start for each method.

    ``make_model(joint)`` builds a model whose forward gives logits by head; with ``joint``
    only the joint head's loss reaches what the heads share.
    """
    comparison = Comparison(options)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        total = len(METHODS) * options.seeds * options.epochs
        bar = progress.add_task("training", total=total)
        for seed in range(options.seeds):
            train_split, test_split = make_data(options, seed)
            for method, integration in METHODS.items():
                progress.update(bar, description=f"{method}, seed {seed}")
                torch.manual_seed(seed)
                model = make_model(method == JOINT)
                sgd = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
                optimizer = MMParetoOptimizer(sgd, integration=integration, gamma=GAMMA)
                steps = options.epochs * ceil(len(train_split) / BATCH_SIZE)
                # Drives the wrapper like any optimizer; the warm-up keeps every seed stable.
                schedule = OneCycleLR(optimizer, options.lr, steps, cycle_momentum=False)
                cosines: dict[str, list[Tensor]] = {}
                for _ in range(options.epochs):
                    train_epoch(model, optimizer, schedule, train_split, cosines)
                    progress.advance(bar)
                curves = {block: torch.stack(values).tolist() for block, values in cosines.items()}
                comparison.runs[method].append(Run(accuracy(model, test_split), curves))
    return comparison


def train_epoch(
    model: nn.Module,
    optimizer: MMParetoOptimizer,
    schedule: OneCycleLR,
    split: Split,
    cosines: dict[str, list[Tensor]],
) -> None:
    model.train()
    for index in torch.randperm(len(split)).split(BATCH_SIZE):
        batch = split[index]
        logits = model(*batch.inputs)
        losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in logits}
        optimizer.zero_grad()
        optimizer.step(losses=losses)
        schedule.step()
        for block, stats in optimizer.stats.items():
            cosines.setdefault(block, []).append(stats.cosine)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> dict[str, float]:
    model.eval()
    right: dict[str, int] = {}
    for index in torch.arange(len(split)).split(1000):
        batch = split[index]
        for head, logits in model(*batch.inputs).items():
            hits = int((logits.argmax(-1) == batch.labels[head]).sum())
            right[head] = right.get(head, 0) + hits
    return {head: 100 * hits / len(split) for head, hits in right.items()}


def report(
    comparison: Comparison,
    name: str,
    heads: Mapping[str, str],
    blocks: Mapping[str, str],
    started: float,
) -> Path:
    """Print the tables (column titles by head and by block) and save the runs as JSON."""
    options = comparison.options
    title = f"{options.data}, {options.seeds} seeds: test accuracy in %, mean ± std"
    accuracies = Table("", *heads.values(), title=title)
    conflicts = Table("", *blocks.values(), title="Steps in conflict (cos < 0) in %")
    for method in METHODS:
        summaries = [comparison.summary(method, head) for head in heads]
        accuracies.add_row(
            method, *(f"{middle:.2f} ± {spread:.2f}" for middle, spread in summaries)
        )
        shares = [comparison.conflicting(method, block) for block in blocks]
        if None not in shares:
            conflicts.add_row(method, *(f"{share:.0f}" for share in shares))
    console = Console()
    console.print(accuracies, conflicts)

    options.output.mkdir(parents=True, exist_ok=True)
    path: Path = options.output / f"{name}_{options.data}"
    settings = {key: str(value) for key, value in vars(options).items()}
    runs = {
        method: [{"accuracy": run.accuracy, "cosines": run.cosines} for run in runs]
        for method, runs in comparison.runs.items()
    }
    seconds = perf_counter() - started
    document = {"settings": settings, "torch": torch.__version__, "seconds": seconds, "runs": runs}
    path.with_suffix(".json").write_text(json.dumps(document))
    console.print(f"{seconds:.0f} s. Runs: {path.with_suffix('.json')}")
    return path.with_suffix(".png")


def plot_cosines(axes: Axes, comparison: Comparison, block: str) -> None:
    """Cosine over training of the methods that keep several losses: mean and std over seeds."""
    for number, method in enumerate(METHODS):
        if method not in ("uniform", "MMPareto"):
            continue
        cosines = np.array([run.cosines[block] for run in comparison.runs[method]])
        window = max(1, cosines.shape[1] // 50)
        kernel = np.ones(window) / window
        curves = np.array([np.convolve(row, kernel, mode="valid") for row in cosines])
        epochs = np.arange(window, cosines.shape[1] + 1) / cosines.shape[1]
        epochs *= comparison.options.epochs
        middle, spread = curves.mean(0), curves.std(0)
        axes.plot(epochs, middle, f"C{number}", label=method)
        axes.fill_between(epochs, middle - spread, middle + spread, color=f"C{number}", alpha=0.2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.legend(fontsize="small")
