"""A task's data from the hub, from disk or from the embedded generators, validated and in the hub's columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from camex_ft import embedded
from camex_ft.errors import UserError, nearest
from camex_ft.tasks.base import Task
from camex_ft.tasks.conform import conform
from camex_ft.tasks.files import Columns, read_file, read_split, split_files, task_folder, with_names

SOURCES = ("hub", "disk", "embedded")
SECONDS = 5  # to wait for the hub's answer before the data counts as out of reach


def load(
    task: Task,
    *,
    source: str,
    dir: str | Path | None = None,
    seed: int = 0,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    splits: Sequence[str] | None = None,
    serves: Mapping[str, str] | None = None,
) -> dict[str, Dataset]:
    """Return split -> data set with exactly the hub's columns (and ``domain`` from the embedded source).

    Args:
        task: the task; a test-only diagnostic gets the train and validation splits of its `train_from` task.
        source: ``hub``, ``disk`` or ``embedded``.
        dir: for disk, the folder with the split files, or one that holds a folder named for the task.
        seed: of the embedded generator.
        train_rows: keep the first rows of the train split only.
        eval_rows: keep the first rows of each validation split only; test splits stay whole, as submissions need them.
        splits: the splits to load, all of which must be there. By default train and validation must be, and test
            splits are loaded where they exist.
        serves: split -> the split of the data that serves as it; one that is not named serves as itself.

    Raises:
        UserError: data is missing or faulty; with file and row, and what was expected.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data source '{source}'; expected one of {', '.join(SOURCES)}")
    for split in (*(splits or ()), *(serves or ())):
        if split not in task.all_splits():
            known = ", ".join(task.all_splits())
            raise UserError(
                f"{task.id} has no split '{split}'.{nearest(split, task.all_splits())} It has {known}"
            )
    if source == "disk" and dir is None:
        raise UserError(
            "data.source is disk, but data.dir is not set; expected the folder with the split files"
        )
    names = {split: (serves or {}).get(split, split) for split in splits or task.all_splits()}
    loaded = {}
    for split, name in names.items():
        optional = splits is None and split in task.splits["test"] and name == split
        if source != "disk" and name in task.unpublished:
            if optional:
                continue
            raise UserError(
                f"{task.id}: the {name} split is not published; expected data.source=disk and data.dir"
            )
        owner = task.owner(split)
        if source == "disk":
            others = [*(serves or {}).values()]
            folder = task_folder(Path(str(dir)), owner, guest=owner is not task, others=others)
            data = _from_disk(owner, split, name, folder, optional=optional)
        elif source == "hub":
            data = _from_hub(owner, split, name)
        else:
            data = _from_embedded(owner, split, name, seed)
        if data is not None:
            owner.check_split(data, split)
            loaded[split] = data
    return {split: _first(data, split, task, train_rows, eval_rows) for split, data in loaded.items()}


def load_file(task: Task, path: str | Path) -> Dataset:
    """Return the examples of one file, which may lack labels, as a test split of `task`.

    Raises:
        UserError: the file is missing or faulty.
    """
    return conform(read_file(Path(path), task), task, task.splits["test"][0], str(path))


def fingerprint(splits: Mapping[str, Dataset]) -> str:
    """Return the sha256 (hex) of the splits' names, columns and values.

    It depends neither on the order of splits nor on where the data came from: parquet and csv of the same rows agree.
    """
    digest = hashlib.sha256()
    for split in sorted(splits):
        data = splits[split]
        digest.update(json.dumps([split, data.num_rows, sorted(data.column_names)]).encode())
        for batch in data.with_format(None).iter(batch_size=1000):
            digest.update(json.dumps(batch, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def hub_cached(task: Task) -> bool:
    """Return whether the local cache of `datasets` holds the task, so that the hub source works without network."""
    return (
        Path(datasets.config.HF_DATASETS_CACHE) / task.hub.replace("/", "___") / task.configuration
    ).is_dir()


def hub_unreachable(task: Task) -> str | None:
    """Return why the hub does not answer for the task's data set, or None where it does; at most a few seconds."""
    try:
        huggingface_hub.HfApi().dataset_info(task.hub, timeout=SECONDS)
    except Exception as error:  # whatever the transport raises, the data cannot be had
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _first(data: Dataset, split: str, task: Task, train_rows: int | None, eval_rows: int | None) -> Dataset:
    limit = (
        train_rows
        if split == task.splits["train"]
        else eval_rows
        if split in task.splits["validation"]
        else None
    )
    return data if limit is None or limit >= len(data) else data.select(range(limit))


def _from_embedded(task: Task, split: str, name: str, seed: int) -> Dataset:
    splits = _corpus(task.id, seed)
    if name not in splits:
        raise UserError(
            f"data.splits: the embedded corpus {task.id} has no split '{name}'.{nearest(name, splits)} It has "
            f"{', '.join(splits)}"
        )
    data = splits[name]
    columns: Columns = {column: data[column][:] for column in data.column_names}
    return conform(columns, task, split, f"embedded corpus {task.id}, {name}", domain=True)


@lru_cache(maxsize=2)
def _corpus(name: str, seed: int) -> dict[str, Dataset]:
    return embedded.corpus(name, seed=seed)


def _from_disk(task: Task, split: str, name: str, folder: Path, *, optional: bool) -> Dataset | None:
    if optional and not split_files(folder, task, name):
        return None
    columns, origin = read_split(folder, task, name)
    return conform(columns, task, split, origin)


def _from_hub(task: Task, split: str, name: str) -> Dataset:
    origin = f"{task.hub} {task.configuration} ({name})"
    if not hub_cached(task) and (reason := hub_unreachable(task)):
        raise _out_of_reach(task, reason)
    try:
        data = datasets.load_dataset(task.hub, task.configuration, split=name)
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        if name != split and "split" in str(error):
            raise UserError(f"data.splits: {origin}: {error}") from error
        raise _out_of_reach(task, f"{type(error).__name__}: {error}") from error
    columns = {column: with_names(data[column][:], feature) for column, feature in data.features.items()}
    return conform(columns, task, split, origin)


def _out_of_reach(task: Task, reason: str) -> UserError:
    formats = "parquet, jsonl, csv or tsv" + ", or as txt" * task.plain_text
    return UserError(
        f"data.source is hub, but {task.hub} ({task.configuration}) is neither in the local cache "
        f"({datasets.config.HF_DATASETS_CACHE}) nor within reach ({reason}). One of three ways:\n"
        f"  - where there is network, fill the cache and bring it here (HF_HOME): "
        f"python -c \"import datasets; datasets.load_dataset('{task.hub}', '{task.configuration}')\"\n"
        f"  - data.source=disk data.dir=FOLDER, with train, validation and test as {formats}\n"
        f"  - data.source=embedded, the corpora that the package makes itself"
    )
