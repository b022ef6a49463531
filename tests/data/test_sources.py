"""The hub and the embedded corpora as sources; fingerprints."""

import json
import re
import time

import datasets
import pytest
from datasets import Dataset, load_dataset

from camex_ft.data import sources
from camex_ft.utils import hub, registry
from camex_ft.utils.errors import UserError

SST2 = registry.TASKS.get("glue/sst2")
ROWS = [{"sentence": f"word {i}", "label": i % 2, "idx": i} for i in range(4)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder of `datasets`, with the hub out of reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fill(cache, tmp_path, rows, task=SST2):
    """Put `rows` into the cache as if ``load_dataset(task.hub, task.name)`` had downloaded them."""
    files = {}
    for split in ("train", "validation", "test"):
        files[split] = str(tmp_path / f"{split}.parquet")
        Dataset.from_list(rows, features=task.features).to_parquet(files[split])
    load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made" / "parquet").glob("*/0.0.0/*/dataset_info.json")).parent
    target = cache / task.hub.replace("/", "___") / task.name / "0.0.0" / "0123456789abcdef"
    target.mkdir(parents=True)
    stem = task.hub.split("/")[-1]
    for file in made.glob("*.arrow"):
        file.rename(target / file.name.replace("parquet-", f"{stem}-"))
    info = json.loads((made / "dataset_info.json").read_text())
    info.update(builder_name=stem, dataset_name=stem, config_name=task.name)
    (target / "dataset_info.json").write_text(json.dumps(info))


def test_a_filled_cache_needs_no_network(cache, tmp_path):
    fill(cache, tmp_path, ROWS)
    assert hub.is_prepared(SST2.hub, SST2.configuration)
    loaded = sources.load(SST2, source="hub", train_rows=3)
    assert loaded["train"].to_list() == ROWS[:3]
    assert loaded["validation"].features == SST2.features


def test_cached_data_is_validated_too(cache, tmp_path):
    fill(cache, tmp_path, [{**ROWS[0], "label": -1}, *ROWS[1:]])
    with pytest.raises(UserError, match=r"nyu-mll/glue sst2 \(train\): row 1: column 'label' is -1"):
        sources.load(SST2, source="hub")


@pytest.mark.parametrize("source", ["hub", "embedded"])
def test_a_boolean_is_no_label_of_the_hub_or_of_a_corpus(cache, source, monkeypatch):
    data = Dataset.from_list([{**row, "label": bool(row["label"]), "domain": 0} for row in ROWS])
    monkeypatch.setattr(sources, "_from_cache", lambda task, name: data)
    monkeypatch.setattr(sources, "_corpus", lambda name, seed: dict.fromkeys(SST2.all_splits(), data))
    with pytest.raises(UserError, match=r"sst2\W+train\W+row 1: column 'label' is False; expected 0"):
        sources.load(SST2, source=source)


@pytest.mark.parametrize("name", registry.TASKS.names())
def test_without_network_the_message_names_three_ways(cache, name):
    task = registry.TASKS.get(name)
    assert not hub.is_prepared(task.hub, task.configuration)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        sources.load(task, source="hub")
    assert time.monotonic() - start < 5  # no series of retries
    message, owner = str(caught.value), task.owner("train")
    assert f"{task.hub} ({owner.configuration}) is neither in the local cache" in message
    assert f"load_dataset('{task.hub}', '{owner.configuration}')" in message
    assert "data.source=disk data.dir=FOLDER" in message and "data.source=embedded" in message


def test_a_transport_error_is_out_of_reach(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fail)
    with pytest.raises(UserError, match="Name or service not known"):
        sources.load(SST2, source="hub")


def test_an_unknown_source_is_our_fault():
    with pytest.raises(ValueError, match="unknown data source 'hbu'"):
        sources.load(SST2, source="hbu")


def split(rows, columns=("sentence", "label", "idx")):
    return Dataset.from_list([{c: row[c] for c in columns} for row in rows])


def test_fingerprint_sees_values_order_and_splits_only():
    plain = sources.fingerprint({"train": split(ROWS), "test": split(ROWS[:1])})
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert sources.fingerprint({"test": split(ROWS[:1]), "train": split(ROWS)}) == plain
    assert (
        sources.fingerprint({"train": split(ROWS, ("idx", "label", "sentence")), "test": split(ROWS[:1])})
        == plain
    )
    others = [
        {"train": split(ROWS)},
        {"train": split(ROWS), "validation": split(ROWS[:1])},
        {"train": split(ROWS[::-1]), "test": split(ROWS[:1])},
        {"train": split([{**ROWS[0], "label": 1}, *ROWS[1:]]), "test": split(ROWS[:1])},
        {"train": split(ROWS).rename_column("idx", "id"), "test": split(ROWS[:1])},
    ]
    assert len({plain, *map(sources.fingerprint, others)}) == 6


def test_fingerprint_is_that_of_a_known_data_set():
    # The value may change only on purpose: records of the same data would no longer match.
    assert sources.fingerprint({"train": split(ROWS)})[:16] == "c7de220c63552c33"
