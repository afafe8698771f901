"""The experiment on the metric: stacked trainings against single ones, the race, the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import physics_runs
import pytest
import torch
from physics_finished import FIRST, RATES, SECOND, Finished
from physics_problems import CONSTRAINED, EQUATIONS, InverseNetwork, coefficient_error
from physics_runs import POINTS, Job, drawn, train
from pinn_problems import PROBLEMS
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer


@pytest.fixture(autouse=True)
def _short_and_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling takes longer than these few steps."""

    def as_it_is(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    for name, equation in EQUATIONS.items():
        monkeypatch.setitem(EQUATIONS, name, replace(equation, steps=4))
    threads = torch.get_num_threads()
    physics_runs.differentiated.cache_clear()
    yield
    physics_runs.differentiated.cache_clear()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("Adam", "sum"),
        ("Adam", "weight 10"),
        ("Adam", "UPGrad"),
        ("Adam", "MMPareto"),
        ("SOAP", "UPGrad"),
    ],
)
def test_a_stacked_training_is_that_of_the_package(equation: str, base: str, method: str) -> None:
    """Each of two seeds ends with the error that ``MMParetoOptimizer`` reaches by itself."""
    job = Job(equation, base, method, 1e-2, (3, 4))
    rule = {"UPGrad": "upgrad", "MMPareto": "mmpareto"}.get(method, "uniform")
    for i, result in enumerate(train(job)):
        torch.manual_seed(job.seeds[i])
        net = EQUATIONS[equation].network()
        optimizer_of: Any = torch.optim.Adam
        if base == "SOAP":
            optimizer_of = pytest.importorskip("pytorch_optimizer").SOAP
        made = optimizer_of(net.parameters(), job.lr, weight_decay=0.0)
        block = {"net": net} if rule != "uniform" else None
        gamma = 1.0 if rule == "mmpareto" else None
        optimizer = MMParetoOptimizer(made, block, integration=rule, gamma=gamma)
        points = drawn(EQUATIONS[equation], job.seeds, 0)
        for step in range(4):
            made.param_groups[0]["lr"] = job.lr * (1 + math.cos(math.pi * step / 4)) / 2
            at = {name: part[step, i] for name, part in points.items()}
            losses = EQUATIONS[equation].losses(net, at)
            if method == "weight 10":
                losses = {k: v if k == "residual" else 10 * v for k, v in losses.items()}
            optimizer.zero_grad()
            optimizer.step(losses=losses)
        # SOAP's eigenbases make more of float32's rounding.
        tolerance = 2e-2 if base == "SOAP" else 2e-3
        assert result["error"] == pytest.approx(EQUATIONS[equation].error(net), rel=tolerance)


def test_coefficients_in_the_metric_promise_what_the_metric_measures() -> None:
    job = Job("burgers", "Adam", "UPGrad, metric", 1e-2, (0, 1, 2))
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(3, 50))
    adam = torch.optim.Adam([theta], eps=1e-8)
    coefficients_of = physics_runs.Coefficients(job, adam, 3)
    for _ in range(5):
        rows = torch.randn(3, 3, 50).double() * torch.logspace(-3, 3, 50)
        state = adam.state.get(theta)
        h = (coefficients_of(rows).unsqueeze(-1) * rows).sum(1)
        metric = torch.ones_like(h)
        if state:
            metric = 1 / ((state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8)
        products = (rows @ (metric * h).unsqueeze(-1)).squeeze(-1)
        assert (products >= -1e-6 * products.abs().max()).all()
        theta.grad = h.float()
        adam.step()


@pytest.mark.parametrize("equation", CONSTRAINED)
def test_hard_constraints_hold_and_derivatives_are_right(equation: str) -> None:
    torch.manual_seed(0)
    net, problem = CONSTRAINED[equation](), PROBLEMS[equation]
    points = problem.points(POINTS)
    losses = problem.losses(net, points)
    assert all(losses[name].item() < 1e-10 for name in losses if name != "residual")
    net.double()
    x = points["residual"].double().requires_grad_()
    value, first, second = net.derivatives(x)
    (slopes,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    curvatures = [
        torch.autograd.grad(slopes[:, axis].sum(), x, retain_graph=True)[0][:, axis]
        for axis in range(2)
    ]
    torch.testing.assert_close(value, net(x))
    torch.testing.assert_close(first, slopes.mT)
    torch.testing.assert_close(second, torch.stack(curvatures))


def test_the_inverse_problem_is_judged_by_its_coefficients() -> None:
    net = InverseNetwork()
    with torch.no_grad():
        net.advection.fill_(1.1)
        net.log_viscosity.fill_(math.log(0.01 / math.pi))
    assert coefficient_error(net) == pytest.approx(0.1 / math.sqrt(2), rel=1e-4)


def test_points_are_a_seeds_own() -> None:
    equation = EQUATIONS["helmholtz"]
    together, alone = drawn(equation, (5, 6), 2), drawn(equation, (6,), 2)
    for name, points in alone.items():
        assert torch.equal(together[name][:, 1], points[:, 0])
    assert not torch.equal(together["residual"][0], together["residual"][1])


def result(error: float) -> dict[str, Any]:
    return {"error": error, "coefficients": [1.0, 2.0]}


def test_the_race_and_the_rates(tmp_path: Path) -> None:
    """Rates by the first round, then by both for the best two; the far behind are left out."""
    finished = Finished(tmp_path / "runs.jsonl")
    for job in finished.first_round("helmholtz", "Adam"):
        error = {"weight 10": 0.1, "weight 100": 0.2, "weight 0.01": 9.0}.get(job.method, 0.31)
        finished.keep(job, [result(error * (1 + RATES.index(job.lr)))] * len(FIRST))
    race = finished.race("helmholtz", "Adam")
    assert "weight 100" in race
    assert "weight 0.01" not in race
    assert "sum" in race  # for comparison, however bad
    second = list(finished.second_round("helmholtz", "Adam"))
    assert {job.lr for job in second} == set(RATES[:2])
    for job in second:
        finished.keep(job, [result(0.05 if job.lr == RATES[1] else 0.3)] * len(SECOND))
    assert finished.lr("helmholtz", "Adam", "weight 10") == RATES[1]
    assert finished.lr("helmholtz", "Adam", "weight 0.01") == RATES[0]

    again = Finished(tmp_path / "runs.jsonl")
    assert again.runs == finished.runs
    assert all(job in again for job in second)


def test_balanced_gradients_are_equally_long() -> None:
    job = Job("burgers", "Adam", "gradient norms", 1e-2, (0,))
    coefficients_of = physics_runs.Coefficients(job, torch.optim.Adam([nn.Parameter(Tensor(1))]), 3)
    rows = torch.randn(1, 3, 20).double() * torch.tensor([1.0, 10.0, 1e-3])[:, None]
    lengths = (coefficients_of(rows).unsqueeze(-1) * rows).norm(dim=-1)
    torch.testing.assert_close(lengths, rows.norm(dim=-1).sum().expand(1, 3))


def test_the_page_says_better_only_if_interval_and_test_agree() -> None:
    page = pytest.importorskip("physics_page", reason="the benchmarks extra is not installed")
    random = torch.Generator().manual_seed(0)
    theirs = torch.rand(20, generator=random).add(1)
    found = page.factor("helmholtz", "sum", (0.5 * theirs).tolist(), theirs.tolist())
    assert found.verdict == "better"
    assert str(found).startswith("x 0.50 [0.50, 0.50]")
    assert replace(found, p=0.06).verdict == "undecided"
    assert replace(found, high=1.1).verdict == "undecided"
