"""Finished cells of comparisons, and the tables, pictures and report that they make.

Cells are found by the hash of their configuration, data and backbone, wherever their records lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from camex_ft.backbones.donors import checkpoints_of, local_content_of
from camex_ft.compare.cells import Cell, Comparison
from camex_ft.config.identity import folder_label
from camex_ft.config.needs import local_backbone
from camex_ft.results.entries import Entry, Result, read_results
from camex_ft.results.plots import choose, source
from camex_ft.results.render import render
from camex_ft.results.report import ReportSection, write_report
from camex_ft.results.run_folder import has_settings
from camex_ft.results.tables import Table, make_table
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError

TABLES = {"md": "table.md", "csv": "table.csv", "tex": "table.tex"}
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class ComparisonOutcome:
    """A comparison with its entries, in the order of its cells, and the table that they make."""

    comparison: Comparison
    entries: tuple[Entry, ...]
    table: Table


def entries(cells: Sequence[Cell], results: Iterable[Result]) -> list[Entry]:
    """Return the cells with their results; of several, as where data have changed since, the newest.

    A record belongs to a cell if its name ends in the hash that the cell's configuration has on the record's data and
    the record's backbone, and that backbone is the cell's: by its content where that is on this machine's disk and in
    the record, else by its name.
    """
    contents = cache(local_content_of)
    by_cell: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        by_cell[result.record.task, result.record.protocol, result.record.seed].append(result)
    entries_ = []
    for cell in cells:
        content = contents(cell.settled.backbone, checkpoints_of(cell.settled.upcycle))
        alike = by_cell[cell.task, cell.settled.merging.protocol, cell.seed]
        own = [r for r in alike if belongs(r, cell, content)]
        newest = max(own, key=lambda r: r.record.run.started, default=None)
        entries_.append(Entry(task=cell.task, row=cell.row, keys=cell.keys, seed=cell.seed, result=newest))
    return entries_


def belongs(result: Result, cell: Cell, backbone: str | None = None) -> bool:
    """Return whether a result is that of a cell, whose backbone has this content (None if it is not known)."""
    record, name = result.record, cell.settled.backbone
    known, local = record.model.backbone_sha256, local_backbone(name)
    if known is None:  # the name is in the hash
        same = True
    elif backbone is not None:
        same = known == backbone
    elif local is not None:
        same = folder_label(record.backbone) == folder_label(local)
    else:
        same = record.backbone == name
    return same and has_settings(record, cell.settled)


def outcome(comparison: Comparison, results: Sequence[Result] | None = None) -> ComparisonOutcome:
    """Return a comparison's entries and table, from these finished runs or, by default, from its output folder.

    Raises:
        UserError: none of its cells has a record, or those that have can't share a table.
    """
    if results is None:
        with suppress(UserError):  # no record yet
            results = read_results(comparison.output)
    filled = tuple(entries(comparison.cells, results or []))
    if not any(entry.result for entry in filled):
        raise UserError(
            f"{comparison.name}: none of its {len(filled)} cells has been run yet: run them with camex-ft compare"
        )
    spec = comparison.spec
    table = make_table(filled, baseline=spec.baseline, published=spec.published, title=comparison.title)
    return ComparisonOutcome(comparison=comparison, entries=filled, table=table)


def write(result: ComparisonOutcome, command: str) -> ReportSection:
    """Write an outcome's tables and pictures into the comparison's folder; return its section of a report."""
    folder, spec, title = result.comparison.folder, result.comparison.spec, result.comparison.title
    folder.mkdir(parents=True, exist_ok=True)
    for format, name in TABLES.items():
        write_atomically(folder / name, render([result.table], format))
    chosen = choose(result.entries, title=title, baseline=spec.baseline)
    return ReportSection(
        title=title,
        text=[*([spec.about] if spec.about else []), _summary(result)],
        command=command,
        tables=[render([result.table], "html")],
        pictures=chosen.write(folder, source=source(result.entries)),
        notes=[f"{name}: {reason}" for name, reason in chosen.left_out.items()],
    )


def write_all(outcomes: Sequence[ComparisonOutcome], command: str) -> Path:
    """Write tables and pictures of each outcome, and ``report.html`` with the command of all; return its path."""
    sections = [write(result, command) for result in outcomes]
    if len(sections) > 1:
        sections = [ReportSection(title="Comparisons", text=[f"{len(sections)} comparisons."]), *sections]
    return write_report(sections, outcomes[0].comparison.output / REPORT)


def _summary(result: ComparisonOutcome) -> str:
    done = sum(entry.result is not None for entry in result.entries)
    spec, rows = result.comparison.spec, dict.fromkeys(entry.row for entry in result.entries)
    seeds = ", ".join(map(str, spec.seed_list()))
    return (
        f"{done} of {len(result.entries)} cells: {len(rows)} rows, seeds {seeds}, from the configuration "
        f"{spec.config}, profile {result.comparison.profile} ({result.comparison.reason.partition(': ')[2]})."
    )
