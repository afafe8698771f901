"""The sum of the gradients, which every other rule is compared with."""

import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import check_gram


def uniform_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the plain sum of the gradients (the *uniform baseline*): ones.

    Args:
        gram: Gram matrices, shape ``(..., m, m)``.

    Returns:
        Ones of shape ``(..., m)`` on the Gram matrix's device and in its dtype.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    check_gram(gram)
    return torch.ones_like(gram[..., 0])
