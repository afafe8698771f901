"""Physics-informed networks: derivatives, the three problems, and short runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.examples.running import EXAMPLES

pytest.importorskip("sklearn", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

import pinn
from pinn_problems import PROBLEMS, Network, Problem, relative_error


@pytest.fixture
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_autograd(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    (first,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    second = [
        torch.autograd.grad(first[:, axis].sum(), points, retain_graph=True)[0][:, axis]
        for axis in (0, 1)
    ]
    return first.T, torch.stack(second)


class Solved:
    """The solution in the place of a network."""

    def __init__(self, problem: Problem) -> None:
        self.solution = problem.solution

    def __call__(self, points: Tensor) -> Tensor:
        return self.solution(points)

    def derivatives(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = points.detach().requires_grad_()
        values = self.solution(points)
        return values, *by_autograd(values, points)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("depth", [1, 4])
def test_derivatives_are_those_of_autograd(depth: int) -> None:
    net = Network(width=7, depth=depth)
    points = torch.randn(11, 2, requires_grad=True)
    values, first, second = net.derivatives(points)
    torch.testing.assert_close(values, net(points))
    expected = by_autograd(net(points), points)
    torch.testing.assert_close((first, second), expected)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_meets_every_condition(name: str) -> None:
    problem = PROBLEMS[name]
    solved = Solved(problem)
    for loss in problem.losses(solved, problem.points(256)).values():  # type: ignore[arg-type]
        assert float(loss.detach()) < 1e-20
    assert relative_error(problem, solved) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROBLEMS)
def test_points_lie_where_they_should(name: str) -> None:
    problem = PROBLEMS[name]
    low, high = torch.tensor(problem.box).unbind(1)
    for condition, points in problem.points(64).items():
        assert bool(((points >= low) & (points <= high)).all())
        on_edge = ((points == low) | (points == high)).any(1)
        assert condition == "residual" or bool(on_edge.all())
    inside = problem.points(64)["residual"]
    cells = ((inside - low) / (high - low) * 8).long()
    assert len(cells.unique(dim=0)) == 64  # one in each cell


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n != "burgers" else []) for n in PROBLEMS],
)
def test_all_methods_run(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "pinn.py"), "--problem", name]
    command += ["--steps", "3", "--seeds", "2", "--points", "16", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"pinn_{name}.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / f"pinn_{name}.json").read_text())["runs"]
    assert set(runs) == set(pinn.METHODS)
    for seeds in runs.values():
        assert [len(run["errors"]) for run in seeds] == [3, 3]
        assert all(0 <= run["harmful"] <= run["conflict"] <= 100 for run in seeds)


@pytest.mark.filterwarnings("ignore:LBFGS takes .grad")
@pytest.mark.parametrize("method", ["sum", "MMPareto"])
def test_lbfgs_by_closure(method: str) -> None:
    """A few steps, each of up to 20 evaluations, on fixed points; the sum halves the error."""
    arguments = ["--optimizer", "lbfgs", "--steps", "3", "--points", "64", "--problem", "burgers"]
    options = pinn.parse_options(arguments)
    assert options.methods == ["sum", pinn.WEIGHTED]
    problem = PROBLEMS["burgers"]
    torch.manual_seed(0)
    before = relative_error(problem, Network())
    torch.manual_seed(0)
    run = pinn.train(problem, method, options, lambda: None)
    assert len(run.errors) == 3
    assert run.errors[-1] < (0.9 * before if method == "sum" else torch.inf)


def test_a_step_whose_sum_harms_a_loss_is_told_from_a_conflict() -> None:
    agreeing = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    harmless = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    harmful = torch.tensor([[0.1, -0.2], [-0.2, 1.0]])
    assert pinn.shares([agreeing, agreeing, harmless, harmful]) == (50, 25)
