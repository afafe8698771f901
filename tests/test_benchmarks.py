"""Benchmarks for GPUs, on the CPU: that they run, go on after a failure, and say what failed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for library in ("rich", "scipy"):
    pytest.importorskip(library)
gpu = importlib.import_module("gpu")
Result = dict[str, Any]

FACTS = {"device": "a device", "torch": "2", "platform": "here", "commit": "abc"}


def test_make_gpu_on_the_cpu(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [
        sys.executable,
        str(gpu.__file__),
        "--tiny",
        "--device",
        "cpu",
        "--output",
        str(page),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert len(results) == 2 + 2 * len(gpu.TINY_CASES)
    assert not any(result["failed"] for result in results.values())
    text = page.read_text()
    for precision in gpu.PRECISIONS:
        times = results[f"two small MLPs, batch 4, {precision}"]["s"]
        assert {gpu.PLAIN, gpu.FLOOR, gpu.OURS, "ours, features"} <= times.keys()
    assert "No CUDA graph, as the cpu has none: plain training; floor" in text
    for part in ("flatten", "inner products", "combination"):
        assert f"| {part}: one large tensor" in text


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--tiny", "--device", "cpu"]])
def test_only_a_gpu_writes_to_the_page_for_gpus(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--output is needed" in capsys.readouterr().err


def test_it_goes_on_with_what_has_failed(tmp_path: Path) -> None:
    page, done = tmp_path / "page.md", list[str]()

    def working(name: str) -> Result:
        done.append(name)
        return {"counts": {"passed": 3}, "failed": {}}

    def out_of_memory() -> Result:
        done.append("large")
        raise MemoryError("nothing left")

    jobs = {"large": out_of_memory, "small": lambda: working("small")}
    (problem,) = gpu.run(jobs, FACTS, page)
    assert problem.endswith("MemoryError: nothing left")
    assert "nothing left" in page.read_text()
    assert done == ["large", "small"]

    done.clear()
    jobs = {name: lambda name=name: working(name) for name in ("new", "large", "small")}  # type: ignore[misc]
    assert gpu.run(jobs, FACTS, page) == []
    assert done == ["new", "large"]  # which may end the process once more
    assert "nothing left" not in page.read_text()
    assert gpu.run(jobs, FACTS | {"commit": "abc-dirty"}, page) == []
    assert done == ["new", "large"]  # the page has made the checkout dirty

    assert gpu.run(jobs, FACTS | {"device": "another"}, page) == []
    assert done == ["new", "large", "new", "large", "small"]


def test_a_job_that_ends_the_process_is_known_to_have_failed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    def crash() -> Result:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run({"crash": crash}, FACTS, page)
    problems = gpu.run({"crash": crash}, FACTS, page, ends=0)
    assert problems == ["crash: begun: has not ended"]
    assert gpu.run({"other": crash}, FACTS, page, ends=0)[0].startswith("other: not begun")


def test_a_method_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def build_case(device: torch.device, precision: str) -> Any:
        def broken() -> None:
            raise RuntimeError("no such kernel")

        model, makers = gpu.TINY_CASES["small MLP, 3 losses"](device, precision)
        return model, makers | {gpu.OURS: broken}

    result = gpu.steps_of(build_case, "float32", torch.device("cpu"), 0)
    assert result["failed"] == {gpu.OURS: "RuntimeError: no such kernel"}
    assert gpu.PLAIN in result["s"]
    assert "no such kernel" in capsys.readouterr().err


def test_cuda_graphs_are_compared_with_cuda_graphs() -> None:
    eager = {gpu.PLAIN: [1.0] * 6, gpu.FLOOR: [2.0] * 6, gpu.OURS: [3.0] * 6}
    graphs = {gpu.PLAIN + gpu.GRAPH: [0.1] * 6, gpu.OURS + gpu.GRAPH: [0.4] * 6}
    result = {"parameters": 10**6, "s": eager | graphs, "peak_mb": {}, "without_graph": {}}
    lines = gpu.lines_of_steps(result)
    assert "| ours | 3000.00 | 3000.00 to 3000.00 | 3.000 | 1.500 |  |  |" in lines
    # The floor as a CUDA graph is missing: it may have failed.
    assert "| ours, as a CUDA graph | 400.00 | 400.00 to 400.00 | 4.000 |  |  |  |" in lines


@pytest.mark.slow
def test_ranks_over_gloo(tmp_path: Path) -> None:
    """With NCCL it is the same command and ``--device cuda``."""
    page, script = tmp_path / "ranks.md", Path(str(gpu.__file__)).with_name("ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    case = ["--cases", "small mlp, 3 losses", "--rounds", "2", "--network", "one machine"]
    command = [*launch, str(script), *case, "--output", str(page)]
    written = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        written.append(json.loads(page.with_suffix(".json").read_text()))
    assert written[0] == written[1]  # nothing is measured twice
    assert written[0]["machine"].startswith("2 ranks of one")
    assert all(len(times) == 2 for times in written[0]["s"]["small mlp, 3 losses"].values())
    assert "| ours, features |" in page.read_text()
