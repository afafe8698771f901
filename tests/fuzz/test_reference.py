"""The reference of the fuzzer is right by itself, and the fuzzer finds what is wrong."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz import reference
from tests.fuzz.cases import Micro
from tests.fuzz.compare import DeviationError
from tests.fuzz.draw import draw_case
from tests.fuzz.driver import run
from tests.fuzz.history import History, Outcome
from tests.fuzz.models import Network, Plan, draw_plan
from tests.fuzz.rules import Array, Settings, coefficients, min_norm
from tests.fuzz.sides import Library

seeds = st.integers(0, 2**32 - 1)


def plan_of(seed: int, terms: Sequence[str] = ()) -> Plan:
    plan = draw_plan(Random(seed), "float64")
    return replace(plan, hooks=[], terms=list(terms) or plan.terms)


def trained(model: Network) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def losses_of(model: Network, seed: int, fates: dict[str, str] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    batch = model.batch(seed)
    return model.losses(model.encode(batch), batch, fates or {})


def row_pairs(seed: int, m: int) -> Array:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(m, draw.integers(1, 8)))
    return rows * np.exp(draw.normal(size=(m, 1)))


def assert_same(found: dict[int, Outcome], parameters: Sequence[Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        value = found[index].value
        if parameter.grad is None or value is None:
            assert parameter.grad is None
            assert value is None
        else:
            np.testing.assert_allclose(
                value, reference.array(parameter.grad), rtol=1e-9, atol=1e-11
            )


@given(seeds, st.sampled_from(["mmpareto", "pareto", "uniform"]), st.booleans())
def test_one_loss_gives_what_a_plain_backward_gives(seed: int, rule: str, tensorwise: bool) -> None:
    plan = plan_of(seed, ["joint"])
    model, plain = Network(plan, seed), Network(plan, seed)
    history, parameters = History(), trained(model)
    for batch in (seed, seed + 1):
        settings = Settings(rule, 1.5, tensorwise)
        found = reference.exact(history, losses_of(model, batch), parameters, settings)
        for index, parameter in enumerate(parameters):
            value = found[index].value
            parameter.grad = None if value is None else torch.from_numpy(value)
            if parameter.grad is not None:
                history.written[index] = (parameter.grad, parameter.grad.clone())
        losses_of(plain, batch)["joint"].backward()
        # Autograd takes memory that a function keeps for its own, and would add to it there.
        for parameter in trained(plain):
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        assert_same(found, trained(plain))


@given(seeds)
def test_uniform_without_a_factor_gives_a_plain_backward_of_the_sum(seed: int) -> None:
    plan = plan_of(seed)
    model, plain = Network(plan, seed), Network(plan, seed)
    settings = Settings("uniform", 1.0)
    found = reference.exact(History(), losses_of(model, seed), trained(model), settings)
    torch.stack(list(losses_of(plain, seed).values())).sum().backward()
    for index, parameter in enumerate(trained(plain)):
        value = found[index].value
        zero = np.zeros(tuple(parameter.shape))
        grad = zero if parameter.grad is None else reference.array(parameter.grad)
        np.testing.assert_allclose(zero if value is None else value, grad, rtol=1e-5, atol=1e-6)


@given(seeds)
def test_one_loss_through_features_gives_a_plain_backward(seed: int) -> None:
    plan = plan_of(seed, ["joint"])
    model, plain = Network(plan, seed), Network(plan, seed)
    torch.manual_seed(seed)
    batch = model.batch(seed)
    features = {k: z for k, z in model.encode(batch).items() if z.requires_grad}
    torch.manual_seed(seed)
    leaves = {k: z.detach() for k, z in model.encode(batch).items()}
    leaves |= {k: z.detach().requires_grad_() for k, z in features.items()}
    losses = model.losses(leaves, batch, {})
    pairs = [(z, leaves[k]) for k, z in features.items()]
    settings = Settings("mmpareto", 1.5)
    found, _ = reference.at_features(History(), losses, pairs, trained(model), settings)
    losses_of(plain, seed)["joint"].backward()
    assert_same(found, trained(plain))


@given(seeds, st.sampled_from(["mmpareto", "pareto", "uniform"]), st.integers(0, 3))
def test_a_loss_times_zero_or_saturated_is_absent(seed: int, rule: str, which: int) -> None:
    plan = replace(plan_of(seed), delivery="apart")
    names = Network.names_of(plan)
    values = []
    # What is left out leaves blocks that only it told apart as one; what is zero does not.
    fates = ["zero", "saturated"]
    for fate in fates:
        model, history = Network(plan, seed), History()
        settings = Settings(rule, 1.5)
        reference.exact(history, losses_of(model, seed), trained(model), settings)
        history.end_window()
        losses = losses_of(model, seed + 1, {names[which % len(names)]: fate})
        found = reference.exact(history, losses, trained(model), settings)
        sizes = [np.zeros(tuple(p.shape)) for p in trained(model)]
        values.append(
            [zero if found[i].value is None else found[i].value for i, zero in enumerate(sizes)]
        )
    for first, *others in zip(*values, strict=True):
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_min_norm_of_two_has_a_closed_form(seed: int) -> None:
    first, second = row_pairs(seed, 2)
    apart = first - second
    share = np.clip(-(second @ apart) / (apart @ apart), 0.0, 1.0)
    nearest = share * first + (1 - share) * second
    rows = np.array([first, second])
    np.testing.assert_allclose(min_norm(rows @ rows.T) @ rows, nearest, atol=1e-9)


@given(seeds, st.integers(1, 6))
def test_min_norm_point_agrees_with_every_gradient(seed: int, m: int) -> None:
    # In exact numbers this holds of the point of least norm and of no other point of the hull.
    rows = row_pairs(seed, m)
    weights = min_norm(rows @ rows.T)
    point = weights @ rows
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    assert (rows @ point >= point @ point - 1e-9 * np.square(rows).sum(1).max()).all()


@given(seeds, st.integers(2, 6))
def test_mmpareto_is_as_long_as_the_larger_of_sum_and_point(seed: int, m: int) -> None:
    rows = row_pairs(seed, m)
    gram = rows @ rows.T
    point = m * min_norm(gram) @ rows
    if np.linalg.norm(point) < 1e-6 * np.linalg.norm(rows):
        return
    found = coefficients(gram, Settings("mmpareto", 1.5)) @ rows
    lengths = [float(np.linalg.norm(rows.sum(0)))]
    if (gram < 0).any():
        lengths.append(float(np.linalg.norm(point)))
    assert float(np.linalg.norm(found)) == pytest.approx(1.5 * max(lengths))


class _Faulty(Library):
    """A library whose gradients are wrong in one entry, by a thousandth."""

    def step_on(self, micro: object) -> None:
        raise AssertionError("the fault lies in the backward before")

    def backward(self, micro: object) -> dict[str, Tensor]:
        losses = super().backward(micro)  # type: ignore[arg-type]
        grads = [p.grad for p in self.side.parameters if p.grad is not None and p.grad.any()]
        grads[0].view(-1)[grads[0].abs().argmax()] *= 1.001
        return losses


def test_fuzzer_sees_a_thousandth_in_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of(3, ["own audio"]), delivery="apart")
    case = replace(draw_case(3), plan=plan, rule="mmpareto", features=[], modalities=[], held=1.0)
    case = replace(case, gamma=1.5, tensorwise=False, twice=False)
    case.steps = [[replace(case.steps[0][0], fates={}, edit=None, spoilt=False)]]
    assert run(case).compared > 0
    monkeypatch.setattr("tests.fuzz.driver.Library", _Faulty)
    with pytest.raises(DeviationError, match="off by"):
        run(case)


def test_fuzzer_sees_that_nobody_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of(3, ["own audio", "penalty audio"]), delivery="apart")
    plan = replace(plan, region="leaving hook", place="encoder audio", weights=[1.0] * 8)
    case = replace(draw_case(3), plan=plan, rule="uniform", features=[], modalities=[], held=1.0)
    case = replace(case, check=True, autocast=None, labelled="", tensorwise=False, twice=False)
    case.steps = [[Micro(data=1, fates={}, edit=None, edited=1.0, spoilt=False)]]
    assert run(case).skipped["a region that several losses pass"] > 0
    monkeypatch.setattr("mmpareto_optim.check.warn_of_deviations", lambda *_: None)
    with pytest.raises(DeviationError, match="did not warn"):
        run(case)
