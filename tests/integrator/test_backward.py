"""What autograd, a user or a framework does around a backward never changes a gradient silently."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads, vectors_as_losses


def wrapped(*params: Tensor, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(params, lr=0.1), **options)


class Recomputed(torch.autograd.Function):
    """Keeps no activations: its backward computes them again and calls backward itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), gradient)
        return x.grad, None


class Reversible(nn.Module):
    """An embedding, a layer whose backward calls backward, two heads."""

    def __init__(self, recomputed: bool, used_outside: bool, trained_below: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.layer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)
        self.below.requires_grad_(trained_below)
        self.recomputed, self.used_outside = recomputed, used_outside

    def losses(self) -> Losses:
        # The input requires a gradient, as reversible layers ask for where nothing below does.
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = self.below(x)
        z = Recomputed.apply(hidden, self.layer) if self.recomputed else self.layer(hidden)  # type: ignore[no-untyped-call]
        losses = {"a": (self.a(z) - 1).square().mean(), "b": (self.b(z) + 2).square().mean()}
        if self.used_outside:
            losses["a"] = losses["a"] + self.layer(hidden.detach()).square().mean()
        return losses


@pytest.mark.parametrize("used_outside", [False, True])
@pytest.mark.parametrize("trained_below", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_a_backward_within_the_backward(
    used_outside: bool, trained_below: bool, window: bool
) -> None:
    found = []
    for recomputed in (False, True):
        model = Reversible(recomputed, used_outside, trained_below)
        opt = wrapped(*(param for param in model.parameters() if param.requires_grad))
        if window:
            opt.backward(model.losses())
        opt.backward(model.losses())
        found.append(grads(model))
        assert list(opt.stats) == ["a+b"]
    torch.testing.assert_close(found[1], found[0])


def numpy_half(grad: Tensor) -> None:
    grad.numpy()[...] *= 0.5


EDITS: dict[str, Callable[[Tensor], object]] = {
    ".data.zero_()": lambda grad: grad.data.zero_(),
    ".data.mul_()": lambda grad: grad.data.mul_(0.5),
    "foreach on .data": lambda grad: torch._foreach_zero_((grad.data,)),
    "NumPy": numpy_half,
    "in place": lambda grad: grad.mul_(0.5),
    "neg through .data": lambda grad: grad.data.neg_(),
}


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("how", EDITS)
def test_what_comes_after_an_edit_starts_from_what_is_there(how: str, spoilt: bool) -> None:
    """As in plain PyTorch, whatever the edit tells of itself, and after a batch of NaN too."""
    rows = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0]])
    param, fresh = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows * torch.nan if spoilt else rows))
    assert param.grad is not None
    EDITS[how](param.grad)
    left = param.grad.clone()
    opt.backward(vectors_as_losses(param, rows.flip(1)))
    wrapped(fresh).backward(vectors_as_losses(fresh, rows.flip(1)))
    assert fresh.grad is not None
    torch.testing.assert_close(param.grad, left + fresh.grad, equal_nan=True)


def test_an_edit_of_one_gradient_leaves_its_neighbours_windows_open() -> None:
    rows = torch.tensor([[1.0, 2.0, 0.0, 1.0], [-1.0, 0.5, 1.0, 0.0]])
    edited, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = wrapped(edited, other)

    def losses() -> Losses:
        both = torch.cat([edited, other])
        return {f"loss{i}": (both * row).sum() for i, row in enumerate(rows)}

    opt.backward(losses())
    assert edited.grad is not None
    edited.grad.data.zero_()
    opt.backward(losses())
    expected = nn.Parameter(torch.zeros(4))
    scales = torch.tensor([1.0, 1.0, 2.0, 2.0])
    wrapped(expected).backward(vectors_as_losses(expected, rows * scales))
    assert expected.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(torch.cat([edited.grad, other.grad]), expected.grad)


needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype"
)


@needs_grad_dtype
def test_gradients_in_another_dtype_than_the_parameter() -> None:
    half, full = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
    half.grad_dtype = torch.float32
    opt = wrapped(full, half)
    for _ in range(2):
        total = half.float() + full
        opt.backward({"a": (total * torch.arange(3.0)).sum(), "b": -total.sum()})
    assert half.grad is not None
    assert half.grad.dtype == torch.float32
    torch.testing.assert_close(half.grad, full.grad)


attribute: Any = Tensor.grad  # with the methods of a property


class Stubborn(nn.Parameter):
    """Takes no other ``.grad`` while it is told not to."""

    refuses = False

    @property
    def grad(self) -> Tensor | None:
        found: Tensor | None = attribute.__get__(self)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.refuses and value is not self.grad:
            raise RuntimeError("this .grad is not to be replaced")
        attribute.__set__(self, value)


@pytest.mark.parametrize("stubborn", [0, 1, 2])
def test_what_cannot_be_written_leaves_all_as_it_was(stubborn: int) -> None:
    params: list[Any] = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    params[stubborn] = Stubborn(torch.zeros(3))
    rows = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0]])

    def losses() -> Losses:
        return vectors_as_losses(torch.stack(params).sum(0), rows)

    opt = wrapped(*params)
    opt.backward(losses())
    before = [param.grad for param in params]
    values = [gradient.clone() for gradient in before]
    params[stubborn].refuses = True
    with pytest.raises(RuntimeError, match="not to be replaced"):
        opt.backward(losses())
    assert all(param.grad is gradient for param, gradient in zip(params, before, strict=True))
    assert all(param.grad.equal(value) for param, value in zip(params, values, strict=True))


@pytest.fixture
def odd_defaults() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def steps_of(model: LateFusion, batch: Any, **options: Any) -> None:
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(batch))
        opt.step(losses=model.losses(batch))


@pytest.mark.parametrize("options", [{}, {"rescale": "tensor"}, {"integration": "pareto"}])
def test_default_device_and_dtype_change_nothing(
    options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = LateFusion()
    twin.load_state_dict(model.state_dict())
    steps_of(model, batch, **options)
    request.getfixturevalue("odd_defaults")
    steps_of(twin, batch, **options)
    torch.set_default_device(None)
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_a_parameter_that_is_listed_twice_counts_once() -> None:
    param, twice = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    rows = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    wrapped(param).backward(vectors_as_losses(param, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.optim's own, of the same
        opt = wrapped(twice, twice)
    opt.backward(vectors_as_losses(twice, rows))
    torch.testing.assert_close(twice.grad, param.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["(encoders)", "", "mm+audio"])
def test_losses_may_have_any_name(name: str) -> None:
    model = LateFusion()
    z = model.features(batch := audio_visual_batch())
    losses = model.losses_at(z, batch[2])
    losses[name] = losses.pop("audio")
    opt = wrapped(*model.parameters())
    opt.backward(losses, features=z)
    assert opt.stats["audio"].objectives == ("mm", name)
    expected = torch.autograd.grad(model.losses(batch)["mm"], model.mm_head.weight)[0]
    torch.testing.assert_close(model.mm_head.weight.grad, expected)


def test_the_graph_may_be_kept_for_another_backward() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = wrapped(*model.parameters())
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    opt.backward(losses, retain_graph=True)
    first = grads(model)
    opt.zero_grad()
    opt.backward(losses, features=features, retain_graph=True)
    opt.zero_grad()
    opt.backward(losses)
    torch.testing.assert_close(grads(model), first)


def test_an_integrator_fills_gradients_for_two_optimizers() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = LateFusion()
    twin.load_state_dict(model.state_dict())
    encoders = [*model.audio.parameters(), *model.visual.parameters()]
    heads = [param for param in model.parameters() if all(param is not e for e in encoders)]
    two = [torch.optim.SGD(encoders, lr=0.1), torch.optim.SGD(heads, lr=0.1)]
    integrator = GradientIntegrator(model.named_parameters())
    opt = wrapped(*twin.parameters())
    for _ in range(3):
        integrator.zero_grad()
        integrator.backward(model.losses(batch))
        for single in two:
            single.step()
        opt.zero_grad()
        opt.step(losses=twin.losses(batch))
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)
    table = str(integrator.blocks).splitlines()
    assert [line.split()[0] for line in table] == [
        "block",
        "mm+audio",
        "mm+visual",
        "audio",
        "visual",
        "mm",
    ]
    assert "audio.0.weight" in table[1]


@pytest.mark.parametrize("params", [[], [1.0], [("name", "no tensor")]])
def test_an_integrator_without_parameters(params: list[Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="params"):
        GradientIntegrator(params)


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_groups_of_an_integrator() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    groups = [
        {"params": model.audio.named_parameters()},
        {"params": model.visual.parameters()},
        {"params": model.mm_head.weight},
    ]
    integrator = GradientIntegrator(groups)
    integrator.backward(model.losses(batch))
    assert list(integrator.stats) == ["mm+audio", "mm+visual"]
    assert model.mm_head.bias.grad is None
    integrator.zero_grad(set_to_none=False)
    weight = next(model.audio.parameters())
    assert weight.grad is not None
    assert not weight.grad.any()
