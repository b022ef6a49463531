"""What holds for every task of classification: registration, the columns of its rows, decisions, what it refuses."""

import numpy as np
import pytest
from datasets import ClassLabel, Features

from camex_ft.config import config_hash, load_config, resolve, summary
from camex_ft.config.document import document
from camex_ft.data import sources
from camex_ft.tasks.base import labelled
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.task_kinds import CLASSIFICATION

GLUE = ["ax", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
SUPERGLUE = ["axb", "axg", "boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
every_task = pytest.mark.parametrize("name", CLASSIFICATION)


def test_all_benchmark_tasks_are_registered():
    names = {f"glue/{n}" for n in GLUE} | {f"superglue/{n}" for n in SUPERGLUE}
    assert set(CLASSIFICATION) == {name for name in registry.TASKS.names() if "glue" in name} == names


def test_a_misspelt_task_gets_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'glue/sst2'"):
        registry.TASKS.get("glue/sst")


@every_task
def test_rows_have_the_agreed_columns(name, rows):
    task, made = registry.TASKS.get(name), rows(name)
    assert {"text", "text_pair", "label", "group", "idx"} <= set(made.column_names)
    assert set(made.column_names) - {"text", "text_pair", "label", "group", "idx"} == set(task.extra)
    assert made.features["label"].dtype == ("float32" if task.regression else "int64")
    assert set(made["label"]) <= set(range(task.num_labels)) | ({0.0, 1.0} if task.regression else set())
    assert labelled(made)


@every_task
def test_a_perfect_answer_scores_one(name, rows):
    task, made = registry.TASKS.get(name), rows(name)
    labels = np.array(made["label"])
    logits = labels[:, None] if task.regression else np.eye(task.num_labels)[labels.astype(int)]
    scores = task.metrics(logits, made)
    assert scores[task.primary] == pytest.approx(1.0)
    assert task.metrics((logits, "hidden states"), made) == scores  # encoder-decoders return a tuple


@every_task
def test_train_rows_use_the_owners_columns(name, examples):
    task = registry.TASKS.get(name)
    owner = task.owner(task.splits["train"])
    assert owner.train_from is None
    assert (owner is task) == (task.train_from is None)
    assert owner.label_names == task.label_names
    assert task.owner(task.splits["test"][0]) is task


@every_task
def test_splits_and_submission_files_fit(name):
    task = registry.TASKS.get(name)
    assert set(task.files) == set(task.splits["test"])
    assert task.all_splits()[0] == "train"
    donor = task.owner("train")
    assert task.splits["validation"] == donor.splits["validation"]


@every_task
def test_label_names_are_those_of_the_columns(name):
    task = registry.TASKS.get(name)
    label = task.features.get("label")
    if task.extra.keys() & {"choice", "candidate"}:
        assert task.label_names == ("False", "True")  # whether the candidate is right
    elif isinstance(label, ClassLabel):
        assert task.label_names == tuple(label.names)
    else:
        assert task.label_names is None and task.num_labels == 1


def test_diagnostics_train_on_their_tasks():
    donors = {
        n: registry.TASKS.get(n).train_from
        for n in registry.TASKS.names()
        if registry.TASKS.get(n).train_from
    }
    assert donors == {
        "glue/ax": "glue/mnli",
        "superglue/axb": "superglue/rte",
        "superglue/axg": "superglue/rte",
    }


def test_withheld_labels_cannot_be_measured(rows):
    made = rows("glue/sst2", label=-1)
    assert not labelled(made)
    with pytest.raises(ValueError, match="withheld"):
        registry.TASKS.get("glue/sst2").metrics(np.zeros((2, 2)), made)


def test_logits_of_the_wrong_shape_are_refused(rows):
    task = registry.TASKS.get("glue/sst2")
    with pytest.raises(ValueError, match=r"\[2, 2\], not \[2, 3\]"):
        task.predict(np.zeros((2, 3)), rows("glue/sst2"))


def test_domain_is_carried_along(examples):
    task = registry.TASKS.get("superglue/copa")
    from datasets import Dataset, Value

    data = Dataset.from_list(
        [{**row, "domain": 3 + i} for i, row in enumerate(examples("superglue/copa"))],
        features=Features({**task.features, "domain": Value("int32")}),
    )
    assert task.rows(data, "train")["domain"][:] == [3, 3, 4, 4]


def test_a_new_task_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mood.py").write_text(
        "from datasets import ClassLabel, Features, Value\n"
        "from camex_ft.tasks.classification import by_label, task\n"
        "from camex_ft.tasks.glue import tsv\n"
        "from camex_ft.tasks.metrics import Accuracy\n"
        "NAMES = ['calm', 'angry', 'sad']\n"
        "@task(suite='mine', name='mood', benchmark_name='mood', summary='which mood?', hub='me/mood',\n"
        "      features=Features({'line': Value('string'), 'label': ClassLabel(names=NAMES), 'idx': Value('int32')}),\n"
        "      label_names=tuple(NAMES), primary='accuracy', score=by_label(Accuracy), lines=tsv)\n"
        "def mood(example):\n"
        "    return [{'text': example['line'], 'label': example['label']}]\n"
    )
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("line,label\nhm,calm\nargh,angry\n")
    monkeypatch.setenv("CAMEX_FT_PLUGINS", str(tmp_path / "plugins"))
    try:
        task = registry.TASKS.get("mine/mood")
        loaded = sources.load(task, source="disk", dir=tmp_path)
        rows = task.rows(loaded["validation"], "validation")
        assert rows["label"][:] == [0, 1] and rows["text_pair"][:] == [None, None]
        assert task.metrics(np.eye(3)[[0, 2]], rows) == {"accuracy": 0.5}
    finally:
        registry.TASKS.remove("mine/mood")


KIND = """
from dataclasses import dataclass
from typing import ClassVar
from datasets import ClassLabel, Features, Value
from pydantic import Field
from camex_ft.config.schema import TaskConfig
from camex_ft.config.values import Count
from camex_ft.tasks.base import Task
from camex_ft.utils.registry import TASKS

class CountingConfig(TaskConfig):
    '''Words are counted.'''
    kind = "counting"
    lengths = ("words",)
    words: Count = Field(default=20, description="Longest text, in words.")

@dataclass(frozen=True, kw_only=True, eq=False)
class Counting(Task[CountingConfig]):
    head: ClassVar[str] = "causal-lm"
    config_class: ClassVar = CountingConfig
    def rows(self, dataset, split): return dataset
    def encode(self, rows, split, tokenizer, settings): return rows
    def collator(self, tokenizer): return list
    def predict(self, outputs, rows, origin=None): return outputs
    def metrics(self, outputs, rows, origin=None): return {"accuracy": 1.0}
    def labelled(self, rows): return True

TASKS.add("mine/count", Counting(suite="mine", name="count", benchmark_name="count", summary="how many words?",
          hub="me/count", features=Features({"text": Value("string")}), primary="accuracy"))
"""


def test_a_new_kind_with_options_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(KIND)
    monkeypatch.setenv("CAMEX_FT_PLUGINS", str(tmp_path))
    own = [
        "task.suite=mine",
        "task.name=count",
        "data.dir=rows",
        "profile=embedded",
        "backbone=embedded/gpt2",
    ]
    try:
        settled = resolve(load_config("glue", [*own, "task.words=7"]), needs=False)[0]
        assert settled.task.model_dump() == {"suite": "mine", "name": "count", "predict": False, "words": 7}
        assert summary(settled)["task"] == "mine/count, up to 7 tokens"
        hashes = {
            config_hash(resolve(load_config("glue", [*own, *more]), needs=False)[0])
            for more in ([], ["task.words=7"])
        }
        assert len(hashes) == 2
        assert load_config("glue", ["task.name=rte"]).task.max_length == 128
        with pytest.raises(
            UserError, match=r"task\.words: an option of counting; glue/rte is a task of classification"
        ):
            load_config("glue", ["task.name=rte", "task.words=7"])
        with pytest.raises(UserError, match=r"task\.words: expected at least 1, got 0"):
            load_config("glue", [*own, "task.words=0"])
        page = document().partition("### Tasks of counting")[2].partition("##")[0]
        assert "Words are counted. Suites: `mine`." in page
        assert "| `task.words` | whole number, at least 1 | `20` | Longest text, in words. |" in page
    finally:
        registry.TASKS.remove("mine/count")
