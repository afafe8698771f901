"""Gram matrices without the noise of the batch, from products of different parts of it."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import ConflictRecorder, GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, vectors_as_losses
from tests.processes import Processes

Batch = tuple[Tensor, Tensor, Tensor]


def measuring(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return MMParetoOptimizer(sgd, measure_noise=True, **options)


def of_vectors(parts: Tensor, **options: Any) -> GradientIntegrator:
    """After a backward for each part ``(parts, m, numbers)``."""
    param = nn.Parameter(torch.zeros(parts.shape[2], dtype=parts.dtype))
    integrator = GradientIntegrator([param], measure_noise=True, **options)
    for part in parts:
        integrator.backward(vectors_as_losses(param, part))
    return integrator


def across(parts: Tensor) -> Tensor:
    """Products of different parts' gradients, pair by pair; as many as ``K^2`` would be."""
    count = len(parts)
    pairs = [parts[one] @ parts[other].T for one, other in permutations(range(count), 2)]
    return torch.stack(pairs).sum(0) * count / (count - 1)


def flat_gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, params, retain_graph=True)
    return torch.cat([piece.flatten() for piece in found])


def rows_of(model: LateFusion, batch: Batch) -> Tensor:
    """Gradients of the audio encoder's two losses."""
    losses, params = model.losses(batch), list(model.audio.parameters())
    return torch.stack([flat_gradient(losses[name], params) for name in ("mm", "audio")])


@given(
    count=st.integers(2, 5),
    m=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["mmpareto", "uniform", "pareto"]),
)
def test_products_of_different_parts(count: int, m: int, seed: int, rule: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(count, m, 5, generator=generator, dtype=torch.float64)
    (stats,) = of_vectors(parts, integration=rule).stats.values()
    torch.testing.assert_close(stats.gram_across, across(parts))
    torch.testing.assert_close(stats.gram, parts.sum(0) @ parts.sum(0).T)


def test_micro_batches_of_a_model() -> None:
    model = LateFusion(dtype=torch.float64)
    opt = measuring(model)
    for _ in range(3):
        batches = [audio_visual_batch(dtype=torch.float64) for _ in range(3)]
        parts = torch.stack([rows_of(model, batch) for batch in batches])
        for batch in batches[:-1]:
            opt.backward(model.losses(batch))
        opt.step(losses=model.losses(batches[-1]))
        torch.testing.assert_close(opt.stats["mm+audio"].gram_across, across(parts))
        opt.zero_grad()


def test_gradients_are_the_same_bit_for_bit() -> None:
    model = LateFusion()
    twin = deepcopy(model)
    opt = measuring(model)
    plain = MMParetoOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1))
    for _ in range(4):
        for keep in (True, True, False):
            batch = audio_visual_batch()
            for by, losses in ((opt, model.losses(batch)), (plain, twin.losses(batch))):
                by.backward(losses) if keep else by.step(losses=losses)
        assert all(stats.gram_across is None for stats in plain.stats.values())
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_it_is_unbiased_where_the_gram_matrix_is_not() -> None:
    """Linear regression, of which the expected gradients are known: ``2 C (w - w_i)``."""
    numbers, size, count, repeats = 6, 4, 4, 600
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, numbers, dtype=torch.float64)  # of the inputs: C = scale^2
    targets = torch.randn(2, numbers, generator=generator, dtype=torch.float64)
    inputs = torch.randn(repeats, count, size, numbers, generator=generator, dtype=torch.float64)
    inputs = inputs * scale
    noise = torch.randn(repeats, count, size, generator=generator, dtype=torch.float64)
    expected = -2 * scale.square() * targets  # at w = 0
    param = nn.Parameter(torch.zeros(numbers, dtype=torch.float64))
    integrator = GradientIntegrator([param], measure_noise=True, integration="uniform")
    found, biased = [], []
    for batches, errors in zip(inputs, noise, strict=True):
        integrator.zero_grad()
        for x, error in zip(batches, errors, strict=True):
            wrong = [x @ param - (x @ target + 3 * error) for target in targets]
            integrator.backward(
                {str(i): part.square().mean() / count for i, part in enumerate(wrong)}
            )
        (stats,) = integrator.stats.values()
        assert stats.gram_across is not None
        found.append(stats.gram_across)
        biased.append(stats.gram)
    true = expected @ expected.T
    for grams, unbiased in ((torch.stack(found), True), (torch.stack(biased), False)):
        errors = grams.std(0) / repeats**0.5
        assert bool(((grams.mean(0) - true).abs() < 5 * errors).all()) == unbiased


def test_one_part_has_none() -> None:
    model = LateFusion()
    opt = measuring(model)
    for _ in range(2):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
        assert all(stats.gram_across is None for stats in opt.stats.values())


def test_features_have_none() -> None:
    model = LateFusion()
    opt = measuring(model)
    for _ in range(2):
        batch = audio_visual_batch()
        features = model.features(batch)
        opt.backward(model.losses_at(features, batch[2]), features=features)
    assert opt.stats["audio"].gram_across is None


def test_a_loss_that_a_part_lacks() -> None:
    model = LateFusion(dtype=torch.float64)
    opt = measuring(model)
    batches = [audio_visual_batch(dtype=torch.float64) for _ in range(3)]
    parts = torch.stack([rows_of(model, batch) for batch in batches])
    for number, batch in enumerate(batches):
        losses = model.losses(batch)
        opt.backward({n: loss for n, loss in losses.items() if n != "visual" or number > 0})
    torch.testing.assert_close(opt.stats["mm+audio"].gram_across, across(parts))
    assert opt.stats["mm+visual"].gram_across is None  # no block of the first part
    parts[2, 1] = 0
    opt.zero_grad()
    for number, batch in enumerate(batches):
        losses = model.losses(batch)
        opt.backward({n: loss for n, loss in losses.items() if n != "audio" or number < 2})
    torch.testing.assert_close(opt.stats["mm+audio"].gram_across, across(parts))


def test_parameters_that_the_same_losses_move_are_one_block() -> None:
    """A loss times zero joins blocks: their products across parts are added up, too."""
    model = LateFusion(dtype=torch.float64)
    model.requires_grad_(False)
    model.audio.requires_grad_(True)
    shared = nn.Parameter(torch.ones(3, dtype=torch.float64))
    sgd = torch.optim.SGD([*model.audio.parameters(), shared], lr=0.1)
    opt = MMParetoOptimizer(sgd, measure_noise=True)

    def losses(batch: Batch, weight: float) -> Losses:
        of = model.losses((batch[0], batch[1], batch[2]))
        value = {name: loss * shared.square().sum() for name, loss in of.items()}
        return {**value, "visual": weight * value["visual"]}

    params = [*model.audio.parameters(), shared]
    for weight in (1.0, 0.0):
        opt.zero_grad()
        parts = []
        for _ in range(2):
            batch = audio_visual_batch(dtype=torch.float64)
            of = losses(batch, weight)
            parts.append(torch.stack([flat_gradient(of[n], params) for n in ("mm", "audio")]))
            opt.backward(of)
    stats = opt.stats["mm+audio"]
    total = parts[0] + parts[1]
    torch.testing.assert_close(stats.gram, total @ total.T)
    torch.testing.assert_close(stats.gram_across, across(torch.stack(parts)))


@pytest.mark.parametrize("version", [False, True], ids=["behind autograd's back", "openly"])
def test_edited_gradients(version: bool) -> None:
    """What is added to and not integrated again is no part."""
    parts = torch.randn(3, 2, 4, dtype=torch.float64)
    first, second = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    integrator = GradientIntegrator([first, second], measure_noise=True)

    def backward(part: Tensor) -> None:
        losses = vectors_as_losses(first, part)
        integrator.backward(
            {
                name: loss + other
                for (name, loss), other in zip(
                    losses.items(), vectors_as_losses(second, part).values(), strict=True
                )
            }
        )

    backward(parts[0])
    for param in (first, second):
        assert param.grad is not None
        (param.grad if version else param.grad.data).mul_(2)
    backward(parts[1])
    (stats,) = integrator.stats.values()
    assert stats.gram_across is None  # all was edited: a first part again
    backward(parts[2])
    (stats,) = integrator.stats.values()
    torch.testing.assert_close(stats.gram_across, 2 * across(parts[1:]))
    assert first.grad is not None
    (first.grad if version else first.grad.data).mul_(2)
    backward(parts[0])
    (stats,) = integrator.stats.values()
    assert stats.gram_across is None  # one parameter has other parts than the other


def test_the_recorder_keeps_it() -> None:
    model = LateFusion(dtype=torch.float64)
    opt, recorder = measuring(model), ConflictRecorder()
    expected = []
    for _ in range(5):
        opt.zero_grad()
        for _ in range(2):
            opt.backward(model.losses(audio_visual_batch(4, dtype=torch.float64)))
        opt.step()
        recorder.record(opt)
        gram = opt.stats["mm+audio"].gram_across
        assert gram is not None
        expected.append((bool(gram[0, 1] < 0), bool((gram.sum(1) < 0).any())))
    rows = [row for row in recorder.rows() if row["block"] == "mm+audio"]
    assert [(row["conflict_across"], row["harmful_across"]) for row in rows] == expected
    whole = recorder.summary().blocks[0].whole
    both = [row["conflict"] and row["conflict_across"] for row in rows]
    assert whole.conflict_across == sum(both) / 5
    both = [row["harmful"] and row["harmful_across"] for row in rows]
    assert whole.harmful_across == sum(both) / 5


def test_nothing_is_read_back() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    model = LateFusion().to("meta")
    opt = measuring(model)
    batch = tuple(tensor.to("meta") for tensor in audio_visual_batch())
    for _ in range(3):
        opt.backward(model.losses(batch))  # type: ignore[arg-type]
    opt.step()
    assert opt.stats["mm+audio"].gram_across is not None


def check_ranks(micro: int) -> None:
    model = LateFusion(dtype=torch.float64)
    opt = measuring(model)
    for _ in range(2):
        parts = []
        opt.zero_grad()
        for _ in range(micro):
            both = [audio_visual_batch(dtype=torch.float64) for _ in range(2)]
            parts += [rows_of(model, batch) / 2 for batch in both]
            opt.backward(model.losses(both[dist.get_rank()]))
        opt.step()
        torch.testing.assert_close(opt.stats["mm+audio"].gram_across, across(torch.stack(parts)))


@pytest.mark.parametrize("micro", [1, 3])
def test_each_rank_is_a_part(two: Processes, micro: int) -> None:
    two(check_ranks, micro)


def check_shards() -> None:
    from torch.distributed.fsdp import fully_shard

    whole = LateFusion(dtype=torch.float64)
    model = deepcopy(whole)
    for module in (model.audio, model.visual, model.audio_head, model.visual_head, model.mm_head):
        fully_shard(module)
    opt, reference = measuring(model), measuring(whole, average_gradients=False)
    for _ in range(3):
        batch = audio_visual_batch(dtype=torch.float64)
        opt.backward(model.losses(batch))
        reference.backward(whole.losses(batch))
    for name, stats in opt.stats.items():
        torch.testing.assert_close(stats.gram_across, reference.stats[name].gram_across)


def test_micro_batches_of_shards(two: Processes) -> None:
    two(check_shards)
