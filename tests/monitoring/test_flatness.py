"""The loss along filter-normalised lines, on quadratics whose curvature is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import LossSlices, loss_slices
from tests.monitoring.helpers import OTHER_DEFAULTS, defaults


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Quadratic(nn.Module):
    """``sum_i w_i . H_i w_i / 2 + slope . w`` over the filters (rows) ``w_i`` of one weight."""

    def __init__(self, hessians: Tensor, slope: float = 0.0) -> None:
        super().__init__()
        self.hessians, self.slope = hessians, slope
        self.weight = nn.Parameter(torch.randn(hessians.shape[:2], dtype=torch.float64))
        self.bias = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(self) -> Tensor:
        curved = torch.einsum("ij,ijk,ik->", self.weight, self.hessians, self.weight) / 2
        return curved + self.slope * self.weight.sum() + 100 * self.bias.square().sum()


@given(
    curvatures=st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    radius=st.floats(0.1, 2),
    slope=st.floats(-1, 1),
)
def test_exact_where_each_filter_has_one_curvature(
    curvatures: list[float], radius: float, slope: float
) -> None:
    """Every direction is then equally curved: half the radius squared times sum c_i ||w_i||^2."""
    identity = torch.eye(5, dtype=torch.float64)
    model = Quadratic(torch.stack([c * identity for c in curvatures]), slope)
    squares = model.weight.detach().square().sum(1)
    expected = radius**2 / 2 * float(torch.tensor(curvatures, dtype=torch.float64) @ squares)
    flat = loss_slices(model, model.loss, radius=radius, directions=3, points=5)
    scale = 1 + radius**2 * float(squares.sum())
    assert flat.rises.tolist() == pytest.approx([expected] * 3, abs=1e-12 * scale)
    assert flat.sharpness == pytest.approx(expected, abs=1e-12 * scale)


def test_mean_curvature_over_directions() -> None:
    """A random direction of length ||w_i|| in n dimensions sees tr(H_i) ||w_i||^2 / n."""
    roots = torch.randn(3, 4, 4, dtype=torch.float64)
    hessians = roots @ roots.mT
    model = Quadratic(hessians)
    squares = model.weight.detach().square().sum(1)
    traces = hessians.diagonal(dim1=1, dim2=2).sum(1)
    expected = 0.5**2 / 2 * float((traces * squares).sum() / 4)
    flat = loss_slices(model, model.loss, radius=0.5, directions=400, points=3)
    error = float(flat.rises.std()) / 400**0.5
    assert error < 0.1 * expected
    assert abs(flat.sharpness - expected) < 4 * error


def test_the_whole_line_is_the_quadratic() -> None:
    model = Quadratic(torch.randn(2, 4, 4, dtype=torch.float64))
    flat = loss_slices(model, model.loss, radius=2, directions=4, points=9)
    assert flat.distances.tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert flat.losses.shape == (4, 9)
    assert flat.losses[:, 4].tolist() == [model.loss().item()] * 4
    third_differences = flat.losses.diff(n=3, dim=1)
    assert third_differences.abs().max() < 1e-12
    assert flat.losses[:, 0].std() > 0  # the directions differ


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def test_filters_keep_their_length_and_one_dimensional_parameters_stay() -> None:
    model = network()
    conv, norm, _, _, linear = model
    before = state(model)
    moves: list[dict[str, Tensor]] = []

    def loss_fn() -> float:
        moves.append({name: value - before[name] for name, value in state(model).items()})
        return 0.0

    loss_slices(model, loss_fn, radius=0.5, points=3, directions=2)
    assert all((move == 0).all() for middle in moves[1::3] for move in middle.values())
    moved = moves[::3] + moves[2::3]
    assert len(moved) == 4
    for move in moved:
        for name, layer in (("0", conv), ("4", linear)):
            lengths = move[f"{name}.weight"].flatten(1).norm(dim=1)
            own = before[f"{name}.weight"].flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, 0.5 * own, rtol=1e-4, atol=0)
            assert (move[f"{name}.bias"] == 0).all(), layer
        assert all((move[f"1.{name}"] == 0).all() for name in norm.state_dict())
    torch.testing.assert_close(moved[0]["0.weight"], -moved[2]["0.weight"])


def test_scaling_the_weights_of_a_rectified_layer_changes_nothing() -> None:
    """The reason for filter normalisation: a network with the same function is as flat."""
    images, labels = torch.randn(20, 6), torch.randint(3, (20,))
    sharpness = []
    for factor in (1.0, 100.0):
        torch.manual_seed(0)
        first, second = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)
        model = nn.Sequential(first, nn.ReLU(), second)
        with torch.no_grad():
            first.weight.mul_(factor)
            second.weight.div_(factor)
        flat = loss_slices(model, lambda model=model: cross_entropy(model(images), labels))  # type: ignore[misc]
        sharpness.append(flat.sharpness)
    assert sharpness[0] != 0
    assert sharpness[1] == pytest.approx(sharpness[0], rel=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_bit_for_bit(fails: bool) -> None:
    model = nn.Sequential(network(), nn.Dropout())
    images = torch.randn(5, 1, 6, 6)
    before = state(model)
    params = list(model.parameters())
    memory = [param.data_ptr() for param in params]
    kept = model(images).square().mean()  # a graph from before can still be used
    with_buffers_updated = state(model)
    random = torch.get_rng_state()
    calls = 0

    def loss_fn() -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = model(images).square().mean()
        if fails and calls == 5:
            raise KeyError("broken")
        return loss

    if fails:
        with pytest.raises(KeyError, match="broken"):
            loss_slices(model, loss_fn, points=5)
    else:
        first = loss_slices(model, loss_fn, points=5)
        assert calls == 10 * 5
        assert loss_slices(model, loss_fn, points=5).losses.equal(first.losses)
    after = state(model)
    assert all(after[name].equal(value) for name, value in with_buffers_updated.items())
    assert not after["0.1.running_mean"].equal(before["0.1.running_mean"])
    assert all(one is other for one, other in zip(model.parameters(), params, strict=True))
    assert [param.data_ptr() for param in params] == memory
    assert all(param.grad is None for param in params)
    assert torch.get_rng_state().equal(random)
    kept.backward()


def test_dropout_is_the_same_at_every_point() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout())
    x = torch.randn(3, 4)
    losses = []

    def loss_fn() -> Tensor:
        losses.append(model[1](torch.ones(50)))
        return model(x).mean()  # type: ignore[no-any-return]

    loss_slices(model, loss_fn, points=3, directions=1)
    assert losses[0].equal(losses[1])
    assert losses[0].equal(losses[2])


def test_only_a_part_moves() -> None:
    model = network()
    before = state(model)
    changed: set[str] = set()

    def loss_fn() -> float:
        changed.update(
            name for name, value in state(model).items() if not value.equal(before[name])
        )
        return 1.0

    loss_slices(model, loss_fn, model[4])
    assert changed == {"4.weight"}
    model[4].requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        loss_slices(model, loss_fn, model[4])


def test_a_zero_filter_stays_zero() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    flat = loss_slices(model, lambda: model.weight.square().sum())
    assert flat.sharpness == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 4, dtype=dtype)
    square = float(model.weight.detach().double().square().sum())
    flat = loss_slices(model, lambda: model.weight.double().square().sum(), radius=1, directions=2)
    assert model.weight.dtype == dtype
    assert flat.sharpness == pytest.approx(square, rel=2e-2)


@pytest.mark.parametrize(("device", "dtype"), OTHER_DEFAULTS)
def test_other_default_devices_and_dtypes(device: str, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3)

    def slices() -> LossSlices:
        return loss_slices(model, lambda: model.weight.square().sum(), points=3, directions=2)

    expected = slices()
    with defaults(device, dtype):
        found = slices()
    assert found.losses.equal(expected.losses)
    assert found.distances.equal(expected.distances)


def test_a_loss_that_is_not_finite_is_shown() -> None:
    model = nn.Linear(3, 2)
    original = model.weight.detach().clone()
    flat = loss_slices(model, lambda: 0.0 if model.weight.equal(original) else math.inf)
    assert flat.sharpness == math.inf


def test_mistakes() -> None:
    model = nn.Linear(3, 2)
    for options in ({"radius": 0.0}, {"points": 4}, {"points": 1}, {"directions": 0}):
        with pytest.raises(ValueError, match="radius must be positive, points odd"):
            loss_slices(model, lambda: 0.0, **options)
    with pytest.raises((RuntimeError, ValueError), match="converted to"):
        loss_slices(model, lambda: model(torch.ones(3)))
    with pytest.raises(ValueError, match="no weight of two or more dimensions"):
        loss_slices(model, lambda: 0.0, [model.bias])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        loss_slices(model.parameters(), lambda: 0.0)  # type: ignore[arg-type]
