"""Feature-space and exact integration compared on the examples' data; writes FEATURE_SPACE.md.

    python experiments/feature_space.py                  # scikit-learn's digits
    python experiments/feature_space.py --data DIR   # and spoken with written digits

For each seed both start from the same weights and see the same batches. At each step of the
exact run the cosines at the features are taken as well, of the same losses at the same state:
how often they have the sign of the exact ones is the *agreement*. *Persistence* is how often
an exact cosine has the sign of the step before, which is what reusing coefficients would
rely on.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples"))

import audio_visual_digits  # noqa: E402
import colored_gray_digits  # noqa: E402
import multimnist  # noqa: E402
from common import Split, accuracy, batches, epochs  # noqa: E402

from mmpareto_optim import MMParetoOptimizer  # noqa: E402

EXAMPLES = {
    "colored_gray_digits": colored_gray_digits,
    "multimnist": multimnist,
    "audio_visual_digits": audio_visual_digits,
}
METHODS = ("uniform", "exact", "feature-space")


@dataclass
class Run:
    """Test accuracy in % by head; by encoder the cosines of each step, (exact, at the feature)."""

    accuracy: dict[str, float]
    cosines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def train(example: str, method: str, seed: int, options: argparse.Namespace) -> Run:
    module = EXAMPLES[example]
    train_split, test_split = module.make_data(options, seed)
    torch.manual_seed(seed)
    model = module.make_model(False)
    sgd = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    optimizer = MMParetoOptimizer(sgd, integration="uniform" if method == "uniform" else "mmpareto")
    run = Run({})
    take_step = partial(step, model, optimizer, method, run)
    for _ in epochs(model, optimizer, train_split, options, take_step):
        pass
    run.accuracy = accuracy(model, batches(test_split, torch.arange(len(test_split)), 1000))
    return run


def step(model: Any, optimizer: MMParetoOptimizer, method: str, run: Run, batch: Split) -> None:
    features = model.features(*batch.inputs)
    logits = model.logits(features)
    losses = {head: cross_entropy(logits[head], batch.labels[head]) for head in logits}
    at_features = cosines_at(features, losses) if method == "exact" else {}
    optimizer.zero_grad()
    optimizer.step(losses=losses, features=features if method == "feature-space" else None)
    for objectives, cosine in at_features.items():
        found = next(s for s in optimizer.stats.values() if s.objectives == objectives)
        pair = (float(found.cosine), cosine)
        run.cosines.setdefault("+".join(objectives), []).append(pair)


def cosines_at(
    features: dict[str, Tensor], losses: dict[str, Tensor]
) -> dict[tuple[str, ...], float]:
    """By the names of the losses that reach a feature, the cosine of their gradients there."""
    cosines = {}
    for feature in features.values():
        found = {
            name: torch.autograd.grad(loss, feature, retain_graph=True, allow_unused=True)[0]
            for name, loss in losses.items()
        }
        rows = {name: g.flatten() for name, g in found.items() if g is not None}
        one, other = rows.values()
        cosines[tuple(rows)] = float(cosine_similarity(one, other, dim=0))
    return cosines


def interval(differences: list[float]) -> str:
    """Mean and 95 % confidence interval (Student's t) of paired differences."""
    values = np.array(differences)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def page(example: str, runs: dict[str, list[Run]]) -> str:
    heads = list(runs["exact"][0].accuracy)
    lines = [
        f"## {example}\n",
        f"Test accuracy in %, mean ± std over {len(runs['exact'])} seeds.\n",
        "| | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for method, done in runs.items():
        columns = [np.array([run.accuracy[head] for run in done]) for head in heads]
        cells = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for title, other in (("exact", "exact"), ("uniform", "uniform")):
        pairs = list(zip(runs["feature-space"], runs[other], strict=True))
        cells = [interval([a.accuracy[h] - b.accuracy[h] for a, b in pairs]) for h in heads]
        lines.append(f"| feature-space minus {title}, 95 % interval | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| encoder | conflict, exact % | conflict, at the feature % | agreement % | correlation "
        "| persistence % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for block in runs["exact"][0].cosines:
        curves = [np.array(run.cosines[block]) for run in runs["exact"]]
        both = np.concatenate(curves)
        signs = both < 0
        stays = np.concatenate([(c[1:, 0] < 0) == (c[:-1, 0] < 0) for c in curves])
        lines.append(
            f"| {block} | {100 * signs[:, 0].mean():.1f} | {100 * signs[:, 1].mean():.1f} "
            f"| {100 * (signs[:, 0] == signs[:, 1]).mean():.1f} "
            f"| {np.corrcoef(both.T)[0, 1]:.2f} | {100 * stays.mean():.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES)
    parser.add_argument("--data", type=Path, help="MNIST and FSDD; see audio_visual_digits.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=FOLDER / "FEATURE_SPACE.md")
    options = parser.parse_args()
    names = options.examples or [n for n in EXAMPLES if "audio" not in n or options.data]
    digits = argparse.Namespace(data=None, validate=False, lr=0.1, epochs=30)
    spoken = argparse.Namespace(
        data=options.data, split="recording", validate=False, quick=False, lr=0.03, epochs=8
    )
    seeds = range(options.seed, options.seed + options.seeds)
    results: dict[str, dict[str, list[Run]]] = {}
    for name in names:
        settings = spoken if name == "audio_visual_digits" else digits
        results[name] = {method: [] for method in METHODS}
        jobs = [(seed, method) for seed in seeds for method in METHODS]
        for seed, method in track(jobs, description=name):
            results[name][method].append(train(name, method, seed, settings))
    head = (
        "# Feature-space integration compared with the exact one\n\n"
        f"{platform.machine()} CPU, PyTorch {torch.__version__}, seeds {seeds.start} to "
        f"{seeds.stop - 1}. Written by `experiments/feature_space.py`; its docstring says what the "
        "columns are.\n"
    )
    options.output.write_text("\n".join([head, *(page(n, runs) for n, runs in results.items())]))
    scores = {
        name: {method: [asdict(run)["accuracy"] for run in done] for method, done in runs.items()}
        for name, runs in results.items()
    }
    options.output.with_suffix(".json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
