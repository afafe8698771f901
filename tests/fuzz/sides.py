"""The two sides of a comparison: a network with its base optimizer, and the library around one."""

from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.fuzz.cases import CALLABLES, Case, Micro
from tests.fuzz.changes import MOMENTS, change
from tests.fuzz.edits import EDITS, SAME_TENSOR
from tests.fuzz.labelled import labelled
from tests.fuzz.models import Network


class Side:
    """A network of the case with its base optimizer and the parameters that it holds."""

    def __init__(self, case: Case, plain: bool = False) -> None:
        """``plain``: whether tensors are torch's own, whatever the case says."""
        self.case, self.model = case, Network(case.plan, case.seed)
        self.labelled = "" if plain else case.labelled
        chance = Random(case.seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kept = [p for p in trained if case.modalities or chance.random() < case.held]
        self.parameters = kept or trained
        listed = [*self.parameters, *(self.parameters[:1] if case.twice else [])]
        make = {"sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adam": torch.optim.Adam}
        momentum = {"momentum": 0.9} if case.base == "momentum" else {}
        self.base = make[case.base](listed, lr=0.02, **momentum)
        self.groups = [self.base.param_groups]
        self.frozen: list[Tensor] = []

    def forward(self, micro: Micro, cut: bool = False) -> tuple[dict[str, Tensor], Any]:
        """Losses, and the features of the case; ``cut`` hands the losses leaves in their place."""
        torch.manual_seed(micro.data)
        batch = self.model.batch(micro.data)
        if self.labelled == "inputs":
            batch = labelled(batch)
        z = self.model.encode(batch)
        features = {k: z[k] for k in self.case.features}
        leaves = {k: z[k].detach().requires_grad_() for k in features} if cut else features
        losses = self._named(micro, self.model.losses({**z, **leaves}, batch, micro.fates))
        if self.labelled == "losses":
            losses = labelled(losses)
        return losses, [(features[k], leaves[k]) for k in features] if cut else features

    def change(self, micro: Micro, moment: str) -> list[int]:
        """Does the change of this moment; gives the places of the parameters that are new."""
        kind = micro.changes.get(moment)
        return change(self, kind, micro.data + MOMENTS.index(moment)) if kind else []

    @staticmethod
    def _named(micro: Micro, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        names = list(losses)
        if micro.shuffled:
            Random(micro.data).shuffle(names)
        return {micro.renamed.get(name, name): losses[name] for name in names}

    def edit(self, micro: Micro) -> list[Tensor]:
        """Does the edit before a micro-batch; gives the parameters where nobody can tell."""
        assert micro.edit is not None
        chance = Random(micro.data)
        touched = [p for p in self.parameters if chance.random() < micro.edited]
        before = {p: None if p.grad is None else p.grad.clone() for p in touched}
        EDITS[micro.edit](touched)
        if micro.edit not in SAME_TENSOR:
            return []
        return [p for p, grad in before.items() if _equal(p.grad, grad)]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def autocast(case: Case) -> AbstractContextManager[Any]:
    """The region around the backward of a case, if it has one."""
    return nullcontext() if case.autocast is None else torch.autocast("cpu", case.autocast)


class Library:
    """The library around a side; one object for the optimizer and for the integrator."""

    def __init__(self, side: Side) -> None:
        case = side.case
        self.side, self.case = side, case
        self.groups = {k: side.model.encoders[k] for k in case.modalities} or None
        options: dict[str, Any] = {"integration": CALLABLES.get(case.rule, case.rule)}
        options["gamma"] = case.settings.gamma
        options["check"] = case.check
        options["rescale"] = "tensor" if case.tensorwise else "encoder"
        if self.groups and not case.at_each_call:
            options["param_groups_by_modality"] = self.groups
        self.alone = case.without_optimizer
        self.engine: Any = (
            GradientIntegrator(side.parameters, **options)
            if self.alone
            else MMParetoOptimizer(side.base, **options)
        )
        if self.alone:
            side.groups.append(self.engine.param_groups)

    def backward(self, micro: Micro) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; gives the losses."""
        losses, how = self._losses(micro)
        with autocast(self.case):
            self.engine.backward(losses, **how)
        return losses

    def step_on(self, micro: Micro) -> None:
        """``step(losses=...)`` on a micro-batch."""
        losses, how = self._losses(micro)
        with autocast(self.case):
            self.engine.step(losses=losses, **how)

    def step(self) -> None:
        """A step on what the backward passes left."""
        (self.side.base if self.alone else self.engine).step()

    def zero_grad(self, how: str) -> None:
        """Clears the gradients in the way of the case."""
        if self.alone or how == "none":
            self.engine.zero_grad()
        elif how == "to zero":
            self.engine.zero_grad(set_to_none=False)

    def _losses(self, micro: Micro) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.side.change(micro, "before")
        losses, features = self.side.forward(micro)
        self.side.change(micro, "in flight")
        how: dict[str, Any] = {"features": features} if features else {}
        if self.groups and self.case.at_each_call:
            how["param_groups_by_modality"] = self.groups
        return losses, how
