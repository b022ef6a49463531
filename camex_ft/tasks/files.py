"""Split files on disk: which file holds a split, and its columns as lists, whatever the format.

Read are parquet (one file, or the hub's numbered shards), jsonl, json, csv and tsv, and where a task is about plain
text also txt (a line is a row) and folders of txt files. Tsv files have no quoting, as GLUE's own; a text may hold any
number of quotation marks there. Every fault is a `UserError` that names file and row.
"""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from camex_ft.errors import UserError, nearest
from camex_ft.tasks.base import Row, Task

Columns = dict[str, list[Any]]
UNREADABLE = (ValueError, RecursionError)  # not JSON, a number of thousands of digits, or nested too deeply
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
PLAIN = ".txt"
MAX_FIELD = (
    2**24
)  # characters of a csv or tsv field; the csv module's own limit is 2**17, less than some documents
MAX_BYTES = 2**32  # of a file, and of what a parquet file unpacks to: columns are held in memory
TOO_LARGE = "it is read into memory whole. Take a part of it"
ALIASES = {"validation": ("validation", "valid", "val", "dev")}


def suffixes(task: Task) -> tuple[str, ...]:
    """Return the endings of the files that `task` can read."""
    return (*SUFFIXES, PLAIN) if task.plain_text else SUFFIXES


def task_folder(root: Path, task: Task, *, guest: bool = False, others: Sequence[str] = ()) -> Path:
    """Return the folder that holds the split files of `task`: below `root`, or `root` itself.

    Args:
        root: the folder that the user named.
        guest: whether `root` may be another task's folder, beside which this task's is to be found.
        others: names of further splits that may be there, beside the task's own.

    Raises:
        UserError: `root` is missing, is no folder or cannot be read, or nothing there holds a split.
    """
    entries, splits = _entries(root), _own_splits(task)
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
    found = [path for path in entries if path.suffix in suffixes(task) and path.stem in stems]
    shards = [path for path in entries if path.match(f"{split}-[0-9]*-of-[0-9]*.parquet")]
    folders = [path for path in entries if task.plain_text and path.is_dir() and path.name in stems]
    if len(found) + bool(shards) + len(folders) > 1:
        names = ", ".join(path.name for path in [*found, *shards, *folders])
        raise UserError(f"{folder}: {names} all could be the {split} split of {task.id}; keep one of them")
    return found or sorted(shards) or [text for path in folders for text in sorted(path.rglob(f"*{PLAIN}"))]


def read_split(folder: Path, task: Task, split: str) -> tuple[Columns, str]:
    """Return the columns of a split and where they come from, for messages.

    Raises:
        UserError: there is no such file, or it is broken.
    """
    files = split_files(folder, task, split)
    if not files:
        listing = _listing(_entries(folder))
        raise UserError(
            f"{folder}: no {split} split of {task.id}. Expected {_expected(task, split)}; found {listing}. If another "
            f"split is to serve as it, name that: data.splits={{{split}: NAME}}"
        )
    if files[0].suffix == ".parquet":
        return _read_parquet(files, task), str(files[0])
    if len(files) > 1:
        read = [read_file(file, task) for file in files]
        return {name: [value for each in read for value in each[name]] for name in read[0]}, str(
            files[0].parent
        )
    return read_file(files[0], task), str(files[0])


def read_file(path: Path, task: Task) -> Columns:
    """Return the columns of one file, the benchmark's own headers replaced by the hub's.

    Raises:
        UserError: the file is missing, of unknown format, undecodable or broken; with the row where there is one.
    """
    known = suffixes(task)
    if path.suffix not in known:
        raise UserError(f"{path}: unknown format '{path.suffix}'; expected one of {', '.join(known)}")
    _check_file(path)
    try:
        if path.suffix == PLAIN:
            return {"text": path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")}
        if path.suffix == ".parquet":
            return _read_parquet([path], task)
        if path.suffix in (".jsonl", ".json"):
            return _by_column(_read_json(path, task))
        return _read_delimited(path, task)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_undecodable(path)}; expected text in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_file(path: Path) -> None:
    """Raise `UserError` for what is no file, such as a pipe that nobody writes into, and for what is too large."""
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError(
            f"{path}: expected a file, and it is {'a folder' if path.is_dir() else 'a pipe or device'}"
        )
    if about.st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: {TOO_LARGE}")


def _read_delimited(path: Path, task: Task) -> Columns:
    csv.field_size_limit(MAX_FIELD)
    tab = path.suffix == ".tsv"
    with path.open(newline="", encoding="utf-8-sig") as stream:
        if tab:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            reader = csv.reader(stream, strict=True)
        rows = _checked_rows(path, reader)
        header = next(rows, [])
        if tab and len(header) == len(task.headerless) and not set(task.columns) & set(header):
            records: Iterable[list[str]] = [header, *rows]
            header = list(task.headerless)
        else:
            records = rows
        if len(set(header)) < len(header):
            raise UserError(f"{path}: a column occurs twice in the header: {', '.join(header)}")
        columns: Columns = {name: [] for name in header}
        for number, row in enumerate(records, start=1):
            if len(row) != len(header):
                where = f"row {number} (line {reader.line_num})"
                raise UserError(
                    f"{path}: {where} has {len(row)} fields; expected {len(header)}: {', '.join(header)}"
                )
            for name, value in zip(header, row, strict=True):
                columns[name].append(value)
    return _hub_names(columns, task)


def _checked_rows(path: Path, reader: Any) -> Iterator[list[str]]:
    rows = line = 0
    try:
        for row in reader:
            line = reader.line_num
            if row:
                yield row
                rows += 1
    except csv.Error as error:
        hint = "a field with quotes must end with a quote, and quotes inside are doubled"
        if "field larger" in str(error):
            hint = "a quote that does not end takes all that follows into its field"
        raise UserError(f"{path}: row {rows} (line {line + 1}) is broken: {error}; {hint}") from error


def _read_json(path: Path, task: Task) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    for number, record in enumerate(_json_records(path, text), start=1):
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{path}: row {number} is a JSON {kind}; expected an object with the columns")
        if task.unpack is None or set(task.columns) <= set(record):
            yield record
            continue
        try:
            yield from task.unpack(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: row {number} has neither the columns {', '.join(task.columns)} nor the nesting of "
                f"{task.benchmark_name}'s own files ({type(error).__name__}: {error})"
            ) from error


def _json_records(path: Path, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
        except UNREADABLE as error:
            raise UserError(f"{path}: not readable JSON: {error}") from error
        return
    if path.suffix == ".json" and (whole := _one_object(text)) is not None:
        yield whole
        return
    lines = (line for line in text.split("\n"))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from error
            except UNREADABLE as error:
                raise UserError(f"{path}: line {number} is not readable JSON: {error}") from error


def _one_object(text: str) -> dict[str, Any] | None:
    """Return the object that the whole text is, over however many lines, or None."""
    try:
        found = json.loads(text)
    except UNREADABLE:
        return None
    return found if isinstance(found, dict) else None


def _read_parquet(paths: list[Path], task: Task) -> Columns:
    columns: Columns = {}
    for path in paths:
        _check_file(path)
        try:
            parts = pq.read_metadata(path)
            if sum(parts.row_group(n).total_byte_size for n in range(parts.num_row_groups)) > MAX_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes: {TOO_LARGE}")
            table = pq.read_table(path)
            features = Features.from_arrow_schema(table.schema)
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # its features are JSON
            raise UserError(
                f"{path}: not a readable parquet file: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        if len(set(table.column_names)) < len(table.column_names):
            raise UserError(f"{path}: a column occurs twice: {', '.join(table.column_names)}")
        for name in table.column_names:
            columns.setdefault(name, []).extend(with_names(table.column(name).to_pylist(), features[name]))
    return _hub_names(columns, task)


def with_names(values: list[Any], feature: Any) -> list[Any]:
    """Return class ids as the names that the file itself gives them, so that another order of names does no harm."""
    if not isinstance(feature, ClassLabel):
        return values
    names = dict(enumerate(feature.names))
    return [names.get(value, value) for value in values]


def _by_column(records: Iterable[Row]) -> Columns:
    rows = list(records)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _hub_names(columns: Columns, task: Task) -> Columns:
    for name, alias in task.aliases.items():
        if name not in columns and alias in columns:
            columns[name] = columns.pop(alias)
    return columns


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


def _own_splits(task: Task) -> tuple[str, ...]:
    return task.splits["test"] if task.train_from else task.all_splits()


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


def _undecodable(path: Path) -> str:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"line {line} holds byte 0x{data[error.start]:02x}, which is not UTF-8"
    return "undecodable"
