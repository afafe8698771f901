"""Weight gradients as factors: what they give, beside gradients that are made one by one."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpareto_optim import MMParetoOptimizer
from mmpareto_optim.factors import TOLD_OF_HOOKS, layers_of

pytestmark = pytest.mark.skipif(
    not TOLD_OF_HOOKS, reason="this PyTorch does not tell of hooks on saved tensors"
)

WIDTH = 512  # a square weight of this width is the smallest that has factors


def losses_of(outputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Losses that differ, of which some conflict."""
    outputs = list(outputs)
    goals = torch.randn(3, *outputs[0].shape, generator=torch.Generator().manual_seed(5))
    losses = {"mm": sum((out - goals[0]).square().mean() for out in outputs)}
    losses["audio"] = (outputs[0] * goals[1] - 1).square().mean()
    losses["visual"] = (outputs[-1] + goals[0]).square().mean()
    return losses  # type: ignore[return-value]


def both_ways(
    model: nn.Module,
    run: Callable[[Any], dict[str, Tensor]],
    modalities: Callable[[Any], Any] = lambda model: None,
    **arguments: Any,
) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Gradients and statistics of ``step(losses=...)``, and of ``backward``, without factors."""
    other = deepcopy(model)
    optimizers = [
        MMParetoOptimizer(torch.optim.SGD(m.parameters(), lr=0.0), modalities(m), **arguments)
        for m in (model, other)
    ]
    optimizers[0].step(losses=run(model))
    optimizers[1].backward(run(other))
    found = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, other)]
    return found[0], found[1], optimizers[0].stats, optimizers[1].stats


def assert_same(model: nn.Module, run: Callable[[nn.Module], Any], **arguments: Any) -> None:
    found, expected, stats, expected_stats = both_ways(model, run, **arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert stats.keys() == expected_stats.keys()
    for name, block in stats.items():
        gram, other = block.gram, expected_stats[name].gram
        torch.testing.assert_close(gram, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def factored(model: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]]) -> set[str]:
    """Names of the weights that have factors."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    return {names[weight] for weight in layers_of(run(model).values(), list(names))}


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 12),
    bias=st.booleans(),
    tokens=st.booleans(),
    integration=st.sampled_from(["mmpareto", "pareto", "uniform"]),
    seed=st.integers(0, 99),
)
def test_linear_layers(rows: int, bias: bool, tokens: bool, integration: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WIDTH, bias),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH + 8, bias),
    )
    batch = torch.randn(rows, *([2] if tokens else []), WIDTH)

    def run(model: nn.Module) -> dict[str, Tensor]:
        return losses_of([model(batch)])

    assert factored(model, run) == {"1.weight", "3.weight"}
    assert_same(model, run, integration=integration)


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    bias: bool,
    channels_last: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.BatchNorm2d(512),
        nn.Conv2d(512, 512, kernel, stride, padding, dilation, bias=bias),
        nn.ReLU(),
    )
    batch = torch.randn(1, 512, 5, 5)
    if channels_last:
        batch = batch.to(memory_format=torch.channels_last)

    def run(model: nn.Module) -> dict[str, Tensor]:
        return losses_of([model(batch)])

    assert factored(model, run) == {"1.weight"}
    assert_same(model, run)


def test_convolutions_with_one_number_for_height_and_width() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(512, 512, 3, padding=(1,), stride=(2,))  # type: ignore[arg-type]
    batch = torch.randn(1, 512, 5, 5)

    def run(model: nn.Module) -> dict[str, Tensor]:
        return losses_of([model(batch)])

    assert factored(model, run) == {"weight"}
    assert_same(model, run)


class TwoEncoders(nn.Module):
    """Each modality's loss reaches its own encoder, the joint one both."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Tensor) -> list[Tensor]:
        return [self.head(self.audio(batch)), self.visual(batch)]


def run_two(model: nn.Module) -> dict[str, Tensor]:
    batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    return losses_of(model(batch))


def test_weights_that_one_loss_or_several_reach() -> None:
    torch.manual_seed(0)
    model = TwoEncoders()
    assert factored(model, run_two) == {"audio.weight", "visual.weight", "head.weight"}
    assert_same(model, run_two)


def test_modalities_some_losses_of_which_do_not_reach_all_weights() -> None:
    torch.manual_seed(0)
    model = TwoEncoders()
    found, expected, *_ = both_ways(
        model, run_two, lambda m: {"both": [*m.audio.parameters(), *m.visual.parameters()]}
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_there_is_added_to() -> None:
    torch.manual_seed(0)
    model = TwoEncoders()
    plain, _, _, _ = both_ways(deepcopy(model), run_two)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer.step(losses=run_two(model))
    for param, gradient in zip(model.parameters(), plain, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, gradient + 1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH)


BATCH = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))


def twice(model: nn.Module) -> dict[str, Tensor]:
    return losses_of([model(model(BATCH))])


def transposed_once(model: nn.Linear) -> dict[str, Tensor]:
    weight = model.weight.t()
    return losses_of([BATCH @ weight @ weight])


def in_another_loss(model: nn.Module) -> dict[str, Tensor]:
    losses = losses_of([model(BATCH)])
    losses["audio"] = model(BATCH + 1).square().mean()
    return losses


def penalised(model: nn.Linear) -> dict[str, Tensor]:
    losses = losses_of([model(BATCH)])
    losses["mm"] = losses["mm"] + model.weight.square().sum()
    return losses


def scaled(model: nn.Linear) -> dict[str, Tensor]:
    return losses_of([torch.addmm(model.bias, BATCH, model.weight.t(), alpha=2)])


def checkpointed(model: nn.Module) -> dict[str, Tensor]:
    return losses_of([checkpoint(model, BATCH, use_reentrant=False)])


def with_saved_elsewhere(model: nn.Module) -> dict[str, Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return losses_of([model(BATCH)])


def in_bfloat16(model: nn.Module) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return losses_of([model(BATCH).float()])


def sparse_at_the_output(model: nn.Module) -> dict[str, Tensor]:
    out = model(BATCH)
    chosen = torch.gather(out, 1, torch.zeros(4, 1, dtype=torch.long), sparse_grad=True)
    return {"mm": out.square().mean(), "audio": chosen.square().sum()}


def test_a_sparse_gradient_at_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    assert factored(model, sparse_at_the_output) == {"1.weight"}
    assert_same(model, sparse_at_the_output)


@pytest.mark.parametrize(
    "run",
    [
        twice,
        transposed_once,
        in_another_loss,
        penalised,
        scaled,
        checkpointed,
        with_saved_elsewhere,
        in_bfloat16,
    ],
)
def test_what_has_no_factors(run: Callable[[nn.Module], Any]) -> None:
    model = linear()
    assert factored(model, run) == set()
    assert_same(model, run)


def test_a_layer_whose_node_would_not_run_has_no_factors() -> None:
    """Autograd runs it for the weight alone; without, it would not see that the graph is gone."""
    model = nn.Linear(WIDTH, WIDTH)
    model.bias.requires_grad_(False)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    out = model(BATCH)
    losses = {"mm": out.sum(), "audio": 2 * out.sum()}
    assert not layers_of(losses.values(), [model.weight])
    optimizer.step(losses=losses)
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        optimizer.step(losses=losses)


def test_a_weight_of_another_shape_since_the_forward_pass_is_told_of() -> None:
    model = linear()
    losses = losses_of([model(BATCH)])
    model.weight.data = torch.zeros(WIDTH + 8, WIDTH)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError):
        optimizer.step(losses=losses)
    assert model.weight.grad is None
    assert model.bias.grad is None


def test_a_graph_is_freed_by_the_step() -> None:
    model = linear()
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    out = model(BATCH)
    losses = {"mm": out.sum(), "audio": 2 * out.sum()}
    assert layers_of(losses.values(), list(model.parameters()))
    optimizer.step(losses=losses)
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        optimizer.step(losses=losses)


def test_too_many_rows_have_no_factors() -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        return losses_of([model(BATCH.repeat(40, 1))])

    assert factored(linear(), run) == set()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1024, 1024, 3, groups=2),
        nn.ConvTranspose2d(512, 512, 3),
        nn.Conv1d(512, 512, 3),
        nn.Conv2d(512, 512, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        nn.Linear(WIDTH, WIDTH).double(),
    ],
)
def test_layers_of_other_kinds(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    shape = (1, WIDTH) if weight.ndim == 2 else (1, 512, *(3,) * (weight.ndim - 2))
    if weight.shape[0] == 1024:
        shape = (1, 1024, 3, 3)

    def run(model: nn.Module) -> dict[str, Tensor]:
        return losses_of([model(torch.ones(shape, dtype=weight.dtype))])

    assert factored(layer, run) == set()
    assert_same(layer, run)


def test_a_hook_on_the_weight_sees_each_gradient() -> None:
    model, seen = linear(), []
    model.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    losses = losses_of([model(BATCH)])
    MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0)).step(losses=losses)
    assert seen == [model.weight.shape] * 3


def test_hooks_on_the_layer_change_gradients_as_they_do_elsewhere() -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    for layer in model:
        layer.register_full_backward_hook(lambda _, found, __: (found[0] * 2,))  # type: ignore[index]

    def run(model: nn.Module) -> dict[str, Tensor]:
        hidden: Tensor = model(BATCH.clone().requires_grad_())
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return losses_of([hidden])

    assert factored(model, run) == {"0.weight", "2.weight"}
    assert_same(model, run)


def test_autocast_around_the_step_is_autograds_own() -> None:
    model = linear()
    losses, others = losses_of([model(BATCH)]), losses_of([model(BATCH)])
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers_of(losses.values(), list(model.parameters()))
        optimizer.step(losses=losses)
        found = [param.grad for param in model.parameters()]
        optimizer.zero_grad()
        optimizer.backward(others)
    for one, param in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, param.grad)


@pytest.mark.parametrize("opening", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("alike", [1.0, 1e-2, 1e-4])
def test_no_gradient_is_opposed_even_where_rows_cancel(alike: float, opening: float) -> None:
    for seed in range(20):
        _assert_common(alike, opening, seed)


def _assert_common(alike: float, opening: float, seed: int) -> None:
    """Rows nearly the same, gradients at them nearly adding up to zero, losses nearly opposite."""
    torch.manual_seed(seed)
    model = nn.Linear(WIDTH, WIDTH)
    batch = torch.randn(WIDTH) + alike * torch.randn(8, WIDTH)
    outers = torch.randn(8, WIDTH)
    others = -outers + opening * torch.randn(8, WIDTH)
    outers, others = outers - outers.mean(0), others - others.mean(0)
    out = model(batch)
    losses = {"mm": (out * outers).sum(), "audio": (out * others).sum()}
    gradients = [
        torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in losses.values()
    ]
    MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0)).step(losses=losses)
    assert model.weight.grad is not None
    for gradient in gradients:
        assert (model.weight.grad.double() * gradient.double()).sum() >= 0


def test_a_graph_that_is_gone_is_told_of() -> None:
    model = linear()
    losses = losses_of([model(BATCH)])
    torch.autograd.grad(losses["mm"], model.weight)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        optimizer.step(losses=losses)
    assert model.weight.grad is None


def test_inputs_changed_in_place_are_told_of() -> None:
    model, batch = linear(), BATCH.clone()
    losses = losses_of([model(batch)])
    batch.add_(1)
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.step(losses=losses)
    assert model.weight.grad is None


def test_gradients_that_are_not_finite_stay_so() -> None:
    model = linear()
    losses = losses_of([model(BATCH)])
    losses["audio"] = losses["audio"] * float("inf")
    optimizer = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer.step(losses=losses)
    assert model.weight.grad is not None
    assert not model.weight.grad.isfinite().all()
