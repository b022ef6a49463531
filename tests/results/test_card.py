"""Model cards: what the hub reads of them, what people must not miss, and code that runs as shown."""

from __future__ import annotations

import contextlib
import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from camex_ft import upcycling
from camex_ft.backbones.loading import load as load_backbone
from camex_ft.config import load_config
from camex_ft.results.card import HEADS, base_model, card, form_of, predicting
from camex_ft.results.record import Record
from camex_ft.utils import escaping
from camex_ft.utils.registry import TASKS
from tests.helpers.lora_models import LORA, train
from tests.helpers.synthetic_results import result

CLASSIFIER = "sequence-classification"
HUB = {
    "source": "hub",
    "id": "nyu-mll/glue",
    "rows": {"train": 10, "validation_matched": 5},
    "sha256": "ab" * 32,
}
PAPER = {"profile": "paper", "name": "glue--mnli--x--seed0--12345678"}


def record(**changes: Any) -> Record:
    """A record with some of its parts changed, by section or whole."""
    plain = result(task="glue/mnli", protocol="ties-ca", seed=0, scores=[0.5]).record.model_dump()
    for name, change in changes.items():
        plain[name] = {**plain[name], **change} if isinstance(change, dict) and name != "config" else change
    return Record.model_validate(plain)


def published() -> Record:
    return record(
        run=PAPER,
        backbone="google-bert/bert-base-uncased",
        data=HUB,
        environment={"commit": "c0ffee", "dirty": True, "versions": {"camex_ft": "0.1.0", "torch": "2.13"}},
        metrics={"all": {"loss": 0.5, "accuracy": 0.75, "f1": None}},
        config={"merging": {"experts": 4, "alpha": 1.0}, "tuning": {"mode": "full"}},
    )


def test_the_front_matter_says_what_the_hub_shows():
    made = ModelCard(card(published(), head=CLASSIFIER))
    data = made.data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.pipeline_tag == "text-classification"
    assert data.license == "unknown"
    assert data.model_name == PAPER["name"]
    found = [(r.metric_type, r.metric_value, r.dataset_split) for r in data.eval_results]
    assert found == [("accuracy", 0.75, "validation_matched"), ("loss", 0.5, "validation_matched")]
    assert "trial run" not in made.text
    for said in (
        "ties-ca",
        "c0ffee with changes",
        "ab" * 32,
        "camex_ft 0.1.0",
        "2502.18821",
        "@software{camex_ft",
    ):
        assert said in made.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": {"source": "embedded", "id": "glue/mnli"}}, "are not the benchmark"),
        ({"backbone": "embedded/bert", "data": HUB}, "never pretrained"),
        ({"backbone": "a/b", "data": HUB, "run": {"profile": "embedded"}}, "not the published recipe"),
    ],
)
def test_a_trial_is_called_one(changes, why):
    made = card(record(**{"run": PAPER, **changes}), head=CLASSIFIER)
    assert "**A trial run.**" in made
    assert why in made
    assert "No number below is a published one" in made


def test_licences():
    assert ModelCard(card(record(backbone="embedded/t5"), head="seq2seq-lm")).data.license == "apache-2.0"
    given = ModelCard(card(published(), head=CLASSIFIER, license="mit"))
    assert given.data.license == "mit"
    assert "Weights: `mit`. camex_ft: Apache-2.0." in given.text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("google/t5", "google/t5"),
        ("gpt2", "gpt2"),
        ("new:google/t5", "google/t5"),
        ("embedded/bert", None),
        ("package:name/model", None),
        ("a/b/c", None),
        ("x.gguf", None),
        ("./mine", None),
        ("", None),
    ],
)
def test_only_hub_ids_are_base_models(name, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model(record(backbone=name)) == found
    (tmp_path / "google" / "t5").mkdir(parents=True)
    if found == "google/t5" and not name.startswith("new:"):
        assert base_model(record(backbone=name)) is None, "a folder of that name is what was meant"


@pytest.mark.parametrize("head", [*HEADS, "multiple-choice"])
@pytest.mark.parametrize("form", ["plain", "upcycled", "adapter", "dense", "folded"])
def test_three_lines_load_it(head, form):
    made = card(published(), head=head, form=form)
    block = re.search(r"```python\n(.*?)```", made, re.DOTALL).group(1)
    code = [line for line in block.splitlines() if line]
    assert len(code) <= 3
    assert ("import camex_ft" in code) == (form not in ("plain", "dense"))
    compile("\n".join(code), "card", "exec")


def test_forms_follow_from_the_run():
    assert form_of(record(config={"tuning": {"mode": "lora"}})) == "adapter"
    assert form_of(record(config={}, protocol="dense")) == "plain"
    assert form_of(record(config={})) == "upcycled"


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_no_name_breaks_the_card(text):
    """Names come from users' files: front matter stays a mapping with the same keys, and no heading is added."""
    given = published().model_copy(update={"backbone": text, "task": text})
    given = given.model_copy(update={"data": given.data.model_copy(update={"id": text, "source": "disk"})})
    made = card(given, head=CLASSIFIER)
    front, body = made.split("\n---\n", 1)
    data = yaml.safe_load(front.removeprefix("---\n"))
    assert (
        {"license", "library_name", "tags", "model-index"}
        <= data.keys()
        <= {*("license", "library_name", "tags", "model-index", "pipeline_tag", "base_model")}
    )
    headings = [line for line in body.split("\n") if line.startswith("## ")]
    assert headings == [
        f"## {n}" for n in ("Results", "How to load it", "How it was made", "Licence", "Citation")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a`b`c",
        "x|y",
        "<script>alert(1)</script>",
        "one\n\n## two\n",
        "]: x [a](b)",
        "---\nkey: 1",
        "${x}\x1b[1m",
    ],
)
def test_hostile_names_are_text_on_a_card(text):
    """Every name of the record: the page has no tag, link or heading of theirs, and each is there to be read."""
    given = published().model_dump()
    named = given | {"task": text, "protocol": text, "backbone": text}
    named["data"] = given["data"] | {"id": text, "rows": {text: 1, f"validation{text}": 2}, "sha256": text}
    named["run"] = given["run"] | {"name": text, "command": text}
    named["metrics"] = given["metrics"] | {"primary": text, "all": {text: 0.5}}
    named["config"] = {"merging": {"options": {text: text}}, "routing": {"router": text}}
    named["environment"] = given["environment"] | {
        "commit": text,
        "versions": {"torch": text, "camex_ft": text},
    }
    made = card(Record.model_validate(named), head=CLASSIFIER, license=text)
    front, body = made.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["model-index"][0]["name"] == text
    page = MarkdownIt("commonmark").enable("table").render(body)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= {
        "h1",
        "h2",
        "p",
        "code",
        "pre",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "strong",
        "a",
    }
    assert page.count("<h2>") == 5 and page.count("<a ") == 0 and "\x1b" not in page
    cells = [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", page)]
    assert cells.count(escaping.one_line(text)) >= 5


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({"steps": 30, "epochs": 0.625, "rows": 960}, "30 steps, 0.62 epochs, 960 rows"),
        ({"steps": 1, "epochs": 1.0, "rows": 1}, "1 step, 1 epoch, 1 row"),
        (
            {"steps": 12_345, "epochs": 1234.0, "rows": 3_456_789},
            "12,345 steps, 1,234 epochs, 3,456,789 rows",
        ),
        ({}, "10 steps, 1 epoch"),  # of an older record the last evaluation
    ],
)
def test_a_card_says_what_was_trained_and_not_what_was_planned(cost, said):
    planned = {"training": {"num_train_epochs": 3.0, "max_steps": 30}}
    made = card(record(run=PAPER, cost=cost, config=planned), head=CLASSIFIER)
    assert f"| trained for | `{said}` |" in made
    assert "| epochs |" not in made


def test_more_sections_and_other_numbers():
    made = card(
        published(), head=CLASSIFIER, form="dense", metrics={"accuracy": 0.5}, sections=[("Lost", "much")]
    )
    assert "## Lost\n\nmuch" in made
    assert [r.metric_value for r in ModelCard(made).data.eval_results] == [0.5]


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
