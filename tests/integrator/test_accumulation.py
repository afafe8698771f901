"""Several backward calls before zero_grad integrate the accumulated per-loss gradients."""

import gc
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, grads, vectors_as_losses
from tests.models import audio_visual_batch as batch_of

Batch = tuple[Tensor, Tensor, Tensor]


def late_fusion() -> LateFusion:
    """In float64: parts of a batch add up to the whole but for rounding."""
    return LateFusion(dtype=torch.float64)


def audio_visual_batch() -> Batch:
    return batch_of(dtype=torch.float64)


def wrapped(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def split(batch: Batch, parts: int) -> list[Batch]:
    return list(zip(*(tensor.chunk(parts) for tensor in batch), strict=True))


def shares(losses: Losses, parts: int) -> Losses:
    return {name: loss / parts for name, loss in losses.items()}


def assert_same_grads(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(grads(found), grads(expected))


@pytest.mark.parametrize("options", [{}, {"rescale": "tensor"}, {"integration": "pareto"}])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_one_large_batch(
    options: dict[str, Any], explicit: bool, parts: int
) -> None:
    large, batch = late_fusion(), audio_visual_batch()
    small = deepcopy(large)
    models = {"large": large, "small": small}
    opts = {
        name: wrapped(model, param_groups_by_modality={"a": model.audio}, **options)
        if explicit
        else wrapped(model, **options)
        for name, model in models.items()
    }
    for _ in range(3):
        for opt in opts.values():
            opt.zero_grad()
        opts["large"].backward(large.losses(batch))
        for part in split(batch, parts):
            opts["small"].backward(shares(small.losses(part), parts))
        assert_same_grads(small, large)
        for opt in opts.values():
            opt.step()


def test_step_with_losses_ends_an_accumulation() -> None:
    large, batch = late_fusion(), audio_visual_batch()
    small = deepcopy(large)
    wrapped(large).step(losses=large.losses(batch))
    opt = wrapped(small)
    first, second = split(batch, 2)
    opt.backward(shares(small.losses(first), 2))
    opt.step(losses=shares(small.losses(second), 2))
    torch.testing.assert_close(list(small.parameters()), list(large.parameters()))


def test_micro_batches_that_miss_a_modality() -> None:
    """The audio loss comes with one micro-batch only; the other still counts as joint."""
    large, batch = late_fusion(), audio_visual_batch()
    first, second = split(batch, 2)
    small = deepcopy(large)
    opt = wrapped(small)
    opt.backward({"mm": small.losses(first)["mm"]})
    opt.backward(small.losses(second))
    opt.backward({"mm": small.losses(first)["mm"]})

    other = large.losses(first)["mm"]
    losses = large.losses(second)
    wrapped(large).backward({**losses, "mm": losses["mm"] + 2 * other})
    assert_same_grads(small, large)


@pytest.mark.parametrize("how", ["optimizer", "model", "base", "zeros", "by hand"])
def test_every_way_to_clear_gradients_starts_anew(how: str) -> None:
    model, batch = late_fusion(), audio_visual_batch()
    fresh = deepcopy(model)
    wrapped(fresh).backward(fresh.losses(batch))
    opt = wrapped(model)
    opt.backward(model.losses(audio_visual_batch()))
    if how == "optimizer":
        opt.zero_grad()
    elif how == "model":
        model.zero_grad()
    elif how == "base":
        opt.optimizer.zero_grad()
    elif how == "zeros":
        model.zero_grad(set_to_none=False)
    else:
        for param in model.parameters():
            param.grad = None
    opt.backward(model.losses(batch))
    assert_same_grads(model, fresh)


def test_gradients_from_elsewhere_are_added_to_and_not_integrated() -> None:
    model, batch = late_fusion(), audio_visual_batch()
    fresh = deepcopy(model)
    opt = wrapped(fresh)
    for part in split(batch, 2):
        opt.backward(fresh.losses(part))
    expected = grads(fresh)

    def penalty() -> Tensor:
        return torch.stack([param.square().sum() for param in model.parameters()]).sum()

    penalty().backward()
    extra = grads(model)
    opt = wrapped(model)
    for part in split(batch, 2):
        opt.backward(model.losses(part))
    for found, ours, theirs in zip(grads(model), expected, extra, strict=True):
        assert found is not None
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(found, ours + theirs)


def test_gradients_from_elsewhere_survive_a_change_of_blocks() -> None:
    model, batch = late_fusion(), audio_visual_batch()
    fresh = deepcopy(model)
    reference = wrapped(fresh)
    opt = wrapped(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for step in (opt, reference):
        owner = model if step is opt else fresh
        step.backward({"mm": owner.losses(batch)["mm"]})
        step.backward(owner.losses(batch))
    for found, expected in zip(grads(model), grads(fresh), strict=True):
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found, expected + 1)


def test_clipped_gradients_are_added_to_as_in_plain_pytorch() -> None:
    model, batch = late_fusion(), audio_visual_batch()
    fresh = deepcopy(model)
    wrapped(fresh).backward(fresh.losses(batch))
    opt = wrapped(model)
    opt.backward(model.losses(batch))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = grads(model)
    opt.backward(model.losses(batch))
    for found, first, second in zip(grads(model), clipped, grads(fresh), strict=True):
        assert found is not None
        assert first is not None
        assert second is not None
        torch.testing.assert_close(found, first + second)


def test_a_forgotten_zero_grad_adds_up_as_in_plain_pytorch() -> None:
    model, batch = late_fusion(), audio_visual_batch()
    opt = wrapped(model)
    opt.step(losses=model.losses(batch))
    first = grads(model)
    fresh = deepcopy(model)
    fresh.zero_grad()
    wrapped(fresh).backward(fresh.losses(batch))
    opt.backward(model.losses(batch))
    for found, old, new in zip(grads(model), first, grads(fresh), strict=True):
        assert found is not None
        assert old is not None
        assert new is not None
        torch.testing.assert_close(found, old + new)


def test_gradients_that_somebody_kept_do_not_change_later() -> None:
    model = late_fusion()
    opt = wrapped(model)
    opt.step(losses=model.losses(audio_visual_batch()))
    kept = [param.grad for param in model.parameters() if param.grad is not None]
    copied = grads(model)
    for _ in range(2):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
    torch.testing.assert_close(kept, copied, rtol=0, atol=0)


@pytest.mark.parametrize("end", ["step with losses", "step", "zero_grad"])
def test_gradients_of_single_losses_do_not_outlive_the_step(end: str) -> None:
    model = late_fusion()
    opt = wrapped(model)
    large = nn.Parameter(torch.zeros(1000, 1000))
    opt.add_param_group({"params": [large]})

    def held() -> float:
        """In sizes of the large parameter: all tensors that are alive, but for its ``.grad``."""
        seen: dict[int, int] = {}
        for thing in gc.get_objects():
            if type(thing) is Tensor and thing.device.type == "cpu" and thing is not large.grad:
                storage = thing.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values()) / large.nbytes

    gc.collect()
    before = held()
    losses = model.losses(audio_visual_batch())
    losses = {name: loss + large.sum() for name, loss in losses.items()}
    if end == "step with losses":
        opt.step(losses=losses)
    else:
        opt.backward(losses)
        assert held() > before + 2.5  # more micro-batches may come
        opt.step() if end == "step" else opt.zero_grad()
    del losses
    assert held() < before + 0.1


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**31))
def test_any_number_of_calls_integrates_the_sums(calls: int, objectives: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(calls, objectives, 5, generator=generator, dtype=torch.float64)
    one, many = (nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    opt = MMParetoOptimizer(torch.optim.SGD([many], lr=0.1))
    for gradients in rows:
        opt.backward(vectors_as_losses(many, gradients))
    MMParetoOptimizer(torch.optim.SGD([one], lr=0.1)).backward(vectors_as_losses(one, rows.sum(0)))
    torch.testing.assert_close(many.grad, one.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("numbers", [3, 4, 8])
def test_a_change_of_signs_alone_ends_what_has_accumulated(
    dtype: torch.dtype, numbers: int
) -> None:
    param, x = nn.Parameter(torch.randn(numbers, dtype=dtype)), torch.randn(numbers, dtype=dtype)
    integrator = GradientIntegrator([param], integration="uniform")

    def losses() -> Losses:
        return {"a": (param * x).abs().sum(), "b": (param * param).abs().sum()}

    integrator.backward(losses())
    assert param.grad is not None
    param.grad.data.neg_()
    integrator.backward(losses())
    torch.testing.assert_close(param.grad, torch.zeros_like(param.grad), rtol=0, atol=1e-6)


def test_another_memory_format_between_micro_batches() -> None:
    conv, plain = (nn.Conv2d(3, 5, 3) for _ in range(2))
    plain.load_state_dict(conv.state_dict())
    integrator = GradientIntegrator(conv.parameters(), integration="uniform")
    for micro in range(2):
        x = torch.randn(2, 3, 6, 6)
        integrator.backward({"a": conv(x).square().mean(), "b": conv(x).sin().mean()})
        (plain(x).square().mean() + plain(x).sin().mean()).backward()
        if micro == 0:
            conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(grads(conv), grads(plain))
