"""The columns of a task's files on disk, checked without reading their rows."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from camex_ft.data.conform import check_columns
from camex_ft.data.files import read_split, split_files, task_folder
from camex_ft.data.formats import suffixes
from camex_ft.data.sources import check_names
from camex_ft.tasks.base import Task

FIRST = 1 << 24  # characters of a header or a first row; a longer one is left to the run


def check_headers(task: Task, folder: Path, serves: Mapping[str, str]) -> None:
    """Check that the files of all splits are there with the columns that the task needs.

    Faults that rows alone show are left to the run, and so are files whose columns are not known without reading them.

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
            read_split(place, owner, name)  # says what was expected
        for file in files:
            columns = _columns(file, owner)
            if columns is not None:
                check_columns(columns, owner, split, str(file))


def _columns(file: Path, task: Task) -> list[str] | None:
    """Return the columns of a file, under the hub's names, or None where its beginning does not tell them."""
    if file.suffix not in suffixes(task) or not stat.S_ISREG(file.stat().st_mode):
        return None
    try:
        if file.suffix == ".parquet":
            names = list(pq.read_schema(file).names)
        elif file.suffix in (".csv", ".tsv"):
            names = _delimited(file, task)
        elif file.suffix == ".jsonl":
            names = _first_object(file, task)
        else:
            return None
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
        return None  # the run says what is wrong with it
    renamed = {alias: name for name, alias in task.aliases.items() if name not in names}
    return [renamed.get(name, name) for name in names] or None


def _delimited(file: Path, task: Task) -> list[str]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        line = stream.readline(FIRST)
    tab = file.suffix == ".tsv"
    names = next(csv.reader([line], delimiter="\t" if tab else ","), [])
    if tab and len(names) == len(task.headerless) and not set(task.columns) & set(names):
        return list(task.headerless)
    return names


def _first_object(file: Path, task: Task) -> list[str]:
    with file.open(encoding="utf-8-sig") as stream:
        line = next((line for line in iter(lambda: stream.readline(FIRST), "") if line.strip()), "")
    found = json.loads(line)
    if not isinstance(found, dict) or (task.unpack is not None and not set(task.columns) <= set(found)):
        return []
    return list(found)
