"""All blocks of a step at once: what it costs, where it runs, and the rule's own functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmpareto_optim
from mmpareto_optim.rules.evaluation import of_one, of_pair, of_pairs, on_host
from mmpareto_optim.rules.named import NAMES, Rounding, _formulas, coefficients_of_blocks

FINE, COARSE = Rounding(2**-52), Rounding(2**-23, 2**-9, 1e-8)
GRAMS = [
    torch.tensor([[2.0, -1.0], [-1.0, 3.0]]).double(),
    torch.tensor([[2.0, -1.0, 0.3], [-1.0, 3.0, -0.5], [0.3, -0.5, 1.0]]).double(),
    torch.tensor([[5.0]]).double(),
    torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(),
    torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double(),
    torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 3.0]]).double(),
]


class Operations(TorchDispatchMode):
    """Names of the operations that do more than show memory in another shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(alias and not alias.is_write for alias in aliases):
            self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_few_operations_for_all_pairs_of_gradients(name: str) -> None:
    """On meta tensors, as on any device: whoever looked at a value there would fail."""
    counts = []
    for blocks in (1, 7):
        grams = [torch.empty(2, 2, device="meta", dtype=torch.float64) for _ in range(blocks)]
        with Operations() as operations:
            coefficients_of_blocks(name, grams, 1.5, [FINE] * blocks)
        counts.append(len(operations.names))
    assert counts[0] == counts[1] <= 32  # of which one makes a stack


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stretched", [True, False])
def test_shapes_where_there_are_no_values(name: str, stretched: bool) -> None:
    grams = [gram.to("meta") for gram in GRAMS]
    roundings = [FINE, COARSE] * 3
    found = coefficients_of_blocks(name, grams, 1.5, roundings, stretched=stretched)
    assert [tuple(c.shape) for c in found] == [(len(gram),) for gram in grams]
    assert {(c.dtype, c.device.type) for c in found} == {(torch.float64, "meta")}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_one_copy_to_the_host_and_one_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where blocks are treated as if they lay on another device."""
    copies = []
    original = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        copies.append(tensor)
        return original(tensor)

    monkeypatch.setattr(Tensor, "cpu", counted)
    grams = [GRAMS[1], torch.eye(5).double(), GRAMS[5]]
    formulas = [_formulas(name, FINE, True)] * 3
    with Operations() as operations:
        found = on_host(grams, formulas, 2.0)
    assert len(copies) == 1
    assert not [n for n in operations.names if "_local_scalar_dense" in n or "item" in n]
    expected = coefficients_of_blocks(name, grams, 2.0, [FINE] * 3)
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("name", NAMES)
def test_gamma_times_the_public_function(name: str) -> None:
    rule: Callable[[Tensor], Tensor] = getattr(mmpareto_optim, f"{name}_coefficients")
    found = coefficients_of_blocks(name, GRAMS, 2.0, [FINE] * len(GRAMS))
    for gram, coefficients in zip(GRAMS, found, strict=True):
        gamma = 2.0 if int((gram.diagonal() > 0).sum()) > 1 else 1.0
        plain = rule(gram, 1.0) if name == "mmpareto" else rule(gram)  # type: ignore[call-arg]
        torch.testing.assert_close(coefficients, gamma * plain, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_single_gradient_is_taken_as_it_is(name: str, bad: float) -> None:
    for value in (3.0, 0.0, bad):
        gram = torch.tensor([[value]])
        rule: Callable[[Tensor], Tensor] = getattr(mmpareto_optim, f"{name}_coefficients")
        assert rule(gram).tolist() == [1.0]
        assert rule(gram.expand(4, 2, 1, 1)).equal(torch.ones(4, 2, 1))
        (found,) = coefficients_of_blocks(name, [gram], 2.0, [FINE])
        assert found.tolist() == [1.0]


def test_margin_of_everything_that_is_rounded() -> None:
    """Gradients so opposite that they have a common direction only where rounding is small."""
    angle = 0.01
    cosine = -float(torch.tensor(angle).cos())
    gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    for rounding in (Rounding(1e-4), Rounding(2**-52, 1e-4), Rounding(2**-52, 0.0, 1e-4)):
        found = coefficients_of_blocks("mmpareto", [gram, gram], 1.0, [FINE, rounding])
        assert (found[0] > 1).all()
        assert (found[1] == 0).all()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="integration must be one of mmpareto, pareto"):
        coefficients_of_blocks("mgda", GRAMS[:1], 1.0, [FINE])


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, 1.0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
@given(numbers, numbers, numbers, st.sampled_from([FINE, COARSE]), st.booleans())
def test_pairs_in_python_as_in_torch(
    name: str, one: float, cross: float, other: float, rounding: Rounding, stretched: bool
) -> None:
    """One formula, in two arithmetics."""
    gram = torch.tensor([[abs(one), cross], [cross, abs(other)]], dtype=torch.float64)
    formulas = _formulas(name, rounding, stretched)
    found = torch.tensor(of_pair(gram.tolist(), formulas, 1.5), dtype=torch.float64)
    expected = of_pairs(gram.expand(3, 2, 2), formulas, 1.5)[1]
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
@given(st.floats(-0.999, 0.999), st.floats(-6, 6), st.booleans())
def test_the_closed_form_is_what_the_solver_finds(
    name: str, cosine: float, decades: float, stretched: bool
) -> None:
    if abs(cosine) < 1e-9:
        return  # where the rule jumps
    ratio = 10.0**decades
    gram = torch.tensor([[1.0, cosine * ratio], [cosine * ratio, ratio**2]], dtype=torch.float64)
    formulas = _formulas(name, FINE, stretched)
    lengths = gram.diagonal().sqrt()
    cosines = gram / lengths / lengths[:, None]
    found = torch.tensor(of_one(gram.numpy(), formulas, 1.0), dtype=torch.float64)
    expected = torch.from_numpy(formulas.of_many(cosines.numpy(), lengths.numpy()))
    scale = float((expected * lengths).max())
    torch.testing.assert_close(found * lengths, expected * lengths, rtol=1e-9, atol=1e-10 * scale)
