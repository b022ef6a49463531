"""Checks of runs that share a table: what they must have in common, and what is noted where they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from camex_ft.config.identity import WITHOUT_EFFECT
from camex_ft.results.entries import SECTIONS, Entry, leaves
from camex_ft.results.record import Record
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import quoted

MUST_AGREE: dict[str, Callable[[Record], object]] = {
    "profile": lambda r: r.run.profile,
    "backbone": lambda r: r.backbone,
    "backbone (sha256)": lambda r: r.model.backbone_sha256 and r.model.backbone_sha256[:12],
    "primary metric": lambda r: r.metrics.primary,
    "data (sha256)": lambda r: r.data.sha256[:12],
}
BACKBONE = "backbone"  # a key that may make rows, within each of which it has to agree
TO_BE_SAID: dict[str, Callable[[Record], object]] = {
    "commit": lambda r: (r.environment.commit or "unknown")[:8],
    "device": lambda r: r.cost.device,
    "host": lambda r: r.environment.host,
}
# where a run's results go, what a record says elsewhere, and what has no effect
SILENT = {"profile", "backbone", "training.seed", *(f"training.{key}" for key in WITHOUT_EFFECT)}
SILENT_SECTIONS = {"output", "data"}


@dataclass(frozen=True)
class Run:
    """A finished cell: its row, its seed and its record."""

    row: str
    seed: int
    record: Record
    keys: frozenset[str] = frozenset()


def runs_of(entries: Iterable[Entry]) -> list[Run]:
    """Return the finished cells."""
    return [
        Run(entry.row, entry.seed, entry.result.record, frozenset(entry.keys))
        for entry in entries
        if entry.result is not None
    ]


def refuse_mixture(task: str, runs: Sequence[Run]) -> None:
    """Raise where runs of one task are no runs of one experiment.

    Raises:
        UserError: they differ in profile, backbone, primary metric or data, or a row has a seed twice.
    """
    for name, value in MUST_AGREE.items():
        by_row = name.startswith(BACKBONE) and all(BACKBONE in run.keys for run in runs)
        for some in _groups(runs, lambda run: run.row).values() if by_row else [runs]:
            _refuse_difference(task, name, some, value)
    cells: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in runs:
        cells[run.row, run.seed].append(run)
    for (row, seed), some in cells.items():
        if len(some) > 1:
            names = ", ".join(run.record.run.name for run in some)
            raise UserError(
                f"{task}: row '{row}' has seed {seed} {len(some)} times ({names}); expected one run a seed. "
                "Give the table a folder for each way to run it"
            )


def _refuse_difference(task: str, name: str, runs: Sequence[Run], value: Callable[[Record], object]) -> None:
    known = [run for run in runs if value(run.record) is not None]  # older records lack some
    groups = _groups(known, lambda run: value(run.record))
    if len(groups) > 1:
        each = "; ".join(f"{value} ({who(some)})" for value, some in groups.items())
        raise UserError(
            f"{task}: these records differ in {name}, so one table can't hold them: {each}. "
            "Make a table of each, or run them again alike"
        )


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return what has to be said under a table of these runs: in which circumstances they differ, and which run how."""
    said = [_difference(name, runs, value) for name, value in TO_BE_SAID.items()]
    said += [_difference("versions", runs, _versions(runs)), *_configurations(runs)]
    dirty = [run for run in runs if run.record.environment.dirty]
    if dirty:
        said.append(f"made from sources with changes that were not committed: {_who_of(dirty, runs)}")
    return [line for line in said if line]


def who(runs: Iterable[Run]) -> str:
    """Return "`dense` 0, 1; `ties` 0": rows and seeds."""
    rows: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        rows[run.row].append(run.seed)
    return "; ".join(f"{quoted(row)} {', '.join(map(str, sorted(seeds)))}" for row, seeds in rows.items())


def _who_of(some: Sequence[Run], runs: Sequence[Run]) -> str:
    return f"all {len(runs)} runs" if len(some) == len(runs) else who(some)


def _groups(runs: Iterable[Run], value: Callable[[Run], object]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[str(value(run))].append(run)
    return found


def _difference(name: str, runs: Sequence[Run], value: Callable[[Record], object]) -> str:
    groups = _groups(runs, lambda run: value(run.record))
    if len(groups) < 2:
        return ""
    *few, (most, rest) = sorted(groups.items(), key=lambda group: len(group[1]))
    others = f"the other {len(rest)}" if len(rest) > 1 else who(rest)
    return f"different {name}: {', '.join(f'{v} ({who(some)})' for v, some in few)}, {most} ({others})"


def _versions(runs: Sequence[Run]) -> Callable[[Record], str]:
    """Return what names a record's versions of those packages in which records differ and that all of them know."""
    all_versions = [run.record.environment.versions for run in runs]
    known = set.intersection(*map(set, all_versions)) if all_versions else set()
    differing = [p for p in sorted(known) if len({versions[p] for versions in all_versions}) > 1]
    return lambda record: " ".join(f"{p} {record.environment.versions[p]}" for p in differing)


def _configurations(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the keys in which runs differ though no row is made by them, with their values.

    How to merge, route and upcycle is what rows differ in; it only must not differ within a row.
    """
    flat = [(run, dict(leaves(run.record.config))) for run in runs]
    for key in sorted({key for _, values in flat for key in values}):
        section = key.partition(".")[0]
        if key in SILENT or section in SILENT_SECTIONS or any(key in run.keys for run in runs):
            continue
        having = [(run, values) for run, values in flat if key in values]
        if section in SECTIONS:
            values_of_row: dict[str, set[str]] = defaultdict(set)
            for run, values in having:
                values_of_row[run.row].add(str(values[key]))
            having = [pair for pair in having if len(values_of_row[pair[0].row]) > 1]
        by_run = {id(run.record): values[key] for run, values in having}
        text = _difference(key, [run for run, _ in having], lambda record, of=by_run: of[id(record)])  # type: ignore[misc]
        if text:
            yield text
