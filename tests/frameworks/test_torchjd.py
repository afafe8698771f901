"""TorchJD's weightings as ``integration=``: its own results, block by block."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, vectors_as_losses

pytest.importorskip("torchjd", reason="the integrations extra is not installed")
from torchjd import aggregation
from torchjd.autojac import backward, jac_to_grad

# Name of the aggregator, and what it and its weighting are built with.
RULES: dict[str, dict[str, Any]] = {
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "Constant": {"weights": torch.tensor([0.2, 0.3, 0.5])},
    "DualProj": {},
    "IMTLG": {},
    "Krum": {"n_byzantine": 0},
    "MGDA": {},
    "Mean": {},
    "PCGrad": {},
    "Random": {},
    "Sum": {},
    "UPGrad": {},
}
# Optional dependencies of TorchJD's own.
NEEDS = {"CAGrad": "cvxpy", "DualProj": "quadprog", "UPGrad": "quadprog"}


def pair(rule: str) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The weighting, from a Gram matrix, and the aggregator, from a Jacobian."""
    if rule in NEEDS:
        pytest.importorskip(NEEDS[rule])
    options = RULES[rule]
    weighting = getattr(aggregation, f"{rule}Weighting")(**options)
    return weighting, getattr(aggregation, rule)(**options)


def wrapped(params: Any, integration: Callable[[Tensor], Tensor]) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(params, lr=0.1), integration=integration)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_same_aggregation_of_a_jacobian(rule: str, seed: int) -> None:
    weighting, aggregator = pair(rule)
    jacobian = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    param = nn.Parameter(torch.zeros(6))
    opt = wrapped([param], weighting)
    torch.manual_seed(seed)  # PCGrad and Random draw
    opt.backward(vectors_as_losses(param, jacobian))
    torch.manual_seed(seed)
    # CAGrad's own solver stops at about 1e-5.
    torch.testing.assert_close(param.grad, aggregator(jacobian), atol=1e-5, rtol=1e-3)


class SharedTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def losses(self, x: Tensor, labels: Tensor) -> Losses:
        features = self.trunk(x)
        return {
            f"task{i}": cross_entropy(head(features), labels[i])
            for i, head in enumerate(self.heads)
        }


@pytest.mark.parametrize("rule", RULES)
def test_the_same_gradients_of_a_shared_trunk(rule: str) -> None:
    """TorchJD's own backward is the oracle on the trunk; heads get their plain gradient."""
    weighting, aggregator = pair(rule)
    model, x, labels = SharedTrunk(), torch.randn(16, 5), torch.randint(3, (3, 16))
    theirs = deepcopy(model)
    torch.manual_seed(1)
    wrapped(model.parameters(), weighting).backward(model.losses(x, labels))

    trunk = list(theirs.trunk.parameters())
    torch.manual_seed(1)
    backward(list(theirs.losses(x, labels).values()), inputs=trunk)
    jac_to_grad(trunk, aggregator)
    for found, expected in zip(model.trunk.parameters(), trunk, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-3)
    torch.stack(list(theirs.losses(x, labels).values())).sum().backward()
    for found, expected in zip(model.heads.parameters(), theirs.heads.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("rule", ["MGDA", "PCGrad", "UPGrad", "CAGrad"])
def test_each_encoder_is_a_block_of_its_own(rule: str) -> None:
    weighting, aggregator = pair(rule)
    model, batch = LateFusion(), audio_visual_batch()
    theirs = deepcopy(model)
    torch.manual_seed(1)
    wrapped(model.parameters(), weighting).backward(model.losses(batch))
    torch.manual_seed(1)
    losses = theirs.losses(batch)
    for modality in ("audio", "visual"):
        encoder = list(theirs.get_submodule(modality).parameters())
        backward([losses["mm"], losses[modality]], inputs=encoder, retain_graph=True)
        jac_to_grad(encoder, aggregator)
        ours = model.get_submodule(modality).parameters()
        for found, expected in zip(ours, encoder, strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-3)


def test_a_weighting_with_a_memory_serves_one_block() -> None:
    """Over several steps, as TorchJD's own aggregator that remembers as well."""
    weighting, aggregator = aggregation.GradVacWeighting(), aggregation.GradVac()
    model = SharedTrunk()
    theirs = deepcopy(model)
    opt = wrapped(model.parameters(), weighting)
    for _ in range(3):
        x, labels = torch.randn(16, 5), torch.randint(3, (3, 16))
        opt.zero_grad()
        torch.manual_seed(1)
        opt.backward(model.losses(x, labels))
        theirs.zero_grad()
        trunk = list(theirs.trunk.parameters())
        torch.manual_seed(1)
        backward(list(theirs.losses(x, labels).values()), inputs=trunk)
        jac_to_grad(trunk, aggregator)
        for found, expected in zip(model.trunk.parameters(), trunk, strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_a_weighting_with_a_memory_has_one_for_each_block() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    weighting = aggregation.GradVacWeighting()
    opt = wrapped(model.parameters(), weighting)
    alone = {
        name: wrapped([*getattr(twin, name).parameters()], aggregation.GradVacWeighting())
        for name in ("audio", "visual")
    }
    for _ in range(3):
        opt.zero_grad()
        torch.manual_seed(1)
        opt.backward(model.losses(batch))
        for name, single in alone.items():
            single.zero_grad()
            torch.manual_seed(1)
            single.backward(twin.losses(batch))
            if name == "audio":
                for found, expected in zip(
                    model.audio.parameters(), twin.audio.parameters(), strict=True
                ):
                    torch.testing.assert_close(found.grad, expected.grad)
