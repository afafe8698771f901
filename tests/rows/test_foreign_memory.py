"""Gradients that nobody else holds are used as they are; all others stay as they were."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from mmpareto_optim.flat import memory

SHAPES = [(3,), (2, 3), (300, 200), (100_000,)]
"""Short gradients are integrated in one flat vector, long ones for themselves."""

Keep = Callable[[Tensor], Any]
KEPT: dict[str, tuple[Keep, Callable[[Any], Tensor]]] = {
    "itself": (lambda gradient: gradient, lambda kept: kept),
    "a view": (lambda gradient: gradient[:1], lambda kept: kept),
    "an alias": (lambda gradient: gradient.detach(), lambda kept: kept),
    "a NumPy array": (lambda gradient: gradient.numpy(), torch.from_numpy),
    "a list": (lambda gradient: [gradient], lambda kept: kept[0]),
}
needs_counts = pytest.mark.skipif(
    memory._ALONE is None, reason="this PyTorch does not tell who holds a tensor"
)


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
    """By backward(), which copies as it keeps the losses' gradients."""
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
    assert len(kept) == 3
    for param, gradient in zip(params, expected, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, gradient, rtol=0, atol=0)
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


@needs_counts
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_one_loss_are_not_copied(shape: tuple[int, ...]) -> None:
    params, losses = setting(shape)
    places = []
    params[1].register_hook(lambda gradient: places.append(gradient.data_ptr()))
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).step(losses=losses)
    assert params[1].grad is not None
    assert [params[1].grad.data_ptr()] == places


@needs_counts
@pytest.mark.parametrize("integration", ["mmpareto", "uniform"])
def test_long_gradients_are_combined_in_place(integration: Any) -> None:
    params, losses = setting((300, 200))
    places = []
    params[0].register_hook(lambda gradient: places.append(gradient.data_ptr()))
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1), integration=integration)
    opt.step(losses=losses)
    assert params[0].grad is not None
    assert params[0].grad.data_ptr() in places


@pytest.mark.parametrize("shape", SHAPES)
def test_where_pytorch_does_not_tell_all_is_copied(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    expected = expected_gradients(shape)
    monkeypatch.setattr(memory, "_ALONE", None)
    torch.manual_seed(0)
    params, losses = setting(shape)
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).step(losses=losses)
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=0, atol=0)


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
    assert (kept[0] == 1).all()


def test_a_storage_that_a_hook_keeps_stays_as_it_is() -> None:
    params, losses = setting((100_000,))
    kept: list[Any] = []
    for param in params:
        param.register_hook(lambda gradient: kept.append(gradient.untyped_storage()))
    MMParetoOptimizer(torch.optim.SGD(params, lr=0.1)).step(losses=losses)
    places = {storage.data_ptr() for storage in kept}
    assert len(kept) == 3
    for param in params:
        assert param.grad is not None
        assert param.grad.data_ptr() not in places


@needs_counts
def test_gradients_behind_a_feature_are_not_copied() -> None:
    encoder, head = nn.Linear(300, 300), nn.Linear(300, 2)
    places = []
    encoder.weight.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    opt = MMParetoOptimizer(torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1))
    z = encoder(torch.randn(4, 300)).tanh()
    out = head(z)
    opt.step(losses={"a": out[:, 0].mean(), "b": out[:, 1].square().mean()}, features={"z": z})
    assert encoder.weight.grad is not None
    assert [encoder.weight.grad.data_ptr()] == places
