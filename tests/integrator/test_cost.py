"""What a plain exact step enters and issues beside the passes, counted."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmpareto_optim
from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch

PACKAGE = Path(mmpareto_optim.__file__).parent
FILES = 14
"""Of the package, that a plain step may enter."""
OPERATIONS = {"cpu": 20, "meta": 50}
"""That may be issued beside the passes and the base's step, for two encoders of two losses each."""
AT_FEATURES = {"cpu": 25, "meta": 55}
"""That a step at the features may issue beside plain training's, for the same model."""
Batch = tuple[Tensor, Tensor, Tensor]


def plain_step(model: LateFusion, opt: MMParetoOptimizer, batch: Batch) -> Callable[[], None]:
    """A step with its forward done, so that only the step is seen."""
    opt.zero_grad()
    losses = model.losses(batch)
    return lambda: opt.step(losses=losses)


def warmed_up(device: str) -> tuple[LateFusion, MMParetoOptimizer, Batch]:
    """After two steps: the first ones look at more."""
    with torch.device(device):
        model = LateFusion()
        spec, image, label = audio_visual_batch()
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        plain_step(model, opt, (spec, image, label))()
    return model, opt, (spec, image, label)


def test_files_that_a_plain_step_enters() -> None:
    """Who wants to understand a step reads no more than these."""
    step = plain_step(*warmed_up("cpu"))
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    assert "optimizer.py" in entered
    assert len(entered) <= FILES, sorted(entered)


def kinds_of(values: Any) -> set[str]:
    """The types of the devices on which some values' tensors are."""
    return {value.device.type for value in tree_leaves(values) if isinstance(value, Tensor)}


class Launches(TorchDispatchMode):
    """Counts operations: on a GPU each is a kernel or several.

    ``count`` is of those that are more than a view or an allocation. ``waits`` is of those that
    wait for a device, for which meta tensors stand: they give the host what is computed from a
    tensor of the device, or copy one of the host's to it, and are not ``non_blocking``. PyTorch
    counts as ``torch.cuda.set_sync_debug_mode`` does. The library copies Gram matrices without
    values as ones; any other look at a value raises, as there is none. What a driver waits for by
    itself, to allocate for example, is not seen.
    """

    count = waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        launches = not any(alias and not alias.is_write for alias in aliases)
        is_free = any(word in func.name() for word in ("empty", "resize_", "_unsafe_view"))
        self.count += launches and not is_free
        result = func(*args, **kwargs or {})
        given, found = kinds_of((args, kwargs)), kinds_of(result)
        reads = "meta" in given and "cpu" in found
        sends = "_copy" in func.name() and "cpu" in given and "meta" in found
        self.waits += (reads or sends) and not (kwargs or {}).get("non_blocking")
        return result


def launches_of(function: Callable[[], object]) -> int:
    with Launches() as launches:  # type: ignore[no-untyped-call]
        function()
    return int(launches.count)


class ManyLosses:
    """A trunk that all losses reach, and layers on it that one reaches each."""

    def __init__(
        self,
        losses: int,
        device: str,
        *,
        trunk: int = 3,
        head: int = 1,
        width: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def layers(number: int) -> nn.Sequential:
            return nn.Sequential(*(nn.Linear(width, width) for _ in range(number)))

        self.trunk = layers(trunk).to(device, dtype)
        self.heads = nn.ModuleList(layers(head) for _ in range(losses)).to(device, dtype)
        self.given = torch.randn(2, width, device=device, dtype=dtype)
        self.params = [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self) -> dict[str, Tensor]:
        features = self.trunk(self.given)
        return {str(i): head(features).square().sum() for i, head in enumerate(self.heads)}

    def operations(self) -> int:
        return beside_the_passes(self.losses, self.params)


def beside_the_passes(
    losses_of: Callable[[], dict[str, Tensor]], params: list[nn.Parameter], **options: Any
) -> int:
    """Of a third step, without what the passes by themselves and the base's step issue."""
    base = torch.optim.SGD(params, lr=0.1)
    opt = MMParetoOptimizer(base, **options)
    for _ in range(2):
        opt.zero_grad()
        opt.step(losses=losses_of())
    opt.zero_grad()
    losses = losses_of()
    passes = [
        launches_of(
            lambda loss=loss: torch.autograd.grad(  # type: ignore[misc]
                loss, params, retain_graph=True, allow_unused=True
            )
        )
        for loss in losses.values()
    ]
    whole = launches_of(lambda: opt.step(losses=losses))
    return whole - sum(passes) - launches_of(base.step)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_plain_step(device: str) -> None:
    """Meta stands for a device: what would read a value back there cannot."""
    model, _, batch = warmed_up(device)
    count = beside_the_passes(lambda: model.losses(batch), list(model.parameters()))
    print(f"\n{count} operations beside the passes on {device}")
    assert 0 < count <= OPERATIONS[device]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("losses", [3, 10, 40])
def test_operations_with_many_losses(device: str, dtype: torch.dtype, losses: int) -> None:
    count = ManyLosses(losses, device, dtype=dtype).operations()
    print(f"\n{count} operations for {losses} losses on {device}, {dtype}")
    assert 0 < count <= 20 + 3 * losses


def test_operations_on_a_device_do_not_grow_with_tensors_below_a_million() -> None:
    assert len({ManyLosses(5, "meta", width=width).operations() for width in (16, 1000)}) == 1


@pytest.mark.parametrize("losses", [2, 5])
def test_long_gradients_take_few_operations_on_a_device(losses: int) -> None:
    """Each is a row by itself. On the CPU they are cut into pieces that fit a core's cache."""
    few, more = (
        ManyLosses(losses, "meta", trunk=trunk, width=1024).operations() for trunk in (1, 4)
    )
    print(f"\n{few} and {more} operations for 1 and 4 long gradients of {losses} losses")
    # A copy of each loss's, which most gradients do without once they are known, and a summand.
    assert few < more <= few + 3 * (2 * losses + 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_heads_cost_no_operation(device: str) -> None:
    small, large = (ManyLosses(5, device, head=head).operations() for head in (1, 4))
    assert small == large == ManyLosses(5, device, head=0).operations()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("integration", ["mmpareto", "uniform"])
def test_operations_do_not_grow_with_the_parameters(device: str, integration: Any) -> None:
    counts = []
    for number in (3, 63):
        with torch.device(device):
            params = [nn.Parameter(torch.zeros(7, 5)) for _ in range(number)]

        def losses_of(params: list[nn.Parameter] = params) -> dict[str, Tensor]:
            total = torch.stack([param.sum() for param in params]).sum()
            return {"one": total, "other": total.square()}

        counts.append(beside_the_passes(losses_of, params, integration=integration))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_step_at_the_features(device: str) -> None:
    model, opt, batch = warmed_up(device)
    for _ in range(2):
        features = model.features(batch)
        losses = model.losses_at(features, batch[2])
        opt.zero_grad()
        opt.step(losses=losses, features=features)
    opt.zero_grad()
    features = model.features(batch)
    losses = model.losses_at(features, batch[2])
    with Launches() as launches:  # type: ignore[no-untyped-call]
        opt.step(losses=losses, features=features)
    whole = launches.count
    total = torch.stack(list(model.losses(batch).values())).sum()
    opt.zero_grad()
    plain = launches_of(total.backward) + launches_of(opt.optimizer.step)
    print(f"\n{whole - plain} operations more than plain training on {device}")
    assert 0 < whole - plain <= AT_FEATURES[device]
    assert launches.waits == 0


@pytest.mark.parametrize(("losses", "waits"), [(1, 0), (2, 0), (3, 1), (10, 1)])
def test_waits_of_a_step(losses: int, waits: int) -> None:
    """One for all blocks together where some are of three losses or more."""
    several = [ManyLosses(losses, "meta"), ManyLosses(2, "meta"), ManyLosses(losses, "meta")]
    params = [param for task in several for param in task.params]
    opt = MMParetoOptimizer(torch.optim.SGD(params, lr=0.1))

    def step() -> None:
        found = {
            f"{i}, {name}": loss
            for i, task in enumerate(several)
            for name, loss in task.losses().items()
        }
        opt.zero_grad()
        opt.step(losses=found)

    for _ in range(2):
        step()
    with Launches() as launches:  # type: ignore[no-untyped-call]
        step()
    assert launches.waits == waits
