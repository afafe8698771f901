"""Bad input is named, with its mend, and leaves everything as it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch, grads


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Trained:
    """A model with momentum, gradients and an open accumulation, to be found unchanged."""

    def __init__(self, **options: Any) -> None:
        self.model, self.batch = LateFusion(), audio_visual_batch()
        self.opt = MMParetoOptimizer(sgd(self.model), **options)
        self.opt.step(losses=self.losses())
        self.opt.zero_grad()
        self.opt.backward(self.losses())
        self.before = self.snapshot()

    def losses(self) -> dict[str, Tensor]:
        return self.model.losses(self.batch)

    def snapshot(self) -> list[Tensor]:
        momenta = [state["momentum_buffer"].clone() for state in self.opt.state.values()]
        params = [param.detach().clone() for param in self.model.parameters()]
        return [*params, *momenta, *(g for g in grads(self.model) if g is not None)]

    def refuses(self, error: type[Exception], message: str, **arguments: Any) -> None:
        for call in (self.opt.backward, self.opt.step):
            with pytest.raises(error, match=message):
                call(**arguments)
            after = self.snapshot()
            assert all(a.equal(b) for a, b in zip(self.before, after, strict=True))


LOSSES: dict[str, tuple[Callable[[Trained], Any], type[Exception], str]] = {
    "a list": (lambda t: list(t.losses().values()), TypeError, "mapping from a name.*got list"),
    "a tensor": (lambda t: t.losses()["mm"], TypeError, "mapping from a name.*got Tensor"),
    "empty": (lambda t: {}, ValueError, "losses is empty"),
    "a number": (
        lambda t: {**t.losses(), "audio": 0.5},
        TypeError,
        r"loss 'audio' must be a scalar tensor, got float.*not its \.item\(\)",
    ),
    "not reduced": (
        lambda t: {**t.losses(), "audio": t.model.audio(t.batch[0])},
        ValueError,
        r"loss 'audio' must be a scalar, got shape \(16, 6\).*\.mean\(\)",
    ),
    "detached": (
        lambda t: {**t.losses(), "visual": t.losses()["visual"].detach()},
        ValueError,
        r"loss 'visual' has no graph.*\.detach\(\)",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses(case: str) -> None:
    make, error, message = LOSSES[case]
    trained = Trained()
    trained.refuses(error, message, losses=make(trained))


@pytest.mark.parametrize("freed", ["mm", "visual"])
def test_a_graph_that_was_freed(freed: str) -> None:
    trained = Trained()
    spent = trained.losses()[freed]
    torch.autograd.grad(spent, list(trained.model.parameters()), allow_unused=True)
    losses = {**trained.losses(), freed: spent}
    trained.refuses(RuntimeError, rf"loss '{freed}'.*freed.*forward pass", losses=losses)


MODALITIES: dict[str, tuple[Callable[[LateFusion], Any], type[Exception], str]] = {
    "not a mapping": (lambda m: [m.audio], TypeError, "must be a mapping.*got list"),
    "empty": (lambda m: {}, ValueError, "param_groups_by_modality is empty"),
    "named alike": (
        lambda m: {1: m.audio, "1": m.visual},
        ValueError,
        "two modalities have the same name",
    ),
    "without parameters": (
        lambda m: {"audio": nn.ReLU()},
        ValueError,
        "modality 'audio' has no parameters",
    ),
    "not parameters": (
        lambda m: {"audio": [None]},
        TypeError,
        "modality 'audio' must be modules.*got NoneType",
    ),
    "a name where there are none": (
        lambda m: {"audio": ["audio"]},
        ValueError,
        r"modality 'audio' is 'audio', and the base has no names.*named_parameters\(\)",
    ),
    "a number": (lambda m: {"audio": 3}, TypeError, "modality 'audio' must be.*got int"),
    "in two": (
        lambda m: {"audio": m.audio, "visual": [*m.visual.parameters(), m.audio[0].weight]},
        ValueError,
        r"parameter '4' of shape \(8, 5\) of modality 'visual' is in modality 'audio' too",
    ),
    "not held": (
        lambda m: {"audio": m.audio, "other": nn.Linear(2, 3)},
        ValueError,
        r"parameter 'weight' of shape \(3, 2\) of modality 'other' is not held.*add_param_group",
    ),
}


@pytest.mark.parametrize("case", MODALITIES)
def test_modalities(case: str) -> None:
    make, error, message = MODALITIES[case]
    trained = Trained()
    with pytest.raises(error, match=message):
        MMParetoOptimizer(sgd(trained.model), make(trained.model))
    trained.refuses(
        error,
        message,
        losses=trained.losses(),
        param_groups_by_modality=make(trained.model),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"integration": "mmparetto"}, "integration must be .*got 'mmparetto'"),
        ({"integration": None}, "integration must be .*got None"),
        ({"rescale": "layer"}, 'rescale must be "encoder" or "tensor", got \'layer\''),
        ({"gamma": 0}, "gamma must be a positive, finite number, got 0"),
        ({"gamma": -1.5}, "gamma must be a positive"),
        ({"gamma": float("nan")}, "gamma must be a positive"),
    ],
)
def test_settings(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMParetoOptimizer(sgd(LateFusion()), **options)


@pytest.mark.parametrize("base", [torch.optim.SGD, LateFusion().parameters(), None])
def test_the_base_must_be_an_optimizer(base: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer.*build the base first"):
        MMParetoOptimizer(base)


def test_a_wrapped_optimizer_is_not_wrapped_again() -> None:
    with pytest.raises(TypeError, match=r"MMParetoOptimizer already: wrap the base once"):
        MMParetoOptimizer(MMParetoOptimizer(sgd(LateFusion())))


@pytest.mark.parametrize(
    ("returned", "found"),
    [(torch.ones(3), r"\[3\]"), (torch.ones(2, 1), r"\[2, 1\]"), ([1.0, 1.0], "list")],
)
def test_a_rule_that_returns_another_shape(returned: Any, found: str) -> None:
    answers = [torch.ones(2)] * 4  # two blocks, a step and a backward
    trained = Trained(integration=lambda gram: answers.pop() if answers else returned)
    message = rf"coefficients of shape \(2,\) for block 'mm\+audio'.*got .*{found}"
    for call in (trained.opt.backward, trained.opt.step):
        with pytest.raises(ValueError, match=message):
            call(losses=trained.losses())
        assert all(a.equal(b) for a, b in zip(trained.before, trained.snapshot(), strict=True))


def test_a_rule_that_fails_for_the_second_block_leaves_the_first_as_it_was() -> None:
    answers = [torch.ones(2)] * 5
    trained = Trained(integration=lambda gram: answers.pop())
    with pytest.raises(IndexError):
        trained.opt.backward(trained.losses())
    assert all(a.equal(b) for a, b in zip(trained.before, trained.snapshot(), strict=True))


def test_names_of_losses_that_give_two_blocks_one_name() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = MMParetoOptimizer(torch.optim.SGD([first, second], lr=0.1))
    losses = {
        "a+b": first.sum(),
        "c": first.prod(),
        "a": second.prod(),
        "b+c": second.sum(),
    }
    with pytest.raises(ValueError, match=r"both blocks would be called 'a\+b\+c': rename a loss"):
        opt.backward(losses)
    assert first.grad is None
    assert second.grad is None


@pytest.mark.parametrize("named", [False, True])
def test_sparse_gradients(named: bool) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    params: Any = list(table.named_parameters()) if named else table.parameters()
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1))
    name = "'weight'" if named else r"param_groups\[0\]\['params'\]\[0\] of shape \(5, 2\)"
    with pytest.raises(TypeError, match=rf"loss 'mm' gives a sparse .*{name}.*sparse=False"):
        opt.step(losses={"mm": table(torch.tensor([1, 2])).sum()})
    assert table.weight.grad is None


def test_losses_and_a_closure() -> None:
    trained = Trained()
    with pytest.raises(TypeError, match=r"losses or a closure.*not both"):
        trained.opt.step(lambda: trained.losses(), losses=trained.losses())
    with pytest.raises(TypeError, match=r"got dict: pass losses by name.*step\(losses=\.\.\.\)"):
        trained.opt.step(trained.losses())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only with losses or a closure"):
        trained.opt.step(param_groups_by_modality={"audio": trained.model.audio})
    assert all(a.equal(b) for a, b in zip(trained.before, trained.snapshot(), strict=True))


def test_lbfgs_without_a_closure() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(torch.optim.LBFGS(model.parameters()), integration="uniform")
    with pytest.raises(TypeError, match=r"LBFGS evaluates the losses.*step\(closure\)"):
        opt.step(losses=model.losses(audio_visual_batch()))
    assert all(param.grad is None for param in model.parameters())


def test_gamma_beside_a_function() -> None:
    base = torch.optim.SGD(LateFusion().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"gamma=1.5 is a factor on the rules that have a name"):
        MMParetoOptimizer(base, integration=lambda gram: gram[0], gamma=1.5)


def test_a_group_of_one_process_is_none(tmp_path: Path) -> None:
    alone = Trained()
    torch.manual_seed(0)
    grouped = Trained()
    alone.opt.step(losses=alone.losses())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        grouped.opt.step(losses=grouped.losses())
    finally:
        torch.distributed.destroy_process_group()
    assert all(a.equal(b) for a, b in zip(alone.snapshot(), grouped.snapshot(), strict=True))


def test_a_process_group_without_processes() -> None:
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"process_group must be.*dist.new_group"):
        MMParetoOptimizer(base, process_group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave one of them out"):
        MMParetoOptimizer(base, process_group=object(), average_gradients=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "bfloat16"], ids=str
)
def test_a_reduce_dtype_that_is_none(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"reduce_dtype must be one of torch.bfloat16.*None"):
        MMParetoOptimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1), reduce_dtype=dtype)


def test_a_reduce_dtype_where_nothing_is_averaged() -> None:
    base = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=r"torch.bfloat16 is how.*leave one of them out"):
        MMParetoOptimizer(base, average_gradients=False, reduce_dtype=torch.bfloat16)


def test_other_errors_of_autograd_come_through() -> None:
    param = nn.Parameter(torch.ones(2))
    loss = param.exp()
    broken = loss.sum()
    loss.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        MMParetoOptimizer(torch.optim.SGD([param], lr=0.1)).step(losses={"mm": broken})
