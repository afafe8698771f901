"""What would train nothing, or something else than was meant, says so once."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch

Batch = tuple[Tensor, Tensor, Tensor]


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Training:
    def __init__(self, **options: Any) -> None:
        self.model, self.batch = LateFusion(), audio_visual_batch()
        self.opt = MMParetoOptimizer(SGD(self.model.parameters(), lr=0.01), **options)

    def losses(self) -> Losses:
        return self.model.losses(self.batch)

    def steps(self, number: int, change: Callable[[Losses], Losses] = dict) -> None:
        for _ in range(number):
            self.opt.zero_grad()
            self.opt.step(losses=change(self.losses()))


def total(losses: Losses) -> Tensor:
    return torch.stack(list(losses.values())).sum()


TOTALS: dict[str, tuple[str, Callable[[Losses], Losses]]] = {
    "first": ("loss", lambda parts: {"loss": total(parts), **parts}),
    "last": ("loss", lambda parts: {**parts, "loss": total(parts)}),
    "in the middle": ("t", lambda p: {"a": p["audio"], "t": p["audio"] + p["mm"], "mm": p["mm"]}),
    "over four": ("all", lambda p: {"all": total(p) / 4, **{k: v / 4 for k, v in p.items()}}),
    "weighted": (
        "sum",
        lambda p: {"mm": p["mm"], "audio": 0.3 * p["audio"], "sum": p["mm"] + 0.3 * p["audio"]},
    ),
    "a large part": (
        "loss",
        lambda p: {"mm": 30 * p["mm"], "audio": p["audio"], "loss": 30 * p["mm"] + p["audio"]},
    ),
}


@pytest.mark.parametrize("case", TOTALS)
def test_a_mapping_that_holds_its_own_total(case: str) -> None:
    name, change = TOTALS[case]
    training = Training()
    with pytest.warns(UserWarning, match=rf"'{name}' is the sum of the others"):
        training.steps(1, change)
    with silence():
        training.steps(2, change)
        Training(check=False).steps(2, change)


def coincidence(parts: Losses) -> Losses:
    """The value of the sum, with the gradient of another loss."""
    mm, others = parts["mm"], parts["audio"] + parts["visual"]
    return {**parts, "mm": mm - mm.detach() + others.detach()}


NO_TOTALS: dict[str, Callable[[Losses], Losses]] = {
    "parts": dict,
    "the same loss twice": lambda p: {"loss": p["mm"], "mm": p["mm"]},
    "another weight": lambda p: {"mm": p["mm"], "audio": p["audio"], "s": p["mm"] + 2 * p["audio"]},
    "the value alone": coincidence,
    "three times the same": lambda p: {"a": p["mm"], "b": 1 * p["mm"], "c": p["mm"] + 0},
    "all zero": lambda p: {name: 0 * loss for name, loss in p.items()},
    "large by themselves": lambda p: {**p, "mm": 1e6 * p["mm"]},
    "a power of two by hand": lambda p: {**p, "mm": 64.0 * p["mm"]},
    "learned weights": lambda p: {n: v * torch.tensor(0.5).requires_grad_() for n, v in p.items()},
    "a tensor by hand": lambda p: {**p, "mm": p["mm"] * torch.tensor(3.0)},
}


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@pytest.mark.parametrize("case", NO_TOTALS)
def test_what_is_no_total_and_not_scaled(case: str) -> None:
    with silence():
        Training(integration="uniform").steps(2, NO_TOTALS[case])


@pytest.mark.parametrize("scaled", [("mm",), ("visual",), ("mm", "visual")])
def test_some_losses_through_the_scaler_and_others_not(scaled: tuple[str, ...]) -> None:
    training, scaler = Training(integration="uniform"), GradScaler("cpu", init_scale=2.0**16)

    def change(losses: Losses) -> Losses:
        return {n: scaler.scale(v) if n in scaled else v for n, v in losses.items()}

    with pytest.warns(UserWarning, match="GradScaler"):
        training.steps(1, change)
    with silence():
        training.steps(2, change)
        Training(integration="uniform", check=False).steps(2, change)
        everything = Training()
        everything.steps(2, lambda p: {n: scaler.scale(v) for n, v in p.items()})
        off = GradScaler("cpu", enabled=False)
        everything.steps(2, lambda p: {**p, "mm": off.scale(p["mm"])})


class Steps:
    """Hooks that step in the backward, of a parameter each."""

    def __init__(self, model: nn.Module) -> None:
        self.single: dict[Tensor, AdamW] = {p: AdamW([p], lr=0.1) for p in model.parameters()}
        for param in self.single:
            param.register_post_accumulate_grad_hook(self)

    def __call__(self, param: Tensor) -> None:
        self.single[param].step()


def test_optimizers_in_the_backward() -> None:
    training = Training()
    Steps(training.model)
    with pytest.warns(UserWarning, match="post-accumulate") as told:
        training.steps(1)
    assert len(told) == 1
    with silence():
        training.steps(2)


def test_a_base_that_needs_the_gradient_of_each_sample() -> None:
    class DPOptimizer(SGD):
        @property
        def grad_samples(self) -> list[Tensor]:
            raise AttributeError("Per sample gradient is not initialized")

    base = DPOptimizer(LateFusion().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"DPOptimizer.*(Opacus|example)"):
        MMParetoOptimizer(base)
    with pytest.raises(TypeError, match=r"DPOptimizer.*(Opacus|example)"):
        MMParetoOptimizer([base, SGD(LateFusion().parameters(), lr=0.1)])


@pytest.mark.parametrize("cause", ["detached", "frozen", "heads alone"])
def test_losses_that_never_meet(cause: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    if cause == "frozen":
        model.audio.requires_grad_(False)
        model.visual.requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    opt = MMParetoOptimizer(SGD(held, lr=0.01))

    def step() -> None:
        features = model.features(batch)
        if cause != "frozen":
            features = {name: feature.detach() for name, feature in features.items()}
        opt.step(losses=model.losses_at(features, batch[2]))

    with silence():
        for _ in range(9):
            step()
    with pytest.warns(UserWarning, match="never meet"):
        step()
    with silence():
        for _ in range(15):
            step()


def rebuilt(model: LateFusion, how: str) -> LateFusion:
    """Some parameters are others now, which no optimizer holds."""
    if how == "a cell run again":
        return LateFusion()
    if how == "load_state_dict":
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:  # which is switched to; the first one is nobody's any more
        model.audio[2] = nn.Linear(8, 6)
    return model


@pytest.mark.parametrize("how", ["a cell run again", "load_state_dict", "a second adapter"])
def test_a_model_that_is_rebuilt_after_the_first_step(how: str) -> None:
    training = Training()
    with silence():
        training.steps(2)
    training.model = rebuilt(training.model, how)
    with pytest.warns(UserWarning, match="no optimizer here holds"):
        training.steps(1)
    assert "no backward yet" not in str(training.opt.blocks)
    with silence():
        training.steps(2)


def several() -> tuple[Any, SGD, AdamW, list[nn.Parameter]]:
    model = LateFusion()
    params = list(model.parameters())
    first, second = SGD(params[:5], lr=0.1, momentum=0.9), AdamW(params[5:], lr=0.1)
    opt = MMParetoOptimizer([first, second])
    opt.step(losses=model.losses(audio_visual_batch()))
    return opt, first, second, params


def test_the_state_of_several_optimizers_is_theirs() -> None:
    """What is written, deleted or cleared is so in the very optimizer that holds the parameter."""
    opt, first, second, params = several()
    momentum = {"momentum_buffer": torch.ones_like(params[0])}
    opt.state[params[0]] = momentum
    assert first.state[params[0]] is momentum
    assert opt.state[params[0]] is momentum
    opt.state[params[-1]]["exp_avg"] = (moment := torch.ones_like(params[-1]))
    assert second.state[params[-1]]["exp_avg"] is moment
    del opt.state[params[1]]
    assert params[1] not in first.state
    assert params[1] not in opt.state
    assert len(opt.state) == len(params) - 1
    assert opt.state.pop(params[2])["momentum_buffer"].shape == params[2].shape
    assert params[2] not in first.state
    opt.state.update({params[2]: momentum})
    assert first.state[params[2]] is momentum
    assert params[2] not in second.state
    opt.state.clear()
    assert not first.state
    assert not second.state
    opt.state[params[-1]]["step"] = torch.zeros(())  # a default dict, as any optimizer's
    assert list(second.state) == [params[-1]]
    with pytest.raises(KeyError):
        opt.state[nn.Parameter(torch.zeros(1))] = {}


def test_the_groups_of_several_optimizers_take_no_more() -> None:
    opt, first, second, _ = several()
    group = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1}
    calls: dict[str, list[Any]] = {
        "append": [group],
        "extend": [[group]],
        "insert": [0, group],
        "pop": [],
        "clear": [],
        "__delitem__": [0],
        "__setitem__": [0, group],
        "__iadd__": [[group]],
    }
    for change, arguments in calls.items():
        with pytest.raises(ValueError, match=r"one of (the|them)|optimizers"):
            getattr(opt.param_groups, change)(*arguments)
    assert opt.param_groups == [*first.param_groups, *second.param_groups]
    opt.param_groups[1]["lr"] = 0.5
    assert second.param_groups[0]["lr"] == 0.5
