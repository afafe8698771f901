"""Checkpoints as torch.distributed.checkpoint makes them: state by parameter name.

The plain ``state_dict()`` round trips of every optimizer are in test_contract.py.
"""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, train

BASES: dict[str, Any] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
# Of matrices and the rest. Some have no state at all, which torch accepts unless it is strict.
SEVERAL: dict[str, Any] = {
    "momentum and AdamW": lambda matrices, rest: [
        torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
        torch.optim.AdamW(rest, lr=0.01),
    ],
    "AdamW and SGD": lambda matrices, rest: [
        torch.optim.AdamW(matrices, lr=0.01),
        torch.optim.SGD(rest, lr=0.1),
    ],
    "SGD and AdamW": lambda matrices, rest: [
        torch.optim.SGD(matrices, lr=0.1),
        torch.optim.AdamW(rest, lr=0.01),
    ],
    "groups": lambda matrices, rest: [
        torch.optim.Adam([{"params": matrices[:2]}, {"params": matrices[2:], "lr": 0.02}], lr=0.01),
        torch.optim.RMSprop([{"params": rest[:1], "lr": 0.02}, {"params": rest[1:]}], lr=0.01),
    ],
}


def wrapped(base: str, model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(BASES[base](model.parameters()))


def several(bases: str, model: nn.Module) -> MMParetoOptimizer:
    params = list(model.parameters())
    matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim < 2]
    return MMParetoOptimizer(SEVERAL[bases](matrices, rest))


def go_on(model: LateFusion, opt: MMParetoOptimizer) -> list[Tensor]:
    def step(losses: Losses) -> None:
        opt.zero_grad()
        opt.step(losses=losses)

    return train(model, step, steps=3)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flatten", [False, True])
def test_state_by_parameter_name_resumes_bit_for_bit(base: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = LateFusion()
    opt = wrapped(base, model)
    go_on(model, opt)
    weights, state = deepcopy(get_state_dict(model, opt, options=options))
    expected = go_on(model, opt)

    resumed = LateFusion()
    again = wrapped(base, resumed)
    set_state_dict(
        resumed, again, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert_same(go_on(resumed, again), expected)


@pytest.mark.parametrize("bases", SEVERAL)
@pytest.mark.parametrize("flatten", [False, True])
def test_the_state_of_several_resumes_bit_for_bit(bases: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, strict="SGD" not in bases)
    model = LateFusion()
    opt = several(bases, model)
    go_on(model, opt)
    weights = deepcopy(model.state_dict())
    state = deepcopy(get_optimizer_state_dict(model, opt, options=options))
    expected = go_on(model, opt)

    resumed = LateFusion()
    resumed.load_state_dict(weights)
    again = several(bases, resumed)
    set_optimizer_state_dict(resumed, again, optim_state_dict=state, options=options)
    assert_same(go_on(resumed, again), expected)


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_plain_optimizers_state(base: str) -> None:
    model = LateFusion()
    opt = wrapped(base, model)
    go_on(model, opt)
    ours = get_optimizer_state_dict(model, opt)
    plain = get_optimizer_state_dict(model, opt.optimizer)
    assert str(ours) == str(plain)

    other = LateFusion()
    target = BASES[base](other.parameters())
    set_optimizer_state_dict(other, target, optim_state_dict=deepcopy(ours))
    assert str(target.state_dict()) == str(opt.state_dict())
    back = wrapped(base, model)
    set_optimizer_state_dict(model, back, optim_state_dict=deepcopy(plain))
    assert str(back.state_dict()) == str(opt.state_dict())


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"
)
@pytest.mark.parametrize("bases", ["Adam", *SEVERAL])
def test_to_disk_and_back(tmp_path: Path, bases: str) -> None:
    optimizer_of = partial(several if bases in SEVERAL else wrapped, bases)
    model = LateFusion()
    opt = optimizer_of(model)
    go_on(model, opt)
    weights, state = get_state_dict(model, opt)
    save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    expected = go_on(model, opt)

    resumed = LateFusion()
    again = optimizer_of(resumed)
    weights, state = get_state_dict(resumed, again)
    load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    options = StateDictOptions(strict="SGD" not in bases)
    set_state_dict(
        resumed, again, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert_same(go_on(resumed, again), expected)


def test_asking_for_the_state_does_not_train() -> None:
    """torch makes a step with zero gradients there, to have a state to speak of."""
    model = LateFusion()
    before = [param.detach().clone() for param in model.parameters()]
    opt = wrapped("Adam", model)
    get_optimizer_state_dict(model, opt)
    assert_same([param.detach() for param in model.parameters()], before)
    assert all(param.grad is None for param in model.parameters())
