"""ConFIG: the direction with equal cosines to all gradients."""

import torch
from torch import Tensor

from mmpareto_optim.rules.gram import of_present, rounding_of
from mmpareto_optim.rules.solver import unit_products


def config_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of ConFIG (Liu, Chu & Thuerey 2025, arXiv 2408.11104, Equation 2).

    With the unit gradients ``u_i`` as the rows of ``U``, and ``1`` for the vector of ones::

        v = pinv(U) 1,    h = (sum_i g_i . v) v / ||v||^2

    Linearly independent gradients all have the same, positive cosine with ``h``, and ``||h||`` is
    the sum of their projections on it. Of dependent ones ``v`` is the shortest vector of those
    whose products with the unit gradients are nearest to 1, and the cosines may differ in size and
    sign. Where unit gradients cancel, as exactly opposite ones do, the result is zero.

    The pseudo-inverse is found from the cosines ``C = U U'``, whose eigenvalues are the squares of
    the singular values of ``U``. Those below ``m sqrt(eps)`` fade out, for ``eps`` the machine
    epsilon of ``gram.dtype``: two gradients less than about ``2 eps^(1/4)`` radians apart (2e-4 in
    float64, 0.04 in float32) begin to count as one.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, symmetric up to rounding.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype: 1 where at
        most one gradient is not zero, NaN where the Gram matrix is not finite. A zero gradient's
        own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """

    def rule(products: Tensor, present: Tensor) -> Tensor:
        cosines, lengths = unit_products(products, present)
        target = present.to(products.dtype)
        weights = _least_squares(cosines, target, rounding_of(gram))
        along = (cosines @ weights.unsqueeze(-1)).squeeze(-1)
        square = (weights * along).sum(-1, keepdim=True)
        length = torch.where(present, lengths * along, 0).sum(-1, keepdim=True)
        # Of unit gradients that cancel, v is rounding error.
        noise = target.sum(-1, keepdim=True).square() * rounding_of(gram)
        found = along.square().sum(-1, keepdim=True) > noise
        return torch.where(found, length / square, 0) * weights / lengths

    return of_present(rule, gram, 1.0)


def _least_squares(matrix: Tensor, target: Tensor, rounding: float) -> Tensor:
    """``w`` for which ``||A w - t||`` is least, and ``w' A w`` with it.

    By iterated Tikhonov regularisation, ``(A^2 + mu) (w' - w) = A (t - A w)``: an eigenvalue
    decomposition would wait for the device. Three times leave of an eigenvalue's share an error of
    ``(mu / lambda^2)^3``.

    Args:
        matrix: A, symmetric and positive semidefinite, with a diagonal of 1, shape ``(..., m, m)``.
        target: t, shape ``(..., m)``.
        rounding: relative error of the entries of ``matrix``.
    """
    size = target.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    regular = matrix @ matrix + size**2 * rounding * identity
    found, target = torch.zeros_like(target).unsqueeze(-1), target.unsqueeze(-1)
    for _ in range(3):
        # Solved each time: in an inverse, the part of dependent gradients drowns all others.
        found = found + torch.linalg.solve_ex(regular, matrix @ (target - matrix @ found))[0]
    return found.squeeze(-1)
