"""What pays.py trains: the settings, the methods, and a job for each training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 64
Result = dict[str, Any]

UNIFORM, MMPARETO, JOINT, ALONE = "uniform", "MMPareto", "one joint loss", "alone"
CONSTANT, SHUFFLED = "constant coefficients", "shuffled coefficients"
REPLAYS = (CONSTANT, SHUFFLED)


def unimodal_alone(gram: Tensor) -> Tensor:
    """Encoders by their unimodal gradient alone; the joint loss comes first."""
    return torch.tensor([0.0, 1.0]).to(gram)


INTEGRATIONS: dict[str, dict[str, Any]] = {
    JOINT: {"integration": "uniform"},
    UNIFORM: {"integration": "uniform"},
    "uniform x 1.5": {"integration": "uniform", "gamma": 1.5},
    "uniform x 2": {"integration": "uniform", "gamma": 2.0},
    "uniform x 3": {"integration": "uniform", "gamma": 3.0},
    MMPARETO: {},
    "MMPareto, gamma 1": {"gamma": 1.0},
    "MMPareto, gamma 2": {"gamma": 2.0},
    "MMPareto, gamma 3": {"gamma": 3.0},
    "conventional Pareto": {"integration": "pareto"},
    "dual projection": {"integration": "dualproj"},
    "ConFIG": {"integration": "config"},
    "UPGrad": {"integration": "upgrad"},
    "unimodal gradients": {"integration": unimodal_alone},
    ALONE: {"integration": "uniform"},
}
RULES = ("conventional Pareto", "dual projection", "ConFIG", "UPGrad")
SCALINGS = (UNIFORM, "uniform x 1.5", "uniform x 2", "uniform x 3")
GAMMAS = ("MMPareto, gamma 1", MMPARETO, "MMPareto, gamma 2", "MMPareto, gamma 3")
# Fixed weights of the boundary's and the initial conditions' losses beside the residual's.
WEIGHTS = {f"weight {weight:g}": weight for weight in (1e-2, 1e-1, 1e1, 1e2, 1e3)}


@dataclass(frozen=True)
class Setting:
    """What is trained, how long and with which rates; ``seconds`` a run, roughly, on one core."""

    title: str
    rates: tuple[float, ...]
    length: int  # epochs, or steps of a physics-informed network
    seeds: int
    tuning: tuple[int, ...]  # seeds of the validation
    seconds: float
    example: str = ""  # the file of examples/ that makes data and model
    modalities: tuple[str, ...] = ()
    split: str = ""
    file: str = ""  # in the folder of the data; none for data that scikit-learn brings

    @property
    def physics(self) -> bool:
        return not self.modalities

    @property
    def methods(self) -> tuple[str, ...]:
        if self.physics:
            return (UNIFORM, MMPARETO, *RULES, *WEIGHTS, *REPLAYS)
        return (*INTEGRATIONS, *REPLAYS)

    @property
    def scalarizations(self) -> tuple[str, ...]:
        """Plain sums among which validation chooses the best."""
        return (UNIFORM, *WEIGHTS) if self.physics else SCALINGS

    @property
    def variants(self) -> tuple[str, ...]:
        """Of MMPareto: with Adam a factor changes nothing, so physics has one."""
        return (MMPARETO,) if self.physics else GAMMAS


_SGD = (0.01, 0.03, 0.1, 0.3)
_ADAM = (3e-3, 1e-2, 3e-2)
_LETTERS: dict[str, Any] = {
    "rates": _SGD,
    "length": 20,
    "seeds": 10,
    "tuning": tuple(range(100, 104)),
    "seconds": 1.6,
    "example": "avletters",
    "modalities": ("audio", "lips"),
    "file": "avletters.npz",
}
SETTINGS = {
    "utd_mhad": Setting(
        "UTD-MHAD, inertial and skeleton",
        _SGD,
        length=20,
        seeds=20,
        tuning=tuple(range(100, 108)),  # each of four subjects twice
        seconds=1.4,
        example="utd_mhad",
        modalities=("inertial", "skeleton"),
        file="utd_mhad.npz",
    ),
    "avletters_talker": Setting("AVLetters, by talker", split="talker", **_LETTERS),
    "avletters_repetition": Setting("AVLetters, by repetition", split="repetition", **_LETTERS),
    "digits": Setting(
        "Digits, gray and coloured",
        _SGD,
        length=20,
        seeds=10,
        tuning=tuple(range(100, 104)),
        seconds=3,
        example="colored_gray_digits",
        modalities=("gray", "colour"),
    ),
    "spoken_digits": Setting(
        "Digits, spoken and written",
        _SGD,
        length=4,
        seeds=10,
        tuning=(100, 101),
        seconds=9,
        example="audio_visual_digits",
        modalities=("audio", "visual"),
        split="recording",
        file="fsdd.npz",
    ),
    "helmholtz": Setting("Helmholtz equation", _ADAM, 2000, 20, (100, 101, 102, 103), 8),
    "burgers": Setting("Burgers equation", _ADAM, 4000, 20, (100, 101), 16),
}


@dataclass(frozen=True)
class Job:
    """One training; ``validate`` scores it on held-out training data or seeds.

    A replay takes the coefficients of MMPareto's run of the same seed at ``source_lr``. ``scale``
    multiplies the second loss; ``batch`` is the size of the batches. With ``parts`` of more than 1,
    each batch is differentiated in as many, to tell conflicts from noise.
    """

    setting: str
    method: str
    lr: float
    seed: int
    validate: bool
    source_lr: float | None = None
    scale: float = 1.0
    batch: int = BATCH
    parts: int = 1

    @property
    def cost(self) -> float:
        return SETTINGS[self.setting].seconds

    @property
    def source(self) -> Job:
        """MMPareto's run whose coefficients a replay takes."""
        assert self.source_lr is not None
        return Job(self.setting, MMPARETO, self.source_lr, self.seed, self.validate)

    def path(self, folder: Path) -> Path:
        parts = [self.setting, self.method, f"{self.lr:g}", self.seed]
        parts += ["validation"] * self.validate
        parts += [f"from {self.source_lr:g}"] if self.source_lr is not None else []
        parts += [f"scale {self.scale:g}"] if self.scale != 1 else []
        parts += [f"batch {self.batch}"] if self.batch != BATCH else []
        parts += [f"parts {self.parts}"] if self.parts != 1 else []
        return folder / ("_".join(map(str, parts)).replace(" ", "-").replace(",", "") + ".json")


def find(job: Job, folder: Path) -> Result | None:
    """The result of a finished job, without its coefficients."""
    path = job.path(folder)
    return _read(path) if path.is_file() else None


@cache
def _read(path: Path) -> Result:
    result: Result = json.loads(path.read_text())["result"]
    result.pop("coefficients", None)
    return result
