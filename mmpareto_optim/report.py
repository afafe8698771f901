"""What the user is told of blocks and parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmpareto_optim.blocks import Block
from mmpareto_optim.method import Method
from mmpareto_optim.modalities import Modalities
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.told import warn

SHOWN = 4
"""Parameters of a block that are listed by name in a table."""

LARGE = 1e4
"""A coefficient beyond which a loss is told of, if its gradient is ``SMALL`` of the longest."""

SMALL = 1e-3


@dataclass(frozen=True)
class BlockInfo:
    """One block of the last backward.

    Attributes:
        name: as in ``stats``: the modality or feature, or the objectives joined by ``+``. What
            no loss reaches is told last, as ``(no loss)`` and ``(frozen)``.
        objectives: names of the losses that reach it.
        parameters: their names, or their places in ``param_groups`` and shapes.
        numbers: how many numbers they have together.
        integrated: whether a rule decided the coefficients; otherwise gradients were added.
    """

    name: str
    objectives: tuple[str, ...]
    parameters: tuple[str, ...]
    numbers: int
    integrated: bool


class Blocks(tuple[BlockInfo, ...]):
    """The blocks of the last backward; printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no backward yet"
        head = ("block", "losses", "numbers", "", "parameters")
        lines = [head, *(_line(block) for block in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join([*map(str.ljust, line[:4], widths), line[4]]).rstrip() for line in lines
        )


@dataclass
class AtFeatures:
    """What was integrated at features, by the feature's name.

    Attributes:
        stats: of each feature that two or more losses reach.
        objectives: names of the losses that reach it.
        behind: the leaves that it is computed from.
    """

    stats: dict[str, BlockStats] = field(default_factory=dict)
    objectives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    behind: Mapping[str, set[Tensor]] = field(default_factory=dict)


def block_table(
    params: Sequence[Tensor],
    blocks: Sequence[Block],
    at_features: AtFeatures,
    groups: Sequence[Mapping[str, Any]],
) -> Blocks:
    """The blocks of a backward.

    Args:
        params: its parameters.
        blocks: those at parameters.
        at_features: what was integrated at features.
        groups: dicts as ``torch.optim`` has them, which hold the parameters.
    """
    found = []
    for name, leaves in at_features.behind.items():
        members = [param for param in params if param in leaves]
        objectives = at_features.objectives[name]
        found.append(_info(name, objectives, members, groups, integrated=len(objectives) > 1))
    for block in blocks:
        members = [params[position] for position in block.positions]
        found.append(
            _info(block.name, block.objectives, members, groups, integrated=block.integrated)
        )
    held = dict.fromkeys(param for group in groups for param in group["params"])
    known = {params[position] for block in blocks for position in block.positions}
    known.update(*at_features.behind.values())
    rest = [param for param in held if param not in known]
    for name, of in (("(no loss)", True), ("(frozen)", False)):
        members = [param for param in rest if param.requires_grad is of]
        if found and members:
            found.append(_info(name, (), members, groups, integrated=False))
    return Blocks(found)


def warn_of_unheld(leaves: Sequence[Tensor], reaching: Callable[[Tensor], Sequence[str]]) -> None:
    """One warning of parameters among the leaves that the losses reach and nobody holds.

    Args:
        leaves: what is behind the losses and not held.
        reaching: names of the losses that one of them is behind.
    """
    unheld = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    if not unheld:
        return
    unheld.sort(key=lambda param: (-param.numel(), tuple(param.shape)))
    shapes = ", ".join(str(tuple(param.shape)) for param in unheld[:3])
    more = f" and {len(unheld) - 3} more" if len(unheld) > 3 else ""
    names = ", ".join(map(repr, reaching(unheld[0])))
    warn(
        f"the losses reach trainable parameters that no optimizer here holds, of shape {shapes}"
        f"{more} (the first by loss {names}): they get no gradient. Give all optimizers, as in "
        "MMParetoOptimizer([muon, adamw]), use GradientIntegrator(model.parameters()), or freeze "
        "them with requires_grad_(False)"
    )


def warn_of_nothing_to_integrate(losses: int) -> None:
    """One hint to who wrapped an optimizer and trains on as before.

    Args:
        losses: how many there were at most, 0 or 1.
    """
    if losses:
        warn(
            "this MMParetoOptimizer has stepped 10 times and was only ever given one loss, so "
            'there is nothing to integrate: if the loss is a sum, give its terms, as in {"mm": '
            'loss, "audio": audio_loss}'
        )
        return
    warn(
        "this MMParetoOptimizer has stepped 10 times and was never given losses, so it "
        "does what its base does: call step(losses={...}), or backward({...}) and step()"
    )


def warn_of_line_search(base: str) -> None:
    """A warning of a base that takes what is integrated for the gradient of the sum of losses."""
    warn(
        f"{base} takes .grad for the gradient of the summed losses that the closure gives, and an "
        "integrated gradient is the gradient of no function: its curvature and its line search "
        'are wrong then, and it stalls or diverges. Use integration="uniform" with it, or another '
        "base"
    )


def warn_of_small_gradient(stats: Mapping[str, BlockStats]) -> bool:
    """A warning of a loss that a rule multiplies by more than ``LARGE``, and whether there is one.

    Nearly opposite gradients of like lengths are multiplied as much, and not meant. Only on the
    CPU: elsewhere a look at the coefficients would wait for the device.
    """
    for block, of_block in stats.items():
        factors = of_block.coefficients
        if type(factors) is not Tensor or factors.device.type != "cpu":
            continue
        if of_block.stretch is not None:
            factors = factors * of_block.stretch.max()
        numbers = factors.tolist()
        largest = max(numbers)
        if largest > LARGE:
            place = numbers.index(largest)
            norms = of_block.norms.tolist()
            if norms[place] > SMALL * max(norms):
                continue
            loss = of_block.objectives[place]
            warn(
                f"block {block!r}: the gradient of loss {loss!r} is so small that it is "
                f"multiplied by {largest:.1e}, as a common direction has to lower that loss too. "
                "A term that is no task (an entropy bonus, a penalty) is better added to another "
                'loss, as in {"policy": policy_loss - 0.01 * entropy}; a task that is nearly '
                "solved needs no more say, and a larger weight gives it less"
            )
            return True
    return False


def settings_of(method: Method, modalities: Modalities | None) -> str:
    """What was chosen, for a printed optimizer."""
    integration = getattr(method.integration, "__name__", method.integration)
    settings = f"integration={integration!r}"
    if not callable(method.integration):
        settings += f", gamma={method.factor}"
    if method.integration == "mmpareto":
        settings += f", rescale={method.rescale!r}"
    blocks = "found by reach" if modalities is None else ", ".join(modalities)
    return f"{settings}\n    blocks: {blocks}"


def describe(wanted: Tensor, groups: Sequence[Mapping[str, Any]]) -> str:
    """A parameter's name for error messages, or where it stands."""
    number, index, group = next(
        (number, index, group)
        for number, group in enumerate(groups)
        for index, param in enumerate(group["params"])
        if param is wanted
    )
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"param_groups[{number}]['params'][{index}] of shape {tuple(wanted.shape)}"


def _info(
    name: str,
    objectives: tuple[str, ...],
    members: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    *,
    integrated: bool,
) -> BlockInfo:
    short = [describe(param, groups).removeprefix("parameter ").strip("'") for param in members]
    numbers = sum(param.numel() for param in members)
    return BlockInfo(name, objectives, tuple(short), numbers, integrated)


def _line(block: BlockInfo) -> tuple[str, ...]:
    listed = ", ".join(block.parameters[:SHOWN])
    more = len(block.parameters) - SHOWN
    return (
        block.name,
        ", ".join(map(str, block.objectives)),
        f"{block.numbers:,}",
        "integrated" if block.integrated else "added" if block.objectives else "",
        f"{listed} and {more} more" if more > 0 else listed,
    )
