"""All that a GPU can show, by one command and in one process; writes CUDA.md, and JSON beside it.

    make gpu
    python benchmarks/gpu.py --tiny --device cpu --output /tmp/page.md    # whether this works

The tests that need a GPU; times and memory of steps; how fast gradients are read and written.
Begun again, it goes on with what is missing or has failed. After ten minutes it ends.

Steps are timed until the device has finished them, interleaved, in an order drawn at random for
each round. Ratios are medians of those within a round, with the interval of that median by order
statistics; those of CUDA graphs are to plain training and to the floor as CUDA graphs. The *floor*
takes the same passes and merely adds the gradients. *float32* is as PyTorch has it by default, with
convolutions in TF32; *bfloat16* is autocast, with parameters and their gradients in float32. Peak
memory is what one step allocates beyond what is held between steps.

A share of the bandwidth is what must be read and written at least, over the time, divided by the
same for a copy of 1 GB.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import platform
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import many_losses
import methods
import numpy as np
import pytest
import torch
from many_losses import Task, convolutions, small_mlp, wide_mlp
from methods import Step
from models import build, resnet18
from step_time import are_of_one_run, commit_here, installed, interleaved, line_of, megabytes, ratio
from torch import Tensor, nn

# internal: the parts of a step whose bandwidth is measured.
from mmpareto_optim.gram import gram_matrix
from mmpareto_optim.rows import combine, flatten, forms_of

FOLDER = Path(__file__).parent
MINUTES = 10
PLAIN, FLOOR, TORCHJD, OURS = "plain training", "floor", "TorchJD (MGDA)", "ours"
GRAPH = ", as a CUDA graph"
PRECISIONS = ("float32", "bfloat16")
Result = dict[str, Any]
"""What is written to JSON; ``"failed"`` says what went wrong, by name."""
Makers = dict[str, Callable[[], Step]]
Case = Callable[[torch.device, str], tuple[nn.Module, Makers]]


def pair(
    name: str, batch: int, width: int | None, device: torch.device, precision: str
) -> tuple[nn.Module, Makers]:
    """A model of two encoders, and what makes a step of each method on a copy of it."""
    torch.manual_seed(0)
    with device:
        model, inputs = build(name, batch, width)

    def make(method: Callable[..., Step]) -> Step:
        own = deepcopy(model)
        for forward in ("features", "losses"):
            setattr(own, forward, in_precision(getattr(own, forward), device, precision))
        return method(own, inputs)

    by_name = {
        PLAIN: methods.uniform,
        FLOOR: methods.two_backward_floor,
        TORCHJD: methods.torchjd,
        OURS: methods.exact,
        "ours, features": methods.feature_space,
    }
    return model, {name: partial(make, by_name[name]) for name in installed(by_name)}


def many(
    builder: Callable[[int], Task], losses: int, device: torch.device, precision: str
) -> tuple[nn.Module, Makers]:
    """As :func:`pair` for many losses on one trunk."""
    torch.manual_seed(0)
    with device:
        task = builder(losses)
    losses_of = in_precision(task.losses_of, device, precision)

    def make(method: Callable[[Task], Step]) -> Step:
        return method(Task(deepcopy(task.model), losses_of))

    by_name: dict[str, Callable[[Task], Step]] = {
        PLAIN: many_losses.plain,
        FLOOR: many_losses.floor,
        TORCHJD: lambda task: many_losses.torchjd(task, 1),
        OURS: many_losses.ours,
    }
    return task.model, {name: partial(make, by_name[name]) for name in installed(by_name)}


def in_precision(function: Any, device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return function
    # No cache of casts, which a CUDA graph could not keep.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(function)


CASES: dict[str, Case] = {
    "two ResNet-18, batch 64": partial(pair, "resnet18", 64, None),
    "transformer of width 512, batch 32": partial(pair, "transformer", 32, 512),
    "two small MLPs, batch 64": partial(pair, "mlp", 64, 64),
    "small MLP, 2 losses": partial(many, small_mlp, 2),
    "small MLP, 20 losses": partial(many, small_mlp, 20),
    "wide MLP, 20 losses": partial(many, wide_mlp, 20),
    "convolutions, 5 losses": partial(many, convolutions, 5),
}
TINY_CASES = {
    "two small MLPs, batch 4": partial(pair, "mlp", 4, 16),
    "small MLP, 3 losses": partial(many, small_mlp, 3),
}


def why_no_graph(step: Step, device: torch.device) -> str | None:
    """Why a step cannot be a CUDA graph."""
    if device.type != "cuda":
        return f"the {device.type} has none"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" in str(error):
            return "it waits for the device"
        raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def captured(step: Step) -> Step:
    """The step as a CUDA graph; the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def wait_for(device: torch.device) -> Callable[[], object]:
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def steps_of(build_case: Case, precision: str, device: torch.device, seconds: float) -> Result:
    """Times and memory of each method's steps, for about some seconds."""
    model, makers = build_case(device, precision)
    steps: dict[str, Step] = {}
    without_graph: dict[str, str] = {}
    failed: dict[str, str] = {}
    peaks: dict[str, float] = {}
    for method, make in makers.items():
        with noting_failure(failed, method):
            step = make()
            for _ in range(2):
                step()
            steps[method] = step
            if device.type == "cuda":
                peaks[method] = peak(step)
            if reason := why_no_graph(step, device):
                without_graph[method] = reason
            else:
                steps[method + GRAPH] = captured(make())
    (once,) = zip(*interleaved(steps, 1, wait=wait_for(device)).values(), strict=True)
    rounds = min(max(int(seconds / sum(once)), 6), 300)
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "s": interleaved(steps, rounds, wait=wait_for(device)),
        "peak_mb": peaks,
        "without_graph": without_graph,
        "failed": failed,
    }


def peak(step: Step) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@contextmanager
def noting_failure(failed: dict[str, str], name: str) -> Iterator[None]:
    """What fails is said, and the rest goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exception(error)
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]


class Outcomes:
    """What pytest tells of its tests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext.splitlines()[-1]


def gpu_tests() -> Result:
    outcomes = Outcomes()
    file = FOLDER.parent / "tests" / "test_gpu.py"
    # Its handler of faults would end the watch over the ten minutes.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    code = pytest.main([*options, str(file)], plugins=[outcomes])
    failed = outcomes.failed
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        failed["pytest"] = f"ended with {code!r}"
    return {"counts": outcomes.counts, "failed": failed}


def bandwidth(device: torch.device, *, tiny: bool) -> Result:
    """Bytes that must be moved at least by each part of the integration, and seconds."""
    large, number = (2**16, 10) if tiny else (2**25, 1000)
    networks: dict[str, Sequence[Sequence[int]]] = {
        "one large tensor": [[large]],
        f"{number} small tensors": [[30, 30]] * number,
    }
    if not tiny:
        networks["ResNet-18"] = [param.shape for param in resnet18(3).parameters()]
    source = torch.zeros(large if tiny else 2**28, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    parts = {"a copy": timed(copy, 8 * source.numel(), device)}
    for network, shapes in networks.items():
        gradient: list[Tensor | None] = [torch.randn(*shape, device=device) for shape in shapes]
        forms = forms_of([piece for piece in gradient if piece is not None])
        size = 4 * sum(form.size for form in forms)
        parts[f"flatten: {network}"] = timed(partial(flatten, forms, gradient), 2 * size, device)
        for losses in (2, 20):
            rows = [flatten(forms, gradient) for _ in range(losses)]
            segments = list(zip(*(row.segments for row in rows), strict=True))
            ones = torch.ones(losses, device=device).unbind()
            products = timed(partial(gram_matrix, segments), losses * size, device)
            combined = timed(partial(combine_all, segments, ones), (losses + 1) * size, device)
            parts[f"inner products: {network}, {losses} losses"] = products
            parts[f"combination: {network}, {losses} losses"] = combined
    return {"parts": parts, "failed": {}}


def combine_all(segments: Sequence[Sequence[Tensor]], coefficients: Sequence[Tensor]) -> None:
    for rows in segments:
        combine(rows, coefficients)


def timed(function: Callable[[], object], moved: int, device: torch.device) -> dict[str, float]:
    wait, calls, seconds = wait_for(device), 10, []
    for _ in range(6):
        wait()
        started = perf_counter()
        for _ in range(calls):
            function()
        wait()
        seconds.append((perf_counter() - started) / calls)
    return {"bytes": moved, "s": float(np.median(seconds[1:]))}


def lines_of_tests(result: Result) -> list[str]:
    return [", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()) + "."]


def lines_of_steps(result: Result) -> list[str]:
    seconds: Mapping[str, Sequence[float]] = result["s"]
    lines = [
        f"{result['parameters'] / 1e6:.2f} M parameters.\n",
        "| | ms | middle half | x plain | x floor | its 95 % interval | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        way = GRAPH if method.endswith(GRAPH) else ""
        x_plain = ratio(times, seconds[PLAIN + way])[0] if PLAIN + way in seconds else ""
        x_floor = ratio(times, seconds[FLOOR + way]) if FLOOR + way in seconds else ("", "")
        cells = (x_plain, *x_floor, megabytes(result["peak_mb"], method))
        lines.append(line_of(method, times, *cells))
    reasons: dict[str, list[str]] = {}
    for method, reason in result["without_graph"].items():
        reasons.setdefault(reason, []).append(method)
    return lines + [f"\nNo CUDA graph, as {why}: {'; '.join(m)}." for why, m in reasons.items()]


def lines_of_bandwidth(result: Result) -> list[str]:
    speeds = {name: part["bytes"] / part["s"] for name, part in result["parts"].items()}
    return [
        "| | MB at least | microseconds | GB/s | share |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {part['bytes'] / 1e6:.1f} | {part['s'] * 1e6:.0f} "
            f"| {speeds[name] / 1e9:.1f} | {speeds[name] / speeds['a copy']:.0%} |"
            for name, part in result["parts"].items()
        ),
    ]


def page(facts: Mapping[str, str], results: Mapping[str, Result]) -> str:
    kinds = {"counts": lines_of_tests, "s": lines_of_steps, "parts": lines_of_bandwidth}
    lines = [
        f"# Steps on a GPU: {facts['device']}\n",
        f"PyTorch {facts['torch']}, {facts['platform']}, commit {facts['commit']}. Written by",
        "`benchmarks/gpu.py`; its docstring says how ratios and shares are made.",
    ]
    for name, result in results.items():
        lines.append(f"\n## {name}\n")
        lines += [line for key, of in kinds.items() if key in result for line in of(result)]
        lines += [f"- Failed: {what}: {error}" for what, error in result["failed"].items()]
    return "\n".join(lines) + "\n"


def run(
    jobs: Mapping[str, Callable[[], Result]],
    facts: Mapping[str, str],
    output: Path,
    ends: float = float("inf"),
) -> list[str]:
    """Do what has not been done for these facts, and write the page; what failed or is missing."""
    kept = output.with_suffix(".json")
    found = json.loads(kept.read_text()) if kept.exists() else {"facts": {}}
    results: dict[str, Result] = found["results"] if are_of_one_run(found["facts"], facts) else {}
    # What failed comes last, as it may have ended the process.
    for name in sorted(jobs, key=results.__contains__):
        if results.get(name, {"failed": True})["failed"] and perf_counter() < ends:
            print(name, flush=True)
            failed = {"begun": "has not ended"}
            results[name] = {"failed": failed}
            kept.write_text(json.dumps({"facts": facts, "results": results}))
            with noting_failure(failed, "begun"):
                results[name] = jobs[name]()
            kept.write_text(json.dumps({"facts": facts, "results": results}))
            output.write_text(page(facts, {n: results[n] for n in jobs if n in results}))
            gc.collect()
            torch.cuda.empty_cache()
    missing = [f"{name}: not begun, no time was left" for name in jobs if name not in results]
    return missing + [
        f"{name}: {what}: {error}"
        for name, result in results.items()
        for what, error in result["failed"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="only to see whether this works")
    parser.add_argument("--output", type=Path, help="default: benchmarks/CUDA.md")
    options = parser.parse_args()
    device, is_cuda = options.device, options.device.type == "cuda"
    if is_cuda and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    if options.output is None and (options.tiny or not is_cuda):
        parser.error("--output is needed: CUDA.md is for whole runs on a GPU")
    ends = perf_counter() + MINUTES * 60
    faulthandler.dump_traceback_later(MINUTES * 60, exit=True)
    jobs: dict[str, Callable[[], Result]] = {"tests": gpu_tests}
    for case, build_case in (TINY_CASES if options.tiny else CASES).items():
        for precision in PRECISIONS:
            job = partial(steps_of, build_case, precision, device, 0 if options.tiny else 10)
            jobs[f"{case}, {precision}"] = job
    jobs["bandwidth"] = partial(bandwidth, device, tiny=options.tiny)
    facts = {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "platform": platform.platform(),
        "commit": commit_here(),
    }
    output = options.output or FOLDER / "CUDA.md"
    problems = run(jobs, facts, output, ends - 60)
    print(f"\n{output}", *(problems or ["all done"]), sep="\n")
    faulthandler.cancel_dump_traceback_later()
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
