"""Classes that build their base: what a framework does that wants a class and its keywords."""

import inspect
import pickle
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch

Upgrad: Any = MMParetoOptimizer.around(Adam, integration="upgrad", gamma=2.0)


class Named(MMParetoOptimizer.around(SGD)):  # type: ignore[misc]
    """A user's own class on top."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.5)


def trained(model: LateFusion, opt: Any) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(3):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
    return [param.detach().clone() for param in model.parameters()]


def test_it_is_the_wrapper_around_the_base() -> None:
    model = LateFusion()
    copied = deepcopy(model)
    opt = Upgrad(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    base = Adam(copied.parameters(), lr=0.1, betas=(0.8, 0.9))
    expected = trained(copied, MMParetoOptimizer(base, integration="upgrad", gamma=2.0))
    torch.testing.assert_close(trained(model, opt), expected, rtol=0, atol=0)
    assert type(opt.optimizer) is Adam
    assert opt.defaults == base.defaults
    assert opt.gamma == 2.0


def test_what_a_framework_asks_of_the_class() -> None:
    assert issubclass(Upgrad, Optimizer)
    assert issubclass(Upgrad, MMParetoOptimizer)
    parameters = inspect.signature(Upgrad).parameters
    assert list(parameters) == ["params", "keywords"]
    assert parameters["keywords"].kind is inspect.Parameter.VAR_KEYWORD
    assert Upgrad.__name__ == Upgrad.__qualname__ == "MMPareto[Adam]"
    assert "around Adam" in Upgrad.__doc__
    opt = Upgrad(nn.Linear(2, 2).named_parameters())
    assert isinstance(opt, Optimizer)
    assert repr(opt).startswith("MMPareto[Adam] (\n    integration='upgrad', gamma=2.0")
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert lr_scheduler.StepLR(opt, 1).get_last_lr() == [1e-3]


def test_the_same_arguments_give_the_same_class() -> None:
    assert MMParetoOptimizer.around(Adam, gamma=2.0, integration="upgrad") is Upgrad
    assert MMParetoOptimizer.around(SGD, gamma=2.0, integration="upgrad") is not Upgrad
    assert MMParetoOptimizer.around(Adam) is not Upgrad


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_classes_are_pickled(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(Upgrad, protocol)) is Upgrad
    assert pickle.loads(pickle.dumps(Named, protocol)) is Named
    assert deepcopy(Upgrad) is copy(Upgrad) is Upgrad


@pytest.mark.parametrize("kind", [Upgrad, Named])
@pytest.mark.parametrize("copied", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_instances_are_copied_with_their_state(kind: Any, copied: Any) -> None:
    model = LateFusion()
    opt = kind(model.parameters())
    trained(model, opt)
    other, of_other = copied((model, opt))
    assert type(of_other) is kind
    torch.testing.assert_close(trained(other, of_other), trained(model, opt), rtol=0, atol=0)


def test_a_checkpoint_is_that_of_the_base() -> None:
    model = LateFusion()
    opt = Upgrad(model.parameters(), lr=0.1)
    trained(model, opt)
    plain = Adam(deepcopy(model).parameters())
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1


def test_an_option_without_a_hash() -> None:
    """Blocks by hand, of one model."""
    model = LateFusion()
    kind = MMParetoOptimizer.around(SGD, param_groups_by_modality={"audio": model.audio})
    opt = kind(model.parameters(), lr=0.1)
    trained(model, opt)
    assert list(opt.stats) == ["audio"]


def test_totals_of_an_instance() -> None:
    model = LateFusion()
    opt = Upgrad(model.parameters())
    opt.total(model.losses(audio_visual_batch())).backward()
    assert list(opt.stats) == ["mm+audio", "mm+visual"]


def test_a_misspelt_setting_is_refused() -> None:
    opt = Upgrad(nn.Linear(2, 2).parameters())
    with pytest.raises(AttributeError, match=r"MMPareto\[Adam\] .* did you mean 'gamma'"):
        opt.gama = 2.0
    with pytest.raises(TypeError, match="gama"):
        MMParetoOptimizer.around(SGD, gama=1.0)
    with pytest.raises(TypeError, match="learning_rate"):
        Upgrad(nn.Linear(2, 2).parameters(), learning_rate=1.0)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (SGD([torch.zeros(1)], lr=0.1), r"wrap an optimizer .* by MMParetoOptimizer\(optimizer\)"),
        (nn.Linear, "base must be a class of optimizers"),
        (MMParetoOptimizer, "MMParetoOptimizer has a base already"),
        (Upgrad, r"MMPareto\[Adam\] has a base already"),
    ],
)
def test_what_is_no_base_is_refused(base: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MMParetoOptimizer.around(base)


def test_a_class_that_is_around_one_takes_no_other() -> None:
    with pytest.raises(TypeError, match=r"MMPareto\[Adam\] has a base already"):
        Upgrad.around(SGD)
