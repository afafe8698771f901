"""Backwards that end midway, by a fault or by a warning that is an error: nothing half written."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from mmpareto_optim import MMParetoOptimizer
from tests.integrator.test_check import redrawn_dropout
from tests.integrator.test_faults import Interrupted, Training, twins
from tests.models import LateFusion, Losses, audio_visual_batch, grads


class OutOfMemory(TorchDispatchMode):
    """Memory runs out in one operation, wherever it is: in a pass, in a sum, in a copy."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [OutOfMemory, Interrupted])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("at_features", [False, True])
def test_a_fault_at_any_place_of_a_micro_batch(kind: Any, first: bool, at_features: bool) -> None:
    """``.grad`` and the window are as before or as after, whichever comes next."""
    start = twins()[0]
    start.opt.zero_grad()

    def backward(training: Training, number: int) -> None:
        features, losses = training.features_and_losses(number)
        training.opt.backward(losses, features=features if at_features else None)

    def begun() -> Training:
        training = deepcopy(start)
        if not first:
            backward(training, 0)
        return training

    counter, whole = kind(0), begun()
    features, losses = whole.features_and_losses(1)
    with counter:
        whole.opt.backward(losses, features=features if at_features else None)
    places = -counter.left
    ends = []
    for training in (begun(), whole):
        values = grads(training.model)
        backward(training, 2)
        ends.append((values, grads(training.model)))
    for at in range(1, places + 1, max(1, places // 30)):
        training = begun()
        features, losses = training.features_and_losses(1)
        # The check of the first step does without its pass where memory runs out in it.
        with suppress(torch.OutOfMemoryError, KeyboardInterrupt), kind(at):
            training.opt.backward(losses, features=features if at_features else None)
        values = grads(training.model)
        backward(training, 2)
        assert any(same((values, grads(training.model)), end) for end in ends), at


def same(one: Any, other: Any) -> bool:
    pairs = zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True)
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.equal(b))
        for a, b in pairs
    )


def test_inference_mode_is_refused_first() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    opt.backward(model.losses(batch))
    before, losses = grads(model), model.losses(batch)
    for call in (opt.backward, opt.step):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            call(losses=losses)
        torch.testing.assert_close(grads(model), before, rtol=0, atol=0)
    opt.backward(losses)  # whose graph is there still, and the window goes on


class Told:
    """A model of which something is warned in its first step with several losses."""

    def __init__(self, change: Callable[[Losses], Losses], **options: Any) -> None:
        self.model, self.batch, self.change = LateFusion(), audio_visual_batch(), change
        held = list(self.model.parameters())[options.pop("unheld", 0) :]
        self.opt = MMParetoOptimizer(SGD(held, lr=0.1, momentum=0.9), **options)

    def losses(self) -> Losses:
        return self.change(self.model.losses(self.batch))


def redrawn() -> Told:
    told = Told(dict)
    told.model.audio.append(nn.Module())
    told.model.audio[-1].forward = redrawn_dropout
    return told


def hooked() -> Told:
    told = Told(dict)
    told.model.mm_head.bias.register_post_accumulate_grad_hook(lambda _: None)
    return told


def scaled(losses: Losses) -> Losses:
    return {**losses, "mm": GradScaler("cpu").scale(losses["mm"])}


TOLD: dict[str, tuple[Callable[[], Told], str]] = {
    "a sum": (
        lambda: Told(lambda p: {**p, "sum": torch.stack(list(p.values())).sum()}),
        "sum of the others",
    ),
    "scaled": (lambda: Told(scaled, integration="uniform"), "GradScaler"),
    "small": (lambda: Told(lambda p: {**p, "audio": 1e-6 * p["audio"]}), "so small"),
    "unheld": (lambda: Told(dict, unheld=2), "no optimizer here holds"),
    "redrawn": (redrawn, "do not add up"),
    "hooked": (hooked, "post-accumulate"),
}


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("call", ["backward", "step"])
def test_a_warning_that_is_an_error_comes_before_anything_is_written(kind: str, call: str) -> None:
    make, message = TOLD[kind]
    told = make()
    if kind in ("small", "redrawn"):  # in the middle of a window
        told.opt.backward({"mm": told.model.losses(told.batch)["mm"]})
    before, params = grads(told.model), deepcopy(list(told.model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message):
            getattr(told.opt, call)(losses=told.losses())
    torch.testing.assert_close(grads(told.model), before, rtol=0, atol=0)
    torch.testing.assert_close(list(told.model.parameters()), params, rtol=0, atol=0)
    assert not told.opt.state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told.opt.step(losses=told.losses())


def test_the_tenth_step_of_losses_that_never_meet() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    for step in range(10):
        z = {name: feature.detach() for name, feature in model.features(batch).items()}
        before = deepcopy(list(model.parameters()))
        if step < 9:
            opt.step(losses=model.losses_at(z, batch[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="never meet"):
            opt.step(losses=model.losses_at(z, batch[2]))
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
