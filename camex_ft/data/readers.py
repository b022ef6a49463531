"""Read one file of examples as columns: parquet, jsonl, json, csv, tsv, and where a task is about plain text also txt.

Csv files are read with quotes. A line of txt is a row. Every fault is a `UserError` that names file and row.

Quotation marks in GLUE's own tsv files are text; in those of pandas and spreadsheets they quote. They quote where both
of these hold, and are text in every other file:

- Every field with a mark begins and ends with one, and those inside are doubled; read so, all rows have as many fields.
- A quoted field has to be quoted: it holds a mark, or a tab or line break without which rows differ in their number of
  fields (or have one alone). Or every field of the first row is quoted.

A mark in the middle of a text, or one that has no other, therefore turns quoting off for its file.

The builders of `datasets` are not used: they pad rows that lack fields, guess types (``NA`` becomes null, a date a
timestamp, an id with a gap a real number), rename columns that occur twice, and know no rows in their messages.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from camex_ft.tasks.base import Row, Task
from camex_ft.utils.errors import UserError

log = logging.getLogger(__name__)
Columns = dict[str, list[Any]]
UNREADABLE = (ValueError, RecursionError)  # not JSON, a number of thousands of digits, or nested too deeply
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
PLAIN = ".txt"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD = 2**24  # characters of a csv or tsv field; the csv module's 2**17 is less than some documents
MAX_BYTES = 2**32  # of a file, and of what a parquet file unpacks to: columns are held in memory
TOO_LARGE = "it is read into memory whole. Take a part of it"

MARK = '"'
FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)(\t|\r\n|\r|\n|\Z)')  # and what ends it
BREAK = re.compile(r"[\t\r\n]")
LINE_END = re.compile(r"\r\n|\r|\n")
LOOKS_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


def suffixes(task: Task) -> tuple[str, ...]:
    """Return the endings of the files that `task` can read."""
    return (*SUFFIXES, PLAIN) if task.plain_text else SUFFIXES


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
            return read_parquet([path], task)
        if path.suffix in (".jsonl", ".json"):
            rows = list(_read_json(path, task))
            names = dict.fromkeys(name for row in rows for name in row)
            return _hub_names({name: [row.get(name) for row in rows] for name in names}, task)
        return _read_delimited(path, task)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_undecodable(path)}; expected text in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_parquet(paths: Sequence[Path], task: Task) -> Columns:
    """Return the columns of a parquet file, or of its shards in order, the benchmark's own headers replaced.

    Raises:
        UserError: a file is missing, broken, or unpacks to more than `MAX_BYTES`.
    """
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
        if columns and columns.keys() != set(table.column_names):
            raise UserError(
                f"{path}: its columns are {', '.join(table.column_names)}; expected {', '.join(columns)}, as in "
                f"{paths[0].name}"
            )
        for name in table.column_names:
            columns.setdefault(name, []).extend(with_names(table.column(name).to_pylist(), features[name]))
    return _hub_names(columns, task)


def with_names(values: list[Any], feature: Any) -> list[Any]:
    """Return class ids as the names that the file itself gives them, so that another order of names does no harm."""
    if not isinstance(feature, ClassLabel):
        return values
    names = dict(enumerate(feature.names))
    return [names.get(value, value) for value in values]


def _check_file(path: Path) -> None:
    """Raise `UserError` for a pipe, a device or a folder, and for a file that is too large."""
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path}: expected a file, got {'a folder' if path.is_dir() else 'a pipe or device'}")
    if about.st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: {TOO_LARGE}")


def _read_delimited(path: Path, task: Task) -> Columns:
    csv.field_size_limit(MAX_FIELD)
    with path.open(newline="", encoding="utf-8-sig") as stream:
        text = stream.read()
    lines = io.StringIO(text, newline="")
    marks = path.suffix == ".csv" or is_quoted(text)
    reader = csv.reader(
        lines,
        delimiter=DELIMITERS[path.suffix],
        quoting=csv.QUOTE_MINIMAL if marks else csv.QUOTE_NONE,
        strict=True,
    )
    rows = _checked_rows(path, reader)
    header = next(rows, [])
    records: Iterable[list[str]] = rows
    if is_headerless(header, path, task):
        records = chain([header], rows)
        header = list(task.headerless)
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
    doubt = None if marks else looks_quoted(text, zip(*columns.values(), strict=True))
    if doubt is not None:
        log.warning(
            "%s: row %d: the field %.60s looks quoted. Its quotation marks are read as part of the text, since the "
            "file as a whole is not quoted. If they are quotes, save it as .csv or .jsonl",
            *(path, *doubt),
        )
    return _hub_names(columns, task)


def is_headerless(first: Sequence[str], path: Path, task: Task) -> bool:
    """Return whether the first row of a file is no header, as in the benchmark's own tsv files."""
    fields = path.suffix == ".tsv" and len(first) == len(task.headerless)
    return fields and not set(task.columns) & set(first)


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


def read_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON (`json.JSONDecodeError`), or a key occurs twice in an object.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return values


def _json_records(path: Path, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        try:
            yield from read_json(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
        except UNREADABLE as error:
            raise UserError(f"{path}: not readable JSON: {error}") from error
        return
    if path.suffix == ".json":  # one object over however many lines, or one a line
        with suppress(*UNREADABLE):
            whole = read_json(text)
            if isinstance(whole, dict):
                yield whole
                return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield read_json(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from error
            except UNREADABLE as error:
                raise UserError(f"{path}: line {number} is not readable JSON: {error}") from error


def _hub_names(columns: Columns, task: Task) -> Columns:
    for name, alias in task.aliases.items():
        if name not in columns and alias in columns:
            columns[name] = columns.pop(alias)
    return columns


def _undecodable(path: Path) -> str:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"line {line} holds byte 0x{data[error.start]:02x}, which is not UTF-8"
    return "undecodable"


def is_quoted(text: str) -> bool:
    """Return whether the fields of a tsv file are quoted.

    Args:
        text: the whole file.
    """
    if MARK not in text:
        return False
    first: list[str] = []
    marks = breaks = False
    for row in _quoted_rows(text):
        first = first or row or []
        if row is None or len(row) != len(first):
            return False
        inside = [field[1:-1] for field in row if field.startswith(MARK)]
        marks |= any(MARK in field for field in inside)
        breaks |= any(BREAK.search(field) for field in inside)
    if all(field.startswith(MARK) for field in first):
        return True
    plain = {line.count("\t") for line in LINE_END.split(text) if line}
    return marks or (breaks and (len(first) == 1 or plain != {len(first) - 1}))


def looks_quoted(text: str, rows: Iterable[Sequence[str]]) -> tuple[int, str] | None:
    """Find the first field that looks quoted in a file read without quotes: its row, from 1, and its text.

    A field with doubled marks inside looks quoted. If no mark of the file contradicts it, so does a field in a single
    pair of marks.

    Args:
        text: the whole file.
        rows: its rows, read without quotes.
    """
    if MARK not in text:
        return None
    single = all(row is not None for row in _quoted_rows(text))
    for number, row in enumerate(rows, start=1):
        for field in row:
            if LOOKS_QUOTED.fullmatch(field) and (single or MARK * 2 in field[1:-1]):
                return number, field
    return None


def _quoted_rows(text: str) -> Iterator[list[str] | None]:
    """Yield the fields of each row read as quoted, with their marks; None, as the last row, where that fails."""
    row: list[str] = []
    place = 0
    while place < len(text):
        field = FIELD.match(text, place)
        if field is None:
            yield None
            return
        row.append(field[1])
        place = field.end()
        if field[2] != "\t":
            if row != [""]:  # a blank line
                yield row
            row = []
    if row:  # a tab is the last character
        yield [*row, ""]
