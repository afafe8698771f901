"""A training in a few numbers, and the verdict on integration."""

import dataclasses
import math
import re
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import (
    BlockSummary,
    ConflictRecorder,
    GradientIntegrator,
    MMParetoOptimizer,
    PhaseSummary,
)
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses


def recorded(steps: Tensor, **options: Any) -> ConflictRecorder:
    """A recorder of gradients ``(steps, m, numbers)``."""
    param = nn.Parameter(torch.zeros(steps.shape[2], dtype=steps.dtype))
    integrator = GradientIntegrator([param], **options)
    recorder = ConflictRecorder()
    for gradients in steps:
        integrator.zero_grad()
        integrator.backward(vectors_as_losses(param, gradients))
        recorder.record(integrator)
    return recorder


def phase_by_hand(steps: list[list[list[float]]], rows: list[dict[str, Any]]) -> PhaseSummary:
    """From gradients, number by number."""
    conflict = harmful = 0
    ratios, cosines = [], []
    for gradients in steps:
        products = [
            [sum(a * b for a, b in zip(one, other, strict=True)) for other in gradients]
            for one in gradients
        ]
        conflict += any(product < 0 for row in products for product in row)
        harmful += any(sum(row) < 0 for row in products)
        norms = [math.sqrt(products[i][i]) for i in range(len(gradients))]
        present = [i for i, norm in enumerate(norms) if norm > 0]
        if len(present) > 1:
            ratios.append(max(norms) / min(norms[i] for i in present))
            cosines.append(
                min(products[i][j] / norms[i] / norms[j] for i in present for j in present if i < j)
            )
    coefficients = [[v for k, v in row.items() if k.startswith("coefficient")] for row in rows]
    return PhaseSummary(
        len(steps),
        conflict / len(steps),
        harmful / len(steps),
        statistics.median_low(ratios) if ratios else math.nan,
        statistics.median_low(cosines) if cosines else math.nan,
        sum(not any(row) for row in coefficients),
        max(map(max, coefficients)),
    )


@given(
    count=st.integers(1, 12),
    m=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["uniform", "mmpareto", "pareto"]),
    absent=st.lists(st.tuples(st.integers(1, 11), st.integers(0, 3))),
)
def test_numbers(count: int, m: int, seed: int, rule: str, absent: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, m, 3, generator=generator, dtype=torch.float64)
    for step, loss in absent:  # not in the first one, or it would not be in the block
        if step < count and loss < m:
            steps[step, loss] = 0
    recorder = recorded(steps, integration=rule)
    gradients, rows = steps.tolist(), recorder.rows()
    (block,) = recorder.summary().blocks
    assert block.objectives == tuple(f"loss{i}" for i in range(m))
    third = max(1, count // 3)
    for found, part in (
        (block.whole, slice(None)),
        (block.early, slice(third)),
        (block.late, slice(-third, None)),
    ):
        expected = phase_by_hand(gradients[part], rows[part])
        assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(expected), nan_ok=True)


def test_exactly_opposite_gradients_give_zero() -> None:
    steps = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    (block,) = recorded(steps).summary().blocks
    assert block.whole.zero == 1
    assert (block.early.zero, block.late.zero) == (1, 0)


def test_settings_that_change_make_no_second_block() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    recorder = ConflictRecorder()
    for step in range(6):
        opt.gamma = 1.0 + step % 2
        opt.step(losses=model.losses(audio_visual_batch()))
        recorder.record(opt)
    blocks = recorder.summary().blocks
    assert [block.block for block in blocks] == ["mm+audio", "mm+visual"]
    assert [block.whole.steps for block in blocks] == [6, 6]
    rows = [row for row in recorder.rows() if row["block"] == "mm+audio"]
    assert blocks[0].early.conflict == sum(row["conflict"] for row in rows[:2]) / 2


def phase(**values: Any) -> PhaseSummary:
    usual = PhaseSummary(1000, 0.1, 0.0, 3.0, 0.2, 0, 1.0)
    return dataclasses.replace(usual, **values)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"steps": 99}, "99 steps are too few to tell: measure 100 or more"),
        ({"harmful": 0.003}, "The sum lowers every loss in 99.7 % of the steps: expect nothing"),
        ({"harmful": 0.0}, "in 100 % of the steps: expect nothing .* larger learning rate"),
        ({"harmful": 0.0001}, "in >99.9 % of the steps"),
        ({"harmful": 0.07}, "raises a loss in 7.0 % of the steps.*: expect little"),
        ({"harmful": 0.62}, "raises a loss in 62.0 % .*: integration may pay.* a sweep"),
        (
            {"norm_ratio": 1234.0},
            "The longest gradient is 1,234 times the shortest, so the sum follows .*weight",
        ),
        (
            {"norm_ratio": 250.0, "harmful": 0.8},
            "raises a loss in 80.0 % .*, and the longest gradient is 250 times the shortest: weight"
            " the losses first",
        ),
        ({"norm_ratio": math.nan}, "expect nothing"),
    ],
)
def test_verdicts(values: dict[str, Any], verdict: str) -> None:
    whole = phase(**values)
    block = BlockSummary("a+b+c", ("a", "b", "c"), whole, phase(), whole)
    assert re.search(verdict, block.verdict), block.verdict
    assert block.verdict.endswith(".")


def test_a_share_that_changes_is_told() -> None:
    early, late = phase(harmful=0.02), phase(harmful=0.4)
    block = BlockSummary("a+b", ("a", "b"), phase(harmful=0.21), early, late)
    assert "21.0 % of the steps (2.0 % early, 40.0 % late)" in block.verdict


def test_printed_it_is_a_table() -> None:
    steps = torch.randn(120, 2, 4)
    text = str(recorded(steps, integration="uniform").summary())
    head, whole, early, late, empty, told = text.splitlines()
    assert " ".join(head.split()) == (
        "block steps conflict harmful norm ratio cosine zero coefficient"
    )
    assert whole.split()[:3] == ["loss0+loss1", "whole", "120"]
    assert early.split()[:2] == ["early", "40"]
    assert late.split()[:2] == ["late", "40"]
    assert not empty
    assert told.startswith("loss0+loss1: The sum")
    assert len({len(line) for line in (head, whole, early, late)}) == 1


def test_noise_has_columns_where_it_was_measured() -> None:
    param = nn.Parameter(torch.zeros(4))
    integrator = GradientIntegrator([param], measure_noise=True)
    recorder, across = ConflictRecorder(), []
    common = torch.randn(2, 4)
    for step in range(6):
        integrator.zero_grad()
        for _ in range(1 + step % 2):
            integrator.backward(vectors_as_losses(param, common + torch.randn(2, 4) / 4))
        recorder.record(integrator)
        if step % 2:
            (stats,) = integrator.stats.values()
            assert stats.gram_across is not None
            across.append(stats.gram_across)
    rows = [row for row in recorder.rows() if "harmful_across" in row]
    flags = [row["harmful"] and row["harmful_across"] for row in rows]
    assert len(flags) == 3
    summary = recorder.summary()
    assert summary.blocks[0].whole.harmful_across == pytest.approx(sum(flags) / 3)
    assert summary.blocks[0].whole.steps == 6
    gram = torch.stack(across).mean(0)
    cosine = float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    assert summary.blocks[0].whole.cosine_across == pytest.approx(cosine, nan_ok=True)
    assert "harmful across" in str(summary).splitlines()[0]


def test_nothing_recorded() -> None:
    summary = ConflictRecorder().summary()
    assert summary.blocks == ()
    assert "nothing recorded" in str(summary)
