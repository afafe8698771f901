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

import mmpareto_optim
from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch

PACKAGE = Path(mmpareto_optim.__file__).parent
FILES = 14
"""Of the package, that a plain step may enter."""
OPERATIONS = {"cpu": 25, "meta": 60}
"""That may be issued beside the passes and the base's step, for two encoders of two losses each."""
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


class Launches(TorchDispatchMode):
    """Counts the operations that are more than a view: on a GPU each is a kernel or several."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        launches = not any(alias and not alias.is_write for alias in aliases)
        allocates = any(word in func.name() for word in ("empty", "resize_"))
        self.count += launches and not allocates
        return func(*args, **kwargs or {})


def launches_of(function: Callable[[], object]) -> int:
    with Launches() as launches:  # type: ignore[no-untyped-call]
        function()
    return int(launches.count)


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


@pytest.mark.parametrize("integration", ["mmpareto", "uniform"])
def test_operations_grow_by_no_more_than_a_copy_for_each_parameter(integration: Any) -> None:
    counts = []
    for number in (3, 63):
        with torch.device("meta"):
            params = [nn.Parameter(torch.zeros(7, 5)) for _ in range(number)]

        def losses_of(params: list[nn.Parameter] = params) -> dict[str, Tensor]:
            total = torch.stack([param.sum() for param in params]).sum()
            return {"one": total, "other": total.square()}

        counts.append(beside_the_passes(losses_of, params, integration=integration))
    print(f"\n{counts} operations for 3 and 63 parameters")
    # For each loss a copy into its row, and one out of the result into .grad.
    assert 0 <= counts[1] - counts[0] <= 60 * 3
