"""The real GLUE files in ../shared: they load as they are, with the official numbers of rows."""

from pathlib import Path

import pytest

from camex_ft.data import sources
from camex_ft.tasks.base import labelled
from camex_ft.utils import registry

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
pytestmark = pytest.mark.skipif(not GLUE.is_dir(), reason="no ../shared/data/glue beside this checkout")
COUNTS = {
    "sst2": {"train": 67349, "validation": 872, "test": 1821},
    "cola": {"train": 8551, "validation": 1043, "test": 1063},
    "rte": {"train": 2490, "validation": 277, "test": 3000},
    "wnli": {"train": 635, "validation": 71, "test": 146},
    "qnli": {"validation": 5463, "test": 5463},
    "ax": {"test": 1104},
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("nested", [True, False])
def test_splits_load_whole(name, nested):
    task = registry.TASKS.get(f"glue/{name}")
    folder = GLUE if nested else GLUE / name
    loaded = sources.load(task, source="disk", dir=folder, splits=list(COUNTS[name]))
    assert {split: data.num_rows for split, data in loaded.items()} == COUNTS[name]
    assert all(data.features == task.features for data in loaded.values())
    if "train" in COUNTS[name]:
        assert set(sources.load(task, source="disk", dir=folder)) == set(COUNTS[name])
    assert loaded["test"]["idx"][:] == list(range(COUNTS[name]["test"]))


@pytest.mark.parametrize("name", COUNTS)
def test_rows_and_withheld_labels(name):
    task = registry.TASKS.get(f"glue/{name}")
    splits = [split for split in COUNTS[name] if split != "train"]
    loaded = sources.load(task, source="disk", dir=GLUE, splits=splits)
    for split, data in loaded.items():
        rows = task.rows(data, split)
        assert len(rows) == COUNTS[name][split]
        assert labelled(rows) == (split == "validation")
        assert all(isinstance(text, str) for text in rows["text"])


def test_a_constant_answer_scores_as_published():
    # WNLI's validation set: 40 of 71 are not_entailment, 56.3 per cent.
    task = registry.TASKS.get("glue/wnli")
    rows = task.rows(sources.load(task, source="disk", dir=GLUE)["validation"], "validation")
    scores = task.metrics([[1.0, 0.0]] * len(rows), rows)
    assert scores["accuracy"] == pytest.approx(40 / 71)


def test_no_train_split_is_said():
    with pytest.raises(sources.UserError, match="no train split of glue/qnli"):
        sources.load(registry.TASKS.get("glue/qnli"), source="disk", dir=GLUE)


def test_a_diagnostic_without_its_training_data_is_said():
    with pytest.raises(sources.UserError, match="no split file of glue/mnli"):
        sources.load(registry.TASKS.get("glue/ax"), source="disk", dir=GLUE)


def test_csv_copies_have_the_same_fingerprint(tmp_path):
    task = registry.TASKS.get("glue/cola")  # sentences with commas, quotation marks and backspaces
    loaded = sources.load(task, source="disk", dir=GLUE)
    for split, data in loaded.items():
        data.to_csv(tmp_path / f"{split}.csv")
    copied = sources.load(task, source="disk", dir=tmp_path)
    assert sources.fingerprint(copied) == sources.fingerprint(loaded)
