"""What is said, once, of parameters that nobody holds and of steps that integrate nothing."""

import warnings
from typing import Any, Literal

import pytest
import torch
from torch.optim import SGD

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch, grads


def test_parameters_that_nobody_holds_are_told_of_once() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.audio.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"holds, of shape .*\(the first by loss 'mm'"):
        opt.backward(model.losses(audio_visual_batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(model.losses(audio_visual_batch()))
    quiet = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    x = torch.randn(16, 5, requires_grad=True)  # no parameter, though a leaf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.backward(model.losses((x, *audio_visual_batch()[1:])))
    assert x.grad is None
    assert all(grad is not None for grad in grads(model))


def test_one_hint_to_who_never_gives_losses() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            opt.step()
    with pytest.warns(UserWarning, match=r"never given losses.*call step\(losses"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            opt.step()
        used = MMParetoOptimizer(SGD(model.parameters(), lr=0.01))
        used.backward(model.losses(audio_visual_batch()))
        for _ in range(20):
            used.step()


def test_one_hint_to_who_gives_a_sum() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.01))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(30):
            losses = list(model.losses(audio_visual_batch()).values())
            opt.step(losses={"sum": torch.stack(losses).sum()})
    assert [str(each.message).partition(",")[0] for each in told] == [
        "this MMParetoOptimizer has stepped 10 times and was only ever given one loss"
    ]
    assert told[0].filename == __file__


def test_a_closure_that_forgets_backward() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.01))
    with pytest.raises(RuntimeError, match="return the mapping of losses"):
        opt.step(lambda: sum(model.losses(audio_visual_batch()).values()))


def test_none_as_a_loss() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.01))
    losses: dict[str, Any] = {**model.losses(audio_visual_batch()), "visual": None}
    with pytest.raises(TypeError, match="loss 'visual' is None: leave it out"):
        opt.step(losses=losses)


@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_a_loss_too_small_to_be_a_task_is_told_of_once(
    rescale: Literal["encoder", "tensor"],
) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = MMParetoOptimizer(SGD([weight], lr=1e-9), rescale=rescale)

    def losses(size: float) -> dict[str, torch.Tensor]:
        policy = weight[0] * 3
        return {"policy": policy, "entropy": size * (weight[1] - weight[0])}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(losses=losses(0.1))
        opt.step(losses=losses(0.0))
    with pytest.warns(
        UserWarning, match=r"block 'policy\+entropy': the gradient of loss 'entropy'"
    ):
        opt.step(losses=losses(1e-5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(losses=losses(1e-5))
        own = MMParetoOptimizer(SGD([weight], lr=1e-9), integration=lambda gram: gram[0] * 0 + 1e5)
        own.step(losses=losses(1e-5))


def test_nearly_opposite_gradients_are_not_told_of() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MMParetoOptimizer(SGD([weight], lr=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(losses={"one": weight[0], "other": -2 * weight[0] + 1e-5 * weight[1]})
    assert opt.stats["one+other"].coefficients.max() > 1e4


def opposed(steps: int, rule: str, by_hand: str) -> tuple[float, list[str]]:
    """How far a bias that two losses pull apart has moved, and what was warned of."""
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(size)) for size in (50, 1))
    blocks: dict[str, Any] = {"weight": [weight], "bias": [bias]}
    if by_hand == "joined":
        blocks = {"both": [weight, bias]}
    base = SGD([weight, bias], lr=1e-3)
    opt = MMParetoOptimizer(base, blocks, integration=rule)
    one, other, before = torch.randn(50), torch.randn(50), float(bias.detach())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            up, down = (weight * one).sum() + bias.sum(), (weight * other).sum() - 2 * bias.sum()
            opt.zero_grad()
            opt.step(losses={"up": up, "down": down})
    return abs(float(bias.detach()) - before), [str(each.message) for each in told]


@pytest.mark.parametrize("rule", ["mmpareto", "pareto", "upgrad", "dualproj", "config"])
def test_a_block_that_stands_still_is_told_of_once(rule: str) -> None:
    assert opposed(99, rule, "bias apart")[1] == []
    moved, told = opposed(250, rule, "bias apart")
    assert moved < 1e-5
    assert len(told) == 1
    assert told[0].startswith("block 'bias' has stood still in 100 of 100 steps")
    assert "join it to others by param_groups_by_modality" in told[0]
    assert 'use integration="uniform"' in told[0]


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [("uniform", "bias apart"), *((r, "joined") for r in ("mmpareto", "upgrad", "config"))],
)
def test_what_that_warning_advises_moves_the_block(rule: str, by_hand: str) -> None:
    moved, told = opposed(250, rule, by_hand)
    assert moved > 1e-2
    assert told == []
