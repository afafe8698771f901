"""The CREMA-D example from wav and flv files made here to what a resumed training gives."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="the video extra is not installed")
pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

import clips  # noqa: E402
import common  # noqa: E402
import cremad  # noqa: E402
from clips import Clip, find_clips, prepare, prepared_path  # noqa: E402

RATE, TONE = 16000, 1000  # Hz; CREMA-D's rate, not the one that the example resamples to
PICTURES = 10  # of a video; number i is gray of level 20 i
SIZE = 32


def write_clip(path: Path, *, sound: bool = True, pictures: bool = True) -> None:
    """A tone of half a second and PICTURES gray pictures, as the suffix of the file has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codecs = {".wav": "pcm_s16le", ".flv": "flv", ".mp4": "libx264"}
    with av.open(str(path), "w") as container:
        video = audio = None
        if pictures:
            video = container.add_stream(codecs[path.suffix], rate=10)
            video.width, video.height, video.pix_fmt = 96, 72, "yuv420p"
        if sound:
            audio = container.add_stream("pcm_s16le" if not video else "aac", rate=RATE)
            audio.layout = "mono"
        if video:
            for number in range(PICTURES):
                gray = np.full((72, 96, 3), 20 * number, dtype=np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
            container.mux(video.encode())
        if audio:
            time = np.arange(RATE // 2) / RATE
            tone = (8000 * np.sin(2 * np.pi * TONE * time)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            container.mux(audio.encode(frame))
            container.mux(audio.encode())


@pytest.fixture
def fewer_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the columns: what the ResNet of the sound costs, it costs by the column."""
    monkeypatch.setattr(clips, "HOP", 4 * clips.HOP)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four clips of actor 1009 to train, two of actor 1010 to test."""
    folder = tmp_path / "cremad"
    names = [f"1009_DFA_{emotion}_XX" for emotion in ("ANG", "HAP", "NEU", "SAD")]
    names += [f"1010_IEO_{emotion}_HI" for emotion in ("ANG", "SAD")]
    for name in names:
        write_clip(folder / "AudioWAV" / f"{name}.wav", pictures=False)
        write_clip(folder / "VideoFlash" / f"{name}.flv", sound=False)
    return folder


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    options = ["--data", str(data), "--output", str(output), "--frame-size", str(SIZE)]
    return [*options, "--workers", "0", "--device", "cpu", "--methods", "MMPareto", *more]


def all_clips(folder: Path) -> list[Clip]:
    found = find_clips(folder)
    return found.train + found.test


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_spectra")
def test_a_resumed_training_is_the_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cremad, "BATCH_SIZE", 2)
    monkeypatch.setattr(cremad, "DECAY_EPOCH", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = cremad.main(arguments(data, whole, "--epochs", "2"))
    printed = capsys.readouterr().out
    assert "cremad: 4 clips to train, 2 to test" in printed
    assert "multimodal" in printed
    assert (whole / "clips_cremad.png").read_bytes().startswith(b"\x89PNG")

    step, taken = common.train_step, 0

    def interrupted(*inputs: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 4:  # the second of the second epoch
            raise KeyboardInterrupt
        step(*inputs)

    monkeypatch.setattr(cremad, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cremad.main(arguments(data, parts, "--epochs", "2"))
    with pytest.raises(SystemExit, match="--resume goes on from there"):
        cremad.main(arguments(data, parts, "--epochs", "2"))
    with pytest.raises(SystemExit, match=r"trained with lr 0\.002, not 0\.1"):
        cremad.main(arguments(data, parts, "--epochs", "2", "--lr", "0.1", "--resume"))
    resumed = cremad.main(arguments(data, parts, "--epochs", "2", "--resume"))

    assert taken == 4 + 2  # the second epoch again, not the first
    (run,), (expected_run,) = resumed.runs["MMPareto"], expected.runs["MMPareto"]
    assert run == expected_run
    assert [len(curve) for curve in run.cosines.values()] == [4, 4]
    states = [torch.load(folder / "cremad_MMPareto_0.ckpt") for folder in (whole, parts)]
    assert states[0]["schedule"]["last_epoch"] == 2
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)

    # One that is finished is only scored again.
    again = cremad.main(arguments(data, parts, "--epochs", "2", "--resume"))
    assert taken == 4 + 2
    assert again.runs["MMPareto"] == [run]


@pytest.mark.usefixtures("fewer_spectra")
def test_folders_of_clips_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "kinetics"
    for part, count in (("train", 2), ("test", 1)):
        for name in ("playing piano", "tickling"):
            for number in range(count):
                write_clip(data / part / name / f"clip{number}.mp4")
    found = find_clips(data)
    assert found.classes == ("playing piano", "tickling")
    assert [clip.label for clip in found.train] == [0, 0, 1, 1]
    comparison = cremad.main(arguments(data, tmp_path / "out", "--epochs", "1"))
    assert "kinetics: 4 clips to train, 2 to test" in capsys.readouterr().out
    (run,) = comparison.runs["MMPareto"]
    assert set(run.accuracy) == {"mm", "audio", "visual"}
    assert set(run.cosines) == {"mm+audio", "mm+visual"}


def test_an_interrupted_preparation_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = all_clips(data)
    assert prepare(wanted, tmp_path / "whole", 3, SIZE) == {}
    decode, decoded = clips.decode, []

    def noted(clip: Clip, *inputs: int) -> Any:
        decoded.append(clip.name)
        return decode(clip, *inputs)

    def cut_short(file: Any, **_: Any) -> None:
        file.write(b"half a file")
        if len(decoded) == 3:
            raise KeyboardInterrupt
        file.seek(0)
        savez(file, **_)

    savez = np.savez
    monkeypatch.setattr(clips, "decode", noted)
    monkeypatch.setattr(np, "savez", cut_short)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, parts, 3, SIZE)
    monkeypatch.setattr(np, "savez", savez)
    advanced = []
    prepare(wanted, parts, 3, SIZE, done=lambda: advanced.append(1))

    assert decoded[:3] == [clip.name for clip in wanted[:3]]
    assert set(decoded[3:]) >= {clip.name for clip in wanted[2:]}
    assert not set(decoded[3:]) & {clip.name for clip in wanted[:2]}
    assert len(advanced) == len(wanted)
    for clip in wanted:
        with (
            np.load(prepared_path(tmp_path / "whole", clip)) as first,
            np.load(prepared_path(parts, clip)) as second,
        ):
            assert set(first) == set(second) == {"spectrogram", "frames"}
            assert all((first[key] == second[key]).all() for key in first)


@pytest.mark.parametrize("suffix", [".flv", ".mp4"])
def test_the_middle_frame_of_each_half_is_taken(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    write_clip(path, sound=suffix == ".mp4")
    frames = [frame.to_ndarray(format="rgb24") for frame in clips.read_video(path)]
    assert [frame.shape for frame in frames] == [(72, 96, 3)] * 2
    assert [round(float(frame.mean()) / 20) for frame in frames] == [2, 7]


def test_extracted_frames_serve_as_a_video(data: Path) -> None:
    name = "1009_DFA_ANG_XX"
    (data / "VideoFlash" / f"{name}.flv").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*Frames/{name}/"):
        find_clips(data)
    folder = data / "Frames" / name
    folder.mkdir(parents=True)
    for number in range(4):
        with av.open(str(folder / f"{number:03}.jpg"), "w") as container:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            gray = np.full((48, 64, 3), 60 * number, dtype=np.uint8)
            picture = av.VideoFrame.from_ndarray(gray, format="rgb24").reformat(format="yuvj420p")
            container.mux(stream.encode(picture))
            container.mux(stream.encode())
    (clip,) = (clip for clip in find_clips(data).train if clip.name == name)
    _, frames = clips.decode(clip, 1, SIZE)
    assert frames.shape == (2, 3, SIZE, SIZE)
    assert [round(float(frame.mean()) / 60) for frame in frames] == [1, 3]


def test_sound_is_resampled_repeated_and_put_on_a_log_scale(data: Path) -> None:
    path = data / "AudioWAV" / "1009_DFA_ANG_XX.wav"
    samples = clips.read_audio(path, seconds=3)
    assert abs(len(samples) - 22050 / 2) < 50
    assert abs(samples).max() == pytest.approx(8000 / 2**15, rel=0.05)
    spectrogram, _ = clips.decode(find_clips(data).train[0], 3, SIZE)
    assert spectrogram.shape == (257, 188)
    # The tone, in every column, as what was there is repeated.
    assert set(spectrogram.argmax(0)) <= {round(TONE * 512 / 22050) + i for i in (-1, 0, 1)}


def test_what_cannot_be_decoded_is_named_and_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "VideoFlash" / "1009_DFA_HAP_XX.flv").write_bytes(b"no video")
    options = cremad.parse_options(arguments(data, tmp_path, "--workers", "2"))
    train, test = cremad.prepare_all(find_clips(data), options)
    assert "left out: 1009_DFA_HAP_XX: " in capsys.readouterr().out
    assert [clip.name[9:12] for clip in train.clips] == ["ANG", "NEU", "SAD"]
    assert len(test) == 2
    spectrogram, frames, label = train[2]
    assert (spectrogram.shape, frames.shape, label) == ((1, 257, 188), (2, 3, SIZE, SIZE), 5)

    for path in (data / "VideoFlash").glob("1010_*"):
        path.write_bytes(b"no video")
    with pytest.raises(SystemExit, match="none of the 2 clips could be decoded"):
        cremad.prepare_all(
            find_clips(data),
            cremad.parse_options([*arguments(data, tmp_path), "--frame-size", "16"]),
        )

    silent = tmp_path / "silent.mp4"
    write_clip(silent, sound=False)
    with pytest.raises(ValueError, match="has no sound"):
        clips.read_audio(silent, 3)


def test_no_actor_is_on_both_sides_unless_lists_say_so(tmp_path: Path) -> None:
    names = [
        f"{actor}_IEO_{emotion}_LO" for actor in range(1001, 1092) for emotion in ("FEA", "DIS")
    ]
    for folder, suffix in (("AudioWAV", "wav"), ("VideoFlash", "flv")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.{suffix}").touch()
    found = find_clips(tmp_path)
    assert sorted(clip.name for clip in found.train + found.test) == sorted(names)
    actors = [{clip.name[:4] for clip in part} for part in (found.train, found.test)]
    assert actors[1] == {str(actor) for actor in range(1010, 1091, 10)}
    assert not actors[0] & actors[1]
    assert found.classes[found.test[0].label] == found.test[0].name[9:12]

    (tmp_path / "train.csv").write_text("1010_IEO_FEA_LO,FEA\n1001_IEO_DIS_LO,DIS\n")
    (tmp_path / "test.csv").write_text("\ufeff1001_IEO_FEA_LO,FEA\n", encoding="utf-8")
    found = find_clips(tmp_path)
    assert [clip.name for clip in found.train] == ["1010_IEO_FEA_LO", "1001_IEO_DIS_LO"]
    assert [(clip.name, clip.label) for clip in found.test] == [("1001_IEO_FEA_LO", 2)]

    (tmp_path / "test.csv").write_text("1001_IEO_JOY_LO,JOY\n")
    with pytest.raises(ValueError, match="1001_IEO_JOY_LO"):
        find_clips(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither AudioWAV/"):
        find_clips(tmp_path)


def test_clips_that_are_broken_at_the_source_are_named_and_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files need not be there."""
    whole = "1009_DFA_ANG_XX"
    (data / "train.csv").write_text("".join(f"{n},SAD\n" for n in (*clips.CREMAD_BROKEN, whole)))
    (data / "test.csv").write_text("1010_IEO_SAD_HI,SAD\n")
    train, test = cremad.prepare_all(
        find_clips(data), cremad.parse_options(arguments(data, tmp_path, "--workers", "1"))
    )
    assert [clip.name for clip in train.clips + test.clips] == [whole, "1010_IEO_SAD_HI"]
    printed = capsys.readouterr().out
    assert all(f"left out: {name}: broken at the source" in printed for name in clips.CREMAD_BROKEN)


@pytest.fixture
def real(data_dir: Path) -> Path:
    """Six clips of CREMA-D, and the published split of all."""
    folder = data_dir / "cremad_clips"
    if not folder.is_dir():
        pytest.skip("no cremad_clips in MMPARETO_DATA")
    return folder


@pytest.fixture
def six(real: Path, tmp_path: Path) -> Path:
    """The six clips, on the sides that the published split gives them."""
    folder = tmp_path / "six"
    for kind in ("AudioWAV", "VideoFlash"):
        shutil.copytree(real / kind, folder / kind)
    for name in ("train.csv", "test.csv"):
        lines = (real / name).read_text().splitlines()
        there = [x for x in lines if (real / "AudioWAV" / f"{x.split(',')[0]}.wav").is_file()]
        (folder / name).write_text("\n".join(there))
    return folder


def test_the_published_split(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("is_file", "exists"):  # 14,884 files that are not here
        monkeypatch.setattr(Path, method, lambda path: True)
    found = find_clips(real)
    assert (len(found.train), len(found.test)) == (6694, 744)
    assert set(found.broken) == set(clips.CREMAD_BROKEN)
    emotions: dict[str, str] = {}
    for name in ("train.csv", "test.csv"):
        emotions |= dict(line.split(",") for line in (real / name).read_text().split())
    assert len(emotions) == 7442
    both = found.train + found.test
    assert {clip.name for clip in both} == set(emotions) - set(clips.CREMAD_BROKEN)
    assert all(found.classes[clip.label] == emotions[clip.name] for clip in both)


def test_real_clips_are_decoded(six: Path) -> None:
    wanted = all_clips(six)
    assert sorted(clip.label for clip in wanted) == list(range(6))
    for clip in wanted:
        seconds = len(clips.read_audio(clip.audio, 3)) / clips.RATE
        with av.open(str(clip.visual)) as video:
            assert seconds == pytest.approx(video.duration / av.time_base, abs=0.1)
        spectrogram, (first, last) = clips.decode(clip, 3, 64)
        # Speech of 16 kHz has nothing above 8 kHz.
        hertz = np.linspace(0, clips.RATE / 2, len(spectrogram))
        speech, nothing = spectrogram[(hertz > 200) & (hertz < 4000)], spectrogram[hertz > 8500]
        assert speech.mean() > nothing.mean() + 3
        # One face, which moves, before a green screen.
        assert 0 < abs(first.astype(int) - last).mean() < 10
        red, green, blue = first[:, 5].mean(-1)
        assert green > 1.5 * max(red, blue)


@pytest.mark.usefixtures("fewer_spectra")
def test_an_epoch_on_real_clips(
    six: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = cremad.main(arguments(six, tmp_path / "out", "--epochs", "1"))
    assert "cremad: 4 clips to train, 2 to test" in capsys.readouterr().out
    (run,) = comparison.runs["MMPareto"]
    assert [len(curve) for curve in run.cosines.values()] == [1, 1]
    assert all(-1 <= curve[0] <= 1 for curve in run.cosines.values())


def test_crops_are_parts_of_the_frame() -> None:
    """A horizontal ramp stays one, over a narrower range, rising or falling."""
    ramp = torch.linspace(0, 1, 24).expand(40, 2, 3, 24, 24)
    generator = torch.Generator().manual_seed(0)
    cropped = cremad.crop_and_flip(ramp, generator).flatten(0, 1)
    assert cropped.shape == (80, 3, 24, 24)
    assert cropped.min() >= 0
    assert cropped.max() <= 1
    torch.testing.assert_close(cropped, cropped[:, :1, :1].expand_as(cropped))
    slopes = cropped[:, 0, 0].diff(dim=-1).sum(-1)
    assert 20 < int((slopes > 0).sum()) < 60
    assert slopes.abs().min() >= 0.2  # a crop of 8 % is 0.24 to 0.33 wide
    assert slopes.abs().max() > 0.8
    again = cremad.crop_and_flip(ramp, torch.Generator().manual_seed(0)).flatten(0, 1)
    assert torch.equal(again, cropped)
