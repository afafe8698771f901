"""What the examples share: digits, the methods, training, the table and the options."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from mmpareto_optim import MMParetoOptimizer

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed: pip install '.[examples]' in a checkout brings it"
    ) from error

# The first trains the shared parts by the joint loss alone (the other heads read detached
# features, so that they can be scored too); the others differ in how they integrate gradients.
# "uniform x 1.5" is a control: the plain sum times MMPareto's gamma, which only lengthens the step.
METHODS: dict[str, dict[str, Any]] = {
    "one joint loss": {"integration": "uniform", "check": False},  # its losses never meet
    "uniform": {"integration": "uniform"},
    "uniform x 1.5": {"integration": "uniform", "gamma": 1.5},
    "conventional Pareto": {"integration": "pareto"},
    "MMPareto": {"integration": "mmpareto"},
}
JOINT = "one joint loss"
BATCH_SIZE = 64
MNIST_FILES = tuple(
    f"mnist/{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
GET_MNIST = """
{folder} should hold
  mnist/       MNIST's files train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz,
               t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, for example from
               https://ossci-datasets.s3.amazonaws.com/mnist/
"""

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
    runs: dict[str, list[Run]]

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


def base_parser(description: str, default_data: str = "") -> argparse.ArgumentParser:
    """The options of every example that compares the methods."""
    parser = data_parser(description, default_data)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(repr(name) for name in METHODS)} (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, help="runs a method")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="peak of the schedule (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"))
    return parser


def data_parser(description: str, default_data: str = "") -> argparse.ArgumentParser:
    """The option of every example that reads data; what it reads without, if it can."""
    option = "[--data DIR]" if default_data else "--data DIR"
    usage = f"%(prog)s {option} [more options]"
    parser = argparse.ArgumentParser(description=description, usage=usage)
    default = f" (default: {default_data})" if default_data else ""
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder of the data{default}")
    return parser


def require_data(
    parser: argparse.ArgumentParser, folder: Path | None, files: Sequence[str], get_data: str
) -> Path:
    """The folder, if it has all files; otherwise exits with what is missing and where to get it."""
    if folder is None:
        parser.error("--data DIR is missing." + get_data.format(folder="DIR"))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        parser.error(f"{folder} has no {', '.join(missing)}." + get_data.format(folder=folder))
    return folder


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of an example that runs on scikit-learn's digits, or on MNIST with --data."""
    parser = base_parser(description, "scikit-learn's digits, without a folder")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="score on a part of the training images, without the test set: to choose --lr",
    )
    parser.set_defaults(lr=0.1)
    options = parser.parse_args(arguments)
    if options.data is not None:
        require_data(parser, options.data, MNIST_FILES, GET_MNIST)
    if options.seeds is None:
        options.seeds = 5 if options.data is None else 3
    if options.epochs is None:
        options.epochs = 30 if options.data is None else 3
    return options


def digits_name(options: argparse.Namespace) -> str:
    return "digits" if options.data is None else "mnist"


def load(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, height, width) in 0..1 and labels, then those for the test.

    With ``options.validate`` the latter are a part of the training images.
    """
    if options.data is not None:
        train_x, train_y, test_x, test_y = read_mnist(options.data)
        if options.validate:
            return train_x[:-10000], train_y[:-10000], train_x[-10000:], train_y[-10000:]
        return train_x, train_y, test_x, test_y
    digits = load_digits()
    parts = _stratified(digits.images / 16, digits.target, share=0.3)
    if options.validate:
        images, _, labels, _ = parts
        parts = _stratified(images, labels, share=0.2)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return train_x.float(), train_y, test_x.float(), test_y


def _stratified(images: np.ndarray, labels: np.ndarray, share: float) -> list[np.ndarray]:
    parts = train_test_split(images, labels, test_size=share, stratify=labels, random_state=0)
    return list(parts)


def read_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`load`, from MNIST_FILES in the folder."""
    train_x, train_y, test_x, test_y = (_idx(folder / file) for file in MNIST_FILES)
    return train_x / 255, train_y.long(), test_x / 255, test_y.long()


def _idx(path: Path) -> Tensor:
    """Read an IDX file: two zero bytes, type (8: unsigned byte), rank, sizes, values."""
    with gzip.open(path) as file:
        _, _, kind, rank = file.read(4)
        if kind != 8:
            raise ValueError(f"{path} does not hold unsigned bytes")
        sizes = np.frombuffer(file.read(4 * rank), dtype=">u4")
        return torch.tensor(np.frombuffer(file.read(), dtype=np.uint8).reshape(sizes))


class Encoder(nn.Sequential):
    """Images (n, channels, height, width), pooled to a grid, to features (n, 64)."""

    def __init__(self, channels: int, grid: int = 2) -> None:
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
            nn.Linear(32 * grid**2, 64),
            nn.ReLU(),
        )


class LateFusion(nn.Module):
    """An encoder and a head a modality, and a joint head on all features together.

    Gives logits by head: ``mm`` and each modality. With ``joint`` only the joint head's loss
    reaches the encoders.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], joint: bool, width: int = 64, classes: int = 10
    ) -> None:
        super().__init__()
        self.joint = joint
        self.encoders = nn.ModuleDict(encoders)
        self.mm_head = nn.Linear(width * len(encoders), classes)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name in encoders})

    def features(self, *inputs: Tensor) -> Tensors:
        pairs = zip(self.encoders.items(), inputs, strict=True)
        return {name: encoder(x) for (name, encoder), x in pairs}

    def logits(self, features: Tensors) -> Tensors:
        logits = {"mm": self.mm_head(torch.cat(list(features.values()), dim=1))}
        for name, head in self.heads.items():
            logits[name] = head(features[name].detach() if self.joint else features[name])
        return logits

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.logits(self.features(*inputs))


def make_optimizer(model: nn.Module, lr: float, method: str) -> MMParetoOptimizer:
    sgd = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9)
    return MMParetoOptimizer(sgd, **METHODS[method])


def train_step(model: nn.Module, optimizer: MMParetoOptimizer, batch: Split) -> None:
    logits = model(*batch.inputs)
    losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in logits}
    optimizer.zero_grad()
    optimizer.step(losses=losses)


def record(cosines: dict[str, list[Tensor]], optimizer: MMParetoOptimizer, *_: object) -> None:
    """Append the cosine of each block after a step: a hook."""
    for block, stats in optimizer.stats.items():
        cosines.setdefault(block, []).append(stats.cosine)


def compare(
    options: argparse.Namespace,
    make_data: Callable[[argparse.Namespace, int], tuple[Split, Split]],
    make_model: Callable[[bool], nn.Module],
    make_optimizer: Callable[[nn.Module, float, str], MMParetoOptimizer] = make_optimizer,
    train_step: Callable[[nn.Module, MMParetoOptimizer, Split], None] = train_step,
) -> Comparison:
    """Train and score every method for every seed; the same data and start for each method.

    ``make_model(joint)`` builds a model whose forward gives logits by head; with ``joint``
    only the joint head's loss reaches what the heads share. The demo brings the last two itself.
    """
    comparison = Comparison(options, {method: [] for method in options.methods})
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        total = len(options.methods) * options.seeds * options.epochs
        bar = progress.add_task("training", total=total)
        for seed in range(options.seed, options.seed + options.seeds):
            train_split, test_split = make_data(options, seed)
            for method, runs in comparison.runs.items():
                progress.update(bar, description=f"{method}, seed {seed}")
                torch.manual_seed(seed)
                model = make_model(method == JOINT)
                optimizer = make_optimizer(model, options.lr, method)
                cosines: dict[str, list[Tensor]] = {}
                optimizer.register_step_post_hook(partial(record, cosines))
                take_step = partial(train_step, model, optimizer)
                for _ in epochs(model, optimizer, train_split, options, take_step):
                    progress.advance(bar)
                curves = {block: torch.stack(values).tolist() for block, values in cosines.items()}
                order = torch.arange(len(test_split))
                runs.append(Run(accuracy(model, batches(test_split, order, 1000)), curves))
    return comparison


def batches(split: Split, order: Tensor, size: int = BATCH_SIZE) -> Iterator[Split]:
    return (split[index] for index in order.split(size))


def epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    options: argparse.Namespace,
    take_step: Callable[[Split], object],
    size: int = BATCH_SIZE,
) -> Iterator[int]:
    """Train for ``options.epochs`` with the peak ``options.lr``; yields after each epoch."""
    steps = options.epochs * ceil(len(split) / size)
    # Drives the wrapper like any optimizer; the warm-up keeps every seed stable.
    schedule = OneCycleLR(optimizer, options.lr, steps, cycle_momentum=False)
    for epoch in range(options.epochs):
        model.train()
        for batch in batches(split, torch.randperm(len(split)), size):
            take_step(batch)
            schedule.step()
        yield epoch


@torch.no_grad()
def accuracy(model: nn.Module, test: Iterable[Split]) -> dict[str, float]:
    model.eval()
    seen = 0
    right: dict[str, int] = {}
    for batch in test:
        seen += len(batch)
        for head, logits in model(*batch.inputs).items():
            hits = int((logits.argmax(-1) == batch.labels[head]).sum())
            right[head] = right.get(head, 0) + hits
    return {head: 100 * hits / seen for head, hits in right.items()}


def report(
    comparison: Comparison,
    name: str,
    data: str,
    heads: Mapping[str, str],
    blocks: Mapping[str, str],
    started: float,
) -> Path:
    """Print the tables (column titles by head and by block) and save the runs as JSON."""
    options = comparison.options
    title = f"{data}, {options.seeds} seeds: test accuracy in %, mean ± std"
    accuracies = Table("", *heads.values(), title=title)
    conflicts = Table("", *blocks.values(), title="Steps in conflict (cos < 0) in %")
    for method in comparison.runs:
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
    path: Path = options.output / f"{name}_{data}"
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
        if method not in ("uniform", "MMPareto") or method not in comparison.runs:
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


def plot_modalities(
    comparison: Comparison, heads: Mapping[str, str], blocks: Mapping[str, str], path: Path
) -> None:
    """Accuracy of each head as bars, and below it the cosine in each block over training."""
    heights = [3.2, *[1.9] * len(blocks)]  # as narrow as a phone's screen shows it readably
    figure = plt.figure(figsize=(5.5, sum(heights)), layout="constrained")
    bars, *others = figure.subplots(len(heights), height_ratios=heights)
    places = np.arange(len(heads))
    for number, method in enumerate(comparison.runs):
        means, spreads = zip(*(comparison.summary(method, head) for head in heads), strict=True)
        bars.bar(places + 0.16 * (number - 2), means, 0.16, yerr=spreads, capsize=2, label=method)
    bars.set_xticks(places, list(heads.values()))
    bars.set(ylabel="test accuracy (%)", title="Accuracy, mean and std over seeds", ylim=(0, 100))
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)

    for axes, (block, part) in zip(others, blocks.items(), strict=True):
        plot_cosines(axes, comparison, block)
        axes.set(title=f"Smallest cosine between gradients: {part}", ylabel="cosine")
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")
