"""Tables, pictures and one report of comparisons, from the records of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camex_ft.compare.cells import Comparison
from camex_ft.compare.finished import entries
from camex_ft.results.entries import Entry, Result, read_results
from camex_ft.results.plots import choose, save, source
from camex_ft.results.render import render
from camex_ft.results.report import Picture, Section, write_report
from camex_ft.results.tables import Table, make_table
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError

TABLES = {"md": "table.md", "csv": "table.csv", "tex": "table.tex"}
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A comparison with its entries, in the order of its cells, and the table that they make."""

    comparison: Comparison
    entries: tuple[Entry, ...]
    table: Table


def outcome(comparison: Comparison, results: Sequence[Result] | None = None) -> Outcome:
    """Return a comparison's entries and table.

    Args:
        comparison: with its cells.
        results: finished runs to look among; by default those of its output folder.

    Raises:
        UserError: none of its cells has a record, or those that have can't share a table.
    """
    if results is None:
        try:
            results = read_results(comparison.output)
        except UserError:
            results = []
    found = tuple(entries(comparison.cells, results))
    if not any(entry.result for entry in found):
        raise UserError(
            f"{comparison.name}: none of its {len(found)} cells has been run; camex-ft compare runs them"
        )
    table = make_table(
        found,
        baseline=comparison.spec.baseline,
        published=comparison.spec.published,
        title=comparison.title,
    )
    return Outcome(comparison=comparison, entries=found, table=table)


def write(made: Outcome, command: str) -> Section:
    """Write an outcome's tables and pictures into the comparison's folder; return its section of a report."""
    folder = made.comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    for format, name in TABLES.items():
        write_atomically(folder / name, render([made.table], format))
    chosen = choose(made.entries, title=made.comparison.title, baseline=made.comparison.spec.baseline)
    drawn = source(made.entries)
    pictures = []
    for name, figure in chosen.figures.items():
        file = save(figure, folder / f"{name}.png", source=drawn)
        caption = chosen.captions[name]
        pictures.append(Picture(png=file.read_bytes(), alt=caption, caption=caption))
    about = made.comparison.spec.about
    return Section(
        title=made.comparison.title,
        text=[*([about] if about else []), _said(made)],
        command=command,
        tables=[render([made.table], "html")],
        pictures=pictures,
        notes=[f"{name}: {reason}" for name, reason in chosen.left_out.items()],
    )


def write_all(outcomes: Sequence[Outcome], command: str) -> Path:
    """Write what each outcome gives, and ``report.html`` with all of them into the output folder; return its path.

    Args:
        outcomes: of one or several comparisons.
        command: what gives them.
    """
    sections = [write(made, command) for made in outcomes]
    if len(sections) > 1:
        sections = [Section(title="Comparisons", text=[f"{len(sections)} comparisons."]), *sections]
    return write_report(sections, outcomes[0].comparison.output / REPORT)


def _said(made: Outcome) -> str:
    done = sum(entry.result is not None for entry in made.entries)
    spec, rows = made.comparison.spec, dict.fromkeys(entry.row for entry in made.entries)
    seeds = ", ".join(map(str, spec.seed_list()))
    return (
        f"{done} of {len(made.entries)} cells: {len(rows)} rows, seeds {seeds}, from the configuration "
        f"{spec.config}, profile {made.comparison.profile} ({made.comparison.reason.partition(': ')[2]})."
    )
