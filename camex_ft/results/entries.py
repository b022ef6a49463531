"""Finished runs, and the cells of a grid that they fill: what tables, pictures and reports are made of."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from camex_ft.results.folder import RunFolder, find_done
from camex_ft.results.record import Record, load_record
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError
from camex_ft.utils.logs import read_lines

SECTIONS = ("merging", "routing", "upcycle")
PROTOCOL = "merging.protocol"
HISTORY = ".history.jsonl"
LONGEST = 150  # characters of a kept record's name; a file system takes 255


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run.

    Attributes:
        record: its record.
        history: the lines of its history.jsonl; none where it was not kept.
    """

    record: Record
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell of a grid.

    Attributes:
        task: its id, such as "glue/sst2".
        row: label of the row, such as "ties-ca" or "ties-ca, alpha 0.5".
        keys: what makes the row, by configuration key; neither task nor seed.
        seed: of the run.
        result: None where it has not been run, or has failed.
    """

    task: str
    row: str
    seed: int
    keys: Mapping[str, Any] = field(default_factory=dict)
    result: Result | None = None


def read_results(folder: Path | str) -> list[Result]:
    """Return the finished runs of a folder, sorted by name.

    Args:
        folder: one of records (``NAME.json``, beside it ``NAME.history.jsonl`` where it was kept), or an output folder,
            with ``runs/*/record.json``.

    Raises:
        UserError: there is no record in it, or one is broken.
    """
    folder = Path(folder)
    if (folder / "runs").is_dir():
        runs = [RunFolder(path) for path in sorted((folder / "runs").iterdir()) if path.is_dir()]
        found = [(find_done(run), run) for run in runs]
        results = [
            Result(record=record, history=tuple(run.read_history()))
            for record, run in found
            if record is not None
        ]
    else:
        results = [
            Result(record=load_record(file), history=tuple(read_lines(file.with_name(file.stem + HISTORY))))
            for file in sorted(folder.glob("*.json"))
        ]
    if not results:
        raise UserError(f"{folder}: no records here; expected NAME.json files, or runs/NAME/record.json")
    return results


def keep_entries(entries: Sequence[Entry], folder: Path | str) -> int:
    """Write the results of these cells into a folder, named by task, row and seed; return how many there are.

    Rows that would have the same name, or are cut to it, are numbered.
    """
    done = [(entry, entry.result) for entry in entries if entry.result is not None]
    taken: set[str] = set()
    for entry, result in done:
        words = f"{entry.task.rpartition('/')[2]}-{entry.row}"
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", words)[:LONGEST].lstrip(".")
        names = (f"{stem}{f'-{n}' if n > 1 else ''}-seed{entry.seed}" for n in count(1))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())  # file systems that do not tell upper from lower case
        keep_result(result, folder, name)
    return len(done)


def keep_result(result: Result, folder: Path | str, name: str) -> None:
    """Write a result as ``NAME.json`` and ``NAME.history.jsonl``, the form that `read_results` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in result.history)
    write_atomically(folder / f"{name}{HISTORY}", lines)
    write_atomically(folder / f"{name}.json", result.record.to_json())


def entries_of(results: Sequence[Result]) -> list[Entry]:
    """Return the cells that finished runs fill, one row a protocol and way to run it, by task and row.

    Where the runs of one protocol on a task differ in how they merge, route or upcycle, each way is a row, named by
    what differs.
    """
    by_task: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_task[result.record.task][result.record.protocol].append(result)
    return [
        entry
        for _, protocols in sorted(by_task.items())
        for _, some in sorted(protocols.items())
        for entry in _entries(some)
    ]


def row_label(keys: Mapping[str, Any]) -> str:
    """Return the label of a row: its protocol, then the other keys' last names with their values."""
    others = [f"{name_of(key)} {_short(value)}" for key, value in keys.items() if key != PROTOCOL]
    return ", ".join([*([str(keys[PROTOCOL])] if PROTOCOL in keys else []), *others])


def name_of(key: str) -> str:
    """Return what a key is called in a label: "merging.curvature.rank" is "rank", "merging.curvature.kind" both."""
    *above, last = key.split(".")
    return last if last != "kind" or not above else f"{above[-1]} {last}"


def _entries(results: Sequence[Result]) -> list[Entry]:
    """Return the cells of one protocol on one task."""
    flat = [dict(leaves({s: r.record.config.get(s) for s in SECTIONS})) for r in results]
    differing = sorted({k for f in flat for k in f if len({str(other.get(k)) for other in flat}) > 1})
    made = []
    for values, result in zip(flat, results, strict=True):
        keys = {PROTOCOL: result.record.protocol, **{key: values.get(key) for key in differing}}
        record = result.record
        made.append(Entry(task=record.task, row=row_label(keys), keys=keys, seed=record.seed, result=result))
    return sorted(made, key=lambda e: ([str(e.keys[k]) for k in differing], e.seed))


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of nested mappings, such as a configuration."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
