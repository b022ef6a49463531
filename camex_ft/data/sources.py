"""Load a task's data from the hub, from disk or as synthetic data, validated and in the hub's columns."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import datasets
from datasets import Dataset

from camex_ft import synthetic
from camex_ft.data.checks import to_dataset
from camex_ft.data.readers import Columns, read_file, with_names
from camex_ft.data.split_files import check_names, read_split, split_files, task_folder
from camex_ft.tasks.base import Task
from camex_ft.utils import hub
from camex_ft.utils.errors import UserError, nearest

SOURCES = ("hub", "disk", "embedded")
# messages of `datasets` in errors without a type
SPLITLESS = re.compile(r"Unknown split|Bad split")
CONFIGLESS = re.compile(r"BuilderConfig .* not found|doesn't contain .* config")


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
    domain: int | None = None,
) -> dict[str, Dataset]:
    """Return split -> data set with exactly the hub's columns (and ``domain`` of synthetic data).

    Args:
        task: the task; a test-only diagnostic gets the train and validation splits of its `train_from` task.
        source: ``hub``, ``disk`` or ``embedded``.
        dir: for disk, the folder with the split files, or one that holds a folder named for the task.
        seed: of synthetic data.
        train_rows: keep the first rows of the train split only.
        eval_rows: keep the first rows of each validation split only; test splits stay whole, as submissions need them.
        splits: the splits to load, all of which must be there. By default train and validation must be, and test
            splits are loaded where they exist.
        serves: split -> the split of the data that serves as it; one that is not named serves as itself.
        domain: of synthetic data, keep the rows of this domain only; they are counted afterwards.

    Raises:
        UserError: data is missing or faulty; with file and row, and what was expected.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data source '{source}'; expected one of {', '.join(SOURCES)}")
    check_names(task, (*(splits or ()), *(serves or ())))
    if source == "disk" and dir is None:
        raise UserError(
            "data.source is disk, but data.dir is not set; expected the folder with the split files"
        )
    names = {split: (serves or {}).get(split, split) for split in splits or task.all_splits()}
    loaded: dict[str, Dataset] = {}
    unreachable: dict[str, Exception | None] = {}
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
            if owner.hub not in unreachable:  # one request: without an answer it takes seconds
                unreachable[owner.hub] = hub.silence(owner.hub, "dataset")
            data = _from_hub(owner, split, name, unreachable=unreachable[owner.hub], optional=optional)
        else:
            data = _of_domain(_synthetic(owner, split, name, seed), domain)
        if data is not None:
            owner.check_split(data, split)
            loaded[split] = data
    return {split: _first(data, split, task, train_rows, eval_rows) for split, data in loaded.items()}


def load_file(task: Task, path: str | Path) -> Dataset:
    """Return the examples of one file, which may lack labels, as a test split of `task`.

    Raises:
        UserError: the file is missing or faulty.
    """
    return to_dataset(read_file(Path(path), task), task, task.splits["test"][0], str(path))


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


def _first(data: Dataset, split: str, task: Task, train_rows: int | None, eval_rows: int | None) -> Dataset:
    limit = (
        train_rows
        if split == task.splits["train"]
        else eval_rows
        if split in task.splits["validation"]
        else None
    )
    return data if limit is None or limit >= len(data) else data.select(range(limit))


def _synthetic(task: Task, split: str, name: str, seed: int) -> Dataset:
    splits = _corpus(task.id, seed)
    if name not in splits:
        raise UserError(
            f"data.splits: the synthetic data of {task.id} have no split '{name}'.{nearest(name, splits)} They have "
            f"{', '.join(splits)}"
        )
    data = splits[name]
    columns: Columns = {column: data[column][:] for column in data.column_names}
    return to_dataset(columns, task, split, f"synthetic data of {task.id}, {name}", domain=True)


def _of_domain(data: Dataset, domain: int | None) -> Dataset:
    if domain is None:
        return data
    domains = data["domain"][:]
    chosen = [row for row, of in enumerate(domains) if of == domain]
    if not chosen:
        raise UserError(
            f"data.domain: no row is of domain {domain}: the embedded corpora have the domains 0 to {max(domains)}"
        )
    return data.select(chosen)


@lru_cache(maxsize=2)
def _corpus(name: str, seed: int) -> dict[str, Dataset]:
    return synthetic.corpus(name, seed=seed)


def _from_disk(task: Task, split: str, name: str, folder: Path, *, optional: bool) -> Dataset | None:
    if optional and not split_files(folder, task, name):
        return None
    columns, origin = read_split(folder, task, name)
    return to_dataset(columns, task, split, origin)


def _from_hub(
    task: Task, split: str, name: str, *, unreachable: Exception | None, optional: bool
) -> Dataset | None:
    origin = f"{task.hub} {task.configuration} ({name})"
    try:
        data = _from_cache(task, name) if unreachable is not None else _downloaded(task, name)
    except Exception as error:  # each version of the hub's library has another transport with other errors
        if SPLITLESS.search(str(error)):
            if optional:
                return None
            raise UserError(f"{'data.splits: ' if name != split else ''}{origin}: {error}") from error
        if CONFIGLESS.search(str(error)):
            raise UserError(f"{task.hub} has no configuration '{task.configuration}': {error}") from error
        raise UserError(_unavailable(task, unreachable or error)) from error
    if data is None:
        raise UserError(_unavailable(task, cast("Exception", unreachable)))
    columns = {column: with_names(data[column][:], feature) for column, feature in data.features.items()}
    return to_dataset(columns, task, split, origin)


def _downloaded(task: Task, name: str) -> Dataset:
    with hub.bounded():
        return cast("Dataset", datasets.load_dataset(task.hub, task.configuration, split=name))


def _from_cache(task: Task, name: str) -> Dataset | None:
    """Return a split from the cache of `datasets`, or from the files in the hub cache; None where it is in neither."""
    prepared = hub.is_prepared(task.hub, task.configuration)
    place: str | Path | None = task.hub if prepared else hub.snapshot(task.hub, "dataset")
    if place is None:
        return None
    with hub.cache_alone():
        return cast("Dataset", datasets.load_dataset(str(place), task.configuration, split=name))


def _unavailable(task: Task, reason: Exception) -> str:
    refused = hub.refusal(reason, task.hub, "dataset")
    why = (
        f"{refused}; and {task.configuration} of it is not in the local cache ({datasets.config.HF_DATASETS_CACHE})"
        if refused
        else f"{task.hub} ({task.configuration}) is neither in the local cache "
        f"({datasets.config.HF_DATASETS_CACHE}) nor can it be fetched ({hub.cause(reason)})"
    )
    formats = "parquet, jsonl, csv or tsv files" + ", or as txt" * task.plain_text
    return (
        f"data.source is hub, but {why}. If the hub is reachable again, the same command resumes the download. "
        "Otherwise choose one of three ways:\n"
        "  - fill the cache on a machine with network, and copy it here (HF_HOME): "
        f"python -c \"import datasets; datasets.load_dataset('{task.hub}', '{task.configuration}')\"\n"
        f"  - data.source=disk data.dir=FOLDER, with train, validation and test as {formats}\n"
        "  - data.source=embedded, for the synthetic data of the package"
    )
