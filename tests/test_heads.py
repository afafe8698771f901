"""Heads around a model with a joint loss only: the gradients of a model written with heads."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer, UnimodalHeads
from tests.models import LateFusion, Losses, audio_visual_batch, grads
from tests.processes import Processes

ENCODERS = {"audio": "audio", "visual": "visual"}


class Joint(nn.Module):
    """Two encoders and a joint output."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.visual = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6))
        self.mm_head = nn.Linear(12, 3)

    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        joined = torch.cat([self.audio(spec), self.visual(image)], dim=1)
        return self.mm_head(joined)  # type: ignore[no-any-return]


def headed(model: nn.Module | None = None, **options: Any) -> UnimodalHeads:
    """Heads that have their size."""
    heads = UnimodalHeads(model or Joint(), ENCODERS, 3, **options)
    heads(*audio_visual_batch()[:2])
    return heads


def by_hand(heads: UnimodalHeads) -> LateFusion:
    """The model that somebody would write with the same parameters."""
    model = LateFusion()
    names = {f"heads.{name}.": f"{name}_head." for name in ENCODERS} | {"model.": ""}
    state = heads.state_dict()
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    model.load_state_dict(state)
    return model


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Losses:
    output, unimodal = model(*batch[:2])
    logits = {"mm": output, **unimodal}
    return {name: cross_entropy(each, batch[2]) for name, each in logits.items()}


def assert_same_grads(heads: UnimodalHeads, model: LateFusion) -> None:
    expected = {name: param.grad for name, param in model.named_parameters()}
    pairs = {"model.": "", "heads.audio": "audio_head", "heads.visual": "visual_head"}
    for name, param in heads.named_parameters():
        ours = next(start for start in pairs if name.startswith(start))
        grad = expected.pop(name.replace(ours, pairs[ours]))
        assert grad is not None
        assert param.grad is not None
        assert param.grad.equal(grad), name
    assert not expected


@pytest.mark.parametrize("integration", ["mmpareto", "upgrad"])
@pytest.mark.parametrize("at_features", [False, True])
def test_gradients_are_those_of_a_model_written_with_heads(
    integration: str, at_features: bool
) -> None:
    heads = headed()
    plain = by_hand(heads)
    ours, theirs = (
        GradientIntegrator(model.parameters(), integration=integration) for model in (heads, plain)
    )
    for _ in range(3):
        batch = audio_visual_batch()
        losses = losses_of(heads, batch)
        features = plain.features(batch)
        expected = plain.losses_at(features, batch[2])
        ours.zero_grad()
        theirs.zero_grad()
        ours.backward(losses, features=heads.features if at_features else None)
        theirs.backward(expected, features=features if at_features else None)
        assert_same_grads(heads, plain)
    assert list(ours.stats) == (list(ENCODERS) if at_features else ["mm+audio", "mm+visual"])


def test_an_optimizer_may_be_older_than_the_size_of_the_heads() -> None:
    heads = UnimodalHeads(Joint(), ENCODERS, 3)
    opt = MMParetoOptimizer(torch.optim.SGD(heads.named_parameters(), lr=0.1))
    losses = losses_of(heads, audio_visual_batch())
    before = {name: param.detach().clone() for name, param in heads.named_parameters()}
    opt.step(losses=losses)
    assert list(opt.stats) == ["mm+audio", "mm+visual"]
    assert not [name for name, param in heads.named_parameters() if param.equal(before[name])]


class Encodes(nn.Module):
    """A model of one encoder, a module that gives what it is told."""

    def __init__(self, shape: tuple[int, ...], wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.shape, self.wrap = shape, wrap
        self.net = self.Net(self)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    class Net(nn.Module):
        def __init__(self, model: Encodes) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 60)
            self.shape, self.wrap = model.shape, model.wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.linear(x).view(-1, *self.shape))


@pytest.mark.parametrize(
    ("shape", "pool", "expected"),
    [
        ((60,), None, lambda x: x),
        ((6, 2, 5), None, lambda x: x.mean((2, 3))),
        ((6, 1, 2, 5), None, lambda x: x.mean((2, 3, 4))),
        ((12, 5), 1, lambda x: x.mean(1)),
        ((12, 5), 2, lambda x: x.mean(2)),
        ((2, 5, 6), (1, 2), lambda x: x.mean((1, 2))),
        ((12, 5), lambda x: x[:, 0], lambda x: x[:, 0]),
        ((12, 5), {"only": 1}, lambda x: x.mean(1)),
    ],
)
def test_pooling(shape: tuple[int, ...], pool: Any, expected: Callable[[Tensor], Tensor]) -> None:
    heads = UnimodalHeads(Encodes(shape), {"only": "net"}, 3, pool=pool)
    output, logits = heads(torch.randn(4, 2))
    torch.testing.assert_close(logits["only"], heads.heads["only"](expected(output)))
    assert heads.features["only"] is output


Pair = namedtuple("Pair", ["hidden", "cell"])


@pytest.mark.parametrize(
    ("wrap", "select"),
    [
        (lambda x: (x, -x), 0),
        (lambda x: [-x, x], -1),
        (lambda x: {"hidden": x, "cell": -x}, "hidden"),
        (lambda x: Pair(-x, x), lambda output: output.cell),
        (lambda x: (-x, x), {"only": 1}),
    ],
)
def test_selection(wrap: Callable[[Tensor], Any], select: Any) -> None:
    model = Encodes((60,), wrap)
    heads = UnimodalHeads(model, {"only": model.net}, 3, select=select)
    x = torch.randn(4, 2)
    _, logits = heads(x)
    assert heads.features["only"].equal(model.net.linear(x))
    assert logits["only"].equal(heads.heads["only"](model.net.linear(x)))


def copied_by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [deepcopy, copied_by_pickle])
@pytest.mark.parametrize("has_size", [False, True])
def test_a_copy_is_a_module_of_its_own(copied: Callable[[Any], Any], has_size: bool) -> None:
    heads = headed() if has_size else UnimodalHeads(Joint(), ENCODERS, 3)
    other = copied(heads)
    assert other.features == {}
    batch = audio_visual_batch()
    output, logits = other(*batch[:2])
    assert list(other.features) == list(logits) == list(ENCODERS)
    assert heads.features.keys() == (ENCODERS.keys() if has_size else set())
    if has_size:
        plain = by_hand(heads)
        MMParetoOptimizer(torch.optim.SGD(other.parameters())).backward(losses_of(other, batch))
        MMParetoOptimizer(torch.optim.SGD(plain.parameters())).backward(plain.losses(batch))
        assert_same_grads(other, plain)
    assert not any(grad is not None for grad in grads(heads))
    del heads
    gc.collect()
    assert other(*batch[:2])[0].equal(output)


@pytest.mark.parametrize("has_size", [False, True])
def test_a_state_is_loaded(has_size: bool) -> None:
    heads = headed()
    other = headed() if has_size else UnimodalHeads(Joint(), ENCODERS, 3)
    other.load_state_dict(heads.state_dict())
    batch = audio_visual_batch()
    assert losses_of(other, batch) == losses_of(heads, batch)
    model = Joint()
    model.load_state_dict(heads.model.state_dict())
    assert model(*batch[:2]).equal(heads(*batch[:2])[0])


def test_averaged_weights() -> None:
    heads = headed()
    average = AveragedModel(heads)
    batch = audio_visual_batch()
    assert losses_of(average, batch) == losses_of(heads, batch)


class Watchful(Joint):
    """Looks in its forward whether an earlier feature lives."""

    earlier: Callable[[], Tensor | None] = staticmethod(lambda: None)

    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        self.found = self.earlier()
        return super().forward(spec, image)


def test_the_features_live_until_the_next_forward() -> None:
    model = Watchful()
    heads = headed(model)
    model.earlier = weakref.ref(heads.features["audio"])
    assert model.earlier() is not None
    heads(*audio_visual_batch()[:2])
    assert model.found is None


def test_the_deployed_model_is_as_it_was() -> None:
    model = Joint()
    before, state = pickle.dumps(model), model.state_dict().keys()
    heads = headed(model)
    assert model.state_dict().keys() == state
    kept = list[weakref.ref[Tensor]]()
    model.audio.register_forward_hook(lambda *call: kept.append(weakref.ref(call[-1])))
    model(*audio_visual_batch()[:2])  # nothing is read outside of the heads' forward
    assert kept[0]() is None
    model.audio._forward_hooks.popitem()
    del heads
    gc.collect()
    assert pickle.dumps(model) == before


def test_an_error_of_the_model_leaves_nothing_behind() -> None:
    heads = headed()
    spec, image, _ = batch = audio_visual_batch()
    with pytest.raises(RuntimeError, match="shapes"):
        heads(spec, image[:, 1:])
    assert heads.features == {}
    assert set(losses_of(heads, batch)) == {"mm", *ENCODERS}


def test_modes_reach_model_and_heads() -> None:
    model = Joint()
    model.audio.append(nn.Dropout(0.5))
    heads = headed(model).eval()
    batch = audio_visual_batch()
    assert losses_of(heads, batch) == losses_of(heads, batch)
    heads.train()
    assert not losses_of(heads, batch)["audio"].equal(losses_of(heads, batch)["audio"])


def test_mixed_precision() -> None:
    heads = headed()
    plain, batch = by_hand(heads), audio_visual_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses, expected = losses_of(heads, batch), plain.losses(batch)
    assert heads.features["audio"].dtype == torch.bfloat16
    GradientIntegrator(heads.parameters()).backward(losses)
    GradientIntegrator(plain.parameters()).backward(expected)
    assert_same_grads(heads, plain)


class Casting(Joint):
    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(spec, image)


def test_heads_have_their_encoders_precision_where_the_model_casts_inside() -> None:
    heads = headed(Casting())
    _, logits = heads(*audio_visual_batch()[:2])
    assert heads.features["audio"].dtype == torch.bfloat16
    assert logits["audio"].dtype == torch.float32
    double = UnimodalHeads(Joint().double(), ENCODERS, 3)
    _, logits = double(*audio_visual_batch(dtype=torch.float64)[:2])
    assert logits["audio"].dtype == torch.float64


def test_a_head_is_made_where_the_encoder_is() -> None:
    heads = UnimodalHeads(Joint().to("meta"), ENCODERS, 3)
    _, logits = heads(*(x.to("meta") for x in audio_visual_batch()[:2]))
    assert logits["audio"].is_meta
    mixed = Joint()
    mixed.visual.double()
    made = UnimodalHeads(mixed, ENCODERS, 3).heads
    dtypes = {name: next(head.parameters()).dtype for name, head in made.items()}
    assert dtypes == {"audio": torch.float32, "visual": torch.float64}


class Weightless(Joint):
    """Its visual encoder has no parameters, and no precision of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten())
        self.mm_head = nn.Linear(13, 3)


def test_an_encoder_may_have_no_parameters() -> None:
    heads = UnimodalHeads(Weightless().double(), ENCODERS, 3)
    _, logits = heads(*audio_visual_batch(dtype=torch.float64)[:2])
    assert logits["visual"].dtype == torch.float64


@pytest.fixture
def _compiler() -> Iterator[None]:
    with config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("part", ["heads", "model", "encoder", "model in place"])
def test_compiled(part: str) -> None:
    model = Joint()
    heads = headed(model)
    plain, batch = by_hand(heads), audio_visual_batch()
    called: Any = heads
    if part == "heads":
        called = torch.compile(heads, backend="aot_eager", fullgraph=True)
    elif part == "model":
        heads.model = torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    elif part == "encoder":
        model.audio = torch.compile(model.audio, backend="aot_eager")  # type: ignore[assignment]
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    GradientIntegrator(plain.parameters()).backward(plain.losses(batch))
    for _ in range(2):
        heads.model(*batch[:2])  # compiles for calls without heads, too
        heads.zero_grad()
        GradientIntegrator(heads.parameters()).backward(losses_of(called, batch))
    for found, expected in zip(grads(heads), grads_in_order(plain), strict=True):
        torch.testing.assert_close(found, expected)


def grads_in_order(plain: LateFusion) -> list[Tensor | None]:
    """As those of the heads: encoders, joint head, heads."""
    modules = (plain.audio, plain.visual, plain.mm_head, plain.audio_head, plain.visual_head)
    return [grad for module in modules for grad in grads(module)]


def check_data_parallel() -> None:
    whole = headed()
    model = DistributedDataParallel(deepcopy(whole))
    alone = MMParetoOptimizer(
        torch.optim.SGD(whole.parameters(), lr=0.3, momentum=0.9), average_gradients=False
    )
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))
    here = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    for at_features in (False, False, True):
        batch = audio_visual_batch(12)
        spec, image, label = (part[here] for part in batch)
        losses, expected = losses_of(model, (spec, image, label)), losses_of(whole, batch)
        alone.zero_grad()
        opt.zero_grad()
        alone.step(losses=expected, features=whole.features if at_features else None)
        opt.step(losses=losses, features=model.module.features if at_features else None)
        for found, param in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, param)


def test_distributed_data_parallel(two: Processes) -> None:
    two(check_data_parallel)


class Twice(Joint):
    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        self.audio(spec)
        return super().forward(spec, image)


class Around(Joint):
    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        return self.mm_head(torch.cat([self.audio.forward(spec), self.visual(image)], dim=1))  # type: ignore[no-any-return]


class Checkpointed(Joint):
    def forward(self, spec: Tensor, image: Tensor) -> Tensor:
        audio = checkpoint(self.audio, spec, use_reentrant=False)
        return self.mm_head(torch.cat([audio, self.visual(image)], dim=1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), "the encoder of modality 'audio' was called 2 times .* exactly once"),
        (Around(), "the encoder of modality 'audio' was called 0 times .* exactly once"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_an_encoder_that_cannot_be_read(model: nn.Module, message: str) -> None:
    heads = UnimodalHeads(model, ENCODERS, 3)
    with pytest.raises(RuntimeError, match=message):
        heads(*audio_visual_batch()[:2])
    assert heads.features == {}


def test_activation_checkpoints_read_an_encoder_once() -> None:
    heads = headed(Checkpointed())
    plain, batch = by_hand(heads), audio_visual_batch()
    GradientIntegrator(heads.parameters()).backward(losses_of(heads, batch))
    GradientIntegrator(plain.parameters()).backward(plain.losses(batch))
    assert_same_grads(heads, plain)


def test_a_frozen_encoder_is_left_alone() -> None:
    model = Joint()
    model.audio.requires_grad_(False)
    heads = headed(model)
    opt = MMParetoOptimizer(torch.optim.SGD(heads.parameters(), lr=0.1))
    opt.step(losses=losses_of(heads, audio_visual_batch()))
    assert list(opt.stats) == ["mm+visual"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({"audio": "ear"}, 3), ValueError, r"no submodule 'ear'.*'audio'.*'visual', 'mm_head'"),
        (({"audio": "audio.0.weight"}, 3), ValueError, "no submodule 'audio.0.weight'"),
        (({"audio": nn.Linear(5, 8)}, 3), ValueError, "no submodule this Linear.*'audio'"),
        (({"audio": 3}, 3), ValueError, "no submodule this int.*'audio'"),
        ((["audio"], 3), TypeError, "encoders must be a mapping such as .* got list"),
        (({}, 3), ValueError, "encoders is empty"),
        ((ENCODERS, 0), ValueError, "num_classes must be positive, got 0"),
        ((ENCODERS, 2.5), TypeError, "integer"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UnimodalHeads(Joint(), *arguments)


@pytest.mark.parametrize("argument", ["select", "pool"])
def test_choices_for_an_unknown_modality(argument: str) -> None:
    options: Any = {argument: {"ear": 1}}
    with pytest.raises(ValueError, match=rf"{argument} has 'ear', .* \['audio', 'visual'\]"):
        UnimodalHeads(Joint(), ENCODERS, 3, **options)


@pytest.mark.parametrize(
    ("wrap", "select", "message"),
    [
        (lambda x: (x, x), None, "'only' gives a tuple.*give select="),
        (lambda x: {"hidden": x}, None, r"a dict with the keys \['hidden'\].*give select="),
        (lambda x: {"hidden": x}, "cell", r"a dict with the keys \['hidden'\].*select='cell'"),
        (lambda x: (x, x), 2, "a tuple, and with select=2 this is no tensor"),
        (lambda x: (x, x), "hidden", "a tuple, and with select='hidden' this is no tensor"),
        (lambda x: (x, x), lambda output: None, "a tuple, and with select=.* is no tensor"),
    ],
)
def test_outputs_that_are_no_tensors(wrap: Any, select: Any, message: str) -> None:
    heads = UnimodalHeads(Encodes((60,), wrap), {"only": "net"}, 3, select=select)
    with pytest.raises(TypeError, match=message):
        heads(torch.randn(4, 2))


@pytest.mark.parametrize(
    ("shape", "pool", "message"),
    [
        ((12, 5), None, r"'only' gives shape \(4, 12, 5\).*give pool=1 for .* pool=2 for"),
        ((6, 2, 5), 1, r"needs \(batch, channels\), got \(4, 2, 5\)"),
        ((60,), 1, r"needs \(batch, channels\), got \(4,\)"),
    ],
)
def test_outputs_that_are_to_be_pooled(shape: tuple[int, ...], pool: Any, message: str) -> None:
    heads = UnimodalHeads(Encodes(shape), {"only": "net"}, 3, pool=pool)
    with pytest.raises(ValueError, match=message):
        heads(torch.randn(4, 2))


def test_a_name_that_no_submodule_can_have() -> None:
    with pytest.raises(ValueError, match=r"dot in it, got \['a.b'\]"):
        UnimodalHeads(LateFusion(), {"a.b": "audio"}, 3)


@pytest.mark.parametrize("pool", ["mean", 5])
def test_a_pool_that_cannot_be_taken(pool: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    heads = UnimodalHeads(model, {"audio": "0"}, 3, pool=pool)
    with pytest.raises(ValueError, match=r"pool=.*modality 'audio', which gives shape \(2, 6\)"):
        heads(torch.randn(2, 5))
