"""Two modalities of one digit: a gray image, and a coloured one whose colour misleads.

In training each label has its own colour, up to some jitter; at test the colour is random
(Colored-and-gray MNIST, Kim et al. 2019; Wei & Hu 2024, Section 4.1). A model trained by one
joint loss leans on the colour.
Compares one joint loss, uniform (and uniform times MMPareto's gamma, as a control),
conventional Pareto and MMPareto; prints a table, saves the runs and a picture.

    python colored_gray_digits.py              # scikit-learn's digits: 5 seeds of 30 epochs
    python colored_gray_digits.py --data DIR   # MNIST: 3 seeds of 3 epochs
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch
from common import (
    METHODS,
    Encoder,
    LateFusion,
    Split,
    compare,
    digits_name,
    load,
    parse_options,
    plot_modalities,
    report,
)
from matplotlib import color_sequences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer

HEADS = {"mm": "multimodal", "gray": "gray only", "colour": "colour only"}
JITTER = 0.02**0.5  # standard deviation of each colour channel, as in the data set
BLOCKS = {"mm+gray": "gray encoder", "mm+colour": "colour encoder"}


def make_model(joint: bool) -> LateFusion:
    return LateFusion({"gray": Encoder(1), "colour": Encoder(3)}, joint)


def make_optimizer(model: nn.Module, lr: float, method: str) -> MMParetoOptimizer:
    """MMPareto around SGD, or one of the methods that it is compared with."""
    sgd = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9)
    return MMParetoOptimizer(sgd, **METHODS[method])  # for MMPareto: integration="mmpareto"


def train_step(model: nn.Module, optimizer: MMParetoOptimizer, batch: Split) -> None:
    """Gives the optimizer the joint loss and that of each modality, not their sum."""
    logits = model(*batch.inputs)
    losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in HEADS}
    optimizer.zero_grad()
    optimizer.step(losses=losses)


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    train_x, train_y, test_x, test_y = load(options)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(10, test_y.shape, generator=generator)
    return (
        _paint(train_x, train_y, train_y, generator),
        _paint(test_x, test_y, random, generator),
    )


def _paint(images: Tensor, labels: Tensor, hues: Tensor, generator: torch.Generator) -> Split:
    palette = torch.tensor(color_sequences["tab10"], dtype=torch.float)
    jitter = JITTER * torch.randn(len(images), 3, generator=generator)
    colours = (palette[hues] + jitter).clamp(0, 1)
    gray = images.unsqueeze(1)
    return Split((gray, gray * colours[:, :, None, None]), dict.fromkeys(HEADS, labels))


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(__doc__.split("\n")[0], arguments)
    comparison = compare(options, make_data, make_model, make_optimizer, train_step)
    name = digits_name(options)
    path = report(comparison, "colored_gray_digits", name, HEADS, BLOCKS, started)
    plot_modalities(comparison, HEADS, BLOCKS, path)


if __name__ == "__main__":
    main()
