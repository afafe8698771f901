"""The trainings of physics.py: several seeds of one method at once, as stacked networks.

The rules are the package's, on Gram matrices that are made here: Euclidean, or *in the metric* of
the optimizer's step, ``G_ij = g_i' W g_j`` with ``W = 1 / (sqrt(v) + eps)`` of Adam's last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import cos, pi
from typing import Any

import torch
from physics_problems import CONSTRAINED, EQUATIONS, Equation
from pinn_problems import Network
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mmpareto_optim import (
    config_coefficients,
    dualproj_coefficients,
    mmpareto_coefficients,
    upgrad_coefficients,
)

Result = dict[str, Any]
Rule = Callable[[Tensor], Tensor]

POINTS = 196  # of a residual, drawn anew in each step
CHUNK = 100  # steps whose points are drawn at once
WORST_ERROR = 1e3  # what a diverged training counts as
SUM, GRADIENT_NORMS, HARD = "sum", "gradient norms", "hard constraints"
WEIGHTS = {f"weight {w:g}": w for w in (1e-2, 1e-1, 1e1, 1e2, 1e3, 1e4)}
RULES: dict[str, Rule] = {
    "MMPareto": lambda gram: mmpareto_coefficients(gram, gamma=1.0),
    "ConFIG": config_coefficients,
    "dual projection": dualproj_coefficients,
    "UPGrad": upgrad_coefficients,
}
IN_METRIC = {f"{name}, metric": name for name in RULES}
CONSTANT = {f"constant, {name}": name for name in (*RULES, *IN_METRIC)}
METHODS = (SUM, *WEIGHTS, GRADIENT_NORMS, *RULES, *IN_METRIC, HARD)
BASES = {"Adam": 0.9, "Adam, momentum 0.5": 0.5, "Adam, momentum 0": 0.0, "SOAP": 0.95}


@dataclass(frozen=True)
class Job:
    """Some seeds of one method; ``coefficients`` (a row a seed) of a method that holds them."""

    equation: str
    base: str
    method: str
    lr: float
    seeds: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...] = field(default=(), compare=False)

    @property
    def cost(self) -> float:
        slow = 2.5 if self.base == "SOAP" else 1.0
        return slow * len(self.seeds) * EQUATIONS[self.equation].seconds


class Conditions(nn.Module):
    """The losses of one network, as a module that ``functional_call`` takes."""

    def __init__(self, equation: str, hard: bool) -> None:
        super().__init__()
        self.equation = EQUATIONS[equation]
        self.net = CONSTRAINED[equation]() if hard else self.equation.network()

    def forward(self, points: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.equation.losses(self.net, points)


@lru_cache
def differentiated(equation: str, hard: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Parameters (seeds, n) and points to gradients (seeds, losses, n) and losses."""
    conditions = Conditions(equation, hard)
    shapes = {name: param.shape for name, param in conditions.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    names = loss_names(equation, hard)
    conditions.to("meta")

    def one_loss(flat: Tensor, points: dict[str, Tensor], name: str) -> Tensor:
        pieces = zip(shapes.items(), flat.split(sizes), strict=True)
        params = {key: piece.view(shape) for (key, shape), piece in pieces}
        loss: Tensor = functional_call(conditions, params, (points,))[name]
        return loss

    def all_losses(flat: Tensor, points: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = [grad_and_value(one_loss)(flat, points, name) for name in names]
        return torch.stack([row for row, _ in found]), torch.stack([loss for _, loss in found])

    return torch.compile(vmap(all_losses), dynamic=False)


@lru_cache
def loss_names(equation: str, hard: bool) -> tuple[str, ...]:
    with torch.random.fork_rng():
        losses = Conditions(equation, hard)(EQUATIONS[equation].points(POINTS))
    return ("residual",) if hard else tuple(losses)


def networks(job: Job) -> list[Network]:
    """One for each seed, which alone decides the start."""
    found = []
    for seed in job.seeds:
        torch.manual_seed(seed)
        found.append(Conditions(job.equation, job.method == HARD).net)
    return found


def drawn(equation: Equation, seeds: tuple[int, ...], chunk: int) -> dict[str, Tensor]:
    """Points of some steps, (steps, seeds, n, 2): a seed's are the same for every method."""
    found = []
    for seed in seeds:
        torch.manual_seed(10_000 * (chunk + 1) + seed)
        draw = vmap(lambda _: equation.points(POINTS), randomness="different")
        found.append(draw(torch.zeros(CHUNK)))
    return {name: torch.stack([points[name] for points in found], 1) for name in found[0]}


def base_of(job: Job, theta: Tensor, shapes: list[torch.Size]) -> torch.optim.Optimizer:
    """Adam works by element, on the stack; SOAP by matrix, on parameters that are views of it."""
    if job.base != "SOAP":
        return torch.optim.Adam([nn.Parameter(theta)], job.lr, betas=(BASES[job.base], 0.999))
    from pytorch_optimizer import SOAP

    return SOAP([nn.Parameter(view) for view in views(theta, shapes)], job.lr, weight_decay=0.0)


def views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    sizes = [shape.numel() for shape in shapes]
    pieces = [zip(row.split(sizes), shapes, strict=True) for row in flat]
    return [piece.view(shape) for row in pieces for piece, shape in row]


class Coefficients:
    """By step the coefficients (seeds, losses) of one method."""

    def __init__(self, job: Job, base: torch.optim.Optimizer, count: int) -> None:
        self.job, self.base, self.steps = job, base, 0
        self.fixed = torch.ones(len(job.seeds), count, dtype=torch.float64)
        if job.method in WEIGHTS:
            self.fixed[:, 1:] = WEIGHTS[job.method]
        elif job.method in CONSTANT:
            self.fixed = torch.tensor(job.coefficients, dtype=torch.float64)
        self.rule = RULES.get(IN_METRIC.get(job.method, job.method))

    def __call__(self, rows: Tensor) -> Tensor:
        self.steps += 1
        if self.rule is not None:
            return self.rule(self.gram(rows))
        if self.job.method == GRADIENT_NORMS and self.steps % 10 == 1:
            self._balance(rows)
        return self.fixed

    def gram(self, rows: Tensor) -> Tensor:
        """(seeds, losses, losses), in the metric of Adam's last step if the method asks for it."""
        state = next(iter(self.base.state.values()), None)
        if self.job.method not in IN_METRIC or not state:
            return rows @ rows.mT
        group = self.base.param_groups[0]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        lengths: Tensor = corrected.sqrt() + group["eps"]
        return (rows / lengths.unsqueeze(1)) @ rows.mT

    def _balance(self, rows: Tensor) -> None:
        """Weights that make gradients equally long (Wang et al. 2023, arXiv 2308.08468, 3.2)."""
        norms = torch.linalg.vector_norm(rows, dim=-1).clamp(min=1e-30)
        weights = norms.sum(-1, keepdim=True) / norms
        self.fixed = weights if self.steps == 1 else 0.9 * self.fixed + 0.1 * weights


class Watch:
    """Means over a training, by seed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sums: dict[str, Tensor] = {}
        self.last: list[Tensor] = []

    def add(
        self,
        rows: Tensor,
        losses: Tensor,
        coefficients: Tensor,
        direction: Tensor,
        change: Tensor,
    ) -> None:
        """Of one step: gradients and what became of them, and how the parameters changed."""
        raised_by_step = (rows @ change.unsqueeze(-1)).squeeze(-1) > 0
        raised_by_direction = (rows @ direction.unsqueeze(-1)).squeeze(-1) < -1e-6 * (
            torch.linalg.vector_norm(rows, dim=-1) * direction.norm(dim=-1, keepdim=True)
        )
        self._sum("steps that raise a loss", raised_by_step.any(1))
        self._sum("raised by steps", raised_by_step)
        self._sum("directions that raise a loss", raised_by_direction.any(1))
        self._sum("step length", change.norm(dim=-1))
        self._sum("coefficients", coefficients)
        self.last = [*self.last[1 - CHUNK :], losses]

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value.double() + self.sums.get(name, 0)

    def result(self, seed: int) -> Result:
        found = {name: short(total[seed] / self.steps) for name, total in self.sums.items()}
        return found | {"losses": short(torch.stack(self.last).mean(0)[seed])}


def short(values: Tensor) -> Any:
    numbers = [float(f"{value:.4g}") for value in values.flatten().tolist()]
    return numbers if values.ndim else numbers[0]


def train(job: Job) -> list[Result]:
    """By seed the error at the end, and what the steps were."""
    torch.set_num_threads(1)  # the result must not depend on the number of cores
    equation = EQUATIONS[job.equation]
    nets = networks(job)
    shapes = [param.shape for param in nets[0].parameters()]
    theta = torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets])
    base = base_of(job, theta, shapes)
    params = base.param_groups[0]["params"]
    gradients = differentiated(job.equation, job.method == HARD)
    coefficients_of = Coefficients(job, base, len(loss_names(job.equation, job.method == HARD)))
    watch = Watch(equation.steps)
    for step in range(equation.steps):
        if step % CHUNK == 0:
            points = drawn(equation, job.seeds, step // CHUNK)
        base.param_groups[0]["lr"] = job.lr * (1 + cos(pi * step / equation.steps)) / 2
        rows, losses = gradients(theta, {name: part[step % CHUNK] for name, part in points.items()})
        rows = rows.double()
        coefficients = coefficients_of(rows)
        direction = (coefficients.unsqueeze(-1) * rows).sum(1)
        result = direction.float()
        grads = [result] if len(params) == 1 else views(result, shapes)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        before = theta.double()
        base.step()
        watch.add(rows, losses, coefficients, direction, theta.double() - before)
    return [scored(equation, net, theta[i]) | watch.result(i) for i, net in enumerate(nets)]


def scored(equation: Equation, net: Network, flat: Tensor) -> Result:
    vector_to_parameters(flat, net.parameters())
    error = equation.error(net)
    return {"error": float(f"{min(error, WORST_ERROR):.4g}") if error == error else WORST_ERROR}
