"""The Python of a card runs as it stands, and prints what the run's own evaluation computes."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from camex_ft import upcycling
from camex_ft.backbones.loading import load as load_backbone
from camex_ft.config import load_config
from camex_ft.results.card import card
from camex_ft.results.card_usage import predicting
from camex_ft.results.record import Record
from camex_ft.utils.registry import TASKS
from tests.helpers.lora_models import LORA, train
from tests.helpers.synthetic_results import result

MERGING = {"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 1}}
PLACEHOLDER = "This is the {}."


def printed(task: Any, model: Any, tokenizer: Any, folder: Path, form: str) -> str:
    """Save a model, write its card, run the card's Python as one program, and return what it prints."""
    if form == "adapter":
        upcycling.adapters.save(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = result(task=task.id, protocol="ties-ca", seed=0, scores=[0.5]).record.model_dump()
    plain["config"] = {"task": {"max_length": 48, "answer_length": 6}}
    text = card(Record.model_validate(plain), head=task.head, task=task, form=form)  # type: ignore[arg-type]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n".join(blocks).replace("FOLDER", str(folder)), "card", "exec"), {})
    return out.getvalue()


def built(task: Any, backbone: str, form: str = "upcycled") -> tuple[Any, Any]:
    dense, tokenizer = load_backbone(backbone, head=task.head, **task.backbone_options())
    model = dense.eval()
    if form == "adapter":
        model = train(
            upcycling.upcycle(dense, merging={**MERGING, "protocol": "domain-ca"}, tuning=LORA)
        ).eval()
    elif form == "upcycled":
        model = upcycling.upcycle(dense, merging=MERGING).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers differ from text to text
            if parameter.requires_grad and form != "adapter":
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
    return model, tokenizer


def due(task: Any, model: Any, tokenizer: Any, row: dict[str, Any], *settings: str) -> Any:
    """Return what the run's own code collects of one row."""
    config = load_config(task.suite, [f"task.name={task.name}", *settings]).task
    split = task.splits["test"][0]
    encoded = task.encode(Dataset.from_list([row]), split, tokenizer, config)
    batch = task.collator(tokenizer)([{k: v for k, v in encoded[0].items() if k not in ("row", "labels")}])
    with torch.no_grad():
        return task.outputs(model, dict(batch), tokenizer, config)[1]


@pytest.mark.parametrize(
    ("name", "backbone", "form"),
    [
        ("glue/sst2", "embedded/bert", "plain"),
        ("glue/sst2", "embedded/t5", "upcycled"),
        ("glue/mnli", "embedded/gpt2", "upcycled"),
        ("superglue/boolq", "embedded/roberta", "upcycled"),
        ("superglue/wsc", "embedded/llama", "upcycled"),
        ("glue/rte", "embedded/bert", "adapter"),
    ],
)
def test_a_classification_prints_labels_and_probabilities(name, backbone, form, tmp_path):
    task = TASKS.get(name)
    model, tokenizer = built(task, backbone, form)
    lines = printed(task, model, tokenizer, tmp_path, form).splitlines()
    first, *second = (PLACEHOLDER.format(text) for text in task.texts)
    row = {"text": first, "text_pair": second[0] if second else None, "label": -1, "idx": 0}
    logits = due(task, model, tokenizer, row)
    found = dict(line.split(": ") for line in lines)
    assert tuple(found) == task.label_names
    expected = torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits)[0].softmax(-1)
    np.testing.assert_allclose([float(p) for p in found.values()], expected, atol=6e-5)  # printed to 1e-4


def test_a_regression_prints_its_number(tmp_path):
    task = TASKS.get("glue/stsb")
    model, tokenizer = built(task, "embedded/bert")
    row = {"text": "This is the sentence1.", "text_pair": "This is the sentence2.", "label": -1.0, "idx": 0}
    found = float(printed(task, model, tokenizer, tmp_path, "upcycled"))
    assert found == pytest.approx(float(due(task, model, tokenizer, row)[0, 0]), abs=6e-5)


@pytest.mark.parametrize("backbone", ["embedded/gpt2", "embedded/llama"])
def test_a_language_model_goes_on_from_a_prompt(backbone, tmp_path):
    task = TASKS.get("lm/wikitext-2")
    model, tokenizer = built(task, backbone)
    found = printed(task, model, tokenizer, tmp_path, "upcycled")
    prompt = tokenizer(PLACEHOLDER.format("text"), return_tensors="pt")
    start = tokenizer.decode(prompt.input_ids[0], skip_special_tokens=True)
    assert found.startswith(start) and len(found.split()) > len(start.split())


def test_an_answer_is_generated(tmp_path):
    task = TASKS.get("qa/squad")
    model, tokenizer = built(task, "embedded/t5")
    found = printed(task, model, tokenizer, tmp_path, "upcycled").strip()
    row = {"id": "0", "question": "This is the question.", "context": "This is the context.", "answers": []}
    texts, _ = due(
        task, model, tokenizer, {**row, "start": -1, "end": -1}, "task.answer_length=6", "task.doc_stride=32"
    )
    assert found == bytes(texts[0][texts[0] >= 0].tolist()).decode()


def test_an_answer_is_chosen_among_words_with_probabilities(tmp_path):
    task = TASKS.get("qa/wikiqa")
    model, tokenizer = built(task, "embedded/t5")
    lines = printed(task, model, tokenizer, tmp_path, "upcycled").splitlines()
    row = {"question_id": "0", "question": "This is the question.", "document_title": "This is the title."}
    score = float(due(task, model, tokenizer, {**row, "answer": "This is the answer.", "label": -1})[0])
    found = dict(line.split(": ") for line in lines)
    assert list(found) == ["no", "yes"]
    assert float(found["yes"]) == pytest.approx(1 / (1 + np.exp(-score)), abs=6e-5)


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_has_an_example_that_compiles(name):
    task = TASKS.get(name)
    made = predicting(task.head, task, {"max_length": 128})
    compile(made, "card", "exec")
    assert "print(" in made and all(text.replace("_", " ") in made for text in task.texts)


def test_texts_of_a_row_are_as_many_as_the_model_reads():
    tasks = [TASKS.get(name) for name in TASKS.names()]
    single = {task.id for task in tasks if task.head == "sequence-classification" and len(task.texts) == 1}
    assert single == {"glue/cola", "glue/sst2", "superglue/wsc"}
    assert all(len(task.texts) == 2 for task in tasks if "glue" in task.suite and task.id not in single)
