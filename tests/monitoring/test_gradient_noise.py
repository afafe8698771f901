"""Magnitude and batch-sampling covariance of gradients, against slow and known ones."""

import math
from collections.abc import Iterator
from itertools import permutations
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import GradientNoise, gradient_noise
from tests.models import LateFusion, audio_visual_batch, grads, vectors_as_losses
from tests.monitoring.helpers import OTHER_DEFAULTS, defaults

Batches = list[tuple[Tensor, Tensor, Tensor]]


def oracle(gradients: Tensor) -> tuple[float, float, float]:
    """Squared norm, trace and largest eigenvalue from gradients ``(n, d)`` and a (d, d) matrix."""
    n = len(gradients)
    covariance = torch.cov(gradients.T.double())
    products = [
        float(gradients[i].double() @ gradients[j].double())
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    eigenvalues = torch.linalg.eigvalsh(covariance)
    return sum(products) / len(products), float(covariance.trace()), float(eigenvalues[-1])


def numbers(noise: GradientNoise) -> tuple[float, float, float]:
    return noise.squared_norm, noise.trace, noise.largest_eigenvalue


def plain_gradients(model: LateFusion, batches: Batches, loss: str, part: nn.Module) -> Tensor:
    rows = []
    for batch in batches:
        model.zero_grad()
        model.losses(batch)[loss].backward()
        rows.append(torch.cat([param.grad.flatten() for param in part.parameters()]))  # type: ignore[union-attr]
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [7, 2**16])
def test_same_as_the_covariance_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpareto_optim.monitoring.gradient_noise.CHUNK_SIZE", chunk)
    model = LateFusion()
    batches = [audio_visual_batch() for _ in range(9)]
    found = gradient_noise(model, model.losses, batches, model.audio)
    assert list(found) == ["mm", "audio"]
    for loss, noise in found.items():
        expected = oracle(plain_gradients(model, batches, loss, model.audio))
        assert numbers(noise) == pytest.approx(expected, rel=1e-5)
        assert noise.norm == pytest.approx(max(expected[0], 0) ** 0.5, rel=1e-5)


def products_across_batches(one: Tensor, other: Tensor) -> float:
    """The mean product of gradients ``(n, d)`` of two losses over the pairs of unlike batches."""
    pairs = permutations(range(len(one)), 2)
    return mean(float(one[i].double() @ other[j].double()) for i, j in pairs)


def test_products_are_those_of_different_batches() -> None:
    model = LateFusion()
    batches = [audio_visual_batch() for _ in range(6)]
    found = gradient_noise(model, model.losses, batches, model.audio)
    rows = {name: plain_gradients(model, batches, name, model.audio) for name in found}
    for one, noise in found.items():
        assert list(noise.products) == list(noise.cosines) == ["mm", "audio"]
        assert noise.products[one] == noise.squared_norm
        for other, product in noise.products.items():
            expected = products_across_batches(rows[one], rows[other])
            assert product == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_noise_that_two_losses_share_leaves_no_trace() -> None:
    """Expected gradients that oppose each other, under a noise in common that hides it."""
    param = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    truth = torch.zeros(2, 6, dtype=torch.float64)
    truth[0, 0], truth[1, 0], truth[1, 1] = 1.0, -1.0, 1.0
    products = []
    for _ in range(200):
        common = 2 * torch.randn(8, 1, 6, dtype=torch.float64)
        noise = gradient_noise(
            nn.ParameterList([param]), lambda rows: vectors_as_losses(param, rows), truth + common
        )
        products.append(noise["loss0"].products["loss1"])
    error = stdev(products) / 200**0.5
    assert error < 0.3  # a batch's own noise adds 24, that of a mean of eight batches 3
    assert abs(mean(products) + 1) < 4 * error


def test_cosines_are_those_of_the_expected_gradients() -> None:
    rows = torch.tensor([[[3.0, 0.0], [-1.0, 1.0]]]).expand(4, 2, 2)
    param = nn.Parameter(torch.zeros(2))
    found = gradient_noise(
        nn.ParameterList([param]), lambda rows: vectors_as_losses(param, rows), rows
    )
    assert found["loss0"].cosines == pytest.approx({"loss0": 1, "loss1": -(0.5**0.5)})
    assert found["loss1"].cosines == pytest.approx({"loss0": -(0.5**0.5), "loss1": 1})


def test_a_gradient_that_the_noise_hides_has_no_cosine() -> None:
    rows = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[-1.0, 0.0], [1.0, 1.0]]])
    param = nn.Parameter(torch.zeros(2))
    found = gradient_noise(
        nn.ParameterList([param]), lambda rows: vectors_as_losses(param, rows), rows
    )
    assert found["loss0"].squared_norm == -1
    assert math.isnan(found["loss0"].cosines["loss1"])
    assert math.isnan(found["loss1"].cosines["loss0"])
    assert found["loss1"].cosines["loss1"] == pytest.approx(1)


@pytest.mark.parametrize(("device", "dtype"), OTHER_DEFAULTS)
def test_other_default_devices_and_dtypes(device: str, dtype: torch.dtype) -> None:
    model = LateFusion()
    batches = [audio_visual_batch() for _ in range(3)]
    expected = repr(gradient_noise(model, model.losses, batches))
    with defaults(device, dtype):
        assert repr(gradient_noise(model, model.losses, batches)) == expected


def test_parameters_that_only_some_batches_reach() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    model = nn.ParameterList([first, second])

    def loss_fn(batch: tuple[int, Tensor]) -> dict[str, Tensor]:
        which, x = batch
        return {"loss": (x[:2] * first).sum() if which == 0 else (x * second).sum()}

    batches = [(i % 2, torch.randn(3)) for i in range(6)]
    rows = torch.zeros(6, 5)
    for i, (which, x) in enumerate(batches):
        if which == 0:
            rows[i, :2] = x[:2]
        else:
            rows[i, 2:] = x
    noise = gradient_noise(model, loss_fn, batches)["loss"]
    assert numbers(noise) == pytest.approx(oracle(rows), rel=1e-5)


def gaussian_noise(centre: Tensor, root: Tensor, batches: int) -> GradientNoise:
    """A linear loss whose gradient is Gaussian with covariance ``root @ root.T``."""
    param = nn.Parameter(torch.zeros_like(centre))
    samples = centre + torch.randn(batches, len(centre), dtype=centre.dtype) @ root.T
    found = gradient_noise(nn.ParameterList([param]), lambda g: {"l": (g * param).sum()}, samples)
    return found["l"]


def test_a_known_gaussian_is_found() -> None:
    """Averages over many small samples: within four of their standard errors of the truth."""
    centre = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
    root = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    covariance = root @ root.T
    runs = [gaussian_noise(centre, root, batches=5) for _ in range(400)]
    for name, truth in (
        ("squared_norm", float(centre @ centre)),
        ("trace", float(covariance.trace())),
    ):
        values = torch.tensor([getattr(run, name) for run in runs])
        error = float(values.std()) / len(values) ** 0.5
        # The naive estimate of the squared norm is too large by trace / 5 = 1.35.
        assert error < 0.3
        assert abs(float(values.mean()) - truth) < 4 * error, name
    large = gaussian_noise(centre, root, batches=1000)
    largest = float(torch.linalg.eigvalsh(covariance)[-1])
    # An eigenvalue of a sample covariance has the relative error (2 / n) ** 0.5.
    assert large.largest_eigenvalue == pytest.approx(largest, rel=4 * (2 / 1000) ** 0.5)
    assert min(run.squared_norm for run in runs) < 0
    assert min(run.norm for run in runs) == 0


def test_batches_of_one_shuffled_epoch() -> None:
    """All orders of six examples in three batches of two: what the documentation promises."""
    examples = torch.randn(6, 4, dtype=torch.float64) + 1
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    model = nn.ParameterList([param])
    runs = [
        gradient_noise(model, lambda g: {"l": (g * param).sum()}, batches)["l"]
        for order in permutations(range(6))
        if order[0] < order[1] and order[2] < order[3] and order[4] < order[5]
        for batches in [examples[list(order)].view(3, 2, 4).mean(1)]
    ]
    trace = float(torch.cov(examples.T).trace()) / 2
    truth = float(examples.mean(0).square().sum())
    assert len(runs) == 90
    assert mean(run.trace for run in runs) == pytest.approx(trace)
    assert mean(run.squared_norm for run in runs) == pytest.approx(truth - trace / 3)


def test_a_small_noise_beside_a_large_mean() -> None:
    """In float32 the noise is near the rounding of the mean; nothing must cancel."""
    rows = 1000 + 1e-2 * torch.randn(10, 50)
    param = nn.Parameter(torch.zeros(50))
    found = gradient_noise(nn.ParameterList([param]), lambda g: {"l": (g * param).sum()}, rows)
    assert numbers(found["l"]) == pytest.approx(oracle(rows), rel=1e-6)


class NormalisedAndDropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, label = batch
        return {"loss": cross_entropy(self.head(self.body(x)), label)}


def labelled_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(4)]


def test_the_model_and_the_generators_are_as_before() -> None:
    model = NormalisedAndDropped()
    batches = labelled_batches()
    model.losses(batches[0])["loss"].backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients, buffers, random = grads(model), list(model.buffers()), torch.get_rng_state()
    first = gradient_noise(model, model.losses, batches)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(grads(model), gradients, rtol=0, atol=0)
    assert all(one is other for one, other in zip(model.buffers(), buffers, strict=True))
    assert torch.get_rng_state().equal(random)
    assert repr(gradient_noise(model, model.losses, batches)) == repr(first)


def test_as_before_also_after_an_exception() -> None:
    model = NormalisedAndDropped()
    batches = labelled_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def loss_fn(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        model.losses(batch)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        gradient_noise(model, loss_fn, batches)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(random)


def test_a_generator_of_batches_under_no_grad() -> None:
    model = LateFusion()

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(3):
            yield audio_visual_batch()

    with torch.no_grad():
        assert gradient_noise(model, model.losses, batches())["mm"].trace > 0


def test_frozen_parameters_are_left_out() -> None:
    model = LateFusion()
    batches = [audio_visual_batch() for _ in range(3)]
    part = gradient_noise(model, model.losses, batches, model.audio[2])
    model.audio[0].requires_grad_(False)
    assert repr(gradient_noise(model, model.losses, batches, model.audio)) == repr(part)


def test_mistakes() -> None:
    model = LateFusion()
    batches = [audio_visual_batch() for _ in range(3)]
    with pytest.raises(ValueError, match=r"1 batches.*at least two"):
        gradient_noise(model, model.losses, batches[:1])
    with pytest.raises(TypeError, match="losses must be a mapping"):
        gradient_noise(model, lambda batch: model.losses(batch)["mm"], batches)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="no loss reaches params"):
        gradient_noise(model, lambda b: {"mm": model.losses(b)["mm"]}, batches, model.audio_head)
    with pytest.raises(ValueError, match="no parameter of the model"):
        gradient_noise(model, model.losses, batches, [nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="no parameter of the model"):
        gradient_noise(model, model.losses, batches, ["audio"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        gradient_noise(list(model.parameters()), model.losses, batches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradient_noise(model, model.losses, batches, nn.ReLU())
    names = iter([("mm", "audio"), ("mm",)])
    with pytest.raises(ValueError, match=r"batch 1 has losses \['mm'\].*\['mm', 'audio'\]"):
        gradient_noise(model, lambda b: {k: model.losses(b)[k] for k in next(names)}, batches)
    batches[2][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="'mm': a gradient not finite in batch 2"):
        gradient_noise(model, model.losses, batches, model.mm_head)
