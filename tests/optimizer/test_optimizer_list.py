"""Several optimizers on one graph."""

from copy import deepcopy
from io import BytesIO
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch


def split(model: LateFusion) -> tuple[list[Tensor], list[Tensor]]:
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim < 2]


def bases(model: LateFusion) -> list[Optimizer]:
    """One for the matrices and one for the rest, each with a state of its own."""
    matrices, rest = split(model)
    return [SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=0.01)]


def trained(model: LateFusion, opt: Any, steps: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))


def test_each_steps_with_the_gradients_of_one_integrator() -> None:
    model = LateFusion()
    twin = deepcopy(model)
    trained(model, MMParetoOptimizer(bases(model)), 4)
    integrator, singles = GradientIntegrator(twin.parameters()), bases(twin)
    torch.manual_seed(0)
    for _ in range(4):
        integrator.zero_grad()
        integrator.backward(twin.losses(audio_visual_batch()))
        for single in singles:
            single.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)
    assert list(integrator.stats) == ["mm+audio", "mm+visual"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_and_adamw() -> None:
    model = LateFusion()
    matrices, rest = split(model)
    opt = MMParetoOptimizer([torch.optim.Muon(matrices, lr=0.02), AdamW(rest, lr=3e-3)])
    batch = audio_visual_batch()
    first = sum(float(loss.detach()) for loss in model.losses(batch).values())
    for _ in range(30):
        opt.zero_grad()
        opt.step(losses=model.losses(batch))
    assert sum(float(loss.detach()) for loss in model.losses(batch).values()) < 0.7 * first


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_goes_on_bit_for_bit(weights_only: bool) -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(bases(model))
    trained(model, opt, 3)
    file = BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    trained(model, opt, 3, seed=1)
    file.seek(0)
    kept = torch.load(file, weights_only=weights_only)
    other = LateFusion()
    other.load_state_dict(kept["model"])
    resumed = MMParetoOptimizer(bases(other))
    resumed.load_state_dict(kept["opt"])
    trained(other, resumed, 3, seed=1)
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_a_checkpoint_numbers_parameters_through() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(bases(model))
    trained(model, opt, 1)
    state = opt.state_dict()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(list(model.parameters()))))
    assert sorted(state["state"]) == numbers


def test_copies_go_on_alike() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(bases(model))
    trained(model, opt, 2)
    twin, other = deepcopy((model, opt))
    trained(model, opt, 2, seed=1)
    trained(twin, other, 2, seed=1)
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("on", ["wrapper", "each base"])
def test_schedulers(on: str) -> None:
    model = LateFusion()
    singles = bases(model)
    opt = MMParetoOptimizer(singles)
    owners: list[Optimizer] = [opt] if on == "wrapper" else singles
    schedulers = [torch.optim.lr_scheduler.StepLR(owner, 1, 0.5) for owner in owners]
    trained(model, opt, 1)
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.005]
    assert [single.param_groups[0]["lr"] for single in singles] == [0.05, 0.005]


def test_hooks_run_once_around_all() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(bases(model))
    seen: list[tuple[str, bool]] = []
    weight, bias = list(model.audio.parameters())[:2]
    first, last = weight.clone(), bias.clone()

    def note(name: str) -> Any:
        def hook(owner: Any, *_: Any) -> None:
            moved = not torch.equal(first, weight)
            moved |= not torch.equal(last, bias)
            assert owner is opt
            seen.append((name, moved))

        return hook

    opt.register_step_pre_hook(note("before"))
    opt.register_step_post_hook(note("after"))
    trained(model, opt, 1)
    assert seen == [("before", False), ("after", True)]


def test_the_scaler_skips_all_or_none() -> None:
    model = LateFusion()
    opt, scaler = MMParetoOptimizer(bases(model)), GradScaler("cpu", init_scale=4.0)
    before = deepcopy(list(model.parameters()))
    for factor in (torch.inf, 1.0):
        opt.zero_grad()
        losses = model.losses(audio_visual_batch())
        losses["mm"] = losses["mm"] * factor
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if factor == torch.inf else not any(same)


def test_a_closure_is_evaluated_once() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    twin = deepcopy(model)
    opt = MMParetoOptimizer(bases(model))
    calls = []

    def closure() -> dict[str, Tensor]:
        calls.append(1)
        opt.zero_grad()
        return model.losses(batch)

    total = opt.step(closure)
    MMParetoOptimizer(bases(twin)).step(losses=(losses := twin.losses(batch)))
    torch.testing.assert_close(total, torch.stack(list(losses.values())).sum())
    assert len(calls) == 1
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_modes_reach_every_base_that_has_them() -> None:
    model = LateFusion()
    audio, visual = list(model.audio.parameters()), list(model.visual.parameters())
    heads = [p for p in model.parameters() if all(p is not q for q in (*audio, *visual))]
    averaging = [SGDScheduleFree(audio, lr=0.1), AdamWScheduleFree(heads, lr=0.1)]
    opt = MMParetoOptimizer([averaging[0], SGD(visual, lr=0.1), averaging[1]])
    opt.train()
    trained(model, opt, 3)
    before = [p.detach().clone() for p in model.parameters()]
    opt.eval()
    moved = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not p.equal(old)}
    assert moved == {id(p) for p in (*audio, *heads)}
    opt.train()
    torch.testing.assert_close(list(model.parameters()), before)
    with pytest.raises(AttributeError, match="train"):  # a single one's own affair
        MMParetoOptimizer(SGD(visual, lr=0.1)).train()


def test_one_in_a_list_is_that_one() -> None:
    base = SGD(LateFusion().parameters(), lr=0.1)
    assert MMParetoOptimizer([base]).optimizer is base


def test_groups_may_be_replaced() -> None:
    model = LateFusion()
    first, second = bases(model)
    opt = MMParetoOptimizer([first, second])
    replaced = [{**group, "lr": 0.5} for group in opt.param_groups]
    opt.param_groups = replaced
    assert opt.param_groups == replaced
    assert [group["lr"] for group in (*first.param_groups, *second.param_groups)] == [0.5, 0.5]


def test_mistakes() -> None:
    model = LateFusion()
    matrices, rest = split(model)
    with pytest.raises(ValueError, match="is in optimizer 0 too"):
        MMParetoOptimizer([SGD(matrices, lr=0.1), SGD([*rest, matrices[0]], lr=0.1)])
    with pytest.raises(TypeError, match="LBFGS evaluates the losses more than once"):
        MMParetoOptimizer([SGD(matrices, lr=0.1), torch.optim.LBFGS(rest)])
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        MMParetoOptimizer([SGD(matrices, lr=0.1), rest])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"several optimizers go in one list"):
        MMParetoOptimizer(*bases(model))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the module LateFusion: give its .parameters\(\)"):
        GradientIntegrator(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty list"):
        MMParetoOptimizer([])
    opt = MMParetoOptimizer(bases(model))
    with pytest.raises(ValueError, match="call it on one of them"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_group_that_is_added_to_one_joins_in() -> None:
    model = LateFusion()
    added = list(model.visual.parameters())
    held = [p for p in model.parameters() if all(p is not other for other in added)]
    first, second = SGD(held[:3], lr=0.1), SGD(held[3:], lr=0.1)
    opt = MMParetoOptimizer([first, second])
    first.add_param_group({"params": added})
    trained(model, opt, 1)
    assert list(opt.stats) == ["mm+audio", "mm+visual"]
