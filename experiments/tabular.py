"""Data sets whose modalities are features in a table: HTAD and ROSMAP (made as the examples)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from common import LateFusion, Split
from sequences import read_arrays, split_of
from sklearn.model_selection import train_test_split
from torch import nn

WIDTH = 64
SHARE = 0.3  # of the samples that test, and of the training samples that validate


@dataclass(frozen=True)
class Table:
    """``features`` has the number of each modality's; without a split, a seed draws one."""

    file: str
    features: Mapping[str, int]
    classes: int
    has_split: bool

    def make_data(self, options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
        """Training and test samples, standardised by the former."""
        split = ["test"] if self.has_split else []
        arrays = read_arrays(options.data / self.file, [*self.features, "label", *split])
        label = arrays["label"]
        test = arrays["test"] if self.has_split else drawn(np.full(len(label), True), label, seed)
        train = ~test
        if options.validate:
            test = drawn(train, label, seed)
            train = train & ~test
        inputs = {name: torch.as_tensor(arrays[name]).float() for name in self.features}
        train_split, test_split = (split_of(inputs, label, x, train) for x in (train, test))
        return train_split, test_split

    def make_model(self, joint: bool) -> LateFusion:
        encoders = {name: _encoder(size) for name, size in self.features.items()}
        return LateFusion(encoders, joint, WIDTH, self.classes)


def _encoder(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def drawn(among: np.ndarray, label: np.ndarray, seed: int) -> np.ndarray:
    """A mask of a share of the samples, of each class alike."""
    index = np.flatnonzero(among)
    _, chosen = train_test_split(index, test_size=SHARE, stratify=label[index], random_state=seed)
    mask: np.ndarray = np.isin(np.arange(len(label)), chosen)
    return mask


HTAD = Table("htad.npz", {"audio": 36, "motion": 16}, classes=7, has_split=False)
ROSMAP = Table(
    "rosmap.npz", {"mrna": 200, "methylation": 200, "mirna": 200}, classes=2, has_split=True
)
