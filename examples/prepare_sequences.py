"""Makes utd_mhad.npz and avletters.npz of the files that the data sets' authors give.

    python prepare_sequences.py utd_mhad --data DIR    # DIR/Inertial/a1_s1_t1_inertial.mat,
                                                       # Skeleton/..., and Depth/... if there
    python prepare_sequences.py avletters --data DIR   # DIR/Lips/A1_Anya-lips.mat,
                                                       # Audio/mfcc/Clean/A1_Anya.mfcc

The result is written to DIR too, or to --output.
Every recording is resampled to one length by linear interpolation in time. Tested on files of this
form that the tests make; not yet run on the data sets' own.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

try:
    from scipy.io import loadmat
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed: pip install '.[examples]' in a checkout brings it"
    ) from error

Arrays = dict[str, np.ndarray]
TRIAL = re.compile(r"a(\d+)_s(\d+)_t(\d+)_inertial")
UTTERANCE = re.compile(r"([A-Z])(\d)_(\w+)-lips")
DEPTH_STEP = 16  # mm of depth for each grey level: 255 levels reach beyond a room
POOLED = {"depth": 5, "video": 2}  # sides of the pixels that become one
COMPRESSED = 0o2000  # in an HTK file's kind
GET_DATA = {
    "utd_mhad": """
DIR should hold the folders Inertial and Skeleton, and Depth if wanted, of UTD-MHAD, unpacked:
https://personal.utdallas.edu/~kehtar/UTD-MHAD.html
""",
    "avletters": """
DIR should hold the folders Lips and Audio of AVLetters, which its authors give for research
(Matthews, Cootes, Bangham, Cox & Harvey, IEEE TPAMI 24(2), 2002).
""",
}


def utd_mhad(folder: Path) -> Arrays:
    """The arrays that ``utd_mhad.py`` reads; depth only if its folder is there."""
    paths = _sorted(folder / "Inertial", TRIAL)
    numbers = np.array([_match(TRIAL, path).groups() for path in paths], dtype=np.int64)
    found = {
        "inertial": _stack(paths, lambda path: resampled(_mat(path, "d_iner"), 96)),
        "label": numbers[:, 0] - 1,
        "subject": numbers[:, 1],
        "trial": numbers[:, 2],
    }
    skeletons = [_beside(path, "Skeleton", "skeleton") for path in paths]
    found["skeleton"] = _stack(
        skeletons, lambda path: resampled(_mat(path, "d_skel").transpose(2, 0, 1), 48)
    )
    if (folder / "Depth").is_dir():
        depths = [_beside(path, "Depth", "depth") for path in paths]
        found["depth"] = _stack(depths, _depth).astype(np.uint8)
    return found


def _depth(path: Path) -> np.ndarray:
    """Frames (8, 48, 64) of (240, 320, time) in mm."""
    frames = pooled(_mat(path, "d_depth").transpose(2, 0, 1), POOLED["depth"])
    return as_grey(resampled(frames, 8) / DEPTH_STEP)


def avletters(folder: Path) -> Arrays:
    """The arrays that ``avletters.py`` reads; talkers in alphabetical order."""
    paths = _sorted(folder / "Lips", UTTERANCE)
    names = [_match(UTTERANCE, path).groups() for path in paths]
    talkers = sorted({talker for _, _, talker in names})
    sounds = [folder / "Audio" / "mfcc" / "Clean" / f"{a}{n}_{t}.mfcc" for a, n, t in names]
    return {
        "mfcc": _stack(sounds, lambda path: resampled(read_htk(path), 48)),
        "video": _stack(paths, _lips).astype(np.uint8),
        "label": np.array([ord(letter) - ord("A") for letter, _, _ in names]),
        "repetition": np.array([int(number) for _, number, _ in names]),
        "speaker": np.array([talkers.index(talker) for _, _, talker in names]),
    }


def _lips(path: Path) -> np.ndarray:
    """Frames (24, 30, 40); a column of ``vid`` is a frame (60, 80), column by column."""
    height, width, count = loadmat(path)["siz"].ravel().astype(int)
    frames = _mat(path, "vid").T.reshape(count, width, height).transpose(0, 2, 1)
    return as_grey(resampled(pooled(frames, POOLED["video"]), 24))


def read_htk(path: Path) -> np.ndarray:
    """Frames (time, coefficients) of an HTK parameter file: a header, then big-endian floats."""
    content = path.read_bytes()
    count, _, size, kind = struct.unpack(">iihh", content[:12])
    if kind & COMPRESSED:
        raise ValueError(f"{path} is compressed: only plain floats are read")
    return np.frombuffer(content, ">f4", count * size // 4, offset=12).reshape(count, -1)


def resampled(frames: np.ndarray, count: int) -> np.ndarray:
    """Linear interpolation of frames (time, ...) at ``count`` even places, ends included."""
    places = np.linspace(0, len(frames) - 1, count)
    before = places.astype(int)
    after = np.minimum(before + 1, len(frames) - 1)
    share = (places - before).reshape(-1, *[1] * (frames.ndim - 1))
    mixed: np.ndarray = (1 - share) * frames[before] + share * frames[after]
    return mixed


def pooled(frames: np.ndarray, side: int) -> np.ndarray:
    """Mean of squares of pixels, of frames (time, height, width)."""
    time, height, width = frames.shape
    squares = frames.reshape(time, height // side, side, width // side, side)
    mean: np.ndarray = squares.mean((2, 4))
    return mean


def as_grey(values: np.ndarray) -> np.ndarray:
    """Rounded to 0..255."""
    rounded: np.ndarray = values.clip(0, 255).round()
    return rounded


def _sorted(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    paths = sorted(path for path in folder.glob("*.mat") if pattern.fullmatch(path.stem))
    if not paths:
        raise FileNotFoundError(f"no file like {pattern.pattern}.mat in {folder}")
    return paths


def _match(pattern: re.Pattern[str], path: Path) -> re.Match[str]:
    found = pattern.fullmatch(path.stem)
    assert found is not None
    return found


def _beside(path: Path, folder: str, kind: str) -> Path:
    return path.parent.parent / folder / path.name.replace("inertial", kind)


def _mat(path: Path, name: str) -> np.ndarray:
    values: np.ndarray = loadmat(path)[name].astype(np.float64)
    return values


def _stack(paths: list[Path], read: Callable[[Path], np.ndarray]) -> np.ndarray:
    return np.stack([read(path).astype(np.float32) for path in paths])


def main(arguments: list[str] | None = None) -> None:
    makers = {"utd_mhad": utd_mhad, "avletters": avletters}
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], usage="%(prog)s {utd_mhad,avletters} --data DIR"
    )
    parser.add_argument("data_set", choices=makers)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the authors' files, unpacked")
    parser.add_argument("--output", type=Path, help="folder for the npz file (default: DIR)")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data DIR is missing." + GET_DATA[options.data_set])
    try:
        arrays = makers[options.data_set](options.data)
    except FileNotFoundError as error:
        parser.error(f"{error}." + GET_DATA[options.data_set])
    output = options.output or options.data
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{options.data_set}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    print(f"{path}: {', '.join(f'{name} {values.shape}' for name, values in arrays.items())}")


if __name__ == "__main__":
    main()
