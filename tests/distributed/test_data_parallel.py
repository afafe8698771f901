"""Two processes with half a batch each are one process with the whole batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, vectors_as_losses
from tests.processes import Processes

Batch = tuple[Tensor, Tensor, Tensor]
Options = dict[str, Any]


class Model(LateFusion):
    """A model that DistributedDataParallel can call."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float64)

    def forward(self, *batch: Tensor) -> Losses:
        return self.losses((batch[0], batch[1], batch[2]))


def batches(steps: int) -> list[Batch]:
    return [audio_visual_batch(12, torch.float64) for _ in range(steps)]


def share(batch: Batch) -> Batch:
    rank = dist.get_rank()
    spec, image, label = (part[6 * rank : 6 * rank + 6] for part in batch)
    return spec, image, label


def sgd(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return MMParetoOptimizer(base, **options)


def alone(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return sgd(model, average_gradients=False, **options)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [param.grad for param in model.parameters()]


def assert_same_on_all_ranks(*tensors: Tensor | None) -> None:
    """Bit for bit."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tensors)
    for other in gathered:
        for found, expected in zip(tensors, other, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or found.equal(expected)


def assert_same_stats(opt: MMParetoOptimizer, reference: MMParetoOptimizer) -> None:
    assert list(opt.stats) == list(reference.stats)
    for stats, expected in zip(opt.stats.values(), reference.stats.values(), strict=True):
        assert stats.objectives == expected.objectives
        torch.testing.assert_close(stats.gram, expected.gram)
        torch.testing.assert_close(stats.coefficients, expected.coefficients)
        assert_same_on_all_ranks(stats.gram, stats.coefficients)


def assert_trained_alike(opt: MMParetoOptimizer, reference: MMParetoOptimizer) -> None:
    for group, expected in zip(opt.param_groups, reference.param_groups, strict=True):
        torch.testing.assert_close(group["params"], expected["params"])
        assert_same_on_all_ranks(*(param.detach() for param in group["params"]))
    assert_same_stats(opt, reference)


OPTIONS: list[Options] = [
    {},
    {"rescale": "tensor"},
    {"integration": "pareto"},
    {"integration": "uniform"},
]


def check_training(ddp: Options | None, options: Options, by_modality: bool) -> None:
    whole = Model()
    model = deepcopy(whole)
    if by_modality:
        reference = alone(whole, param_groups_by_modality={"audio": whole.audio}, **options)
        opt = sgd(model, param_groups_by_modality={"audio": model.audio}, **options)
    else:
        reference, opt = alone(whole, **options), sgd(model, **options)
    called = model if ddp is None else DistributedDataParallel(model, **ddp)
    for batch in batches(4):
        for trained, losses in ((reference, whole(*batch)), (opt, called(*share(batch)))):
            trained.zero_grad()
            trained.step(losses=losses)
        assert_trained_alike(opt, reference)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("by_modality", [False, True])
def test_half_batches_train_as_the_whole(
    two: Processes, options: Options, by_modality: bool
) -> None:
    two(check_training, None, options, by_modality)


@pytest.mark.parametrize(
    "ddp",
    [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"broadcast_buffers": False, "bucket_cap_mb": 1},
    ],
    ids=str,
)
def test_distributed_data_parallel(two: Processes, ddp: Options) -> None:
    two(check_training, ddp, {}, by_modality=False)


def check_features() -> None:
    whole = Model()
    model = deepcopy(whole)
    reference, opt = alone(whole), sgd(model)
    for batch in batches(4):
        for trained, owner, part in ((reference, whole, batch), (opt, model, share(batch))):
            trained.zero_grad()
            features = owner.features(part)
            trained.step(losses=owner.losses_at(features, part[2]), features=features)
        assert_trained_alike(opt, reference)


def test_features_of_half_batches(two: Processes) -> None:
    two(check_features)


def check_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    called = DistributedDataParallel(model)
    opt = sgd(model)
    for _ in range(3):
        out = called(torch.randn(8, 5) + dist.get_rank())
        opt.zero_grad()
        opt.step(losses={"one": out[:, 0].mean(), "other": -out.square().mean()})
    called(torch.randn(8, 5))  # sends the first rank's buffers round, before it changes them
    mean = model[0].running_mean
    assert isinstance(mean, Tensor)
    assert_same_on_all_ranks(*(param.detach() for param in model.parameters()))


def test_buffers_are_sent_round_as_ever(two: Processes) -> None:
    two(check_batch_norm)


def check_accumulation(ddp: bool, features: bool) -> None:
    whole = Model()
    model = deepcopy(whole)
    called = DistributedDataParallel(model) if ddp else model
    reference, opt = alone(whole), sgd(model)
    quarters = batches(2)

    def backward(trained: MMParetoOptimizer, owner: Model, part: Batch) -> None:
        if features:
            found = owner.features(part)
            losses = owner.losses_at(found, part[2])
        else:
            found = None
            losses = called(*part) if owner is model else owner(*part)
        halved = {name: loss / 2 for name, loss in losses.items()}
        trained.backward(halved, features=found)

    for number, batch in enumerate(quarters):
        backward(reference, whole, batch)
        no_sync = ddp and number == 0
        with called.no_sync() if no_sync else nullcontext():  # type: ignore[operator]
            backward(opt, model, share(batch))
    torch.testing.assert_close(grads(model), grads(whole))
    assert_same_on_all_ranks(*grads(model))
    if not features:
        joined = [torch.cat(parts) for parts in zip(*quarters, strict=True)]
        whole.zero_grad()
        alone(whole).backward(whole(*joined))
        torch.testing.assert_close(grads(model), grads(whole))


@pytest.mark.parametrize(("ddp", "features"), [(False, False), (True, False), (False, True)])
def test_accumulation_is_the_large_batch(two: Processes, ddp: bool, features: bool) -> None:
    two(check_accumulation, ddp, features)


def losses_of_rank(rank: int, model: Model, batch: Batch, case: str) -> Losses:
    """What a rank that lacks something has to offer."""
    found = model.losses(batch)
    if case == "a loss on one rank" and rank == 1:
        del found["audio"]
    if case == "another loss on each":
        del found["audio" if rank else "visual"]
    if case == "another order" and rank == 1:
        found = dict(reversed(found.items()))
    if case == "a parameter on one rank" and rank == 0:
        found["visual"] = found["visual"].detach() + model.visual(batch[1]).sum()
    return found


CASES = [
    "a loss on one rank",
    "another loss on each",
    "another order",
    "a parameter on one rank",
]


def check_uneven(case: str) -> None:
    """The oracle: one process, whose losses are the means over what the ranks have."""
    whole = Model()
    model = deepcopy(whole)
    reference, opt = alone(whole), sgd(model)
    for batch in batches(3):
        spec, image, label = batch
        parts: list[Losses] = []
        for rank in range(2):
            rows = slice(6 * rank, 6 * rank + 6)
            part = (spec[rows], image[rows], label[rows])
            parts.append(losses_of_rank(rank, whole, part, case))
        names = dict.fromkeys(name for part in parts for name in part)
        means = {name: sum(p[name] for p in parts if name in p) / 2 for name in names}
        reference.zero_grad()
        reference.step(losses=means)  # type: ignore[arg-type]
        opt.zero_grad()
        opt.step(losses=losses_of_rank(dist.get_rank(), model, share(batch), case))
        assert_trained_alike(opt, reference)


@pytest.mark.parametrize("case", CASES)
def test_what_one_rank_lacks_counts_as_zero(two: Processes, case: str) -> None:
    two(check_uneven, case)


Reached = dict[str, list[bool]]
"""For each loss that a rank has, which of four parameters it reaches there."""

reached_on_a_rank = st.dictionaries(
    st.sampled_from(["mm", "audio", "visual"]),
    st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    min_size=1,
)


def linear_losses(params: list[nn.Parameter], rank: int, reached: Reached) -> Losses:
    losses = {}
    for name, mask in reached.items():
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + rank)
        rows = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        terms = zip(params, rows, mask, strict=True)
        losses[name] = torch.stack([(p * row).sum() for p, row, there in terms if there]).sum()
    return losses


def check_any_reach(reached: list[Reached]) -> None:
    shapes = [(3,), (2, 2), (), (5,)]
    ours, theirs = (
        [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
        for _ in range(2)
    )
    opt = MMParetoOptimizer(torch.optim.SGD(ours, lr=1.0))
    reference = MMParetoOptimizer(torch.optim.SGD(theirs, lr=1.0), average_gradients=False)
    opt.step(losses=linear_losses(ours, dist.get_rank(), reached[dist.get_rank()]))
    parts = [linear_losses(theirs, rank, reached[rank]) for rank in range(2)]
    names = dict.fromkeys(name for part in parts for name in part)
    means = {name: sum(part[name] for part in parts if name in part) / 2 for name in names}
    reference.step(losses=means)  # type: ignore[arg-type]
    assert_trained_alike(opt, reference)


@settings(max_examples=40)
@given(st.tuples(reached_on_a_rank, reached_on_a_rank))
def test_whatever_reaches_what_on_which_rank(two: Processes, reached: tuple[Reached, ...]) -> None:
    two(check_any_reach, list(reached))


def check_uneven_features() -> None:
    """A feature that no loss of one rank reaches."""
    whole = Model()
    model = deepcopy(whole)
    reference, opt = alone(whole), sgd(model)
    (batch,) = batches(1)
    halves = [tuple(part[6 * r : 6 * r + 6] for part in batch) for r in range(2)]

    def losses_and_features(owner: Model, rank: int) -> tuple[Losses, dict[str, Tensor]]:
        spec, image, label = halves[rank]
        features = owner.features((spec, image, label))
        losses = owner.losses_at(features, label)
        if rank == 1:
            losses = {"audio": losses["audio"]}
        return losses, features

    losses, features = losses_and_features(model, dist.get_rank())
    opt.backward(losses, features=features)
    assert_same_on_all_ranks(*grads(model))
    assert {name: s.objectives for name, s in opt.stats.items()} == {
        "audio": ("mm", "audio"),
        "visual": ("mm", "visual"),
    }
    per_rank = [losses_and_features(whole, rank) for rank in range(2)]
    joined = {name: torch.cat([f[name] for _, f in per_rank]) for name in features}
    label = batch[2]
    apart = {name: joined[name].split(6) for name in joined}
    first = whole.losses_at({name: parts[0] for name, parts in apart.items()}, label[:6])
    second = whole.losses_at({name: parts[1] for name, parts in apart.items()}, label[6:])
    means = {name: loss / 2 for name, loss in first.items()}
    means["audio"] = means["audio"] + second["audio"] / 2
    reference.backward(means, features=joined)
    torch.testing.assert_close(grads(model), grads(whole))
    assert_same_stats(opt, reference)


def test_a_feature_that_no_loss_of_one_rank_reaches(two: Processes) -> None:
    two(check_uneven_features)


def check_an_error_on_one_rank(features: bool) -> None:
    model = Model()
    opt = sgd(model)
    (batch,) = batches(1)

    def losses_and_features() -> tuple[Losses, dict[str, Tensor] | None]:
        found = model.features(share(batch))
        return model.losses_at(found, share(batch)[2]), found if features else None

    losses, found = losses_and_features()
    if dist.get_rank() == 1:
        losses["audio"] = losses["audio"].detach()
    error, message = (
        (ValueError, "loss 'audio' has no graph, so")
        if dist.get_rank() == 1
        else (RuntimeError, r"failed on rank 1.*ValueError: loss 'audio' has no graph, so")
    )
    with pytest.raises(error, match=message):
        opt.step(losses=losses, features=found)
    assert all(gradient is None for gradient in grads(model))
    losses, found = losses_and_features()
    opt.step(losses=losses, features=found)  # the ranks are still in step
    assert_same_on_all_ranks(*(param.detach() for param in model.parameters()))


@pytest.mark.parametrize("features", [False, True])
def test_an_error_on_one_rank_is_one_on_all(two: Processes, features: bool) -> None:
    two(check_an_error_on_one_rank, features)


def check_an_error_between_averages(accumulated: bool) -> None:
    """On one rank a backward fails, when averages of other losses may be on their way."""
    model = Model()
    opt = sgd(model)
    first, second = batches(2)
    if accumulated:
        opt.backward(model.losses(share(first)))
    before = grads(model)
    kept = [None if gradient is None else gradient.clone() for gradient in before]
    losses = model.losses(share(second))
    failing = dist.get_rank() == 1
    if failing:
        scaled = losses["audio"] * 1.0
        scaled.register_hook(lambda _: 1 / 0)
        losses["audio"] = scaled
    error = ZeroDivisionError if failing else RuntimeError
    with pytest.raises(error, match=r"" if failing else "failed on rank 1.*ZeroDivisionError"):
        opt.step(losses=losses)
    for gradient, same, value in zip(grads(model), before, kept, strict=True):
        assert gradient is same
        assert gradient is None or gradient.equal(value)  # type: ignore[arg-type]
    opt.zero_grad()
    opt.step(losses=model.losses(share(first)))  # the ranks are still in step
    assert_same_on_all_ranks(*(param.detach() for param in model.parameters()))


@pytest.mark.parametrize("accumulated", [False, True])
def test_an_error_between_averages(two: Processes, accumulated: bool) -> None:
    two(check_an_error_between_averages, accumulated)


def check_out_of_memory() -> None:
    """No rank's gradients meet another step's of the others."""
    # internal: of one process a group of several, so that nobody waits for what never comes.
    from mmpareto_optim.distributed.data_parallel import DataParallel
    from mmpareto_optim.distributed.single import ProcessSelection

    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    param = nn.Parameter(torch.zeros(4))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=1.0), process_group=group)
    ranks = DataParallel(group, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessSelection, "of", lambda *_: ranks)

        def failing_on_gradients(plain: Any) -> Any:
            def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
                if tensor.is_floating_point():
                    raise torch.OutOfMemoryError("no memory left")
                return plain(tensor, *args, **options)

            return all_reduce

        patch.setattr(dist, "all_reduce", failing_on_gradients(dist.all_reduce))
        with pytest.raises(RuntimeError, match=r"out of step.*end all processes.*no memory left"):
            opt.step(losses={"one": param.sum()})
        assert param.grad is None
        patch.undo()
        patch.setattr(ProcessSelection, "of", lambda *_: ranks)
        with pytest.raises(RuntimeError, match=r"out of step.*end all processes.*no memory left"):
            opt.step(losses={"one": param.sum()})
    assert param.grad is None
    assert param.equal(torch.zeros(4))


def test_out_of_memory_while_averaging(two: Processes) -> None:
    """In a group of its own for each rank: what the others then wait for is their timeout."""
    two(check_out_of_memory)


def check_order() -> None:
    model = Model()
    opt = sgd(model)
    events: list[str] = []
    opt.step(losses=model.losses(share(batches(1)[0])))  # looks at more
    with pytest.MonkeyPatch.context() as patch:
        grad, all_reduce = torch.autograd.grad, dist.all_reduce

        def noted_grad(*args: Any, **kwargs: Any) -> Any:
            events.append("differentiate")
            return grad(*args, **kwargs)

        def noted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            events.extend(["average"] if tensor.is_floating_point() else [])
            return all_reduce(tensor, *args, **kwargs)

        patch.setattr(torch.autograd, "grad", noted_grad)
        patch.setattr(dist, "all_reduce", noted_reduce)
        opt.zero_grad()
        opt.step(losses=model.losses(share(batches(1)[0])))
    assert events == ["differentiate", "average"] * 3


def test_gradients_are_averaged_while_the_next_are_found(two: Processes) -> None:
    two(check_order)


def check_reduce_dtype(dtype: torch.dtype) -> None:
    """Each rank's gradients over two, in that dtype, are added in it."""
    model = LateFusion()
    integrator = GradientIntegrator(model.parameters(), reduce_dtype=dtype, integration="uniform")
    parts = [audio_visual_batch(6) for _ in range(2)]
    expected: dict[nn.Parameter, Tensor] = {}
    exact: dict[nn.Parameter, Tensor] = {}
    for name in ("visual", "audio", "mm"):
        both = [
            torch.autograd.grad(
                model.losses(part)[name], list(model.parameters()), materialize_grads=True
            )
            for part in parts
        ]
        for param, *pair in zip(model.parameters(), *both, strict=True):
            one, other = (gradient.to(dtype) / 2 for gradient in pair)
            expected[param] = expected.get(param, 0) + (one + other).float()
            exact[param] = exact.get(param, 0) + (pair[0] + pair[1]) / 2
    integrator.backward(model.losses(parts[dist.get_rank()]))
    for param in model.parameters():
        torch.testing.assert_close(param.grad, expected[param], rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(*grads(model))
    rounded = any(not torch.allclose(expected[p], exact[p], rtol=1e-4) for p in exact)
    assert rounded == (dtype.itemsize == 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_of_averages(two: Processes, dtype: torch.dtype) -> None:
    two(check_reduce_dtype, dtype)


def check_opposed_after_rounding(dtype: torch.dtype) -> None:
    """What bfloat16 leaves of opposite gradients is no direction to be stretched."""
    param = nn.Parameter(torch.zeros(1000))
    row = torch.randn(1000)
    integrator = GradientIntegrator([param], reduce_dtype=dtype)
    integrator.backward({"a": (param * row).sum(), "b": (param * (-0.7 * row)).sum()})
    assert param.grad is not None
    assert float(param.grad.norm()) <= 0.01 * float(row.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_opposed_after_rounding(two: Processes, dtype: torch.dtype) -> None:
    two(check_opposed_after_rounding, dtype)


def check_a_mean_that_fits() -> None:
    """80,001 on one rank and 1 on the other: the mean is a float16 number, the first is none."""
    param = nn.Parameter(torch.zeros(2))
    integrator = GradientIntegrator([param], reduce_dtype=torch.float16)
    own = 80_000.0 if dist.get_rank() == 0 else 0.0
    integrator.backward({"one": (param * own).sum() + param.sum()})
    assert param.grad is not None
    torch.testing.assert_close(param.grad, torch.full((2,), 40_001.0), rtol=1e-3, atol=0)


def test_a_mean_that_fits_where_a_gradient_does_not(two: Processes) -> None:
    two(check_a_mean_that_fits)


def check_half_precision_averaged_exactly() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=1.0), reduce_dtype=torch.float32)
    # On the ranks 256 and 2, of which the mean is 129, 128 after one rounding to bfloat16 each.
    own = torch.tensor([256.0, 258.0, -256.0]) if dist.get_rank() == 0 else torch.full((3,), 2.0)
    opt.backward({"one": (param.float() * own).sum()})
    assert param.grad is not None
    assert param.grad.dtype == torch.bfloat16
    assert param.grad.equal(torch.tensor([129.0, 130.0, -127.0]).bfloat16())


def test_half_precision_averaged_exactly(two: Processes) -> None:
    two(check_half_precision_averaged_exactly)


def check_copies_keep_the_dtype() -> None:
    model = Model()
    original = sgd(model, reduce_dtype=torch.bfloat16)
    for opt in (deepcopy(original), pickle.loads(pickle.dumps(original))):
        held = [param for group in opt.param_groups for param in group["params"]]
        losses = vectors_as_losses(held[0], torch.rand(1, 8, 5, dtype=torch.float64))
        opt.step(losses=losses)
        assert held[0].grad.equal(held[0].grad.bfloat16().double())


def test_copies_keep_the_dtype(two: Processes) -> None:
    two(check_copies_keep_the_dtype)


def check_unlike(case: str, message: str) -> None:
    rank = dist.get_rank()
    model: Any = Model()
    options: Options = {}
    features = None
    if case == "model" and rank:
        model.audio_head.weight.requires_grad_(False)
    if case == "gamma":
        options = {"gamma": 1.5 + rank}
    if case == "reduce_dtype" and rank:
        options = {"reduce_dtype": torch.bfloat16}
    if case == "modality" and rank:
        options = {"param_groups_by_modality": {"audio": model.audio}}
    (batch,) = batches(1)
    found = model.features(share(batch))
    if case == "features" and rank:
        features = found
    losses = model.losses_at(found, batch[2][:6])
    with pytest.raises(RuntimeError, match=f"ranks 0 and 1 differ in their .*{message}.*alike"):
        sgd(model, **options).step(losses=losses, features=features)
    assert all(gradient is None for gradient in grads(model))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("model", "trainable parameters"),
        ("gamma", "gamma"),
        ("reduce_dtype", "reduce_dtype"),
        ("modality", "param_groups_by_modality"),
        ("features", "features"),
    ],
)
def test_unlike_ranks_are_told(two: Processes, case: str, message: str) -> None:
    two(check_unlike, case, message)


def check_lbfgs() -> None:
    whole = Model()
    model = deepcopy(whole)
    (batch,) = batches(1)
    ends = []
    for owner, part, several in ((whole, batch, False), (model, share(batch), True)):
        base = torch.optim.LBFGS(owner.parameters(), lr=0.5, line_search_fn="strong_wolfe")
        opt = MMParetoOptimizer(base, average_gradients=several)

        def closure(owner: Model = owner, part: Batch = part, opt: Any = opt) -> Losses:
            opt.zero_grad()
            return owner.losses(part)

        ends.append([opt.step(closure) for _ in range(3)])
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))
    assert_same_on_all_ranks(*(param.detach() for param in model.parameters()))


def test_lbfgs_searches_lines_alike_on_all_ranks(two: Processes) -> None:
    two(check_lbfgs)


def check_grad_scaler() -> None:
    model = Model().float()
    opt, scaler = sgd(model), GradScaler("cpu", init_scale=2.0**10)
    for number in range(4):
        batch = audio_visual_batch(6)
        losses = {name: scaler.scale(loss) for name, loss in model.losses(batch).items()}
        if number == 2 and dist.get_rank() == 1:
            losses["audio"] = losses["audio"] * float("inf")
        before = [param.detach().clone() for param in model.parameters()]
        opt.zero_grad()
        opt.backward(losses)
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        after = [param.detach() for param in model.parameters()]
        skipped = all(a.equal(b) for a, b in zip(before, after, strict=True))
        assert skipped == (number == 2)
        assert_same_on_all_ranks(*after, torch.tensor(scaler.get_scale()))
    assert scaler.get_scale() == 2.0**9


def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(two: Processes) -> None:
    two(check_grad_scaler)


def check_without_averaging(how: str) -> None:
    whole, (batch,) = Model(), batches(1)
    model = deepcopy(whole)
    own = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    options: Options = {"process_group": own[rank]}
    if how == "average_gradients":
        options = {"average_gradients": False}
    sgd(model, **options).step(losses=model.losses(share(batch)))
    alone(whole).step(losses=whole.losses(share(batch)))
    torch.testing.assert_close(grads(model), grads(whole), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"rank {rank} belongs to"):
        sgd(model, process_group=own[1 - rank])


@pytest.mark.parametrize("how", ["average_gradients", "process_group"])
def test_each_process_for_itself(two: Processes, how: str) -> None:
    two(check_without_averaging, how)


def check_process_group() -> None:
    whole, (batch,) = Model(), batches(1)
    model = deepcopy(whole)
    group = dist.new_group([1, 0])
    reference, opt = alone(whole), sgd(model, process_group=group)
    reference.step(losses=whole.losses(batch))
    opt.step(losses=model.losses(share(batch)))
    assert_trained_alike(opt, reference)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
        deepcopy(opt)


def test_a_process_group_of_ones_own(two: Processes) -> None:
    two(check_process_group)


def check_random_rule() -> None:
    torch.manual_seed(dist.get_rank())
    model, (batch,) = Model(), batches(1)
    opt = sgd(model, integration=lambda gram: torch.rand(len(gram)))
    opt.step(losses=model.losses(share(batch)))
    assert_same_on_all_ranks(*(stats.coefficients for stats in opt.stats.values()))


def test_a_random_rule_draws_the_same_on_all_ranks(two: Processes) -> None:
    two(check_random_rule)


def check_an_error_after_the_passes(stage: str, by_features: bool) -> None:
    """On one rank, after all passes: no rank steps, and the next step is right."""
    from mmpareto_optim import rows

    model, parts = Model(), [share(batch) for batch in batches(2)]
    failing = [dist.get_rank() == 1]

    def rule(gram: Tensor) -> Tensor:
        if stage == "rule" and failing[0]:
            raise ZeroDivisionError("of the rule")
        return torch.ones(len(gram))

    def combine(*args: Any) -> Any:
        if stage == "combination" and failing[0]:
            raise torch.OutOfMemoryError("no memory left")
        return plain(*args)

    opt = sgd(model, integration=rule)
    plain = rows.combine
    before = [param.detach().clone() for param in model.parameters()]
    features = model.features(parts[0])
    losses = model.losses_at(features, parts[0][-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmpareto_optim.integration.combine", combine)
        with pytest.raises((RuntimeError, ZeroDivisionError), match=r"of the rule|no memory left"):
            opt.step(losses=losses, features=features if by_features else None)
    assert all(param.grad is None for param in model.parameters())
    for param, value in zip(model.parameters(), before, strict=True):
        assert param.equal(value)
    failing[0] = False
    opt.step(losses=model.losses(parts[1]))
    assert_same_on_all_ranks(*(param.detach() for param in model.parameters()))


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize("stage", ["rule", "combination"])
def test_an_error_after_the_passes(two: Processes, stage: str, by_features: bool) -> None:
    two(check_an_error_after_the_passes, stage, by_features)


def check_zero_redundancy() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns at import

    whole = Model()
    model = deepcopy(whole)
    params = list(model.parameters())
    base = ZeroRedundancyOptimizer(params, torch.optim.Adam, lr=0.01)
    opt = MMParetoOptimizer(base)
    reference = MMParetoOptimizer(
        torch.optim.Adam(whole.parameters(), lr=0.01), average_gradients=False
    )
    for batch in batches(3):
        for trained, losses in ((reference, whole(*batch)), (opt, model(*share(batch)))):
            trained.zero_grad()
            trained.step(losses=losses)
        assert_trained_alike(opt, reference)


def test_zero_redundancy_optimizer_as_base(two: Processes) -> None:
    two(check_zero_redundancy)


def check_collectives() -> None:
    model, parts = Model(), [share(batch) for batch in batches(2)]
    opt = sgd(model)
    encoders = [*model.audio.parameters(), *model.visual.parameters()]
    everything = sum(p.numel() for p in [*encoders, *model.parameters()])  # each loss's share
    opt.step(losses=model.losses(parts[0]))  # looks at more
    sent: list[Tensor] = []
    all_reduce = dist.all_reduce

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor)
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        opt.zero_grad()
        opt.step(losses=model.losses(parts[1]))
        of_gradients = [tensor.numel() for tensor in sent if tensor.is_floating_point()]
        assert sum(of_gradients) == everything
        assert len(of_gradients) <= 3  # one for each loss
        on_the_host = [tensor.numel() for tensor in sent if not tensor.is_floating_point()]
        # Before the first loss, for each of three, and before .grad is written.
        assert len(on_the_host) <= 5
        assert sum(on_the_host) <= 10
        sent.clear()
        alone(model).step(losses=model.losses(parts[0]))
        assert sent == []


def test_few_collectives_and_a_few_bytes_on_the_host(two: Processes) -> None:
    two(check_collectives)


def check_host_group() -> None:
    """As where the group's backend (NCCL) knows nothing but devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda _: "cuda:nccl")
        made: list[Any] = []
        new_group = dist.new_group

        def noted(*args: Any, **kwargs: Any) -> Any:
            made.append(new_group(*args, **kwargs))
            return made[-1]

        patch.setattr(dist, "new_group", noted)
        check_training(None, {}, by_modality=False)
        assert [dist.get_backend(group) for group in made] == ["gloo"]  # one for all steps


def test_a_backend_without_the_host_gets_a_group_beside_it(two: Processes) -> None:
    two(check_host_group)


def check_kinds() -> None:
    rank = dist.get_rank()
    kinds: list[Callable[[], Tensor]] = [
        lambda: torch.full((), 2.0 * rank),
        lambda: torch.full((3, 2), 4.0 * rank, dtype=torch.float64).T,
        lambda: torch.full((2,), 6.0 * rank, dtype=torch.bfloat16),
        lambda: torch.full((2,), 2.0j * rank, dtype=torch.complex64),
        lambda: torch.full((2, 3, 4, 5), 2.0 * rank).to(memory_format=torch.channels_last),
        lambda: torch.full((1,), 60_000.0, dtype=torch.float16),  # the sum would be infinite
    ]
    params = [nn.Parameter(torch.zeros_like(kind())) for kind in kinds]
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=1.0))
    for param, kind in zip(params, kinds, strict=True):
        param.register_hook(lambda _, kind=kind: kind())
    opt.backward({"one": torch.stack([param.sum().real.float() for param in params]).sum()})
    for param, expected in zip(params, (1, 2, 3, 1j, 1, 60_000), strict=True):
        assert param.grad is not None
        assert param.grad.dtype == param.dtype
        assert param.grad.stride() == param.stride()
        assert param.grad.equal(torch.full_like(param, expected))


def test_any_dtype_shape_and_memory_format(two: Processes) -> None:
    two(check_kinds)


def check_totals(ddp: Options, accumulate: bool) -> None:
    """As a trainer has it: micro-batches under ``no_sync``, a factor on the total."""
    whole = Model()
    model = deepcopy(whole)
    reference, opt = alone(whole), sgd(model)
    called = DistributedDataParallel(model, **ddp)
    for number, batch in enumerate(batches(4), start=1):
        is_last = not accumulate or number % 2 == 0
        with nullcontext() if is_last else called.no_sync():
            (opt.total(called(*share(batch))) / 2).backward()
        reference.backward({name: loss / 2 for name, loss in whole(*batch).items()})
        if is_last:
            for each in (reference, opt):
                each.step()
                each.zero_grad()
            assert_trained_alike(opt, reference)


@pytest.mark.parametrize(
    ("ddp", "accumulate"),
    [
        ({}, False),
        ({}, True),
        ({"find_unused_parameters": True}, False),
        ({"find_unused_parameters": True}, True),
        ({"static_graph": True}, False),
    ],
)
def test_totals(two: Processes, ddp: Options, accumulate: bool) -> None:
    two(check_totals, ddp, accumulate)


def check_a_wrong_total() -> None:
    model = Model()
    opt = sgd(model)
    losses: dict[str, Any] = {**model.losses(share(batches(1)[0]))}
    if dist.get_rank() == 0:
        with pytest.raises(TypeError, match="loss 'audio' is None"):
            opt.total({**losses, "audio": None})  # type: ignore[dict-item]
    else:
        with pytest.raises(RuntimeError, match=r"failed on rank 0.*loss 'audio' is None"):
            opt.total(losses).backward()
    assert all(param.grad is None for param in model.parameters())
    opt.total(model.losses(share(batches(1)[0]))).backward()
    assert_same_on_all_ranks(*grads(model))


def test_a_wrong_total_on_one_rank_is_told_on_all(two: Processes) -> None:
    two(check_a_wrong_total)
