"""Times of the rules on Gram matrices, and how far they are from slow solutions; writes RULES.md.

    python benchmarks/rules.py

A time is the median of interleaved calls on one float64 Gram matrix on the CPU. Three kinds of
gradients: *independent* ones, drawn at random; *cancelling* ones, which have a zero min-norm
point; *correlated* ones, with a common part ten times the rest and lengths from 1 to 1000. Beside
them TorchJD's, for the rules that it has, at its defaults.

A deviation is the largest one, over 300 draws of two to six gradients of each kind, between the
combined gradient and that of an independent solution (SciPy's NNLS; NumPy's pseudo-inverse for
ConFIG), over the sum of the gradients' lengths.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.optimize import nnls
from torch import Tensor
from torchjd.aggregation import ConFIG, DualProjWeighting, MGDAWeighting, UPGradWeighting

import mmpareto_optim as mp

Rule = Callable[[Tensor], Tensor]
Call = tuple[str, str]
"""The name of a rule, and whose."""
OURS: dict[str, Rule] = {
    "mmpareto": mp.mmpareto_coefficients,
    "pareto": mp.pareto_coefficients,
    "config": mp.config_coefficients,
    "upgrad": mp.upgrad_coefficients,
    "dualproj": mp.dualproj_coefficients,
}
THEIRS: dict[str, Rule] = {
    "pareto": MGDAWeighting(),
    "upgrad": UPGradWeighting(),
    "dualproj": DualProjWeighting(),
}
KINDS = ("independent", "cancelling", "correlated")
SIZES = (2, 5, 20, 50)


def gradients(kind: str, m: int, generator: torch.Generator, numbers: int = 200) -> Tensor:
    rows = torch.randn(m, numbers, generator=generator, dtype=torch.float64)
    if kind == "cancelling":
        rows[-1] = -rows[:-1].sum(0)
    if kind == "correlated":
        common = 10 * torch.randn(1, numbers, generator=generator, dtype=torch.float64)
        rows = (rows + common) * torch.logspace(0, 3, m, dtype=torch.float64).unsqueeze(1)
    return rows


def projected(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """On the dual cone: the negative of the residual's fit by the rows."""
    fit, _ = nnls(rows.T, -vector, maxiter=1000)
    point: np.ndarray = vector + rows.T @ fit
    return point


def min_norm_point(rows: np.ndarray) -> np.ndarray:
    """By NNLS with a heavy row that makes the weights add up to 1 (Lawson & Hanson 1974)."""
    heavy = 1e6 * np.linalg.norm(rows, axis=1).max()
    matrix = np.vstack([rows.T, np.full(len(rows), heavy)])
    weights, _ = nnls(matrix, np.append(np.zeros(rows.shape[1]), heavy), maxiter=1000)
    point: np.ndarray = rows.T @ (weights / weights.sum())
    return point


def expected(rule: str, rows: np.ndarray) -> Any:
    plain = rows.sum(0)
    if rule == "pareto":
        return len(rows) * min_norm_point(rows)
    if rule == "dualproj":
        return projected(rows, plain)
    if rule == "upgrad":
        return np.sum([projected(rows, row) for row in rows], axis=0)
    if rule == "config":
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        direction = np.linalg.pinv(unit) @ np.ones(len(rows))
        size = np.linalg.norm(direction)
        if size < 1e-6:
            return np.zeros_like(plain)
        return (plain @ direction) * direction / size**2
    if (rows @ rows.T >= 0).all():
        return 1.5 * plain
    point = min_norm_point(rows)
    length = np.linalg.norm(plain) / max(float(np.linalg.norm(point)), 1e-300)
    return 1.5 * max(length, len(rows)) * point


def deviation(rule: str, kind: str) -> float | None:
    """None where the direction of a zero vector is stretched, and there is nothing to compare."""
    if kind == "cancelling" and rule in ("mmpareto", "config"):
        return None
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for number in range(300):
        rows = gradients(kind, 2 + number % 5, generator, 8)
        found = OURS[rule](rows @ rows.T) @ rows
        error = np.linalg.norm(found.numpy() - expected(rule, rows.numpy()))
        worst = max(worst, float(error / rows.norm(dim=1).sum()))
    return worst


def times(kind: str, m: int, rounds: int) -> dict[Call, float]:
    """Median milliseconds of each rule and of TorchJD's."""
    rows = gradients(kind, m, torch.Generator().manual_seed(m))
    gram = rows @ rows.T
    calls: dict[Call, Rule] = {(rule, "ours"): function for rule, function in OURS.items()}
    calls |= {(rule, "TorchJD"): function for rule, function in THEIRS.items()}
    seconds: dict[Call, list[float]] = {call: [] for call in calls}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(calls)):
            call = list(calls)[index]
            started = perf_counter()
            calls[call](gram)
            seconds[call].append(perf_counter() - started)
    # ConFIG of TorchJD is no function of the Gram matrix: it is given the gradients.
    seconds["config", "TorchJD"] = []
    for _ in range(rounds):
        started = perf_counter()
        ConFIG()(rows)
        seconds["config", "TorchJD"].append(perf_counter() - started)
    return {call: 1000 * float(np.median(found)) for call, found in seconds.items()}


def time_table(kind: str, rounds: int) -> str:
    head = "| rule | " + " | ".join(f"m = {m}" for m in SIZES) + " |"
    lines = [f"## {kind.capitalize()} gradients\n", head, "| --- |" + " ---: |" * len(SIZES)]
    found = [times(kind, m, rounds) for m in track(SIZES, description=kind)]
    for rule in OURS:
        cells = []
        for at_size in found:
            cell = f"{at_size[rule, 'ours']:.2f}"
            if (rule, "TorchJD") in at_size:
                cell += f" / {at_size[rule, 'TorchJD']:.2f}"
            cells.append(cell)
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RULES.md"))
    options = parser.parse_args()
    lines = ["| rule | " + " | ".join(KINDS) + " |", "| --- | ---: | ---: | ---: |"]
    for rule in track(OURS, description="deviations"):
        found = [deviation(rule, kind) for kind in KINDS]
        lines.append(
            f"| {rule} | " + " | ".join("" if d is None else f"{d:.1e}" for d in found) + " |"
        )
    head = (
        "# Rules: times and deviations\n\n"
        f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), PyTorch "
        f"{torch.__version__}. Written by `benchmarks/rules.py`; its docstring says what the "
        "kinds of gradients are.\nMilliseconds of one call, ours / TorchJD's where it has the rule."
        "\n"
    )
    tables = [time_table(kind, options.rounds) for kind in KINDS]
    end = "## Largest deviation from an independent solution\n\n" + "\n".join(lines) + "\n"
    options.output.write_text("\n".join([head, *tables, end]))


if __name__ == "__main__":
    main()
