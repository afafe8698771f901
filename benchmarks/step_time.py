"""Time of one training step, methods side by side and interleaved; writes RESULTS.md and JSON.

    python benchmarks/step_time.py            # TorchJD is measured where it is installed
    python benchmarks/step_time.py --rounds 3 --cases "mlp, batch 16"

Medians over interleaved rounds, each with the middle half of its distribution; ratios are
medians of the ratios within a round, so that slow moments of the machine cancel out. Peak
memory is what a process of its own, in four steps of one method, takes beyond the model and
the batch; what PyTorch loads on first use is in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from methods import METHODS
from models import Inputs, LateFusion, build
from rich.progress import track

FOLDER = Path(__file__).parent
CASES: dict[str, tuple[str, int, int | None, int]] = {  # model, batch, width, rounds
    "mlp, batch 16": ("mlp", 16, 64, 300),
    "mlp, batch 256": ("mlp", 256, 64, 300),
    "mlp, width 512, batch 16": ("mlp", 16, 512, 200),
    "transformer, batch 4": ("transformer", 4, 256, 15),
    "transformer, batch 16": ("transformer", 16, 256, 10),
    "transformer, width 512, batch 4": ("transformer", 4, 512, 10),
    "two ResNet-18, batch 4": ("resnet18", 4, None, 10),
    "two ResNet-18, batch 16": ("resnet18", 16, None, 10),
}
FLOOR, UNIFORM = "two-backward floor", "uniform"


def methods() -> list[str]:
    return [m for m in METHODS if "TorchJD" not in m or importlib.util.find_spec("torchjd")]


def setting(case: str) -> tuple[LateFusion, Inputs]:
    name, batch, width, _ = CASES[case]
    torch.manual_seed(0)
    return build(name, batch, width)


def peak_here(case: str, method: str) -> float:
    """MB that four steps take in this process; ask in a fresh one."""
    step = METHODS[method](*setting(case))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak(case: str, method: str) -> float:
    command = [sys.executable, __file__, "--peak", case, method]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(case: str, rounds: int | None) -> dict[str, list[float]]:
    """Seconds of each step, by method."""
    model, inputs = setting(case)
    usual = CASES[case][-1]
    steps = {method: METHODS[method](deepcopy(model), inputs) for method in methods()}
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(2):
        for step in steps.values():
            step()
    for _ in track(range(rounds or usual), description=case):
        for method, step in steps.items():
            started = perf_counter()
            step()
            seconds[method].append(perf_counter() - started)
    return seconds


def table(case: str, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    parameters = sum(param.numel() for param in setting(case)[0].parameters())
    lines = [
        f"## {case}\n",
        f"{parameters / 1e6:.2f} M parameters.\n",
        "| | ms | middle half | x uniform | x floor | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]) * 1000
        ratios = [np.median(np.divide(times, seconds[other])) for other in (UNIFORM, FLOOR)]
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(
            f"| {method} | {middle:.2f} | {spread} | {ratios[0]:.2f} | {ratios[1]:.3f} "
            f"| {peaks[method]:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help="print MB and end")
    options = parser.parse_args()
    if options.peak:
        print(peak_here(*options.peak))
        return

    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    results = {case: measure(case, options.rounds) for case in options.cases}
    peaks = {case: {method: peak(case, method) for method in methods()} for case in options.cases}
    head = (
        "# Time and memory of one training step\n\n"
        f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit}. Written by `benchmarks/step_time.py`; its docstring says how ratios are made.\n"
        "The *floor* makes the same autograd calls and merely adds the gradients. Not measured: "
        "CUDA.\n"
    )
    tables = (table(case, seconds, peaks[case]) for case, seconds in results.items())
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
