"""MMParetoOptimizer is a torch.optim.Optimizer around any other."""

import io
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, train, vectors_as_losses

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "ScheduleFree": lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01),
}


def wrapped_sgd(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def stepper(opt: MMParetoOptimizer) -> Callable[[Losses], None]:
    def step(losses: Losses) -> None:
        opt.zero_grad()
        opt.step(losses=losses)

    return step


@pytest.mark.parametrize("base", BASES)
def test_one_loss_is_the_base_optimizer_bit_for_bit(base: str) -> None:
    plain, model = LateFusion(), LateFusion()
    model.load_state_dict(plain.state_dict())
    optimizer = BASES[base](plain.parameters())
    wrapped = MMParetoOptimizer(BASES[base](model.parameters()))
    for opt in (optimizer, wrapped):
        if hasattr(opt, "train"):
            opt.train()  # schedule-free has modes; the wrapper hands the call on

    def plain_step(losses: Losses) -> None:
        optimizer.zero_grad()
        losses["mm"].backward()
        optimizer.step()

    expected = train(plain, plain_step, steps=5)
    step = stepper(wrapped)
    found = train(model, lambda losses: step({"mm": losses["mm"]}), steps=5)
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("integration", ["mmpareto", "pareto", "uniform"])
def test_every_base_learns(base: str, integration: Any) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(BASES[base](model.parameters()), integration=integration)
    if hasattr(opt, "train"):
        opt.train()
    before = sum(float(loss.detach()) for loss in model.losses(batch).values())
    for _ in range(30):
        opt.zero_grad()
        opt.step(losses=model.losses(batch))
    after = sum(float(loss.detach()) for loss in model.losses(batch).values())
    assert after < 0.8 * before


@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_uniform_is_the_summed_backward(base: str) -> None:
    plain, model = LateFusion(dtype=torch.float64), LateFusion(dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    optimizer = BASES[base](plain.parameters())
    wrapped = MMParetoOptimizer(BASES[base](model.parameters()), integration="uniform")

    def plain_step(losses: Losses) -> None:
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    expected, found = train(plain, plain_step, 10), train(model, stepper(wrapped), 10)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_lbfgs_re_evaluates_the_losses() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=10)
    opt = MMParetoOptimizer(base, integration="uniform")
    calls = []

    def closure() -> Losses:
        opt.zero_grad()
        losses = model.losses(batch)
        calls.append(sum(float(loss.detach()) for loss in losses.values()))
        return losses

    first = opt.step(closure)
    assert float(first) == pytest.approx(calls[0], rel=1e-6)
    assert len(calls) > 5
    opt.step(closure)
    assert calls[-1] < 0.8 * calls[0]


@pytest.mark.parametrize("options", [{}, {"integration": "uniform", "gamma": 1.5}])
def test_lbfgs_is_told_of_gradients_that_are_those_of_no_function(options: dict[str, Any]) -> None:
    base = torch.optim.LBFGS(LateFusion().parameters())
    with pytest.warns(UserWarning, match=r'LBFGS takes .grad .*integration="uniform"'):
        MMParetoOptimizer(base, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MMParetoOptimizer(base, integration="uniform")


def test_a_closure_may_do_its_own_backward() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    other = deepcopy(model)
    opt, reference = wrapped_sgd(model), wrapped_sgd(other)

    def closure() -> Tensor:
        opt.zero_grad()
        losses = model.losses(batch)
        opt.backward(losses)
        return losses["mm"].detach()

    assert float(opt.step(closure)) > 0
    reference.step(losses=other.losses(batch))
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_backward_then_step_is_step_with_losses() -> None:
    one, batch = LateFusion(), audio_visual_batch()
    two = deepcopy(one)
    first, second = wrapped_sgd(one), wrapped_sgd(two)
    first.step(losses=one.losses(batch))
    second.backward(two.losses(batch))
    assert second.step() is None
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_param_groups_state_and_defaults_are_the_bases_own() -> None:
    model = LateFusion()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    opt = MMParetoOptimizer(base)
    assert isinstance(opt, torch.optim.Optimizer)
    opt.step(losses=model.losses(audio_visual_batch()))
    base.load_state_dict(base.state_dict())  # replaces the base's lists
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults is base.defaults
    opt.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    opt.param_groups, opt.state = [*base.param_groups], {**base.state}
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state


def test_a_checkpoint_of_the_plain_optimizer_loads_and_back() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(torch.optim.Adam(model.parameters()))
    opt.step(losses=model.losses(batch))
    plain = torch.optim.Adam(deepcopy(model).parameters())
    plain.load_state_dict(opt.state_dict())
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other = MMParetoOptimizer(torch.optim.Adam(model.parameters()))
    other.load_state_dict(torch.load(file))
    assert str(other.state_dict()) == str(opt.state_dict())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: lr_scheduler.StepLR(opt, 1, 0.5),
        lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=10),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    ],
)
def test_schedulers_drive_the_base(scheduler: Callable[..., lr_scheduler.LRScheduler]) -> None:
    model = LateFusion()
    opt, plain = wrapped_sgd(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ours, reference = scheduler(opt), scheduler(plain)
    for _ in range(4):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
        plain.step()
        ours.step()
        reference.step()
        assert opt.optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_added_groups_join_the_blocks() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = MMParetoOptimizer(torch.optim.SGD(model.audio.parameters(), lr=0.1))
    opt.backward(model.losses(batch))
    assert list(opt.stats) == ["mm+audio"]
    opt.add_param_group({"params": model.visual.parameters(), "lr": 0.01})
    assert len(opt.optimizer.param_groups) == 2
    opt.backward(model.losses(batch))
    assert list(opt.stats) == ["mm+audio", "mm+visual"]


def test_step_hooks_run_once_with_gradients_and_this_optimizer() -> None:
    model = LateFusion()
    opt = wrapped_sgd(model)
    seen: list[tuple[str, bool]] = []

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        assert optimizer is opt
        seen.append(("before", next(model.parameters()).grad is not None))

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        assert optimizer is opt
        seen.append(("after", "mm+audio" in optimizer.stats))

    handles = [opt.register_step_pre_hook(before), opt.register_step_post_hook(after)]
    opt.step(losses=model.losses(audio_visual_batch()))
    assert seen == [("before", True), ("after", True)]
    for handle in handles:
        handle.remove()
    opt.step(losses=model.losses(audio_visual_batch()))
    assert len(seen) == 2


def test_global_hooks_run_once() -> None:
    seen: list[type] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(type(optimizer))
    )
    model = LateFusion()
    wrapped_sgd(model).step(losses=model.losses(audio_visual_batch()))
    handle.remove()
    assert seen == [torch.optim.SGD]


def test_state_dict_hooks_are_handed_this_optimizer() -> None:
    opt = wrapped_sgd(LateFusion())
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def record(optimizer: Any, *_: Any) -> None:
            assert optimizer is opt
            seen.append(name)

        return record

    opt.register_state_dict_pre_hook(hook("save"))
    opt.register_state_dict_post_hook(hook("saved"))
    opt.register_load_state_dict_pre_hook(hook("load"))
    opt.register_load_state_dict_post_hook(hook("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = LateFusion()
    opt = wrapped_sgd(model)
    opt.backward(model.losses(audio_visual_batch()))
    opt.zero_grad(set_to_none=set_to_none)
    for param in model.parameters():
        assert param.grad is None if set_to_none else not param.grad.any()  # type: ignore[union-attr]


def copies(kind: str, opt: MMParetoOptimizer, model: LateFusion) -> Any:
    pair = (opt, model)
    return deepcopy(pair) if kind == "deepcopy" else pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize("explicit", [False, True])
def test_copies_go_on_alike(kind: str, explicit: bool) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    blocks = {"audio": model.audio, "visual": model.visual} if explicit else None
    opt = wrapped_sgd(model, param_groups_by_modality=blocks, gamma=1.2)
    lr_scheduler.StepLR(opt, 1)  # patches opt.step, which must not travel
    opt.step(losses=model.losses(batch))
    twin, other = copies(kind, opt, model)
    for pair in ((opt, model), (twin, other)):
        pair[0].zero_grad()
        pair[0].step(losses=pair[1].losses(batch))
    assert twin.optimizer is not opt.optimizer
    assert list(twin.stats) == list(opt.stats)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_repr_tells_the_settings_and_the_base() -> None:
    text = repr(wrapped_sgd(LateFusion(), gamma=1.25))
    assert "MMParetoOptimizer" in text
    assert "integration='mmpareto', gamma=1.25, rescale='encoder'" in text
    assert "found by reach" in text
    assert "lr: 0.1" in text
    model = LateFusion()
    named = wrapped_sgd(model, param_groups_by_modality={"ears": model.audio})
    assert "ears" in repr(named)


def test_attributes_of_the_base_are_found_but_private_ones_are_not() -> None:
    opt = wrapped_sgd(LateFusion())
    opt.optimizer.note = "hello"  # type: ignore[attr-defined]
    opt.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    assert opt.note == "hello"
    assert not hasattr(opt, "_step_supports_amp_scaling")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = opt.nothing_of_the_kind


def test_a_callable_gets_the_gram_matrix_and_decides() -> None:
    param = nn.Parameter(torch.zeros(3))
    rows = torch.randn(2, 3)
    seen: list[Tensor] = []

    def left_only(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.tensor([1.0, 0.0])

    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1), integration=left_only)
    opt.backward(vectors_as_losses(param, rows))
    torch.testing.assert_close(seen[0], rows.double() @ rows.double().T)
    torch.testing.assert_close(param.grad, rows[0])


def test_a_scaler_skips_the_step_when_a_loss_overflows() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = wrapped_sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [param.detach().clone() for param in model.parameters()]
    losses = model.losses(batch)
    losses["audio"] = losses["audio"] * torch.inf
    opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
    scaler.step(opt)
    scaler.update()
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**9

    opt.zero_grad()
    opt.backward({n: scaler.scale(loss) for n, loss in model.losses(batch).items()})
    scaler.step(opt)
    other = LateFusion()
    other.load_state_dict(dict(zip(model.state_dict(), before, strict=True)))
    wrapped_sgd(other).step(losses=other.losses(batch))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("integration", ["mmpareto", "pareto"])
def test_a_loss_that_is_nan_propagates(integration: Any) -> None:
    model = LateFusion()
    opt = wrapped_sgd(model, integration=integration)
    losses = model.losses(audio_visual_batch())
    losses["audio"] = losses["audio"] * torch.nan
    opt.step(losses=losses)
    assert all(param.isnan().all() for param in model.audio.parameters())
    assert all(param.isfinite().all() for param in model.visual.parameters())


@pytest.mark.parametrize("options", [{}, {"rescale": "tensor"}, {"integration": "pareto"}])
def test_a_whole_step_reads_nothing_back_to_the_host(options: dict[str, Any]) -> None:
    """Meta tensors have no values: a branch on one of them would raise."""
    with torch.device("meta"):
        model, batch = LateFusion(), (torch.empty(4, 5), torch.empty(4, 7))
        label = torch.empty(4, dtype=torch.long)
        opt = wrapped_sgd(model, **options)
        for _ in range(2):
            opt.zero_grad()
            opt.step(losses=model.losses((*batch, label)))
    assert opt.stats["mm+audio"].scale.device.type == "meta"


def test_a_whole_feature_space_step_reads_nothing_back_to_the_host() -> None:
    with torch.device("meta"):
        model, batch = LateFusion(), (torch.empty(4, 5), torch.empty(4, 7))
        label = torch.empty(4, dtype=torch.long)
        opt = wrapped_sgd(model)
        for _ in range(2):
            features = model.features((*batch, label))
            opt.zero_grad()
            opt.step(losses=model.losses_at(features, label), features=features)
    assert opt.stats["audio"].scale.device.type == "meta"


def test_an_accumulation_reads_nothing_back_to_the_host() -> None:
    with torch.device("meta"):
        model, batch = LateFusion(), (torch.empty(4, 5), torch.empty(4, 7))
        label = torch.empty(4, dtype=torch.long)
        opt = wrapped_sgd(model)
        for _ in range(2):
            opt.zero_grad(set_to_none=False)
            for _ in range(3):
                opt.backward(model.losses((*batch, label)))
            opt.step()
    assert opt.stats["mm+visual"].gram.device.type == "meta"


def test_the_encoders_graphs_are_freed() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    losses = model.losses(batch)
    wrapped_sgd(model).backward(losses)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_a_hook_on_a_wide_layers_output_is_heard() -> None:
    layer = nn.Linear(700, 700)
    out = layer(torch.randn(6, 700))
    out.register_hook(torch.neg)
    loss = out.square().mean()
    expected = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
    MMParetoOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1)).step(losses={"a": loss})
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), expected)
