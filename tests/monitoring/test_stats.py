"""What an integration saw."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import BlockStats, MMParetoOptimizer, mmpareto_coefficients
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses


def stats_of(rows: list[list[float]], **options: object) -> BlockStats:
    gradients = torch.tensor(rows)
    param = nn.Parameter(torch.zeros(gradients.shape[1]))
    sgd = torch.optim.SGD([param], lr=0.1)
    opt = MMParetoOptimizer(sgd, **options)  # type: ignore[arg-type]
    opt.backward(vectors_as_losses(param, gradients))
    (stats,) = opt.stats.values()
    return stats


def test_conflict_of_two() -> None:
    stats = stats_of([[1.0, 0.0], [-1.0, 2.0]])
    assert stats.objectives == ("loss0", "loss1")
    assert stats.norms.tolist() == pytest.approx([1, 5**0.5])
    assert float(stats.cosine) == pytest.approx(-1 / 5**0.5)
    assert stats.alpha.tolist() == pytest.approx([0.75, 0.25])
    assert bool(stats.conflict)
    assert float(stats.min_norm) == pytest.approx(0.5**0.5)
    # The sum (0, 2) is longer than 2 p = (1, 1).
    assert float(stats.scale) == pytest.approx(2**0.5)
    assert stats.coefficients.tolist() == pytest.approx([1.5 * 1.5 * 2**0.5, 1.5 * 0.5 * 2**0.5])


def test_agreement() -> None:
    stats = stats_of([[1.0, 0.0], [1.0, 1.0]], gamma=2.0)
    assert not bool(stats.conflict)
    assert float(stats.scale) == 1
    assert stats.coefficients.tolist() == [2, 2]


@given(st.integers(2, 4), st.integers(0, 2**31), st.sampled_from(["uniform", "mmpareto"]))
def test_harmful_is_where_the_sum_raises_a_loss(m: int, seed: int, rule: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 4, generator=generator, dtype=torch.float64)
    stats = stats_of(rows.tolist(), integration=rule)
    rises = [float(row @ rows.sum(0)) < 0 for row in rows]
    assert stats.harmed.tolist() == rises
    assert bool(stats.harmful) == any(rises)
    if m == 2:  # cos < -||shorter|| / ||longer||
        shorter, longer = sorted(stats.norms.tolist())
        assert bool(stats.harmful) == (float(stats.cosine) < -shorter / longer)
    assert bool(stats.conflict) or not bool(stats.harmful)


@pytest.mark.parametrize(
    ("rows", "harmful"),
    [
        ([[1.0, 0.0], [-1.0, 2.0]], False),  # a conflict that harms nobody
        ([[1.0, 0.0], [-3.0, 2.0]], True),
        ([[1.0, 0.0], [-1.0, 0.0]], False),  # the sum is zero
        ([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], True),
    ],
)
def test_harmful_steps(rows: list[list[float]], harmful: bool) -> None:
    stats = stats_of(rows)
    assert stats.harmful.shape == ()
    assert bool(stats.harmful) == harmful


def test_three_losses_show_the_worst_pair() -> None:
    stats = stats_of([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])
    assert float(stats.cosine) == pytest.approx(-1 / 2**0.5)
    assert stats.gram.shape == (3, 3)


def alignment_of(gradients: Tensor) -> Tensor:
    names = tuple(f"loss{i}" for i in range(len(gradients)))
    return BlockStats(names, gradients @ gradients.T, torch.ones(len(gradients))).alignment


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_alignment(m: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(m, size, generator=generator, dtype=torch.float64)
    found = alignment_of(gradients)
    directions = [gradient / gradient.norm() for gradient in gradients]
    mean = sum(directions, torch.zeros(size)) / m
    assert found.shape == ()
    assert float(found) == pytest.approx(2 * float(mean @ mean) - 1, abs=1e-12)
    assert -1 <= float(found) <= 1
    scales = 10 ** torch.empty(m, 1, dtype=torch.float64).uniform_(-6, 6, generator=generator)
    order = torch.randperm(m, generator=generator)
    absent = torch.zeros(2, size, dtype=torch.float64)
    for same in (gradients * scales, gradients[order], torch.cat([absent, gradients])):
        assert float(alignment_of(same)) == pytest.approx(float(found), abs=1e-12)
    cosine = torch.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert float(alignment_of(gradients[:2])) == pytest.approx(float(cosine), abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "alignment"),
    [
        ([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], 1.0),
        ([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, -4.0]], -1.0),
        ([[1.0, 0.0], [0.0, 2.0]], 0.0),
        ([[1.0, 0.0], [0.0, 0.0]], math.nan),
        ([[0.0, 0.0], [0.0, 0.0]], math.nan),
        ([[1.0, 0.0]], math.nan),
        ([[1.0, 0.0], [1.0, 0.0], [math.nan, 0.0]], math.nan),
        ([[1.0, 0.0], [1.0, 0.0], [math.inf, 0.0]], math.nan),
    ],
)
def test_alignment_at_its_ends_and_where_there_is_none(
    rows: list[list[float]], alignment: float
) -> None:
    assert float(alignment_of(torch.tensor(rows))) == pytest.approx(alignment, nan_ok=True)


def test_alignment_waits_for_nothing() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    assert alignment_of(torch.ones(3, 2, device="meta")).is_meta


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [-2.0, -4.0]], [[1.0, 0.0], [-3.0, 0.0]]])
def test_pareto_stationary(rows: list[list[float]]) -> None:
    stats = stats_of(rows)
    assert float(stats.min_norm) == pytest.approx(0, abs=1e-9)
    assert float(stats.scale) == 0


def test_a_zero_gradient_has_no_cosine() -> None:
    param = nn.Parameter(torch.zeros(2))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
    for weight in (1.0, 0.0):
        opt.zero_grad()
        opt.backward(
            {"mm": (param * torch.tensor([1.0, 2.0])).sum(), "audio": weight * param.sum()}
        )
    stats = opt.stats["mm+audio"]
    assert math.isnan(float(stats.cosine))
    assert not bool(stats.conflict)
    assert not bool(stats.harmful)
    assert float(stats.scale) == 1
    assert float(stats.min_norm) == 0


@pytest.mark.parametrize("integration", ["uniform", "pareto"])
def test_other_rules_are_not_scaled(integration: str) -> None:
    stats = stats_of([[1.0, 0.0], [-1.0, 2.0]], integration=integration)
    assert float(stats.scale) == pytest.approx(1)


def test_each_step_replaces_the_stats() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert opt.stats == {}
    opt.step(losses=model.losses(audio_visual_batch()))
    first = opt.stats
    opt.step(losses=model.losses(audio_visual_batch()))
    assert list(first) == list(opt.stats)
    assert not first["mm+audio"].gram.equal(opt.stats["mm+audio"].gram)


def test_steps_as_a_leading_dimension() -> None:
    """What the recorder reads all at once is what each step's own stats say."""
    rows = torch.randn(20, 3, 4, dtype=torch.float64)
    rows[3, 1] = 0
    grams = rows @ rows.mT
    coefficients = mmpareto_coefficients(grams, 1.5)
    together = BlockStats(("a", "b", "c"), grams, coefficients, 1.5)
    each = [
        BlockStats(("a", "b", "c"), *pair, 1.5) for pair in zip(grams, coefficients, strict=True)
    ]
    for name in (
        *("scale", "norms", "cosines", "cosine", "conflict", "harmful", "harmed", "alpha"),
        *("min_norm", "alignment"),
    ):
        expected = torch.stack([getattr(stats, name) for stats in each])
        torch.testing.assert_close(getattr(together, name), expected, equal_nan=True, msg=name)


OPPOSED = ("opposed", "by", "the", "sum")


def test_printed_it_is_what_people_read() -> None:
    one, other, block = str(stats_of([[1.0, 0.0], [-3.0, 2.0]], integration="uniform")).splitlines()
    assert one.split() == ["loss0", "norm", "1", "coefficient", "1", *OPPOSED]
    assert other.split() == ["loss1", "norm", "3.61", "coefficient", "1"]
    assert block == "smallest cosine -0.832: in conflict, harmful"
    agreeing = str(stats_of([[1.0, 0.0], [1.0, 1.0]]))
    assert agreeing.endswith("smallest cosine 0.707: no conflict, not harmful")
    assert repr(stats_of([[1.0, 0.0]] * 2)).startswith("BlockStats(objectives=('loss0', 'loss1'), ")


def test_printed_gradients_that_are_not_finite_are_not_free_of_conflict() -> None:
    text = str(stats_of([[1.0, 0.0], [math.nan, 2.0]], integration="uniform"))
    assert text.endswith("are not finite")
    assert "conflict" not in text


def test_a_stack_is_printed_as_tensors() -> None:
    stats = BlockStats(("a", "b"), torch.ones(5, 2, 2), torch.ones(5, 2))
    assert str(stats) == repr(stats)
    meta = BlockStats(("a", "b"), torch.ones(2, 2, device="meta"), torch.ones(2, device="meta"))
    assert str(meta) == repr(meta)
