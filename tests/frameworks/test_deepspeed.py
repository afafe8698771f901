"""DeepSpeed's ZeRO on two processes, against one process with the whole batch.

Runs where deepspeed is installed, which no extra does: a CPU and gloo are enough.
"""

import os
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch
from tests.processes import Processes, started

pytest.importorskip("deepspeed")

Batch = tuple[Tensor, Tensor, Tensor]


class Called(LateFusion):
    """What the engine calls."""

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return self.losses(batch)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes of their own: what DeepSpeed sets up stays."""
    if not dist.is_gloo_available():
        pytest.skip("no gloo in this build of torch")
    with started(2, tmp_path_factory.mktemp("pair")) as processes:
        yield processes


def engine_of(model: nn.Module, opt: Any, stage: int, **config: Any) -> Any:
    """DeepSpeed's engine; it takes the process group that there is."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    warnings.simplefilter("ignore")  # of its own affairs
    import deepspeed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 100.0,  # by default 1
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=opt, config=settings)[0]


def momentum(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(count: int = 4) -> list[Batch]:
    torch.manual_seed(3)
    return [audio_visual_batch(8) for _ in range(count)]


def share(batch: Batch, dtype: torch.dtype = torch.float32) -> Any:
    """This rank's half."""
    rank = dist.get_rank()
    half = (tensor[4 * rank : 4 * rank + 4] for tensor in batch)
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in half)


def step_through(engine: Any, integrator: GradientIntegrator, model: nn.Module) -> None:
    """As in the recipe."""
    reached = [(param, param.grad) for param in model.parameters() if param.grad is not None]
    linear = sum((param * gradient).sum() for param, gradient in reached)
    integrator.zero_grad()
    engine.backward(linear)
    engine.step()


def by_hand(model: Called, accumulate: int = 1, clip: float = torch.inf) -> list[Tensor]:
    """The oracle: one process, whole batches, no engine."""
    opt = MMParetoOptimizer(momentum(model), average_gradients=False)
    for number, batch in enumerate(batches(), start=1):
        opt.backward(model.losses(batch))
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
    return [param.detach() for param in model.parameters()]


def integrated(stage: int, accumulate: int, clip: float) -> None:
    model = Called()
    plain = deepcopy(model)
    engine = engine_of(model, momentum(model), stage, gradient_clipping=clip)
    integrator = GradientIntegrator(model.parameters())
    for number, batch in enumerate(batches(), start=1):
        integrator.backward(engine.module.losses(share(batch)))
        if number % accumulate == 0:
            step_through(engine, integrator, model)
    assert engine.global_steps == 4 // accumulate
    assert list(integrator.stats) == ["mm+audio", "mm+visual"]
    found = [param.detach() for param in model.parameters()]
    torch.testing.assert_close(found, by_hand(plain, accumulate, clip), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.1), (2, 100.0)])
def test_the_recipe_trains_as_one_process(
    pair: Processes, stage: int, accumulate: int, clip: float
) -> None:
    pair(integrated, stage, accumulate, clip)


def in_bfloat16(stage: int) -> None:
    model = Called()
    plain = deepcopy(model)
    before = [param.detach().clone() for param in model.parameters()]
    engine = engine_of(model, momentum(model), stage, bf16={"enabled": True})
    integrator = GradientIntegrator(model.parameters())
    for batch in batches():
        integrator.backward(engine.module.losses(share(batch, torch.bfloat16)))
        step_through(engine, integrator, model)
    expected = torch.cat([p.flatten() for p in by_hand(plain)])
    found = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    start = torch.cat([p.flatten() for p in before])
    assert (found - expected).norm() < 0.05 * (expected - start).norm()


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16(pair: Processes, stage: int) -> None:
    pair(in_bfloat16, stage)


def wrapped_before() -> None:
    model = Called()
    plain = deepcopy(model)
    opt = MMParetoOptimizer(momentum(model))
    engine = engine_of(model, opt, 0, gradient_clipping=0.1)
    for batch in batches():
        opt.backward(engine.module.losses(share(batch)))
        engine.step()
    found = [param.detach() for param in model.parameters()]
    torch.testing.assert_close(found, by_hand(plain, clip=0.1), rtol=1e-5, atol=1e-6)


def test_a_wrapper_in_the_engine_with_zero_0(pair: Processes) -> None:
    pair(wrapped_before)


def through_the_engine() -> None:
    model = Called()
    opt = MMParetoOptimizer(momentum(model))
    engine = engine_of(model, opt, 0)
    with pytest.raises(RuntimeError, match=r"compute it with engine\.module"):
        opt.backward(engine(*share(batches(1)[0])))


def test_outputs_of_the_engine_name_the_mend(pair: Processes) -> None:
    pair(through_the_engine)


def of_copies(stage: int, config: dict[str, Any]) -> None:
    model = Called()
    opt = MMParetoOptimizer(momentum(model))
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    engine = engine_of(model, opt, stage, **config)
    with pytest.warns(UserWarning, match=r"use GradientIntegrator\(model\.parameters\(\)\)"):
        opt.backward(engine.module.losses(share(batches(1)[0], dtype)))


@pytest.mark.parametrize(("stage", "config"), [(0, {"bf16": {"enabled": True}}), (1, {}), (2, {})])
def test_a_wrapper_that_holds_the_engines_copies_is_told(
    pair: Processes, stage: int, config: dict[str, Any]
) -> None:
    pair(of_copies, stage, config)


def partitioned() -> None:
    model = Called()
    engine = engine_of(model, momentum(model), 3)
    integrator = GradientIntegrator(model.parameters())
    with pytest.raises(ValueError, match=r"ZeRO 3, .* use ZeRO 1 or 2 .* \(FSDP2\)"):
        integrator.backward(engine.module.losses(share(batches(1)[0])))


def test_zero_3_is_refused(pair: Processes) -> None:
    pair(partitioned)
