"""The equations of physics.py: three of examples/pinn_problems.py and an inverse problem.

Each also with *hard constraints*, where boundary and initial conditions hold by construction and
the residual is the only loss; not the inverse problem, whose data are noisy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from pinn_problems import (
    PROBLEMS,
    STRIP,
    VISCOSITY,
    Losses,
    Network,
    Points,
    burgers_solution,
    inside,
    relative_error,
)

SENSORS, NOISE = 200, 0.02


Jet = tuple[Tensor, Tensor, Tensor]  # values (n,), first and second derivatives (2, n) by axis


class ConstrainedNetwork(Network):
    """``factor(x) * network(x) + lift(x)``: what the factor leaves at the sides is the lift."""

    def __init__(self, factor: Callable[[Tensor], Jet], lift: Callable[[Tensor], Jet]) -> None:
        super().__init__()
        self.factor, self.lift = factor, lift

    def forward(self, points: Tensor) -> Tensor:
        return self.factor(points)[0] * super().forward(points) + self.lift(points)[0]

    def derivatives(self, points: Tensor) -> Jet:
        value, first, second = super().derivatives(points)
        factor, d_factor, d2_factor = self.factor(points)
        lift, d_lift, d2_lift = self.lift(points)
        return (
            factor * value + lift,
            d_factor * value + factor * first + d_lift,
            d2_factor * value + 2 * d_factor * first + factor * second + d2_lift,
        )


def product(one: Tensor, other: Tensor) -> Jet:
    """Of a function of the first coordinate and one of the second, each (3, n) with derivatives."""
    return (
        one[0] * other[0],
        torch.stack([one[1] * other[0], one[0] * other[1]]),
        torch.stack([one[2] * other[0], one[0] * other[2]]),
    )


def added(*jets: Jet) -> Jet:
    value, first, second = (sum(parts[1:], parts[0]) for parts in zip(*jets, strict=True))
    return value, first, second


def power(x: Tensor, exponent: int) -> Tensor:
    """(3, n): the power with its derivatives."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([[one, zero, zero], [x, one, zero], [x * x, 2 * x, 2 * one]][exponent])


def bubble(x: Tensor) -> Tensor:
    return power(x, 0) - power(x, 2)


def wave(t: Tensor) -> Tensor:
    """cos(5 pi t) + t^3 - 1, what Klein-Gordon has at x = 1 less what it has at t = 0."""
    phase, k = 5 * pi * t, 5 * pi
    return torch.stack(
        [
            phase.cos() + t**3 - 1,
            -k * phase.sin() + 3 * t.square(),
            -(k**2) * phase.cos() + 6 * t,
        ]
    )


def start(x: Tensor) -> Tensor:
    """-sin(pi x), where Burgers begins."""
    return torch.stack(
        [-(pi * x).sin(), -pi * (pi * x).cos(), pi**2 * (pi * x).sin()],
    )


def helmholtz_network() -> ConstrainedNetwork:
    return ConstrainedNetwork(
        lambda p: product(bubble(p[:, 0]), bubble(p[:, 1])),
        lambda p: product(0 * power(p[:, 0], 0), power(p[:, 1], 0)),
    )


def burgers_network() -> ConstrainedNetwork:
    return ConstrainedNetwork(
        lambda p: product(power(p[:, 0], 1), bubble(p[:, 1])),
        lambda p: product(power(p[:, 0], 0), start(p[:, 1])),
    )


def klein_gordon_network() -> ConstrainedNetwork:
    """The lift has x^2 at the wave; with x it would nearly be the solution."""
    return ConstrainedNetwork(
        lambda p: product(power(p[:, 0], 2), power(p[:, 1], 1) - power(p[:, 1], 2)),
        lambda p: added(
            product(power(p[:, 0], 0), power(p[:, 1], 1)),
            product(wave(p[:, 0]), power(p[:, 1], 2)),
        ),
    )


CONSTRAINED: dict[str, Callable[[], Network]] = {
    "helmholtz": helmholtz_network,
    "burgers": burgers_network,
    "klein_gordon": klein_gordon_network,
}


# The inverse problem: u_t + a u u_x = nu u_xx with unknown a and nu, and u known at 200 points
# with noise of 0.02 (Raissi et al. 2019, Section 4.1.2, with noise relative to the largest value).
class InverseNetwork(Network):
    def __init__(self) -> None:
        super().__init__()
        self.advection = nn.Parameter(torch.zeros(()))
        self.log_viscosity = nn.Parameter(torch.tensor(math.log(0.05)))


def _sensors() -> tuple[Tensor, Tensor]:
    """The same for every seed: they are the data. Points (n, 2) and values (n,)."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(STRIP).unbind(1)
    points = low + (high - low) * torch.rand(SENSORS, 2, generator=generator)
    noise = NOISE * torch.randn(SENSORS, generator=generator)
    return points, burgers_solution(points) + noise


MEASURED_AT, MEASURED = _sensors()


def inverse_losses(net: InverseNetwork, points: Points) -> Losses:
    u, (u_t, u_x), (_, u_xx) = net.derivatives(points["residual"])
    residual = u_t + net.advection * u * u_x - net.log_viscosity.exp() * u_xx
    return {
        "residual": residual.square().mean(),
        "data": (net(MEASURED_AT) - MEASURED).square().mean(),
    }


@torch.no_grad()
def coefficient_error(net: InverseNetwork) -> float:
    """Root mean square of the two coefficients' relative errors."""
    viscosity = float(net.log_viscosity.exp()) / VISCOSITY - 1
    return math.hypot(float(net.advection) - 1, viscosity) / math.sqrt(2)


@dataclass(frozen=True)
class Equation:
    """What physics.py trains; ``seconds`` a seed's training, roughly, on one core."""

    title: str
    steps: int
    seconds: float
    points: Callable[[int], Points]
    losses: Callable[[Network, Points], Losses]
    error: Callable[[Network], float]
    network: Callable[[], Network] = Network


def _of_examples(name: str, title: str, steps: int, seconds: float) -> Equation:
    problem = PROBLEMS[name]

    def error(net: Network) -> float:
        return relative_error(problem, net)

    return Equation(title, steps, seconds, problem.points, problem.losses, error)


EQUATIONS: dict[str, Equation] = {
    "helmholtz": _of_examples("helmholtz", "Helmholtz", 2000, 4),
    "klein_gordon": _of_examples("klein_gordon", "Klein-Gordon", 2000, 5),
    "burgers": _of_examples("burgers", "Burgers", 3000, 8),
    "inverse": Equation(
        "Burgers, inverse",
        2000,
        5,
        lambda count: {"residual": inside(STRIP, count)},
        inverse_losses,  # type: ignore[arg-type]
        coefficient_error,  # type: ignore[arg-type]
        InverseNetwork,
    ),
}
