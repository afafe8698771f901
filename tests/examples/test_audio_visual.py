"""Spoken and written digits: the data path on a data set small enough to build, and the runs."""

import argparse
import gzip
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.examples.running import EXAMPLES, METHODS, run

pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

from audio_visual_digits import (
    RATE,
    make_data,
    mel_filters,
    read_speech,
    split_recordings,
)
from multimodal_transformer import BottleneckTransformer

from mmpareto_optim import MMParetoOptimizer

SPEAKERS = ("ada", "ben", "eva")
TAKES = 12
BLOCKS = {
    "audio_visual_digits": {"mm+audio", "mm+visual"},
    "multimodal_transformer": {"mm+audio+visual", "mm+audio", "mm+visual"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tone for each spoken digit, a bright row for each written one, in noise."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    (folder / "recordings").mkdir()
    for label in range(10):
        for number, speaker in enumerate(SPEAKERS):
            for take in range(TAKES):
                time = np.arange(2000 + 400 * number + 10 * take) / RATE
                tone = np.sin(2 * np.pi * (300 + 330 * label + 20 * number) * time)
                tone += 0.1 * random.standard_normal(len(time))
                path = folder / "recordings" / f"{label}_{speaker}_{take}.wav"
                with wave.open(str(path), "wb") as file:
                    file.setparams((1, 2, RATE, 0, "NONE", ""))
                    file.writeframes((9000 * tone).astype("<i2").tobytes())
    (folder / "mnist").mkdir()
    for name, rows in (("train", 200), ("t10k", 100)):
        labels = np.arange(rows) % 10
        images = random.integers(0, 40, (rows, 28, 28))
        images[np.arange(rows), 2 * labels + 4] = 255
        for kind, values in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            target = folder / "mnist" / f"{name}-{kind}-idx{values.ndim}-ubyte.gz"
            with gzip.open(target, "wb") as zipped:
                zipped.write(header + values.astype(np.uint8).tobytes())
    return folder


def options(data: Path, split: str, *, validate: bool = False) -> argparse.Namespace:
    return argparse.Namespace(data=data, split=split, validate=validate, quick=False)


@pytest.mark.parametrize("name", BLOCKS)
def test_all_methods_run_on_the_data_sets_own_files(name: str, tiny: Path, tmp_path: Path) -> None:
    document = run(name, tmp_path, "--data", str(tiny), "--quick", "--seeds", "1", "--seed", "3")
    runs = document["runs"]
    assert isinstance(runs, dict)
    assert set(runs) == METHODS
    for method, (seed,) in runs.items():
        assert set(seed["accuracy"]) == {"mm", "audio", "visual"}
        assert set(seed["cosines"]) == (set() if method == "one joint loss" else BLOCKS[name])


@pytest.mark.slow
def test_both_modalities_are_learned_from(tiny: Path, tmp_path: Path) -> None:
    """Tones and bright rows are easy: far above the tenth that guessing gives."""
    command = [sys.executable, str(EXAMPLES / "audio_visual_digits.py"), "--output", str(tmp_path)]
    command += ["--data", str(tiny), "--lr", "0.05", "--methods", "MMPareto"]
    command += ["--seeds", "1", "--epochs", "14"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if "±" in line and "MMPareto" in line)
    accuracies = [float(cell.split("±")[0]) for cell in row.split("│")[2:5]]
    assert min(accuracies) > 30, accuracies


def test_wav_files_and_the_packed_file_are_the_same_speech(tiny: Path, tmp_path: Path) -> None:
    unpacked = read_speech(tiny)
    samples, fields = [], []
    for path in sorted((tiny / "recordings").glob("*.wav")):
        with wave.open(str(path)) as file:
            samples.append(np.frombuffer(file.readframes(-1), dtype="<i2"))
        fields.append(path.stem.split("_"))
    labels, speakers, takes = (np.array(column) for column in zip(*fields, strict=True))
    np.savez(
        tmp_path / "fsdd.npz",
        samples=np.concatenate(samples),
        offsets=np.cumsum([0, *map(len, samples)]),
        labels=labels.astype(np.uint8),
        speakers=speakers,
        takes=takes.astype(np.uint8),
    )
    packed = read_speech(tmp_path)
    torch.testing.assert_close(packed.spectrograms, unpacked.spectrograms, rtol=0, atol=0)
    assert torch.equal(packed.labels, unpacked.labels)
    assert (packed.speakers == unpacked.speakers).all()
    assert (packed.takes == unpacked.takes).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", ["recording", "speaker"])
def test_no_recording_is_on_both_sides(split: str, seed: int, tiny: Path) -> None:
    speech = read_speech(tiny)
    train, test = split_recordings(speech, options(tiny, split), seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(speech.labels)))
    if split == "recording":
        assert set(speech.takes[test]) == set(range(5))
        assert set(speech.takes[train]) == set(range(5, TAKES))
    else:
        assert set(speech.speakers[test]) == {SPEAKERS[seed % 3]}
        assert SPEAKERS[seed % 3] not in speech.speakers[train]

    smaller, validation = split_recordings(speech, options(tiny, split, validate=True), seed)
    assert sorted([*smaller.tolist(), *validation.tolist()]) == train.tolist()
    if split == "speaker":
        assert not set(speech.speakers[smaller]) & set(speech.speakers[validation])


def test_what_is_said_is_what_is_written(tiny: Path) -> None:
    for split in make_data(options(tiny, "speaker"), seed=0):
        spectrograms, images = split.inputs
        rows = (images[:, 0].mean(-1).argmax(-1) - 4) // 2
        assert torch.equal(rows, split.labels["mm"])
        # A higher digit is a higher tone.
        pitch = spectrograms[:, 0, :, :8].mean(-1).argmax(-1)
        middle = [pitch[rows == label].float().mean() for label in range(10)]
        assert middle == sorted(middle)
        assert torch.allclose(spectrograms.mean((1, 2, 3)), torch.zeros(len(rows)), atol=1e-5)


def test_mel_filters_cover_all_frequencies() -> None:
    """Between the outer centres the triangles add up to one; each has its peak on its own."""
    filters = mel_filters()
    first, last = filters[0].argmax() + 1, filters[-1].argmax()
    torch.testing.assert_close(filters[:, first:last].sum(0), torch.ones(int(last - first)))
    peaks = filters.argmax(1)
    assert (peaks.diff() > 0).all()
    assert (filters >= 0).all()


def test_the_unimodal_losses_reach_both_encoders_of_the_transformer() -> None:
    model = BottleneckTransformer(joint=False)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = torch.randn(3, 1, 32, 48), torch.randn(3, 1, 28, 28)
    label = torch.tensor([1, 2, 3])

    def losses() -> dict[str, Tensor]:
        return {head: cross_entropy(x, label) for head, x in model(*inputs).items()}

    optimizer.backward(losses())
    found = {name: stats.objectives for name, stats in optimizer.stats.items()}
    assert found == {name: tuple(name.split("+")) for name in BLOCKS["multimodal_transformer"]}
    for modality in ("audio", "visual"):
        for head in ("mm", "audio", "visual"):
            params = list(model.tokens[modality].parameters())
            grads = torch.autograd.grad(losses()[head], params)
            assert all(bool(grad.abs().sum() > 0) for grad in grads), (modality, head)


def test_real_speech_is_read(data_dir: Path) -> None:
    speech = read_speech(data_dir)
    assert speech.spectrograms.shape == (3000, 1, 32, 48)
    assert torch.isfinite(speech.spectrograms).all()
    _, test = split_recordings(speech, options(data_dir, "recording"), 0)
    assert len(test) == 300
    _, test = split_recordings(speech, options(data_dir, "speaker"), 0)
    assert len(test) == 500
    assert set(speech.speakers[test]) == {"george"}
