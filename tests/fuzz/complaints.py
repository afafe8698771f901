"""What the library warns of in its first step: of what cannot be right, and of nothing else."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from tests.fuzz import reference
from tests.fuzz.cases import Case, Micro
from tests.fuzz.compare import DeviationError
from tests.fuzz.sides import Side, autocast

SIGN = "do not add up"
# How far sums may be apart that need not be warned of, by whether something is in half precision:
# over the losses' gradients for one parameter, and over those for all. The check leaves a third
# of it, or less, to rounding.
UNCLEAR = {False: (0.06, 0.005), True: (0.3, 0.1)}
OF_FLAT = 0.15  # in place of the latter, for parameters of one dimension


class Complaints:
    """The warnings of a case, looked through after each micro-batch."""

    def __init__(self, case: Case, caught: Sequence[warnings.WarningMessage]) -> None:
        self._case, self._caught = case, caught
        self._read = 0
        self._is_first = True
        # A hook that clips is not linear: its sums may differ, and nothing else is wrong. They
        # are looked at again where not all was finite.
        self._clips = case.check and "parameter" in case.plan.hooks
        self._misbehaves = case.check and bool(case.plan.region)

    def look(self, micro: Micro, passed_often: bool) -> None:
        """After a micro-batch that both libraries have seen.

        Raises:
            DeviationError: One warned without a reason, or did not although there was one.
        """
        new, self._read = self._caught[self._read :], len(self._caught)
        found = [each for each in new if SIGN in str(each.message)]
        if found and not (self._clips or self._misbehaves):
            raise DeviationError(f"a warning without a reason: {found[0].message}")
        if any(not issubclass(each.category, UserWarning) for each in found):
            raise DeviationError("a warning of another category")
        is_to_warn = self._is_first and self._case.check and passed_often
        if is_to_warn and len(found) < 2 and sums_differ(self._case, micro):
            raise DeviationError(f"{2 - len(found)} of 2 did not warn of gradients that are wrong")
        self._is_first = False


def sums_differ(case: Case, micro: Micro) -> bool:
    """Whether a pass for each loss and one for all clearly differ, in the first step of a case."""
    side = Side(case, plain=True)
    losses, features = side.forward(micro, cut=bool(case.features))
    targets = [*side.parameters, *(leaf for _, leaf in features)]
    with autocast(case):
        # The library begins with the loss that was given last.
        each = reference.gradients(dict(reversed(losses.items())), targets)
        whole = reference.of_sum(losses, targets)
    apart, sizes, flat = [], [], []
    for index in whole:
        own = [gradient for (_, at), gradient in each.items() if at == index]
        if len(own) > 1:
            apart.append(float(np.linalg.norm(sum(own) - whole[index])))
            sizes.append(math.fsum(float(np.linalg.norm(gradient)) for gradient in own))
            flat.append(targets[index].ndim < 2)
    is_half = case.autocast is not None or torch.bfloat16 in case.plan.dtypes.values()
    of_one, of_all = UNCLEAR[is_half]
    least = {is_flat: max(of_all, OF_FLAT * is_flat) * math.hypot(*sizes) for is_flat in (0, 1)}
    pairs = zip(apart, sizes, flat, strict=True)
    return any(far > max(of_one * size, least[is_flat]) for far, size, is_flat in pairs)
