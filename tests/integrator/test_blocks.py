"""Which gradients meet: blocks found from reach, and blocks named by hand."""

import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer, mmpareto_coefficients
from tests.models import LateFusion, Losses, audio_visual_batch, grads


def sgd(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


def integrated(losses: Losses, params: list[nn.Parameter]) -> list[Tensor]:
    """The oracle: concatenate, Gram matrix, rule, split."""
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    matrix = torch.stack(rows).double()
    h = (mmpareto_coefficients(matrix @ matrix.T, eps=1.2e-7) @ matrix).float()
    pieces = h.split([param.numel() for param in params])
    return [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]


def assert_grads(params: Iterable[nn.Parameter], expected: Iterable[Tensor | None]) -> None:
    """Up to what the error of float32 products makes of the coefficients."""
    for param, gradient in zip(params, expected, strict=True):
        if gradient is None or param.grad is None:
            assert gradient is param.grad
        else:
            torch.testing.assert_close(param.grad, gradient, rtol=1e-4, atol=1e-5)


def test_late_fusion() -> None:
    model = LateFusion()
    losses = model.losses(audio_visual_batch())
    audio, visual = list(model.audio.parameters()), list(model.visual.parameters())
    heads = [*model.mm_head.parameters(), *model.audio_head.parameters()]
    expected_audio = integrated({k: losses[k] for k in ("mm", "audio")}, audio)
    expected_visual = integrated({k: losses[k] for k in ("mm", "visual")}, visual)
    total = torch.stack(list(losses.values())).sum()
    expected_heads = torch.autograd.grad(total, heads, retain_graph=True)

    opt = MMParetoOptimizer(sgd(model.parameters()))
    opt.backward(losses)
    assert_grads(audio, expected_audio)
    assert_grads(visual, expected_visual)
    assert_grads(heads, expected_heads)
    assert {name: stats.objectives for name, stats in opt.stats.items()} == {
        "mm+audio": ("mm", "audio"),
        "mm+visual": ("mm", "visual"),
    }


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_shared_trunk(tasks: int) -> None:
    trunk, heads = nn.Linear(4, 6), [nn.Linear(6, 2) for _ in range(tasks)]
    features = trunk(torch.randn(8, 4))
    losses = {
        f"task{i}": cross_entropy(head(features), torch.randint(2, (8,)))
        for i, head in enumerate(heads)
    }
    expected = integrated(losses, list(trunk.parameters()))
    opt = MMParetoOptimizer(sgd([*trunk.parameters(), *nn.ModuleList(heads).parameters()]))
    opt.backward(losses)
    assert_grads(trunk.parameters(), expected)
    (stats,) = opt.stats.values()
    assert stats.objectives == tuple(losses)
    assert stats.gram.shape == (tasks, tasks)


def test_cross_modal_layers_have_three_objectives() -> None:
    audio, visual, cross = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(12, 12)
    mm_head, audio_head, visual_head = nn.Linear(12, 3), nn.Linear(6, 3), nn.Linear(6, 3)
    label = torch.randint(3, (8,))
    mixed = cross(torch.cat([audio(torch.randn(8, 4)), visual(torch.randn(8, 5))], 1)).relu()
    losses = {
        "mm": cross_entropy(mm_head(mixed), label),
        "audio": cross_entropy(audio_head(mixed[:, :6]), label),
        "visual": cross_entropy(visual_head(mixed[:, 6:]), label),
    }
    # All three losses reach both encoders and the cross-modal layer: one block.
    shared = [*audio.parameters(), *visual.parameters(), *cross.parameters()]
    heads = nn.ModuleList([mm_head, audio_head, visual_head])
    expected = integrated(losses, shared)
    opt = MMParetoOptimizer(sgd([*shared, *heads.parameters()]))
    opt.backward(losses)
    assert_grads(shared, expected)
    assert list(opt.stats) == ["mm+audio+visual"]


ENTRIES: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda module: module,
    "parameters": lambda module: module.parameters(),
    "list": lambda module: list(module.parameters()),
    "named parameters": lambda module: module.named_parameters(),
}


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("when", ["construction", "step"])
def test_modalities_named_by_hand(kind: str, when: str) -> None:
    model = LateFusion()
    losses = model.losses(audio_visual_batch())
    modalities = {name: ENTRIES[kind](getattr(model, name)) for name in ("audio", "visual")}
    expected = integrated({k: losses[k] for k in ("mm", "audio")}, list(model.audio.parameters()))
    if when == "construction":
        opt = MMParetoOptimizer(sgd(model.parameters()), modalities)
        opt.step(losses=losses)
    else:
        opt = MMParetoOptimizer(sgd(model.parameters()))
        opt.step(losses=losses, param_groups_by_modality=modalities)
    assert_grads(model.audio.parameters(), expected)
    assert list(opt.stats) == ["audio", "visual"]


@pytest.mark.parametrize(
    ("modalities", "modules"),
    [
        ({"ears": "audio", "eyes": "visual"}, ["audio", "visual"]),
        ({"ears": ["audio.0", "audio.2"], "eyes": ("visual",)}, ["audio", "visual"]),
        ({"weight": ["audio.0.weight"]}, ["audio.0.weight"]),
        ({"both": ["audio", "visual"]}, ["audio", "visual"]),
    ],
)
@pytest.mark.parametrize("when", ["construction", "step", "integrator", "several"])
def test_modalities_by_the_names_that_the_base_has(
    modalities: dict[str, Any], modules: list[str], when: str
) -> None:
    model = LateFusion()
    named = list(model.named_parameters())
    losses, by_module = model.losses(audio_visual_batch()), dict[str, Any](modalities)
    for name, prefixes in modalities.items():
        listed = [prefixes] if isinstance(prefixes, str) else prefixes
        by_module[name] = [p for prefix in listed for p in parts_of(model, prefix)]
    reference = GradientIntegrator(model.parameters(), by_module)
    reference.backward(losses, retain_graph=True)
    expected = grads(model)
    model.zero_grad()
    if when == "construction":
        MMParetoOptimizer(sgd(named), modalities).backward(losses)
    elif when == "step":
        MMParetoOptimizer(sgd(named)).backward(losses, param_groups_by_modality=modalities)
    elif when == "integrator":
        GradientIntegrator(named, modalities).backward(losses)
    else:
        MMParetoOptimizer([sgd(named[:3]), sgd(named[3:])], modalities).backward(losses)
    for found, wanted in zip(grads(model), expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert found.equal(wanted)


def parts_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    try:
        return list(model.get_submodule(name).parameters())
    except AttributeError:
        return [model.get_parameter(name)]


@pytest.mark.parametrize("prefix", ["aud", "audio.", "audio_hea", "", "0", "model.audio"])
def test_a_name_that_no_parameter_begins_with(prefix: str) -> None:
    """Whole parts of names count: ``audio`` is not the beginning of ``audio_head.weight``."""
    model = LateFusion()
    with pytest.raises(
        ValueError, match=rf"'ears' is '{prefix}', .* modules are audio\.0, audio\.2, vis"
    ):
        MMParetoOptimizer(sgd(model.named_parameters()), {"ears": prefix})


def test_a_name_holds_no_more_than_its_module() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(sgd(model.named_parameters()), {"ears": "audio"})
    opt.backward(model.losses(audio_visual_batch()))
    assert opt.blocks[0].parameters == tuple(
        f"audio.{name}" for name, _ in model.audio.named_parameters()
    )


def test_what_is_left_out_gets_the_plain_sum() -> None:
    model = LateFusion()
    losses = model.losses(audio_visual_batch())
    total = torch.stack(list(losses.values())).sum()
    expected = torch.autograd.grad(total, list(model.visual.parameters()), retain_graph=True)
    opt = MMParetoOptimizer(sgd(model.parameters()), {"audio": model.audio})
    opt.backward(losses)
    assert_grads(model.visual.parameters(), expected)
    assert list(opt.stats) == ["audio"]


def test_a_step_overrides_the_constructor() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(sgd(model.parameters()), {"audio": model.audio})
    opt.step(
        losses=model.losses(audio_visual_batch()),
        param_groups_by_modality={"eyes": model.visual},
    )
    assert list(opt.stats) == ["eyes"]


def test_a_modality_may_span_parts_that_different_losses_reach() -> None:
    """One block over the union: a loss that misses a parameter counts as zero there."""
    model = LateFusion()
    losses = model.losses(audio_visual_batch())
    both = [*model.audio.parameters(), *model.visual.parameters()]
    expected = integrated(losses, both)
    opt = MMParetoOptimizer(sgd(model.parameters()), {"both": both})
    opt.backward(losses)
    assert_grads(both, expected)
    assert opt.stats["both"].objectives == ("mm", "audio", "visual")


def test_frozen_and_unreached_parameters_are_left_alone() -> None:
    model = LateFusion()
    model.audio[0].requires_grad_(False)
    losses = model.losses(audio_visual_batch())
    del losses["visual"]
    # Frozen, so it may be missing from the base though the module is named as a modality.
    held = [param for param in model.parameters() if param.requires_grad]
    opt = MMParetoOptimizer(sgd(held), {"audio": model.audio})
    opt.step(losses=losses)
    assert_grads(model.audio[0].parameters(), [None, None])
    assert_grads(model.visual_head.parameters(), [None, None])
    assert all(param.grad is not None for param in model.audio[2].parameters())


def test_unfrozen_parameters_join_in() -> None:
    model = LateFusion()
    model.audio.requires_grad_(False)
    opt = MMParetoOptimizer(sgd(model.parameters()))
    opt.step(losses=model.losses(audio_visual_batch()))
    assert list(opt.stats) == ["mm+visual"]
    model.audio.requires_grad_(True)
    opt.step(losses=model.losses(audio_visual_batch()))
    assert list(opt.stats) == ["mm+audio", "mm+visual"]


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_a_loss_that_reaches_nothing_changes_nothing() -> None:
    model, stranger = LateFusion(), nn.Parameter(torch.ones(()))
    losses = model.losses(audio_visual_batch())
    expected = integrated({k: losses[k] for k in ("mm", "audio")}, list(model.audio.parameters()))
    MMParetoOptimizer(sgd(model.parameters())).backward({**losses, "other": stranger * 2})
    assert_grads(model.audio.parameters(), expected)
    assert stranger.grad is None


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_an_optimizer_of_frozen_parameters() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(sgd(model.audio.parameters()))
    model.audio.requires_grad_(False)
    opt.step(losses=model.losses(audio_visual_batch()))
    assert_grads(model.audio.parameters(), [None] * 4)


def test_names_of_losses_need_not_be_strings() -> None:
    model = LateFusion()
    losses: Any = dict(enumerate(model.losses(audio_visual_batch()).values()))
    opt = MMParetoOptimizer(sgd(model.parameters()))
    opt.step(losses=losses)
    assert list(opt.stats) == ["0+1", "0+2"]


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_losses_that_reach_nothing_at_all() -> None:
    param, stranger = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    opt = MMParetoOptimizer(sgd([param]))
    opt.step(losses={"other": stranger * 2})
    assert param.grad is None
    assert opt.stats == {}


def test_the_table_tells_what_is_behind_features() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = MMParetoOptimizer(base)
    features = model.features(batch)
    opt.backward(model.losses_at(features, batch[2]), features=features)
    audio, visual, *heads = list(opt.blocks)
    assert (audio.name, audio.objectives, audio.integrated) == ("audio", ("mm", "audio"), True)
    assert audio.parameters == ("audio.0.weight", "audio.0.bias", "audio.2.weight", "audio.2.bias")
    assert (visual.name, visual.objectives) == ("visual", ("mm", "visual"))
    assert audio.numbers == sum(p.numel() for p in model.audio.parameters())
    assert [(head.name, head.integrated) for head in heads] == [
        ("audio", False),
        ("visual", False),
        ("mm", False),
    ]
    assert "mm, audio" in str(opt.blocks)


def test_an_integrator_clears_gradients_as_torch_optim_does() -> None:
    model = LateFusion()
    integrator = GradientIntegrator(model.parameters())
    integrator.zero_grad(set_to_none=False)
    assert grads(model) == [None] * len(list(model.parameters()))
    integrator.backward(model.losses(audio_visual_batch()))
    integrator.zero_grad(set_to_none=False)
    assert all(grad is not None and (grad == 0).all() for grad in grads(model))
    integrator.zero_grad()
    assert grads(model) == [None] * len(list(model.parameters()))


def test_the_table_tells_what_no_loss_reaches() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    model.visual.requires_grad_(False)
    opt = MMParetoOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1))
    assert str(opt.blocks) == "no backward yet"
    losses = model.losses(batch)
    opt.backward({"mm": losses["mm"], "audio": losses["audio"]})
    told = {block.name: (block.objectives, block.parameters) for block in opt.blocks}
    assert told["(no loss)"] == ((), ("visual_head.weight", "visual_head.bias"))
    assert told["(frozen)"][1] == tuple(f"visual.{n}" for n, _ in model.visual.named_parameters())
    assert sum(block.numbers for block in opt.blocks) == sum(p.numel() for p in model.parameters())


def test_a_block_may_be_several_modules() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), {"both": [model.audio, model.visual]}
    )
    opt.backward(model.losses(audio_visual_batch()))
    assert opt.blocks[0].objectives == ("mm", "audio", "visual")
    assert opt.blocks[0].numbers == sum(
        p.numel() for m in (model.audio, model.visual) for p in m.parameters()
    )


def test_the_table_by_the_names_of_a_model() -> None:
    model = LateFusion()
    batch = audio_visual_batch()
    opt, known = (
        MMParetoOptimizer(sgd(params)) for params in (model.parameters(), model.named_parameters())
    )
    assert opt.blocks.named(model) == ()
    for each in (opt, known):
        each.backward(model.losses(batch))
        each.zero_grad()
    assert "param_groups[0]" in str(opt.blocks)
    assert opt.blocks.named(model) == known.blocks
    assert str(opt.blocks.named(model)) == str(known.blocks)
    features = model.features(batch)
    for each in (opt, known):
        each.backward(model.losses_at(features, batch[2]), features=features, retain_graph=True)
    assert opt.blocks.named(model) == known.blocks


def test_what_a_model_does_not_have_keeps_its_name() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(sgd(model.parameters()))
    opt.backward(model.losses(audio_visual_batch()))
    part = opt.blocks.named(model.audio)
    assert part[0].parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert part[1:] == opt.blocks[1:]
    for blocks in (opt.blocks, pickle.loads(pickle.dumps(opt.blocks))):
        assert blocks == opt.blocks
        with pytest.raises(ValueError, match="no parameter of these blocks is one of the model's"):
            blocks.named(LateFusion() if blocks[0].references else model)


def test_blocks_keep_no_parameter_alive() -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(sgd(model.parameters()))
    opt.backward(model.losses(audio_visual_batch()))
    blocks = opt.blocks.named(model)
    of_weight = weakref.ref(model.audio[0].weight)
    names = blocks[0].parameters
    del model, opt
    gc.collect()
    assert of_weight() is None
    assert blocks[0].parameters == names


@pytest.mark.parametrize("losses", [18, 40])
def test_many_losses_make_no_wide_table(losses: int) -> None:
    """All reach the trunk, and all but the last few two gates that join it."""
    trunk, gates = nn.Linear(20, 30), nn.ParameterList([torch.ones(1), torch.ones(1)])
    reached = trunk(torch.randn(4, 20)).square().mean(0)
    values = [reached[i % 30] * i for i in range(1, losses + 1)]
    for gate, size in zip(gates, (losses - 1, losses - 2), strict=True):
        values[:size] = [value * gate.sum() for value in values[:size]]
    opt = MMParetoOptimizer(sgd([*trunk.parameters(), *gates]))
    opt.backward({f"classifier{i}": value for i, value in enumerate(values)})
    (block,) = opt.blocks
    assert len(block.objectives) == losses
    assert len(block.joined) == 2
    head, line = str(opt.blocks).splitlines()
    assert f"classifier0+classifier1+classifier2+classifier3 and {losses - 4} more" in line
    assert f"classifier0, classifier1, classifier2, classifier3 and {losses - 4} more" in line
    assert line.index("param_groups") == head.index("parameters") < 200


def test_a_table_names_four_losses_in_full() -> None:
    model = LateFusion()
    losses = model.losses(audio_visual_batch())
    opt = MMParetoOptimizer(sgd(model.parameters()), {"both": [model.audio, model.visual]})
    opt.backward({**losses, "more": losses["mm"] * 2})
    assert "both     mm, audio, visual, more  220 " in str(opt.blocks)
