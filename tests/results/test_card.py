"""Model cards: what the hub reads of them, and what people must not miss."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from camex_ft.results.card import card, form_of
from camex_ft.results.card_data import HEADS, base_model
from camex_ft.results.record import Record
from camex_ft.utils import escaping
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
