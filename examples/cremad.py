"""Emotions by voice and face (CREMA-D), or sounding actions (Kinetics-Sounds).

The setting of Wei & Hu (2024, Section 4): log spectrograms and 2 frames a clip, two ResNet-18 from
scratch, late fusion; SGD of momentum 0.9 and weight decay 1e-4, batches of 64 clips, learning rate
2e-3, a tenth of it from epoch 30 of 50 on. Accuracy is that of the last epoch, on clips (or actors)
that training does not see; the best epoch on the test set, which others report, is higher.

DIR holds the data set's own files:
  CREMA-D (github.com/CheyneyComputerScience/CREMA-D): AudioWAV/*.wav and VideoFlash/*.flv (or
    frames as images, Frames/CLIP/*.jpg); with train.csv and test.csv in it (lines CLIP,EMOTION,
    as in data/CREMAD of github.com/GeWu-Lab/OGM-GE_CVPR2022) they are the split, otherwise the
    actors 1010, 1020 ... 1090 are the test set. Four clips are left out, since they are broken
    at the source, as the data set's README says: 1064_IEO_DIS_MD, 1064_TIE_SAD_XX,
    1076_MTI_NEU_XX, 1076_MTI_SAD_XX;
  Kinetics-Sounds, or any clips: train/CLASS/*.mp4 and test/CLASS/*.mp4.
They are decoded once, into DIR/prepared. Preparation and, with --resume, training go on where they
were interrupted: a resumed training is the uninterrupted one. Meant for a GPU.

What was run: the tests decode six real clips of CREMA-D, one of each emotion, train on them for
an epoch, and read the published split. No network has been trained on a whole data set yet.

    python cremad.py --data DIR
    python cremad.py --data DIR --methods uniform MMPareto --seeds 3 --resume
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from clips import FRAMES, Clip, ClipSet, PreparedClips, find_clips, prepare, prepared_path
from common import (
    BATCH_SIZE,
    JOINT,
    METHODS,
    Comparison,
    LateFusion,
    Run,
    Split,
    accuracy,
    base_parser,
    plot_modalities,
    record,
    report,
    require_data,
    train_step,
)
from resnet import resnet18
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from mmpareto_optim import MMParetoOptimizer

HEADS = {"mm": "multimodal", "audio": "audio only", "visual": "visual only"}
BLOCKS = {"mm+audio": "audio encoder", "mm+visual": "visual encoder"}
DECAY_EPOCH = 30
GET_DATA = """
{folder} should hold either
  CREMA-D: AudioWAV/*.wav and VideoFlash/*.flv, from
    https://github.com/CheyneyComputerScience/CREMA-D (with git-lfs), and, for the split that the
    literature uses, train.csv and test.csv, from data/CREMAD of
    https://github.com/GeWu-Lab/OGM-GE_CVPR2022
  or clips by class, such as Kinetics-Sounds: train/CLASS/*.mp4 and test/CLASS/*.mp4
"""
# Mean and standard deviation of ImageNet's colours.
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class VisualEncoder(nn.Module):
    """Frames (n, frames, 3, height, width) to features (n, 512), the mean over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = resnet18(3)

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.encoder(frames.flatten(0, 1))
        return features.view(len(frames), FRAMES, -1).mean(1)


def make_model(joint: bool, classes: int) -> LateFusion:
    encoders = {"audio": resnet18(1), "visual": VisualEncoder()}
    return LateFusion(encoders, joint, width=512, classes=classes)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__.split("\n")[0])
    parser.add_argument("--frame-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="to decode and to load clips (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --output"
    )
    parser.set_defaults(seeds=1, epochs=50, lr=2e-3)
    options = parser.parse_args(arguments)
    require_data(parser, options.data, [], GET_DATA)
    return options


def checkpoint_path(options: argparse.Namespace, clips: ClipSet, method: str, seed: int) -> Path:
    path: Path = options.output / f"{clips.name}_{method.replace(' ', '_')}_{seed}.ckpt"
    if path.exists() and not options.resume:
        raise SystemExit(f"{path} exists: --resume goes on from there; or choose another --output")
    return path


def prepare_all(clips: ClipSet, options: argparse.Namespace) -> tuple[PreparedClips, PreparedClips]:
    """Training and test clips; those that are broken are named and left out."""
    folder = options.data / "prepared" / f"{clips.seconds}s_{options.frame_size}px"
    everything = clips.train + clips.test
    with Progress(*COLUMNS) as progress:
        bar = progress.add_task("decoding", total=len(everything))
        failed = prepare(
            everything,
            folder,
            clips.seconds,
            options.frame_size,
            max(1, options.workers),
            lambda: progress.advance(bar),
        )
    for name, why in (clips.broken | failed).items():
        print(f"left out: {name}: {why}")

    def usable(part: list[Clip]) -> PreparedClips:
        found = [clip for clip in part if prepared_path(folder, clip).is_file()]
        if not found:
            raise SystemExit(
                f"none of the {len(part)} clips could be decoded."
                + GET_DATA.format(folder=options.data)
            )
        return PreparedClips(found, folder)

    return usable(clips.train), usable(clips.test)


def to_device(batch: list[Tensor], device: str) -> Split:
    spectrograms, frames, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (COLOUR_MEAN, COLOUR_STD)
    )
    return Split((spectrograms, (frames / 255 - mean) / std), dict.fromkeys(HEADS, labels))


def training_batches(
    clips: PreparedClips, options: argparse.Namespace, seed: int, epoch: int
) -> Iterator[Split]:
    """One epoch: what is drawn depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(clips), generator=generator).split(BATCH_SIZE)
    indices = [index.tolist() for index in order]
    for batch in DataLoader(clips, batch_sampler=indices, num_workers=options.workers):
        split = to_device(batch, options.device)
        spectrograms, frames = split.inputs
        yield Split((spectrograms, crop_and_flip(frames, generator)), split.labels)


def scoring_batches(clips: PreparedClips, options: argparse.Namespace) -> Iterator[Split]:
    for batch in DataLoader(clips, BATCH_SIZE, num_workers=options.workers):
        yield to_device(batch, options.device)


def crop_and_flip(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each frame, 8 to 100 % of it, at full size, mirrored half of the time."""
    flat = frames.flatten(0, 1)
    area, aspect, x, y, mirror = torch.rand(5, len(flat), generator=generator)
    area = 0.08 + 0.92 * area
    aspect = (4 / 3) ** (2 * aspect - 1)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(flat), 2, 3)  # from places in the result to places in the frame, -1..1
    theta[:, 0, 0] = torch.where(mirror < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * x - 1) * (1 - width)
    theta[:, 1, 2] = (2 * y - 1) * (1 - height)
    grid = affine_grid(theta.to(flat.device), list(flat.shape), align_corners=False)
    cropped = grid_sample(flat, grid, padding_mode="border", align_corners=False)
    return cropped.view_as(frames)


def train(
    method: str,
    seed: int,
    path: Path,
    data: tuple[PreparedClips, PreparedClips],
    classes: int,
    options: argparse.Namespace,
    advance: Callable[[], object],
) -> Run:
    """One training, from its checkpoint at ``path`` if there is one, scored on the test clips."""
    torch.manual_seed(seed)
    model = make_model(method == JOINT, classes).to(options.device)
    sgd = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=1e-4)
    optimizer = MMParetoOptimizer(sgd, **METHODS[method])
    schedule = StepLR(optimizer, DECAY_EPOCH, 0.1)
    steps: dict[str, list[Tensor]] = {}
    optimizer.register_step_post_hook(partial(record, steps))
    cosines: dict[str, list[float]] = {}
    checkpoint = Checkpoint(
        path,
        {"lr": options.lr, "frame size": options.frame_size, "training clips": len(data[0])},
        {"model": model, "optimizer": optimizer, "schedule": schedule},
    )
    first = checkpoint.load(cosines)
    for epoch in range(options.epochs):
        if epoch >= first:
            model.train()
            steps.clear()
            for batch in training_batches(data[0], options, seed, epoch):
                train_step(model, optimizer, batch)
            schedule.step()
            for block, values in steps.items():
                cosines.setdefault(block, []).extend(torch.stack(values).tolist())
            checkpoint.save(epoch + 1, cosines)
        advance()
    return Run(accuracy(model, scoring_batches(data[1], options)), cosines)


class Checkpoint:
    """A training's state after its last whole epoch, in a file that is always complete."""

    def __init__(self, path: Path, settings: dict[str, Any], parts: dict[str, Any]) -> None:
        self.path, self.settings, self.parts = path, settings, parts

    def load(self, cosines: dict[str, list[float]]) -> int:
        """Put back the state, if there is one; how many epochs it has seen."""
        if not self.path.is_file():
            return 0
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.settings.items():
            if saved["settings"][name] != value:
                raise SystemExit(
                    f"{self.path} was trained with {name} {saved['settings'][name]}, not {value}: "
                    "give the same options, or another --output"
                )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        cosines.update(saved["cosines"])
        epochs: int = saved["epochs"]
        return epochs

    def save(self, epochs: int, cosines: dict[str, list[float]]) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "epochs": epochs, "cosines": cosines}
        partial = self.path.with_name(f"{self.path.name}.partial")
        torch.save(state, partial)
        partial.replace(self.path)


def main(arguments: list[str] | None = None) -> Comparison:
    started = perf_counter()
    options = parse_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        clips = find_clips(options.data)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{error}." + GET_DATA.format(folder=options.data)) from error
    trainings = {
        (seed, method): checkpoint_path(options, clips, method, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for method in options.methods
    }
    data = prepare_all(clips, options)
    print(f"{clips.name}: {len(data[0])} clips to train, {len(data[1])} to test")
    comparison = Comparison(options, {method: [] for method in options.methods})
    with Progress(*COLUMNS) as progress:
        bar = progress.add_task("training", total=len(trainings) * options.epochs)
        for (seed, method), checkpoint in trainings.items():
            progress.update(bar, description=f"{method}, seed {seed}")
            run = train(
                method,
                seed,
                checkpoint,
                data,
                len(clips.classes),
                options,
                lambda: progress.advance(bar),
            )
            comparison.runs[method].append(run)
    path = report(comparison, "clips", clips.name, HEADS, BLOCKS, started)
    plot_modalities(comparison, HEADS, BLOCKS, path)
    return comparison


if __name__ == "__main__":
    main()
