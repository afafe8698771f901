"""UTD-MHAD and AVLetters: the data paths on arrays of the right shapes, and short runs."""

import argparse
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.examples.running import METHODS, run

pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

import avletters
import joint_only
import utd_mhad
from sequences import read_arrays, split_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets in noise, every label at every subject."""
    folder = tmp_path_factory.mktemp("sequences")
    random = np.random.default_rng(0)
    label, subject = (x.ravel() for x in np.meshgrid(np.arange(27), np.arange(1, 9)))
    trials = len(label)
    np.savez(
        folder / "utd_mhad.npz",
        inertial=random.normal(label[:, None, None], 1, (trials, 96, 6)).astype(np.float32),
        skeleton=random.normal(size=(trials, 48, 20, 3)).astype(np.float32),
        depth=random.integers(0, 255, (trials, 8, 48, 64), dtype=np.uint8),
        label=label,
        subject=subject,
    )
    grid = np.meshgrid(np.arange(26), np.arange(1, 4), np.arange(10))
    label, repetition, speaker = (x.ravel() for x in grid)
    np.savez(
        folder / "avletters.npz",
        mfcc=random.normal(label[:, None, None], 1, (780, 48, 26)).astype(np.float32),
        video=random.integers(0, 255, (780, 24, 30, 40), dtype=np.uint8),
        label=label,
        repetition=repetition,
        speaker=speaker,
    )
    return folder


@pytest.mark.parametrize(
    ("name", "options", "heads", "blocks"),
    [
        ("utd_mhad", [], ["mm", "inertial", "skeleton"], ["mm+inertial", "mm+skeleton"]),
        pytest.param(
            "utd_mhad",
            ["--modalities", "accelerometer", "gyroscope", "depth"],
            ["mm", "accelerometer", "gyroscope", "depth"],
            ["mm+accelerometer", "mm+gyroscope", "mm+depth"],
            marks=pytest.mark.slow,
        ),
        ("avletters", ["--split", "talker"], ["mm", "audio", "lips"], ["mm+audio", "mm+lips"]),
    ],
)
def test_all_methods_run(
    name: str, options: list[str], heads: list[str], blocks: list[str], tiny: Path, tmp_path: Path
) -> None:
    document = run(name, tmp_path, "--data", str(tiny), "--quick", "--seeds", "1", *options)
    runs = document["runs"]
    assert isinstance(runs, dict)
    assert set(runs) == METHODS
    for method, (only,) in runs.items():
        assert list(only["accuracy"]) == heads
        assert list(only["cosines"]) == ([] if method == "one joint loss" else blocks)
    # The plain sum once was made longer by gamma, and was the control under another name.
    assert runs["uniform"][0]["cosines"] != runs["uniform x 1.5"][0]["cosines"]


def options(data: Path, *, validate: bool, split: str = "") -> argparse.Namespace:
    modalities = utd_mhad.DEFAULT
    return argparse.Namespace(
        data=data, validate=validate, split=split, quick=False, modalities=modalities
    )


def test_even_subjects_are_the_test_set_and_one_odd_subject_validates(tiny: Path) -> None:
    train, test = utd_mhad.make_data(options(tiny, validate=False), 0)
    assert len(train) == len(test) == 4 * 27
    sizes = [
        tuple(map(len, utd_mhad.make_data(options(tiny, validate=True), seed))) for seed in range(4)
    ]
    assert sizes == 4 * [(3 * 27, 27)]


def test_the_splits_of_the_letters(tiny: Path) -> None:
    with np.load(tiny / "avletters.npz") as file:
        repetition, speaker = file["repetition"], file["speaker"]
    for split, validate in (("talker", False), ("talker", True), ("repetition", True)):
        chosen = options(tiny, validate=validate, split=split)
        train, test = avletters.split_utterances(repetition, speaker, chosen, 1)
        assert not (train & test).any()
        seen = train | test
        if split == "talker":
            assert set(speaker[test]) == ({1} if validate else {7, 8, 9})
            assert not validate or not np.isin(speaker[seen], (7, 8, 9)).any()
        else:
            assert set(repetition[train]) == {1}
            assert set(repetition[test]) == {2}


@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_scaled_by_the_training_samples_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 5 + 3 * torch.randn(40, 4, 7, generator=generator)
    train = np.arange(40) < 20
    scaled = split_of({"x": x}, np.zeros(40), train, train).inputs[0]
    torch.testing.assert_close(scaled.mean((0, 2)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2)), torch.ones(4), atol=1e-5, rtol=0)
    changed = x.clone()
    changed[20:] *= 100
    again = split_of({"x": changed}, np.zeros(40), train, train).inputs[0]
    torch.testing.assert_close(again, scaled)


def test_where_a_subject_stands_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    with np.load(tiny / "utd_mhad.npz") as file:
        arrays = dict(file)
    arrays["skeleton"] = arrays["skeleton"] + np.array([1, -2, 0.5], dtype=np.float32)
    np.savez(tmp_path / "utd_mhad.npz", **arrays)
    inputs = [
        utd_mhad.make_data(options(folder, validate=False), 0)[0].inputs[1]
        for folder in (tiny, tmp_path)
    ]
    torch.testing.assert_close(*inputs, atol=1e-5, rtol=0)


def accuracies_of(printed: str) -> dict[str, float]:
    """What joint_only.py printed, by the way of training."""
    found = re.findall(r"^(joint loss|uniform|mmpareto) +([\d.]+) ± ", printed, re.MULTILINE)
    return {how: float(accuracy) for how, accuracy in found}


def test_from_one_joint_loss(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint_only.main(["--data", str(tiny), "--quick", "--seeds", "2"])
    printed = capsys.readouterr().out
    assert list(accuracies_of(printed)) == ["joint loss", "uniform", "mmpareto"]
    assert all(f"\n{block}  whole 0-1 " in printed for block in ("mm+inertial", "mm+skeleton"))


def test_from_one_joint_loss_on_the_real_data(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (data_dir / "utd_mhad.npz").is_file():
        pytest.skip("no utd_mhad.npz in MMPARETO_DATA")
    joint_only.main(["--data", str(data_dir), "--seeds", "1", "--epochs", "5"])
    accuracies = accuracies_of(capsys.readouterr().out)
    # One of 27 actions is 4 %.
    assert min(accuracies.values()) > 30, accuracies


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", label=np.zeros(3))
    with pytest.raises(SystemExit, match=r"some\.npz has no mfcc, video; it has label"):
        read_arrays(tmp_path / "some.npz", ("video", "mfcc", "label"))


@pytest.mark.parametrize(
    ("name", "module", "split", "sizes"),
    [
        ("utd_mhad", utd_mhad, "", (431, 430)),
        ("avletters", avletters, "talker", (546, 234)),
        ("avletters", avletters, "repetition", (520, 260)),
    ],
)
def test_the_real_data(
    name: str, module: ModuleType, split: str, sizes: tuple[int, int], data_dir: Path
) -> None:
    if not (data_dir / f"{name}.npz").is_file():
        pytest.skip(f"no {name}.npz in MMPARETO_DATA")
    train, test = module.make_data(options(data_dir, validate=False, split=split), 0)
    assert (len(train), len(test)) == sizes
    assert all(bool(x.isfinite().all()) for x in (*train.inputs, *test.inputs))
    logits = module.make_model(False)(*test[torch.arange(8)].inputs)
    assert {tuple(x.shape) for x in logits.values()} == {(8, module.CLASSES)}
