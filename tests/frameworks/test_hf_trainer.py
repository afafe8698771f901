"""The Hugging Face Trainer on models of transformers itself, against loops by hand."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    return hf_trainer(model, folder, {**settings, **options}, **data, **(given or {}))


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
def test_two_towers(tmp_path: Path, options_of: Any, blocks: set[str]) -> None:
    model, rows = Towers(), captioned(16)
    plain = deepcopy(model)
    given = {"mmpareto": options_of(model)}
    trainer = trainer_of(model, tmp_path, rows, given=given, gradient_accumulation_steps=2)
    trainer.train()
    by_hand(plain, MMParetoOptimizer(sgd(plain), **options_of(plain)), batches_of(rows), 2)
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


def test_a_batch_without_any_loss_is_told(tmp_path: Path) -> None:
    class Silent(Towers):
        def forward(self, *batch: Any, **inputs: Any) -> dict[str, Any]:
            return {"losses": {"contrastive": None, "text": None}}

    with pytest.raises(ValueError, match="all losses of the model are None: contrastive, text"):
        trainer_of(Silent(), tmp_path, captioned(4)).train()


def test_an_optimizer_that_was_replaced_is_told(tmp_path: Path) -> None:
    model = Towers()
    trainer = trainer_of(model, tmp_path, captioned(4))
    trainer.create_optimizer()
    trainer.create_optimizer = lambda *_: setattr(trainer, "optimizer", sgd(model))
    with pytest.raises(TypeError, match=r"the optimizer is a SGD, .* use DDP or FSDP2"):
        trainer.train()


def test_the_mode_of_a_schedule_free_optimizer(tmp_path: Path) -> None:
    """It evaluates at averaged parameters, and trains on at its own."""
    schedulefree = pytest.importorskip("schedulefree")
    model, rows = Towers(), captioned(16)
    plain = deepcopy(model)
    options = {"optim": "schedule_free_sgd", "optim_args": None, "weight_decay": 0.0}
    often = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(model, tmp_path, rows, **options, **often)
    trainer.train()

    opt = MMParetoOptimizer(schedulefree.SGDScheduleFree(plain.parameters(), lr=0.1))
    evaluated = []

    def evaluate() -> None:
        opt.eval()
        plain.eval()
        with torch.no_grad():
            each = [plain(**batch)["loss"] for batch in batches_of(rows)]
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


def test_keys_that_are_ignored_stay_so(tmp_path: Path) -> None:
    class Named(Towers):
        def forward(
            self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor
        ) -> dict[str, Any]:
            out = super().forward(input_ids, pixel_values, labels)
            return {**out, "hidden": out["logits"] + 1}

    trainer = trainer_of(Named(), tmp_path, captioned(4), label_names=["labels"])
    both = trainer.predict(trainer.eval_dataset).predictions
    assert [each.shape for each in both] == [(4, 3), (4, 3)]
    only = trainer.predict(trainer.eval_dataset, ignore_keys=["hidden"]).predictions
    assert (only == both[0]).all()
    trainer.model.config.keys_to_ignore_at_inference = ["logits"]
    assert (trainer.predict(trainer.eval_dataset).predictions == both[1]).all()


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


def test_a_model_without_losses_is_told_what_is_missing(tmp_path: Path) -> None:
    class Summed(Pairs):
        def forward(self, spec: Tensor, image: Tensor, labels: Tensor) -> dict[str, Any]:
            return {"loss": self.losses((spec, image, labels))["mm"]}

    with pytest.raises(TypeError, match="output must hold 'losses'"):
        trainer_of(Summed(), tmp_path, paired(8), max_steps=1).train()
