"""Training under faults: what was is as it was, and the next step is right."""

import gc
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mmpareto_optim
from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch

FAULTS = [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), ValueError("a hook's")]


class Fault(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: BaseException) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.fault


def failing_at(x: Tensor, fault: BaseException) -> Tensor:
    found: Tensor = Fault.apply(x, fault)  # type: ignore[no-untyped-call]
    return found


class Net(LateFusion):
    """With statistics that move in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.audio.append(nn.BatchNorm1d(6))


class Training:
    """A model some steps into its training, which repeats itself when copied."""

    def __init__(self) -> None:
        self.model = Net()
        self.opt = MMParetoOptimizer(torch.optim.AdamW(self.model.parameters(), 0.01))
        self.batches = [audio_visual_batch() for _ in range(4)]
        for batch in self.batches[:2]:
            self.opt.zero_grad()
            self.opt.step(losses=self.model.losses(batch))

    def snapshot(self) -> list[Tensor]:
        state = [v for s in self.opt.state.values() for v in s.values() if isinstance(v, Tensor)]
        kept = [*self.model.state_dict().values(), *state]
        kept += [p.grad for p in self.model.parameters() if p.grad is not None]
        return [tensor.clone() for tensor in kept]

    def equals(self, other: "Training") -> bool:
        pairs = zip(self.snapshot(), other.snapshot(), strict=True)
        return all(a.equal(b) for a, b in pairs)

    def features_and_losses(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch = self.batches[number]
        features = self.model.features(batch)
        return features, self.model.losses_at(features, batch[2])


def twins() -> tuple[Training, Training]:
    training = Training()
    # One copy for model and optimizer: the optimizer must hold the copied parameters.
    return training, deepcopy(training)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("failing", ["mm", "audio", "visual"])
@pytest.mark.parametrize("at_features", [False, True])
@pytest.mark.parametrize("call", ["backward", "step"])
@pytest.mark.parametrize("accumulating", [False, True])
def test_a_backward_that_fails(
    fault: BaseException, failing: str, at_features: bool, call: str, accumulating: bool
) -> None:
    one, other = twins()
    for training in (one, other):
        training.opt.zero_grad()
        if accumulating:
            features, losses = training.features_and_losses(2)
            training.opt.backward(losses, features=features if at_features else None)
        features, losses = training.features_and_losses(3)
    features, losses = one.features_and_losses(3)
    other.features_and_losses(3)  # moves the statistics of the batch norm as often
    losses[failing] = failing_at(losses[failing], fault)
    options = {"features": features if at_features else None}
    with pytest.raises(type(fault)):
        getattr(one.opt, call)(losses=losses, **options)
    assert one.equals(other)

    for training in (one, other):  # an accumulation goes on where it was
        features, losses = training.features_and_losses(3)
        training.opt.step(losses=losses, features=features if at_features else None)
    assert one.equals(other)


@pytest.mark.parametrize("encoder", ["audio", "visual"])
def test_a_fault_behind_the_features(encoder: str) -> None:
    """In the pass through the encoders, when the losses are differentiated already."""
    one, other = twins()
    for training in (one, other):
        training.opt.zero_grad()
    spec, image, label = one.batches[3]
    weight = getattr(one.model, encoder)[0].weight
    inputs = {"audio": spec, "visual": image}
    features = one.model.features((spec, image, label))
    other.features_and_losses(3)
    broken = failing_at(inputs[encoder] @ weight.T, FAULTS[0])
    features[encoder] = features[encoder] + broken.sum()
    with pytest.raises(torch.OutOfMemoryError):
        one.opt.step(losses=one.model.losses_at(features, label), features=features)
    assert one.equals(other)


def test_an_interrupt_between_backward_and_step() -> None:
    one, other = twins()
    other.features_and_losses(2)
    one.opt.zero_grad()
    one.opt.backward(one.features_and_losses(2)[1])
    for training in (one, other):  # the loop is started again
        training.opt.zero_grad()
        training.opt.step(losses=training.features_and_losses(3)[1])
    assert one.equals(other)


class Interrupted:
    """Raises KeyboardInterrupt at the n-th line that the library runs."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        # What a weak reference calls, Python lets nothing out of.
        if not frame.f_code.co_filename.startswith(LIBRARY) or "_forget" in frame.f_code.co_name:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> "Interrupted":
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)
        # A trace may raise between a with block and its end, where Python delivers no signal.
        torch.set_grad_enabled(True)


STRIDE = 19  # between the lines that are tried; no divisor of how often something repeats
LIBRARY = str(Path(mmpareto_optim.__file__).parent)


@pytest.mark.parametrize("accumulating", [False, True])
def test_an_interrupt_at_any_line_of_a_step(accumulating: bool) -> None:
    """The parameters step as a whole or not at all, and the step after that is right."""
    start = Training()
    finished = deepcopy(start)

    def begin(training: Training) -> dict[str, Tensor]:
        training.opt.zero_grad()
        if accumulating:
            training.opt.backward(training.features_and_losses(2)[1])
        return training.features_and_losses(3)[1]

    losses = begin(finished)
    with Interrupted(at=0) as counter:
        finished.opt.step(losses=losses)
    lines = -counter.left
    assert lines > 300
    stepped = 0
    for at in range(1, lines + 1, STRIDE):
        training = deepcopy(start)
        losses = begin(training)
        grads = [p.grad for p in training.model.parameters()]
        with pytest.raises(KeyboardInterrupt), Interrupted(at):
            training.opt.step(losses=losses)
        same = [a is p.grad for a, p in zip(grads, training.model.parameters(), strict=True)]
        stepped += training.equals(finished)
        if not training.equals(finished):
            found = [*training.model.parameters(), *moments(training)]
            original = [*start.model.parameters(), *moments(start)]
            assert all(a.equal(b) for a, b in zip(found, original, strict=True))
            written = [p.grad for p in finished.model.parameters()]
            for unchanged, p, whole in zip(same, training.model.parameters(), written, strict=True):
                assert unchanged or (p.grad is not None and whole is not None)
                assert unchanged or torch.equal(p.grad, whole)  # type: ignore[arg-type]
            expected = deepcopy(start)
            begin(expected)
        else:
            expected = deepcopy(finished)
        for resumed in (training, expected):
            resumed.opt.zero_grad()
            resumed.opt.step(losses=resumed.features_and_losses(0)[1])
        assert training.equals(expected)
    assert stepped < lines / STRIDE


def moments(training: Training) -> list[Tensor]:
    return [v for s in training.opt.state.values() for v in s.values() if isinstance(v, Tensor)]


class ShortOfMemory(TorchFunctionMode):
    """Memory runs out when the third of some tensors is used."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.watched, self.used = {id(tensor) for tensor in tensors}, set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "__set__"):  # attributes
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            using = self.watched & {id(leaf) for leaf in leaves}
            self.used |= using
            if using and len(self.used) >= 3:
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **kwargs or {})


def test_memory_that_runs_out_when_gradients_are_added() -> None:
    """A ``.grad`` from elsewhere is added to: either each one is or none."""
    one, other = twins()
    for training in (one, other):
        for param in training.model.parameters():
            param.grad = torch.ones_like(param)
    losses = one.features_and_losses(3)[1]
    other.features_and_losses(3)
    foreign = [param.grad for param in one.model.parameters() if param.grad is not None]
    short = ShortOfMemory(foreign)
    with pytest.raises(torch.OutOfMemoryError), short:
        one.opt.backward(losses)
    assert len(short.used) >= 3
    assert all(p.grad is g for p, g in zip(one.model.parameters(), foreign, strict=True))
    assert one.equals(other)
    for training in (one, other):
        training.opt.step(losses=training.features_and_losses(3)[1])
    assert one.equals(other)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_hook_that_fails_before_the_base_steps(fault: BaseException) -> None:
    one, other = twins()
    other.features_and_losses(2)

    def fail(*_: Any) -> None:
        raise fault

    handle = one.opt.register_step_pre_hook(fail)
    one.opt.zero_grad()
    with pytest.raises(type(fault)):
        one.opt.step(losses=one.features_and_losses(2)[1])
    handle.remove()
    for training in (one, other):
        training.opt.zero_grad()
        training.opt.step(losses=training.features_and_losses(3)[1])
    assert one.equals(other)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_closure_that_fails(fault: BaseException) -> None:
    one, other = twins()

    def failing() -> dict[str, Tensor]:
        one.opt.zero_grad()
        losses = one.features_and_losses(2)[1]
        losses["audio"] = failing_at(losses["audio"], fault)
        return losses

    with pytest.raises(type(fault)):
        one.opt.step(failing)
    other.features_and_losses(2)
    other.opt.zero_grad()
    assert one.equals(other)

    def whole(training: Training) -> Callable[[], dict[str, Tensor]]:
        def closure() -> dict[str, Tensor]:
            training.opt.zero_grad()
            return training.features_and_losses(3)[1]

        return closure

    for training in (one, other):
        training.opt.step(whole(training))
    assert one.equals(other)


def test_lbfgs_after_a_closure_that_failed_half_way() -> None:
    """As the base does by itself (in its very first step PyTorch's LBFGS cannot go on)."""
    model, batch = LateFusion(), audio_visual_batch()
    plain_model = deepcopy(model)
    settings: dict[str, Any] = {"max_iter": 4, "line_search_fn": "strong_wolfe"}
    opt = MMParetoOptimizer(
        torch.optim.LBFGS(model.parameters(), **settings), integration="uniform"
    )
    plain = torch.optim.LBFGS(plain_model.parameters(), **settings)
    calls = {"ours": 0, "plain": 0}

    def evaluation(of: str) -> None:
        calls[of] += 1
        if calls[of] == 8:
            raise RuntimeError("the eighth evaluation")

    def losses() -> dict[str, Tensor]:
        opt.zero_grad()
        evaluation("ours")
        return model.losses(batch)

    def loss() -> Tensor:
        plain.zero_grad()
        evaluation("plain")
        total = torch.stack(list(plain_model.losses(batch).values())).sum()
        total.backward()
        return total

    opt.step(losses)
    plain.step(loss)
    assert calls["ours"] < 8
    with pytest.raises(RuntimeError, match="eighth"):
        opt.step(losses)
    with pytest.raises(RuntimeError, match="eighth"):
        plain.step(loss)
    opt.step(losses)
    plain.step(loss)
    assert calls["ours"] == calls["plain"]
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_that_is_nan_may_be_left_out() -> None:
    one, other = twins()
    losses = one.features_and_losses(2)[1]
    other.features_and_losses(2)
    losses["audio"] = losses["audio"] * torch.nan
    one.opt.zero_grad()
    one.opt.backward(losses)
    reached = [p.grad for p in (*one.model.audio.parameters(), *one.model.audio_head.parameters())]
    assert not any(g is None or g.isfinite().any() for g in reached)  # it does not hide
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.model.visual.parameters())
    for training in (one, other):
        training.opt.zero_grad()
        training.opt.step(losses=training.features_and_losses(3)[1])
    assert one.equals(other)
    assert all(s.cosine.isfinite() for s in one.opt.stats.values())


def steps_of(training: Training, number: int, at_features: bool = False) -> None:
    for step in range(number):
        features, losses = training.features_and_losses(step % 4)
        training.opt.zero_grad()
        training.opt.step(losses=losses, features=features if at_features else None)


@pytest.mark.parametrize("at_features", [False, True])
def test_steps_leave_no_reference_cycles(at_features: bool) -> None:
    training = Training()
    steps_of(training, 20, at_features)
    while gc.collect():  # what other tests have left, and what that leaves
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        steps_of(training, 20, at_features)
        gc.collect()
        # Other threads leave cycles of their own.
        kinds = {type(thing) for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not kinds & {Tensor, nn.Parameter}
    assert not {kind for kind in kinds if kind.__module__.startswith("mmpareto_optim")}


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@pytest.mark.parametrize(
    "steps", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["300", "10000"]
)
def test_memory_does_not_grow(steps: int) -> None:
    training = Training()
    steps_of(training, 200)
    gc.collect()
    tensors, blocks = live_tensors(), sys.getallocatedblocks()
    steps_of(training, steps)
    gc.collect()
    assert live_tensors() <= tensors
    # The allocator's own blocks settle within some thousand steps, in plain PyTorch too. A number
    # that were kept of each step would be a block each.
    assert sys.getallocatedblocks() - blocks < steps / 2


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_two_threads_train_two_models() -> None:
    """As each would alone, bit for bit, from the first step on."""
    first, second = twins()
    first_alone, second_alone = deepcopy(first), deepcopy(second)
    for alone in (first_alone, second_alone):
        steps_of(alone, 40)
    start = threading.Barrier(2)
    failed: list[BaseException] = []

    def train(training: Training) -> None:
        try:
            start.wait()
            steps_of(training, 40)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=[t]) for t in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert first.equals(first_alone)
    assert second.equals(second_alone)
