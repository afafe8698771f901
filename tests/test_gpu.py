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
    torch.testing.assert_close(stats.gram, rows.double() @ rows.double().T)
