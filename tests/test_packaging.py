"""What users install: the archives, what is in them, and what they say of themselves."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import mmpareto_optim
from mmpareto_optim.__main__ import report

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mmpareto_optim.__file__).parent
VERSION = mmpareto_optim.__version__
EPOCH = "1700000000"


def build(source: Path, output: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of a source tree."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(output)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def copy(folder: Path, modified: int, mode: int) -> Path:
    """The checkout as it lies elsewhere, of another time and with other permissions."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "results"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    for path in folder.rglob("*"):
        os.utime(path, (modified, modified))
        if path.is_file():
            path.chmod(mode)
    return folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("hatchling", reason="the test extra is not installed")
    folder = tmp_path_factory.mktemp("archives")
    return build(copy(folder / "source", 1_600_000_000, 0o644), folder / "dist")


@pytest.fixture(scope="module")
def names(archives: tuple[Path, Path]) -> tuple[set[str], set[str]]:
    """Of the files in the sdist, below its folder, and in the wheel."""
    sdist, wheel = archives
    with tarfile.open(sdist) as tar:
        in_sdist = {member.name.partition("/")[2] for member in tar if member.isfile()}
    return in_sdist, set(zipfile.ZipFile(wheel).namelist())


def test_two_builds_give_the_same_bytes(archives: tuple[Path, Path], tmp_path: Path) -> None:
    source = copy(tmp_path / "elsewhere" / "source", 1_650_000_000, 0o664)
    again = build(source, tmp_path / "dist")
    for one, other in zip(archives, again, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name


def test_the_sdist_builds_the_same_wheel(archives: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = archives
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    _, again = build(source, tmp_path / "dist")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_wheel_holds_the_package_and_nothing_else(names: tuple[set[str], set[str]]) -> None:
    about = f"mmpareto_optim-{VERSION}.dist-info"
    package = {f"mmpareto_optim/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert names[1] == package | {"mmpareto_optim/py.typed"} | {
        f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }


def test_the_sdist_holds_what_the_tests_need(names: tuple[set[str], set[str]]) -> None:
    in_sdist, _ = names
    for folder in ("mmpareto_optim", "tests", "examples", "benchmarks", "experiments"):
        here = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert here <= in_sdist
    root = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt"}
    assert root | {"PKG-INFO", "pyproject.toml", "docs/recipes/README.md"} <= in_sdist
    assert not [
        name
        for name in in_sdist
        if re.search(r"__pycache__|\.pyc$|^results/|/_(build|pictures)/", name)
    ]


def test_what_the_wheel_says_of_itself(archives: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(archives[1])
    metadata = Parser().parsestr(
        wheel.read(f"mmpareto_optim-{VERSION}.dist-info/METADATA").decode()
    )
    assert (metadata["Name"], metadata["Version"]) == ("mmpareto-optim", VERSION)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {re.split(r"[<>=]", need)[0] for need in needed} == {"numpy", "torch"}
    assert {"plot", "examples", "video", "docs"} <= set(metadata.get_all("Provides-Extra", []))
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_installed_wheel_reports_versions(archives: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(archives[1]).extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mmpareto_optim"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    assert facts["mmpareto-optim"] == VERSION
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] != "not installed"
    assert {"python", "platform", "cuda", "mps", "lightning", "torchjd"} <= facts.keys()


def test_the_report_names_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # internal: mmpareto_optim.__main__.report, as no machine has two GPUs for a test.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert re.search(r"^cuda +13\.0: device 0, device 1$", report(), re.MULTILINE)


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {VERSION}\n" in citation
    assert "10.48550/arXiv.2405.17730" in citation


def test_the_commit_hook_runs_the_pinned_ruff() -> None:
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
