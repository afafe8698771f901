"""The question whether it pays: gradients of the methods, tuning, statistics, a small report."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason="the benchmarks extra is not installed")
pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")

import pages
import pays
import pays_runs
import pays_settings
import pays_statistics
import tabular
from common import LateFusion, Split
from pays_finished import Finished
from pays_settings import AT_SUMS_RATE, DGL, ENSEMBLE, JOINT, MMPARETO, SUMS, UNIFORM, Job
from pays_statistics import Row

from mmpareto_optim import BlockStats, MMParetoOptimizer


def small_model() -> tuple[LateFusion, Split]:
    """Three modalities and a batch."""
    encoders = {name: nn.Linear(3, 4) for name in "abc"}
    inputs = tuple(torch.randn(6, 3) for _ in encoders)
    labels = dict.fromkeys(("mm", *encoders), torch.arange(6) % 5)
    return LateFusion(encoders, joint=False, width=4, classes=5), Split(inputs, labels)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    model.zero_grad()
    return found


@pytest.mark.parametrize("method", SUMS)
def test_sums_scale_what_reaches_the_encoders_alone(method: str) -> None:
    model, batch = small_model()
    joint, own = SUMS[method]
    torch.stack(list(pays_runs.losses_of(model, batch, joint, own).values())).sum().backward()
    found = gradients(model)

    outputs = model(*batch.inputs)
    of = {}
    for head, output in outputs.items():
        cross_entropy(output, batch.labels[head]).backward(retain_graph=True)
        of[head] = gradients(model)
    for name, gradient in found.items():
        part, owner, *_ = name.split(".")
        if part == "encoders":
            expected = joint * of["mm"][name] + own * of[owner][name]
        else:
            expected = of["mm" if part == "mm_head" else owner][name]
        torch.testing.assert_close(gradient, expected, msg=name)


@pytest.mark.parametrize("method", ["uniform x 1.5", "uniform x 3"])
def test_sums_are_what_the_library_calls_uniform(method: str) -> None:
    model, batch = small_model()
    losses = pays_runs.losses_of(model, batch, *SUMS[method])
    torch.stack(list(losses.values())).sum().backward()
    found = gradients(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = MMParetoOptimizer(sgd, integration="uniform", gamma=SUMS[method][0])
    optimizer.backward(pays_runs.losses_of(model, batch, 1.0, 1.0))
    assert {"mm+a", "mm+b", "mm+c"} <= set(optimizer.stats)
    torch.testing.assert_close(found, gradients(model))


def test_the_ensemble_is_the_mean_of_the_probabilities() -> None:
    class Fixed(nn.Module):
        heads = ("a", "b")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            sure, doubtful = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
            return {"mm": -x, "a": sure.expand_as(x), "b": doubtful.expand_as(x)}

    test = Split((torch.eye(3),), {"mm": torch.tensor([0, 0, 1])})
    found = pays_runs.accuracies(Fixed(), test)  # type: ignore[arg-type]
    expected = {"mm": 100 / 3, "a": 200 / 3, "b": 100 / 3, ENSEMBLE: 200 / 3}
    assert found == pytest.approx(expected, abs=1e-3)


def test_shares_tell_harm_from_conflict() -> None:
    """Pairs of gradients that agree, are in conflict, and whose sum harms the first."""
    pairs = [[[1.0, 0.0], other] for other in ([1.0, 1.0], [-0.5, 1.0], [-2.0, 0.1])]
    rows = [torch.tensor(pair) for pair in pairs]
    stats = [BlockStats(("mm", "a"), row @ row.T, torch.ones(2)) for row in rows]
    found = pays_runs.shares({"mm+a": stats})
    assert found == {"conflict": {"mm+a": 66.667}, "harmful": {"mm+a": 33.333}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTAD with a few methods for an epoch."""
    made = replace(
        pays_settings.SETTINGS["htad"], epochs=1, seeds=3, methods=(JOINT, UNIFORM, MMPARETO, DGL)
    )
    monkeypatch.setitem(pays_settings.SETTINGS, "htad", made)


def scored(finished: Finished, jobs: list[Job], score: float) -> None:
    """As if these were finished, with a score for all heads."""
    heads = dict.fromkeys(("mm", "audio", "motion", ENSEMBLE), score)
    finished.results |= {job: {"accuracy": heads} for job in jobs}


@pytest.mark.usefixtures("small")
def test_tuning_in_two_rounds(tmp_path: Path) -> None:
    """The rate at which both first seeds do best does worst with the others."""
    finished = Finished(tmp_path / "runs.jsonl")
    assert finished.seeds("htad") == range(0)
    stages = finished.stages("htad", 4)
    rates = pays_settings.SGD_RATES
    first = next(stages)
    assert {job.seed for job in first} == {100, 101}
    assert len(first) == 2 * 4 * len(rates)
    for place, lr in enumerate(rates):
        scored(finished, [job for job in first if job.lr == lr], 50 + place)
    second = next(stages)
    assert {job.lr for job in second} == set(rates[-3:])
    assert {job.seed for job in second} == set(range(100, 108))
    left = [job for job in second if job not in finished.results]
    assert len(left) == 4 * 3 * 6
    for place, lr in enumerate(rates):
        jobs = [job for job in left if job.lr == lr]
        scored(finished, [job for job in jobs if job.method != UNIFORM], 90 - place)
        scored(finished, [job for job in jobs if job.method == UNIFORM], 80 + place)
    assert finished.rate("htad", MMPARETO) == rates[-3]
    assert finished.rate("htad", MMPARETO + AT_SUMS_RATE) == rates[-1]
    report = next(stages)
    tried = {(job.method, job.lr) for job in report}
    assert tried == {
        *((method, rates[-3]) for method in (JOINT, MMPARETO, DGL)),
        *((method, rates[-1]) for method in (UNIFORM, MMPARETO)),
    }
    assert not any(job.validate for job in report)
    scored(finished, [job for job in report if job.seed != 3], 70.0)
    assert finished.seeds("htad") == range(3)

    # Runs that end below half of the sum's median have failed.
    for seed, score in ((0, 34.9), (1, 35.1)):
        scored(finished, [Job("htad", DGL, rates[-3], seed, False)], score)
    assert pays_statistics.failed("htad", DGL, finished) == 1
    assert pays_statistics.failed("htad", UNIFORM, finished) == 0


def arrays_of_htad(path: Path) -> None:
    random = np.random.default_rng(0)
    label = np.arange(210) % 7
    means = random.normal(size=(7, 52))
    values = (means[label] + random.normal(size=(210, 52))).astype(np.float32)
    np.savez(path, audio=values[:, :36], motion=values[:, 36:], label=label)


def page_for(path: Path) -> None:
    names = [
        "summary",
        "choices",
        "accuracies",
        "adamw",
        "rules",
        "at the sum's rate",
        "shares",
        "heads",
    ]
    names += pays_settings.SETTINGS
    path.write_text("\n".join(f"<!-- {name} -->\n<!-- end of {name} -->" for name in names))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("small", "_one_thread")
def test_a_small_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays_of_htad(tmp_path / "htad.npz")
    monkeypatch.setattr(pays_settings, "SGD_RATES", (0.03, 0.1, 0.3, 0.9))
    page = tmp_path / "page.md"
    page_for(page)
    arguments = ["--data", str(tmp_path), "--settings", "htad", "--workers", "1"]
    arguments += ["--output", str(page)]
    pays.main(arguments)
    text = page.read_text()
    names = (JOINT, UNIFORM, MMPARETO, DGL, ENSEMBLE, "audio alone", "motion alone")
    assert all(f"\n| {name} | 0." in text for name in names)
    assert "\n| HTAD | mm+motion | " in text
    assert text.count("Not run to the end.") == len(pays_settings.SETTINGS) - 1
    runs = (tmp_path / "page.jsonl").read_text()

    # Nothing is trained twice; another seed needs its own runs only.
    done: list[Job] = []

    def noted(job: Job, data: Path | None) -> pays_settings.Result:
        done.append(job)
        return pays_runs.perform(job, data)

    monkeypatch.setattr(pays, "perform", noted)
    pays.main(arguments)
    assert done == []
    assert page.read_text() == text
    pays.main([*arguments, "--seeds", "4"])
    assert {job.seed for job in done} == {3}
    assert page.read_text() != text
    assert (tmp_path / "page.jsonl").read_text().startswith(runs)


@pytest.mark.parametrize("table", [tabular.HTAD, tabular.ROSMAP])
@pytest.mark.parametrize("validate", [False, True])
def test_tables_are_split_and_standardised(
    data_dir: Path, table: tabular.Table, validate: bool
) -> None:
    if not (data_dir / table.file).is_file():
        pytest.skip(f"no {table.file} in MMPARETO_DATA")
    options = Namespace(data=data_dir, validate=validate)
    splits = [table.make_data(options, seed) for seed in (0, 1)]
    (train, test), (other, _) = splits
    for x, name in zip(train.inputs, table.features, strict=True):
        assert x.shape[1] == table.features[name]
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
    whole = 245 if table.has_split else 970
    if validate:
        assert len(train) + len(test) == whole
    else:
        assert len(train) == whole
    if table.has_split and not validate:
        torch.testing.assert_close(train.inputs, other.inputs)
    else:
        assert not torch.equal(train.inputs[0], other.inputs[0])
    counts = [split.labels["mm"].bincount() / len(split) for split in (train, test)]
    torch.testing.assert_close(*counts, atol=0.02, rtol=0)


def test_holm_within_a_question_and_signs() -> None:
    def row(question: str, p: float, difference: float = 1.0) -> Row:
        low, high = sorted((0.5 * difference, 1.5 * difference))
        return Row(question, "htad", "ours", "theirs", difference, low, high, p)

    rows = [row("a", 0.01), row("a", 0.04), row("a", 0.03, -1.0), row("b", 0.04, -1.0)]
    found = pays_statistics.corrected(rows)
    assert [r.p for r in found] == pytest.approx([0.03, 0.06, 0.06, 0.04])
    assert [r.verdict for r in found] == ["better", "undecided", "undecided", "worse"]


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places between <!-- summary -->"):
        pages.filled("text", "summary", "table")
