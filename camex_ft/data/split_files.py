"""Find and read the files of a split, and check their columns without reading their rows.

A split is one file, the hub's numbered shards of parquet, or where a task is about plain text a folder of txt files.
Every fault is a `UserError` that names the files expected and those in the folder.
"""

from __future__ import annotations

import csv
import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from camex_ft.data.checks import check_columns
from camex_ft.data.readers import (
    DELIMITERS,
    PLAIN,
    Columns,
    is_headerless,
    read_file,
    read_parquet,
    suffixes,
)
from camex_ft.tasks.base import Task
from camex_ft.utils.errors import UserError, nearest

ALIASES = {"validation": ("validation", "valid", "val", "dev")}
FIRST = 1 << 24  # characters of a header or a first row; a longer one is left to the run
SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def task_folder(root: Path, task: Task, *, guest: bool = False, others: Sequence[str] = ()) -> Path:
    """Return the folder that holds the split files of `task`: below `root`, or `root` itself.

    Args:
        root: the folder that the user named.
        guest: whether `root` may be another task's folder, beside which this task's is to be found.
        others: names of further splits that may be there, beside the task's own.

    Raises:
        UserError: `root` is missing, is no folder or cannot be read, or nothing there holds a split.
    """
    entries, splits = _entries(root), task.splits["test"] if task.train_from else task.all_splits()
    folders = (f"{task.suite}/{task.name}", task.name, task.benchmark_name)
    places = [root / name for name in folders]
    places += [root.parent / name for name in folders[1:]] if guest else [root]
    for place in places:
        if place.is_dir() and any(split_files(place, task, name) for name in (*splits, *others)):
            return place
    tried = ", ".join(str(place) for place in dict.fromkeys(places))
    raise UserError(
        f"data.dir: no split file of {task.id} in {tried}. Expected {_expected(task, splits[0])} "
        f"(splits: {', '.join(splits)}); {root} holds {_listing(entries)}"
    )


def split_files(folder: Path, task: Task, split: str) -> list[Path]:
    """Return the file of a split, the shards of a parquet file, the text files of a folder, or an empty list.

    Raises:
        UserError: several files could be meant.
    """
    entries = _entries(folder)
    stems = _stems(task, split)
    files = [path for path in entries if path.suffix in suffixes(task) and path.stem in stems]
    shards = [path for path in entries if (name := SHARD.search(path.name)) and path.name == split + name[0]]
    folders = [path for path in entries if task.plain_text and path.is_dir() and path.name in stems]
    if len(files) + bool(shards) + len(folders) > 1:
        names = ", ".join(path.name for path in [*files, *shards, *folders])
        raise UserError(f"{folder}: {names} all could be the {split} split of {task.id}; keep one of them")
    return (
        files
        or sorted(shards, key=_shard)
        or [text for path in folders for text in sorted(path.rglob(f"*{PLAIN}"))]
    )


def read_split(folder: Path, task: Task, split: str) -> tuple[Columns, str]:
    """Return the columns of a split and their origin, for messages.

    Raises:
        UserError: the file is missing or broken.
    """
    files = split_files(folder, task, split)
    if not files:
        listing = _listing(_entries(folder))
        raise UserError(
            f"{folder}: no {split} split of {task.id}. Expected {_expected(task, split)}; found {listing}. If another "
            f"split is to serve as it, name that: data.splits={{{split}: NAME}}"
        )
    if files[0].suffix == ".parquet":
        _check_shards(files)
        return read_parquet(files, task), str(files[0])
    if len(files) > 1:  # texts of a folder
        return {"text": [text for file in files for text in read_file(file, task)["text"]]}, str(
            files[0].parent
        )
    return read_file(files[0], task), str(files[0])


def _shard(file: Path) -> list[int]:
    """Return the number of a shard and the number of all shards; an empty list for another file."""
    shard = SHARD.search(file.name)
    return [int(shard[1]), int(shard[2])] if shard else []


def _check_shards(files: Sequence[Path]) -> None:
    """Raise `UserError` for numbered shards that are not all of one set."""
    numbers = [_shard(file) for file in files if _shard(file)]
    count = numbers[0][1] if numbers else 0
    if numbers != [[number, count] for number in range(count)]:
        raise UserError(
            f"{files[0].parent}: the shards of a split must be one whole set: expected numbers 0 to {count - 1} of "
            f"{count}; found {', '.join(file.name for file in files)}. Add what is missing, or number the files as one "
            "set"
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError as error:
        around = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"data.dir: there is no folder {folder}.{nearest(folder.name, around)}") from error
    except NotADirectoryError as error:
        raise UserError(
            f"data.dir: {folder} is a file; expected the folder that holds the split files"
        ) from error
    except OSError as error:
        raise UserError(f"data.dir: {folder} cannot be read: {error.strerror}") from error


def _stems(task: Task, split: str) -> tuple[str, ...]:
    base, _, rest = split.partition("_")
    stems = tuple(f"{name}_{rest}" if rest else name for name in ALIASES.get(base, (base,)))
    stems += task.stems.get(split, ())
    return (*stems, task.benchmark_name) if task.train_from else stems


def _expected(task: Task, split: str) -> str:
    stems = _stems(task, split)
    known = suffixes(task)
    folder = f", or a folder {stems[0]}/ of {PLAIN} files" if task.plain_text else ""
    return f"{stems[0]} with {', '.join(known[:-1])} or {known[-1]}{folder}"


def _listing(entries: list[Path]) -> str:
    names = [path.name + "/" * path.is_dir() for path in entries]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def check_names(task: Task, splits: Sequence[str]) -> None:
    """Raise `UserError` for a split that the task does not have."""
    for split in splits:
        if split not in task.all_splits():
            known = ", ".join(task.all_splits())
            raise UserError(
                f"{task.id} has no split '{split}'.{nearest(split, task.all_splits())} It has {known}"
            )


def check_headers(task: Task, folder: Path, serves: Mapping[str, str]) -> None:
    """Check that the files of all splits are there with the columns that the task needs.

    Faults of single rows are left to the run, and so are files whose columns are not known without reading all of them.

    Args:
        task: the task.
        folder: with the split files, or one that holds a folder named for the task.
        serves: split -> the split of the data that serves as it.

    Raises:
        UserError: a file or a column is missing; with what was expected.
    """
    check_names(task, tuple(serves))
    for split in task.all_splits():
        name, owner = serves.get(split, split), task.owner(split)
        place = task_folder(folder, owner, guest=owner is not task, others=[*serves.values()])
        files = split_files(place, owner, name)
        if not files and split in task.splits["test"] and name == split:
            continue
        if not files:
            read_split(place, owner, name)  # raises the error for a missing split
        for file in files:
            columns = _columns(file, owner)
            if columns is not None:
                check_columns(columns, owner, split, str(file))


def _columns(file: Path, task: Task) -> list[str] | None:
    """Return the columns of a file, under the hub's names, or None where its beginning does not tell them."""
    known = file.suffix in (".parquet", ".jsonl", *DELIMITERS)
    if not known or not stat.S_ISREG(file.stat().st_mode):
        return None
    try:
        names = list(pq.read_schema(file).names) if file.suffix == ".parquet" else _first_line(file, task)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
        return None  # the run reports the fault
    renamed = {alias: name for name, alias in task.aliases.items() if name not in names}
    return [renamed.get(name, name) for name in names] or None


def _first_line(file: Path, task: Task) -> list[str]:
    """Return the columns that the first line of a csv, tsv or jsonl file tells."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        line = next((line for line in iter(lambda: stream.readline(FIRST), "") if line.strip()), "")
    if file.suffix in DELIMITERS:
        names = next(csv.reader([line], delimiter=DELIMITERS[file.suffix]), [])
        return list(task.headerless) if is_headerless(names, file, task) else names
    row = json.loads(line)
    nested = not isinstance(row, dict) or (task.unpack is not None and not set(task.columns) <= set(row))
    return [] if nested else list(row)
