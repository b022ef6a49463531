"""Every task of classification on its synthetic corpus: the hub's columns, valid labels, no score for a constant."""

import numpy as np
import pytest

from camex_ft.data import sources
from camex_ft.tasks.base import labelled
from camex_ft.utils import registry
from tests.helpers.task_kinds import CLASSIFICATION


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_embedded_corpus(name, tmp_path):
    task = registry.TASKS.get(name)
    loaded = sources.load(task, source="embedded", train_rows=200)
    assert set(loaded) == set(task.all_splits())
    assert len(loaded["train"]) == 200
    for split, data in loaded.items():
        owner = task.owner(split)
        assert data.column_names == [*owner.features, "domain"]
        rows = task.rows(data, split)
        assert len(rows) >= len(data) and min(rows["domain"]) >= 0
        logits = np.zeros((len(rows), task.num_labels))
        if split in task.splits["test"]:
            path = tmp_path / task.files[split]
            task.submission(task.predict(logits, rows), rows, path)
            assert (
                path.read_text().count("\n") >= len(set(rows["group"])) / 12
            )  # MultiRC: one line a paragraph
            continue
        assert labelled(rows)
        labels = set(rows["label"])
        assert (
            labels <= set(range(task.num_labels))
            if task.label_names
            else max(labels) <= 5 and min(labels) >= 0
        )
        assert len(labels) >= 2
        if split in task.splits["validation"]:
            assert task.metrics(logits, rows)[task.primary] < 0.6


def test_seeds_give_different_data():
    task = registry.TASKS.get("glue/sst2")
    prints = [sources.fingerprint(sources.load(task, source="embedded", seed=seed)) for seed in (0, 1, 0)]
    assert prints[0] == prints[2] != prints[1]
