"""Evaluations: one loss whatever the batch, every row, and a model that they leave as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from camex_ft.training.callbacks.reporting import only_metrics
from tests.helpers.task_runs import KINDS, VALIDATION, made, trainer
from tests.helpers.training_runs import same, weights
from tests.helpers.training_runs import trainer as small_trainer

HALF = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}


def evaluated(kind: str, folder: Path, **training: Any) -> dict[str, float]:
    return only_metrics(trainer(kind, folder, **training).evaluate())


# -- the loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_one_value_whatever_the_batch(kind: str, tmp_path: Path) -> None:
    """Batches of 2 and 5 leave a short last one, and the targets of a text differ in length from row to row."""
    found = [
        evaluated(kind, tmp_path, per_device_eval_batch_size=size)["validation_loss"]
        for size in (1, 2, 5, 99)
    ]
    # float32: sums of a few hundred terms in another order
    assert found == pytest.approx([found[0]] * len(found), rel=2e-6)


def test_the_loss_of_answers_is_the_mean_over_their_tokens(tmp_path: Path) -> None:
    run = trainer("qa", tmp_path)
    total, count = 0.0, 0
    for row in run.eval_dataset["validation"]:
        batch = run.data_collator([dict(row)])
        with torch.no_grad():
            logits = run.model.eval()(**batch).logits[0]
        total += float(F.cross_entropy(logits, batch["labels"][0], reduction="sum"))
        count += len(row["labels"])
    assert run.evaluate()["eval_validation_loss"] == pytest.approx(total / count, rel=2e-6)


def test_a_loss_that_is_not_a_number_is_not_left_out(tmp_path: Path) -> None:
    run = small_trainer(tmp_path)
    with torch.no_grad():
        run.model.classifier.bias.fill_(float("nan"))
    assert run.evaluate()["eval_validation_loss"] != run.evaluate()["eval_validation_loss"]


# -- rows that do not fill a batch


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_drops_no_rows(kind: str, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, dataloader_drop_last=True)
    assert only_metrics(run.evaluate()) == evaluated(kind, tmp_path)
    whole = run.eval_dataset["validation"]
    assert len(whole) % run.args.eval_batch_size
    collected = run.collect(whole)
    assert len(collected[0] if isinstance(collected, tuple) else collected) == len(whole)
    assert kind != "classification" or len(whole) == VALIDATION


def test_training_drops_them_where_it_is_told_to(tmp_path: Path) -> None:
    assert len(trainer("classification", tmp_path).get_train_dataloader()) == 2
    assert len(trainer("classification", tmp_path, dataloader_drop_last=True).get_train_dataloader()) == 1


# -- half precision


@pytest.mark.parametrize("option", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_in_half_precision_leaves_the_model_as_it_is(
    kind: str, option: str, tmp_path: Path
) -> None:
    plain, half = trainer(kind, tmp_path), trainer(kind, tmp_path, **{option: True, "use_cpu": True})
    exact, rough = only_metrics(plain.evaluate()), only_metrics(half.evaluate())
    assert same(weights(half), dict(made(kind).model.state_dict())) == []
    assert {tensor.dtype for tensor in half.model.parameters()} == {torch.float32}
    assert rough["validation_loss"] != exact["validation_loss"]
    assert rough["validation_loss"] == pytest.approx(exact["validation_loss"], rel=0.05)  # 8 bits a product
    half.collect(half.eval_dataset["validation"])
    assert same(weights(half), dict(made(kind).model.state_dict())) == []


@pytest.mark.parametrize("option", HALF)
def test_evaluation_in_half_precision_trains_the_same_model(option: str, tmp_path: Path) -> None:
    """In the middle of training and after it, where the model is in the state that is saved."""
    seen: set[torch.dtype] = set()

    def observe(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if not module.training:
            seen.add(output.dtype)

    trained = []
    for settings in ({}, {option: True, "use_cpu": True}):
        run = trainer("classification", tmp_path / str(len(trained)), **settings)
        run.model.classifier.register_forward_hook(observe)
        run.train()
        run.evaluate()
        trained.append(weights(run))
    assert same(*trained) == []
    assert seen == {torch.float32, HALF[option]}
