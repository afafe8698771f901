"""A training in a few numbers, and the verdict on integration."""

import dataclasses
import math
import re
import statistics
from types import SimpleNamespace
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
from tests.monitoring.helpers import OTHER_DEFAULTS, defaults


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


def products_of(gradients: list[list[float]]) -> list[list[float]]:
    return [
        [sum(a * b for a, b in zip(one, other, strict=True)) for other in gradients]
        for one in gradients
    ]


def is_finite(gradients: list[list[float]]) -> bool:
    return all(math.isfinite(number) for gradient in gradients for number in gradient)


def phase_by_hand(steps: list[list[list[float]]], rows: list[dict[str, Any]]) -> PhaseSummary:
    """From gradients, number by number."""
    conflict = harmful = 0
    ratios, cosines, coefficients = [], [], []
    finite = [is_finite(gradients) for gradients in steps]
    for gradients, row, counts in zip(steps, rows, finite, strict=True):
        if not counts:
            continue
        coefficients.append([v for k, v in row.items() if k.startswith("coefficient")])
        products = products_of(gradients)
        conflict += any(product < 0 for row in products for product in row)
        harmful += any(sum(row) < 0 for row in products)
        norms = [math.sqrt(products[i][i]) for i in range(len(gradients))]
        present = [i for i, norm in enumerate(norms) if norm > 0]
        if len(present) > 1:
            ratios.append(max(norms) / min(norms[i] for i in present))
            cosines.append(
                min(products[i][j] / norms[i] / norms[j] for i in present for j in present if i < j)
            )
    return PhaseSummary(
        len(steps),
        conflict / sum(finite) if any(finite) else math.nan,
        harmful / sum(finite) if any(finite) else math.nan,
        statistics.median_low(ratios) if ratios else math.nan,
        statistics.median_low(cosines) if cosines else math.nan,
        sum(not any(row) for row in coefficients),
        len(steps) - sum(finite),
        rows[0]["step"],
        rows[-1]["step"],
    )


@given(
    count=st.integers(1, 12),
    m=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["uniform", "mmpareto", "pareto"]),
    absent=st.lists(st.tuples(st.integers(1, 11), st.integers(0, 3))),
    broken=st.lists(st.tuples(st.integers(1, 11), st.sampled_from([math.nan, math.inf]))),
)
def test_numbers(
    count: int,
    m: int,
    seed: int,
    rule: str,
    absent: list[tuple[int, int]],
    broken: list[tuple[int, float]],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, m, 3, generator=generator, dtype=torch.float64)
    for step, loss in absent:  # not in the first one, or it would not be in the block
        if step < count and loss < m:
            steps[step, loss] = 0
    for step, value in broken:
        if step < count:
            steps[step, 0, 0] = value
    recorder = recorded(steps, integration=rule)
    meet = [sum(any(g) for g in gradients) > 1 for gradients in steps.tolist()]  # NaN is true
    gradients = [step for step, counts in zip(steps.tolist(), meet, strict=True) if counts]
    rows = [row for row, counts in zip(recorder.rows(), meet, strict=True) if counts]
    count = len(rows)
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
    products = [products_of(step) for step in gradients if is_finite(step)]
    harmed = [sum(sum(gram[i]) < 0 for gram in products) / len(products) for i in range(m)]
    assert block.harmed == pytest.approx({f"loss{i}": share for i, share in enumerate(harmed)})


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
    usual = PhaseSummary(1000, 0.1, 0.0, 3.0, 0.2, 0, 0, 0, 999)
    return dataclasses.replace(usual, **values)


def block_of(whole: PhaseSummary, early: PhaseSummary, late: PhaseSummary) -> BlockSummary:
    names = ("a", "b", "c")
    return BlockSummary("a+b+c", names, whole, early, late, dict.fromkeys(names, 0.0), 0.0)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"steps": 99}, "99 steps are too few to tell: measure 100"),
        ({"steps": 105, "not_finite": 10}, "95 steps are too few to tell: measure 100"),
        ({"not_finite": 101}, "^101 of 1000 steps had a gradient that is not finite: find out why"),
        ({"steps": 5, "not_finite": 5, "harmful": math.nan}, "5 of 5 steps had a gradient"),
        ({"not_finite": 100}, "expect nothing"),
        ({"harmful": 0.003}, "in 0.3% of the steps .*: expect nothing .* larger learning rate"),
        ({"harmful": 0.07}, "opposes a loss's own gradient in 7.0% of the steps.*: expect little"),
        ({"harmful": 0.62}, 'opposes .* in 62.0% .*: integration may pay.* a sweep .*"uniform"'),
        (
            {"norm_ratio": 1234.0},
            "in 0.0% .*, and the longest gradient is 1,234 times the shortest: weight the losses",
        ),
        (
            {"norm_ratio": 250.0, "harmful": 0.8},
            "in 80.0% .*, and the longest gradient is 250 times the shortest: weight the losses",
        ),
        ({"norm_ratio": math.nan}, "expect nothing"),
    ],
)
def test_verdicts(values: dict[str, Any], verdict: str) -> None:
    whole = phase(**values)
    block = block_of(whole, phase(), whole)
    assert re.search(verdict, block.verdict), block.verdict
    assert block.verdict.endswith(".")


def test_a_share_that_changes_is_told() -> None:
    early, late = phase(harmful=0.02), phase(harmful=0.4)
    block = block_of(phase(harmful=0.21), early, late)
    assert "21.0% of the steps (2.0% early, 40.0% late)" in block.verdict


def test_a_training_that_diverges_is_not_praised() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(200, 2, 4, generator=generator)
    steps[20:] = torch.nan
    summary = recorded(steps, integration="uniform").summary()
    assert summary.blocks[0].verdict.startswith("180 of 200 steps had a gradient that is not")
    head, whole, _, late = str(summary).splitlines()[:4]
    assert head.endswith("not finite")
    assert whole.endswith("180")
    assert late.split()[-1] == "66"
    assert "inf" not in late
    assert late.split().count("nan") + late.split().count("nan%") == 4


def test_a_training_that_diverges_at_the_end_is_not_praised() -> None:
    whole, late = phase(not_finite=50), phase(steps=333, not_finite=50)
    verdict = block_of(whole, phase(steps=333), late).verdict
    assert verdict.startswith("50 of 1000 steps had a gradient that is not finite")


def test_the_few_steps_that_a_grad_scaler_skips_are_only_counted() -> None:
    whole, early = phase(steps=120, not_finite=8), phase(steps=40, not_finite=8)
    block = block_of(whole, early, phase(steps=40))
    assert "expect nothing" in block.verdict


def test_blocks_of_one_name_are_told_apart() -> None:
    param = nn.Parameter(torch.zeros(3))
    integrator = GradientIntegrator([param], {"encoder": [param]}, integration="uniform")
    recorder = ConflictRecorder()
    for step in range(9):
        integrator.zero_grad()
        integrator.backward(vectors_as_losses(param, torch.randn(3 - step // 6, 3)))
        recorder.record(integrator)
    three, two = recorder.summary().blocks
    assert (three.block, two.block) == ("encoder", "encoder")
    assert (two.whole.first_step, two.whole.last_step) == (6, 8)
    lines = str(recorder.summary()).splitlines()
    assert lines[1].startswith("encoder (loss0, loss1, loss2)  whole")
    assert lines[4].startswith("encoder (loss0, loss1)         whole")
    assert lines[6].split()[:2] == ["late", "8-8"]
    assert any(line.startswith("encoder (loss0, loss1, loss2): 6 steps are") for line in lines)
    assert lines[-1].startswith("encoder (loss0, loss1): 3 steps are too few")


def test_whom_the_sum_opposes() -> None:
    steps = torch.zeros(10, 3, 2)
    steps[:, 0] = torch.tensor([3.0, 0.0])
    steps[:, 1] = torch.tensor([0.0, 1.0])
    steps[:, 2] = torch.tensor([0.5, 0.0])
    steps[:4, 2] = torch.tensor([-1.0, 0.0])
    steps[4:6, 1] = torch.tensor([-1.0, 0.0])
    summary = recorded(steps, integration="uniform").summary()
    (block,) = summary.blocks
    assert block.harmed == pytest.approx({"loss0": 0, "loss1": 0.2, "loss2": 0.4})
    assert "loss0+loss1+loss2: 10 steps are too few" in str(summary)
    assert str(summary).endswith(" Opposed by the sum: loss2 40.0%, loss1 20.0%.")


def test_at_most_five_losses_are_named() -> None:
    steps = torch.ones(10, 8, 1)
    steps[:, 0] = 100.0
    for loss in range(1, 8):
        steps[:loss, loss] = -1.0
    lines = str(recorded(steps, integration="uniform").summary()).splitlines()
    (line,) = (line for line in lines if "Opposed by the sum" in line)
    assert re.findall(r"loss(\d) \d", line) == ["7", "6", "5", "4", "3"]


def test_printed_it_is_a_table() -> None:
    steps = torch.randn(120, 2, 4)
    text = str(recorded(steps, integration="uniform").summary())
    head, whole, early, late, empty, told = text.splitlines()
    assert " ".join(head.split()) == (
        "block steps conflict harmful norm ratio cosine zero not finite"
    )
    assert whole.split()[:4] == ["loss0+loss1", "whole", "0-119", "120"]
    assert early.split()[:3] == ["early", "0-39", "40"]
    assert late.split()[:3] == ["late", "80-119", "40"]
    assert empty == ""
    assert told.startswith("loss0+loss1: The summed gradient opposes")
    assert "Opposed by the sum: loss" in told
    assert len({len(line) for line in (head, whole, early, late)}) == 1


def recorded_with_absent_losses(zero: bool, **options: Any) -> ConflictRecorder:
    """Two losses of which the second is absent in two steps of three: zero, or left out."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(2))
    integrator = GradientIntegrator([param], **options)
    recorder = ConflictRecorder()
    for step in range(90):
        losses = vectors_as_losses(param, torch.randn(2, 2, generator=generator))
        if step % 3:
            losses["loss1"] = 0 * losses["loss1"]
            if not zero:
                del losses["loss1"]
        integrator.zero_grad()
        integrator.backward(losses)
        recorder.record(integrator)
    return recorder


@pytest.mark.parametrize("integration", ["uniform", "mmpareto"])
def test_a_loss_times_zero_is_a_loss_left_out(integration: str) -> None:
    zero, left_out = (
        recorded_with_absent_losses(zero, integration=integration).summary()
        for zero in (True, False)
    )
    assert zero == left_out
    (block,) = zero.blocks
    assert block.whole.steps == 30
    assert 0.2 < block.whole.harmful < 0.8
    assert (block.whole.first_step, block.whole.last_step) == (0, 87)


def test_zero_gradients_alone_are_nothing_recorded() -> None:
    with pytest.warns(UserWarning, match="never meet"):
        summary = recorded(torch.zeros(120, 2, 3), integration="uniform").summary()
    assert summary.blocks == ()
    assert "nothing recorded" in str(summary)


@pytest.mark.parametrize(("device", "dtype"), OTHER_DEFAULTS)
@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_other_default_devices_and_dtypes(device: str, dtype: torch.dtype, rescale: str) -> None:
    recorder = recorded(torch.randn(12, 3, 4), rescale=rescale)
    summary, rows = recorder.summary(), recorder.rows()
    with defaults(device, dtype):
        assert recorder.summary() == summary
        assert recorder.rows() == rows
        other = ConflictRecorder()
        other.load_state_dict(recorder.state_dict())
        assert other.summary() == summary


def test_a_recording_of_integrated_steps_says_so() -> None:
    opposed = torch.tensor([[1.0, 0.0], [-2.0, 1.0]]).expand(10, 2, 2)
    integrated = recorded(opposed).summary()
    assert integrated.blocks[0].turned == 1
    assert 'record with integration="uniform"' in str(integrated)
    plain = recorded(opposed, integration="uniform").summary()
    assert plain.blocks[0].turned == 0
    assert "Recorded while integrating" not in str(plain)


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (lambda net: SGD(net.parameters(), 0.1), None),
        (lambda net: [SGD(net.audio.parameters(), 0.1), SGD(net.visual.parameters(), 0.2)], None),
        (lambda net: SGD(net.parameters(), 0.1, momentum=0.9), "SGD"),
        (lambda net: SGD(net.parameters(), 0.1, weight_decay=0.1), "SGD"),
        (lambda net: Adam(net.parameters(), 0.1), "Adam"),
        (
            lambda net: [AdamW(net.audio.parameters()), Adam(net.visual.parameters())],
            "AdamW or Adam",
        ),
    ],
)
def test_a_base_that_does_not_step_along_the_gradient_is_told(base: Any, named: str | None) -> None:
    model = LateFusion()
    for head in (model.audio_head, model.visual_head, model.mm_head):
        head.requires_grad_(False)  # not every base holds them, which is warned of
    opt = MMParetoOptimizer(base(model), integration="uniform")
    recorder, resumed = ConflictRecorder(), ConflictRecorder()
    opt.register_step_post_hook(recorder.record)
    opt.step(losses=model.losses(audio_visual_batch()))
    resumed.load_state_dict(recorder.state_dict())
    around = ConflictRecorder()
    around.record(SimpleNamespace(stats=opt.stats, optimizer=opt))  # as Lightning holds ours
    for text in (str(each.summary()) for each in (recorder, resumed, around)):
        assert ("are about gradients" in text) == (named is not None)
        assert named is None or f" The steps that {named} makes of them, " in text


def test_nothing_recorded() -> None:
    summary = ConflictRecorder().summary()
    assert summary.blocks == ()
    assert "nothing recorded" in str(summary)
