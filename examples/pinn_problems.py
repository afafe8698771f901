"""Four partial differential equations with their losses, solutions and network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Losses = dict[str, Tensor]
Points = dict[str, Tensor]
Box = tuple[tuple[float, float], tuple[float, float]]
GRID = 50  # points a side at which the error is measured


class Network(nn.Module):
    """Points (n, 2) to values (n,), by hidden layers of tanh."""

    def __init__(self, width: int = 50, depth: int = 4) -> None:
        super().__init__()
        sizes = [2, *[width] * depth, 1]
        layers = [nn.Linear(*size) for size in pairwise(sizes)]
        self.hidden, self.last = nn.ModuleList(layers[:-1]), layers[-1]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        for layer in self.hidden:
            points = layer(points).tanh()
        values: Tensor = self.last(points)
        return values.squeeze(-1)

    def derivatives(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n,), first derivatives (2, n) and second ones (2, n), along each coordinate.

        They go through the layers beside the value, by the chain rule: a loss of them takes one
        forward and one backward pass, without the graphs of graphs of nested ``autograd.grad``.
        """
        directions = torch.eye(2).to(points)[:, None].expand(2, *points.shape)
        rows = torch.cat([points[None], directions, torch.zeros_like(directions)])
        for layer in self.hidden:
            inner, d_inner, d2_inner = _through(layer, rows)
            outer = inner.tanh()
            slope = 1 - outer.square()
            first = slope * d_inner
            second = slope * d2_inner - 2 * outer * first * d_inner
            rows = torch.cat([outer, first, second])
        value, first, second = (part.squeeze(-1) for part in _through(self.last, rows))
        return value[0], first, second


def _through(layer: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value with the bias, the derivatives without it."""
    value, first, second = linear(rows, layer.weight).split([1, 2, 2])
    return value + layer.bias, first, second


@dataclass(frozen=True)
class Problem:
    """A domain, its losses at points drawn in it, and its solution."""

    axes: tuple[str, str]
    box: Box
    points: Callable[[int], Points]
    losses: Callable[[Network, Points], Losses]
    solution: Callable[[Tensor], Tensor]

    def grid(self) -> Tensor:
        return torch.cartesian_prod(*(torch.linspace(*side, GRID) for side in self.box))


@torch.no_grad()
def relative_error(problem: Problem, net: Network) -> float:
    """||u - solution|| / ||solution|| on the grid."""
    grid = problem.grid()
    exact = problem.solution(grid)
    return float((net(grid) - exact).norm() / exact.norm())


def inside(box: Box, count: int) -> Tensor:
    """Random points (n, 2), one in each cell of a square grid of at most ``count`` cells.

    So they leave no gaps, and the mean over few of them says much.
    """
    side = isqrt(count)
    corners = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    low, high = torch.tensor(box).unbind(1)
    return low + (high - low) * (corners + torch.rand(side**2, 2)) / side


def on_sides(box: Box, axis: int, sides: tuple[int, ...], count: int) -> Tensor:
    """Random points, ``count`` on each of the box's lower (0) or upper (1) sides along an axis."""
    low, high = box[1 - axis]
    along = (torch.arange(count) + torch.rand(len(sides), count)) / count
    across = torch.tensor([box[axis][side] for side in sides])[:, None].expand_as(along)
    pair = (
        (across, low + (high - low) * along) if axis == 0 else (low + (high - low) * along, across)
    )
    return torch.stack(pair, dim=-1).flatten(0, 1)


# Helmholtz: u_xx + u_yy + u = q, u = 0 on the boundary, solved by sin(pi x) sin(4 pi y).
SQUARE: Box = ((-1, 1), (-1, 1))


def helmholtz_solution(points: Tensor) -> Tensor:
    return (pi * points[:, 0]).sin() * (4 * pi * points[:, 1]).sin()


def helmholtz_points(count: int) -> Points:
    sides = [on_sides(SQUARE, axis, (0, 1), count // 8) for axis in (0, 1)]
    return {"residual": inside(SQUARE, count), "boundary": torch.cat(sides)}


def helmholtz_losses(net: Network, points: Points) -> Losses:
    u, _, second = net.derivatives(points["residual"])
    source = (1 - 17 * pi**2) * helmholtz_solution(points["residual"])
    return {
        "residual": (second.sum(0) + u - source).square().mean(),
        "boundary": net(points["boundary"]).square().mean(),
    }


# Burgers: u_t + u u_x = nu u_xx, u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0; coordinates t, x.
STRIP: Box = ((0, 1), (-1, 1))
VISCOSITY = 0.01 / pi


def burgers_solution(points: Tensor) -> Tensor:
    """By the Cole-Hopf transform and Gauss-Hermite quadrature (Basdevant et al., 1986)."""
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.hermite.hermgauss(200))
    t, x = points.double()[:, :, None].unbind(1)
    shifted = x - (4 * VISCOSITY * t).sqrt() * nodes
    density = weights * (-(pi * shifted).cos() / (2 * pi * VISCOSITY)).exp()
    return (-(density * (pi * shifted).sin()).sum(1) / density.sum(1)).to(points)


def burgers_points(count: int) -> Points:
    return {
        "residual": inside(STRIP, count),
        "boundary": on_sides(STRIP, 1, (0, 1), count // 8),
        "initial": on_sides(STRIP, 0, (0,), count // 4),
    }


def burgers_losses(net: Network, points: Points) -> Losses:
    u, (u_t, u_x), (_, u_xx) = net.derivatives(points["residual"])
    initial = -(pi * points["initial"][:, 1]).sin()
    return {
        "residual": (u_t + u * u_x - VISCOSITY * u_xx).square().mean(),
        "boundary": net(points["boundary"]).square().mean(),
        "initial": (net(points["initial"]) - initial).square().mean(),
    }


# Klein-Gordon: u_tt - u_xx + u^3 = f on the unit square, u, u_t given at t = 0, u at x = 0 and 1;
# solved by x cos(5 pi t) + (t x)^3. Coordinates t, x.
UNIT: Box = ((0, 1), (0, 1))


def klein_gordon_solution(points: Tensor) -> Tensor:
    t, x = points.unbind(1)
    return x * (5 * pi * t).cos() + (t * x) ** 3


def klein_gordon_points(count: int) -> Points:
    return {
        "residual": inside(UNIT, count),
        "boundary": on_sides(UNIT, 1, (0, 1), count // 8),
        "initial": on_sides(UNIT, 0, (0,), count // 4),
    }


def klein_gordon_losses(net: Network, points: Points) -> Losses:
    t, x = points["residual"].unbind(1)
    wave = x * (5 * pi * t).cos()
    source = -25 * pi**2 * wave + 6 * t * x**3 - 6 * x * t**3 + (wave + (t * x) ** 3) ** 3
    u, _, (u_tt, u_xx) = net.derivatives(points["residual"])
    start, (start_t, _), _ = net.derivatives(points["initial"])
    boundary = net(points["boundary"]) - klein_gordon_solution(points["boundary"])
    at_rest = (start - points["initial"][:, 1]).square().mean() + start_t.square().mean()
    return {
        "residual": (u_tt - u_xx + u**3 - source).square().mean(),
        "boundary": boundary.square().mean(),
        "initial": at_rest,
    }


# Poisson: u_xx + u_yy = q, u = 0 on the boundary, solved by sin(pi x) sin(pi y). The residual has
# derivatives alone, and the last bias is reached by the two losses of the boundary only.
def poisson_solution(points: Tensor) -> Tensor:
    return (pi * points).sin().prod(-1)


def poisson_points(count: int) -> Points:
    return {
        "residual": inside(SQUARE, count),
        "sides": on_sides(SQUARE, 0, (0, 1), count // 8),
        "ends": on_sides(SQUARE, 1, (0, 1), count // 8),
    }


def poisson_losses(net: Network, points: Points) -> Losses:
    _, _, second = net.derivatives(points["residual"])
    source = -2 * pi**2 * poisson_solution(points["residual"])
    return {
        "residual": (second.sum(0) - source).square().mean(),
        "sides": net(points["sides"]).square().mean(),
        "ends": net(points["ends"]).square().mean(),
    }


PROBLEMS = {
    "helmholtz": Problem(
        ("x", "y"), SQUARE, helmholtz_points, helmholtz_losses, helmholtz_solution
    ),
    "burgers": Problem(("t", "x"), STRIP, burgers_points, burgers_losses, burgers_solution),
    "klein_gordon": Problem(
        ("t", "x"), UNIT, klein_gordon_points, klein_gordon_losses, klein_gordon_solution
    ),
    "poisson": Problem(("x", "y"), SQUARE, poisson_points, poisson_losses, poisson_solution),
}
