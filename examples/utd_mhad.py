"""Actions by a wrist sensor and a depth camera's skeleton (UTD-MHAD).

861 trials of 27 actions by 8 subjects, recorded by an inertial sensor and a Kinect at once (Chen,
Jafari & Kehtarnavaz, ICIP 2015). The standard split: subjects 1, 3, 5, 7 train, 2, 4, 6, 8 test.
Two modalities by default, inertial and skeleton; depth frames can be a third, and the
accelerometer and the gyroscope can be apart.
Compares the methods of the other examples, 3 seeds of 20 epochs unless told otherwise.

    python utd_mhad.py --data DIR
    python utd_mhad.py --data DIR --modalities accelerometer gyroscope skeleton
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import numpy as np
import torch
from common import Encoder, LateFusion, Split, compare, plot_modalities, report
from sequences import (
    Arrays,
    SequenceEncoder,
    parsed,
    read_arrays,
    sequence_parser,
    shortened,
    split_of,
)
from torch import Tensor, nn

FILE = "utd_mhad.npz"
GET_DATA = """
{folder} should hold utd_mhad.npz. prepare_sequences.py makes it of the authors' files, which are
free for research: personal.utdallas.edu/~kehtar/UTD-MHAD.html (Inertial and Skeleton, and Depth if
wanted). Its arrays
  inertial  (trials, 96, 6)       float, accelerometer then gyroscope (their d_iner)
  skeleton  (trials, 48, 20, 3)   float, joints (their d_skel)
  depth     (trials, 8, 48, 64)   uint8 (their d_depth); only for --modalities depth
  label     (trials,)             0 to 26, the action of the file's name less 1
  subject   (trials,)             1 to 8
with each trial resampled to one length by linear interpolation in time.
"""
MODALITIES = ("inertial", "accelerometer", "gyroscope", "skeleton", "depth")
DEFAULT = ("inertial", "skeleton")
CLASSES = 27
TRAINING_SUBJECTS = (1, 3, 5, 7)
HIP_CENTRE = 3  # of the 20 joints of a Kinect


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = sequence_parser(__doc__.split("\n")[0], "one of the training subjects")
    parser.add_argument(
        "--modalities",
        nargs="+",
        choices=MODALITIES,
        default=DEFAULT,
        metavar="MODALITY",
        help=f"of {', '.join(MODALITIES)} (default: {' '.join(DEFAULT)})",
    )
    parser.set_defaults(seeds=3, epochs=20, lr=0.03)
    return parsed(parser, FILE, GET_DATA, arguments)


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    """Training and test trials; a seed changes only which subject validates."""
    stored = {_stored(modality) for modality in options.modalities}
    arrays = read_arrays(options.data / FILE, {*stored, "label", "subject"})
    inputs = {modality: _input(arrays, modality) for modality in options.modalities}
    subject = arrays["subject"]
    train = np.isin(subject, TRAINING_SUBJECTS)
    test = ~train
    if options.validate:
        test = subject == TRAINING_SUBJECTS[seed % len(TRAINING_SUBJECTS)]
        train = train & ~test
    parts = (split_of(inputs, arrays["label"], chosen, train) for chosen in (train, test))
    train_split, test_split = (shortened(split, options, seed) for split in parts)
    return train_split, test_split


def _stored(modality: str) -> str:
    return "inertial" if modality in ("accelerometer", "gyroscope") else modality


def _input(arrays: Arrays, modality: str) -> Tensor:
    """Channels in dimension 1: (n, channels, time), of the depth (n, frames, height, width)."""
    values = torch.as_tensor(arrays[_stored(modality)]).float()
    if modality == "depth":
        return values
    if modality == "skeleton":  # where the subject stands tells nothing of the action
        values = (values - values[:, :1, HIP_CENTRE : HIP_CENTRE + 1]).flatten(2)
    sensors = {"accelerometer": slice(3), "gyroscope": slice(3, 6)}
    return values[..., sensors.get(modality, slice(None))].transpose(1, 2).contiguous()


def make_model(joint: bool, modalities: Sequence[str] = DEFAULT) -> LateFusion:
    return LateFusion({name: _encoder(name) for name in modalities}, joint, classes=CLASSES)


def _encoder(modality: str) -> nn.Module:
    if modality == "depth":
        return Encoder(8, grid=4)
    return SequenceEncoder({"inertial": 6, "skeleton": 60}.get(modality, 3))


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(arguments)
    comparison = compare(options, make_data, partial(make_model, modalities=options.modalities))
    heads = {"mm": "multimodal"} | {name: f"{name} only" for name in options.modalities}
    blocks = {f"mm+{name}": f"{name} encoder" for name in options.modalities}
    path = report(comparison, "utd_mhad", "_".join(options.modalities), heads, blocks, started)
    plot_modalities(comparison, heads, blocks, path)


if __name__ == "__main__":
    main()
