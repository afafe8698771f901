"""``rescale="tensor"`` against a slow, literal version of the authors' procedure.

A backward of each loss, the cosine over the concatenated encoder gradients, uniform weights
where it is positive and the min-norm weights of two otherwise, one more backward of the sum,
each encoder tensor stretched by its own ratio of norms, gamma = 1.5, heads untouched.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, train

GAMMA = 1.5


def closed_form(uu: float, um: float, mm: float) -> tuple[float, float]:
    """Weights (joint, unimodal) of the min-norm point of two vectors."""
    if um >= mm:
        return 1.0, 0.0
    if um >= uu:
        return 0.0, 1.0
    joint = (uu - um) / (mm + uu - 2 * um)
    return joint, 1 - joint


class AuthorsProcedure:
    def __init__(self, model: LateFusion, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.encoders = {"audio": model.audio, "visual": model.visual}
        self.cosines: list[float] = []

    def step(self, losses: Losses) -> None:
        collected: dict[str, dict[Tensor, Tensor]] = {}
        for name, loss in losses.items():
            self.optimizer.zero_grad()
            loss.backward(retain_graph=True)
            collected[name] = {
                param: param.grad.clone()
                for param in self.model.parameters()
                if param.grad is not None
            }
        weights = {modality: self.weights(modality, collected) for modality in self.encoders}
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        for modality, encoder in self.encoders.items():
            joint, unimodal = weights[modality]
            for param in encoder.parameters():
                assert param.grad is not None
                new = 2 * joint * collected["mm"][param] + 2 * unimodal * collected[modality][param]
                ratio = float(param.grad.norm() / new.norm())
                param.grad = max(ratio, 1.0) * new * GAMMA
        self.optimizer.step()

    def weights(
        self, modality: str, collected: dict[str, dict[Tensor, Tensor]]
    ) -> tuple[float, float]:
        params = list(self.encoders[modality].parameters())
        joint = torch.cat([collected["mm"][param].flatten() for param in params])
        unimodal = torch.cat([collected[modality][param].flatten() for param in params])
        cosine = float(cosine_similarity(joint, unimodal, dim=0))
        self.cosines.append(cosine)
        if cosine > 0:
            return 0.5, 0.5
        return closed_form(
            float(unimodal @ unimodal), float(unimodal @ joint), float(joint @ joint)
        )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_same_parameters_as_the_authors_procedure(seed: int) -> None:
    """In float64, so that nothing but a difference of the procedures shows."""
    torch.manual_seed(seed)
    ours = LateFusion(dtype=torch.float64)
    theirs = deepcopy(ours)
    wrapped = MMParetoOptimizer(sgd(ours), rescale="tensor")
    literal = AuthorsProcedure(theirs, sgd(theirs))

    def step(losses: Losses) -> None:
        wrapped.zero_grad()
        wrapped.step(losses=losses)

    left, right = train(ours, step, steps=20), train(theirs, literal.step, steps=20)
    # Both branches were taken, or this test would show half of what it claims.
    assert min(literal.cosines) < 0 < max(literal.cosines)
    assert largest_difference(left, right) < 1e-9


def test_orthogonal_gradients_count_as_conflict_here_as_in_the_authors_code() -> None:
    param = nn.Parameter(torch.zeros(2))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=1.0), rescale="tensor")
    opt.backward({"mm": param[0] * 1.0, "audio": param[1] * 2.0})
    alpha = torch.tensor([0.8, 0.2])  # inverse to the squared lengths
    new = 2 * alpha * torch.tensor([1.0, 2.0])
    expected = GAMMA * new * max(1.0, 5**0.5 / float(new.norm()))
    torch.testing.assert_close(param.grad, expected)


def test_each_tensor_is_stretched_by_its_own_ratio() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = MMParetoOptimizer(torch.optim.SGD([a, b], lr=1.0), rescale="tensor")
    g_a, g_b = torch.tensor([[1.0, 0.0], [-3.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    joint, unimodal = ((a @ g_a[i] + b @ g_b[i]) for i in range(2))
    opt.backward({"mm": joint, "audio": unimodal})
    (stats,) = opt.stats.values()
    assert not stats.conflict  # -3 + 4 > 0: the sum, and nothing to stretch
    torch.testing.assert_close(stats.scale, torch.ones(2))

    opt.zero_grad()
    joint, unimodal = ((a @ g_a[i] + b @ g_b[i] * (-1) ** i) for i in range(2))
    opt.backward({"mm": joint, "audio": unimodal})
    (stats,) = opt.stats.values()
    assert stats.conflict
    assert stats.scale.shape == (2,)
    for param, rows in ((a, g_a), (b, g_b * torch.tensor([[1.0], [-1.0]]))):
        assert param.grad is not None
        assert float(param.grad.norm()) >= GAMMA * float(rows.sum(0).norm()) * (1 - 1e-6)


def test_stretches_are_in_the_order_of_the_parameters() -> None:
    """A long gradient lies apart from the others in the rows."""
    first, last = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    long = nn.Parameter(torch.zeros(2**15))
    opt = MMParetoOptimizer(torch.optim.SGD([first, long, last], lr=1.0), rescale="tensor")
    short = first.sum() + last.sum()
    opt.backward({"mm": short + long.sum(), "audio": 1e-6 * long.sum() - short})
    (stats,) = opt.stats.values()
    assert (stats.scale > 1).tolist() == [False, True, False]
