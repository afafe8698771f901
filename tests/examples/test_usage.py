"""What each example says of itself, and without its data or a package."""

import ast
import importlib
import runpy
import sys
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, refusal

pytest.importorskip("av", reason="the video extra is not installed")
pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

USAGE = {
    "audio_visual_digits": "--data DIR [more options]",
    "avletters": "--data DIR [more options]",
    "colored_gray_digits": "[--data DIR] [more options]",
    "cremad": "--data DIR [more options]",
    "joint_only": "--data DIR [more options]",
    "multimnist": "[--data DIR] [more options]",
    "multimodal_transformer": "--data DIR [more options]",
    "pinn": "[--problem PROBLEM] [more options]",
    "prepare_sequences": "{utd_mhad,avletters} --data DIR",
    "utd_mhad": "--data DIR [more options]",
}
DATA_SOURCE = {
    "audio_visual_digits": "https://github.com/Jakobovski/free-spoken-digit-dataset",
    "avletters": "Matthews",
    "colored_gray_digits": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "cremad": "https://github.com/CheyneyComputerScience/CREMA-D",
    "joint_only": "personal.utdallas.edu/~kehtar/UTD-MHAD.html",
    "multimnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "multimodal_transformer": "https://github.com/Jakobovski/free-spoken-digit-dataset",
    "prepare_sequences avletters": "Matthews",
    "prepare_sequences utd_mhad": "personal.utdallas.edu/~kehtar/UTD-MHAD.html",
    "utd_mhad": "personal.utdallas.edu/~kehtar/UTD-MHAD.html",
}
NEEDING_DATA = [name for name in DATA_SOURCE if not USAGE[name.split()[0]].startswith("[")]


def test_each_example_is_here() -> None:
    scripts = [path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
    assert set(scripts) == set(USAGE)
    assert {name.split()[0] for name in DATA_SOURCE} == set(USAGE) - {"pinn"}


@pytest.mark.parametrize("name", USAGE)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(name).main(["--help"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"usage: {name}.py {USAGE[name]}"
    assert name == "pinn" or "--data DIR" in printed.split("options:")[1]


@pytest.mark.parametrize("name", DATA_SOURCE)
def test_a_folder_without_the_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *options = name.split()
    main = importlib.import_module(module).main
    output = ["--output", str(tmp_path / "out")] if module != "joint_only" else []
    told = refusal(main, capsys, *options, "--data", str(tmp_path), *output)
    assert str(tmp_path) in told
    assert DATA_SOURCE[name] in told


@pytest.mark.parametrize("name", NEEDING_DATA)
def test_no_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, *options = name.split()
    told = refusal(importlib.import_module(module).main, capsys, *options)
    assert "--data DIR is missing." in told
    assert DATA_SOURCE[name] in told


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("common", "sklearn", "examples"),
        ("common", "rich", "examples"),
        ("pinn", "matplotlib", "examples"),
        ("prepare_sequences", "scipy", "examples"),
        ("clips", "av", "examples,video"),
    ],
)
def test_a_package_that_is_not_installed(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [x for x in sys.modules if x.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match=rf"not installed: pip install '\.\[{extra}\]'"):
        importlib.import_module(name)


def test_minimal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "minimal.py"
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    found = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"Steps in conflict, of 240: {found['conflicts']}." in printed
    assert sum(found["conflicts"].values()) > 0
    assert list(found["opt"].stats) == list(found["conflicts"])
    assert all(loss < 0.5 for loss in found["losses"].values())
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name.split(".")[0] for name in modules} == {"argparse", "torch", "mmpareto_optim"}

    monkeypatch.setattr(sys, "argv", ["minimal.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: minimal.py\n")
