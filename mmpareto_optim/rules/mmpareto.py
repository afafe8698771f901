"""The min-norm point: conventional Pareto (MGDA), and MMPareto, stretched to the sum's length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, check_gamma, check_gram, of_stack
from mmpareto_optim.rules.solver import EPS, nonnegative_minimum

LONGEST_STRETCH = 2.0**120  # where lengths differ by more, coefficients stay finite in float32


def mmpareto_coefficients(
    gram: Tensor, gamma: float = 1.5, *, eps: float | None = None, written: float = 0.0
) -> Tensor:
    """Coefficients of MMPareto (Wei & Hu 2024, arXiv 2405.17730, Algorithm 1).

    Without conflict (no negative inner product) ``h = gamma sum_i g_i``; in conflict the min-norm
    direction, common to all objectives: ``gamma m sum_i alpha_i g_i``, stretched to at least the
    length of that sum. Three things that the paper leaves open:

    * A zero gradient's loss counts as absent; a gradient that is alone is taken without ``gamma``.
    * Close to a Pareto-stationary point the stretch would blow rounding errors up. The weights are
      therefore found for cosines smaller by ``m * eps + written``, which keeps ``h . g_i >= 0``
      true of the rounded ``h``, in conflict. Where no direction satisfies that (two gradients
      within ``2 sqrt(m * eps + written)`` radians of opposite: 0.001 in float32, 0.13 written in
      bfloat16), the coefficients are zero, as for exactly opposite gradients.
    * Without conflict, the product of the rounded sum with a gradient that is ``1 / written`` times
      shorter than the others (256 in bfloat16, 2**24 in float32) can come out negative.

    The stretch ends at ``2**120``, for coefficients finite in float32; otherwise it is as exact as
    :func:`min_norm_weights`. Two gradients have a closed form, evaluated on their device without
    waiting for it. The matrices of more are copied to the host together and solved there.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, ``(..., m, m)``, symmetric up to rounding.
        gamma: factor on the result, positive; the authors' code uses 1.5.
        eps: machine epsilon of the arithmetic that will combine the gradients; None: ``gram``'s.
        written: unit roundoff (half the machine epsilon) of the dtype to which the combination is
            rounded once more, 0 where it is not.

    Returns:
        Coefficients ``(..., m)`` of ``h = sum_i c_i g_i`` on the device and in the dtype of
        ``gram``: 1 where at most one gradient is not zero, NaN where ``gram`` is not finite. A zero
        gradient's own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: ``gram`` is no stack of square, real floating-point matrices, or
            ``gamma`` is not positive and finite.
    """
    check_gram(gram)
    check_gamma(gamma)
    eps = torch.finfo(gram.dtype).eps if eps is None else eps
    return of_stack(gram, formulas(eps, written), gamma)


@torch.no_grad()
def min_norm_weights(gram: Tensor) -> Tensor:
    """Simplex weights of the shortest vector in the convex hull of the gradients.

    ``p = sum_i alpha_i g_i`` with ``alpha_i >= 0`` and ``sum_i alpha_i = 1``. It satisfies
    ``p . g_i >= ||p||^2`` for every ``i``, so ``-p`` is a descent direction common to all, and zero
    exactly at a Pareto-stationary point (Désidéri 2012; Sener & Koltun 2018, Section 3.2).

    Exact for the matrix that is given: ``p . g_i >= ||p||^2`` holds up to about ``8 m 2**-52`` of
    ``||g_i|| sum_j alpha_j ||g_j||``, however many gradients depend on each other. A matrix that
    rounding has left with a negative eigenvalue counts as one with a diagonal larger by about the
    size of it. Squares of gradients longer than 1e154 or shorter than 1e-162 leave float64. Shapes
    and errors raised are those of :func:`mmpareto_coefficients`. Where the minimiser is not unique,
    one of them; zero gradients share the weight. NaN where the Gram matrix is not finite.
    """
    weights = pareto_coefficients(gram) / gram.shape[-1]
    # A zero gradient is itself the min-norm point.
    zero = (gram.diagonal(dim1=-2, dim2=-1) <= 0).to(gram.dtype)
    count = zero.sum(-1, keepdim=True)
    weights = torch.where(count > 0, zero / count, weights)
    return weights.masked_fill(~gram.isfinite().flatten(-2).all(-1, keepdim=True), torch.nan)


def pareto_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of *conventional Pareto* (MGDA): the min-norm weights times their number.

    ``m alpha``, over the gradients that are not zero, so that equal weights are the plain sum
    (Désidéri 2012; Wei & Hu 2024, Section 3.3). Exact as :func:`min_norm_weights` is; shapes, zero
    and non-finite gradients and errors raised are those of :func:`mmpareto_coefficients`.
    """
    return of_stack(gram, PARETO)


def _weight_of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
    """Twice the min-norm weight: the projection of the origin on a segment, up to its ends."""
    # Each weight has its own numerator: 1 - alpha would lose a tiny alpha.
    weight = numbers.clamp(inverse - cosine, min=0.0)
    total = weight + numbers.clamp(ratio - cosine, min=0.0)
    return numbers.masked_fill(numbers.div(2 * weight, total), total == 0, 1.0)


def _weights_of_many(cosines: Array, lengths: Array, margin: float = 0.0) -> Array:
    """The min-norm weights times their number; each cosine is taken smaller by ``margin``.

    ``x_i ~ alpha_i ||g_i||`` minimises ``x' C x + (b . x - 1)^2`` with ``b_i ~ 1 / ||g_i||``: the
    best value along a ray grows with the norm of its point, and only angles condition it.
    """
    inverse = lengths.min() / lengths
    matrix = cosines - margin + inverse[:, None] * inverse
    weights = nonnegative_minimum(matrix, inverse) * inverse
    return np.asarray(weights * (len(weights) / weights.sum()))


PARETO = Formulas(_weight_of_two, _weights_of_many)


def formulas(eps: float, rounding: float) -> Formulas:
    """The rule for cosines that are taken smaller by ``margin = m * eps + rounding``."""
    margin = 2 * eps + rounding

    def of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
        """In closed form, with nothing in it that cancels but ``1 + cosine``.

        In units of the root of the lengths' product, ``c`` for the cosine, the pessimistic weights
        are ``a_i = (1 - margin) s_j + margin - c``, with ``s_j`` the square of the other;
        ``sum_i a_i g_i`` has the square ``(1 - c) (slack sum_i a_i + margin (1 - c) size)``, where
        ``size = s_1 + s_2 + 2``; ``slack = 1 + c - 2 margin < 0`` where none has the margin.
        """
        distance = 1 - cosine
        slack = cosine + (1 - 2 * margin)
        size = numbers.add(square, distance, alpha=2)
        weight = numbers.add(margin - cosine, inverse, alpha=1 - margin)
        total = numbers.add((1 - margin) * size, slack, alpha=-2)
        own_square = distance * numbers.addcmul(slack * total, distance, size, value=margin)
        scale = numbers.sqrt(numbers.div(square, own_square))
        scale = numbers.div(numbers.clamp(scale * total, max=LONGEST_STRETCH), total)
        found = numbers.masked_fill(scale * weight, slack < 0, 0.0)
        return numbers.masked_fill(found, cosine >= 0, 1.0)

    return Formulas(of_two, lambda c, lengths: _of_many(c, lengths, len(c) * eps + rounding))


def _of_many(cosines: Array, lengths: Array, margin: float) -> Array:
    """The min-norm direction, at least as long as the sum of the gradients."""
    if cosines.min() >= 0:
        return np.ones(len(lengths))
    units = lengths / lengths.max()
    for weights in _candidates(cosines, lengths, margin):
        shares = weights * units
        products, reach = cosines @ shares, float(shares.sum())
        along = products.tolist()
        if min(along) >= (margin - len(lengths) / 2 * EPS) * reach:
            sum_square, square = units @ cosines @ units, shares @ products
            stretch = (sum_square / square) ** 0.5 if sum_square > square else 1.0
            return np.asarray(weights * min(stretch, LONGEST_STRETCH))
        # For any x >= 0, some product of x is below the margin if all of the shares are.
        if max(along) < margin * reach:
            break
    return np.zeros(len(lengths))


def _candidates(cosines: Array, lengths: Array, margin: float) -> Iterator[Array]:
    """Weights that may have the margin; if the last ones have not, none have."""
    size = len(lengths)
    yield _weights_of_many(cosines, lengths, margin + 8 * size * EPS)  # and the solver's rounding
    # The min-norm point may be made of gradients so opposite that it drowns in their rounding, and
    # lie where others lead by themselves: x >= 0 of the least sum with C x >= 1, and its dual.
    zero, one = np.zeros((size, size)), np.ones(size)
    program = np.block([[zero, -cosines], [cosines, zero]])
    weights = nonnegative_minimum(program, np.append(-one, one))[:size] / lengths
    yield np.asarray(weights / weights.sum() * EPS)  # as long as they are stretched to be


def _unstretched_of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
    found = _weight_of_two(ratio, inverse, cosine, square, numbers)
    return numbers.masked_fill(found, cosine > 0, 1.0)


def _unstretched_of_many(cosines: Array, lengths: Array) -> Array:
    return np.ones(len(lengths)) if cosines.min() > 0 else _weights_of_many(cosines, lengths)


# Before a stretch tensor by tensor, as the authors' code: orthogonal gradients count as a conflict.
UNSTRETCHED = Formulas(_unstretched_of_two, _unstretched_of_many)
