"""Audio-visual clips: which there are, and their decoding, once, to one small file each."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

try:
    import av
except ModuleNotFoundError as error:
    raise SystemExit(
        "PyAV, which decodes the clips, is not installed: pip install '.[examples,video]' in a "
        "checkout brings it"
    ) from error

CREMAD_EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
# As the notes on videos and sounds in the README of the data set's repository say (March 2025).
CREMAD_BROKEN = {
    "1064_IEO_DIS_MD": "broken at the source: a minute long, with all emotions",
    "1064_TIE_SAD_XX": "broken at the source: it has no duration",
    "1076_MTI_NEU_XX": "broken at the source: the video is very short",
    "1076_MTI_SAD_XX": "broken at the source: very short, without sound",
}
FRAMES = 2  # of a video: the middle frame of each half
RATE = 22050  # Hz
WINDOW, HOP = 512, 353  # samples


@dataclass(frozen=True)
class Clip:
    """``visual`` is a video or a folder of images; ``audio`` may be the same video."""

    name: str
    label: int
    audio: Path
    visual: Path


@dataclass(frozen=True)
class ClipSet:
    """A data set; of a longer recording only ``seconds`` are kept, a shorter one is repeated.

    ``broken`` says, by name, why clips of the data set are neither in ``train`` nor in ``test``.
    """

    name: str
    classes: tuple[str, ...]
    seconds: int
    train: list[Clip]
    test: list[Clip]
    broken: dict[str, str] = field(default_factory=dict)


def find_clips(folder: Path) -> ClipSet:
    """CREMA-D or a folder of clips by class, whichever lies in the folder.

    Raises:
        FileNotFoundError: neither, or a file that should be there is not.
        ValueError: a file or a line of a list that is not named as in CREMA-D.
    """
    if (folder / "AudioWAV").is_dir():
        return _cremad(folder)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _class_folders(folder)
    raise FileNotFoundError(
        f"{folder} has neither AudioWAV/ and VideoFlash/ (CREMA-D) nor train/ and test/ of "
        "CLASS/CLIP.mp4"
    )


def _cremad(folder: Path) -> ClipSet:
    """By the lists train.csv and test.csv where both are there, otherwise by actor.

    The literature's lists mix the actors (lines CLIP,EMOTION; published with OGM-GE, Peng et
    al., 2022). Without them the test set is every actor whose number ends in 0: 9 of the 91,
    about a tenth of the clips, as in the lists, by people who are not in the training set.
    The clips of CREMAD_BROKEN are in neither.
    """
    names = sorted(path.stem for path in (folder / "AudioWAV").glob("*.wav"))
    lists = [folder / "train.csv", folder / "test.csv"]
    if all(path.is_file() for path in lists):
        train, test = (_listed(path) for path in lists)
    else:
        train = [name for name in names if not name.split("_")[0].endswith("0")]
        test = [name for name in names if name.split("_")[0].endswith("0")]
    return ClipSet(
        "cremad",
        CREMAD_EMOTIONS,
        3,
        [_cremad_clip(folder, name) for name in train if name not in CREMAD_BROKEN],
        [_cremad_clip(folder, name) for name in test if name not in CREMAD_BROKEN],
        {name: CREMAD_BROKEN[name] for name in (*train, *test) if name in CREMAD_BROKEN},
    )


def _listed(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row[0] for row in csv.reader(file) if row]


def _cremad_clip(folder: Path, name: str) -> Clip:
    fields = name.split("_")
    if len(fields) < 3 or fields[2] not in CREMAD_EMOTIONS:
        raise ValueError(f"{name!r} is not named as in CREMA-D, ACTOR_SENTENCE_EMOTION_LEVEL")
    audio = folder / "AudioWAV" / f"{name}.wav"
    visual = folder / "VideoFlash" / f"{name}.flv"
    if not visual.is_file():
        visual = folder / "Frames" / name
    if not audio.is_file() or not visual.exists():
        raise FileNotFoundError(
            f"{name}: {folder} needs AudioWAV/{name}.wav, and VideoFlash/{name}.flv or a folder "
            f"Frames/{name}/ of images"
        )
    return Clip(name, CREMAD_EMOTIONS.index(fields[2]), audio, visual)


def _class_folders(folder: Path) -> ClipSet:
    classes = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    train, test = (
        [
            Clip(f"{part}/{name}/{path.stem}", label, path, path)
            for label, name in enumerate(classes)
            for path in sorted((folder / part / name).glob("*.mp4"))
        ]
        for part in ("train", "test")
    )
    if not train or not test:
        raise FileNotFoundError(f"no CLASS/CLIP.mp4 of the same classes in {folder}/train and test")
    return ClipSet(folder.resolve().name, classes, 10, train, test)


def prepared_path(folder: Path, clip: Clip) -> Path:
    return folder / f"{clip.name}.npz"


def prepare(
    clips: list[Clip],
    folder: Path,
    seconds: int,
    size: int,
    workers: int = 1,
    done: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Decode each clip that is not yet in ``folder``; call ``done`` after each of the clips.

    A file appears only when it is complete, so that an interrupted preparation goes on where
    it was.

    Returns:
        By name, why a clip could not be decoded.
    """
    failed: dict[str, str] = {}

    def prepare_one(clip: Clip) -> None:
        path = prepared_path(folder, clip)
        if path.is_file():
            return
        try:
            spectrogram, frames = decode(clip, seconds, size)
        except (av.FFmpegError, ValueError) as error:
            failed[clip.name] = str(error)
        else:
            _save(path, spectrogram=spectrogram, frames=frames)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(prepare_one, clips):
                done()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _save(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def decode(clip: Clip, seconds: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log spectrogram (frequencies, time), float16, and frames (FRAMES, 3, size, size), uint8."""
    samples = np.resize(read_audio(clip.audio, seconds), seconds * RATE)  # repeats the short ones
    images = read_images(clip.visual) if clip.visual.is_dir() else read_video(clip.visual)
    frames = [image.to_ndarray(format="rgb24", width=size, height=size) for image in images]
    return log_spectrogram(samples), np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


def log_spectrogram(samples: np.ndarray) -> np.ndarray:
    waves = torch.from_numpy(samples).clamp(-1, 1)
    window = torch.hann_window(WINDOW)
    spectra = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs()
    return (spectra + 1e-7).log().half().numpy()


def read_audio(path: Path, seconds: int) -> np.ndarray:
    """Mono samples in -1..1 at RATE, of the first ``seconds`` or a little more."""
    chunks: list[np.ndarray] = []
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        for frame in container.decode(audio=0):
            chunks += [part.to_ndarray()[0] for part in resampler.resample(frame)]
            if sum(map(len, chunks)) >= seconds * RATE:
                break
        chunks += [part.to_ndarray()[0] for part in resampler.resample(None)]
    if not sum(map(len, chunks)):
        raise ValueError(f"{path} has no sound")
    return np.concatenate(chunks)


def read_video(path: Path) -> list[av.VideoFrame]:
    """The middle frame of each of FRAMES equal parts."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no pictures")
        packets = container.demux(video=0)
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
    wanted = [times[place] for place in middles(len(times))]
    found: list[av.VideoFrame] = []
    # Once more from the start: few decoders seek to an exact frame of every file.
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            while frame.pts is not None and frame.pts >= wanted[len(found)]:
                found.append(frame)
                if len(found) == FRAMES:
                    return found
    raise ValueError(f"{path} ends before its last frame")


def read_images(folder: Path) -> list[av.VideoFrame]:
    """As :func:`read_video`, of frames that are images, in the order of their names."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
    found = []
    for place in middles(len(paths)):
        with av.open(str(paths[place])) as container:
            found.append(next(container.decode(video=0)))
    return found


def middles(count: int) -> list[int]:
    """The places in the middle of FRAMES equal parts of ``count``."""
    if count == 0:
        raise ValueError("there is no frame")
    return [(2 * part + 1) * count // (2 * FRAMES) for part in range(FRAMES)]


class PreparedClips(Dataset[tuple[Tensor, Tensor, int]]):
    """Spectrogram (1, frequencies, time), frames (FRAMES, 3, size, size) in 0..255 and label."""

    def __init__(self, clips: list[Clip], folder: Path) -> None:
        self.clips, self.folder = clips, folder

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        clip = self.clips[index]
        with np.load(prepared_path(self.folder, clip)) as file:
            spectrogram = torch.from_numpy(file["spectrogram"]).float().unsqueeze(0)
            return spectrogram, torch.from_numpy(file["frames"]), clip.label
