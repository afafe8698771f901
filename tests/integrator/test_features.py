"""Feature-space integration: gradients meet at the encoders' outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer, mmpareto_coefficients
from tests.models import LateFusion

Batch = tuple[Tensor, Tensor, Tensor]


def setting(seed: int = 0, size: int = 9) -> tuple[LateFusion, Batch]:
    torch.manual_seed(seed)
    model = LateFusion()
    return model, (torch.randn(size, 5), torch.randn(size, 7), torch.randint(3, (size,)))


def optimizer(model: nn.Module, **settings: object) -> MMParetoOptimizer:
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return MMParetoOptimizer(base, **settings)  # type: ignore[arg-type]


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: LateFusion, batch: Batch, gamma: float = 1.5) -> dict[str, Tensor]:
    """The same with detached features and ``backward``, as one would write it without us."""
    features = model.features(batch)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in features}
    model.zero_grad()
    for name in ("mm", "audio", "visual"):
        cut = {key: value.detach().requires_grad_() for key, value in features.items()}
        model.losses_at(cut, batch[2])[name].backward()
        for key, value in cut.items():
            if value.grad is not None:
                found[key][name] = value.grad
    for key, by_loss in found.items():
        matrix = torch.stack([gradient.flatten() for gradient in by_loss.values()]).double()
        c = mmpareto_coefficients(matrix @ matrix.T, gamma, eps=torch.finfo(torch.float32).eps)
        features[key].backward((c @ matrix).view_as(features[key]).float())
    return grads(model)


@given(seed=st.integers(0, 10_000))
def test_gradients_are_those_of_detached_features(seed: int) -> None:
    model, batch = setting(seed)
    expected = by_hand(model, batch)
    opt = optimizer(model)
    opt.zero_grad()
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    torch.testing.assert_close(grads(model), expected, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 10_000))
def test_direction_is_common_to_all_losses_at_the_features(seed: int) -> None:
    model, batch = setting(seed)
    seen: dict[str, Tensor] = {}
    features = model.features(batch)
    for name, feature in features.items():
        feature.register_hook(lambda g, name=name: seen.__setitem__(name, g))
    losses = model.losses_at(features, batch[2])
    at = {
        name: torch.autograd.grad(loss, list(features.values()), None, True, allow_unused=True)
        for name, loss in losses.items()
    }
    seen.clear()
    optimizer(model).backward(losses, features=features)
    for position, name in enumerate(features):
        for gradients in at.values():
            gradient = gradients[position]
            if gradient is not None:
                rounding = 1e-5 * seen[name].norm() * gradient.norm()
                assert (seen[name] * gradient).sum() >= -rounding


@given(seed=st.integers(0, 10_000))
def test_exact_for_a_linear_encoder_and_one_example(seed: int) -> None:
    # There dz/dW is |x| times an isometry, so that angles and ratios are the same in both spaces.
    model, batch = setting(seed, size=1)
    model.audio = nn.Sequential(nn.Linear(5, 6, bias=False))
    model.visual = nn.Sequential(nn.Linear(7, 6, bias=False))
    opt = optimizer(model)
    opt.backward(model.losses_at(model.features(batch), batch[2]))
    exact = grads(model)
    opt.zero_grad()
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    torch.testing.assert_close(grads(model), exact, atol=1e-4, rtol=1e-3)


def test_uniform_is_the_plain_gradient_of_the_sum() -> None:
    model, batch = setting()
    torch.stack(list(model.losses_at(model.features(batch), batch[2]).values())).sum().backward()
    expected = grads(model)
    opt = optimizer(model, integration="uniform")
    opt.zero_grad()
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    torch.testing.assert_close(grads(model), expected)


def test_encoders_are_passed_through_once() -> None:
    model, batch = setting()
    passes: list[int] = []
    model.audio[0].weight.register_hook(lambda _: passes.append(1))  # type: ignore[operator]
    opt = optimizer(model)
    for _ in range(2):  # the first step may look at more
        passes.clear()
        features = model.features(batch)
        opt.step(losses=model.losses_at(features, batch[2]), features=features)
    assert len(passes) == 1
    opt.step(losses=model.losses_at(model.features(batch), batch[2]))
    assert len(passes) == 3


def test_step_updates_with_what_backward_leaves() -> None:
    model, batch = setting()
    opt = optimizer(model)
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    expected = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters()}  # type: ignore[operator]
    opt.zero_grad()
    features = model.features(batch)
    opt.step(losses=model.losses_at(features, batch[2]), features=features)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, expected)


def test_stats_are_named_by_feature_and_shared_heads_by_loss() -> None:
    model, batch = setting()
    model.visual_head = model.audio_head
    opt = optimizer(model)
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    assert {name: stats.objectives for name, stats in opt.stats.items()} == {
        "audio": ("mm", "audio"),
        "visual": ("mm", "visual"),
        "audio+visual": ("audio", "visual"),
    }


def test_micro_batches_add_up() -> None:
    model, batch = setting()
    opt = optimizer(model)
    expected: dict[str, Tensor] = {}
    for half in ([part[:4] for part in batch], [part[4:] for part in batch]):
        micro: Batch = (half[0], half[1], half[2])
        opt.zero_grad()
        features = model.features(micro)
        opt.backward(model.losses_at(features, micro[2]), features=features)
        for name, gradient in grads(model).items():
            expected[name] = expected.get(name, torch.zeros(())) + gradient
    opt.zero_grad()
    for half in ([part[:4] for part in batch], [part[4:] for part in batch]):
        features = model.features((half[0], half[1], half[2]))
        opt.backward(model.losses_at(features, half[2]), features=features)
    torch.testing.assert_close(grads(model), expected)


def test_three_objectives_at_a_feature_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 6), [nn.Linear(6, 1) for _ in range(3)]
    model = nn.ModuleList([encoder, *heads])
    x = torch.randn(5, 4)

    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        z = encoder(x).T
        return z, {str(i): (head(z.T) - i).square().mean() for i, head in enumerate(heads)}

    z, losses = forward()
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses.values()]
    matrix = torch.stack([row.flatten() for row in rows]).double()
    c = mmpareto_coefficients(matrix @ matrix.T, eps=torch.finfo(torch.float32).eps).float()
    integrated = (c @ torch.stack([row.flatten() for row in rows])).view_as(z)
    (expected,) = torch.autograd.grad(z, encoder.weight, integrated)
    z, losses = forward()
    optimizer(model).backward(losses, features={"z": z})
    torch.testing.assert_close(encoder.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_is_left_out() -> None:
    model, batch = setting()
    model.audio.requires_grad_(False)
    opt = optimizer(model)
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features={"visual": features["visual"]})
    assert model.audio[0].weight.grad is None
    assert set(opt.stats) == {"visual"}
    with pytest.raises(ValueError, match="feature 'audio' has no graph"):
        opt.backward(model.losses_at(features, batch[2]), features=features)


def untouched(model: LateFusion, opt: MMParetoOptimizer) -> None:
    assert grads(model) == {}
    assert opt.stats == {}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda z: list(z.values()), TypeError, "features must be a mapping"),
        (lambda z: {}, ValueError, "features is empty"),
        (lambda z: {**z, "audio": (z["audio"],)}, TypeError, "feature 'audio' must be a tensor"),
        (lambda z: {**z, "again": z["audio"]}, ValueError, "same tensor"),
        (lambda z: {**z, "audio": z["audio"].detach()}, ValueError, "'audio' has no graph"),
        (lambda z: {**z, "audio": z["audio"] * 1}, ValueError, "reaches .* around the features"),
        (lambda z: {**z, "sum": z["audio"] + z["visual"]}, ValueError, "is computed from feature"),
    ],
)
def test_wrong_features_are_named(wrong: object, error: type[Exception], message: str) -> None:
    model, batch = setting()
    opt = optimizer(model)
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    with pytest.raises(error, match=message):
        opt.backward(losses, features=wrong(features))  # type: ignore[operator]
    untouched(model, opt)


def test_a_feature_that_no_loss_reaches() -> None:
    model, batch = setting()
    opt = optimizer(model)
    features = model.features(batch)
    losses = {"audio": model.losses_at(features, batch[2])["audio"]}
    with pytest.raises(ValueError, match="no loss reaches feature 'visual'"):
        opt.backward(losses, features=features)
    untouched(model, opt)


def test_a_parameter_reached_around_the_features() -> None:
    model, batch = setting()
    opt = optimizer(model)
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    losses["mm"] = losses["mm"] + next(model.audio.parameters()).square().sum()
    with pytest.raises(ValueError, match=r"loss 'mm' reaches param_groups\[0\]\['params'\]\[0\]"):
        opt.backward(losses, features=features)
    untouched(model, opt)


def test_a_freed_graph_and_a_wrong_combination() -> None:
    model, batch = setting()
    opt = optimizer(model)
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    opt.backward(losses, features=features)
    before = grads(model)
    with pytest.raises(
        RuntimeError, match=r"features \['audio', 'visual'\]: its graph has been freed"
    ):
        opt.backward(model.losses_at(features, batch[2]), features=features)
    torch.testing.assert_close(grads(model), before)
    opt.zero_grad()
    with pytest.raises(ValueError, match="rescale"):
        optimizer(model, rescale="tensor").backward(losses, features=features)
    with pytest.raises(TypeError, match="features only with losses"):
        opt.step(features=features)


@pytest.mark.parametrize("first_with", [True, False])
def test_calls_with_and_without_features_add_up(first_with: bool) -> None:
    """What is integrated at features is added as it is; the rest as if there were no features."""
    model, batch = setting()
    ends = []
    for calls in ([first_with], [not first_with], [first_with, not first_with]):
        opt = optimizer(model)
        opt.zero_grad()
        for with_features in calls:
            features = model.features(batch)
            losses = model.losses_at(features, batch[2])
            opt.backward(losses, features=features if with_features else None)
        ends.append(grads(model))
    one, other, both = ends
    for name, found in both.items():
        torch.testing.assert_close(found, one[name] + other[name])


def test_a_hook_on_a_feature_runs_as_in_plain_training() -> None:
    model, batch = setting()
    calls: list[str] = []
    found: list[dict[str, Any]] = []

    def turning(name: str) -> Callable[[Tensor], Tensor]:
        def turn(gradient: Tensor) -> Tensor:
            calls.append(name)
            return -gradient

        return turn

    for turned in (False, True):
        opt = optimizer(model)
        features = model.features(batch)
        opt.backward(model.losses_at(features, batch[2]), features=features)  # may look at more
        opt.zero_grad()
        features = model.features(batch)
        for name, feature in features.items():
            feature.retain_grad()
            if turned:
                feature.register_hook(turning(name))
        opt.backward(model.losses_at(features, batch[2]), features=features)
        found.append(grads(model) | {name: z.grad for name, z in features.items()})
    assert sorted(calls) == ["audio", "visual"]
    for name, gradient in found[0].items():
        sign = -1 if name.startswith(("audio.", "visual.")) or name in ("audio", "visual") else 1
        torch.testing.assert_close(found[1][name], sign * gradient)


def test_where_hooks_cannot_be_set_aside_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # internal: as in a PyTorch that does not let hooks be set aside.
    monkeypatch.setattr("mmpareto_optim.features._are_set_aside", lambda: False)
    model, batch = setting()
    features = model.features(batch)
    with pytest.warns(UserWarning, match="Leave features out where you have such hooks"):
        optimizer(model).backward(model.losses_at(features, batch[2]), features=features)


def test_a_feature_that_is_called_like_a_modality() -> None:
    """The stats of both are there; the block keeps the name that the user gave it."""
    model, batch = setting()
    opt = optimizer(model, param_groups_by_modality={"audio": model.audio_head})
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    losses["more"] = model.audio_head(features["audio"]).sin().mean()
    opt.backward(losses, features=features)
    assert list(opt.stats) == ["audio (feature)", "visual", "audio"]
    assert opt.stats["audio"].objectives == ("audio", "more")
    assert opt.stats["audio (feature)"].objectives == ("mm", "audio", "more")


def test_a_sparse_gradient_at_a_feature() -> None:
    encoder, head = nn.Linear(4, 10), nn.Linear(2, 2)
    opt = optimizer(nn.ModuleList([encoder, head]))
    table = encoder(torch.randn(2, 4)).T
    words = nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True)
    losses = {"a": words.square().sum(), "b": head(table).sin().mean()}
    with pytest.raises(TypeError, match=r"loss 'a' gives a sparse gradient for feature 'table'"):
        opt.backward(losses, features={"table": table})
    assert all(param.grad is None for param in (*encoder.parameters(), *head.parameters()))
