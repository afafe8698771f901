"""What only a GPU can show. The same code runs on the CPU in the other tests."""

from collections.abc import Iterator

import pytest
import torch

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
    torch.testing.assert_close(stats.gram, rows.double() @ rows.double().T)
