"""Losses that are no plain tensors, mappings that are no dicts, optimizers that are none."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from enum import Enum
from io import BytesIO
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads, vectors_as_losses


class MetaTensor(Tensor):
    """As MONAI's: what is computed from it has its metadata, and methods that plain ones lack."""

    affine: Any = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(found, MetaTensor):
            sources = [each for each in args if isinstance(each, MetaTensor)]
            found.affine = sources[0].affine.copy() if sources else torch.eye(4).numpy()
        elif isinstance(found, tuple) and isinstance(found[0], Tensor):
            for each in found:
                each.affine = args[0].affine.copy()  # as its batches do, whatever they are
        return found


class LabelTensor(Tensor):
    """As PINA's: each column has a label, which operations of it look up."""

    labels: Any = None

    def clone(self, *_: Any, **__: Any) -> "LabelTensor":
        raise AttributeError("'LabelTensor' object has no attribute '_labels'")

    def __getitem__(self, index: Any) -> Any:
        raise KeyError(f"no label {index!r}")

    def flatten(self, *_: Any) -> Any:
        raise ValueError("labels would be lost")


class Listed(Tensor):
    """Looks at each of its calls, as profilers and those who log do."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def as_meta(x: Tensor) -> Tensor:
    found = x.as_subclass(MetaTensor)
    found.affine = torch.eye(4).numpy()
    return found


SUBCLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "metadata": as_meta,
    "labels": lambda x: x.as_subclass(LabelTensor),
    "calls": lambda x: x.as_subclass(Listed),
}
WHERE: dict[str, Callable[[Any, Losses], Losses]] = {
    "all": lambda as_other, losses: {name: as_other(loss) for name, loss in losses.items()},
    "the first": lambda as_other, losses: {**losses, "mm": as_other(losses["mm"])},
    "the last": lambda as_other, losses: {**losses, "visual": as_other(losses["visual"])},
}


@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("at_features", [False, True])
def test_losses_of_a_subclass(kind: str, where: str, at_features: bool) -> None:
    """The same gradients as of plain losses, in plain tensors; checkpoints load with weights."""
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    found = []
    for owner, change in ((model, WHERE[where]), (twin, lambda _, losses: losses)):
        opt = MMParetoOptimizer(AdamW(owner.parameters(), lr=0.01))
        for _ in range(2):
            features = owner.features(batch)
            losses = change(SUBCLASSES[kind], owner.losses_at(features, batch[2]))
            opt.backward(losses, features=features if at_features else None)
        assert all(type(param.grad) is Tensor for param in owner.parameters())
        for stats in opt.stats.values():
            assert type(stats.gram) is Tensor
            assert type(stats.coefficients) is Tensor
        found.append(grads(owner))
        opt.step()
        torch.save(opt.state_dict(), file := BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_features_and_inputs_of_a_subclass(kind: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    for owner, change in ((model, SUBCLASSES[kind]), (twin, lambda x: x)):
        opt = MMParetoOptimizer(SGD(owner.parameters(), lr=0.01))
        features = {name: change(z) for name, z in owner.features(batch).items()}
        opt.backward(owner.losses_at(features, batch[2]), features=features)
        opt.backward(owner.losses((change(batch[0]), *batch[1:])))
        assert all(type(param.grad) is Tensor for param in owner.parameters())
    torch.testing.assert_close(grads(model), grads(twin), rtol=0, atol=0)


def test_a_closure_and_a_step_with_losses_of_a_subclass() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.01, momentum=0.9))

    def losses() -> Losses:
        opt.zero_grad()
        return WHERE["all"](as_meta, model.losses(batch))

    opt.step(losses=losses())
    opt.step(losses)
    assert all(type(param.grad) is Tensor for param in model.parameters())
    assert all(type(state["momentum_buffer"]) is Tensor for state in opt.state.values())


class Task(Enum):
    JOINT = "mm"
    AUDIO = "audio"
    VISUAL = "visual"


class DuckDict:
    """As TensorDict: keys and items, and no ``Mapping``; what iterates over it gets rows."""

    def __init__(self, items: Mapping[Any, Tensor]) -> None:
        self.held = dict(items)
        self.shape = torch.Size([])

    def keys(self) -> Any:
        return self.held.keys()

    def __getitem__(self, key: Any) -> Any:
        return self.held[key]

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("iterating over a 0-d tensordict")

    def __len__(self) -> int:
        return 0  # of the batch

    def __bool__(self) -> bool:
        raise RuntimeError("bool value of a tensordict is ambiguous")

    def __eq__(self, other: object) -> Any:
        return DuckDict({})

    __hash__ = object.__hash__


MAPPINGS: dict[str, Callable[[Losses], Any]] = {
    "a proxy": MappingProxyType,
    "a tensordict": DuckDict,
    "an enumeration": lambda losses: {Task(name): loss for name, loss in losses.items()},
    "numbers": lambda losses: dict(enumerate(losses.values())),
    "tuples": lambda losses: {("loss", name): loss for name, loss in losses.items()},
}


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("call", ["backward", "closure"])
def test_mappings_and_names(kind: str, call: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        opt.zero_grad()
        if call == "backward":
            opt.backward(MAPPINGS[kind](model.losses(batch)))
            opt.step()
        else:
            opt.step(lambda: MAPPINGS[kind](model.losses(batch)))
    assert len(opt.stats) == 2
    assert len(str(opt.blocks).splitlines()) == 6
    plain = MMParetoOptimizer(SGD(twin.parameters(), lr=0.1))
    for _ in range(2):
        plain.zero_grad()
        plain.step(losses=twin.losses(batch))
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_a_dict_of_optimizers() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    audio, rest = list(model.audio.parameters()), list(model.parameters())[4:]
    opt = MMParetoOptimizer({"audio": SGD(audio, lr=0.1), "rest": AdamW(rest, lr=0.01)})
    before = deepcopy(list(model.parameters()))
    opt.step(losses=model.losses(batch))
    assert not any(map(torch.equal, before, model.parameters()))
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01]
    with pytest.raises(ValueError, match="empty"):
        MMParetoOptimizer({})
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        MMParetoOptimizer({"audio": audio})  # type: ignore[arg-type]


@pytest.mark.parametrize("by_hand", [False, True])
def test_lazy_modules(by_hand: bool) -> None:
    """They may be handed over before their shapes are known, and train once they are."""
    model, batch = LateFusion(), audio_visual_batch()
    model.audio[0] = nn.LazyLinear(8)
    modalities = {"audio": model.audio, "visual": model.visual} if by_hand else None
    opt = MMParetoOptimizer(SGD(model.named_parameters(), lr=0.1), modalities)
    assert "blocks" in repr(opt)
    losses = model.losses(batch)
    before = deepcopy(list(model.parameters()))
    opt.step(losses=losses)
    assert not any(map(torch.equal, before, model.parameters()))
    assert len(opt.stats) == 2


def test_a_lazy_module_that_is_not_used_yet() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    other = nn.LazyLinear(3)
    opt = MMParetoOptimizer(SGD([*model.parameters(), *other.parameters()], lr=0.1))
    opt.backward(model.losses(batch))
    assert other.weight.grad is None
    assert len(opt.stats) == 2
    str(opt.blocks)


@pytest.mark.parametrize("where", ["mm", "visual"])
def test_a_complex_loss(where: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    losses = model.losses(batch)
    losses[where] = losses[where] * (1 + 1j)
    with pytest.raises(ValueError, match=rf"loss '{where}' is complex"):
        opt.step(losses=losses)
    assert grads(model) == [None] * len(grads(model))


def test_a_wrapper_that_goes_around_this_one() -> None:
    """Schedule-free learning takes any optimizer, and is none."""
    model, batch = LateFusion(), audio_visual_batch()
    inner = MMParetoOptimizer(SGD(model.parameters(), lr=0.1))
    outer = ScheduleFreeWrapper(inner)
    with pytest.raises(TypeError, match=r"ScheduleFreeWrapper.*\(MMParetoOptimizer\("):
        MMParetoOptimizer(outer)
    outer.train()
    before = deepcopy(list(model.parameters()))
    inner.backward(model.losses(batch))
    outer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert len(inner.stats) == 2


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"integration": "upgrad"}, {"rescale": "tensor"}], ids=str)
def test_an_autocast_region_around_the_integration(
    region: torch.dtype, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The passes are linear here, so that the region can change the integration alone."""
    rows, found = torch.randn(3, 24).to(dtype), []
    for enabled in (False, True):
        param = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
        integrator = GradientIntegrator([param], **options)
        for _ in range(2):
            losses = vectors_as_losses(param, rows)
            with torch.autocast("cpu", region, enabled=enabled):
                integrator.backward(losses)
        (stats,) = integrator.stats.values()
        found.append([param.grad, stats.gram, stats.coefficients])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
def test_an_autocast_region_around_a_whole_backward(region: torch.dtype) -> None:
    """As a plain backward in that region, for a plain sum."""
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    integrator = GradientIntegrator(model.parameters(), integration="uniform")
    for _ in range(2):
        with torch.autocast("cpu", region):
            integrator.backward(model.losses(batch))
            for loss in twin.losses(batch).values():
                loss.backward(retain_graph=True)
    torch.testing.assert_close(grads(model), grads(twin), rtol=1e-4, atol=1e-6)
