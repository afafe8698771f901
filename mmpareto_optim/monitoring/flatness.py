"""How flat the loss is around the parameters that a training reached."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpareto_optim.monitoring.preserve import preserved_state, trainable_parameters

LossFn = Callable[[], Tensor | float]


@dataclass(frozen=True, eq=False)
class LossSlices:
    """A loss along straight lines through the parameters.

    Attributes:
        distances: where along a line, shape ``(points,)``, ascending, 0 in the middle; 1 is as
            long, filter by filter, as the weights.
        losses: shape ``(directions, points)``, float64. Not finite where the loss is not.
    """

    distances: Tensor
    losses: Tensor

    @property
    def rises(self) -> Tensor:
        """Mean rise of the loss from the middle to both ends, shape ``(directions,)``.

        On a quadratic of Hessian H and a direction ``d`` it is ``radius^2 * d . H d / 2``.
        """
        middle = self.losses[:, self.losses.shape[1] // 2]
        return (self.losses[:, 0] + self.losses[:, -1]) / 2 - middle

    @property
    def sharpness(self) -> float:
        """How sharp the minimum is, the mean of ``rises`` over the directions; 0 where flat."""
        return float(self.rises.mean())


def loss_slices(
    model: nn.Module,
    loss_fn: LossFn,
    params: nn.Module | Iterable[Tensor] | None = None,
    *,
    radius: float = 0.5,
    points: int = 11,
    directions: int = 10,
    seed: int = 0,
) -> LossSlices:
    """The loss along random, filter-normalised lines through the present parameters.

    A direction is Gaussian, each filter of it (a slice of a weight along its first dimension)
    scaled to the length of the model's own; parameters of one dimension stay as they are (Li et
    al. 2018, Section 4). That makes two networks comparable which differ in the scale of their
    weights. To compare the minima of two methods, give both the same arguments, ``seed`` too::

        for name, model in models.items():
            flat = loss_slices(model.eval(), lambda: mean_loss(model, data))
            print(name, flat.sharpness, "+-", float(flat.rises.std() / len(flat.rises) ** 0.5))

    Args:
        model: as a rule in ``eval()`` mode; it and the random generators are afterwards as before.
        loss_fn: gives the loss on always the same data, a scalar; called ``directions * points``
            times without autograd, each time from the same state.
        params: a module or parameters of the model to move, without frozen ones; all by default.
        radius: the largest distance, positive.
        points: on a line, odd and at least 3.
        directions: how many lines.
        seed: of the directions.
    """
    if not (radius > 0 and points >= 3 and points % 2 == 1 and directions >= 1):
        raise ValueError("radius must be positive, points odd and at least 3, directions positive")
    weights = [param for param in trainable_parameters(model, params) if param.ndim > 1]
    if not weights:
        raise ValueError("params holds no weight of two or more dimensions, so there is no filter")
    generator = torch.Generator("cpu").manual_seed(seed)
    half = points // 2
    distances = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") * radius / half
    losses = []
    for _ in range(directions):
        line = [(weight, _filter_normalised(weight, generator)) for weight in weights]
        losses.append([_loss_at(model, loss_fn, line, distance) for distance in distances.tolist()])
    return LossSlices(distances, torch.tensor(losses, dtype=torch.float64, device="cpu"))


def _filter_normalised(weight: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU in one dtype, so that the seed gives the same direction everywhere.
    random = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    random = random.flatten(1).to(weight.device, torch.promote_types(weight.dtype, random.dtype))
    own = torch.linalg.vector_norm(weight.detach().to(random).flatten(1), dim=1, keepdim=True)
    random *= own / torch.linalg.vector_norm(random, dim=1, keepdim=True)
    return random.view(weight.shape)


def _loss_at(
    model: nn.Module, loss_fn: LossFn, line: list[tuple[Tensor, Tensor]], distance: float
) -> float:
    # By .data and not in place, for the reasons given in preserved_state().
    originals = [(weight, weight.data) for weight, _ in line]
    try:
        for weight, direction in line:
            weight.data = (weight.data + distance * direction).to(weight.dtype)
        with preserved_state(model), torch.no_grad():
            loss = loss_fn()
    finally:
        for weight, original in originals:
            weight.data = original
    return float(loss)
