"""Memory that is not ours is read and never written; what is written belongs to nobody else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.fuzz.functions import Form
from tests.models import assert_gram

SHAPES = [(3,), (2, 3), (300, 200), (100_000,)]

Keep = Callable[[Tensor], Any]
KEPT: dict[str, tuple[Keep, Callable[[Any], Tensor]]] = {
    "itself": (lambda gradient: gradient, lambda kept: kept),
    "a view": (lambda gradient: gradient[:1], lambda kept: kept),
    "an alias": (lambda gradient: gradient.detach(), lambda kept: kept),
    "a NumPy array": (lambda gradient: gradient.numpy(), torch.from_numpy),
    "a list": (lambda gradient: [gradient], lambda kept: kept[0]),
}


def setting(shape: tuple[int, ...]) -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """A parameter of two losses in conflict, and one of the first alone."""
    shared, own = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    target = torch.randn(shape)
    losses = {
        "a": (shared - target).pow(2).sum() + own.pow(3).sum(),
        "b": (shared + 2 * target).pow(2).sum(),
    }
    return [shared, own], losses


def expected_gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Of the same losses where no hook keeps anything."""
    params, losses = setting(shape)
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).backward(losses)
    return [param.grad for param in params if param.grad is not None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", KEPT)
def test_what_a_hook_keeps_of_a_gradient_stays_as_it_is(how: str, shape: tuple[int, ...]) -> None:
    keep, tensor_of = KEPT[how]
    torch.manual_seed(0)
    expected = expected_gradients(shape)
    torch.manual_seed(0)
    params, losses = setting(shape)
    kept, copies = [], []

    def hook(gradient: Tensor) -> None:
        kept.append(keep(gradient))
        copies.append(tensor_of(kept[-1]).clone())

    for param in params:
        param.register_hook(hook)
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).step(losses=losses)
    assert len(kept) >= 3
    for param, gradient in zip(params, expected, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, gradient)
        param.grad.zero_()
    for before, now in zip(copies, map(tensor_of, kept), strict=True):
        assert before.any()
        torch.testing.assert_close(before, now, rtol=0, atol=0)


class Dot(torch.autograd.Function):
    """A product whose gradient is the very tensor that it was multiplied by."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, data: Tensor) -> Tensor:
        ctx.save_for_backward(data)
        return (param * data).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


@pytest.mark.parametrize("shape", SHAPES)
def test_data_that_a_function_returns_as_its_gradient_stays_as_it_is(
    shape: tuple[int, ...],
) -> None:
    shared, own = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    data = [torch.randn(shape) for _ in range(3)]
    copies = [piece.clone() for piece in data]
    losses = {
        "a": Dot.apply(shared, data[0]) + Dot.apply(own, data[2]),  # type: ignore[no-untyped-call]
        "b": Dot.apply(shared, data[1]),  # type: ignore[no-untyped-call]
    }
    MMParetoOptimizer(torch.optim.SGD([shared, own], lr=0.1)).step(losses=losses)
    for param in (shared, own):
        assert param.grad is not None
        param.grad.zero_()
    torch.testing.assert_close(data, copies, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_that_autograd_gives_one_gradient_get_two(shape: tuple[int, ...]) -> None:
    one, other = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    loss = (one + other).pow(2).sum()
    MMParetoOptimizer(torch.optim.SGD([one, other], lr=0.1)).step(losses={"a": loss})
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    one.grad.zero_()
    assert other.grad.all()


def test_a_part_of_a_larger_gradient_does_not_keep_the_rest_alive() -> None:
    param = nn.Parameter(torch.randn(5))
    frozen = torch.randn(1000, requires_grad=True)
    loss = torch.cat([param, frozen]).pow(2).sum()
    MMParetoOptimizer(torch.optim.SGD([param], lr=0.1)).step(losses={"a": loss})
    assert param.grad is not None
    assert param.grad.untyped_storage().nbytes() == param.nbytes


class Given(torch.autograd.Function):
    """A sum whose gradient is whatever it is given."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return param.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


FOREIGN: dict[str, Callable[[np.ndarray], Tensor]] = {
    "NumPy": torch.from_numpy,
    "DLPack": torch.utils.dlpack.from_dlpack,
    "a buffer": lambda array: torch.frombuffer(array.data, dtype=torch.float32),
    "shared": lambda array: torch.from_numpy(array).clone().share_memory_(),
}


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.parametrize("size", [3, 100_000])
def test_memory_that_is_not_torchs_is_never_written(how: str, size: int) -> None:
    gradient = FOREIGN[how](np.ones(size, np.float32))
    shared, own = (nn.Parameter(torch.zeros(size)) for _ in range(2))
    given = [Given.apply(param, gradient) for param in (shared, own)]  # type: ignore[no-untyped-call]
    del gradient
    kept: list[Tensor] = []
    own.register_hook(kept.append)
    losses = {"a": given[0] + given[1], "b": (shared * 0.5).sum()}
    MMParetoOptimizer(torch.optim.SGD([shared, own], lr=0.1)).step(losses=losses)
    for param in (shared, own):
        assert param.grad is not None
        param.grad.zero_()
    assert all((each == 1).all() for each in kept)


def test_a_storage_that_a_hook_keeps_stays_as_it_is() -> None:
    params, losses = setting((100_000,))
    kept: list[Any] = []
    for param in params:
        param.register_hook(lambda gradient: kept.append(gradient.untyped_storage()))
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).step(losses=losses)
    places = {storage.data_ptr() for storage in kept}
    assert len(kept) >= 3
    for param in params:
        assert param.grad is not None
        assert param.grad.data_ptr() not in places


class Static(torch.autograd.Function):
    """Gives the same memory in each backward, as captured graphs do."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, factor: float, buffer: Tensor) -> Tensor:
        ctx.factor, ctx.buffer = factor, buffer
        return factor * param.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.buffer.fill_(ctx.factor).mul_(gradient)
        return ctx.buffer, None, None


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_backward_that_returns_the_same_memory_each_time(
    shape: tuple[int, ...], steps: int
) -> None:
    """Each loss's gradient is read before the next pass writes over it.

    A pass of their sum would not: it adds the last of them up three times.
    """
    param = nn.Parameter(torch.zeros(shape))
    base = torch.optim.SGD([param], lr=0.0)
    opt = MMParetoOptimizer(base, integration="uniform", check=False)
    buffer = torch.empty(shape)
    for _ in range(steps):
        opt.zero_grad()
        opt.step(
            losses={
                name: Static.apply(param, factor, buffer)  # type: ignore[no-untyped-call]
                for name, factor in (("a", 1.0), ("b", -3.0), ("c", 5.0))
            }
        )
        assert param.grad is not None
        torch.testing.assert_close(param.grad, torch.full(shape, 3.0))
        (stats,) = opt.stats.values()
        assert_gram(stats.gram, torch.tensor([[1.0], [-3.0], [5.0]]).expand(3, param.numel()))
    buffer.zero_()
    torch.testing.assert_close(param.grad, torch.full(shape, 3.0))


LONG = 2**15


class Replayed(torch.autograd.Function):
    """As a replayed graph: one buffer for each backward, whose version counter tells nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights)
        ctx.buffer = buffer
        return (x * weights).sum(), (x * weights.square()).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        ctx.buffer.data.copy_(grads[0] * weights + grads[1] * weights.square())
        return ctx.buffer.detach(), None, None


def two_long() -> tuple[MMParetoOptimizer, nn.Parameter, nn.Parameter]:
    one, other = (nn.Parameter(torch.randn(LONG)) for _ in range(2))
    base = torch.optim.SGD([one, other], lr=0.0)
    return MMParetoOptimizer(base, integration="uniform"), one, other


@pytest.mark.parametrize("kind", ["shared", "expanded", "constant"])
def test_a_step_after_a_backward_adds_into_memory_of_its_own(kind: str) -> None:
    """One gradient may be that of two parameters, one number, or somebody's constant."""
    opt, one, other = two_long()
    constant = torch.randn(LONG)
    kept = constant.clone()

    def losses(x: Tensor) -> dict[str, Tensor]:
        both = one + other
        if kind == "expanded":
            return {"a": one.sum() + other.sum(), "b": (both * x).sum()}
        if kind == "constant":
            first = Form.apply(one, constant)  # type: ignore[no-untyped-call]
            return {"a": first + other.sum(), "b": (both * x).sum()}
        return {"a": (both * x).sum(), "b": (both.square() * x).mean()}

    first, second = torch.randn(LONG), torch.randn(LONG)
    for _ in range(3):
        opt.zero_grad()
        opt.step(losses=losses(first))
    opt.zero_grad()
    opt.backward(losses(first))
    opt.step(losses=losses(second))
    total = sum([*losses(first).values(), *losses(second).values()], torch.zeros(()))
    expected = torch.autograd.grad(total, [one, other])
    torch.testing.assert_close([one.grad, other.grad], list(expected))
    assert constant.equal(kept)


def test_a_buffer_that_is_added_to_in_one_loss_alone() -> None:
    """In the pass in which something is added, the gradient has another address."""
    opt, one, _ = two_long()
    buffer, weights, more = torch.zeros(LONG), torch.randn(LONG), torch.randn(LONG)
    for _ in range(3):
        first, second = Replayed.apply(one, weights, buffer)  # type: ignore[no-untyped-call]
        opt.zero_grad()
        opt.step(losses={"a": second + (one * more).sum(), "b": first})
        torch.testing.assert_close(one.grad, weights.square() + more + weights)


def test_a_buffer_that_comes_later_is_refused_and_then_right() -> None:
    opt, one, _ = two_long()
    buffer, weights = torch.zeros(LONG), torch.randn(LONG)

    def losses(replayed: bool) -> dict[str, Tensor]:
        if replayed:
            first, second = Replayed.apply(one, weights, buffer)  # type: ignore[no-untyped-call]
            return {"a": first, "b": second}
        return {"a": (one * weights).sum(), "b": (one * weights.square()).sum()}

    for _ in range(2):
        opt.zero_grad()
        opt.step(losses=losses(replayed=False))
    before = one.grad
    with pytest.raises(RuntimeError, match=r"later backward pass uses too.*step again"):
        opt.step(losses=losses(replayed=True))
    assert one.grad is before
    opt.zero_grad()
    opt.step(losses=losses(replayed=True))
    torch.testing.assert_close(one.grad, weights + weights.square())
