"""What the user is told: warnings that point at his line, and the table of blocks."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from weakref import ref

from torch import OutOfMemoryError, Tensor, nn
from torch.nn.parameter import is_lazy

from mmpareto_optim.blocks import Block
from mmpareto_optim.param_groups import describe

PACKAGE = str(Path(__file__).parent)

NAMES_SHOWN = 4
"""Parameters or losses of a block that are listed by name in a table."""


def warn(message: str) -> None:
    """A ``UserWarning`` at the first line on the way here that is not this package's or torch's."""
    level, frame = 1, sys._getframe(0)
    while _is_inside(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_filename.startswith(PACKAGE) or name.split(".")[0] == "torch"


@dataclass(frozen=True)
class BlockInfo:
    """One block of the last backward.

    Attributes:
        name: as in ``stats``: the modality or feature, or the objectives joined by ``+``. What
            no loss reaches is listed last, as ``(no loss)`` and ``(frozen)``.
        objectives: names of the losses that reach it.
        parameters: their names, or their places in ``param_groups`` and shapes.
        numbers: how many numbers they have together.
        integrated: whether a rule decided the coefficients; otherwise gradients were added.
        joined: names of the blocks that are a part of this one, as they are too small for a
            direction of their own.
        references: to the parameters, which they do not keep alive; copies and pickles have none.
    """

    name: str
    objectives: tuple[str, ...]
    parameters: tuple[str, ...]
    numbers: int
    integrated: bool
    joined: tuple[str, ...] = ()
    references: tuple["ref[Tensor]", ...] = field(default=(), repr=False, compare=False)

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        how = "integrated" if self.integrated else "added" if self.objectives else ""
        if len(self.joined) == 1:
            how += f", with {first_of(self.joined[0].split('+'), '+')}"
        elif self.joined:
            how += f", with {len(self.joined)} small blocks"
        return (
            first_of(self.name.split("+"), "+"),
            first_of(self.objectives),
            f"{self.numbers:,}",
            how,
            first_of(self.parameters),
        )

    def renamed(self, names: Mapping[Tensor | None, str]) -> "BlockInfo":
        """The same block by other names of its parameters, as far as there are any."""
        pairs = zip(self.references, self.parameters, strict=False)
        parameters = tuple(names.get(reference(), name) for reference, name in pairs)
        return replace(self, parameters=parameters or self.parameters)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "references": ()}


def first_of(names: Sequence[object], separator: str = ", ", shown: int = NAMES_SHOWN) -> str:
    """The first names, and how many more there are: many losses make long lists."""
    listed = separator.join(map(str, names[:shown]))
    more = len(names) - shown
    return f"{listed} and {more} more" if more > 0 else listed


class Blocks(tuple[BlockInfo, ...]):
    """The blocks of the last backward; printed as a table."""

    __slots__ = ()

    def named(self, model: nn.Module) -> "Blocks":
        """The same blocks by the names of ``model.named_parameters()``.

        For an optimizer that was given ``model.parameters()`` and knows no names. Parameters that
        are not the model's keep the name that they have here.

        Raises:
            ValueError: no parameter of the blocks is the model's.
        """
        names: dict[Tensor | None, str] = {p: name for name, p in model.named_parameters()}
        if self and not any(
            reference() in names for block in self for reference in block.references
        ):
            raise ValueError(
                "no parameter of these blocks is one of the model's: give the model whose "
                "parameters the optimizer holds, and the blocks themselves, not a copy"
            )
        return Blocks(block.renamed(names) for block in self)

    def __str__(self) -> str:
        if not self:
            return "no backward yet"
        head = ("block", "losses", "numbers", "", "parameters")
        lines = [head, *(block.cells() for block in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join([*map(str.ljust, line[:4], widths), line[4]]).rstrip() for line in lines
        )


@dataclass
class Seen:
    """What a backward met with.

    Attributes:
        params: its parameters.
        blocks: those at parameters.
        feature_blocks: those at features, one each.
        behind: by feature, the leaves that it is computed from.
    """

    params: Sequence[Tensor] = ()
    blocks: Sequence[Block] = ()
    feature_blocks: Sequence[Block] = ()
    behind: Mapping[str, set[Tensor]] = field(default_factory=dict)


def block_table(seen: Seen, groups: Sequence[Mapping[str, Any]]) -> Blocks:
    """The blocks of a backward, by the names that the groups have for parameters."""
    found = []
    held = dict.fromkeys(param for group in groups for param in group["params"])
    for block in seen.feature_blocks:
        members = [param for param in held if param in seen.behind[block.name]]
        found.append(_info(block, members, groups))
    for block in seen.blocks:
        members = [p for i in block.positions if (p := seen.params[i]) in held]
        found.append(_info(block, members, groups))
    known = {seen.params[position] for block in seen.blocks for position in block.positions}
    known.update(*seen.behind.values())
    rest = [param for param in held if param not in known]
    for name, trainable in (("(no loss)", True), ("(frozen)", False)):
        members = [param for param in rest if param.requires_grad is trainable]
        if seen.params and members:
            found.append(_info(Block(name, (), ()), members, groups))
    return Blocks(found)


def _info(
    block: Block, members: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]
) -> BlockInfo:
    short = [describe(param, groups).removeprefix("parameter ").strip("'") for param in members]
    return BlockInfo(
        block.name,
        block.objectives,
        parameters=tuple(short),
        numbers=sum(param.numel() for param in members if not is_lazy(param)),
        integrated=block.integrated,
        joined=block.joined,
        references=tuple(map(ref, members)),
    )


def warn_of_nothing_to_integrate(losses: int) -> None:
    """One hint to a user who wrapped an optimizer and gave it no losses, or only one."""
    if losses > 1:
        return
    one = (
        "only ever given one loss, so there is nothing to integrate: if the loss is a sum, give "
        'its terms, as in {"mm": loss, "audio": audio_loss}'
    )
    none = (
        "never given losses, so it does what its base does: call step(losses={...}), or "
        "backward({...}) and step(), or total({...}).backward() without inputs="
    )
    warn(f"this MMParetoOptimizer has stepped 10 times and was {one if losses else none}")


def warn_of_hooks_in_backward(groups: Sequence[Mapping[str, Any]]) -> None:
    """A warning of hooks on parameters that never run, as those of an optimizer in backward."""
    params = [param for group in groups for param in group["params"]]
    hooked = [p for p in params if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked:
        more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
        warn(
            f"{describe(hooked[0], groups)}{more} has a post-accumulate-grad hook, which only "
            "Tensor.backward() runs: what steps in such hooks (LOMO, GaLore's layerwise "
            "optimizers, optimizer-in-backward) does nothing here. Give an optimizer that steps "
            "when its step() is called"
        )


def warn_of_line_search(base: str) -> None:
    """A warning of a base that takes what is integrated for the gradient of the sum of losses."""
    warn(
        f"{base} takes .grad for the gradient of the summed losses that the closure gives, and an "
        "integrated gradient is the gradient of no function: its curvature and its line search "
        'are wrong then, and it stalls or diverges. Use integration="uniform" with it, or another '
        "base"
    )


def raise_explained(error: Exception, what: str) -> NoReturn:
    """Raise an error of a pass again; named, and with the mend, if that is known."""
    mend = next((mend for sign, mend in MENDS.items() if sign in str(error)), None)
    if mend is not None and isinstance(error, RuntimeError):
        raise RuntimeError(f"{what}{mend}") from error
    add_note: Any = getattr(error, "add_note", None)  # since Python 3.11
    if add_note is not None and not isinstance(error, OutOfMemoryError):
        add_note(
            f"This came from the backward pass of {what}. Each loss takes a pass of its own "
            "through the graph: where a function or a hook is at fault that bears one only, use "
            "the plain version of it, or features= to pass through the encoders once."
        )
    raise error


MENDS = {
    "second time": (
        ": its graph has been freed by an earlier backward. step(losses=...) and "
        "backward(losses) differentiate by themselves: remove a backward of yours, and make a "
        "forward pass for each call. Where two wrappers step on one graph, give both "
        "optimizers to one, as in MMParetoOptimizer([first, second]). Only where two gradients "
        "are to add up, pass retain_graph=True to the first backward. A hidden state that is "
        "carried over from the last batch has to be detached: hidden = hidden.detach()"
    ),
    "extra time": (
        " goes through an activation checkpoint that gives up what it kept in the first pass, and "
        "each loss takes one: use torch.utils.checkpoint without context_fn"
    ),
    "not compatible with .grad()": (
        " goes through an activation checkpoint of another library, whose parameters cannot be "
        "differentiated one loss at a time: use torch.utils.checkpoint with use_reentrant=False"
    ),
    "use_reentrant=True": (
        " goes through torch.utils.checkpoint with use_reentrant=True, whose parameters cannot "
        "be differentiated one loss at a time: pass use_reentrant=False (Hugging Face: "
        "gradient_checkpointing_kwargs={'use_reentrant': False})"
    ),
    "donated buffer": (
        " goes through a region that torch.compile compiled for a single backward pass, and "
        "each loss takes one: set torch._functorch.config.donated_buffer = False before the "
        "first backward"
    ),
    "fabric.backward(loss)": (
        " comes from a module that Fabric set up, whose outputs refuse every backward but "
        "Fabric's with this precision: call fabric.backward(opt.total(losses)), or compute it "
        "with the model itself, under fabric.autocast()"
    ),
    "engine.backward(loss)": (
        " comes from a DeepSpeed engine, whose outputs refuse every backward but the engine's: "
        "compute it with engine.module, and see the recipe for DeepSpeed"
    ),
}
"""By a part of autograd's message what follows the name of the loss."""
