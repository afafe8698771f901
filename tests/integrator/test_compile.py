"""``torch.compile``: encoders, heads and whole models, and its donated buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.integrator.test_features import grads, optimizer, setting
from tests.models import LateFusion, audio_visual_batch

# The compiler's own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute", "ignore:Guards may run slower"
)
BACKEND = "aot_eager"  # autograd as with inductor, without its compiler


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    return torch.compile(function, backend=BACKEND)


def pair() -> tuple[LateFusion, LateFusion, tuple[Tensor, Tensor, Tensor]]:
    model, batch = setting()
    return model, deepcopy(model), batch


def same_gradients(model: LateFusion, eager: LateFusion) -> None:
    torch.testing.assert_close(list(grads(model).values()), list(grads(eager).values()))


@pytest.mark.parametrize("by_features", [False, True])
def test_compiled_encoders_give_the_same_gradients(by_features: bool) -> None:
    model, eager, batch = pair()
    model.audio = torch.compile(model.audio, backend=BACKEND)  # type: ignore[assignment]
    model.visual = torch.compile(model.visual, backend=BACKEND)  # type: ignore[assignment]
    output = model.features(batch)["audio"].grad_fn
    assert output is not None
    assert type(output).__name__ == "CompiledFunctionBackward"
    for net in (model, eager):
        for _ in range(2):
            features = net.features(batch)
            opt = optimizer(net)
            opt.zero_grad()
            losses = net.losses_at(features, batch[2])
            opt.backward(losses, features=features if by_features else None)
        assert set(opt.stats) == ({"audio", "visual"} if by_features else {"mm+audio", "mm+visual"})
    same_gradients(model, eager)


@pytest.mark.slow
def test_inductor() -> None:
    model, eager, batch = pair()
    model.audio = torch.compile(model.audio)  # type: ignore[assignment]
    for net in (model, eager):
        optimizer(net).backward(net.losses_at(net.features(batch), batch[2]))
    same_gradients(model, eager)


@pytest.mark.parametrize("part", ["features", "losses", "whole"])
def test_a_region_of_several_losses(part: str) -> None:
    """Its backward gives zeros for what a loss does not reach."""
    model, eager, batch = pair()
    features, losses = model.features, model.losses_at
    if part == "features":
        features = compiled(features)
    elif part == "losses":
        losses = compiled(losses)

    def forward() -> dict[str, Tensor]:
        return losses(features(batch), batch[2])

    optimizer(model).backward((compiled(forward) if part == "whole" else forward)())
    optimizer(eager).backward(eager.losses_at(eager.features(batch), batch[2]))
    same_gradients(model, eager)


def test_a_whole_training_step() -> None:
    """Compiled from zero_grad to step: the graph is broken around the integration."""
    model, eager, _ = pair()
    opts = [optimizer(net) for net in (model, eager)]

    def step(net: LateFusion, opt: MMParetoOptimizer, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        opt.zero_grad()
        opt.step(losses=net.losses(batch))

    with torch._functorch.config.patch(donated_buffer=False):
        compiled_step = torch.compile(step, backend=BACKEND)
        for size in (16, 7, 16, 5):
            batch = audio_visual_batch(size)
            compiled_step(model, opts[0], batch)
            step(eager, opts[1], batch)
            same_gradients(model, eager)
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()))


def test_a_compiled_model_with_the_blocks_by_hand() -> None:
    model, eager, batch = pair()
    for net in (model, eager):
        opt = optimizer(net, param_groups_by_modality={"audio": net.audio, "visual": net.visual})

        def forward(net: LateFusion = net) -> dict[str, Tensor]:
            return net.losses_at(net.features(batch), batch[2])

        opt.backward(compiled(forward)() if net is model else forward())
    same_gradients(model, eager)


def compiled_for_one_backward_pass() -> tuple[LateFusion, tuple[Tensor, Tensor, Tensor]]:
    model, batch = setting()
    # An encoder with activations that its backward may overwrite.
    model.audio = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6)
    )
    model.audio = torch.compile(model.audio, backend=BACKEND)  # type: ignore[assignment]
    model.losses(batch)["mm"].backward()
    model.zero_grad()
    return model, batch


def test_a_region_compiled_for_one_backward_pass() -> None:
    model, batch = compiled_for_one_backward_pass()
    opt = optimizer(model)
    with pytest.raises(RuntimeError, match=r"set torch._functorch.config.donated_buffer = False"):
        opt.backward(model.losses(batch))
    assert grads(model) == {}


def test_the_line_that_mends_it() -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # monkeypatch would leave it hidden
        model, batch = compiled_for_one_backward_pass()
        opt = optimizer(model)
        opt.backward(model.losses(batch))
    found = grads(model)
    opt.zero_grad()
    torch.compiler.set_stance("force_eager")
    try:
        opt.backward(model.losses(batch))
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(found, grads(model))
