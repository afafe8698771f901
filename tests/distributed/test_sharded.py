"""FSDP2 and tensor parallelism: sharded parameters train as whole ones do."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch
from tests.processes import Processes, started

Batch = tuple[Tensor, Tensor, Tensor]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def four(two: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with started(4, tmp_path_factory.mktemp("four")) as processes:
        yield processes


class Model(LateFusion):
    """Widths that two ranks do not share evenly, and a parameter that one of them lacks."""

    def __init__(self) -> None:
        super().__init__(width=7, dtype=torch.float64)
        self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, *batch: Tensor) -> Losses:
        return self.losses((batch[0] * self.gain, batch[1], batch[2]))


def batches(steps: int) -> list[Batch]:
    return [audio_visual_batch(12, torch.float64) for _ in range(steps)]


def share(batch: Batch, ranks: int = 2, rank: int | None = None) -> Batch:
    rank = dist.get_rank() if rank is None else rank
    size = 12 // ranks
    spec, image, label = (part[size * rank : size * (rank + 1)] for part in batch)
    return spec, image, label


def adam(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.Adam(model.parameters(), lr=0.05), **options)


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def assert_close(model: nn.Module, whole: nn.Module, *, grads: bool = False) -> None:
    expected = dict(whole.named_parameters())
    for name, param in model.named_parameters():
        found, wanted = (param.grad, expected[name].grad) if grads else (param, expected[name])
        assert (found is None) == (wanted is None), name
        if found is not None and wanted is not None:
            torch.testing.assert_close(full(found), full(wanted))


def assert_same_stats(opt: MMParetoOptimizer, reference: MMParetoOptimizer) -> None:
    assert list(opt.stats) == list(reference.stats)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [(s.gram, s.coefficients) for s in opt.stats.values()])
    for stats, expected in zip(opt.stats.values(), reference.stats.values(), strict=True):
        torch.testing.assert_close(stats.gram, expected.gram)
    for other in gathered:
        for stats, (gram, coefficients) in zip(opt.stats.values(), other, strict=True):
            assert stats.gram.equal(gram)
            assert stats.coefficients.equal(coefficients)


def shard(model: Model, how: str, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    if how in ("nested", "partly"):
        for part in (model.audio, model.visual):
            fully_shard(part, **options)
    if how in ("nested", "whole"):
        fully_shard(model, **options)


def check_fsdp(how: str, options: Options, by_modality: bool, sharding: Options) -> None:
    whole = Model()
    model = deepcopy(whole)
    shard(model, how, **sharding)
    chosen = ({"audio": owner.audio} if by_modality else None for owner in (whole, model))
    reference, opt = (
        adam(owner, param_groups_by_modality=modalities, average_gradients=averaged, **options)
        for owner, averaged, modalities in zip((whole, model), (False, True), chosen, strict=True)
    )
    for batch in batches(3):
        for trained, losses in ((reference, whole(*batch)), (opt, model(*share(batch)))):
            trained.zero_grad()
            trained.step(losses=losses)
        assert_close(model, whole)
        assert_close(model, whole, grads=True)
        assert_same_stats(opt, reference)


@pytest.mark.parametrize("how", ["whole", "nested", "partly"])
@pytest.mark.parametrize(
    "options",
    [{}, {"integration": "pareto"}, {"integration": "uniform"}],
    ids=str,
)
def test_fsdp2_trains_as_one_process(two: Processes, how: str, options: Options) -> None:
    two(check_fsdp, how, options, by_modality=False, sharding={})


@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp2_with_blocks_by_hand(two: Processes, reshard: bool) -> None:
    two(check_fsdp, "nested", {}, by_modality=True, sharding={"reshard_after_forward": reshard})


def check_fsdp_practice() -> None:
    """Accumulation, loss scaling and clipping."""
    whole = Model()
    model = deepcopy(whole)
    shard(model, "nested")
    reference, opt = adam(whole, average_gradients=False), adam(model)
    scalers = [GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for _ in range(3):
        micro = batches(2)
        norms = []
        for trained, owner, scaler in zip((reference, opt), (whole, model), scalers, strict=True):
            trained.zero_grad()
            for batch in micro:
                losses = owner(*(batch if owner is whole else share(batch)))
                trained.backward({name: scaler.scale(loss / 2) for name, loss in losses.items()})
            scaler.unscale_(trained)
            norms.append(full(nn.utils.clip_grad_norm_(owner.parameters(), 0.1)))
            scaler.step(trained)
            scaler.update()
        torch.testing.assert_close(*norms)
        assert_close(model, whole)
        assert_close(model, whole, grads=True)


def test_fsdp2_with_accumulation_scaling_and_clipping(two: Processes) -> None:
    two(check_fsdp_practice)


def check_infinite() -> None:
    model = Model()
    shard(model, "nested")
    opt, scaler = adam(model), GradScaler("cpu", init_scale=2.0**10)
    (batch,) = batches(1)
    losses = {name: scaler.scale(loss) for name, loss in model(*share(batch)).items()}
    if dist.get_rank() == 1:
        losses["audio"] = losses["audio"] * float("inf")
    before = [full(param).clone() for param in model.parameters()]
    opt.backward(losses)
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(full(a).equal(b) for a, b in zip(model.parameters(), before, strict=True))


def test_an_infinite_gradient_of_a_shard_skips_the_step_on_all(two: Processes) -> None:
    two(check_infinite)


def check_foreign_gradients() -> None:
    whole = Model()
    model = deepcopy(whole)
    shard(model, "nested")
    reference, opt = adam(whole, average_gradients=False), adam(model)
    (batch,) = batches(1)
    for owner, part in ((whole, batch), (model, share(batch))):
        owner(*part)["mm"].backward()
    reference.backward(whole(*batch))
    opt.backward(model(*share(batch)))
    assert_close(model, whole, grads=True)

    params = opt.param_groups[0]["params"]  # the module's own are unsharded after a forward
    before = [param.grad for param in params]
    losses = model(*share(batch))
    losses["audio"] = losses["audio"].detach().requires_grad_().exp()
    losses["audio"].backward()
    with pytest.raises(RuntimeError, match=r"loss 'audio': its graph has been freed"):
        opt.backward(losses)
    assert all(p.grad is g for p, g in zip(params, before, strict=True))


def test_grad_of_somebody_else_is_added_to_and_survives_errors(two: Processes) -> None:
    two(check_foreign_gradients)


def check_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = Model()
    shard(model, "nested")
    opt = adam(model)
    opt.step(losses=model(*share(batches(1)[0])))
    state: Any = get_optimizer_state_dict(model, opt)
    plain = get_optimizer_state_dict(model, opt.optimizer)
    assert state["param_groups"] == plain["param_groups"]
    assert state["state"].keys() == dict(model.named_parameters()).keys()


def test_checkpoints_name_the_sharded_parameters(two: Processes) -> None:
    two(check_checkpoint)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio(audio), self.visual(visual)


class SharedHeads(Model):
    """FSDP2 gives zeros for the input of a sharded module that a loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()

    def losses_at(self, features: dict[str, Tensor], label: Tensor) -> Losses:
        audio, visual = self.heads(**features)
        joint = self.mm_head(torch.cat([features["audio"], features["visual"]], dim=1))
        logits = {"mm": joint, "audio": audio, "visual": visual}
        return {name: cross_entropy(found, label) for name, found in logits.items()}


def check_several_inputs() -> None:
    from torch.distributed.fsdp import fully_shard

    whole = SharedHeads()
    model = deepcopy(whole)
    fully_shard(model.heads)
    fully_shard(model)
    blocks = [{"audio": owner.audio, "visual": owner.visual} for owner in (whole, model)]
    for here, there in ((None, None), blocks):
        reference = adam(whole, average_gradients=False, param_groups_by_modality=here)
        opt = adam(model, param_groups_by_modality=there)
        for batch in batches(2):
            for optimizer in (reference, opt):
                optimizer.zero_grad()
            reference.backward(whole(*batch))
            opt.backward(model(*share(batch)))
            for part in ("audio", "visual", "heads"):
                assert_close(getattr(model, part), getattr(whole, part), grads=True)


def test_a_sharded_module_of_several_losses(two: Processes) -> None:
    two(check_several_inputs)


def check_refusals() -> None:
    model = Model()
    shard(model, "whole")
    opt, by_tensor = adam(model), adam(model, rescale="tensor")
    losses = model(*share(batches(1)[0]))
    with pytest.raises(ValueError, match="leave features out for the exact gradients"):
        opt.backward(losses, features={"audio": losses["mm"] * 1})
    with pytest.raises(ValueError, match='use rescale="encoder"'):
        by_tensor.backward(losses)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"set_requires_gradient_sync\(True\)"):
        opt.backward(model(*share(batches(1)[0])))
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    opt.backward(losses)


def test_what_shards_do_not_allow_names_the_mend(two: Processes) -> None:
    two(check_refusals)


@pytest.mark.filterwarnings("ignore")
def check_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(Model(), use_orig_params=original, device_id=cpu)
        opt = adam(model)
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard \(FSDP2\)"):
            opt.step(losses=model(*share(batches(1)[0])))


def test_fsdp1_is_refused(two: Processes) -> None:
    two(check_fsdp1)


class Normed(Model):
    """With a layer whose gradients are sums that sequence parallelism leaves to be made."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6)
        ).double()
        self.visual = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    def forward(self, *batch: Tensor) -> Losses:
        return self.losses((batch[0].unsqueeze(1).expand(-1, 4, -1), batch[1], batch[2]))

    def features(self, batch: Batch) -> dict[str, Tensor]:
        return {"audio": self.audio(batch[0]).mean(1), "visual": self.visual(batch[1])}


def check_a_missing_loss() -> None:
    """Else a rank would gather parameters that the other does not send."""
    model = Model()
    shard(model, "nested")
    opt = adam(model)
    batch = share(batches(1)[0])
    for case in ("missing", "without a graph"):
        losses = model(*batch)
        if dist.get_rank() == 1 and case == "missing":
            del losses["audio"]
        if dist.get_rank() == 1 and case == "without a graph":
            losses["audio"] = losses["audio"].detach()
        error = ValueError if dist.get_rank() and case == "without a graph" else RuntimeError
        message = "differ in their losses" if case == "missing" else "'audio' has no graph"
        with pytest.raises(error, match=message):
            opt.step(losses=losses)
        opt.step(losses=model(*batch))


def test_a_loss_that_one_rank_lacks_is_refused(two: Processes) -> None:
    two(check_a_missing_loss)


def check_loss_that_is_a_dtensor() -> None:
    """As ``loss_parallel`` gives it."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    param = nn.Parameter(distribute_tensor(torch.ones(5), mesh(2), [Replicate()]))
    opt = MMParetoOptimizer(torch.optim.LBFGS([param], max_iter=2))

    def closure() -> Losses:
        opt.zero_grad()
        return {"one": param.square().sum(), "other": (param - 2).square().sum()}

    assert float(opt.step(closure)) == 10.0
    (stats,) = opt.stats.values()
    torch.testing.assert_close(stats.norms[0], 2 * full(param).double().norm())


def test_a_loss_that_is_a_dtensor(two: Processes) -> None:
    two(check_loss_that_is_a_dtensor)


def parallelize(model: Normed, over: Any) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "audio.0": ColwiseParallel(output_layouts=Shard(1)),
        "audio.1": SequenceParallel(),
        "audio.2": SequenceParallel(),
        "audio.3": RowwiseParallel(input_layouts=Shard(1)),
        "visual.0": ColwiseParallel(),
        "visual.2": RowwiseParallel(),
    }
    parallelize_module(model, over, plan)


def check_tensor_parallel(shape: tuple[int, ...]) -> None:
    whole = Normed()
    model = deepcopy(whole)
    opt_options: Options = {}
    if len(shape) == 1:
        parallelize(model, mesh(*shape))
    else:
        grid = mesh(*shape, names=("dp", "tp"))
        parallelize(model, grid["tp"])
        opt_options = {"process_group": grid["dp"].get_group()}
        with pytest.raises(ValueError, match=r"process_group=mesh\['dp'\]"):
            adam(model).backward(model(*batches(1)[0]))
    reference, opt = adam(whole, average_gradients=False), adam(model, **opt_options)
    for batch in batches(3):
        part = batch if len(shape) == 1 else share(batch, shape[0], grid["dp"].get_local_rank())
        for trained, losses in ((reference, whole(*batch)), (opt, model(*part))):
            trained.zero_grad()
            trained.step(losses=losses)
        assert_close(model, whole)
        assert_close(model, whole, grads=True)
        assert_same_stats(opt, reference)


def test_tensor_parallel_trains_as_one_process(two: Processes) -> None:
    two(check_tensor_parallel, (2,))


def check_two_dimensions(how: str) -> None:
    """Hybrid sharding, and FSDP2 over tensor parallelism."""
    from torch.distributed.fsdp import fully_shard

    whole = Normed()
    model = deepcopy(whole)
    options: Options = {}
    if how == "hybrid":
        grid = mesh(2, 2, names=("replicate", "shard"))
        fully_shard(model.audio, mesh=grid)
        fully_shard(model, mesh=grid)
        ranks, rank = 4, dist.get_rank()
    else:
        grid = mesh(2, 2, names=("dp", "tp"))
        parallelize(model, grid["tp"])
        fully_shard(model.visual, mesh=grid["dp"])
        fully_shard(model, mesh=grid["dp"])
        options = {"process_group": grid["dp"].get_group()}
        ranks, rank = 2, grid["dp"].get_local_rank()
    reference, opt = adam(whole, average_gradients=False), adam(model, **options)
    for batch in batches(3):
        for trained, losses in (
            (reference, whole(*batch)),
            (opt, model(*share(batch, ranks, rank))),
        ):
            trained.zero_grad()
            trained.step(losses=losses)
        assert_close(model, whole)
        assert_same_stats(opt, reference)


@pytest.mark.slow
def test_tensor_parallel_in_data_parallel(four: Processes) -> None:
    four(check_tensor_parallel, (2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hybrid", "tensor parallel"])
def test_fsdp2_in_two_dimensions(four: Processes, how: str) -> None:
    four(check_two_dimensions, how)
