"""Two hand-made examples a task, in the hub's columns, and files made of them."""

import copy

import pytest
from datasets import Dataset

from camex_ft.utils import registry
from tests.helpers.task_files import ROWS, write

PASSAGE = "Ann met Bob in Rome\n@highlight\nBob sang\n@highlight\nRome was hot."
COPA = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I ate.", "question": "effect"}
WIC = {"word": "bank", "sentence1": "The bank is shut.", "sentence2": "A river bank.", "start1": 4, "end1": 8}
WSC = {
    "text": "Ann told Eve that she won.",
    "span1_text": "Ann",
    "span2_text": "she",
    "span1_index": 0,
    "span2_index": 4,
}
MULTIRC = {"paragraph": "Ann has a cat.", "question": "Who has a cat?"}
RECORD = {
    "passage": PASSAGE,
    "query": "@placeholder is hot.",
    "entities": ["Ann", "Bob", "Rome"],
    "answers": ["Rome"],
}


def _two(first, second=None, **common):
    rows = [{**common, **first, "label": 0}, {**common, **(second or first), "label": 1}]
    return [{"idx": idx, **row} for idx, row in enumerate(rows)]


def _texts(*columns):
    return _two({c: f"{c} one" for c in columns}, {c: f"{c} two" for c in columns})


EXAMPLES = {
    **{f"glue/{name}": _texts("sentence") for name in ("cola", "sst2")},
    **{f"glue/{name}": _texts("sentence1", "sentence2") for name in ("mrpc", "rte", "wnli", "stsb")},
    **{f"glue/{name}": _texts("premise", "hypothesis") for name in ("mnli", "ax")},
    "glue/qqp": _texts("question1", "question2"),
    "glue/qnli": _texts("question", "sentence"),
    "superglue/boolq": _texts("question", "passage"),
    **{f"superglue/{name}": _texts("premise", "hypothesis") for name in ("cb", "rte", "axg")},
    "superglue/axb": _texts("sentence1", "sentence2"),
    "superglue/copa": _two(COPA, {**COPA, "premise": "I got wet.", "question": "cause", "choice1": "I ran."}),
    "superglue/multirc": [
        {**MULTIRC, "answer": "Bob", "label": 0, "idx": {"paragraph": 3, "question": 5, "answer": 7}},
        {**MULTIRC, "answer": "Ann", "label": 1, "idx": {"paragraph": 3, "question": 5, "answer": 8}},
    ],
    "superglue/record": [
        {**RECORD, "idx": {"passage": 0, "query": 4}},
        {
            **RECORD,
            "query": "It was @placeholder who sang",
            "answers": ["Bob"],
            "idx": {"passage": 0, "query": 9},
        },
    ],
    "superglue/wic": _two(WIC, start2=8, end2=12),
    "superglue/wsc": _two(WSC),
}


@pytest.fixture
def examples():
    """Return a function: task name -> two examples with labels 0 and 1 (ReCoRD: with answers)."""
    return lambda name: copy.deepcopy(EXAMPLES[name])


@pytest.fixture
def rows(examples):
    """Return a function: task name, and changes to the first example -> the task's rows of its test split."""

    def make(name, split=None, **changes):
        task = registry.TASKS.get(name)
        found = examples(name)
        found[0].update(changes)
        data = Dataset.from_list(found, features=task.features)
        return task.rows(data, split or task.splits["test"][0])

    return make


@pytest.fixture
def folder(tmp_path):
    """Return a folder with good jsonl files of SST-2."""
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", ROWS)
    return tmp_path
