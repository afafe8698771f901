"""Spoken letters by voice and lips (AVLetters): a strong modality and a weak one.

780 utterances: 10 talkers say each of 26 letters three times (Matthews et al., IEEE TPAMI 24(2),
2002). With ``--split repetition`` the third time is the test set, of talkers that training knows;
with ``--split talker`` it is all of the last three talkers, whom training does not know.
Compares the methods of the other examples, 3 seeds of 20 epochs unless told otherwise.

    python avletters.py --data DIR
    python avletters.py --data DIR --split talker
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np
import torch
from common import LateFusion, Split, compare, plot_modalities, report
from sequences import SequenceEncoder, parsed, read_arrays, sequence_parser, shortened, split_of
from torch import Tensor
from torch.nn.functional import avg_pool2d

FILE = "avletters.npz"
GET_DATA = """
{folder} should hold avletters.npz. prepare_sequences.py makes it of the files that the authors give
for research (Matthews, Cootes, Bangham, Cox & Harvey, "Extraction of visual features for
lipreading", 2002): Lips and Audio. Its arrays
  mfcc        (utterances, 48, 26)       float, cepstral coefficients of the sound
  video       (utterances, 24, 30, 40)   uint8, the lips, at half the original size
  label       (utterances,)              0 to 25
  repetition  (utterances,)              1 to 3
  speaker     (utterances,)              0 to 9
with each utterance resampled to one length by linear interpolation in time.
"""
HEADS = {"mm": "multimodal", "audio": "audio only", "lips": "lips only"}
BLOCKS = {"mm+audio": "audio encoder", "mm+lips": "lips encoder"}
CLASSES = 26
POOLED = 3  # each side of a frame is pooled to a third
PIXELS = (30 // POOLED) * (40 // POOLED)
TEST_TALKERS = (7, 8, 9)
TEST_REPETITION, VALIDATION_REPETITION = 3, 2


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = sequence_parser(
        __doc__.split("\n")[0], "the second repetition, or on one of the training talkers"
    )
    parser.add_argument("--split", choices=["repetition", "talker"], default="repetition")
    parser.set_defaults(seeds=3, epochs=20, lr=0.03)
    return parsed(parser, FILE, GET_DATA, arguments)


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    """Training and test utterances; a seed changes only which talker validates."""
    keys = ("mfcc", "video", "label", "repetition", "speaker")
    arrays = read_arrays(options.data / FILE, keys)
    train, test = split_utterances(arrays["repetition"], arrays["speaker"], options, seed)
    inputs = {
        "audio": torch.as_tensor(arrays["mfcc"]).float().transpose(1, 2).contiguous(),
        "lips": lips(torch.as_tensor(arrays["video"])),
    }
    parts = (split_of(inputs, arrays["label"], chosen, train) for chosen in (train, test))
    train_split, test_split = (shortened(split, options, seed) for split in parts)
    return train_split, test_split


def split_utterances(
    repetition: np.ndarray, speaker: np.ndarray, options: argparse.Namespace, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the training and of the test utterances."""
    if options.split == "talker":
        test = np.isin(speaker, TEST_TALKERS)
        talkers = np.unique(speaker[~test])
        validation = speaker == talkers[seed % len(talkers)]
    else:
        test = repetition == TEST_REPETITION
        validation = repetition == VALIDATION_REPETITION
    train = ~test
    return (train & ~validation, validation) if options.validate else (train, test)


def lips(video: Tensor) -> Tensor:
    """Frames (n, time, height, width) to (n, pixels, time): small, without the face's average.

    Less its mean over time, an utterance tells how the lips move rather than whose they are.
    """
    small = avg_pool2d(video.float(), POOLED).flatten(2)
    return (small - small.mean(1, keepdim=True)).transpose(1, 2).contiguous()


def make_model(joint: bool) -> LateFusion:
    encoders = {"audio": SequenceEncoder(26), "lips": SequenceEncoder(PIXELS)}
    return LateFusion(encoders, joint, classes=CLASSES)


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(arguments)
    comparison = compare(options, make_data, make_model)
    path = report(comparison, "avletters", options.split, HEADS, BLOCKS, started)
    plot_modalities(comparison, HEADS, BLOCKS, path)


if __name__ == "__main__":
    main()
