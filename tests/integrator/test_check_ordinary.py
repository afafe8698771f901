"""The check of the first step says nothing of ordinary models, and changes nothing in them."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.integrator.encoders import ENCODERS, WORDS, Modulus, dense
from tests.models import LateFusion, Losses, audio_visual_batch, grads

SEEDS = 5


class Heads(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def losses(self, x: Tensor, label: Tensor) -> Losses:
        z = self.encoder(x)
        return {f"loss{i}": cross_entropy(head(z), label) for i, head in enumerate(self.heads)}


def case_of(encoder: str) -> tuple[Heads, Tensor, Tensor]:
    make, shape = ENCODERS[encoder]
    x = torch.randint(9, shape) if shape is WORDS else torch.randn(shape)
    return Heads(make()), x, torch.randint(3, (len(x),))


def stays_silent(model: nn.Module, losses: Callable[[], Losses], **options: Any) -> None:
    """Steps of which none warns."""
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt.zero_grad()
            opt.step(losses=losses())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders(encoder: str) -> None:
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, x, label = case_of(encoder)
        stays_silent(model, lambda: model.losses(x, label))  # noqa: B023


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_without_the_check(encoder: str) -> None:
    """Bit for bit, and so is the random state afterwards."""
    model, x, label = case_of(encoder)
    found = []
    for check in (True, False):
        torch.manual_seed(1)
        owner = deepcopy(model)
        GradientIntegrator(owner.parameters(), check=check).backward(owner.losses(x, label))
        found.append([*grads(owner), torch.get_rng_state()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("encoder", sorted(ENCODERS.keys() - {"embedding", "bag", "lstm"}))
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("autocast", torch.bfloat16),
        ("parameters", torch.bfloat16),
        ("parameters", torch.float16),
        ("scaled", torch.float16),
    ],
)
def test_half_precision(encoder: str, how: str, dtype: torch.dtype) -> None:
    for seed in range(SEEDS // 2):
        torch.manual_seed(seed)
        model, x, label = case_of(encoder)
        if how == "parameters":
            model, x = model.to(dtype), x.to(dtype)
        factor = 2.0**12 if how == "scaled" else 1.0
        scaler = GradScaler("cpu", init_scale=factor, enabled=how == "scaled")

        def losses(model: Heads = model, x: Tensor = x, label: Tensor = label) -> Losses:
            region = nullcontext() if how == "parameters" else torch.autocast("cpu", dtype)
            with region:
                found = model.losses(x, label)
            return {name: scaler.scale(loss) for name, loss in found.items()}  # noqa: B023

        stays_silent(model, losses)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_encoders(backend: str) -> None:
    for encoder in ("layer norm", "dropout", "batch norm after convolutions"):
        model, x, label = case_of(encoder)
        model.encoder.compile(backend=backend)
        with torch._functorch.config.patch(donated_buffer=False):
            stays_silent(model, lambda: model.losses(x, label))  # noqa: B023


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
def test_a_head_compiled_for_one_backward_pass() -> None:
    """It is passed through once where its loss comes first, and refuses to be kept for more."""
    model, x, label = case_of("layer norm")
    twin = deepcopy(model)
    head = torch.compile(lambda z: cross_entropy(model.heads[0](z), label), backend="aot_eager")
    head(model.encoder(x)).backward()  # by which its buffers become those of one pass
    model.zero_grad()
    integrator = GradientIntegrator(model.parameters(), integration="uniform")
    for _ in range(2):
        z = model.encoder(x)
        integrator.backward({"a": head(z), "b": cross_entropy(model.heads[1](z), label)})
        z = twin.encoder(x)
        for place in (0, 1):
            cross_entropy(twin.heads[place](z), label).backward(retain_graph=True)
    torch.testing.assert_close(grads(model), grads(twin))


SMALL = ["instance norm", "batch norm after convolutions", "batch norm of rows", "layer norm"]


@pytest.mark.parametrize("encoder", SMALL)
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_inputs_in_any_unit(encoder: str, unit: float) -> None:
    """Such as an electroencephalogram in volts: before a norm, much of a gradient is rounding."""
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, x, label = case_of(encoder)
        stays_silent(model, lambda: model.losses(unit * x, label))  # noqa: B023


def late_fusion(seed: int) -> tuple[LateFusion, Any]:
    torch.manual_seed(seed)
    return LateFusion(), audio_visual_batch()


def changed(**factors: float) -> Callable[[Losses], Losses]:
    return lambda losses: {name: factors.get(name, 1.0) * loss for name, loss in losses.items()}


def penalised(losses: Losses) -> Losses:
    joint = losses["mm"]
    return {**losses, "mm": joint + joint.square() + joint.detach() * joint}


def opposed(losses: Losses) -> Losses:
    """The sum is a millionth of either."""
    return {"up": losses["mm"], "down": 1e-6 * losses["audio"] - losses["mm"]}


CHANGES: dict[str, Callable[[Losses], Losses]] = {
    "sizes": changed(mm=1e6),
    "sizes of single losses": changed(audio=1e-6, visual=1e-3),
    "nothing": changed(audio=0.0),
    "all nothing": changed(mm=0.0, audio=0.0, visual=0.0),
    "negative": changed(audio=-1.0),
    "opposed": opposed,
    "penalised": penalised,
    "cancelling": lambda losses: {**losses, "anti": -losses["mm"]},
    "huge": changed(mm=1e30, audio=1e30, visual=1e30),
    "tiny": changed(mm=1e-30, audio=1e-30, visual=1e-30),
    "one shape": lambda losses: {**losses, "mm": losses["mm"].view(1, 1)},
    "one dtype": lambda losses: {**losses, "mm": losses["mm"].double()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_losses(change: str) -> None:
    for seed in range(SEEDS):
        model, batch = late_fusion(seed)
        stays_silent(model, lambda: CHANGES[change](model.losses(batch)), integration="uniform")  # noqa: B023


MODELS = ["channels last", "tied heads", "zero heads", "many", "double", "complex"]


@pytest.mark.parametrize("shared", MODELS)
def test_models(shared: str) -> None:
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, x, label = case_of("batch norm after convolutions")
        if shared == "channels last":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = x.to(memory_format=torch.channels_last)
        elif shared == "tied heads":
            model.heads[1] = model.heads[0]
        elif shared == "zero heads":
            for param in model.heads.parameters():
                nn.init.zeros_(param)
        elif shared == "many":
            model.heads.extend(nn.Linear(8, 3) for _ in range(20))
        elif shared == "double":
            model, x = model.double(), x.double()
        else:
            linear = nn.Linear(8, 8, dtype=torch.complex64)
            model.encoder.append(Modulus(linear))  # type: ignore[operator]
        stays_silent(model, lambda: model.losses(x, label))  # noqa: B023


def test_features_and_accumulation() -> None:
    for seed in range(SEEDS):
        model, batch = late_fusion(seed)
        opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                features = model.features(batch)
                opt.backward(model.losses_at(features, batch[2]), features=features)
            for _ in range(3):
                opt.backward(changed(mm=1 / 3, audio=1 / 3)(model.losses(batch)))
            opt.step()


@pytest.mark.parametrize("where", ["parameters", "activations"])
def test_a_sum_that_overflows_where_single_losses_do_not(where: str) -> None:
    """In float16, as while a scaler looks for its scale."""
    model = nn.Linear(3, 2)
    if where == "parameters":
        model.half()

    def losses() -> Losses:
        with torch.autocast("cpu", torch.float16, enabled=where == "activations"):
            y = model(torch.ones(1, 3, dtype=model.weight.dtype))
        return {"a": 40_000 * y.float().sum(), "b": 40_000 * y.float().sum()}

    stays_silent(model, losses)


def test_a_gradient_penalty() -> None:
    """Differentiated twice, as in physics."""
    model, x = dense(nn.Tanh()), torch.randn(5, 6, requires_grad=True)

    def losses() -> Losses:
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return {"fit": y.square().mean(), "slope": (slope.square().sum(1) - 1).square().mean()}

    stays_silent(model, losses)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_first_step_that_is_not_finite_is_checked_again(bad: float) -> None:
    model, batch = late_fusion(0)
    seen: list[int] = []
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (bad, 1.0, 1.0):
            seen.clear()
            features = model.features(batch)
            features["audio"].register_hook(lambda _: seen.append(1))
            losses = model.losses_at(features, batch[2])
            opt.backward({**losses, "audio": losses["audio"] * factor})
            opt.zero_grad()
            found.append(len(seen))
    assert found == [3, 3, 2]
