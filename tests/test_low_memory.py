"""``memory="low"``: the gradients of the normal way, without keeping one for each loss."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from mmpareto_optim.twice import chunks_of
from tests.fuzz.cases import Micro, draw_case
from tests.fuzz.rules import TOLERANCE
from tests.fuzz.sides import Library, Side
from tests.models import LateFusion, audio_visual_batch

RULES = ["mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj"]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@given(st.integers(0, 10_000))
def test_gradients_are_those_of_the_normal_way(seed: int) -> None:
    """On the random models of the fuzzer: blocks, reach, dtypes, missing losses, rules."""
    case = draw_case(seed)
    if case.features or case.tensorwise or case.twice:
        return
    sides = [Side(case), Side(case)]
    normal, low = Library(sides[0]), Library(sides[1], memory="low")
    for micros in case.steps:
        scales = largest_terms(normal, micros[-1])
        for library in (normal, low):
            library.engine.zero_grad()
            backward_once(library, micros[-1])
        found = [stats.coefficients.nan_to_num() for stats in low.engine.stats.values()]
        longest = max((float(coefficients.max()) for coefficients in found), default=1)
        pairs = zip(sides[0].parameters, sides[1].parameters, scales, strict=True)
        for one, other, scale in pairs:
            assert_alike(one.grad, other.grad, scale * max(longest, 1))
            one.grad = None if other.grad is None else other.grad.clone()
        for side in sides:
            side.base.step()


def largest_terms(library: Library, micro: Micro) -> list[float]:
    """The largest number of any loss's gradient at each parameter."""
    losses, _ = library.side.forward(micro)
    params = library.side.parameters
    largest = [0.0] * len(params)
    for loss in losses.values():
        row = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(row):
            if gradient is not None:
                largest[index] = max(largest[index], float(gradient.nan_to_num().abs().max()))
    return largest


def backward_once(library: Library, micro: Micro) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.backward(micro)


def assert_alike(one: Tensor | None, other: Tensor | None, scale: float) -> None:
    if one is None or other is None:
        assert one is None
        assert other is None
        return
    assert one.dtype == other.dtype
    assert one.stride() == other.stride()
    if not one.isfinite().all():
        assert not other.isfinite().all()
        return
    assert float((one - other).abs().max()) <= TOLERANCE[one.dtype] * scale


@pytest.mark.parametrize("integration", RULES)
@pytest.mark.parametrize("losses", [2, 3, 9])
def test_rules_and_numbers_of_losses(integration: str, losses: int) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, losses)).double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, losses).double()
    found = []
    for memory in ("normal", "low"):
        integrator = GradientIntegrator(
            model.parameters(),
            integration=integration,
            memory=memory,
        )
        integrator.zero_grad()
        errors = (model(x) - y).square().mean(0)
        integrator.backward({str(i): error for i, error in enumerate(errors)})
        grads = [param.grad for param in model.parameters()]
        found.append((grads, str(integrator.blocks), [s.gram for s in integrator.stats.values()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][2], found[1][2])
    assert found[0][1] == found[1][1]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 30))
def test_the_gradients_that_are_held_fit_into_two(sizes: list[int], losses: int) -> None:
    params = [torch.empty(size, device="meta") for size in sizes]
    chunks = list(chunks_of(params, losses))
    assert [p for positions, _ in chunks for p in positions] == list(range(len(sizes)))
    for positions, held in chunks:
        alive = min(held + 1, losses)
        fits = alive * sum(sizes[p] for p in positions) <= 2 * sum(sizes)
        # Two are needed at least, and those of the largest tensor alone are no more than that.
        assert fits or (held == 1 and len(positions) == 1)


def test_a_second_backward_is_refused_until_the_first_is_used() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), memory="low")
    opt.backward(model.losses(audio_visual_batch()))
    before = [param.grad for param in model.parameters()]
    with pytest.raises(RuntimeError, match="zero_grad"):
        opt.backward(model.losses(audio_visual_batch()))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
    opt.step()
    opt.zero_grad()
    opt.step(losses=model.losses(audio_visual_batch()))
    assert set(opt.stats) == {"mm+audio", "mm+visual"}


def test_what_another_backward_left_is_added_to() -> None:
    model, twin, batch = LateFusion(), LateFusion(), audio_visual_batch()
    twin.load_state_dict(model.state_dict())
    integrators = (
        GradientIntegrator(model.parameters()),
        GradientIntegrator(twin.parameters(), memory="low"),
    )
    for net, integrator in zip((model, twin), integrators, strict=True):
        net.losses(batch)["mm"].backward()
        integrator.backward(net.losses(batch))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Reversible(torch.autograd.Function):
    """Its backward calls backward, and writes ``.grad`` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.inner = weight
        ctx.save_for_backward(x)
        return x * weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            (x.detach() * ctx.inner).backward(grad)
        return grad * ctx.inner.detach(), None


def test_what_it_does_not_go_with_is_refused() -> None:
    model = LateFusion()
    with pytest.raises(ValueError, match='memory must be "normal" or "low"'):
        GradientIntegrator(model.parameters(), memory="none")  # type: ignore[arg-type]
    by_tensor = GradientIntegrator(model.parameters(), rescale="tensor", memory="low")
    with pytest.raises(ValueError, match='rescale="tensor"'):
        by_tensor.backward(model.losses(audio_visual_batch()))
    integrator = GradientIntegrator(model.parameters(), memory="low")
    spec, image, label = audio_visual_batch()
    features = model.features((spec, image, label))
    with pytest.raises(ValueError, match="features="):
        integrator.backward(model.losses_at(features, label), features=features)
    first, inner = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    layered = GradientIntegrator([first, inner], memory="low")
    out = Reversible.apply(first * 2, inner)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="backward calls backward"):
        layered.backward({"one": out.sum(), "two": (out**2).sum()})
    assert first.grad is None
    assert inner.grad is None
