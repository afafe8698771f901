"""Two modalities of one digit: a gray image, and a coloured one whose colour misleads.

In training each label has its own colour, up to some jitter; at test the colour is random
(Colored-and-gray MNIST, Kim et al. 2019; Wei & Hu 2024, Section 4.1). A model trained by one
joint loss leans on the colour.
Compares one joint loss, uniform (and uniform times MMPareto's gamma, as a control),
conventional Pareto and MMPareto; prints a table, saves the runs and a picture.

    python colored_gray_digits.py
    python colored_gray_digits.py --data mnist --data-dir DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import (
    METHODS,
    Comparison,
    Encoder,
    Split,
    Tensors,
    compare,
    load,
    parse_options,
    plot_cosines,
    report,
)
from torch import Tensor, nn

HEADS = {"mm": "multimodal", "gray": "gray only", "colour": "colour only"}
JITTER = 0.02**0.5  # standard deviation of each colour channel, as in the data set
BLOCKS = {"mm+gray": "gray encoder", "mm+colour": "colour encoder"}


class TwoEncoders(nn.Module):
    """Late fusion: an encoder and a head a modality, a joint head on both features."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        self.gray, self.colour = Encoder(1), Encoder(3)
        self.mm_head = nn.Linear(128, 10)
        self.gray_head, self.colour_head = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, gray: Tensor, colour: Tensor) -> Tensors:
        gray, colour = self.gray(gray), self.colour(colour)
        mm = self.mm_head(torch.cat([gray, colour], dim=1))
        if self.joint:
            gray, colour = gray.detach(), colour.detach()
        return {"mm": mm, "gray": self.gray_head(gray), "colour": self.colour_head(colour)}


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    train_x, train_y, test_x, test_y = load(options)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(10, test_y.shape, generator=generator)
    return (
        _paint(train_x, train_y, train_y, generator),
        _paint(test_x, test_y, random, generator),
    )


def _paint(images: Tensor, labels: Tensor, hues: Tensor, generator: torch.Generator) -> Split:
    palette = torch.tensor(mpl.color_sequences["tab10"], dtype=torch.float)
    jitter = JITTER * torch.randn(len(images), 3, generator=generator)
    colours = (palette[hues] + jitter).clamp(0, 1)
    gray = images.unsqueeze(1)
    return Split((gray, gray * colours[:, :, None, None]), dict.fromkeys(HEADS, labels))


def plot(comparison: Comparison, path: Path) -> None:
    figure, (left, *others) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    places = np.arange(len(HEADS))
    for number, method in enumerate(METHODS):
        means, spreads = zip(*(comparison.summary(method, head) for head in HEADS), strict=True)
        left.bar(places + 0.16 * (number - 2), means, 0.16, yerr=spreads, capsize=2, label=method)
    left.set_xticks(places, list(HEADS.values()))
    left.set(ylabel="test accuracy (%)", title="Accuracy, mean and std over seeds", ylim=(0, 100))
    left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)

    for axes, (block, encoder) in zip(others, BLOCKS.items(), strict=True):
        plot_cosines(axes, comparison, block)
        axes.set_title(f"cos(joint, unimodal gradient), {encoder}")
    figure.savefig(path, dpi=120)


def main() -> None:
    started = perf_counter()
    options = parse_options(__doc__.split("\n")[0])
    comparison = compare(options, make_data, TwoEncoders)
    path = report(comparison, "colored_gray_digits", HEADS, BLOCKS, started)
    plot(comparison, path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
