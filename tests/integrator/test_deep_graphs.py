"""Graphs so deep that PyTorch ends the process where all of their nodes were looked at."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.models import grads

UNROLLED = """
import torch
from torch import nn
from mmpareto_optim import MMParetoOptimizer

cell, one, other = nn.LSTMCell(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)
params = [*cell.parameters(), *one.parameters(), *other.parameters()]
opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1))
for _ in range(2):
    state = torch.zeros(1, 3), torch.zeros(1, 3)
    for _ in range(6_000):
        state = cell(torch.ones(1, 2), state)
    opt.zero_grad()
    opt.step(losses={"one": one(state[0]).sum(), "other": other(state[0]).square().sum()})
    del state
print(*opt.stats)
"""


def test_a_cell_unrolled_many_times() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNROLLED], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["one+other"]


def deep(encoder: nn.Module, operations: int) -> Tensor:
    z: Tensor = encoder(torch.ones(4, 3))
    for _ in range(operations):
        z = z + 0.0
    return z


@pytest.mark.parametrize("operations", [100, 5000])
def test_features_of_a_deep_encoder(operations: int) -> None:
    """Right, or refused: its parameters must not count both as a head's and as an encoder's."""
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)])
    encoder, one, other = model
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), integration="uniform")
    z = deep(encoder, operations)
    losses = {"one": one(z).square().sum(), "other": other(z).square().sum()}
    if operations > 3000:
        with pytest.raises(ValueError, match=r"deep.*leave features out"):
            opt.backward(losses, features={"z": z})
        assert all(param.grad is None for param in model.parameters())
        return
    opt.backward(losses, features={"z": z})
    found = grads(model)
    opt.zero_grad()
    z = deep(encoder, operations)
    (one(z).square().sum() + other(z).square().sum()).backward()
    torch.testing.assert_close(found, grads(model))
