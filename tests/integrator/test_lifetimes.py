"""What lives on after a backward and what does not: memory, a rule's state, names."""

import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads


def tensors_alive() -> int:
    """Bytes of the memory that tensors lie in."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values()
    )


def splatting(points: int) -> tuple[nn.Parameter, Callable[[nn.Parameter], Losses]]:
    param = nn.Parameter(torch.randn(points, 3))
    return param, lambda p: {"color": p.square().mean(), "depth": (p - 1).abs().mean()}


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("integrator", [False, True])
def test_replaced_parameters_die(window: bool, integrator: bool) -> None:
    """As where points are added: a larger parameter takes the place and the state of the old."""
    param, losses = splatting(5)
    other = nn.Parameter(torch.zeros(3))
    base = Adam([param, other], lr=0.1)
    owner: Any = GradientIntegrator(base.param_groups) if integrator else MMParetoOptimizer(base)
    old: list[weakref.ref[Tensor]] = []
    for _ in range(4):
        owner.backward({name: loss + other.sum() for name, loss in losses(param).items()})
        if window:
            owner.backward(losses(param))
        base.step()
        owner.zero_grad()
        old.append(weakref.ref(param))
        state = base.state.pop(param)
        param = nn.Parameter(torch.cat([param.detach(), param.detach()[:2]]))
        for groups in (base.param_groups, owner.param_groups):
            groups[0]["params"][0] = param
        base.state[param] = {
            name: torch.cat([value, value[:2]]) if value.ndim else value
            for name, value in state.items()
        }
    owner.backward(losses(param))
    gc.collect()
    assert [each() for each in old] == [None] * 4
    assert list(owner.stats) == ["color+depth"]


def test_blocks_after_a_parameter_has_left() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.named_parameters(), lr=0.1))
    opt.backward(model.losses(audio_visual_batch()))
    assert "audio.0.weight" in str(opt.blocks)
    del opt.param_groups[0]["params"][0], opt.param_groups[0]["param_names"][0]
    assert "audio.0.bias" in str(opt.blocks)
    assert "audio.0.weight" not in str(opt.blocks)
    del opt.param_groups[0]["param_names"]
    opt.param_groups[0]["params"] = [*nn.Linear(5, 8).parameters()]
    assert "of shape (8, 5)" in str(opt.blocks)
    opt.param_groups[0]["params"].clear()
    assert "of shape" not in str(opt.blocks)


def test_names_that_never_repeat_do_not_pile_up() -> None:
    param = nn.Parameter(torch.ones(4))
    opt = MMParetoOptimizer(SGD([param], lr=0.0), integration="uniform")
    blocks = []
    for start in range(0, 1_200, 300):
        for step in range(start, start + 300):
            opt.step(losses={f"{name}{step}": param.sum() for name in "abcd"})
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert blocks[-1] - blocks[1] < 2_400  # one for each name


@pytest.mark.skipif(torch.__version__ < "2.13", reason="its weak references end too early")
@pytest.mark.parametrize("how", ["zero_grad", "one by one"])
def test_rows_end_with_the_gradients(how: str) -> None:
    """Whoever sets ``.grad`` to None, what has accumulated is let go of at once."""
    params = [nn.Parameter(torch.zeros(100_000)) for _ in range(2)]
    base, integrator = SGD(params, lr=0.1), GradientIntegrator(params)
    before = tensors_alive()
    for _ in range(2):
        total = params[0] + params[1]
        integrator.backward({"a": total.sum(), "b": total.square().sum(), "c": total.sin().sum()})
        del total
    assert tensors_alive() > before + 5 * params[0].nbytes
    if how == "zero_grad":
        base.zero_grad()
    else:
        for param in params:
            param.grad = None
    assert tensors_alive() < before + 1_000


class Mean:
    """A rule with a memory: equal lengths, by the mean of all Gram matrices so far."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def reset(self) -> None:
        self.seen.clear()

    def __call__(self, gram: Tensor) -> Tensor:
        self.seen.append(gram)
        if not gram.isfinite().all():
            raise ValueError("not finite")
        return torch.stack(self.seen).mean(0).diagonal().rsqrt()


def batches(number: int) -> list[Any]:
    return [audio_visual_batch(8, torch.float64) for _ in range(number)]


def summed(model: LateFusion, of: list[Any]) -> Losses:
    each = [model.losses(batch) for batch in of]
    return {name: torch.stack([losses[name] for losses in each]).sum() for name in each[0]}


def fails(model: LateFusion, batch: Any, call: Callable[..., None]) -> None:
    """In the last of the blocks, when the rule has seen the first."""
    before, losses = grads(model), model.losses(batch)
    with pytest.raises(ValueError, match="not finite"):
        call({**losses, "visual": losses["visual"] * torch.nan})
    torch.testing.assert_close(grads(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("failing", [(), (0,), (1,), (0, 1, 2)])
def test_a_rule_with_a_memory_sees_whole_windows(failing: tuple[int, ...]) -> None:
    """One large batch or three small ones, with calls that fail among them, are the same to it."""
    large = LateFusion(dtype=torch.float64)
    small = deepcopy(large)
    ours = MMParetoOptimizer(SGD(small.parameters(), lr=0.1), integration=Mean())
    theirs = MMParetoOptimizer(SGD(large.parameters(), lr=0.1), integration=Mean())
    for _ in range(4):
        three = batches(3)
        for number, batch in enumerate(three):
            if number in failing:
                fails(small, batch, ours.backward)
            ours.backward(small.losses(batch))
        theirs.backward(summed(large, three))
        torch.testing.assert_close(grads(small), grads(large))
        for opt in (ours, theirs):
            opt.step()
            opt.zero_grad()


class Constant:
    """A rule that has a memory as far as anybody sees."""

    def __init__(self, value: float) -> None:
        self.value = value

    def reset(self) -> None:
        pass

    def __call__(self, gram: Tensor) -> Tensor:
        return torch.full_like(gram[0], self.value)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_rule_that_is_replaced_within_a_window(windows: int) -> None:
    """The next backward integrates all of the window by the new one, and so do later ones."""
    param, row = nn.Parameter(torch.zeros(3)), torch.randn(3)
    opt = MMParetoOptimizer(SGD([param], lr=0.0), integration=Constant(1.0))

    def backward() -> Tensor | None:
        opt.backward({"a": (param * row).sum(), "b": (param * row).sum()})
        return param.grad

    for _ in range(windows):
        opt.zero_grad()
        torch.testing.assert_close(backward(), 2 * row)
    opt.integration = Constant(5.0)
    torch.testing.assert_close(backward(), 20 * row)
    opt.step()
    opt.zero_grad()
    torch.testing.assert_close(backward(), 10 * row)


ORDERS = [
    ("mm", "audio", "visual"),
    ("visual", "audio", "mm"),
    ("audio", "mm"),
    ("audio",),
    ("visual", "mm"),
]


@pytest.mark.parametrize("window", [False, True])
def test_a_block_keeps_its_name_and_order(window: bool) -> None:
    model, batch = LateFusion(dtype=torch.float64), batches(1)[0]
    twin = deepcopy(model)
    options: dict[str, Any] = {"integration": Mean()}
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.0), **options)
    for names in ORDERS:
        if not window:
            opt.zero_grad()
        losses = model.losses(batch)
        opt.backward({name: losses[name] for name in names})
        assert opt.stats.keys() <= {"mm+audio", "mm+visual"}
        for stats in opt.stats.values():
            assert stats.objectives[0] == "mm"
    if window:
        ordered = MMParetoOptimizer(SGD(twin.parameters(), lr=0.0), **options)
        counts = {name: sum(name in names for names in ORDERS) for name in ORDERS[0]}
        ordered.backward({n: loss * counts[n] for n, loss in twin.losses(batch).items()})
        torch.testing.assert_close(grads(model), grads(twin))


FEATURES: list[list[str]] = [["audio", "visual"], ["audio"], [], ["visual"]]


@pytest.mark.parametrize("start", range(4))
def test_features_that_change_within_a_window(start: int) -> None:
    """Each call adds what it gives alone, and what is exact is integrated over the window."""
    model, total = LateFusion(dtype=torch.float64), None
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1), integration="uniform")
    twin = deepcopy(model)
    for names in (*FEATURES[start:], *FEATURES[:start]):
        batch = batches(1)[0]
        features = model.features(batch)
        chosen = {name: features[name] for name in names}
        opt.backward(model.losses_at(features, batch[2]), features=chosen or None)
        total = torch.stack(list(twin.losses(batch).values())).sum()
        total.backward()
        torch.testing.assert_close(grads(model), grads(twin))


def test_features_between_exact_calls_of_a_window() -> None:
    """An encoder gets the sum of what each call gives by itself."""
    model = LateFusion(dtype=torch.float64)
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    twin, expected = deepcopy(model), [torch.zeros_like(p) for p in model.audio.parameters()]
    for names in (["audio"], [], ["audio", "visual"]):
        batch = batches(1)[0]
        for owner in (model, twin):
            features = owner.features(batch)
            chosen = {name: features[name] for name in names} or None
            single = MMParetoOptimizer(SGD(twin.parameters(), lr=0.1))
            (opt if owner is model else single).backward(
                owner.losses_at(features, batch[2]), features=chosen
            )
        for total, param in zip(expected, twin.audio.parameters(), strict=True):
            assert param.grad is not None
            total += param.grad
        twin.zero_grad()
    torch.testing.assert_close([p.grad for p in model.audio.parameters()], expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("integrator", [False, True])
def test_a_copy_in_the_middle_of_a_window_says_so(copied: Any, integrator: bool) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    base = SGD(model.parameters(), lr=0.1)
    opt: Any = GradientIntegrator(base.param_groups) if integrator else MMParetoOptimizer(base)
    copied(opt)
    opt.backward(model.losses(batch))
    with pytest.warns(UserWarning, match="starts anew"):
        copied(opt)
    for end in (opt.zero_grad, base.zero_grad, model.zero_grad):
        end()
        copied(opt)
        opt.backward(model.losses(batch))
        if not integrator:
            opt.step()
            copied(opt)
