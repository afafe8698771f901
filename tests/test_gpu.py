"""What only a GPU can show. The same code runs on the CPU in the other tests."""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_a_step_does_not_wait_for_the_device(rescale: str, request: pytest.FixtureRequest) -> None:
    model = LateFusion().cuda()
    batch = tuple(tensor.cuda() for tensor in audio_visual_batch())
    opt = MMParetoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        rescale=rescale,  # type: ignore[arg-type]
    )
    opt.step(losses=model.losses(batch))  # type: ignore[arg-type]  # lazy initialisation
    request.getfixturevalue("sync_is_an_error")
    for _ in range(3):
        opt.zero_grad()
        opt.step(losses=model.losses(batch))  # type: ignore[arg-type]


def test_a_step_with_three_losses_waits_once() -> None:
    """However many blocks there are; as PyTorch counts it."""
    trunks = [nn.Linear(5, 5).cuda() for _ in range(2)]
    params = [param for trunk in trunks for param in trunk.parameters()]
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1))
    given = torch.randn(3, 7, 5, device="cuda")

    def step() -> list[str]:
        losses = {
            f"{i}, {j}": trunk(x).square().mean()
            for i, trunk in enumerate(trunks)
            for j, x in enumerate(given)
        }
        opt.zero_grad()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                opt.step(losses=losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [str(warning.message) for warning in caught]

    step()
    assert len(step()) == 1


def test_a_feature_space_step_does_not_wait_for_the_device(
    request: pytest.FixtureRequest,
) -> None:
    model = LateFusion().cuda()
    spec, image, label = (tensor.cuda() for tensor in audio_visual_batch())
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        features = model.features((spec, image, label))
        opt.zero_grad()
        opt.step(losses=model.losses_at(features, label), features=features)

    step()
    request.getfixturevalue("sync_is_an_error")
    for _ in range(3):
        step()


@pytest.mark.parametrize("by_features", [False, True])
def test_a_whole_step_in_a_cuda_graph(by_features: bool) -> None:
    torch.manual_seed(0)
    model = LateFusion().cuda()
    batch = audio_visual_batch()
    spec, image, label = (tensor.cuda() for tensor in batch)
    opt = MMParetoOptimizer(torch.optim.Adam(model.parameters(), lr=0.01, capturable=True))
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def step() -> None:
        features = model.features((spec, image, label))
        losses = model.losses_at(features, label)
        opt.zero_grad()
        opt.step(losses=losses, features=features if by_features else None)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = []
    for replay in (graph.replay, step):
        model.load_state_dict(start)
        for state in opt.state.values():
            for value in state.values():
                value.zero_()
        for _ in range(3):
            replay()
        captured.append([param.detach().clone() for param in model.parameters()])
    torch.testing.assert_close(*captured)


def test_same_parameters_as_on_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = LateFusion(dtype=torch.float64)
        opt = MMParetoOptimizer(torch.optim.SGD(model.to(device).parameters(), lr=0.1))

        def step(losses: Losses, opt: MMParetoOptimizer = opt) -> None:
            opt.zero_grad()
            opt.step(losses=losses)

        with torch.device(device):
            results.append([param.cpu() for param in train(model, step, steps=10)])
    torch.testing.assert_close(*results)


def test_tf32_does_not_reach_the_gram_matrix() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        param = torch.nn.Parameter(torch.zeros(100_000, device="cuda"))
        rows = torch.randn(2, 100_000, device="cuda")
        opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
        opt.backward({str(i): (param * row).sum() for i, row in enumerate(rows)})
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    (stats,) = opt.stats.values()
    # In float64: the bound is that of a sum of as many products, TF32 would be off by 1e-3.
    exact = rows.double() @ rows.double().T
    torch.testing.assert_close(stats.gram, exact, rtol=0, atol=1e-10 * float(exact.max()))


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl", init_method=store, rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def as_several(nccl: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """One process goes through the collectives of several: that is all one device can show."""
    # internal: how processes that average are made, and where they are chosen.
    from mmpareto_optim.distributed.data_parallel import DataParallel
    from mmpareto_optim.distributed.single import ProcessSelection

    def choose(reduce_dtype: torch.dtype | None = None) -> None:
        world = torch.distributed.group.WORLD
        assert world is not None
        processes = DataParallel(world, reduce_dtype)
        monkeypatch.setattr(ProcessSelection, "of", lambda *_: processes)

    return choose


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize("reduce_dtype", [None, torch.float64])
def test_averaging_does_not_wait_for_the_device(
    by_features: bool,
    reduce_dtype: torch.dtype | None,
    as_several: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    model = LateFusion().cuda()
    spec, image, label = (tensor.cuda() for tensor in audio_visual_batch())
    ends = []
    for averaging in (False, True):
        if averaging:
            as_several(reduce_dtype)
        twin = deepcopy(model)
        opt = MMParetoOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1))
        for number in range(4):
            if number == 1 and averaging:
                request.getfixturevalue("sync_is_an_error")
            features = twin.features((spec, image, label))
            losses = twin.losses_at(features, label)
            opt.zero_grad()
            opt.step(losses=losses, features=features if by_features else None)
        ends.append(list(twin.parameters()))
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(*ends)


def test_an_error_while_averages_are_on_their_way(as_several: Callable[..., None]) -> None:
    """What they write to is not handed out again before they are done."""
    as_several()
    param = torch.nn.Parameter(torch.zeros(2**22, device="cuda"))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
    for _ in range(5):
        failing = param.sum() * 1.0
        failing.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step(losses={"mm": failing, "audio": param.square().sum(), "visual": param.sum()})
        assert param.grad is None
        ones = [torch.ones_like(param) for _ in range(4)]
        assert all(bool((one == 1).all()) for one in ones)
    opt.step(losses={"mm": param.sum()})
    assert param.grad is not None
    assert bool((param.grad == 1).all())


@pytest.mark.usefixtures("nccl")
def test_fsdp2_on_a_gpu() -> None:
    from torch.distributed.fsdp import fully_shard

    class Model(LateFusion):
        def forward(self, *batch: Tensor) -> Losses:
            return self.losses((batch[0], batch[1], batch[2]))

    whole = Model().cuda()
    model = deepcopy(whole)
    for part in (model.audio, model.visual, model):
        fully_shard(part)
    optimizers = [
        MMParetoOptimizer(torch.optim.Adam(owner.parameters(), lr=0.01, fused=True))
        for owner in (whole, model)
    ]
    for _ in range(5):
        batch = [tensor.cuda() for tensor in audio_visual_batch()]
        for owner, opt in zip((whole, model), optimizers, strict=True):
            opt.zero_grad()
            opt.step(losses=owner(*batch))
    sharded: list[Any] = optimizers[1].param_groups[0]["params"]
    torch.testing.assert_close([p.full_tensor() for p in sharded], list(whole.parameters()))
