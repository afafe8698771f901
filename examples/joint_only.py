"""From one joint loss to a loss for each modality, with UnimodalHeads (UTD-MHAD).

JointModel has one output and one loss. It is trained three times from the same start: as it is;
with heads on its encoders and the plain sum of all losses; with heads and MMPareto. The heads are
dropped afterwards, and what is scored is JointModel each time. 3 seeds of 20 epochs unless told
otherwise.

    python joint_only.py --data DIR
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import torch
import utd_mhad
from common import Split, batches, data_parser, epochs
from sequences import SequenceEncoder, parsed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import ConflictRecorder, MMParetoOptimizer, UnimodalHeads

ENCODERS = {"inertial": "inertial_net", "skeleton": "skeleton_net"}


class JointModel(nn.Module):
    """Two encoders and a classifier of both features: (n, 6, 96), (n, 60, 48) -> (n, 27)."""

    def __init__(self) -> None:
        super().__init__()
        self.inertial_net, self.skeleton_net = SequenceEncoder(6), SequenceEncoder(60)
        self.classifier = nn.Linear(128, utd_mhad.CLASSES)

    def forward(self, inertial: Tensor, skeleton: Tensor) -> Tensor:
        features = [self.inertial_net(inertial), self.skeleton_net(skeleton)]
        logits: Tensor = self.classifier(torch.cat(features, dim=1))
        return logits


def train_joint(model: nn.Module, split: Split, options: argparse.Namespace) -> None:
    """One loss, as before."""
    opt = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)

    def step(batch: Split) -> None:
        opt.zero_grad()
        cross_entropy(model(*batch.inputs), batch.labels["mm"]).backward()
        opt.step()

    for _ in epochs(model, opt, split, options, step):
        pass


def train_with_heads(
    model: nn.Module, split: Split, options: argparse.Namespace, integration: str
) -> ConflictRecorder:
    """The joint loss, and one for each encoder."""
    heads = UnimodalHeads(model, ENCODERS, utd_mhad.CLASSES)
    base = torch.optim.SGD(heads.named_parameters(), lr=options.lr, momentum=0.9)
    opt = MMParetoOptimizer(base, integration=integration)
    recorder = ConflictRecorder()
    opt.register_step_post_hook(recorder.record)

    def step(batch: Split) -> None:
        output, unimodal = heads(*batch.inputs)
        losses = {
            name: cross_entropy(logits, batch.labels["mm"])
            for name, logits in {"mm": output, **unimodal}.items()
        }
        opt.zero_grad()
        opt.step(losses=losses)

    for _ in epochs(heads, opt, split, options, step):
        pass
    return recorder


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    order = torch.arange(len(split))
    right = [
        model(*batch.inputs).argmax(1) == batch.labels["mm"] for batch in batches(split, order)
    ]
    return 100 * float(torch.cat(right).float().mean())


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = data_parser(__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.06, help="peak (default: %(default)s)")
    parser.add_argument("--validate", action="store_true", help="score on a training subject")
    parser.add_argument("--quick", action="store_true", help="one epoch of 96 samples")
    parser.set_defaults(modalities=utd_mhad.DEFAULT)
    return parsed(parser, utd_mhad.FILE, utd_mhad.GET_DATA, arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    accuracies: dict[str, list[float]] = {"joint loss": [], "uniform": [], "mmpareto": []}
    recorders = {}
    for seed in range(options.seeds):
        train_split, test_split = utd_mhad.make_data(options, seed)
        for how, results in accuracies.items():
            torch.manual_seed(seed)
            model = JointModel()
            if how == "joint loss":
                train_joint(model, train_split, options)
            else:
                recorders[how] = train_with_heads(model, train_split, options, how)
            results.append(accuracy(model, test_split))
    print(f"Test accuracy of JointModel in %, mean and std of {options.seeds} seeds:")
    for how, results in accuracies.items():
        spread = stdev(results) if len(results) > 1 else 0.0
        print(f"{how:12}{mean(results):6.1f} ± {spread:.1f}")
    print(
        f"\nThe losses' gradients under the plain sum, last seed:\n{recorders['uniform'].summary()}"
    )


if __name__ == "__main__":
    main()
