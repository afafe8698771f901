"""What pays.py trains: the settings, the methods, and a job for each training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Result = dict[str, Any]

JOINT, UNIFORM, MMPARETO, UPGRAD, DGL = "one joint loss", "uniform", "MMPareto", "UPGrad", "DGL"
ENSEMBLE, ALONE, AT_SUMS_RATE = "ensemble", " alone", " at the sum's rate"
SCALINGS = (UNIFORM, "uniform x 1.5", "uniform x 2", "uniform x 3")
GAMMAS = ("MMPareto, gamma 1", MMPARETO, "MMPareto, gamma 2", "MMPareto, gamma 3")
DGLS = (DGL, "DGL x 1.5", "DGL x 2", "DGL x 3")
OTHER_RULES = (UPGRAD, "dual projection", "ConFIG", "conventional Pareto")

# Trained without the library, in one backward pass: how many times an encoder gets the gradient of
# the joint loss, and how many times its own.
SUMS = {JOINT: (1.0, 0.0)}
for factor, scaled, dgl in zip((1.0, 1.5, 2.0, 3.0), SCALINGS, DGLS, strict=True):
    SUMS |= {scaled: (factor, factor), dgl: (0.0, factor)}
del SUMS[UNIFORM]  # the library measures its steps
INTEGRATIONS: dict[str, dict[str, Any]] = {
    UNIFORM: {"integration": "uniform"},
    MMPARETO: {},  # gamma 1.5
    "MMPareto, gamma 1": {"gamma": 1.0},
    "MMPareto, gamma 2": {"gamma": 2.0},
    "MMPareto, gamma 3": {"gamma": 3.0},
    UPGRAD: {"integration": "upgrad"},
    "dual projection": {"integration": "dualproj"},
    "ConFIG": {"integration": "config"},
    "conventional Pareto": {"integration": "pareto"},
}
FEWER = (JOINT, *SCALINGS, *GAMMAS, *DGLS, UPGRAD)
METHODS = (*FEWER, *OTHER_RULES[1:])
FEWEST = (JOINT, *SCALINGS[:2], *GAMMAS[:2], DGL, UPGRAD)
WITH_ADAMW = (JOINT, UNIFORM, "uniform x 2", MMPARETO, DGL, UPGRAD)

# Steps of a quarter of a decade.
SGD_RATES = (0.01, 0.018, 0.032, 0.056, 0.1, 0.18, 0.32)
ADAMW_RATES = (3e-4, 5.6e-4, 1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2)
# All rates are tried with the first seeds, the best few with the others too.
FIRST_SEEDS, TUNING_SEEDS, SHORTLISTED = (100, 101), tuple(range(100, 108)), 3


@dataclass(frozen=True)
class Setting:
    """What is trained and how long; ``seconds`` a run, roughly, on one core."""

    title: str
    example: str  # in EXAMPLES of pays_runs.py
    modalities: tuple[str, ...]
    seconds: float
    file: str = ""  # in the folder of the data; none for data that scikit-learn brings
    split: str = ""
    epochs: int = 20
    seeds: int = 20  # of the report
    methods: tuple[str, ...] = METHODS
    adamw: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        return ADAMW_RATES if self.adamw else SGD_RATES

    @property
    def entries(self) -> tuple[str, ...]:
        """The lines of its table; see :func:`source`."""
        longer = [name for name in (SCALINGS[1], MMPARETO) if name in self.methods]
        at_rate = (name + AT_SUMS_RATE for name in longer)
        return (*self.methods, *at_rate, ENSEMBLE, *(name + ALONE for name in self.modalities))


_UTD = Setting("UTD-MHAD", "utd_mhad", ("inertial", "skeleton"), seconds=1.2, file="utd_mhad.npz")
_HTAD = Setting("HTAD", "htad", ("audio", "motion"), seconds=0.8, file="htad.npz")
_TALKER = Setting(
    "AVLetters by talker",
    "avletters",
    ("audio", "lips"),
    seconds=1.6,
    file="avletters.npz",
    split="talker",
    seeds=10,
    methods=FEWER,
)
SETTINGS = {
    "utd_mhad": _UTD,
    "htad": _HTAD,
    "rosmap": Setting(
        "ROSMAP", "rosmap", ("mrna", "methylation", "mirna"), seconds=0.3, file="rosmap.npz"
    ),
    "avletters_talker": _TALKER,
    "spoken_digits": Setting(
        "Spoken digits",
        "audio_visual_digits",
        ("audio", "visual"),
        seconds=7,
        file="fsdd.npz",
        split="recording",
        epochs=4,
        seeds=10,
        methods=FEWEST,
    ),
    **{
        f"{name}_adamw": replace(
            setting, title=f"{setting.title}, AdamW", adamw=True, methods=WITH_ADAMW
        )
        for name, setting in (("utd_mhad", _UTD), ("avletters_talker", _TALKER), ("htad", _HTAD))
    },
    "avletters_repetition": replace(_TALKER, title="AVLetters by repetition", split="repetition"),
    "coloured_digits": Setting(
        "Coloured digits",
        "colored_gray_digits",
        ("gray", "colour"),
        seconds=3,
        seeds=10,
        methods=FEWEST,
    ),
}


@dataclass(frozen=True)
class Job:
    """One training; ``validate`` scores it on held-out training data."""

    setting: str
    method: str
    lr: float
    seed: int
    validate: bool

    @property
    def cost(self) -> float:
        return SETTINGS[self.setting].seconds


def source(entry: str) -> tuple[str, str]:
    """The method whose runs have the score of a line in a table, and the head.

    DGL's encoders and single heads learn from their own losses alone: what is trained alone is
    scored there, and so is the ensemble of it.
    """
    if entry == ENSEMBLE or entry.endswith(ALONE):
        return DGL, entry.removesuffix(ALONE)
    return entry.removesuffix(AT_SUMS_RATE), "mm"
