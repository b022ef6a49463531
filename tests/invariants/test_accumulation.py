"""Invariant 10: two micro-batches of 8 make the same step as one batch of 16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import upcycle
from camex_ft.utils.registry import BACKBONES, PROTOCOLS
from tests.helpers.invariant_cases import Case, dense
from tests.helpers.tiny import VOCABULARY, family_names

# float32: the mean of two means of 8 against a mean of 16, once through SGD with rate 0.1 on gradients of about 1
TOLERANCE = 2e-6
ROWS, LENGTH = 16, 6
FAMILIES = [BACKBONES.get(name).model_types[0] for name in family_names()]
CASES = [Case(t, "sequence-classification", "ties-ca", "auto") for t in FAMILIES]
CASES += [Case("bert", "sequence-classification", p, "auto") for p in PROTOCOLS.names()]


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[:, -1] = 1  # the end token
    labels = torch.randint(0, 2, (ROWS,), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": [[1] * LENGTH] * ROWS, "labels": labels.tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def step(case: Case, folder: Path, *, micro: int) -> dict[str, Tensor]:
    """Take one step over all rows in micro-batches; return the parameters after it. Noise, dropout and balance are off,
    dare draws no mask: the first is random, the balance loss is not linear in the batch."""
    drop = {"options": {"drop": 0.0}} if case.protocol.startswith("dare") else {}
    model = upcycle(
        dense(case.model_type, case.head),
        merging={"protocol": case.protocol, "experts": 3, "curvature": {"rank": 2}, **drop},
        routing={"noise": False, "balance": 0.0},
    )
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):  # modules, and probabilities kept as numbers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    trainer = CamexTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=ROWS // micro,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows(),
    )
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_make_the_same_step(case: Case, tmp_path: Path) -> None:
    start = dict(dense(case.model_type, case.head).named_parameters())
    whole, parts = (step(case, tmp_path, micro=micro) for micro in (ROWS, ROWS // 2))
    moved = [n for n in start if n in whole and not torch.equal(whole[n], start[n])]
    assert moved, "nothing was trained"
    for name, value in whole.items():
        scale = max(1.0, float(value.abs().max()))
        close = torch.allclose(parts[name], value, rtol=0, atol=TOLERANCE * scale)
        assert close, f"{name}: {(parts[name] - value).abs().max():.1e}"
