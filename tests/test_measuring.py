"""Measuring under the plain sum, in every step or every so many."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import ConflictRecorder, GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch, grads
from tests.processes import Processes

Options = dict[str, Any]


def uniform(model: nn.Module, every: int, **options: Any) -> MMParetoOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MMParetoOptimizer(sgd, integration="uniform", measure_every=every, **options)


def plain_grads(model: LateFusion, batch: Any) -> list[Tensor | None]:
    """What plain training has in ``.grad``, of a copy that has none before."""
    twin = deepcopy(model)
    twin.zero_grad()
    torch.stack(list(twin.losses(batch).values())).sum().backward()
    return grads(twin)


def assert_bits(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(every=st.integers(1, 4), steps=st.integers(1, 9), at_features=st.booleans())
def test_gradients_are_those_of_the_plain_sum(every: int, steps: int, at_features: bool) -> None:
    model = LateFusion()
    opt = uniform(model, every)
    for step in range(steps):
        batch = audio_visual_batch()
        expected = plain_grads(model, batch)
        opt.zero_grad()
        features = model.features(batch)
        losses = model.losses_at(features, batch[2])
        opt.backward(losses, features=features if at_features else None)
        if step % every == 0:
            torch.testing.assert_close(grads(model), expected)
            assert opt.stats
        else:
            assert_bits(grads(model), expected)
            assert opt.stats == {}
        opt.step()


@pytest.mark.parametrize("by_hand", [False, True])
def test_blocks_and_stats_are_those_of_measuring_every_step(by_hand: bool) -> None:
    """Steps between do not disturb what has been seen of reach."""
    model = LateFusion(dtype=torch.float64)
    twin = deepcopy(model)
    chosen = {"param_groups_by_modality": {"a": model.audio}} if by_hand else {}
    others = {"param_groups_by_modality": {"a": twin.audio}} if by_hand else {}
    opt, every = uniform(model, 3, **chosen), uniform(twin, 1, **others)
    for step in range(7):
        batch = audio_visual_batch(dtype=torch.float64)
        # A loss that comes late, and one of which another is a part.
        names = ["mm", "audio"] if step < 3 else ["mm", "audio", "visual"]
        for trained, by in ((model, opt), (twin, every)):
            losses = trained.losses(batch)
            by.step(losses={name: losses[name] for name in names})
            by.zero_grad()
        if step % 3 == 0:
            assert opt.blocks == every.blocks
            assert list(opt.stats) == list(every.stats)
            for stats, expected in zip(opt.stats.values(), every.stats.values(), strict=True):
                torch.testing.assert_close(stats.gram, expected.gram)
        else:
            assert opt.blocks  # of the last step that was measured
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_the_recorder_has_the_measured_steps() -> None:
    model = LateFusion()
    opt, recorder = uniform(model, 3), ConflictRecorder()
    opt.register_step_post_hook(recorder.record)
    for _ in range(8):
        opt.step(losses=model.losses(audio_visual_batch()))
    steps = [row["step"] for row in recorder.rows() if row["block"] == "mm+audio"]
    assert steps == [0, 3, 6]
    assert recorder.step == 8


def test_micro_batches_are_treated_alike() -> None:
    model = LateFusion(dtype=torch.float64)
    opt = uniform(model, 2)
    measured = []
    for _ in range(4):
        parts = [audio_visual_batch(dtype=torch.float64) for _ in range(3)]
        twin = deepcopy(model)
        twin.zero_grad()
        for part in parts:
            sum(twin.losses(part).values()).backward()  # type: ignore[union-attr]
            opt.backward(model.losses(part))
            measured.append(bool(opt.stats))
        torch.testing.assert_close(grads(model), grads(twin))
        opt.step()
        opt.zero_grad()
    assert measured == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_who_clears_the_gradients_himself() -> None:
    model = LateFusion()
    integrator = GradientIntegrator(model.parameters(), integration="uniform", measure_every=2)
    measured = []
    for _ in range(4):
        model.zero_grad()
        for _ in range(2):
            integrator.backward(model.losses(audio_visual_batch()))
            measured.append(bool(integrator.stats))
    assert measured == [True, True, False, False, True, True, False, False]


def test_a_step_between_takes_one_pass() -> None:
    model = LateFusion()
    opt = uniform(model, 2)
    calls = 0

    def count(_: Tensor) -> None:
        nonlocal calls
        calls += 1

    next(model.audio.parameters()).register_hook(count)
    for expected in (2, 1, 2, 1):  # the joint loss and the audio loss reach it
        calls = 0
        opt.step(losses=model.losses(audio_visual_batch()))
        assert calls == expected


def test_a_hook_on_a_feature_runs_once() -> None:
    model = LateFusion()
    opt = uniform(model, 2)
    for _ in range(4):
        seen: list[Tensor] = []
        batch = audio_visual_batch()
        features = model.features(batch)
        features["audio"].register_hook(seen.append)
        features["audio"].retain_grad()
        opt.step(losses=model.losses_at(features, batch[2]), features=features)
        assert len(seen) == 1
        assert features["audio"].grad is not None
        assert seen[0].equal(features["audio"].grad)


def test_a_failure_is_not_counted() -> None:
    model = LateFusion()
    opt = uniform(model, 2)
    with pytest.raises(TypeError, match="is None"):
        opt.step(losses={"mm": None})  # type: ignore[dict-item]
    opt.step(losses=model.losses(audio_visual_batch()))
    assert opt.stats
    with pytest.raises(TypeError, match="is None"):
        opt.step(losses={"mm": None})  # type: ignore[dict-item]
    opt.step(losses=model.losses(audio_visual_batch()))
    assert not opt.stats


def test_a_copy_measures_as_often() -> None:
    model = LateFusion()
    copy, opt = deepcopy((model, uniform(model, 2)))
    for measured in (True, False):
        opt.step(losses=copy.losses(audio_visual_batch()))
        assert bool(opt.stats) == measured


def test_errors_name_the_losses() -> None:
    model = LateFusion()
    opt = uniform(model, 2)
    opt.step(losses=model.losses(audio_visual_batch()))
    losses = model.losses(audio_visual_batch())
    opt.backward(losses)
    with pytest.raises(RuntimeError, match=r"\['mm', 'audio', 'visual'\].*freed"):
        opt.backward(losses)
    table = nn.Embedding(4, 2, sparse=True)
    opt = uniform(table, 2)
    dense, index = table.weight.sum(), torch.tensor([1])
    opt.step(losses={"mm": dense})
    with pytest.raises(TypeError, match=r"one of the losses \['mm'\] gives a sparse gradient"):
        opt.step(losses={"mm": table(index).sum()})


@pytest.mark.parametrize("every", [0, -1, 2.5, None])
def test_what_is_no_number_of_steps(every: Any) -> None:
    with pytest.raises(ValueError, match="measure_every must be a positive whole number"):
        uniform(LateFusion(), every)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"integration": "pareto"},
        {"integration": torch.diag},
        {"integration": "uniform", "gamma": 2},
    ],
)
def test_only_the_plain_sum_can_go_unmeasured(options: Options) -> None:
    params = LateFusion().parameters()
    with pytest.raises(ValueError, match=r'measure_every=2.*integration="uniform" without gamma'):
        GradientIntegrator(params, measure_every=2, **options)


def test_a_rule_that_is_chosen_later() -> None:
    model = LateFusion()
    opt = uniform(model, 2)
    opt.integration = "mmpareto"
    with pytest.raises(ValueError, match="got integration='mmpareto'"):
        opt.step(losses=model.losses(audio_visual_batch()))


def test_steps_between_read_nothing_back() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    model = LateFusion().to("meta")
    opt = uniform(model, 2)
    batch = tuple(tensor.to("meta") for tensor in audio_visual_batch())
    for _ in range(4):
        opt.step(losses=model.losses(batch))  # type: ignore[arg-type]


def check_processes() -> None:
    rank = torch.distributed.get_rank()
    model = LateFusion(dtype=torch.float64)
    whole = deepcopy(model)
    opt, reference = uniform(model, 2), uniform(whole, 1, average_gradients=False)
    for step in range(4):
        batch = audio_visual_batch(12, torch.float64)
        spec, image, label = (part[6 * rank : 6 * rank + 6] for part in batch)
        reference.step(losses=whole.losses(batch))
        opt.step(losses=model.losses((spec, image, label)))
        assert bool(opt.stats) == (step % 2 == 0)
        if opt.stats:
            for name, stats in opt.stats.items():
                torch.testing.assert_close(stats.gram, reference.stats[name].gram)
        torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))
        opt.zero_grad()
        reference.zero_grad()


def test_several_processes(two: Processes) -> None:
    two(check_processes)


def check_disagreement() -> None:
    model = LateFusion()
    opt = uniform(model, 2 + torch.distributed.get_rank())
    for _ in range(2):
        opt.step(losses=model.losses(audio_visual_batch()))
    with pytest.raises(RuntimeError, match="differ in their measure_every or measure_noise"):
        opt.step(losses=model.losses(audio_visual_batch()))


def test_ranks_that_measure_different_steps(two: Processes) -> None:
    two(check_disagreement)
