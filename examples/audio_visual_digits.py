"""Two modalities of one digit: spoken and written.

Each recording of the Free Spoken Digit Dataset (FSDD: 6 speakers say 10 digits 50 times, 8 kHz) is
paired with an image of the same digit from MNIST, as AV-MNIST does (Vielzeuf et al., 2018). With
``--split recording`` the test set is FSDD's own, takes 0 to 4 of each digit and speaker; with
``--split speaker`` it is all of one speaker, who is not heard in training: speaker s of 6, in
alphabetical order, for seed s. Test images are always of MNIST's test set.
Compares the methods of the other examples, 3 seeds of 8 epochs unless told otherwise.

    python audio_visual_digits.py --data DIR
    python audio_visual_digits.py --data DIR --split speaker --seeds 6
"""

from __future__ import annotations

import argparse
import wave
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from common import (
    GET_MNIST,
    MNIST_FILES,
    Encoder,
    LateFusion,
    Split,
    base_parser,
    compare,
    plot_modalities,
    read_mnist,
    report,
    require_data,
)
from torch import Tensor

GET_DATA = f"""{GET_MNIST}\
  recordings/  FSDD's wav files: the folder of that name in a clone of
               https://github.com/Jakobovski/free-spoken-digit-dataset
               (or all of them in one fsdd.npz)
"""
HEADS = {"mm": "multimodal", "audio": "audio only", "visual": "visual only"}
BLOCKS = {"mm+audio": "audio encoder", "mm+visual": "visual encoder"}
RATE = 8000  # Hz
WINDOW, HOP, FRAMES = 256, 128, 48  # samples, samples, spectra: 32 ms every 16 ms for 0.77 s
MELS = 32
TEST_IMAGES = 10  # that each test recording is paired with, one after the other; 1 in training
TEST_TAKES, VALIDATION_TAKES = range(5), range(5, 10)
QUICK_PAIRS = 128


@dataclass
class Speech:
    """Recordings as log-mel spectrograms (n, 1, mels, frames), each with zero mean, variance 1."""

    spectrograms: Tensor
    labels: Tensor
    speakers: np.ndarray
    takes: np.ndarray


def parse_options(
    description: str, lr: float, epochs: int, arguments: list[str] | None = None
) -> argparse.Namespace:
    parser = base_parser(description)
    parser.add_argument("--split", choices=["recording", "speaker"], default="recording")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="score on takes 5 to 9, or on the next speaker, without the test set: to choose --lr",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one epoch of {QUICK_PAIRS} pairs, to see it run"
    )
    parser.set_defaults(seeds=3, epochs=epochs, lr=lr)
    options = parser.parse_args(arguments)
    packed = options.data is not None and (options.data / "fsdd.npz").is_file()
    speech = "fsdd.npz" if packed else "recordings"
    require_data(parser, options.data, [*MNIST_FILES, speech], GET_DATA)
    if options.quick:
        options.epochs = 1
    return options


def make_data(options: argparse.Namespace, seed: int) -> tuple[Split, Split]:
    speech = read_speech(options.data)
    train, test = split_recordings(speech, options, seed)
    train_x, train_y, test_x, test_y = read_mnist(options.data)
    if options.validate:  # the test images stay unseen too
        train_x, test_x = train_x[:-10000], train_x[-10000:]
        train_y, test_y = train_y[:-10000], train_y[-10000:]
    generator = torch.Generator().manual_seed(seed)
    pairs = (
        _pair(speech, train, train_x, train_y, generator),
        _pair(speech, test.repeat(TEST_IMAGES), test_x, test_y, generator),
    )
    if options.quick:
        train_pairs, test_pairs = (
            split[torch.randperm(len(split), generator=generator)[:QUICK_PAIRS]] for split in pairs
        )
        return train_pairs, test_pairs
    return pairs


def read_speech(folder: Path) -> Speech:
    """From ``fsdd.npz`` or the folder ``recordings`` of wav files LABEL_SPEAKER_TAKE.wav."""
    packed = folder / "fsdd.npz"
    if packed.is_file():
        with np.load(packed) as file:
            recordings = np.split(file["samples"], file["offsets"][1:-1])
            labels, speakers, takes = file["labels"], file["speakers"], file["takes"]
    else:
        paths = sorted((folder / "recordings").glob("*.wav"))
        recordings = [_read_wav(path) for path in paths]
        names = [path.stem.split("_") for path in paths]
        labels = np.array([int(label) for label, _, _ in names])
        speakers = np.array([speaker for _, speaker, _ in names])
        takes = np.array([int(take) for _, _, take in names])
    spectrograms = log_mel(recordings).unsqueeze(1)
    return Speech(spectrograms, torch.as_tensor(labels).long(), speakers, takes)


def _read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise ValueError(f"{path} is not mono of 16 bits at {RATE} Hz, as FSDD is")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def split_recordings(
    speech: Speech, options: argparse.Namespace, seed: int
) -> tuple[Tensor, Tensor]:
    """Indices of the training and the test recordings."""
    if options.split == "recording":
        test = np.isin(speech.takes, TEST_TAKES)
        validation = np.isin(speech.takes, VALIDATION_TAKES)
    else:
        names = np.unique(speech.speakers)
        test = speech.speakers == names[seed % len(names)]
        validation = speech.speakers == names[(seed + 1) % len(names)]
    train = ~test
    if options.validate:
        train, test = ~test & ~validation, validation
    return torch.as_tensor(np.flatnonzero(train)), torch.as_tensor(np.flatnonzero(test))


def _pair(
    speech: Speech, recordings: Tensor, images: Tensor, digits: Tensor, generator: torch.Generator
) -> Split:
    """Each recording with a random image of its digit."""
    labels = speech.labels[recordings]
    partners = torch.empty_like(labels)
    for label in labels.unique():
        wanted = labels == label
        pool = torch.nonzero(digits == label).squeeze(1)
        drawn = torch.randint(len(pool), (int(wanted.sum()),), generator=generator)
        partners[wanted] = pool[drawn]
    inputs = (speech.spectrograms[recordings], images[partners].unsqueeze(1))
    return Split(inputs, dict.fromkeys(HEADS, labels))


def log_mel(recordings: list[np.ndarray]) -> Tensor:
    """Log-mel spectrograms (n, mels, frames) of 16-bit recordings, cut or padded to one length.

    Each is scaled to peak 1 before and to mean 0, variance 1 after, so that the loudness of a
    recording tells nothing.
    """
    waves = torch.zeros(len(recordings), HOP * (FRAMES - 1))
    for wave_, samples in zip(waves, recordings, strict=True):
        kept = torch.from_numpy(samples[: len(wave_)].astype(np.float32))
        wave_[: len(kept)] = kept / kept.abs().max().clamp(min=1)
    window = torch.hann_window(WINDOW)
    spectra = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs().square()
    features = (mel_filters() @ spectra + 1e-3).log()
    features -= features.mean((1, 2), keepdim=True)
    return features / features.std((1, 2), keepdim=True)


def mel_filters() -> Tensor:
    """Triangles (mels, frequencies) of equal width on the mel scale, 2595 lg(1 + f / 700 Hz)."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - frequencies) / np.diff(corners)[1:, None]
    return torch.as_tensor(np.minimum(rising, falling).clip(min=0), dtype=torch.float)


def make_model(joint: bool) -> LateFusion:
    return LateFusion({"audio": Encoder(1, grid=4), "visual": Encoder(1, grid=4)}, joint)


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(__doc__.split("\n")[0], lr=0.03, epochs=8, arguments=arguments)
    comparison = compare(options, make_data, make_model)
    path = report(comparison, "audio_visual_digits", options.split, HEADS, BLOCKS, started)
    plot_modalities(comparison, HEADS, BLOCKS, path)


if __name__ == "__main__":
    main()
