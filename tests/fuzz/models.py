"""A random network of one to three encoders and heads, its batches and its losses, from a seed."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tests.fuzz.deliveries import DELIVERIES
from tests.fuzz.encoders import DEEP, FEATURES, KINDS, inputs
from tests.fuzz.functions import Form, Total, applied
from tests.fuzz.regions import Regions

Tensors = Mapping[str, Tensor]
MODALITIES = ("audio", "visual", "text")
CLASSES, COLUMNS, FORMS = 3, 2, 3


@dataclass
class Plan:
    """What is drawn of a network; small enough to be printed with a failure.

    ``region`` is the kind of what does not bear several passes, ``place`` where it is.
    """

    kinds: dict[str, str]
    manners: dict[str, str]
    hooks: list[str]
    terms: list[str]
    delivery: str
    dtypes: dict[str, torch.dtype]
    trunk: bool
    batch: int
    weights: list[float] = field(default_factory=list)
    region: str = ""
    place: str = ""


def draw_plan(chance: Random, dtype: str) -> Plan:
    """Draws a network; ``dtype`` is "float32", "float64", "bfloat16" or "mixed"."""
    names = MODALITIES[: chance.choice([1, 2, 2, 2, 3])]
    terms = ["joint", *(f"own {k}" for k in names), *(f"penalty {k}" for k in names)]
    terms += ["columns", "chunked", "form", "smoothing"]
    chosen = chance.sample(terms, chance.randint(1, min(4, len(terms))))
    every = {"mixed": [torch.float32, torch.bfloat16]}.get(dtype) or [getattr(torch, dtype)]
    dtypes = {k: chance.choice(every) for k in names}
    possible = ["parameter", "activation", "feature", "forward", "backward", "retain_grad"]
    return Plan(
        kinds={k: chance.choice([kind for kind in KINDS if kind != DEEP]) for k in names},
        manners={k: chance.choice(["plain", "plain", "checkpoint", "functional"]) for k in names},
        hooks=[hook for hook in possible if chance.random() < 0.2],
        terms=chosen,
        delivery=chance.choice(["apart", "apart", *DELIVERIES]),
        dtypes={**dtypes, "heads": torch.float32 if dtype == "mixed" else every[0]},
        trunk=chance.random() < 0.2,
        batch=chance.choice([4, 6]),
        weights=[chance.choice([1.0, 1.0, 0.3, 4.0]) for _ in range(8)],
    )


def reached(losses: Iterable[str], k: str) -> bool:
    """Whether one of these losses is a function of the features of modality ``k``."""
    return any(
        name.startswith(("joint", "columns", "chunked", "smoothing")) or name.endswith(f" {k}")
        for name in losses
    )


class Network(nn.Module):
    """Encoders, heads and losses of a plan; two of the same plan and seed are equal."""

    def __init__(self, plan: Plan, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        chance = Random(seed)
        self.plan, self.calls, self.kept = plan, Counter[str](), dict[str, Tensor]()
        self.regions = Regions(plan.region, plan.place)
        self.encoders = nn.ModuleDict()
        for k, kind in plan.kinds.items():
            self.encoders[k] = KINDS[kind][1](chance).to(plan.dtypes[k])
        heads = plan.dtypes["heads"]
        self.trunk = nn.Linear(FEATURES, FEATURES).to(heads) if plan.trunk else None
        self.joint = nn.Linear(FEATURES * len(plan.kinds), CLASSES + COLUMNS).to(heads)
        self.shared = nn.Linear(FEATURES, CLASSES).to(heads)
        self.own = nn.ModuleDict({k: nn.Linear(FEATURES, CLASSES).to(heads) for k in plan.kinds})
        self.form = nn.Parameter(torch.randn(FEATURES).to(heads))
        # A custom function returns these as its gradient; the memory is numpy's where it can be.
        memory = np.random.RandomState(seed % 2**32).randn(2, FEATURES)
        single = memory if heads == torch.float64 else memory.astype(np.float32)
        self.constants = [torch.from_numpy(part).to(heads) for part in single]
        self._hook_modules()

    def encode(self, batch: Tensors) -> dict[str, Tensor]:
        """The features of each modality, shape (batch, FEATURES)."""
        self.regions.begin()
        return {k: self._feature(k, batch[k]) for k in self.plan.kinds}

    def losses(self, z: Tensors, batch: Tensors, fates: Mapping[str, str]) -> dict[str, Tensor]:
        """Losses by name; a fate is "left out", "zero", "saturated", "nan" or "inf"."""
        heads = self.plan.dtypes["heads"]
        z = {k: value.to(heads) for k, value in z.items()}
        terms: dict[str, Tensor] = {}
        for term in self.plan.terms:
            kind, _, modality = term.partition(" ")
            terms |= getattr(self, f"_{kind}")(z, batch, modality)
        named = dict(list(terms.items())[:6])
        exact = torch.promote_types(heads, torch.float32)
        weighed = [
            self.regions.through(f"loss {name}", _fated(w * loss.to(exact), fates.get(name, "")))
            for (name, loss), w in zip(named.items(), self.plan.weights, strict=False)
        ]
        delivered = dict(zip(named, DELIVERIES[self.plan.delivery](weighed, self), strict=True))
        return {k: v for k, v in delivered.items() if fates.get(k) != "left out"}

    @staticmethod
    def names_of(plan: Plan) -> list[str]:
        """The names that ``losses`` gives."""
        names = []
        for term in plan.terms:
            each = {"columns": range(COLUMNS), "form": range(FORMS), "chunked": plan.kinds}
            names += [f"{term} {i}" for i in each[term]] if term in each else [term]
        return names[:6]

    def batch(self, seed: int) -> dict[str, Tensor]:
        """Inputs and targets in memory of their own."""
        draw = torch.Generator().manual_seed(seed)
        batch = {k: inputs(kind, self.plan.batch, draw) for k, kind in self.plan.kinds.items()}
        for k, dtype in self.plan.dtypes.items():
            if k in batch and batch[k].is_floating_point():
                batch[k] = batch[k].to(dtype)
        for name in ["y", *(f"y {k}" for k in self.plan.kinds)]:
            batch[name] = torch.randint(0, CLASSES, (self.plan.batch,), generator=draw)
        heads = self.plan.dtypes["heads"]
        batch["columns"] = torch.randn(self.plan.batch, COLUMNS, generator=draw).to(heads)
        return batch

    def _feature(self, k: str, x: Tensor) -> Tensor:
        encoder, manner = self.encoders[k], self.plan.manners[k]
        if manner == "checkpoint":
            z = checkpoint(encoder, x, use_reentrant=False)
        elif manner == "functional" and self.plan.kinds[k] != "recurrent":
            scaled = {name: p * 1.25 for name, p in encoder.named_parameters()}
            z = torch.func.functional_call(encoder, scaled, (x,))
        else:
            z = encoder(x)
        z = self.regions.through(f"encoder {k}", z)
        if self.trunk is not None:
            z = self.trunk(z.to(self.plan.dtypes["heads"]))
        if z.requires_grad:
            self._hook_feature(k, z)
        return torch.as_tensor(z)

    def _hook_feature(self, k: str, z: Tensor) -> None:
        if "feature" in self.plan.hooks:
            z.register_hook(self._counted(f"feature {k}", lambda g: g * 1.5))
        if "retain_grad" in self.plan.hooks:
            z.retain_grad()
            self.kept[k] = z

    def _hook_modules(self) -> None:
        for k, encoder in self.encoders.items():
            self.regions.hook_parameters(k, encoder)
            if "parameter" in self.plan.hooks:
                for name, p in encoder.named_parameters():
                    if p.requires_grad:
                        p.register_hook(self._counted(f"{k} {name}", lambda g: g.clamp(-0.5, 0.5)))
            if "forward" in self.plan.hooks:
                encoder.register_forward_hook(lambda m, i, out: out * 0.8)
            if "backward" in self.plan.hooks and any(p.requires_grad for p in encoder.parameters()):
                note = self._counted(f"module {k}", lambda g: g)
                encoder.register_full_backward_hook(_noting(note))
        if "backward" in self.plan.hooks:
            double = self._counted("module joint", _doubled)
            self.joint.register_full_backward_hook(lambda m, gs, out: double(gs))

    def _counted(self, name: str, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counting(grad: Any) -> Any:
            # Values hardly tell whether what is behind features ran in an autocast region.
            self.calls[f"{name}, autocast" if torch.is_autocast_enabled("cpu") else name] += 1
            return hook(grad)

        return counting

    def _joined(self, z: Tensors) -> Tensor:
        out = self.regions.through("joint", self.joint(torch.cat(list(z.values()), 1)))
        if "activation" in self.plan.hooks and out.requires_grad:
            out.register_hook(self._counted("activation", lambda g: g * 0.7))
        return torch.as_tensor(out).float() if out.dtype == torch.bfloat16 else out

    def _joint(self, z: Tensors, batch: Tensors, _: str) -> dict[str, Tensor]:
        return {"joint": cross_entropy(self._joined(z)[:, :CLASSES], batch["y"])}

    def _own(self, z: Tensors, batch: Tensors, k: str) -> dict[str, Tensor]:
        logits = self.own[k](self.regions.through(f"own {k}", z[k]))
        return {f"own {k}": cross_entropy(logits, batch[f"y {k}"]).float()}

    def _penalty(self, z: Tensors, batch: Tensors, k: str) -> dict[str, Tensor]:
        return {f"penalty {k}": applied(Total, z[k] * z[k]) / len(z[k])}

    def _columns(self, z: Tensors, batch: Tensors, _: str) -> dict[str, Tensor]:
        each = (self._joined(z)[:, CLASSES:] - batch["columns"]).square().mean(0)
        return {f"columns {i}": each[i] for i in range(COLUMNS)}

    def _chunked(self, z: Tensors, batch: Tensors, _: str) -> dict[str, Tensor]:
        parts = self.shared(torch.cat(list(z.values()))).chunk(len(z))
        return {
            f"chunked {k}": cross_entropy(p, batch[f"y {k}"]) for k, p in zip(z, parts, strict=True)
        }

    def _form(self, z: Tensors, batch: Tensors, _: str) -> dict[str, Tensor]:
        forms = {f"form {i}": applied(Form, self.form, c) for i, c in enumerate(self.constants)}
        return {**forms, "form 2": applied(Total, self.form)}

    def _smoothing(self, z: Tensors, batch: Tensors, _: str) -> dict[str, Tensor]:
        return {"smoothing": self._joined(z).logsumexp(1).mean() * 0.5 - z[next(iter(z))].mean()}


def _doubled(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """None is of an input that needs no gradient, as behind frozen encoders."""
    return tuple(None if grad is None else grad * 2 for grad in grads)


def _noting(note: Callable[[Any], Any]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        note(None)

    return hook


def _fated(loss: Tensor, fate: str) -> Tensor:
    if fate == "zero":
        return loss * 0
    if fate == "saturated":
        return loss.clamp(max=loss.item() - 1.0)
    if fate == "nan":
        return loss * torch.nan
    return loss * torch.inf if fate == "inf" else loss
