"""What the examples on recorded sequences share: their options, encoder and scaling."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from common import Split, base_parser, require_data
from torch import Tensor, nn

QUICK_SAMPLES = 96
Arrays = dict[str, np.ndarray]


class SequenceEncoder(nn.Sequential):
    """Sequences (n, channels, time) to features (n, 64)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv1d(channels, 16, 5, stride=2, padding=2),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 5, stride=2, padding=2),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
        )


def sequence_parser(description: str, validation: str) -> argparse.ArgumentParser:
    parser = base_parser(description)
    parser.add_argument(
        "--validate", action="store_true", help=f"score on {validation}: to choose --lr"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one epoch of {QUICK_SAMPLES} samples, to see it run"
    )
    return parser


def parsed(
    parser: argparse.ArgumentParser, file: str, get_data: str, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The options; exits with where to get the data if ``file`` is not in its folder."""
    options = parser.parse_args(arguments)
    require_data(parser, options.data, [file], get_data)
    if options.quick:
        options.epochs = 1
    return options


def read_arrays(path: Path, keys: Collection[str]) -> Arrays:
    """These arrays of an npz file; exits if some are missing."""
    with np.load(path) as file:
        missing = sorted(set(keys) - set(file.files))
        if missing:
            raise SystemExit(f"{path} has no {', '.join(missing)}; it has {', '.join(file.files)}")
        return {key: file[key] for key in keys}


def split_of(
    inputs: dict[str, Tensor], labels: np.ndarray, chosen: np.ndarray, train: np.ndarray
) -> Split:
    """The ``chosen`` samples, scaled by the mean and standard deviation of those of ``train``.

    A channel (dimension 1) has a mean and a standard deviation of its own.
    """
    index, reference = (torch.as_tensor(np.flatnonzero(mask)) for mask in (chosen, train))
    scaled = []
    for x in inputs.values():
        dims = [dim for dim in range(x.ndim) if dim != 1]
        middle = x[reference].mean(dims, keepdim=True)
        spread = x[reference].std(dims, keepdim=True).clamp(min=1e-6)
        scaled.append((x[index] - middle) / spread)
    target = torch.as_tensor(labels).long()[index]
    return Split(tuple(scaled), dict.fromkeys(("mm", *inputs), target))


def shortened(split: Split, options: argparse.Namespace, seed: int) -> Split:
    """A few of the samples with ``--quick``."""
    if not options.quick:
        return split
    generator = torch.Generator().manual_seed(seed)
    return split[torch.randperm(len(split), generator=generator)[:QUICK_SAMPLES]]
