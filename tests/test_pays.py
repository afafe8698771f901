"""The question whether it pays: statistics, replayed coefficients, a small report."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason="the benchmarks extra is not installed")
pytest.importorskip("matplotlib", reason="the benchmarks extra is not installed")

import pays
import pays_extras
import pays_runs
import pays_settings
from common import LateFusion, Split
from pays_settings import CONSTANT, MMPARETO, SHUFFLED, UNIFORM, Job

from mmpareto_optim import MMParetoOptimizer

SCALES = {"mm+a": (0.5, 2.0), "mm+b": (3.0, 0.0)}


def small_model(seed: int) -> LateFusion:
    torch.manual_seed(seed)
    encoders = {name: torch.nn.Linear(3, 4) for name in "ab"}
    return LateFusion(encoders, False, width=4, classes=5)


@pytest.mark.parametrize("seed", range(3))
def test_replayed_coefficients_reach_the_encoders_alone(seed: int) -> None:
    model = small_model(seed)
    batch = Split(
        (torch.randn(6, 3), torch.randn(6, 3)), dict.fromkeys(("mm", "a", "b"), torch.arange(6) % 5)
    )
    coefficients = {block: torch.tensor(scale) for block, scale in SCALES.items()}
    job = Job("utd_mhad", CONSTANT, 0.1, 0, True, 0.1)
    losses = pays_runs.modal_losses(model, batch, job, coefficients)
    losses["sum"].backward()
    found = {name: param.grad for name, param in model.named_parameters()}

    logits = model(*batch.inputs)
    expected = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for head in logits:
        model.zero_grad()
        cross_entropy(logits[head], batch.labels[head]).backward(retain_graph=True)
        for name, param in model.named_parameters():
            scale = 1.0
            if name.startswith("encoders"):
                scale = SCALES[f"mm+{name.split('.')[1]}"][0 if head == "mm" else 1]
            expected[name] += 0 if param.grad is None else scale * param.grad
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_watch_tells_harm_from_conflict() -> None:
    """Two losses whose gradients are chosen: agreeing, in conflict, harmful."""
    x = torch.nn.Parameter(torch.zeros(2))
    watch = pays_runs.Watch()
    optimizer = MMParetoOptimizer(torch.optim.SGD([x], lr=0.0), integration="uniform")
    for other in ((1.0, 1.0), (-0.5, 1.0), (-2.0, 0.1)):
        optimizer.zero_grad()
        losses = {"p": (x * torch.tensor([1.0, 0.0])).sum(), "q": (x * torch.tensor(other)).sum()}
        optimizer.step(losses=losses)
        watch.look(optimizer)
    seen = watch.result(keep=True)
    assert seen["conflict"] == {"p+q": pytest.approx(66.667)}
    assert seen["harmful"] == {"p+q": pytest.approx(33.333)}
    assert seen["coefficients"] == {"p+q": [[1, 1]] * 3}


def test_products_across_parts_leave_out_those_within_one() -> None:
    rows = torch.randn(5, 3, 2, 4, dtype=torch.float64)  # steps, parts, losses, numbers
    watch, products = pays_runs.Watch(), pays_runs.AcrossParts()
    for parts in rows:
        products.add([{"mm+a": part} for part in parts])
        watch.grams.setdefault("mm+a", []).append(parts.sum(0) @ parts.sum(0).T)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    gram = sum(parts[i] @ parts[j].T for parts in rows for i, j in pairs)
    assert isinstance(gram, torch.Tensor)
    torch.testing.assert_close(products.sums["mm+a"], gram)
    cosines = [torch.cosine_similarity(parts[:, 0].sum(0), parts[:, 1].sum(0), 0) for parts in rows]
    assert products.result(watch)["cosine"]["mm+a"] == pytest.approx(float(np.median(cosines)))


def test_gradients_of_the_encoders_are_those_of_each_loss() -> None:
    model = small_model(0)
    logits = model(torch.randn(6, 3), torch.randn(6, 3))
    losses = {head: cross_entropy(output, torch.arange(6) % 5) for head, output in logits.items()}
    found = pays_runs.encoder_gradients(model, losses)
    assert list(found) == ["mm+a", "mm+b"]
    expected = torch.autograd.grad(losses["b"], list(model.encoders["b"].parameters()))
    flat = torch.cat([piece.flatten() for piece in expected])
    torch.testing.assert_close(found["mm+b"][1], flat.double())


def test_a_replay_is_the_mean_or_a_permutation(tmp_path: Path) -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]]
    for method in (CONSTANT, SHUFFLED):
        job = Job("helmholtz", method, 0.1, 0, False, 0.2)
        result = {"result": {"error": 1.0, "coefficients": {"net": rows}}}
        job.source.path(tmp_path).write_text(json.dumps(result))
        found = pays_runs.replay(job, tmp_path)["net"]
        if method == CONSTANT:
            torch.testing.assert_close(found, torch.tensor([[4.0, 5.0]]).expand(3, 2))
        else:
            assert sorted(found.tolist()) == rows


def short(setting: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    rates = pays_settings.SETTINGS[setting].rates[:2]
    made = replace(pays_settings.SETTINGS[setting], length=1, rates=rates, tuning=(100,), **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(pays_settings.SETTINGS, setting, made)


def page_for(settings: list[str], folder: Path) -> Path:
    path = folder / "evidence.md"
    names = ["verdicts", "shares", "lengths", "rules", "sweep burgers", "batches", "noise"]
    names += settings
    path.write_text("\n".join(f"<!-- {name} -->\n<!-- end of {name} -->" for name in names))
    return path


@pytest.mark.slow
def test_a_small_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")
    threads = torch.get_num_threads()
    random = np.random.default_rng(0)
    label, subject = (x.ravel() for x in np.meshgrid(np.arange(27), np.arange(1, 9)))
    np.savez(
        tmp_path / "utd_mhad.npz",
        inertial=random.normal(size=(216, 96, 6)).astype(np.float32),
        skeleton=random.normal(size=(216, 48, 20, 3)).astype(np.float32),
        label=label,
        subject=subject,
    )
    for setting in ("utd_mhad", "burgers"):
        short(setting, monkeypatch)
    monkeypatch.setattr(pays_runs, "POINTS", 16)
    for name, fewer in (("BATCHES", (32,)), ("SCALED", ()), ("SEEDS", range(3))):
        monkeypatch.setattr(pays_extras, name, fewer)
    page = page_for(["utd_mhad", "burgers"], tmp_path)
    arguments = ["--settings", "utd_mhad", "burgers", "--data", str(tmp_path), "--seeds", "3"]
    arguments += [
        "--extras",
        "--workers",
        "1",
        "--results",
        str(tmp_path / "runs"),
        "--output",
        str(page),
    ]
    pays.main(arguments)
    torch.set_num_threads(threads)
    text = page.read_text()
    assert "| UTD-MHAD, inertial and skeleton |" in text
    assert "| Burgers equation |" in text
    assert all(f"| {method} |" in text for method in (UNIFORM, MMPARETO, CONSTANT, SHUFFLED))
    assert all(f"| Burgers equation | {rule} |" in text for rule in (MMPARETO, "ConFIG", "UPGrad"))
    assert "| the plain sum, best of so many weights |" in text
    assert re.search(r"\| 32 \|( \d+\.\d % \|){4} \d+\.\d \| [+-]", text)
    assert re.search(r"\| 32 \|( -?(\d\.\d\d|nan) \|){4}", text)
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")
    head, *runs = map(json.loads, (tmp_path / "evidence_runs.jsonl").read_text().splitlines())
    assert head["runs"] == len(runs)

    # Nothing is trained twice, and the page comes out the same.
    monkeypatch.setattr(pays, "perform", pytest.fail)
    pays.main(arguments)
    assert page.read_text() == text


def test_holm_within_a_claim_and_signs() -> None:
    pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")
    import pays_statistics

    def row(claim: str, p: float, difference: float = 1.0) -> pays_statistics.Row:
        low, high = sorted((0.5 * difference, 1.5 * difference))
        return pays_statistics.Row(claim, "utd_mhad", "other", difference, low, high, p)

    rows = [row("a", 0.01), row("a", 0.04), row("a", 0.03, -1.0), row("b", 0.04, -1.0)]
    found = pays_statistics.corrected(rows)
    assert [r.p for r in found] == pytest.approx([0.03, 0.06, 0.06, 0.04])
    assert [r.verdict for r in found] == ["better", "undecided", "undecided", "worse"]
    assert replace(rows[0], low=-0.1).verdict == "undecided"  # the interval has a say too


def test_a_factor_on_the_error_is_below_1_where_mmpareto_is_better() -> None:
    pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")
    import pays_statistics

    random = np.random.default_rng(0)
    theirs = random.normal(0, 0.1, 12)
    better = pays_statistics.compared("a", "burgers", "other", list(theirs + 0.3), list(theirs))
    assert better.verdict == "better"
    assert better.measured.startswith("x 0.50 [0.50, 0.50]")
    same = pays_statistics.compared("a", "burgers", "other", list(theirs), list(theirs))
    assert same.verdict == "undecided"


def test_a_page_without_its_marks_is_refused() -> None:
    pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")
    import pays_page

    with pytest.raises(ValueError, match="0 places between <!-- verdicts -->"):
        pays_page.filled("text", "verdicts", "table")


def test_settings_with_data_need_its_folder() -> None:
    with pytest.raises(SystemExit):
        pays.parse(["--settings", "utd_mhad"])
    assert pays.parse([]).settings == ["digits", "helmholtz", "burgers"]
