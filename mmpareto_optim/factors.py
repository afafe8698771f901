"""Weight gradients as factors, multiplied out once: below the cost of two weight gradients.

The gradient of loss i for the weight of a linear layer is ``D_i.T @ X``: the layer's inputs
``X`` ``(n, in)``, one row for each use of the weight in the batch, and the gradient at its outputs
``D_i`` ``(n, out)``. Two of them have the inner product ``(D_i * (X @ X.T @ D_j)).sum()``, and
combined they are one product, ``(c_1 D_1 + c_2 D_2).T @ X``. Where there are few rows that costs
less than a gradient for each loss, none of which is made. A convolution is a linear layer on
patches. The inner products are those of Goodfellow's per-example gradient norms (arXiv
1510.01799), of losses in place of examples.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import unfold
from torch.nn.grad import conv2d_weight

from mmpareto_optim.flat import FlatBlock, combine_rows
from mmpareto_optim.gradients import Gradient
from mmpareto_optim.graph import edges_behind, kind_of, uses_behind

SMALLEST = 2**18
"""Elements of a weight below which a second gradient costs less than to look for its factors."""

TOLD_OF_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
"""Whether this PyTorch tells where a saved tensor is to be asked of a hook: 2.8 does not."""

CANCELLATION = 100
"""How much longer than their sum the parts of a gradient may be, which its rows in a batch add.

A combination is multiplied out with a rounding error that is relative to the parts. That it keeps a
positive product with each gradient is known for errors relative to the gradients themselves, so
where the parts cancel, these are made one by one after all.
"""


@dataclass(frozen=True)
class Layer:
    """The only use of a weight.

    Attributes:
        node: of autograd's graph; its output is the layer's.
        shape: the weight's, ``(out, in)``, or ``(out, in, height, width)`` of a convolution.
        inputs: ``(n, in)``, or a batch of images, as autograd saved them.
        rows: n, how often a batch uses the weight.
        convolution: stride, padding and dilation; None of a linear layer.
    """

    node: Any
    shape: torch.Size
    inputs: Tensor
    rows: int
    convolution: Mapping[str, tuple[int, ...]] | None = None

    def cost(self) -> float:
        """That of the Gram matrix of two gradients over that of the one which factors save.

        Counted are multiplications; in float64 one takes two and a half times as long, as measured.
        """
        width_out, width_in = self.shape[0], self.shape[1:].numel()
        return 2.5 * self.rows * (width_in + 2 * width_out) / (width_in * width_out)

    def pays(self) -> bool:
        """Whether two gradients cost less as factors."""
        return self.cost() < 1

    def gram(self, outers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What is to be known of the weight's gradients, in float64.

        Args:
            outers: m gradients at the layer's output.

        Returns:
            Their inner products, shape ``(m, m)``; and the squares of their lengths if no row
            took anything away from another, shape ``(m,)``.
        """
        inputs = self._inputs_as_rows().double()
        outputs = torch.stack([self._as_rows(outer) for outer in outers]).double()
        spread = (inputs @ inputs.T) @ outputs
        lengths = outputs.norm(dim=2) @ inputs.norm(dim=1)
        return outputs.flatten(1) @ spread.flatten(1).T, lengths.square()

    def gradient(self, outer: Tensor) -> Tensor:
        """The weight's gradient from that at the layer's output: a new tensor, contiguous."""
        if self.convolution is None:
            return outer.T @ self.inputs
        found: Tensor = conv2d_weight(self.inputs, self.shape, outer, **self.convolution)
        return found.flatten().view(self.shape)

    def _inputs_as_rows(self) -> Tensor:
        if self.convolution is None:
            return self.inputs
        patches = unfold(self.inputs, self.shape[2:], **self.convolution)
        return patches.transpose(1, 2).flatten(0, 1)

    def _as_rows(self, outer: Tensor) -> Tensor:
        if self.convolution is None:
            return outer
        return outer.flatten(2).transpose(1, 2).flatten(0, 1)


Layers = Mapping[Tensor, Layer]
"""By weight."""


def layers_of(losses: Iterable[Tensor], params: Sequence[Tensor]) -> dict[Tensor, Layer]:
    """The layers whose weight gradients cost less as factors.

    Only where that changes nothing but time: weights used once, with no hook on them, inputs
    that autograd saved as they are (not to compute them again, as a checkpoint does), and a node
    that autograd runs all the same, which frees and checks what it saved. Hooks on the node or
    on a linear weight's transpose cannot be seen, and what they do to the weight's gradient is
    left out. Only on the CPU in float32: elsewhere it is not measured.
    """
    if not TOLD_OF_HOOKS:
        return {}
    weights = {param for param in params if param.numel() >= SMALLEST and _may_have_factors(param)}
    if not weights or torch.is_autocast_enabled("cpu"):
        return {}
    if any(param.device.type != "cpu" for param in params):
        return {}
    uses = uses_behind(losses)
    held = set(params)
    found = {}
    for node in uses:
        weight = _weight_used_once(node, uses) if kind_of(node) in _PLACES else None
        if weight is not None and weight in weights:
            layer = _layer_of(node, weight)
            if layer is not None and layer.pays() and _runs_without_weight(node, held):
                found[weight] = layer
    return found


def gradients_by_factors(
    layers: Layers, loss: Tensor, params: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """The gradient of a loss; for the weights of layers that at the layer's output."""
    targets: list[Any] = [GradientEdge(layers[p].node, 0) if p in layers else p for p in params]
    found = torch.autograd.grad(loss, targets, retain_graph=retain_graph, allow_unused=True)
    return [
        gradient.to_dense() if param in layers and gradient is not None else gradient
        for param, gradient in zip(params, found, strict=True)
    ]


class FactoredBlock:
    """A :class:`FlatBlock` and, beside it, the gradients that are factors.

    Args:
        layers: the layers of some of the parameters.
        params: the parameters of the block.
        rows: as found by :func:`gradients_by_factors`; emptied.
    """

    dtype = torch.float32
    """The coarsest, as of :class:`FlatBlock`."""

    def __init__(self, layers: Layers, params: Sequence[Tensor], rows: Sequence[Gradient]) -> None:
        self._params = params
        self._layers = {i: layers[param] for i, param in enumerate(params) if param in layers}
        self._outers = {i: [row[i] for row in rows] for i in self._layers}
        self._rest = [i for i in range(len(params)) if i not in self._layers]
        self._rows = [[row[i] for i in self._rest] for row in rows]
        for row in rows:
            row[:] = [None] * len(row)
        self._flat = FlatBlock([params[i] for i in self._rest], self._rows)

    def gram(self, *, quick: bool = True) -> Tensor:
        """As of :class:`FlatBlock`."""
        found = [self._layers[i].gram(_with_zeros(outers)) for i, outers in self._outers.items()]
        products, squares = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
        if bool((squares > CANCELLATION**2 * products.diagonal()).any()):
            self._multiply_out_each()
            return self._flat.gram(quick=quick)
        return self._flat.gram(quick=quick, beside=(products + products.T) / 2)

    def sum(self) -> list[Tensor]:
        """As of :class:`FlatBlock`."""
        return self._multiplied_out(self._flat.sum(), torch.ones(len(self._rows)))

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """As of :class:`FlatBlock`."""
        return self._multiplied_out(self._flat.combine(coefficients), coefficients)

    def combine_and_stretch(
        self, coefficients: Tensor, gamma: float
    ) -> tuple[list[Tensor], Tensor]:
        """Not for factors: it would need the norms of what they make."""
        raise NotImplementedError

    def _multiplied_out(self, flat: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
        found = dict(zip(self._rest, flat, strict=True))
        for i, layer in self._layers.items():
            outer = combine_rows(_with_zeros(self._outers[i]), coefficients)
            found[i] = layer.gradient(outer)
        return [found[i] for i in range(len(found))]

    def _multiply_out_each(self) -> None:
        """Make the gradients that autograd would have made."""
        for i, layer in self._layers.items():
            for row, outer in zip(self._rows, self._outers[i], strict=True):
                row.append(None if outer is None else layer.gradient(outer))
        self._rest += self._layers
        self._layers, self._outers = {}, {}
        self._flat = FlatBlock([self._params[i] for i in self._rest], self._rows)


def block_with_factors(
    layers: Layers, params: Sequence[Tensor], rows: Sequence[Gradient], *, keep: bool = False
) -> FlatBlock | FactoredBlock:
    """The rows of a block, found by :func:`gradients_by_factors`; they cannot be kept."""
    if not any(param in layers for param in params):
        return FlatBlock(params, rows, keep=keep)
    return FactoredBlock(layers, params, rows)


def _with_zeros(outers: Sequence[Tensor | None]) -> list[Tensor]:
    like = next(outer for outer in outers if outer is not None)
    return [torch.zeros_like(like) if outer is None else outer for outer in outers]


def _may_have_factors(param: Tensor) -> bool:
    return (
        param.ndim in (2, 4)
        and type(param) in (Tensor, torch.nn.Parameter)
        and param.dtype == torch.float32
        and param.layout == torch.strided
        and param.is_contiguous()
        and not param._backward_hooks
    )


_PLACES = {"AddmmBackward0": 2, "MmBackward0": 1, "ConvolutionBackward0": 1}
"""Nodes of layers, and where in their ``next_functions`` the weight is."""

_INPUTS = {"AddmmBackward0": "mat1", "MmBackward0": "self", "ConvolutionBackward0": "input"}
"""Under what name they save their inputs."""


def _weight_used_once(node: Any, uses: Mapping[Any, int]) -> Tensor | None:
    """The leaf that is the weight of a layer's node, if that is its only use."""
    kind = kind_of(node)
    leaf = node.next_functions[_PLACES[kind]][0]
    if kind != "ConvolutionBackward0":
        if kind_of(leaf) != "TBackward0" or uses[leaf] > 1:
            return None
        leaf = leaf.next_functions[0][0]
    if kind_of(leaf) != "AccumulateGrad" or uses[leaf] > 1:
        return None
    weight: Tensor = leaf.variable
    return weight


def _layer_of(node: Any, weight: Tensor) -> Layer | None:
    inputs = _as_saved(node, _INPUTS[kind_of(node)])
    output = node._input_metadata[0].shape
    if inputs is None or len(output) != weight.ndim:
        return None
    if (output[1], inputs.shape[1]) != weight.shape[:2]:  # its .data is another since the forward
        return None
    if kind_of(node) != "ConvolutionBackward0":
        plain = kind_of(node) == "MmBackward0" or node._saved_alpha == 1
        return Layer(node, weight.shape, inputs, len(inputs)) if plain else None
    if inputs.ndim != 4 or node._saved_transposed or node._saved_groups != 1:
        return None
    settings = {
        name: _pair(getattr(node, f"_saved_{name}")) for name in ("stride", "padding", "dilation")
    }
    return Layer(node, weight.shape, inputs, len(inputs) * math.prod(output[2:]), settings)


def _pair(setting: Sequence[int]) -> tuple[int, ...]:
    """For height and width, where one number was given for both."""
    return tuple(setting) * (2 // len(setting))


def _runs_without_weight(node: Any, held: Container[Tensor]) -> bool:
    """Whether gradients of other parameters than the weight go through a layer's node."""
    others = list(node.next_functions)
    del others[_PLACES[kind_of(node)]]
    return any(
        kind_of(behind) == "AccumulateGrad" and behind.variable in held
        for behind, _ in edges_behind(others)
    )


def _as_saved(node: Any, name: str) -> Tensor | None:
    """What a node saved; None where that is gone, or is to be asked of a hook."""
    try:
        if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
            return None
        saved: Tensor = getattr(node, f"_saved_{name}")
    except RuntimeError:  # freed or changed in place, of which autograd itself tells better
        return None
    usual = type(saved) in (Tensor, torch.nn.Parameter) and saved.layout == torch.strided
    return saved.detach() if usual and saved.dtype == torch.float32 else None
