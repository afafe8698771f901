"""Bases that differentiate the gradients once more, and how that ends."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch


class Hutchinson(Optimizer):
    """Divides by the diagonal of the Hessian, as AdaHessian in its shortest form."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            gradients = [param.grad for param in params]
            signs = [torch.randint_like(param, 2) * 2 - 1 for param in params]
            products = torch.autograd.grad(gradients, params, signs)
            for param, product, sign in zip(params, products, signs, strict=True):
                param.addcdiv_(param.grad, (product * sign).abs() + 1, value=-group["lr"])
        return result


def with_losses(opt: Any, model: LateFusion) -> None:
    opt.step(losses=model.losses(audio_visual_batch()))


def after_a_backward(opt: Any, model: LateFusion) -> None:
    opt.backward(model.losses(audio_visual_batch()))
    opt.step()


def with_a_closure(opt: Any, model: LateFusion) -> None:
    opt.step(lambda: model.losses(audio_visual_batch()))


STEPS = [with_losses, after_a_backward, with_a_closure]


@pytest.mark.parametrize("step", STEPS)
def test_it_is_told_with_its_mend(step: Callable[..., None]) -> None:
    model = LateFusion()
    before = deepcopy(list(model.parameters()))
    opt = MMParetoOptimizer(Hutchinson(model.parameters()))
    with pytest.raises(RuntimeError, match=r"Hutchinson differentiates the gradients once more"):
        step(opt, model)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


def test_one_of_several() -> None:
    model = LateFusion()
    first, *rest = model.parameters()
    opt = MMParetoOptimizer([SGD([first], lr=0.1), Hutchinson(rest)])
    with pytest.raises(RuntimeError, match=r"SGD or Hutchinson differentiates"):
        with_losses(opt, model)


def test_who_does_the_backward_alone_keeps_the_graph() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(Hutchinson(model.parameters()))
    before = deepcopy(list(model.parameters()))
    total = torch.stack(list(model.losses(audio_visual_batch()).values())).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()), create_graph=True)
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        param.grad = gradient
    opt.step()
    assert not any(a.equal(b) for a, b in zip(model.parameters(), before, strict=True))


def test_other_errors_stay_as_they_are() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no room")

    model = LateFusion()
    with pytest.raises(RuntimeError, match=r"^no room$"):
        with_losses(MMParetoOptimizer(Broken(model.parameters(), lr=0.1)), model)

    def closure() -> Tensor:  # of a user who forgot the graph
        total = sum(loss.detach() for loss in model.losses(audio_visual_batch()).values())
        assert isinstance(total, Tensor)
        total.backward()
        return total

    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"^element 0 of tensors does not require grad"):
        opt.step(closure)


@pytest.mark.filterwarnings("ignore")  # of the library's own affairs
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
class TestOfALibrary:
    """Runs where pytorch-optimizer is installed, which no extra does."""

    @pytest.fixture
    def made(self, name: str) -> Any:
        library = pytest.importorskip("pytorch_optimizer")
        return getattr(library, name)

    @pytest.mark.parametrize("step", STEPS)
    def test_it_is_told(self, made: Any, name: str, step: Callable[..., None]) -> None:
        model = LateFusion()
        opt = MMParetoOptimizer(made(model.parameters(), lr=0.01))
        with pytest.raises(RuntimeError, match=f"{name} differentiates the gradients once more"):
            step(opt, model)

    def test_an_estimate_of_the_hessian_is_taken(self, made: Any, name: str) -> None:
        """As the questions have it; with one loss it is the base alone."""
        model, batch = LateFusion(), audio_visual_batch()
        plain = deepcopy(model)
        opt = MMParetoOptimizer(made(model.parameters(), lr=0.01))
        alone = made(plain.parameters(), lr=0.01)
        hessian = [torch.rand_like(param) for param in model.parameters()]
        for _ in range(2):
            opt.zero_grad()
            opt.backward({"mm": model.losses(batch)["mm"]})
            base: Any = opt.optimizer
            base.step(hessian=[each.clone() for each in hessian])
            alone.zero_grad()
            plain.losses(batch)["mm"].backward()
            alone.step(hessian=[each.clone() for each in hessian])
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
