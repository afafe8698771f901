"""MMPareto: the direction of the min-norm point, the length of the sum."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, check_gamma, check_gram, evaluate
from mmpareto_optim.rules.pareto import weight_of_two, weights_of_many
from mmpareto_optim.rules.solver import EPS, nonnegative_minimum

LONGEST_STRETCH = 2.0**120
"""Coefficients stay finite in float32, where the gradients' lengths differ by more than that."""


def mmpareto_coefficients(
    gram: Tensor, gamma: float = 1.5, *, eps: float | None = None, written: float = 0.0
) -> Tensor:
    """Coefficients of MMPareto (Wei & Hu 2024, arXiv 2405.17730, Algorithm 1).

    Without conflict (no negative inner product) the sum of the gradients. In conflict
    the min-norm direction, which is common to all objectives, stretched to at least the
    length of that sum. Both times ``gamma``.

    Three things that the paper leaves open:

    * A zero gradient has no direction to respect: the result is as if its loss were absent. A
      gradient that is alone is taken as it is, without ``gamma``.
    * Close to a Pareto-stationary point the min-norm point is the small difference of
      large vectors, and the stretch would blow its rounding error up to full size. The
      weights are therefore found for cosines smaller by ``m * eps + written``, which keeps
      ``h . g_i >= 0`` true of the rounded ``h``, in conflict. Where no direction satisfies that
      (two gradients within ``2 sqrt(m * eps + written)`` radians of opposite: 0.001 in float32,
      0.13 written in bfloat16), none can be told from noise and the coefficients are zero, as for
      exactly opposite gradients.
    * Without conflict the result is the plain sum, whatever becomes of it in rounding. The product
      with a gradient that is ``1 / written`` times shorter than the others (256 times in bfloat16,
      2**24 times in float32) can come out negative.

    The stretch ends at ``2**120``, so that the coefficients are finite in float32 too. The
    direction is exact for the matrix that is given, as :func:`min_norm_weights` is, and has its
    limits: of gradients longer than 1e154 a float64 Gram matrix is not finite.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, symmetric up to rounding.
        gamma: factor on the result, positive; the authors' code uses 1.5.
        eps: machine epsilon of the arithmetic that will combine the gradients; that of
            ``gram.dtype`` if None.
        written: unit roundoff (half the machine epsilon) of the dtype to which the combination is
            rounded once more, 0 where it is not.

    Returns:
        Coefficients ``c`` of ``h = sum_i c_i g_i``, shape ``(..., m)``, on the Gram
        matrix's device and in its dtype: 1 where at most one gradient is not zero, NaN where the
        Gram matrix is not finite. A zero gradient's own coefficient is the mean of the others'.

    Raises:
        ValueError: ``gamma`` is not positive and finite, or ``gram`` is not a stack of
            square matrices.
        TypeError: ``gram`` is not a real floating-point tensor.
    """
    check_gram(gram)
    check_gamma(gamma)
    eps = torch.finfo(gram.dtype).eps if eps is None else eps
    return evaluate(mmpareto_formulas(eps, written), gram, gamma)


def mmpareto_formulas(eps: float, rounding: float) -> Formulas:
    """The rule for cosines that are taken smaller by ``m * eps + rounding``."""

    def of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any) -> Any:
        return _of_two(ratio, inverse, cosine, numbers, 2 * eps + rounding)

    def of_many(cosines: Array, lengths: Array) -> Array:
        return _of_many(cosines, lengths, len(lengths) * eps + rounding)

    return Formulas(of_two, of_many)


def _of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any, margin: float) -> Any:
    """In closed form, with nothing in it that cancels but ``1 + cosine``.

    With lengths in units of the root of their product, the squares are ``ratio`` and ``inverse``
    and the inner product is ``c``, the cosine. The pessimistic weights are ``a_i = (1 - margin)
    s_j + margin - c``, with the square ``s_j`` of the other; ``h = sum_i a_i g_i`` has a square of
    ``(1 - c) (room sum_i a_i + margin (1 - c) (s_1 + s_2 + 2))``, where
    ``room = 1 + c - 2 margin`` is negative where no direction has that margin.
    """
    squares = ratio + inverse
    shift, distance = margin - cosine, 1 - cosine
    weight = numbers.add(shift, inverse, alpha=1 - margin)
    total = numbers.add((1 - margin) * squares, shift, alpha=2)
    room = cosine + (1 - 2 * margin)
    square = distance * numbers.addcmul(room * total, distance, squares + 2, value=margin)
    sum_square = numbers.add(squares, cosine, alpha=2)
    scale = numbers.sqrt(numbers.div(sum_square, square))
    scale = numbers.div(numbers.clamp(scale * total, max=LONGEST_STRETCH), total)
    found = numbers.masked_fill(scale * weight, room < 0, 0.0)
    return numbers.masked_fill(found, cosine >= 0, 1.0)


def _of_many(cosines: Array, lengths: Array, margin: float) -> Array:
    """The min-norm direction, at least as long as the sum of the gradients."""
    if cosines.min() >= 0:
        return np.ones(len(lengths))
    units = lengths / lengths.max()
    for weights in _candidates(cosines, lengths, margin):
        shares = weights * units
        products, least = cosines @ shares, margin * shares.sum()
        if (products >= least - len(lengths) / 2 * EPS * shares.sum()).all():
            break
        # For any x >= 0, some product of x is below the margin if all of the shares are.
        if products.max() < least:
            return np.zeros(len(lengths))
    else:
        return np.zeros(len(lengths))
    sum_square, square = units @ cosines @ units, shares @ products
    stretch = np.sqrt(sum_square / square) if sum_square > square else 1.0
    return np.asarray(weights * min(stretch, LONGEST_STRETCH))


def _candidates(cosines: Array, lengths: Array, margin: float) -> Iterator[Array]:
    """Weights that may have the margin; if the last ones have not, none have."""
    # Beside the margin, room for the solver's own rounding.
    yield weights_of_many(cosines, lengths, margin + 8 * len(lengths) * EPS)
    # The min-norm point may be made of gradients so opposite that it drowns in their rounding, and
    # lie where others lead by themselves: x >= 0 of the least sum with C x >= 1, and its dual.
    size = len(lengths)
    zero, one = np.zeros((size, size)), np.ones(size)
    program = np.block([[zero, -cosines], [cosines, zero]])
    weights = nonnegative_minimum(program, np.append(-one, one))[:size] / lengths
    # It is as long as it is stretched to be.
    yield np.asarray(weights / weights.sum() * EPS)


def _unstretched_of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any) -> Any:
    weight = weight_of_two(ratio, inverse, cosine, numbers)
    return numbers.masked_fill(weight, cosine > 0, 1.0)


def _unstretched_of_many(cosines: Array, lengths: Array) -> Array:
    return np.ones(len(lengths)) if cosines.min() > 0 else weights_of_many(cosines, lengths)


UNSTRETCHED = Formulas(_unstretched_of_two, _unstretched_of_many)
"""MMPareto before a stretch that is made tensor by tensor (``rescale="tensor"``).

The authors' code keeps uniform weights where cos > 0 and takes the min-norm weights otherwise,
orthogonal gradients included; :func:`mmpareto_coefficients` follows the paper and keeps the sum for
orthogonal gradients.
"""
