"""Two overlaid digits, two tasks on one trunk, the right digit hidden by noise.

Each image overlays a digit at the top left with one at the bottom right; salt-and-pepper
noise makes the right one harder (Wei & Hu 2024, the multi-task extension). Compares one joint
loss (the pair as one of 100 classes), uniform (and uniform times MMPareto's gamma, as a
control), conventional Pareto and MMPareto; prints a table, saves the runs and a picture.

    python multimnist.py              # scikit-learn's digits: 5 seeds of 30 epochs
    python multimnist.py --data DIR   # MNIST: 3 seeds of 3 epochs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from common import (
    Comparison,
    Encoder,
    Split,
    Tensors,
    compare,
    digits_name,
    load,
    parse_options,
    plot_cosines,
    report,
)
from matplotlib import pyplot as plt
from torch import Tensor, nn

HEADS = {"left": "left digit", "right": "right digit (noisy)"}
BLOCKS = {"left+right": "trunk"}
NOISE = 0.3  # share of the right digit's pixels that turn black or white


class SharedTrunk(nn.Module):
    """One encoder, a head a task; with ``joint`` a head for the pair trains the encoder."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        self.trunk = Encoder(1)
        self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)
        self.pair = nn.Linear(64, 100) if joint else None

    def features(self, image: Tensor) -> Tensors:
        return {"trunk": self.trunk(image)}

    def logits(self, features: Tensors) -> Tensors:
        trunk = features["trunk"]
        if self.pair is None:
            return {"left": self.left(trunk), "right": self.right(trunk)}
        fixed = trunk.detach()
        return {"pair": self.pair(trunk), "left": self.left(fixed), "right": self.right(fixed)}

    def forward(self, image: Tensor) -> Tensors:
        return self.logits(self.features(image))


def make_model(joint: bool) -> SharedTrunk:
    return SharedTrunk(joint)


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    train_x, train_y, test_x, test_y = load(options)
    generator = torch.Generator().manual_seed(seed)
    return _overlay(train_x, train_y, generator), _overlay(test_x, test_y, generator)


def _overlay(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    partner = torch.randperm(len(images), generator=generator)
    uniform = torch.rand(images.shape, generator=generator)
    noisy = torch.where(uniform < NOISE, (uniform < NOISE / 2).float(), images[partner])
    size = images.shape[-1]
    shift = 2 * size // 7  # 28 pixels on a canvas of 36, 8 on one of 10
    canvas = torch.zeros(len(images), 1, size + shift, size + shift)
    canvas[:, 0, :size, :size] = images
    corner = canvas[:, 0, shift:, shift:]
    torch.maximum(corner, noisy, out=corner)
    right = labels[partner]
    return Split((canvas,), {"left": labels, "right": right, "pair": 10 * labels + right})


def plot(comparison: Comparison, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, method in enumerate(comparison.runs):
        left.scatter(*(comparison.accuracies(method, head) for head in HEADS), s=12, alpha=0.5)
        (x, x_spread), (y, y_spread) = (comparison.summary(method, head) for head in HEADS)
        left.errorbar(x, y, y_spread, x_spread, fmt="o", color=f"C{number}", label=method)
    left.set(xlabel="left digit (%)", ylabel="right digit, noisy (%)")
    left.set_title("Test accuracy of both tasks: seeds, mean, std")
    left.legend(fontsize="small")

    plot_cosines(right, comparison, *BLOCKS)
    right.set_title("cos(left, right gradient), shared trunk")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(__doc__.split("\n")[0], arguments)
    comparison = compare(options, make_data, make_model)
    path = report(comparison, "multimnist", digits_name(options), HEADS, BLOCKS, started)
    plot(comparison, path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
