"""The code of README.md and of every page in docs runs as it stands there."""

import json
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from doctest import ELLIPSIS, DocTestParser, DocTestRunner
from functools import partial
from pathlib import Path
from runpy import run_path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch import config
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import mmpareto_optim
from mmpareto_optim import MMParetoOptimizer

ROOT = Path(__file__).parent.parent
EVERY_RECIPE = sorted(ROOT.glob("docs/recipes/*.md"))
OF_PROCESSES = [page for page in EVERY_RECIPE if "torchrun" in page.read_text()]
RECIPES = [page for page in EVERY_RECIPE if page not in OF_PROCESSES]
START = ROOT / "docs" / "recipes" / "README.md"
PAGES = sorted(ROOT.glob("docs/*.md"))
TUTORIAL = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^( *)```(python|diff|pycon)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
GOES_ON = "go on from the recipes' [start]"
# What a page's code says that it needs, and the library that brings it.
OPTIONAL = {
    "import Accelerator": "accelerate",
    "import deepspeed": "deepspeed",
    "import deepxde": "deepxde",
    "import lightning": "lightning",
    "from lightning.fabric": "lightning",
    "from torchjd": "torchjd",
    "from transformers": "transformers",
    "UPGradWeighting": "quadprog",
}
# Of the compiler's own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute", "ignore:Guards may run slower"
)
SCREEN = 45


def code_of(page: Path) -> list[str]:
    """The blocks of a page that run; a diff is read as what it makes of the code."""
    return [
        applied(text) if language == "diff" else dedent(text)
        for _, language, text in FENCE.findall(page.read_text())
    ]


def libraries_of(blocks: list[str]) -> list[str]:
    """The optional libraries that some code needs."""
    needed = (
        library for words, library in OPTIONAL.items() if any(words in code for code in blocks)
    )
    return list(dict.fromkeys(needed))


def applied(diff: str) -> str:
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))


def run(code: str, page: Path, namespace: dict[str, Any]) -> None:
    if not code.startswith(">>>"):
        exec(compile(code, str(page), "exec"), namespace)
        return
    session = DocTestParser().get_doctest(code, namespace, page.stem, str(page), 0)
    report: list[str] = []
    runner = DocTestRunner(optionflags=ELLIPSIS)
    runner.run(session, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)
    namespace |= session.globs


def start() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "recipe"}
    for code in code_of(START):
        run(code, START, namespace)
    return namespace


@pytest.fixture
def steps() -> Iterator[list[type]]:
    """The optimizers that stepped, in order."""
    stepped: list[type] = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: stepped.append(type(opt)))
    yield stepped
    handle.remove()


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autograd as with inductor, without its compiler; and its settings as they were."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with config.patch(donated_buffer=True):
        yield
    torch.compiler.reset()


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    yield
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate", "_quick_compiler")
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_recipe(page: Path, steps: list[type]) -> None:
    blocks = code_of(page)
    with warnings.catch_warnings():
        for library in libraries_of(blocks):
            warnings.simplefilter("ignore")  # of their own affairs
            pytest.importorskip(library, reason="the integrations extra is not installed")
        namespace = start()
        for code in blocks if page != START else ["opt.step(losses=losses_of(model, data[:]))"]:
            run(code, page, namespace)
    assert steps
    assert len(page.read_text().splitlines()) <= SCREEN or page == START


# An interpreter that has used gloo now and then aborts as it is taken down, after all is done and
# without any code of ours (PyTorch 2.13: 3 of 40 runs of DDP alone).
END = "import os, sys; sys.stdout.flush(); os._exit(0)"


@pytest.mark.parametrize("page", OF_PROCESSES, ids=lambda page: page.stem)
def test_a_recipe_of_several_processes(page: Path, tmp_path: Path) -> None:
    others = libraries_of(code_of(page))
    for library in others:
        pytest.importorskip(library, reason="this library is not installed")
    script = tmp_path / "train.py"
    script.write_text("\n".join([*code_of(START), *code_of(page), END]))
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "ignore" if others else "error", str(script)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert ["tensor([" in text for text in told] == [True, False]
    assert len(page.read_text().splitlines()) <= SCREEN


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("page", sorted({*PAGES} - {TUTORIAL}), ids=lambda page: page.stem)
def test_a_page(page: Path) -> None:
    if "plot_conflict" in page.read_text():
        pytest.importorskip("matplotlib", reason="the examples extra is not installed")
    namespace = start() if GOES_ON in page.read_text() else {"__name__": "page"}
    for code in code_of(page):
        run(code, page, namespace)


@pytest.mark.parametrize("page", [*PAGES, *EVERY_RECIPE], ids=lambda page: page.stem)
def test_no_code_of_a_page_is_left_out(page: Path) -> None:
    languages = re.findall(r"^ *```+(\S+)", page.read_text(), re.MULTILINE)
    commands_and_directives = {"sh", "text", "{include}", "{eval-rst}"}
    assert set(languages) <= {"python", "pycon", "diff"} | commands_and_directives


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_is_there(page: Path) -> None:
    for target, options in re.findall(r"^```{include} (.+)\n((?::.*\n)*)", page.read_text(), re.M):
        text = (page.parent / target).read_text()
        for mark in re.findall(r': "(.+)"$', options, re.MULTILINE):
            _, found, text = text.partition(mark)
            assert found, f"{target} has no {mark!r} for docs/{page.name} to include from or to"


def test_what_pays_is_what_the_evidence_has() -> None:
    numbers = re.compile(r"[-+x] ?[\d.]+ \[.*?\]|[\d.]+ ± [\d.]+")
    parts = ("", "_modalities", "_physics")
    evidence = "".join((ROOT / "docs" / f"evidence{part}.md").read_text() for part in parts)
    told = ("does_it_pay", "physics")
    shown = numbers.findall("".join((ROOT / "docs" / f"{page}.md").read_text() for page in told))
    assert len(shown) > 10
    assert [each for each in shown if each not in evidence] == []


def test_the_page_on_installing_has_the_projects_bounds_and_extras() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(each.split(">=") for each in project["dependencies"])
    text = (ROOT / "docs" / "install.md").read_text()
    python = project["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer and PyTorch {bounds['torch']} or newer" in text
    assert f"NumPy {bounds['numpy']} or newer" in text
    assert all(f"`{extra}`" in text for extra in project["optional-dependencies"])


def test_the_tutorial() -> None:
    """Its code prints what the page says, but for numbers, which differ from CPU to CPU."""
    pytest.importorskip("sklearn", reason="the examples extra is not installed")
    page = TUTORIAL.read_text()
    fresh, picture = run_path(str(ROOT / "docs" / "notebook.py"))["executed"](page)
    assert without_numbers(fresh) == without_numbers(page)
    assert picture.startswith(b"\x89PNG")


def without_numbers(text: str) -> str:
    """Nor what a summary says only of blocks of which some step is harmful."""
    return re.sub(r" *[+-]?\d[\d.]*", " 0", re.sub(r" Opposed by the sum: .*", "", text))


def test_the_notebook_is_that_of_the_tutorial() -> None:
    """Else: python docs/notebook.py."""
    notebook = run_path(str(ROOT / "docs" / "notebook.py"))["notebook"]
    made = notebook(TUTORIAL.read_text(), TUTORIAL.with_suffix(".png").read_bytes())
    assert json.loads(TUTORIAL.with_suffix(".ipynb").read_text()) == made


def test_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the examples extra is not installed")
    run_path(str(ROOT / "docs" / "pictures.py"))["draw"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {name for page in PAGES for name in re.findall(r"_pictures/(\S+)", page.read_text())}
    assert drawn == shown
    assert all("</svg>" in (tmp_path / name).read_text() for name in drawn)


def test_no_property_reads_as_a_type() -> None:
    """Sphinx takes what stands before a colon in a property's first line for its type."""
    classes = [each for each in vars(mmpareto_optim).values() if isinstance(each, type)]
    properties = {
        f"{each.__name__}.{name}": value.__doc__ or ""
        for each in classes
        for name, value in vars(each).items()
        if isinstance(value, property) and not name.startswith("_")
    }
    assert "MMParetoOptimizer.blocks" in properties
    read = [name for name, doc in properties.items() if ": " in doc.split("\n")[0]]
    assert read == []


def test_every_recipe_is_in_the_list() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", START.read_text())
    assert sorted(listed) == [page.name for page in EVERY_RECIPE if page != START]


def readme_names() -> dict[str, Any]:
    """What the README's snippets take for granted, by the names that they use."""
    namespace = start()
    model, losses_of, data = (namespace[name] for name in ("model", "losses_of", "data"))
    batch = data[:]
    spec, image, label = batch
    z_audio, z_visual = model.audio(spec).relu(), model.visual(image).relu()
    logits = {
        "mm": model.mm_head(torch.cat([z_audio, z_visual], 1)),
        "audio": model.audio_head(z_audio),
        "visual": model.visual_head(z_visual),
    }

    def train(model: nn.Module, opt: MMParetoOptimizer, loader: Any) -> None:
        for batch in loader:
            opt.step(losses=losses_of(model, batch))

    return {
        **namespace,
        "epochs": 2,
        "train": train,
        "losses_of": partial(losses_of, model),
        "base": torch.optim.SGD(model.parameters(), lr=0.1),
        "z_audio": z_audio,
        "z_visual": z_visual,
        "losses": {name: cross_entropy(output, label) for name, output in logits.items()},
        "scaler": torch.amp.GradScaler("cpu"),
    }


@pytest.mark.parametrize("number", range(len(code_of(ROOT / "README.md"))))
def test_a_snippet_of_the_readme(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of(ROOT / "README.md")[number]
    if "plot_" in code:
        pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    run(code, ROOT / "README.md", readme_names())


def test_the_readmes_first_lines_train(steps: list[type]) -> None:
    namespace = readme_names()
    del namespace["opt"]
    before = [param.detach().clone() for param in namespace["model"].parameters()]
    run(code_of(ROOT / "README.md")[0], ROOT / "README.md", namespace)
    assert len(steps) == len(namespace["loader"])
    assert isinstance(namespace["opt"], namespace["MMParetoOptimizer"])
    after = namespace["model"].parameters()
    assert not any(a.equal(b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *PAGES, *EVERY_RECIPE], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
