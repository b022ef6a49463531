"""Finished runs, the cells of a grid that they fill, and checks that the runs of a table belong together."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from camex_ft.config.identity import WITHOUT_EFFECT
from camex_ft.results.record import Record, load_record
from camex_ft.results.run_folder import RunFolder, find_done
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import quoted
from camex_ft.utils.logs import read_lines

SECTIONS = ("merging", "routing", "upcycle")  # of the configuration, in which rows may differ
PROTOCOL = "merging.protocol"
BACKBONE = "backbone"
HISTORY = ".history.jsonl"
LONGEST = 150  # characters of a file's name before the seed; a file system takes 255

MUST_AGREE: dict[str, Callable[[Record], object]] = {
    "profile": lambda r: r.run.profile,
    BACKBONE: lambda r: r.backbone,
    "backbone (sha256)": lambda r: r.model.backbone_sha256 and r.model.backbone_sha256[:12],
    "primary metric": lambda r: r.metrics.primary,
    "data (sha256)": lambda r: r.data.sha256[:12],
}
NOTED: dict[str, Callable[[Record], object]] = {
    "commit": lambda r: (r.environment.commit or "unknown")[:8],
    "device": lambda r: r.cost.device,
    "host": lambda r: r.environment.host,
}
# Keys and sections without a note: they have no effect, or a record says the same elsewhere.
UNNOTED = {"profile", BACKBONE, "training.seed", *(f"training.{key}" for key in WITHOUT_EFFECT)}
UNNOTED_SECTIONS = {"output", "data"}


@dataclass(frozen=True)
class Result:
    """One finished run: its record and the lines of its history.jsonl, if there are any."""

    record: Record
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell of a grid."""

    task: str  # its id, such as "glue/sst2"
    row: str  # its label, such as "ties-ca" or "ties-ca, alpha 0.5"
    seed: int
    keys: Mapping[str, Any] = field(default_factory=dict)  # of the configuration, which define the row
    result: Result | None = None  # None if the cell has not been run, or has failed

    @property
    def record(self) -> Record:
        """The record of a finished cell."""
        assert self.result is not None, "the cell has not been run"
        return self.result.record


# -- files ------------------------------------------------------------------------------------------------------------


def read_results(folder: Path | str) -> list[Result]:
    """Return the finished runs of a folder, sorted by name.

    The folder has records (``NAME.json``, and ``NAME.history.jsonl`` if the history was saved), or is an output
    folder with ``runs/*/record.json``.

    Raises:
        UserError: there is no record in it, or one is broken.
    """
    folder = Path(folder)
    if (folder / "runs").is_dir():
        paths = [path for path in sorted((folder / "runs").iterdir()) if path.is_dir()]
        files = [(find_done(path), RunFolder(path).history) for path in paths]
    else:
        paths = sorted(folder.glob("*.json"))
        files = [(load_record(path), path.with_name(path.stem + HISTORY)) for path in paths]
    results = [Result(record, tuple(read_lines(history))) for record, history in files if record is not None]
    if not results:
        raise UserError(f"{folder}: no records here. Expected files NAME.json or runs/NAME/record.json")
    return results


def keep_entries(entries: Sequence[Entry], folder: Path | str) -> int:
    """Write the results of these cells into a folder, named by task, row and seed; return their number.

    Rows whose names would be equal, in upper or lower case, are numbered.
    """
    finished = done(entries)
    taken: set[str] = set()
    for entry in finished:
        words = f"{entry.task.rpartition('/')[2]}-{entry.row}"
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", words)[:LONGEST].lstrip(".")
        names = (f"{stem}{f'-{n}' if n > 1 else ''}-seed{entry.seed}" for n in count(1))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        assert entry.result is not None
        keep_result(entry.result, folder, name)
    return len(finished)


def keep_result(result: Result, folder: Path | str, name: str) -> None:
    """Write a result as ``NAME.json`` and ``NAME.history.jsonl``, for `read_results`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in result.history)
    write_atomically(folder / f"{name}{HISTORY}", lines)
    write_atomically(folder / f"{name}.json", result.record.to_json())


# -- rows -------------------------------------------------------------------------------------------------------------


def done(entries: Iterable[Entry]) -> list[Entry]:
    """Return the finished cells."""
    return [entry for entry in entries if entry.result is not None]


def entries_of(results: Sequence[Result]) -> list[Entry]:
    """Return the cells that finished runs fill, by task and row.

    The runs of one protocol on a task are one row. If they differ in how they merge, route or upcycle, each setting is
    a row, named by the keys that differ.
    """
    rows: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        rows[result.record.task, result.record.protocol].append(result)
    return [entry for _, same in sorted(rows.items()) for entry in _entries(same)]


def _entries(results: Sequence[Result]) -> list[Entry]:
    """Return the cells of one protocol on one task."""
    settings = [dict(leaves({s: r.record.config.get(s) for s in SECTIONS})) for r in results]
    names = sorted({name for values in settings for name in values})
    differing = [name for name in names if len({str(values.get(name)) for values in settings}) > 1]
    entries = []
    for values, result in zip(settings, results, strict=True):
        record = result.record
        keys = {PROTOCOL: record.protocol, **{key: values.get(key) for key in differing}}
        row = row_label(keys)
        entries.append(Entry(task=record.task, row=row, keys=keys, seed=record.seed, result=result))
    return sorted(entries, key=lambda e: ([str(e.keys[k]) for k in differing], e.seed))


def row_label(keys: Mapping[str, Any]) -> str:
    """Return the label of a row: its protocol, then the last parts of the other keys with their values."""
    others = [
        f"{name_of(key)} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in keys.items()
        if key != PROTOCOL
    ]
    return ", ".join([*([str(keys[PROTOCOL])] if PROTOCOL in keys else []), *others])


def name_of(key: str) -> str:
    """Return the name of a key in a label: "rank" for "merging.curvature.rank"; "curvature kind" keeps two parts."""
    *above, last = key.split(".")
    return last if last != "kind" or not above else f"{above[-1]} {last}"


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of nested mappings, such as a configuration."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


# -- agreement of the runs of a table ---------------------------------------------------------------------------------


def refuse_mixture(task: str, runs: Sequence[Entry]) -> None:
    """Raise an error if the finished cells of one task do not belong to one experiment.

    Raises:
        UserError: they differ in profile, backbone, primary metric or data, or a row has a seed twice.
    """
    for name, value in MUST_AGREE.items():
        # rows may have different backbones if the backbone is one of their keys
        by_row = name.startswith(BACKBONE) and all(BACKBONE in run.keys for run in runs)
        for group in _groups(runs, lambda run: run.row).values() if by_row else [runs]:
            known = [run for run in group if value(run.record) is not None]  # older records lack some
            groups = _groups(known, lambda run, value=value: value(run.record))  # type: ignore[misc]
            if len(groups) > 1:
                values = "; ".join(f"{text} ({who(some)})" for text, some in groups.items())
                raise UserError(
                    f"{task}: the runs differ in {name}, so one table can't hold them: {values}. Make a table of each, "
                    "or run them again with the same settings"
                )
    for cell in _groups(runs, lambda run: (run.row, run.seed)).values():
        if len(cell) > 1:
            names = ", ".join(run.record.run.name for run in cell)
            raise UserError(
                f"{task}: row '{cell[0].row}' has seed {cell[0].seed} {len(cell)} times ({names}); expected one run a "
                "seed. Put the runs of each setting into a folder of their own"
            )


def cautions(runs: Sequence[Entry]) -> list[str]:
    """Return the notes of a table: differences between its runs in circumstances and configuration."""
    notes = [_difference(name, runs, value) for name, value in NOTED.items()]
    notes += [_difference("versions", runs, _versions(runs)), *_configurations(runs)]
    dirty = [run for run in runs if run.record.environment.dirty]
    if dirty:
        some = f"all {len(runs)} runs" if len(dirty) == len(runs) else who(dirty)
        notes.append(f"run with uncommitted changes: {some}")
    return [note for note in notes if note]


def who(runs: Iterable[Entry]) -> str:
    """Return "`dense` 0, 1; `ties` 0": rows and seeds."""
    rows: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        rows[run.row].append(run.seed)
    return "; ".join(f"{quoted(row)} {', '.join(map(str, sorted(seeds)))}" for row, seeds in rows.items())


def _groups(runs: Iterable[Entry], value: Callable[[Entry], object]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for run in runs:
        groups[str(value(run))].append(run)
    return groups


def _difference(name: str, runs: Sequence[Entry], value: Callable[[Record], object]) -> str:
    groups = _groups(runs, lambda run: value(run.record))
    if len(groups) < 2:
        return ""
    *few, (most, rest) = sorted(groups.items(), key=lambda group: len(group[1]))
    others = f"the other {len(rest)}" if len(rest) > 1 else who(rest)
    return f"different {name}: {', '.join(f'{v} ({who(some)})' for v, some in few)}, {most} ({others})"


def _versions(runs: Sequence[Entry]) -> Callable[[Record], str]:
    """Return a function that names a record's versions of the packages in which the records differ."""
    versions = [run.record.environment.versions for run in runs]
    known = sorted(set.intersection(*map(set, versions))) if versions else []
    differing = [name for name in known if len({of_run[name] for of_run in versions}) > 1]
    return lambda record: " ".join(f"{name} {record.environment.versions[name]}" for name in differing)


def _configurations(runs: Sequence[Entry]) -> Iterator[str]:
    """Yield the keys that differ between runs and do not define rows, with their values.

    Keys of merging, routing and upcycling may differ between rows, and are noted only if they differ within one.
    """
    settings = {id(run.record): dict(leaves(run.record.config)) for run in runs}
    for key in sorted({key for values in settings.values() for key in values}):
        section = key.partition(".")[0]
        if key in UNNOTED or section in UNNOTED_SECTIONS or any(key in run.keys for run in runs):
            continue

        def value(record: Record, key: str = key) -> object:
            return settings[id(record)][key]

        having = [run for run in runs if key in settings[id(run.record)]]
        if section in SECTIONS:
            rows = _groups(having, lambda run: run.row).values()
            having = [run for row in rows if len({str(value(run.record)) for run in row}) > 1 for run in row]
        yield _difference(key, having, value)
