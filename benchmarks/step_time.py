"""Time of one training step, methods side by side and interleaved; writes RESULTS.md and JSON.

    python benchmarks/step_time.py            # TorchJD is measured where it is installed
    python benchmarks/step_time.py --rounds 3 --cases "mlp, batch 16"
    python benchmarks/step_time.py --device cuda --output benchmarks/RESULTS_CUDA.md

Medians over interleaved rounds, each with the middle half of its distribution; ratios are
medians of the ratios within a round, so that slow moments of the machine cancel out. The interval
beside "x floor" is that median's, by order statistics; it speaks of this run alone, other
processes and hours differ more. Each round has an order of its own, drawn at random: what ran
just before a small model's step, and left its code in the caches or not, changes its time by
several percent. Peak memory is what four steps of one method take beyond the model and the batch:
on the CPU of a process of its own, with what PyTorch loads on first use; on a GPU what is
allocated.

On a GPU a step is timed until the device has finished it. Methods that never wait for the
device are timed once more as CUDA graphs: the device's time without that of Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from methods import METHODS, Step
from models import Inputs, LateFusion, build
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats

FOLDER = Path(__file__).parent
Case = tuple[str, int, int | None, int]
"""Model, batch, width, rounds."""
CPU_CASES: dict[str, Case] = {
    "mlp, batch 16": ("mlp", 16, 64, 300),
    "mlp, batch 256": ("mlp", 256, 64, 300),
    "mlp, width 512, batch 16": ("mlp", 16, 512, 200),
    "wide mlp, batch 32": ("wide mlp", 32, 1024, 100),
    "wide mlp, batch 256": ("wide mlp", 256, 1024, 40),
    "transformer, batch 4": ("transformer", 4, 256, 45),
    "transformer, batch 16": ("transformer", 16, 256, 30),
    "transformer, width 512, batch 4": ("transformer", 4, 512, 20),
    "two ResNet-18, batch 4": ("resnet18", 4, None, 30),
    "two ResNet-18, batch 16": ("resnet18", 16, None, 24),
}
CUDA_CASES: dict[str, Case] = {
    "mlp, batch 16": ("mlp", 16, 64, 100),
    "transformer, batch 16": ("transformer", 16, 256, 50),
    "transformer, width 1024, batch 64": ("transformer", 64, 1024, 30),
    "two ResNet-18, batch 16": ("resnet18", 16, None, 50),
    "two ResNet-18, batch 64": ("resnet18", 64, None, 50),
}
FLOOR, UNIFORM = "two-backward floor", "uniform"
GRAPH = ", as a CUDA graph"
WAITING = ("authors' procedure", "TorchJD (MGDA)")
"""They look at numbers on the device, which no graph can."""


def methods() -> list[str]:
    return [m for m in METHODS if "TorchJD" not in m or importlib.util.find_spec("torchjd")]


def cases_of(device: torch.device) -> dict[str, Case]:
    return CUDA_CASES if device.type == "cuda" else CPU_CASES


def setting(case: str, device: torch.device) -> tuple[LateFusion, Inputs]:
    name, batch, width, _ = cases_of(device)[case]
    torch.manual_seed(0)
    model, (spec, image, label) = build(name, batch, width)
    return model.to(device), (spec.to(device), image.to(device), label.to(device))


def resident_high_water() -> float:
    """MB. Not getrusage's, which begins at that of the process which started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak_here(case: str, method: str) -> float:
    """MB that four steps take in this process; ask in a fresh one."""
    step = METHODS[method](*setting(case, torch.device("cpu")))
    before = resident_high_water()
    for _ in range(4):
        step()
    return resident_high_water() - before


def peak(case: str, method: str, device: torch.device) -> float:
    if device.type == "cpu":
        command = [sys.executable, __file__, "--peak", case, method]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    step = METHODS[method](*setting(case, device))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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


def measure(case: str, rounds: int | None, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, by method."""
    model, inputs = setting(case, device)
    usual = cases_of(device)[case][-1]
    steps = {method: METHODS[method](deepcopy(model), inputs) for method in methods()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        for method in methods():
            if method not in WAITING:
                steps[method + GRAPH] = captured(METHODS[method](deepcopy(model), inputs))
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(3):
        for step in steps.values():
            step()
    orders = np.random.default_rng(0)
    for _ in track(range(rounds or usual), description=case):
        for method in orders.permutation(list(steps)):
            wait()
            started = perf_counter()
            steps[method]()
            wait()
            seconds[method].append(perf_counter() - started)
    return seconds


def median_interval(ratios: NDArray[np.float64]) -> str:
    if np.ptp(ratios) == 0 or len(ratios) < 6:  # fewer cannot bound a median at this level
        return ""
    low, high = stats.quantile_test(ratios, p=0.5).confidence_interval()
    return f"{low:.3f} to {high:.3f}"


def ratio(times: Sequence[float], others: Sequence[float]) -> tuple[str, str]:
    """The median of the ratios within a round, and its interval."""
    ratios = np.divide(times, others)
    return f"{np.median(ratios):.3f}", median_interval(ratios)


def line_of(method: str, times: Sequence[float], *others: str) -> str:
    """A line of a table: milliseconds of a step, and other cells."""
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]) * 1000
    return f"| {' | '.join((method, f'{middle:.2f}', f'{low:.2f} to {high:.2f}', *others))} |"


def megabytes(peaks: Mapping[str, float], method: str) -> str:
    """The peak of a method's memory, if known."""
    return f"{peaks[method]:.0f}" if method in peaks else ""


def commit_here(otherwise: str = "unknown") -> str:
    """The commit that is checked out."""
    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return found or otherwise


def table(
    case: str, device: torch.device, seconds: dict[str, list[float]], peaks: dict[str, float]
) -> str:
    model, _ = setting(case, device)
    parameters = sum(param.numel() for param in model.parameters())
    lines = [
        f"## {case}\n",
        f"{parameters / 1e6:.2f} M parameters.\n",
        "| | ms | middle half | x uniform | x floor | its 95 % interval | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        way = GRAPH if method.endswith(GRAPH) else ""
        x_uniform = f"{np.median(np.divide(times, seconds[UNIFORM + way])):.2f}"
        cells = (x_uniform, *ratio(times, seconds[FLOOR + way]), megabytes(peaks, method))
        lines.append(line_of(method, times, *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--cases", nargs="+", choices=CPU_CASES | CUDA_CASES, help="default: those of the device"
    )
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--commit", default="unknown", help="where this is no git checkout")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help="print MB and end")
    options = parser.parse_args()
    if options.peak:
        print(peak_here(*options.peak))
        return

    commit = commit_here(options.commit)
    device = options.device
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cases = options.cases or list(cases_of(device))
    results = {case: measure(case, options.rounds, device) for case in cases}
    peaks = {case: {method: peak(case, method, device) for method in methods()} for case in cases}
    head = (
        "# Time and memory of one training step\n\n"
        f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit}. Written by `benchmarks/step_time.py`; its docstring says how "
        "ratios are made.\nThe *floor* makes the same autograd calls and merely adds the "
        "gradients.\n"
    )
    tables = (table(case, device, seconds, peaks[case]) for case, seconds in results.items())
    options.output.write_text("\n".join([head, *tables]))
    document = {
        "machine": machine,
        "torch": torch.__version__,
        "commit": commit,
        "s": results,
        "peak_mb": peaks,
    }
    options.output.with_suffix(".json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
