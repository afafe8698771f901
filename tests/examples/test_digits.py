"""The examples as a newcomer runs them, cut short."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.running import METHODS, run

pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

import colored_gray_digits

from mmpareto_optim import MMParetoOptimizer

HEADS = {"colored_gray_digits": {"mm", "gray", "colour"}, "multimnist": {"left", "right"}}


@pytest.mark.parametrize("name", HEADS)
def test_digits(name: str, tmp_path: Path) -> None:
    document = run(name, tmp_path, "--seeds", "1", "--epochs", "1")
    runs = document["runs"]
    assert isinstance(runs, dict)
    assert set(runs) == METHODS
    for method, seeds in runs.items():
        assert len(seeds) == 1
        for seed in seeds:
            assert set(seed["accuracy"]) >= HEADS[name]
            assert all(0 <= value <= 100 for value in seed["accuracy"].values())
            assert bool(seed["cosines"]) is (method != "one joint loss")


def test_full_mnist_is_read(data_dir: Path, tmp_path: Path) -> None:
    """A tenth of an epoch would do, so the images are cut to the first thousand."""
    (tmp_path / "mnist").mkdir()
    for name, rows in (("train", 1000), ("t10k", 200)):
        for kind, rank in (("images", 3), ("labels", 1)):
            file = f"{name}-{kind}-idx{rank}-ubyte.gz"
            with gzip.open(data_dir / "mnist" / file) as source:
                header = source.read(4 + 4 * rank)
                size = int(np.prod(struct.unpack(f">{rank - 1}I", header[8:]))) if rank > 1 else 1
                body = source.read(rows * size)
            with gzip.open(tmp_path / "mnist" / file, "wb") as target:
                target.write(header[:4] + struct.pack(">I", rows) + header[8:] + body)
    output = tmp_path / "out"
    run("multimnist", output, "--data", str(tmp_path), "--seeds", "1", "--epochs", "1")
    assert (output / "multimnist_mnist.json").is_file()


def test_the_demo_trains_with_the_optimizer_that_its_file_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Noted(MMParetoOptimizer):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(list(kwargs["losses"]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(colored_gray_digits, "MMParetoOptimizer", Noted)
    options = ["--methods", "MMPareto", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)]
    colored_gray_digits.main(options)
    assert seen == 20 * [["mm", "gray", "colour"]]  # 1257 images in batches of 64
