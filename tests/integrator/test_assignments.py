"""Freezing midway, names that are none, closures that differentiate nothing."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.integrator.test_silent_no_ops import Training, silence, total
from tests.models import LateFusion, Losses, audio_visual_batch, grads


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("which", ["audio.0.weight", "audio.2.bias", "mm_head.weight", "audio"])
def test_parameters_frozen_between_forward_and_step(which: str, window: bool) -> None:
    """As in plain PyTorch they get nothing, and keep what they have."""
    training = Training(integration="uniform")
    twin = deepcopy(training.model)
    if window:
        training.opt.backward(training.losses())
        total(twin.losses(training.batch)).backward()
    ours, theirs = training.losses(), total(twin.losses(training.batch))
    for model in (training.model, twin):
        for name, param in model.named_parameters():
            param.requires_grad_(not name.startswith(which))
    training.opt.backward(ours)
    theirs.backward()
    torch.testing.assert_close(grads(training.model), grads(twin))
    if which != "audio":  # whose loss has no graph then
        with silence():
            training.steps(2)  # it stays frozen


@pytest.mark.parametrize("at_features", [False, True])
def test_an_input_frozen_between_forward_and_step(at_features: bool) -> None:
    """And one that is thawed too late, as is a parameter."""
    training = Training(integration="uniform")
    training.batch[0].requires_grad_()
    training.model.visual_head.bias.requires_grad_(False)
    twin = deepcopy(training.model)
    features = training.model.features(training.batch)
    losses = training.model.losses_at(features, training.batch[2])
    theirs = total(twin.losses(training.batch))
    training.batch[0].requires_grad_(False)
    for model in (training.model, twin):
        model.visual_head.bias.requires_grad_(True)
    theirs.backward()
    training.opt.backward(losses, features=features if at_features else None)
    torch.testing.assert_close(grads(training.model), grads(twin))
    assert training.model.visual_head.bias.grad is None


MISSPELT = [("integraton", "integration"), ("gama", "gamma"), ("rescal", "rescale")]


@pytest.mark.parametrize(("name", "near"), MISSPELT)
@pytest.mark.parametrize("several", [False, True])
def test_names_that_are_no_settings(name: str, near: str, several: bool) -> None:
    model = LateFusion()
    audio, rest = list(model.audio.parameters()), list(model.visual.parameters())
    opt: Any = MMParetoOptimizer([SGD(audio, lr=0.1), SGD(rest, lr=0.1)] if several else SGD(rest))
    for owner in (opt, GradientIntegrator(model.parameters())):
        with pytest.raises(AttributeError, match=rf"'{name}'.*{near}"):
            setattr(owner, name, "uniform")
        assert not hasattr(owner, name)
        setattr(owner, "_note", 1)  # noqa: B010  # private names are anybody's
        assert vars(owner)["_note"] == 1


class Base(SGD):
    """With settings of its own, one of the class's and one of the instance's."""

    temperature = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rank = 4


def test_names_of_the_base_are_set_there() -> None:
    base = Base(LateFusion().parameters(), lr=0.1)
    opt: Any = MMParetoOptimizer(base)
    opt.temperature, opt.rank, opt.gamma = 2.0, 8, 1.0
    assert (base.temperature, base.rank) == (2.0, 8)
    assert (opt.temperature, opt.rank, opt.gamma) == (2.0, 8, 1.0)
    assert vars(opt).keys().isdisjoint({"temperature", "rank"})


def test_names_of_subclasses() -> None:
    class Own(MMParetoOptimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__(base)
            self.count = 0

    opt = Own(Base(LateFusion().parameters(), lr=0.1))
    opt.count += 1
    opt.gamma = 1.0
    assert opt.count == 1
    with pytest.raises(ValueError, match="gamma"):
        opt.gamma = -1.0


CLOSURES: dict[str, tuple[Callable[[Losses], Any], type[Exception]]] = {
    "a list": (lambda losses: list(losses.values()), TypeError),
    "a tuple": (lambda losses: tuple(losses.values()), TypeError),
    "losses and outputs": (lambda losses: (losses, torch.ones(2)), TypeError),
    "a loss and outputs": (lambda losses: [losses["mm"], None], TypeError),
    "None": (lambda losses: None, UserWarning),
    "a tensor": (lambda losses: losses["mm"], RuntimeError),
}


@pytest.mark.parametrize("case", CLOSURES)
@pytest.mark.parametrize("stale", [False, True])
def test_closures_that_differentiate_nothing(case: str, stale: bool) -> None:
    """Gradients that were there before are none of the closure's."""
    returned, error = CLOSURES[case]
    training = Training()
    if stale and case == "None":
        pytest.skip("a framework's closure may find them there, and return nothing")
    if stale:
        training.opt.backward(training.losses())
    before, old = deepcopy(list(training.model.parameters())), grads(training.model)
    with pytest.raises(error, match="mapping"):
        training.opt.step(lambda: returned(training.losses()))
    torch.testing.assert_close(list(training.model.parameters()), before, rtol=0, atol=0)
    torch.testing.assert_close(grads(training.model), old, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*never given losses")
@pytest.mark.parametrize("clears", ["None", "zeros", "nothing"])
def test_closures_that_differentiate(clears: str) -> None:
    training = Training(integration="uniform")
    for result in (None, torch.zeros(()), training.losses()):

        def closure(result: Any = result) -> Any:
            if clears != "nothing":
                training.opt.zero_grad(set_to_none=clears == "None")
            if isinstance(result, dict):
                return training.losses()
            total(training.losses()).backward()
            return result

        for _ in range(20):  # new gradients may lie where the old ones lay
            before = deepcopy(list(training.model.parameters()))
            training.opt.step(closure)
            assert not any(map(torch.equal, before, training.model.parameters()))


@pytest.mark.filterwarnings("ignore:.*only ever given one loss", "ignore:.*never given losses")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("power", [1, 2])
def test_a_closure_of_few_parameters(count: int, power: int) -> None:
    """Their new gradients may be where the old ones were, and are new all the same."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(count)]
    opt = MMParetoOptimizer(SGD(params, lr=0.1))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.stack([(param**power).mean() for param in params]).sum()
        loss.backward()
        return loss

    for _ in range(200):
        before = params[0].detach().clone()
        opt.step(closure)
    assert not params[0].equal(before)


def test_an_optimizer_instead_of_parameters() -> None:
    base = SGD(LateFusion().parameters(), lr=0.1)
    for wrong in (base, MMParetoOptimizer(base)):
        with pytest.raises(TypeError, match=r"\.param_groups"):
            GradientIntegrator(wrong)  # type: ignore[arg-type]
    assert len(GradientIntegrator(base.param_groups).param_groups) == 1


def test_names_that_are_not_there() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    with pytest.raises(KeyError, match="no losses"):
        opt.stats["audio"]
    opt.backward(model.losses(batch))
    with pytest.raises(KeyError, match=r"'audio'.*'mm\+audio', 'mm\+visual'"):
        opt.stats["audio"]
    assert opt.stats.get("audio") is None
    assert "audio" not in opt.stats
    with pytest.raises(AttributeError, match=r"MMParetoOptimizer.*'stat'.*'stats'"):
        opt.stat  # noqa: B018
    assert not hasattr(opt, "bloks")
    assert deepcopy(opt.stats).keys() == opt.stats.keys()
