"""Slow: a tiny backbone learns the embedded tasks from scratch in a minute or two on one core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from camex_ft.config import load_config
from camex_ft.run import pipeline
from camex_ft.synthetic import backbone, corpus


def accuracy(task: str, columns: tuple[str, ...], epochs: int) -> float:
    """Train T5 with AdamW, a linear schedule with a warm-up, batches of 32; return the validation accuracy."""
    torch.manual_seed(0)
    splits = corpus(task)
    model, tokenizer = backbone("t5")

    def batches(split: str, size: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        rows = splits[split]
        texts, labels = [rows[:][column] for column in columns], torch.tensor(rows[:]["label"])
        return [
            (
                dict(tokenizer(*(t[i : i + size] for t in texts), padding=True, return_tensors="pt")),
                labels[i : i + size],
            )
            for i in range(0, len(rows), size)
        ]

    train = batches("train", 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    steps = epochs * len(train)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(train)).tolist():
            inputs, labels = train[i]
            model(**inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = [
            (model(**inputs).logits.argmax(-1) == labels).sum()
            for inputs, labels in batches("validation", 100)
        ]
    return float(sum(right)) / len(splits["validation"])


@pytest.mark.slow
def test_sst2_is_learned() -> None:
    assert accuracy("glue/sst2", ("sentence",), epochs=4) >= 0.93


@pytest.mark.slow
def test_boolq_is_learned_above_chance() -> None:
    # 400 rows: 0.6 is four standard errors above chance
    assert accuracy("superglue/boolq", ("question", "passage"), epochs=3) >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("squad", 0.75), ("wikiqa", 0.8)])
def test_question_answering_is_learned_with_the_profile(task: str, least: float, tmp_path: Path) -> None:
    # SQuAD: whoever does not know what domains do to words scores 0.70; WikiQA: 0.5 for one answer to everything
    config = load_config("qa", ["profile=embedded", f"task.name={task}", f"output.dir={tmp_path}"])
    assert pipeline.run(config).metrics.best >= least
