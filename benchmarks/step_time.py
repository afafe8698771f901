"""Time of one training step, methods side by side and interleaved; writes RESULTS.md and JSON.

    python benchmarks/step_time.py            # TorchJD is measured where it is installed
    python benchmarks/step_time.py --rounds 3 --cases "mlp, batch 16"

Medians over interleaved rounds, each with the middle half of its distribution; ratios are
medians of the ratios within a round, so that slow moments of the machine cancel out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
from copy import deepcopy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from methods import METHODS
from models import build
from rich.progress import track

FOLDER = Path(__file__).parent
CASES: dict[str, tuple[str, int, int | None, int]] = {  # model, batch, width, rounds
    "mlp, batch 16": ("mlp", 16, 64, 300),
    "mlp, batch 256": ("mlp", 256, 64, 300),
    "mlp, width 512, batch 16": ("mlp", 16, 512, 200),
    "transformer, batch 4": ("transformer", 4, 256, 15),
    "transformer, batch 16": ("transformer", 16, 256, 10),
    "two ResNet-18, batch 4": ("resnet18", 4, None, 10),
    "two ResNet-18, batch 16": ("resnet18", 16, None, 10),
}
FLOOR, UNIFORM = "two-backward floor", "uniform"


def measure(case: str, rounds: int | None) -> dict[str, list[float]]:
    """Seconds of each step, by method."""
    name, batch, width, usual = CASES[case]
    torch.manual_seed(0)
    model, inputs = build(name, batch, width)
    names = [m for m in METHODS if "TorchJD" not in m or importlib.util.find_spec("torchjd")]
    steps = {method: METHODS[method](deepcopy(model), inputs) for method in names}
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


def table(case: str, seconds: dict[str, list[float]]) -> str:
    lines = [
        f"## {case}\n",
        "| | ms | middle half | x uniform | x floor |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, times in seconds.items():
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]) * 1000
        ratios = [np.median(np.divide(times, seconds[other])) for other in (UNIFORM, FLOOR)]
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(f"| {method} | {middle:.2f} | {spread} | {ratios[0]:.2f} | {ratios[1]:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    options = parser.parse_args()

    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    results = {case: measure(case, options.rounds) for case in options.cases}
    head = (
        "# Time of one training step\n\n"
        f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit}. Written by `benchmarks/step_time.py`; its docstring says how ratios are made.\n"
        "The *floor* makes the same autograd calls and merely adds the gradients. Not measured: "
        "CUDA, peak memory.\n"
    )
    options.output.write_text("\n".join([head, *(table(c, s) for c, s in results.items())]))
    document = {"machine": machine, "torch": torch.__version__, "commit": commit, "s": results}
    options.output.with_suffix(".json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
