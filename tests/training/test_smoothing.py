"""Label smoothing, for every kind of task that has classes: the loss of training, and that of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camex_ft.training.callbacks.reporting import only_metrics
from camex_ft.training.trainer import CamexTrainer
from tests.helpers.task_runs import trainer

FACTOR = 0.1
SMOOTHED = ("classification", "lm", "qa")


def still(run: CamexTrainer) -> CamexTrainer:
    """Take dropout out of a run, and the routing noise."""
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return run


def batch_of(run: CamexTrainer) -> dict[str, Tensor]:
    return next(iter(run.get_train_dataloader()))


def expected(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own cross-entropy with label smoothing."""
    if kind == "lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=FACTOR)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_the_training_loss_is_the_smoothed_one(kind: str, tmp_path: Path) -> None:
    quiet = ("routing.noise=false", "routing.balance=0")
    run = still(trainer(kind, tmp_path, *quiet, label_smoothing_factor=FACTOR))
    batch = batch_of(run)
    run.model.eval()  # no dropout within the model either
    with torch.no_grad():
        loss, outputs = run.compute_loss(run.model, dict(batch), return_outputs=True)
        logits = run.model(**batch).logits
    assert torch.allclose(outputs.logits, logits, atol=1e-6)  # float32: the same pass, with the loss left out
    assert float(loss) == pytest.approx(float(expected(kind, logits, batch["labels"])), rel=1e-5)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_evaluations_measure_the_plain_loss(kind: str, tmp_path: Path) -> None:
    smooth, plain = trainer(kind, tmp_path, label_smoothing_factor=FACTOR), trainer(kind, tmp_path)
    assert only_metrics(smooth.evaluate()) == only_metrics(plain.evaluate())


@pytest.mark.parametrize("kind", SMOOTHED)
def test_micro_batches_of_a_smoothed_loss_are_one_batch(kind: str, tmp_path: Path) -> None:
    """The logged loss of one step, without noise, is that of its rows at once."""
    found = []
    for rows, parts in ((8, 1), (4, 2)):
        run = still(
            trainer(
                kind,
                tmp_path,
                "routing.noise=false",
                "routing.balance=0",
                label_smoothing_factor=FACTOR,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=parts,
                max_steps=1,
                eval_strategy="no",
            )
        )
        run.train()
        found += [line["loss"] for line in run.state.log_history if "loss" in line]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
