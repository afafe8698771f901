"""Draws what happens to few cases: regions that bear one pass, changed parameters, new names."""

from random import Random

from tests.fuzz.cases import Case
from tests.fuzz.changes import CHANGES, MOMENTS
from tests.fuzz.models import Network
from tests.fuzz.regions import REGIONS


def misbehave(case: Case, chance: Random) -> None:
    """Puts a region that does not bear several passes somewhere, and leaves the rest simple.

    Losses that are delivered through one tensor would pass through it with zeros; a hook that
    clips makes sums of gradients differ by itself.
    """
    plan = case.plan
    names = Network.names_of(plan)
    plan.delivery, plan.hooks = "apart", []
    plan.region = chance.choice(REGIONS)
    places = [f"loss {name}" for name in names] + [n for n in names if n.startswith("own")]
    places += 2 * [f"encoder {k}" for k in plan.kinds]
    if any(name.startswith(("joint", "columns", "smoothing")) for name in names):
        places.append("joint")
    if plan.region == "leaving hook":
        places += 2 * [f"parameter {k}" for k in plan.kinds]
    plan.place = chance.choice(places)
    case.held, case.check = 1.0, chance.random() < 0.85
    case.steps = [micros[:1] for micros in case.steps]
    first = case.steps[0][0]
    first.fates, first.edit, first.spoilt = {}, None, False


def change_parameters(case: Case, chance: Random) -> None:
    """Freezes, thaws and replaces parameters between forward, backward and step."""
    plan = case.plan
    # Blocks that were chosen once, by hand, name the parameters themselves.
    by_hand = bool(case.modalities) and not case.at_each_call
    kinds = CHANGES[:2] if by_hand else CHANGES
    if not by_hand and chance.random() < 0.5:
        plan.kinds[chance.choice(list(plan.kinds))] = "points"
    # Hooks on the way to what is no longer held may run or not, and a checkpoint whose
    # parameters are not those of the forward pass is an error anywhere.
    apart = plan.hooks or "checkpoint" in plan.manners.values()
    moments = [moment for moment in MOMENTS if not (apart and moment == "in flight")]
    for micros in case.steps:
        for micro in micros:
            for moment in moments:
                if chance.random() < 0.35:
                    micro.changes[moment] = chance.choice(kinds)


def rename(case: Case, chance: Random) -> None:
    """Gives the losses other names from a step on, each other's too, and in another order."""
    names = Network.names_of(case.plan)
    for micros in case.steps:
        renamed = {}
        if chance.random() < 0.6:
            some = chance.sample(names, chance.randint(1, len(names)))
            new = [f"{name} anew" for name in some] if chance.random() < 0.5 else some[::-1]
            renamed = dict(zip(some, new, strict=True))
        for micro in micros:
            micro.renamed, micro.shuffled = renamed, chance.random() < 0.5
            if len(micros) > 1 and len(names) > 1 and not case.features and chance.random() < 0.5:
                micro.fates = {**micro.fates, chance.choice(names): "left out"}
                if all(micro.fates.get(name) == "left out" for name in names):
                    micro.fates = {}
