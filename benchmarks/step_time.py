"""Time of one training step, methods side by side and interleaved; writes RESULTS.md and JSON.

    python benchmarks/step_time.py            # TorchJD is measured where it is installed
    python benchmarks/step_time.py --rounds 3 --cases "mlp, batch 16"

Medians over interleaved rounds, each with the middle half of its distribution; ratios are
medians of the ratios within a round, so that slow moments of the machine cancel out. The interval
beside "x floor" is that median's, by order statistics; it speaks of this run alone, other
processes and hours differ more. Each round has an order of its own, drawn at random: what ran
just before a small model's step, and left its code in the caches or not, changes its time by
several percent. Peak memory is what four steps of one method take beyond the model and the batch,
in a process of its own, with what PyTorch loads on first use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
CASES: dict[str, Case] = {
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
FLOOR, UNIFORM = "two-backward floor", "uniform"


def installed(names: Iterable[str]) -> list[str]:
    """Of the names of methods those that can be measured here."""
    return [m for m in names if "TorchJD" not in m or importlib.util.find_spec("torchjd")]


def setting(case: str) -> tuple[LateFusion, Inputs]:
    name, batch, width, _ = CASES[case]
    torch.manual_seed(0)
    return build(name, batch, width)


def resident_high_water() -> float:
    """MB. Not getrusage's, which begins at that of the process which started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak_here(case: str, method: str) -> float:
    """MB that four steps take in this process; ask in a fresh one."""
    step = METHODS[method](*setting(case))
    before = resident_high_water()
    for _ in range(4):
        step()
    return resident_high_water() - before


def peak(case: str, method: str) -> float:
    command = [sys.executable, __file__, "--peak", case, method]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = perf_counter,
    description: str = "",
) -> dict[str, list[float]]:
    """Seconds of each step, by method; before and after each, ``wait`` until nothing runs."""
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    orders = np.random.default_rng(0)
    for _ in track(range(rounds), description, disable=not description):
        for method in orders.permutation(list(steps)):
            wait()
            started = clock()
            steps[method]()
            wait()
            seconds[method].append(clock() - started)
    return seconds


def measure(case: str, rounds: int | None) -> dict[str, list[float]]:
    model, inputs = setting(case)
    steps = {method: METHODS[method](deepcopy(model), inputs) for method in installed(METHODS)}
    for step in [*steps.values()] * 3:
        step()
    return interleaved(steps, rounds or CASES[case][-1], description=case)


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


def are_of_one_run(facts: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether measurements belong together; a page that is written makes its checkout dirty."""
    return all(
        facts.get(name, "").removesuffix("-dirty") == others.get(name, "").removesuffix("-dirty")
        for name in facts.keys() | others.keys()
    )


def table(case: str, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    model, _ = setting(case)
    parameters = sum(param.numel() for param in model.parameters())
    lines = [
        f"## {case}\n",
        f"{parameters / 1e6:.2f} M parameters.\n",
        "| | ms | middle half | x uniform | x floor | its 95 % interval | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        x_uniform = f"{np.median(np.divide(times, seconds[UNIFORM])):.2f}"
        cells = (x_uniform, *ratio(times, seconds[FLOOR]), megabytes(peaks, method))
        lines.append(line_of(method, times, *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--commit", default="unknown", help="where this is no git checkout")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help="print MB and end")
    options = parser.parse_args()
    if options.peak:
        print(peak_here(*options.peak))
        return

    commit = commit_here(options.commit)
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    results = {case: measure(case, options.rounds) for case in options.cases}
    peaks = {
        case: {method: peak(case, method) for method in installed(METHODS)}
        for case in options.cases
    }
    head = (
        "# Time and memory of one training step\n\n"
        f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit}. Written by `benchmarks/step_time.py`; its docstring says how "
        "ratios are made.\nThe *floor* makes the same autograd calls and merely adds the "
        "gradients.\n"
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
