"""Draws a case from a seed."""

from random import Random

import torch

from tests.fuzz.cases import CALLABLES, Case, Micro
from tests.fuzz.deliveries import AROUND_FEATURES
from tests.fuzz.edits import EDITS
from tests.fuzz.encoders import DEEP
from tests.fuzz.happenings import change_parameters, misbehave, rename
from tests.fuzz.models import Network, Plan, draw_plan, reached


def draw_case(seed: int) -> Case:
    """Draws a case; the same seed gives the same case."""
    chance = Random(seed)
    dtype = chance.choice(["float32", "float32", "float64", "float64", "bfloat16", "mixed"])
    plan = draw_plan(chance, dtype)
    rule = chance.choice(["mmpareto"] * 4 + ["pareto", "pareto", "uniform", *CALLABLES])
    way = chance.choice(["exact", "exact", "exact", "features", "modalities"])
    features = _features(chance, plan) if way == "features" else []
    if features and plan.delivery in AROUND_FEATURES:
        plan.delivery = "apart"
    if way != "features" and chance.random() < 0.02:
        plan.kinds[chance.choice(list(plan.kinds))] = DEEP
    elif way != "features" and chance.random() < 0.1:
        plan.kinds[chance.choice(list(plan.kinds))] = "graphed"
    disjoint = way == "modalities" and not plan.trunk
    steps = chance.choice([1, 1, 2, 3])
    case = Case(
        seed=seed,
        plan=plan,
        rule=rule,
        gamma=chance.choice([None, None, 1.0, 1.5, 0.5, 2.0]),
        tensorwise=rule == "mmpareto" and not features and chance.random() < 0.3,
        features=features,
        modalities=_some(chance, list(plan.kinds)) if disjoint else [],
        at_each_call=chance.random() < 0.5,
        base=chance.choice(["sgd", "momentum", "adam"]),
        without_optimizer=chance.random() < 0.25,
        # A hook on what no optimizer holds may run or not.
        held=1.0 if plan.hooks else chance.choice([1.0, 1.0, 0.8]),
        twice=chance.random() < 0.05,
        zero_grad=chance.choice(["none", "none", "none", "to zero", "skipped"]),
        steps=[_micros(chance, plan, features) for _ in range(steps)],
        check=chance.random() < 0.4,
        autocast=_autocast(chance, plan),
        labelled=chance.choice(["inputs", "losses"]) if chance.random() < 0.15 else "",
    )
    if chance.random() < 0.12:
        misbehave(case, chance)
    elif chance.random() < 0.3:
        change_parameters(case, chance)
    if chance.random() < 0.25:
        rename(case, chance)
    if "checkpoint" in plan.manners.values():
        # Its batch norm counts each pass in a running mean, and a check takes as many as it needs.
        case.check = False
    return case


def _features(chance: Random, plan: Plan) -> list[str]:
    names = Network.names_of(plan)
    trained = [k for k, z in _trained(plan).items() if z and reached(names, k)]
    # A trunk that all share is behind every feature: without one of them losses go around it.
    return trained if plan.trunk or len(trained) < 2 else _some(chance, trained)


def _autocast(chance: Random, plan: Plan) -> torch.dtype | None:
    """The two halves do not go together: torch refuses to concatenate them in a region."""
    half = chance.choice([torch.bfloat16, torch.float16])
    if torch.bfloat16 in plan.dtypes.values():
        half = torch.bfloat16
    return half if chance.random() < 0.15 else None


def _trained(plan: Plan) -> dict[str, bool]:
    """Whether each modality's features need a gradient."""
    model = Network(plan, 0)
    batch = model.batch(0)
    return {k: z.requires_grad for k, z in model.encode(batch).items()}


def _some(chance: Random, names: list[str]) -> list[str]:
    return names if chance.random() < 0.6 else chance.sample(names, chance.randint(1, len(names)))


def _micros(chance: Random, plan: Plan, features: list[str]) -> list[Micro]:
    count = chance.choice([1, 1, 1, 2, 3])
    return [_micro(chance, plan, features, number) for number in range(count)]


def _micro(chance: Random, plan: Plan, features: list[str], number: int) -> Micro:
    names = Network.names_of(plan)
    spoilt = number == 0 and chance.random() < 0.04
    odd = {name: chance.choice(["left out", "zero", "saturated"]) for name in names}
    fates = {name: fate for name, fate in odd.items() if chance.random() < 0.12}
    if spoilt:
        fates[chance.choice(names)] = chance.choice(["nan", "inf"])
    left = [name for name in names if fates.get(name) != "left out"]
    if not left or not all(reached(left, k) for k in features):
        fates = {name: fate for name, fate in fates.items() if fate != "left out"}
    # An edit before the first micro-batch finds a gradient that was never ours, or none.
    edit = chance.choice(list(EDITS)) if chance.random() < (0.5 if number else 0.1) else None
    return Micro(
        data=chance.randrange(1 << 30),
        fates=fates,
        edit=edit,
        edited=chance.choice([1.0, 1.0, 0.4]),
        spoilt=spoilt,
    )
