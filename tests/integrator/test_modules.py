"""What models do inside a forward: checkpoints, torch.func, buffers, weights used twice."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from mmpareto_optim import MMParetoOptimizer, mmpareto_coefficients
from tests.models import LateFusion, Losses, assert_gram, audio_visual_batch, grads

Batch = tuple[Tensor, Tensor, Tensor]


class Checkpointed(nn.Module):
    """Recomputes the activations of a module in the backward pass."""

    def __init__(self, module: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.module = module
        self.use_reentrant = use_reentrant
        self.calls = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


class AsForward(LateFusion):
    def forward(self, batch: Batch) -> Losses:
        return self.losses(batch)


def wrapped(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def assert_same_grads(found: nn.Module, expected: nn.Module) -> None:
    for a, b in zip(grads(found), grads(expected), strict=True):
        assert a is not None
        assert b is not None
        assert a.equal(b)


def test_activation_checkpoints_change_nothing() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    plain = deepcopy(model)
    model.audio = Checkpointed(model.audio, use_reentrant=False)  # type: ignore[assignment]
    model.visual[2] = Checkpointed(model.visual[2], use_reentrant=False)
    ours, theirs = wrapped(model), wrapped(plain)
    for _ in range(2):  # the first backward may look at more
        model.audio.calls = 0  # type: ignore[assignment]
        for opt, owner in ((ours, model), (theirs, plain)):
            opt.zero_grad()
            opt.backward(owner.losses(batch))
    assert_same_grads(model, plain)
    # Forward, then once for each of the two losses that reach it.
    assert model.audio.calls == 3


@pytest.mark.parametrize("where", ["first layers", "middle layers"])
def test_reentrant_checkpoints_are_refused_with_their_mend(where: str) -> None:
    """Behind a leaf that is no parameter, autograd would take them for constants, silently."""
    model, batch = LateFusion(), audio_visual_batch()
    if where == "first layers":
        model.audio = Checkpointed(model.audio, use_reentrant=True)  # type: ignore[assignment]
        batch[0].requires_grad_()  # as enable_input_require_grads() and others do
    else:
        model.audio[2] = Checkpointed(model.audio[2], use_reentrant=True)
    before = [param.detach().clone() for param in model.parameters()]
    opt = wrapped(model)
    for call in (opt.backward, opt.step):
        with pytest.raises(RuntimeError, match=r"loss '(mm|audio)' goes .*use_reentrant=False"):
            call(losses=model.losses(batch))
    assert all(param.grad is None for param in model.parameters())
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


def test_functional_call() -> None:
    """The model is a template; what is held and trained are tensors from elsewhere."""
    template, batch = AsForward(), audio_visual_batch()
    plain = deepcopy(template)
    params: dict[str, Tensor] = dict(deepcopy(template).named_parameters())
    opt = MMParetoOptimizer(torch.optim.SGD(params.values(), lr=0.1))
    opt.backward(functional_call(template, params, (batch,)))
    wrapped(plain).backward(plain.losses(batch))
    for found, expected in zip(params.values(), grads(plain), strict=True):
        assert expected is not None
        assert found.grad is not None
        assert found.grad.equal(expected)
    assert grads(template) == [None] * len(params)


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_an_ensemble_by_vmap() -> None:
    """Two trunks as one stacked parameter: one block, and the oracle by hand agrees."""
    trunks, heads = [nn.Linear(4, 3) for _ in range(2)], nn.ModuleList([nn.Linear(3, 2)] * 2)
    stacked, _ = stack_module_state(trunks)
    x, label = torch.randn(8, 4), torch.randint(2, (8,))

    def losses() -> Losses:
        def call(params: dict[str, Tensor]) -> Tensor:
            features: Tensor = functional_call(trunks[0], params, (x,))
            return features

        features = vmap(call)(stacked).mean(0)
        return {
            "left": cross_entropy(heads[0](features), label),
            "right": cross_entropy(-heads[1](features), label),
        }

    params = list(stacked.values())
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])
        for loss in losses().values()
    ]
    opt.backward(losses())
    matrix = torch.stack(rows).double()
    expected = (mmpareto_coefficients(matrix @ matrix.T) @ matrix).float()
    found = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class WithBatchNorm(LateFusion):
    def __init__(self) -> None:
        super().__init__()
        self.audio.append(nn.BatchNorm1d(6))


@pytest.mark.parametrize("integration", ["mmpareto", "uniform"])
def test_batch_norm_statistics_move_once_a_forward(integration: Any) -> None:
    model, batch = WithBatchNorm(), audio_visual_batch()
    plain = deepcopy(model)
    plain.losses(batch)
    wrapped(model, integration=integration).step(losses=model.losses(batch))
    found, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert found["audio.3.num_batches_tracked"] == 1
    for name, buffer in found.items():
        assert buffer.equal(expected[name]), name


def test_tied_weights_are_integrated_as_one() -> None:
    """One head for both modalities: what was two plain gradients is now a block of two losses."""
    model, batch = LateFusion(), audio_visual_batch()
    model.visual_head.weight = model.audio_head.weight
    weight = model.audio_head.weight
    losses = model.losses(batch)
    rows = [
        torch.autograd.grad(losses[name], weight, retain_graph=True)[0]
        for name in ("audio", "visual")
    ]
    opt = wrapped(model)
    opt.backward(losses)
    stats = opt.stats["audio+visual"]
    assert_gram(stats.gram, torch.stack([row.flatten() for row in rows]))
    c = stats.coefficients.float()
    torch.testing.assert_close(weight.grad, c[0] * rows[0] + c[1] * rows[1])
    assert len(opt.param_groups[0]["params"]) == len(list(model.parameters()))


FORWARDS: dict[str, Callable[[LateFusion, Any], Losses]] = {
    "two views": lambda model, batch: {
        name: loss + model.losses((batch[0].flip(0), batch[1], batch[2]))[name]
        for name, loss in model.losses(batch).items()
    },
    "a loss for each view": lambda model, batch: {
        "first": cross_entropy(model.audio_head(model.audio(batch[0])), batch[2]),
        "second": cross_entropy(model.audio_head(model.audio(-batch[0])), batch[2]),
    },
}


@pytest.mark.parametrize("case", FORWARDS)
def test_an_encoder_may_run_twice_in_a_forward(case: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    losses = FORWARDS[case](model, batch)
    params = list(model.audio.parameters())
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        if all(gradient is not None for gradient in found):
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    matrix = torch.stack(rows).double()
    opt = wrapped(model, param_groups_by_modality={"audio": model.audio})
    opt.backward(losses)
    expected = (mmpareto_coefficients(matrix @ matrix.T) @ matrix).float()
    grad = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
