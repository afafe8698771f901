"""A total's backward is that of its losses, whatever a trainer does with the scalar."""

import pickle
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.graph import saved_tensors_hooks

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads

Pair = tuple[LateFusion, Any]


def wrapped(model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def integrator(model: nn.Module) -> GradientIntegrator:
    return GradientIntegrator(model.parameters())


@pytest.fixture(params=[wrapped, integrator])
def pairs(request: pytest.FixtureRequest) -> tuple[Pair, Pair]:
    """A model whose totals are differentiated, and its copy for the oracle."""
    model = LateFusion()
    copied = deepcopy(model)
    return (model, request.param(model)), (copied, request.param(copied))


@pytest.fixture
def trained(pairs: tuple[Pair, Pair]) -> Pair:
    return pairs[0]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.equal(other)


def scaled(losses: Losses, factor: float) -> Losses:
    return {name: loss * factor for name, loss in losses.items()}


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda loss: loss,
    "divided by micro-batches": lambda loss: loss / 3,
    "scaled": lambda loss: GradScaler("cpu", init_scale=2.0**10).scale(loss),
    "scaled and divided": lambda loss: loss / 4 * torch.tensor(2.0**12),
}


@pytest.mark.parametrize("how", FACTORS)
def test_a_factor_on_the_total_is_one_on_every_loss(pairs: tuple[Pair, Pair], how: str) -> None:
    (model, opt), (copied, oracle) = pairs
    for _ in range(2):
        batch = audio_visual_batch()
        losses = model.losses(batch)
        total = opt.total(losses)
        assert total.shape == ()
        assert total.equal(sum(losses.values()))
        FACTORS[how](total).backward()
        oracle.backward({name: FACTORS[how](loss) for name, loss in copied.losses(batch).items()})
        assert_same(grads(model), grads(copied))
        assert list(opt.stats) == ["mm+audio", "mm+visual"]
        opt.zero_grad()
        oracle.zero_grad()


@pytest.mark.parametrize("at_once", [False, True])
def test_totals_of_micro_batches_are_one_large_batch(
    pairs: tuple[Pair, Pair], at_once: bool
) -> None:
    """Also where they are added before one backward."""
    (model, opt), (copied, oracle) = pairs
    whole = audio_visual_batch(32)
    totals = []
    for start in range(0, 32, 8):
        spec, image, labels = (part[start : start + 8] for part in whole)
        totals.append(opt.total(model.losses((spec, image, labels))) / 4)
        if not at_once:
            totals[-1].backward()
    if at_once:
        torch.stack(totals).sum().backward()
    oracle.backward(copied.losses(whole))
    torch.testing.assert_close(grads(model), grads(copied))
    for name, stats in opt.stats.items():
        torch.testing.assert_close(stats.gram, oracle.stats[name].gram)


def test_several_totals_of_one_graph_want_it_retained(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    losses = model.losses(batch)
    first, second = (opt.total({name: losses[name]}) for name in ("mm", "audio"))
    (first + second).backward(retain_graph=True)
    losses = copied.losses(batch)
    oracle.backward({name: losses[name] for name in ("mm", "audio")})
    torch.testing.assert_close(
        [param.grad for param in model.audio.parameters()],
        [param.grad for param in copied.audio.parameters()],
    )


@pytest.mark.parametrize("is_first", [False, True])
def test_another_term_is_added_without_being_integrated(
    pairs: tuple[Pair, Pair], is_first: bool
) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()

    def penalty(of: LateFusion) -> Tensor:
        return torch.stack([param.square().sum() for param in of.parameters()]).sum() / 10

    early = penalty(model) if is_first else None
    total = opt.total(model.losses(batch))
    (total + (penalty(model) if early is None else early)).backward()
    oracle.backward(copied.losses(batch))
    penalty(copied).backward()
    torch.testing.assert_close(grads(model), grads(copied))
    assert all(stats.objectives[0] == "mm" for stats in opt.stats.values())


def test_a_term_of_the_same_graph_wants_it_retained(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    losses = model.losses(batch)
    with pytest.raises(RuntimeError, match="Specify retain_graph=True"):
        (opt.total(losses) + losses["mm"].square()).backward()
    opt.zero_grad()
    losses = model.losses(batch)
    (opt.total(losses) + losses["mm"].square()).backward(retain_graph=True)
    losses = copied.losses(batch)
    oracle.backward(losses, retain_graph=True)
    losses["mm"].square().backward()
    torch.testing.assert_close(grads(model), grads(copied))


def test_a_second_backward_is_refused_or_retained(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    total, losses = opt.total(model.losses(batch)), copied.losses(batch)
    for retain_graph in (True, False):
        total.backward(retain_graph=retain_graph)
        oracle.backward(losses, retain_graph=retain_graph)
        assert_same(grads(model), grads(copied))
    with pytest.raises(RuntimeError, match=r"call total\(\) again, or pass retain_graph=True"):
        total.backward()
    assert_same(grads(model), grads(copied))


def test_a_retained_graph_serves_others(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    losses = model.losses(batch)
    opt.total(losses).backward(retain_graph=True)
    losses["mm"].backward()
    oracle.backward(copied.losses(batch))
    copied.losses(batch)["mm"].backward()
    assert_same(grads(model), grads(copied))


def test_options_are_handed_on(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    given = []
    for of in (model, copied):
        features = of.features(batch)
        blocks = {"audio": of.audio.parameters(), "visual": of.visual.parameters()}  # read once
        options = {"features": features, "param_groups_by_modality": blocks}
        given.append((of.losses_at(features, batch[2]), options))
    opt.total(given[0][0], **given[0][1]).backward()
    oracle.backward(given[1][0], **given[1][1])
    assert_same(grads(model), grads(copied))
    assert list(opt.stats) == ["audio", "visual"]


def test_blocks_by_hand_may_be_iterators(trained: Pair) -> None:
    model, opt = trained
    blocks = {"all": model.parameters()}
    opt.total(model.losses(audio_visual_batch()), param_groups_by_modality=blocks).backward()
    assert list(opt.stats) == ["all"]


WRONG: list[tuple[Callable[[LateFusion, Losses], Any], dict[str, Any], str]] = [
    (lambda _, losses: sum(losses.values()), {}, "losses must be a mapping"),
    (lambda _, losses: {}, {}, "losses is empty"),
    (lambda _, losses: {**losses, "mm": losses["mm"].detach()}, {}, "loss 'mm' has no graph"),
    (lambda _, losses: {**losses, "mm": None}, {}, "loss 'mm' is None"),
    (lambda _, losses: losses, {"features": {}}, "features is empty"),
    (lambda _, losses: losses, {"param_groups_by_modality": {"a": nn.Linear(1, 1)}}, "not held"),
]


@pytest.mark.parametrize(("losses_of", "options", "message"), WRONG)
def test_arguments_are_checked_at_once(
    trained: Pair, losses_of: Any, options: dict[str, Any], message: str
) -> None:
    model, opt = trained
    losses = losses_of(model, model.losses(audio_visual_batch()))
    with pytest.raises((TypeError, ValueError), match=message):
        opt.total(losses, **options)


def test_an_edit_of_a_loss_comes_after_the_total(pairs: tuple[Pair, Pair]) -> None:
    """As it does after a sum."""
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    losses = model.losses(batch)
    total = opt.total(losses)
    losses["audio"] *= 100
    total.backward()
    oracle.backward(copied.losses(batch))
    assert_same(grads(model), grads(copied))


def test_its_value_is_a_tensor_as_any_other(trained: Pair) -> None:
    model, opt = trained
    losses = model.losses(audio_visual_batch())
    value = float(torch.stack(list(losses.values())).detach().sum())
    total = opt.total(losses)
    assert total.item() == pytest.approx(value)
    assert not total.detach().requires_grad
    assert bool(total.isfinite())
    with pytest.raises(RuntimeError, match="graph leaves"):  # as of a plain sum
        deepcopy(total)
    assert float(pickle.loads(pickle.dumps(total.detach()))) == total.item()
    assert opt.stats == {}


def test_the_owner_is_copied_and_pickled_between(trained: Pair) -> None:
    model, opt = trained
    total = opt.total(model.losses(audio_visual_batch()))
    copies = deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))
    total.backward()
    assert all(param.grad is not None for param in model.parameters())
    assert all(p.grad is None for copied, _ in copies for p in copied.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_sum(trained: Pair, off: Any) -> None:
    """As where a trainer evaluates by the function that it trains by."""
    model, opt = trained
    with off():
        losses = model.losses(audio_visual_batch())
        total = opt.total(losses)
    assert not total.requires_grad
    assert total.equal(sum(losses.values()))


def test_one_loss_shares_no_memory_with_its_total(trained: Pair) -> None:
    model, opt = trained
    loss = model.losses(audio_visual_batch())["mm"]
    before = loss.item()
    with torch.no_grad():
        opt.total({"mm": loss}).add_(1)
    opt.total({"mm": loss}).detach().add_(1)
    assert loss.item() == before


def test_losses_of_different_dtypes_and_shapes(trained: Pair) -> None:
    model, opt = trained
    losses = model.losses(audio_visual_batch())
    losses = {"mm": losses["mm"].bfloat16(), "audio": losses["audio"].double().reshape(1, 1)}
    total = opt.total(losses)
    assert total.shape == ()
    assert total.dtype == torch.float64
    total.backward()
    assert list(opt.stats) == ["mm+audio"]
    assert all(found is None or found.dtype == torch.float32 for found in grads(model))


class Noted(Tensor):
    """A subclass, as MONAI and fastai have them."""


def test_losses_of_a_subclass_make_a_plain_total(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs
    batch = audio_visual_batch()
    total = opt.total({k: v.as_subclass(Noted) for k, v in model.losses(batch).items()})
    assert type(total) is Tensor
    total.backward()
    oracle.backward(copied.losses(batch))
    assert_same(grads(model), grads(copied))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph_is_refused(trained: Pair) -> None:
    model, opt = trained
    total = opt.total(model.losses(audio_visual_batch()))
    with pytest.raises(RuntimeError, match="Leave create_graph out"):
        total.backward(create_graph=True)
    assert all(param.grad is None for param in model.parameters())


def test_autograd_grad_is_refused(trained: Pair) -> None:
    model, opt = trained
    total = opt.total(model.losses(audio_visual_batch()))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(total, list(model.parameters()))


def test_a_backward_for_some_inputs_is_told_of() -> None:
    """It fills nothing, as those inputs are not behind the total; a hint says so in ten steps."""
    model = LateFusion()
    opt = wrapped(model)
    batch = audio_visual_batch()
    for _ in range(9):
        opt.total(model.losses(batch)).backward(inputs=list(model.parameters()))
        opt.step()
    with pytest.warns(UserWarning, match=r"or total\(\{...\}\).backward\(\) without inputs="):
        opt.step()


def test_an_error_inside_changes_nothing(trained: Pair) -> None:
    model, opt = trained
    batch = audio_visual_batch()
    opt.total(model.losses(batch)).backward()
    before, objects = grads(model), [param.grad for param in model.parameters()]

    def refuse(_: Tensor) -> None:
        raise LookupError("of the user's own")

    losses = model.losses(batch)
    losses["audio"].register_hook(refuse)
    with pytest.raises(LookupError, match="of the user's own"):
        opt.total(losses).backward()
    assert_same(grads(model), before)
    assert all(p.grad is kept for p, kept in zip(model.parameters(), objects, strict=True))
    opt.total(model.losses(batch)).backward()  # goes on with the window
    copied = deepcopy(model)
    oracle = wrapped(copied)
    oracle.zero_grad()
    oracle.backward(scaled(copied.losses(batch), 2.0))
    torch.testing.assert_close(grads(model), grads(copied))


def test_a_graph_that_was_freed_is_named(trained: Pair) -> None:
    model, opt = trained
    losses = model.losses(audio_visual_batch())
    total = opt.total(losses)
    losses["visual"].backward()
    with pytest.raises(RuntimeError, match="loss 'visual': its graph has been freed"):
        total.backward()


class Kept:
    """What a graph keeps for its backward, which lives as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output of the graph would keep it


def kept_by(losses_of: Callable[[], Tensor]) -> tuple[Tensor, list["weakref.ref[Kept]"]]:
    alive = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.append(weakref.ref(kept))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        return losses_of(), alive


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("is_total", [False, True])
def test_no_graph_lives_longer_than_a_plain_sums(
    trained: Pair, is_total: bool, differentiate: bool
) -> None:
    """Until its backward, or until it is dropped without one; the total itself may live on."""
    model, opt = trained
    batch = audio_visual_batch()

    def losses_of() -> Tensor:
        losses = model.losses(batch)
        return opt.total(losses) if is_total else torch.stack(list(losses.values())).sum()

    total, alive = kept_by(losses_of)
    assert len(alive) > 10
    assert all(each() is not None for each in alive)
    if differentiate:
        total.backward()
    else:
        del total
    assert all(each() is None for each in alive)


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.usefixtures("compiler")
def test_a_compiled_step(pairs: tuple[Pair, Pair]) -> None:
    (model, opt), (copied, oracle) = pairs

    @torch.compile(backend="aot_eager")
    def step(batch: Any) -> Tensor:
        opt.zero_grad()
        total: Tensor = opt.total(model.losses(batch))
        (total / 2).backward()
        return total.detach()

    for _ in range(3):
        batch = audio_visual_batch()
        value = step(batch)
        oracle.zero_grad()
        losses = copied.losses(batch)
        oracle.backward(scaled(losses, 0.5))
        torch.testing.assert_close(value, torch.stack(list(losses.values())).sum())
        torch.testing.assert_close(grads(model), grads(copied))
    assert list(opt.stats) == ["mm+audio", "mm+visual"]


def test_a_scaler_that_skips_a_step() -> None:
    model = LateFusion()
    copied = deepcopy(model)
    found, expected = wrapped(model), wrapped(copied)
    scaler, other = (GradScaler("cpu", init_scale=2.0**8) for _ in range(2))
    for number in range(4):
        batch = audio_visual_batch()
        factor = torch.inf if number == 1 else 1.0
        with torch.autocast("cpu", torch.float16):
            total = found.total(scaled(model.losses(batch), factor))
            losses = scaled(copied.losses(batch), factor)
        scaler.scale(total).backward()
        expected.backward({name: other.scale(loss) for name, loss in losses.items()})
        for opt, each in ((found, scaler), (expected, other)):
            each.unscale_(opt)
            nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.1)
            each.step(opt)
            each.update()
            opt.zero_grad()
        assert scaler.get_scale() == other.get_scale()
        assert_same([*model.parameters()], [*copied.parameters()])


def test_a_closure_that_differentiates_a_total() -> None:
    model = LateFusion()
    copied = deepcopy(model)
    opt, oracle = wrapped(model), wrapped(copied)
    batch = audio_visual_batch()

    def closure() -> Tensor:
        total = opt.total(model.losses(batch))
        opt.zero_grad()
        total.backward()
        return total

    opt.step(closure)
    oracle.step(losses=copied.losses(batch))
    assert_same([*model.parameters()], [*copied.parameters()])
