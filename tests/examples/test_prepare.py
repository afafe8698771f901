"""UTD-MHAD and AVLetters made of files of the form in which their authors give them."""

import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

import avletters
import prepare_sequences
import utd_mhad
from scipy.io import savemat


@pytest.mark.parametrize("depth", [False, True])
def test_trials(depth: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("Inertial", "Skeleton", *(["Depth"] if depth else [])):
        (tmp_path / folder).mkdir()
    ramp = np.linspace(0, 1, 150)[:, None] * np.arange(6)
    for action, subject in ((1, 1), (27, 2)):
        name = f"a{action}_s{subject}_t1"
        skeleton = random.normal(size=(20, 3, 48))
        savemat(tmp_path / "Inertial" / f"{name}_inertial.mat", {"d_iner": ramp})
        savemat(tmp_path / "Skeleton" / f"{name}_skeleton.mat", {"d_skel": skeleton})
        if depth:
            frames = np.full((240, 320, 30), 1600, dtype=np.int16)
            savemat(tmp_path / "Depth" / f"{name}_depth.mat", {"d_depth": frames})
    output = tmp_path / "out"
    prepare_sequences.main(["utd_mhad", "--data", str(tmp_path), "--output", str(output)])
    modalities = ["inertial", "skeleton", *(["depth"] if depth else [])]
    options = utd_mhad.parse_options(["--data", str(output), "--modalities", *modalities])
    train, test = utd_mhad.make_data(options, 0)
    assert [labels.tolist() for labels in (train.labels["mm"], test.labels["mm"])] == [[0], [26]]
    with np.load(output / "utd_mhad.npz") as file:
        # A line stays one, and what has the right length already stays as it is.
        expected = np.linspace(0, 1, 96)[:, None] * np.arange(6)
        np.testing.assert_allclose(file["inertial"][0], expected, atol=1e-6)
        np.testing.assert_allclose(file["skeleton"][1], skeleton.transpose(2, 0, 1), rtol=1e-6)
        if depth:
            assert file["depth"].shape == (2, 8, 48, 64)
            assert file["depth"].dtype == np.uint8
            assert np.all(file["depth"] == 100)


def write_htk(path: Path, frames: np.ndarray, kind: int = 6) -> None:
    header = struct.pack(">iihh", len(frames), 100000, 4 * frames.shape[1], kind)
    path.write_bytes(header + frames.astype(">f4").tobytes())


def test_utterances(tmp_path: Path) -> None:
    (tmp_path / "Lips").mkdir()
    sounds = tmp_path / "Audio" / "mfcc" / "Clean"
    sounds.mkdir(parents=True)
    frame = np.repeat(np.repeat(np.arange(30 * 40).reshape(30, 40) % 250, 2, 0), 2, 1)
    for letter, talker in (("A", "Anya"), ("Z", "Bill")):
        for number in (1, 2, 3):
            video = np.repeat(frame.ravel(order="F")[:, None], 25, 1)
            path = tmp_path / "Lips" / f"{letter}{number}_{talker}-lips.mat"
            savemat(path, {"vid": video, "siz": np.array([[60, 80, 25]])})
            write_htk(sounds / f"{letter}{number}_{talker}.mfcc", np.full((49, 26), number))
    prepare_sequences.main(["avletters", "--data", str(tmp_path)])
    train, test = avletters.make_data(avletters.parse_options(["--data", str(tmp_path)]), 0)
    assert (len(train), len(test)) == (4, 2)
    assert test.labels["mm"].tolist() == [0, 25]
    with np.load(tmp_path / "avletters.npz") as file:
        assert file["video"].shape == (6, 24, 30, 40)
        assert np.array_equal(file["video"][0, 0], np.arange(30 * 40).reshape(30, 40) % 250)
        assert np.array_equal(file["mfcc"][:, 0, 0], file["repetition"])
        assert file["speaker"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_compressed_sound_is_refused(tmp_path: Path) -> None:
    write_htk(tmp_path / "a.mfcc", np.zeros((2, 26)), kind=6 + 0o2000)
    with pytest.raises(ValueError, match="compressed"):
        prepare_sequences.read_htk(tmp_path / "a.mfcc")
