"""The report of the paper's claims: its statistics, and a small run of it from start to page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the benchmarks extra is not installed")
pytest.importorskip("matplotlib", reason="the benchmarks extra is not installed")

import claim_runs
import claims
import evidence
from scipy.optimize import minimize
from scipy.stats import ttest_1samp


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    higher, lower = np.random.default_rng(0).normal(size=(2, 7))
    row = evidence.compared(3, "data", "quantity", list(higher), list(lower))
    expected = ttest_1samp(higher - lower, 0).confidence_interval(0.95)
    np.testing.assert_allclose(row.interval, [(higher - lower).mean(), *expected])


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 1.1, 0.9), "holds"),
        ((-1.0, -1.1, -0.9), "does not hold"),
        ((-1.0, 1.0, 0.1), "undecided"),
        ((0.0, 0.0), "undecided"),
    ],
)
def test_verdicts(differences: tuple[float, ...], verdict: str) -> None:
    assert evidence.Row(1, "", "", "", differences).verdict == verdict


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_to_the_pareto_set(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hessians = [claim_runs._hessian(3, generator) for _ in range(2)]
    minima = [claim_runs._normal(3, generator) for _ in range(2)]
    x = claim_runs._normal(3, generator)

    def distance(share: np.ndarray) -> float:
        s = float(share[0])
        weighted = s * hessians[0] + (1 - s) * hessians[1]
        right = s * hessians[0] @ minima[0] + (1 - s) * hessians[1] @ minima[1]
        return float((torch.linalg.solve(weighted, right) - x).norm())

    starts = (0.05, 0.35, 0.65, 0.95)
    found = min(minimize(distance, [s], bounds=[(0, 1)], tol=1e-10).fun for s in starts)
    assert claim_runs.distance_to_pareto_set(x, hessians, minima) == pytest.approx(found, abs=1e-4)
    on_it = claim_runs.distance_to_pareto_set(minima[0], hessians, minima)
    assert on_it == pytest.approx(0, abs=1e-9)


def test_a_small_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    task = replace(claim_runs.TASKS["colored_gray_digits"], rates=(0.05, 0.1))
    monkeypatch.setitem(claim_runs.TASKS, "colored_gray_digits", task)
    monkeypatch.setattr(claims, "TUNING", (10,))
    page, results = tmp_path / "evidence.md", tmp_path / "results"
    arguments = [
        *("--tasks", "colored_gray_digits", "--seeds", "2", "--epochs", "1", "--workers", "1"),
        *("--results", str(results), "--output", str(page)),
    ]
    claims.main(arguments)
    torch.set_num_threads(threads)
    document = json.loads(page.with_suffix(".json").read_text())
    assert {row["claim"] for row in document["rows"]} == {1, 2, 3, 4, 5, 7, 8}
    assert len(document["ablations"]) == 5
    assert set(document["learning_rates"]["colored_gray_digits"].values()) <= {0.05, 0.1}
    measured = [row for row in document["rows"] if row["data"] != "two quadratics"]
    assert {len(row["differences"]) for row in measured} == {2}
    text = page.read_text()
    assert all(f"## {claim}. " in text for claim in range(1, 9))
    assert "Not run: overlaid digits." in text

    # Nothing is trained twice, and the page comes out the same.
    monkeypatch.setattr(claims, "perform", pytest.fail)
    claims.main(arguments)
    assert page.read_text() == text


def test_spoken_digits_need_their_folder() -> None:
    with pytest.raises(SystemExit):
        claims.parse(["--tasks", "spoken_by_speaker"])


def test_one_seed_gives_no_interval() -> None:
    with pytest.raises(SystemExit):
        claims.parse(["--seeds", "1"])


def test_validation_and_test_speakers_are_apart() -> None:
    """Speaker s is the test set of seed s, and speaker s + 1 its validation set, of 6."""
    options = claims.parse(["--data", "."])
    tested = {seed % 6 for seed in claims.seeds(options, "spoken_by_speaker")}
    validated = {(options.seed + seed + 1) % 6 for seed in claims.TUNING}
    assert not tested & validated
