"""The Hugging Face Trainer on models of transformers itself, against loops by hand."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer
from tests.frameworks.loops import hf_trainer
from tests.models import LateFusion, audio_visual_batch

transformers = pytest.importorskip("transformers", reason="the integrations extra is missing")
pytest.importorskip("accelerate", reason="the integrations extra is missing")

# The libraries warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

Row = dict[str, Tensor]
LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {**LAYERS, "vocab_size": 30, "max_position_embeddings": 8}
IMAGE = {**LAYERS, "image_size": 8, "patch_size": 4}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Towers(transformers.CLIPModel):  # type: ignore[misc, name-defined]
    """CLIP, with a head on each tower: a contrastive loss and two unimodal ones."""

    def __init__(self) -> None:
        tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        super().__init__(
            transformers.CLIPConfig(
                text_config={**TEXT, **tokens, "projection_dim": 8},
                vision_config={**IMAGE, "projection_dim": 8},
                projection_dim=8,
            )
        )
        self.text_head, self.image_head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> dict[str, Any]:
        out = super().forward(input_ids=input_ids, pixel_values=pixel_values, return_loss=True)
        text, image = self.text_head(out.text_embeds), self.image_head(out.image_embeds)
        losses = {
            "contrastive": out.loss,
            "text": cross_entropy(text, labels),
            "image": cross_entropy(image, labels),
        }
        return {"loss": losses["contrastive"], "losses": losses, "logits": text + image}


class TowersAtFeatures(Towers):
    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> dict[str, Any]:
        out = transformers.CLIPModel.forward(
            self, input_ids=input_ids, pixel_values=pixel_values, return_loss=True
        )
        losses = {
            "contrastive": out.loss,
            "text": cross_entropy(self.text_head(out.text_embeds), labels),
            "image": cross_entropy(self.image_head(out.image_embeds), labels),
        }
        features = {"text": out.text_embeds, "image": out.image_embeds}
        return {"loss": out.loss, "losses": losses, "features": features}


class Flava(transformers.FlavaForPreTraining):  # type: ignore[misc, name-defined]
    """FLAVA as it comes: the losses of a batch depend on the modalities that it has."""

    def __init__(self) -> None:
        super().__init__(
            transformers.FlavaConfig(
                text_config=TEXT,
                image_config={**IMAGE, "vocab_size": 20},
                multimodal_config=LAYERS,
                hidden_size=16,
                projection_dim=8,
                init_codebook=False,
            )
        )

    def forward(self, **inputs: Any) -> Any:
        out = super().forward(**inputs, return_loss=True)
        losses = {each.name: getattr(out.loss_info, each.name) for each in fields(out.loss_info)}
        return {"loss": out.loss, "losses": losses}


def captioned(count: int) -> list[Row]:
    return [
        {
            "input_ids": torch.randint(3, 30, (6,)),
            "pixel_values": torch.randn(3, 8, 8),
            "labels": torch.randint(3, ()),
        }
        for _ in range(count)
    ]


def masked(count: int) -> list[Row]:
    """Pairs of which every second token and patch is to be guessed."""
    odd = torch.arange(6) % 2 == 1
    rows = []
    for row in captioned(count):
        ids = row["input_ids"]
        rows.append(
            {
                "input_ids": ids,
                "input_ids_masked": ids.masked_fill(odd, 3),
                "mlm_labels": ids.masked_fill(~odd, -100),
                "pixel_values": row["pixel_values"],
                "mim_labels": torch.randint(20, (4,)),
                "bool_masked_pos": odd[:4],
                "itm_labels": torch.tensor(1),
            }
        )
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batches_of(rows: list[Row], size: int = 4) -> list[dict[str, Tensor]]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def trainer_of(
    model: nn.Module, folder: Path, rows: list[Row], *, given: Any = None, **options: Any
) -> Any:
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "remove_unused_columns": False,
    }
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collate}
    given = {"optimizers": (MMParetoOptimizer(sgd(model)), None)} if given is None else given
    return hf_trainer(model, folder, {**settings, **options}, **data, **given)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def by_hand(
    model: nn.Module,
    opt: MMParetoOptimizer,
    batches: list[dict[str, Tensor]],
    accumulate: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The oracle: the loop that the README shows, with clipping."""
    model.train()
    for number, batch in enumerate(batches, start=1):
        output = model(**deepcopy(batch))
        losses = {
            name: loss / accumulate for name, loss in output["losses"].items() if loss is not None
        }
        opt.backward(losses, features=output.get("features"))
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
            after_step()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert a.equal(b), name


def encoders(model: Any) -> dict[str, nn.Module]:
    return {"text": model.text_model, "image": model.vision_model}


@pytest.mark.parametrize(
    ("options_of", "blocks"),
    [
        (lambda model: {}, {"contrastive+text", "contrastive+image"}),
        (lambda model: {"rescale": "tensor"}, {"contrastive+text", "contrastive+image"}),
        (lambda model: {"param_groups_by_modality": encoders(model)}, {"text", "image"}),
    ],
    ids=["as it comes", "rescale", "named blocks"],
)
@pytest.mark.parametrize("gives_a_class", [False, True])
def test_two_towers(tmp_path: Path, options_of: Any, blocks: set[str], gives_a_class: bool) -> None:
    """The Trainer divides the total by the steps of an accumulation, and clips."""
    model, rows = Towers(), captioned(16)
    plain = deepcopy(model)
    given: dict[str, Any] = {
        "optimizers": (MMParetoOptimizer(sgd(model), **options_of(model)), None)
    }
    if gives_a_class:
        kind = MMParetoOptimizer.around(torch.optim.SGD, **options_of(model))
        given = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.1, "momentum": 0.9})}
    trainer = trainer_of(model, tmp_path, rows, given=given, gradient_accumulation_steps=2)
    trainer.train()
    opt = MMParetoOptimizer(sgd(plain), **options_of(plain))
    by_hand(plain, opt, batches_of(rows), 2)
    assert_same(model, plain)
    assert set(trainer.optimizer.optimizer.stats) == blocks


def test_features_of_the_output(tmp_path: Path) -> None:
    model, rows = TowersAtFeatures(), captioned(16)
    plain = deepcopy(model)
    trainer = trainer_of(model, tmp_path, rows)
    trainer.train()
    by_hand(plain, MMParetoOptimizer(sgd(plain)), batches_of(rows))
    assert_same(model, plain)
    assert trainer.optimizer.optimizer.stats["text"].objectives == ("contrastive", "text")


def test_a_batch_without_a_modality_has_losses_that_are_none(tmp_path: Path) -> None:
    pairs = masked(16)
    of_text = ("input_ids", "input_ids_masked", "mlm_labels")
    of_image = ("pixel_values", "mim_labels", "bool_masked_pos")
    rows = [
        *pairs[:4],
        *({name: row[name] for name in of_text} for row in pairs[4:8]),
        *({name: row[name] for name in of_image} for row in pairs[8:12]),
        *pairs[12:],
    ]
    model = Flava()
    plain = deepcopy(model)
    trainer = trainer_of(model, tmp_path, rows)
    trainer.train()
    opt = MMParetoOptimizer(sgd(plain))
    by_hand(plain, opt, batches_of(rows))
    assert_same(model, plain)
    assert set(opt.stats) == set(trainer.optimizer.optimizer.stats)
    # All four losses of pairs meet in the encoders; the heads of masked pairs have one each.
    assert "itm+global_contrastive+mmm_image+mmm_text" in opt.stats


def test_the_mode_of_a_schedule_free_optimizer(tmp_path: Path) -> None:
    """It evaluates at averaged parameters, and trains on at its own."""
    schedulefree = pytest.importorskip("schedulefree")
    model, rows = Towers(), captioned(16)
    plain = deepcopy(model)
    averaging = MMParetoOptimizer(schedulefree.SGDScheduleFree(model.parameters(), lr=0.1))
    often = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(model, tmp_path, rows, given={"optimizers": (averaging, None)}, **often)
    trainer.train()

    opt = MMParetoOptimizer(schedulefree.SGDScheduleFree(plain.parameters(), lr=0.1))
    evaluated = []

    def evaluate() -> None:
        opt.eval()
        plain.eval()
        with torch.no_grad():
            each = [sum(plain(**batch)["losses"].values()) for batch in batches_of(rows)]
        evaluated.append(float(torch.stack(each).mean()))
        if len(evaluated) < 4:  # the last evaluation leaves the averaged parameters
            plain.train()
            opt.train()

    opt.train()
    by_hand(plain, opt, batches_of(rows), after_step=evaluate)
    assert_same(model, plain)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == pytest.approx(evaluated, rel=1e-5)


def test_metrics_are_of_the_logits_alone(tmp_path: Path) -> None:
    model, rows = Towers(), captioned(10)
    seen: list[Any] = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        hits = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"accuracy": float(hits.mean())}

    trainer = trainer_of(model, tmp_path, rows, given={"compute_metrics": accuracy})
    found = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        whole = collate(rows)
        logits = model(**whole)["logits"]
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), logits)
    expected = float((logits.argmax(-1) == whole["labels"]).float().mean())
    assert found["eval_accuracy"] == pytest.approx(expected)
    assert found["eval_loss"] > 0


class Pairs(LateFusion):
    """What the Trainer wants of a model: a forward that takes a batch by keywords."""

    def forward(self, spec: Tensor, image: Tensor, labels: Tensor) -> dict[str, Any]:
        losses = self.losses((spec, image, labels))
        return {"loss": losses["mm"], "losses": losses}


def paired(count: int = 32) -> list[Row]:
    spec, image, labels = audio_visual_batch(count)
    return [{"spec": spec[i], "image": image[i], "labels": labels[i]} for i in range(count)]


ACCUMULATING = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def test_what_is_logged_is_the_sum(tmp_path: Path) -> None:
    """Averaged over a step's micro-batches."""
    model, rows = Pairs(), paired()
    start = deepcopy(model)
    trainer = trainer_of(model, tmp_path, rows, logging_steps=1, **ACCUMULATING)
    trainer.train()
    with torch.no_grad():
        sums = [float(sum(start(**batch)["losses"].values())) for batch in batches_of(rows, 8)[:2]]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(sums) / 2, rel=1e-4)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    start, rows = Pairs(), paired()
    whole, first, second = (deepcopy(start) for _ in range(3))
    steps = {"max_steps": 4, **ACCUMULATING}
    trainer_of(whole, tmp_path / "whole", rows, **steps).train()
    folder = tmp_path / "parts"
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(first, folder, rows, **{**steps, "max_steps": 2}, **saving).train()
    resumed = trainer_of(second, folder, rows, **steps)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(second, whole)


def test_a_scaler(tmp_path: Path) -> None:
    """Accelerate makes one on a GPU only; here it is handed the CPU's."""
    model, rows = Pairs(), paired()
    plain = deepcopy(model)
    trainer = trainer_of(model, tmp_path, rows, max_grad_norm=0.0, **ACCUMULATING)
    trainer.accelerator.scaler = GradScaler("cpu", init_scale=2.0**8)
    trainer.train()
    unscaled = trainer_of(plain, tmp_path, rows, max_grad_norm=0.0, **ACCUMULATING)
    unscaled.train()
    assert_same(model, plain)
    norms, expected = (
        each.optimizer.optimizer.stats["mm+audio"].norms for each in (trainer, unscaled)
    )
    torch.testing.assert_close(norms, expected * 2.0**8)


def test_a_loss_function_in_place_of_a_subclass(tmp_path: Path) -> None:
    """The Trainer hands it the labels, and leaves the mean over micro-batches to it."""

    class Logits(LateFusion):
        def forward(self, spec: Tensor, image: Tensor) -> dict[str, Tensor]:
            audio, visual = self.audio(spec), self.visual(image)
            joint = self.mm_head(torch.cat([audio, visual], dim=1))
            logits = (joint, self.audio_head(audio), self.visual_head(visual))
            return dict(zip(("mm", "audio", "visual"), logits, strict=True))

    model, rows = Logits(), paired()
    plain = deepcopy(model)
    opt = MMParetoOptimizer(sgd(model))

    def losses(logits: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return opt.total(
            {
                name: cross_entropy(value, labels, reduction="sum") / num_items_in_batch
                for name, value in logits.items()
            }
        )

    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "max_grad_norm": 0.1}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        gradient_accumulation_steps=2,
        label_names=["labels"],
        **settings,
    )
    data = {"train_dataset": rows, "data_collator": collate}
    transformers.Trainer(
        model, arguments, optimizers=(opt, None), compute_loss_func=losses, **data
    ).train()
    oracle = MMParetoOptimizer(sgd(plain))
    for batch in batches_of(rows, 16):
        oracle.backward(plain.losses((batch["spec"], batch["image"], batch["labels"])))
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        oracle.step()
        oracle.zero_grad()
    torch.testing.assert_close([*model.parameters()], [*plain.parameters()])
    assert list(opt.stats) == ["mm+audio", "mm+visual"]


def test_bfloat16(tmp_path: Path) -> None:
    model, rows = Pairs(), paired()
    exact = deepcopy(model)
    steps = {"max_steps": 2, **ACCUMULATING}
    trainer_of(model, tmp_path, rows, bf16=True, **steps).train()
    trainer_of(exact, tmp_path, rows, **steps).train()
    pairs = list(zip(model.parameters(), exact.parameters(), strict=True))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)
    assert any(not found.equal(expected) for found, expected in pairs)
