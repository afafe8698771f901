"""Which losses meet at which parameters when gradients are zero, come alive, or are few numbers.

Losses are linear, so that their gradients are what a test gives them; zeros are given as zeros, as
autograd gives them through ``stack`` or a product with zero.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads, vectors_as_losses

Rule = Literal["mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj"]
RULES: list[Rule] = ["mmpareto", "pareto", "uniform", "config", "upgrad", "dualproj"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
Params = dict[str, nn.Parameter]
Rows = dict[str, dict[str, Tensor]]
"""For each loss its gradients, by the name of the parameter."""


def params_of(numbers: dict[str, int], device: str = "cpu") -> Params:
    return {
        name: nn.Parameter(torch.zeros(count, dtype=torch.float64, device=device))
        for name, count in numbers.items()
    }


def optimizer_of(params: Params, modalities: Any = None, **options: Any) -> MMParetoOptimizer:
    base = torch.optim.SGD([(name, param) for name, param in params.items()], lr=0.0)
    return MMParetoOptimizer(base, modalities, **options)


def linear(params: Params, rows: Rows) -> Losses:
    return {
        loss: torch.stack([(params[name] * g).sum() for name, g in row.items()]).sum()
        for loss, row in rows.items()
    }


def backward(opt: MMParetoOptimizer, params: Params, rows: Rows) -> None:
    opt.zero_grad()
    opt.step(losses=linear(params, rows))


def integrated(rows: Sequence[Tensor], **options: Any) -> Tensor:
    """As one parameter, which all of the losses reach."""
    param = nn.Parameter(torch.zeros_like(rows[0]))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.0), **options)
    opt.backward(vectors_as_losses(param, torch.stack(list(rows))))
    assert param.grad is not None
    return param.grad


def grad_of(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


def objectives(opt: MMParetoOptimizer) -> dict[str, tuple[str, ...]]:
    """For each parameter the losses of its block."""
    return {name: block.objectives for block in opt.blocks for name in block.parameters}


# Small blocks. For each parameter how many numbers it has and which losses reach it, and which
# parameter's block it is in, where that is not its own.

Layout = dict[str, tuple[int, str]]
JOINED: dict[str, tuple[Layout, dict[str, str]]] = {
    "fewer numbers than losses": ({"gate": (1, "ab"), "trunk": (6, "abc")}, {"gate": "trunk"}),
    "outnumbered a hundred to one": (
        {"gate": (5, "ab"), "trunk": (500, "abc")},
        {"gate": "trunk"},
    ),
    "the smallest of those large enough": (
        {"gate": (5, "ab"), "other": (900, "abd"), "trunk": (500, "abc")},
        {"gate": "trunk"},
    ),
    "the smallest is not large enough": (
        {"gate": (5, "ab"), "near": (499, "abc"), "far": (600, "abcd")},
        {"gate": "far"},
    ),
    "one that is too small itself is no host": (
        {"gate": (1, "ab"), "near": (2, "abc"), "far": (4, "abcd")},
        {"gate": "far", "near": "far"},
    ),
    "two in one": (
        {"gate": (1, "ab"), "gain": (1, "bc"), "trunk": (6, "abc")},
        {"gate": "trunk", "gain": "trunk"},
    ),
    "none includes its losses": ({"gate": (1, "ab"), "trunk": (600, "bc")}, {}),
    "none is that much larger": ({"gate": (5, "ab"), "trunk": (499, "abc")}, {}),
    "a head": ({"head": (1, "a"), "trunk": (600, "ab")}, {}),
    "a toy": ({"one": (1, "ab"), "two": (2, "abc")}, {}),
}


def drawn(layout: Layout) -> Rows:
    """Gradients in conflict: those of the second loss against those of the first."""
    rows: Rows = {}
    for name, (count, losses) in layout.items():
        common = torch.randn(count, dtype=torch.float64)
        for number, loss in enumerate("abcd"):
            if loss in losses:
                sign = -1.0 if number % 2 else 0.5
                noise = torch.randn(count, dtype=torch.float64)
                rows.setdefault(loss, {})[name] = sign * common + 0.5 * noise
    return dict(sorted(rows.items()))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", JOINED)
def test_small_blocks_join_large_ones(case: str, steps: int) -> None:
    layout, joined = JOINED[case]
    params = params_of({name: count for name, (count, _) in layout.items()})
    opt = optimizer_of(params)
    for _ in range(steps):
        rows = drawn(layout)
        backward(opt, params, rows)
    members: dict[str, list[str]] = {}
    for name in layout:
        members.setdefault(joined.get(name, name), []).append(name)
    for host, names in members.items():
        losses = tuple(layout[host][1])
        (block,) = (block for block in opt.blocks if names[0] in block.parameters)
        assert set(block.parameters) == set(names)
        assert block.objectives == losses
        assert block.numbers == sum(layout[name][0] for name in names)
        block_rows = [
            torch.cat([rows[loss].get(name, torch.zeros_like(params[name].data)) for name in names])
            for loss in losses
        ]
        expected = integrated(block_rows) if len(losses) > 1 else block_rows[0]
        torch.testing.assert_close(torch.cat([grad_of(params[n]) for n in names]), expected)
    text = str(opt.blocks)
    assert all(name in text for name in layout)


def test_blocks_by_hand_stay_as_they_are() -> None:
    layout: Layout = {"gate": (1, "ab"), "trunk": (600, "abc")}
    params = params_of({name: count for name, (count, _) in layout.items()})
    opt = optimizer_of(params, {name: [param] for name, param in params.items()})
    rows = drawn(layout)
    backward(opt, params, rows)
    assert {block.name: block.parameters for block in opt.blocks} == {
        "gate": ("gate",),
        "trunk": ("trunk",),
    }
    for name, (_, losses) in layout.items():
        expected = integrated([rows[loss][name] for loss in losses])
        torch.testing.assert_close(grad_of(params[name]), expected)


def test_a_block_that_stands_still_is_told_of() -> None:
    """One number, two losses that pull it either way, and no block to join."""
    params = params_of({"gate": 1, "trunk": 5})
    opt = optimizer_of(params)
    rows = {
        "a": {"gate": torch.tensor([1.0]).double(), "trunk": torch.ones(5).double()},
        "b": {"gate": torch.tensor([-1.0]).double()},
        "c": {"trunk": torch.ones(5).double()},
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(250):
            backward(opt, params, rows)
    (warning,) = told
    assert "block 'a+b'" in str(warning.message)
    assert not grad_of(params["gate"]).any()


# Zeros within a block.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_a_zero_gradient_is_an_absent_loss(rule: Rule, gone: str) -> None:
    layout: Layout = {"trunk": (5, "abc")}
    params = params_of({"trunk": 5})
    opt = optimizer_of(params, integration=rule, gamma=1.5)
    backward(opt, params, drawn(layout))
    rows = drawn(layout)
    rows[gone]["trunk"].zero_()
    backward(opt, params, rows)
    left = [rows[loss]["trunk"] for loss in "abc" if loss != gone]
    expected = integrated(left, integration=rule, gamma=1.5)
    torch.testing.assert_close(grad_of(params["trunk"]), expected)
    assert objectives(opt) == {"trunk": ("a", "b", "c")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("losses", [2, 4])
def test_the_only_one_left_is_taken_as_it_is(rule: Rule, losses: int) -> None:
    layout: Layout = {"trunk": (5, "abcd"[:losses])}
    params = params_of({"trunk": 5})
    opt = optimizer_of(params, integration=rule, gamma=1.5)
    backward(opt, params, drawn(layout))
    rows = drawn(layout)
    for loss in layout["trunk"][1][1:]:
        rows[loss]["trunk"].zero_()
    backward(opt, params, rows)
    torch.testing.assert_close(grad_of(params["trunk"]), rows["a"]["trunk"])


@pytest.mark.parametrize("rule", RULES)
def test_other_blocks_do_not_mind(rule: Rule) -> None:
    """A loss that is zero in this step does not make one block of two."""
    layout: Layout = {"one": (5, "abc"), "other": (4, "ab")}
    params = params_of({"one": 5, "other": 4})
    opt = optimizer_of(params, integration=rule)
    backward(opt, params, drawn(layout))
    rows = drawn(layout)
    rows["c"]["one"].zero_()
    backward(opt, params, rows)
    for name in layout:
        expected = integrated([rows[loss][name] for loss in "ab"], integration=rule)
        torch.testing.assert_close(grad_of(params[name]), expected)


# The look.


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_zero_at_first_counts_at_once(device: str) -> None:
    params = params_of({"trunk": 5}, device)
    opt = optimizer_of(params)
    rows = {k: {"trunk": row["trunk"].to(device)} for k, row in drawn({"trunk": (5, "ab")}).items()}
    backward(opt, params, rows)
    assert objectives(opt) == {"trunk": ("a", "b")}
    expected = integrated([row["trunk"] for row in rows.values()])
    torch.testing.assert_close(grad_of(params["trunk"]), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("others", ["a", "ab"])
@pytest.mark.parametrize("asleep", [1, 2, 7])
def test_a_loss_that_comes_alive_counts_from_the_next_step(
    device: str, others: str, asleep: int
) -> None:
    """In the step in between its gradient is added, however long it has been zero."""
    params = params_of({"trunk": 5}, device)
    opt = optimizer_of(params)
    for step in range(asleep + 3):
        drawing = drawn({"trunk": (5, others + "d")}).items()
        rows = {loss: {"trunk": row["trunk"].to(device)} for loss, row in drawing}
        gone = step < asleep or step == asleep + 2  # once more, and is not forgotten
        rows["d"]["trunk"] *= not gone
        backward(opt, params, rows)
        known = [rows[loss]["trunk"] for loss in others]
        new = rows["d"]["trunk"]
        if step == asleep + 1:
            expected = integrated([*known, new])
        else:
            expected = (integrated(known) if len(known) > 1 else known[0]) + new
        torch.testing.assert_close(grad_of(params["trunk"]), expected)
        counted = others + "d" if step > asleep else others
        assert objectives(opt) == {"trunk": tuple(counted)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_are_not_remembered(device: str, value: float) -> None:
    params = params_of({"trunk": 5}, device)
    opt = optimizer_of(params)
    for step, factor in enumerate((0.0, value, 0.0, 0.0)):
        drawing = drawn({"trunk": (5, "ab")}).items()
        rows = {loss: {"trunk": row["trunk"].to(device)} for loss, row in drawing}
        rows["b"]["trunk"] = torch.full_like(rows["b"]["trunk"], factor)
        backward(opt, params, rows)
        if step != 1:
            torch.testing.assert_close(grad_of(params["trunk"]), rows["a"]["trunk"])
            assert objectives(opt) == {"trunk": ("a",)}


@pytest.mark.parametrize("kind", ["low rank", "gain of zero", "dead for two steps"])
def test_parameters_that_come_alive_in_a_network(kind: str) -> None:
    up, down = nn.Linear(4, 2).double(), nn.Linear(2, 3).double()
    gain = nn.Parameter(torch.zeros((), dtype=torch.float64))
    if kind == "low rank":
        nn.init.zeros_(down.weight)
    params = [*up.parameters(), *down.parameters(), gain]
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.5))
    known: set[int] = set()
    awoken: set[int] = set()
    for step in range(5):
        x = torch.randn(6, 4, dtype=torch.float64)
        if kind == "dead for two steps" and step < 2:
            x = x * 0 - 1e3 * up.weight.detach().sum(0).sign()
        hidden = up(x).relu() if kind.startswith("dead") else up(x)
        out = down(hidden) * (gain if kind.startswith("gain") else 1 + gain)
        # Both want the gain to grow: in conflict one number would stand still.
        losses = {"a": (out - 1).square().mean(), "b": (out - 3).square().mean()}
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses.values()]
        opt.zero_grad()
        opt.backward(losses)
        known |= awoken  # of the step before
        moved = {i for i, pair in enumerate(zip(*rows, strict=True)) if any(map(Tensor.any, pair))}
        known |= moved if step == 0 else set()
        awoken = moved - known
        block = sorted(known)
        expected = integrated([torch.cat([row[i].flatten() for i in block]) for row in rows])
        found = torch.cat([grad_of(params[i]).flatten() for i in block])
        torch.testing.assert_close(found, expected)
        for i in set(range(len(params))) - known:
            torch.testing.assert_close(grad_of(params[i]), rows[0][i] + rows[1][i])
        opt.step()
    assert known == set(range(len(params)))


# Ways in which training code hands on its losses.


def apart(losses: list[Tensor], _: nn.Module) -> list[Tensor]:
    return losses


def with_all_parameters(losses: list[Tensor], model: nn.Module) -> list[Tensor]:
    return [loss + 0 * sum(p.sum() for p in model.parameters()) for loss in losses]


DELIVERIES: dict[str, Callable[[list[Tensor], nn.Module], Sequence[Tensor]]] = {
    "unbind": lambda losses, _: torch.stack(losses).unbind(),
    "chunk": lambda losses, _: [part[0] for part in torch.stack(losses).chunk(len(losses))],
    "index": lambda losses, _: [torch.stack(losses)[i] for i in range(len(losses))],
    "0 * p.sum()": with_all_parameters,
}


@pytest.mark.parametrize("how", DELIVERIES)
def test_losses_that_went_through_one_tensor_are_as_those_apart(how: str) -> None:
    found = []
    for delivery in (apart, DELIVERIES[how]):
        torch.manual_seed(0)
        model = LateFusion(dtype=torch.float64)
        opt = MMParetoOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1))
        blocks, gradients = [], []
        for _ in range(3):
            losses = model.losses(audio_visual_batch(dtype=torch.float64))
            opt.zero_grad()
            delivered = delivery([*losses.values()], model)
            opt.step(losses=dict(zip(losses, delivered, strict=True)))
            blocks.append([(each.objectives, each.parameters) for each in opt.blocks])
            gradients.append(grads(model))
        found.append((blocks, gradients))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


# What this is for.


class Poisson(nn.Module):
    """u'' = f on [-1, 1], u(-1) = u(1) = 0; neither loss of the equation reaches the last bias."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 16, 16, 1]
        layers = [nn.Linear(*each) for each in pairwise(sizes)]
        self.hidden, self.last = nn.ModuleList(layers[:-1]), layers[-1]
        self.double()
        self.points = torch.linspace(-1, 1, 33, dtype=torch.float64).unsqueeze(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the second derivative, by the chain rule beside the value."""
        value, first, second = x, torch.ones_like(x), torch.zeros_like(x)
        for layer in self.hidden:
            value = layer(value).tanh()
            weight = torch.as_tensor(layer.weight).T
            first, second = first @ weight, second @ weight
            slope = 1 - value.square()
            second = slope * second - 2 * value * slope * first.square()
            first = slope * first
        return self.last(value), second @ self.last.weight.T

    def solution(self) -> Tensor:
        return (torch.pi * self.points).sin() + 0.5 * (1 - self.points.square())

    def losses(self) -> Losses:
        value, second = self(self.points)
        source = -(torch.pi**2) * (torch.pi * self.points).sin() - 1
        return {
            "residual": (second - source).square().mean(),
            "left": value[0].square().sum(),
            "right": value[-1].square().sum(),
        }

    @torch.no_grad()
    def error(self) -> float:
        exact = self.solution()
        return float((self(self.points)[0] - exact).norm() / exact.norm())


def trained(seed: int, steps: int, by_hand: bool) -> Poisson:
    torch.manual_seed(seed)
    net = Poisson()
    blocks = {"net": net} if by_hand else None
    opt = MMParetoOptimizer(torch.optim.Adam(net.parameters(), lr=5e-3), blocks)
    for _ in range(steps):
        opt.zero_grad()
        opt.step(losses=net.losses())
    return net


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
def test_a_physics_informed_network_needs_no_blocks_by_hand() -> None:
    """Its last bias has one number and two losses: by itself it would stand still."""
    first, same = (list(trained(0, 20, by_hand).parameters()) for by_hand in (False, True))
    torch.testing.assert_close(first, same, rtol=1e-6, atol=1e-9)  # one block either way
    pairs = [
        [trained(seed, 400, by_hand).error() for by_hand in (False, True)] for seed in (1, 2, 3)
    ]
    ours, by_hand = torch.tensor(pairs).log().mean(0).exp().tolist()
    assert ours <= 2 * by_hand
