"""Tables as Markdown, LaTeX, CSV, HTML or text.

``python -m camex_ft.results.render FOLDER ...`` prints the table of the records in these folders, in Markdown.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from camex_ft.results.entries import entries_of, read_results
from camex_ft.results.record import duration
from camex_ft.results.statistics import PairedComparison
from camex_ft.results.tables import Panel, Row, Scores, Table, make_table
from camex_ft.utils import escaping
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.escaping import latex, markdown, one_line

R = TypeVar("R")

# -- cells as text ----------------------------------------------------------------------------------------------------


class TableCell(NamedTuple):
    """Unicode text of a cell. `code`: a name of the package; `strong`: the best of its column."""

    text: str
    code: bool = False
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class TableGrid:
    """One table to write: caption, headings, and rows of cells, the first of which names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def _grid(
    caption: str, rows: Sequence[R], columns: Mapping[str, Callable[[R], TableCell | str]]
) -> TableGrid:
    """Return the grid of these columns, heading to cell of a row; columns without a text are left out."""
    cells = {
        head: [cell if isinstance(cell, TableCell) else TableCell(cell) for cell in map(read, rows)]
        for head, read in columns.items()
    }
    cells = {head: column for head, column in cells.items() if head == "row" or any(c.text for c in column)}
    return TableGrid(caption=caption, head=tuple(cells), rows=tuple(zip(*cells.values(), strict=True)))


def overview(table: Table) -> TableGrid:
    """Return the best scores, rows x tasks; rows in the order of their first occurrence."""
    labels = list(dict.fromkeys(row.label for panel in table.panels for row in panel.rows))
    columns: dict[str, Callable[[str], TableCell | str]] = {"row": lambda label: TableCell(label, code=True)}
    for panel in table.panels:
        scores = {row.label: _score(row) for row in panel.rows}
        head = f"{panel.task} ({panel.metric})" if panel.metric else panel.task
        columns[head] = lambda label, scores=scores: scores.get(label, "")  # type: ignore[misc]
    return _grid(f"Best {_moment(table.panels)}", labels, columns)


def scores(panel: Panel) -> TableGrid:
    """Return a task's scores and costs, and the published numbers, one column a source."""
    columns: dict[str, Callable[[Row], TableCell | str]] = {
        "row": lambda row: TableCell(row.label, code=True),
        "seeds": lambda row: ", ".join(map(str, row.seeds)),
        f"best {panel.moment}": _score,
        f"last {panel.moment}": lambda row: spread(row.last),
        "parameters": lambda row: "" if row.parameters is None else f"{row.parameters / 1e6:.3g} M",
        "time": lambda row: "" if row.seconds is None else duration(row.seconds),
        "memory": lambda row: "" if row.memory is None else f"{row.memory:,.0f} MB",
    }
    for source in dict.fromkeys(number.source for row in panel.rows for number in row.published):
        columns[source] = lambda row, source=source: _published(row, source)  # type: ignore[misc]
    better = "" if panel.greater_is_better else ", less is better"
    metric = f"{panel.metric}{better}" if panel.metric else "not run yet"
    caption = ", ".join(filter(None, (panel.task, metric, panel.backbone)))
    return _grid(caption, panel.rows, columns)


def tests(panel: Panel, table: Table) -> TableGrid | None:
    """Return a task's comparisons with the baseline; None if there are none."""
    against = [(row, row.against) for row in panel.rows if row.against is not None and row.against.seeds]
    if not against:
        return None

    def effect(pair: tuple[Row, PairedComparison]) -> str:
        value, low, high = pair[1].effect.value, pair[1].effect.low, pair[1].effect.high
        return _signed(value) + (f" ({_interval(low, high)})" if low is not None else "")

    def holm(pair: tuple[Row, PairedComparison]) -> TableCell:
        p = pair[0].p_holm
        return TableCell(p_value(p), strong=p is not None and p < table.level)

    def mcnemar(pair: tuple[Row, PairedComparison]) -> str:
        test = pair[1].mcnemar
        return "" if test is None else f"{test.gained} : {test.lost}, p {p_value(test.p)}"

    columns: dict[str, Callable[[tuple[Row, PairedComparison]], TableCell | str]] = {
        "row": lambda pair: TableCell(pair[0].label, code=True),
        "pairs": lambda pair: str(len(pair[1].seeds)),
        "difference": lambda pair: _signed(pair[1].difference),
        f"{100 * (1 - table.level):g}% interval": lambda pair: _interval(pair[1].low, pair[1].high),
        "effect": effect,
        "p (t)": lambda pair: p_value(pair[1].p_t),
        "p (bootstrap)": lambda pair: p_value(pair[1].p_bootstrap),
        "p (Holm)": holm,
        "McNemar": mcnemar,
    }
    return _grid(f"{panel.task} against {table.baseline}", against, columns)


def _moment(panels: Sequence[Panel]) -> str:
    """Return "epoch" if every run was evaluated after each epoch, else "evaluation"."""
    return next((panel.moment for panel in panels if panel.moment != "epoch"), "epoch")


def legend(tables: Sequence[Table]) -> list[str]:
    """Return the meaning of the signs that occur in these tables, an entry for each."""
    panels = [panel for table in tables for panel in table.panels]
    rows = [row for panel in panels for row in panel.rows]
    level = f"{100 * tables[0].level:g}%" if tables else "5%"
    compared = [row.against for row in rows if row.against is not None]
    marks = {row.mark for row in rows}
    several = any(len(row.seeds) > 1 for row in rows)
    texts = []
    if several:
        texts.append("±: sample standard deviation over the seeds.")
    if any(panel.scale != 1 for panel in panels):
        less = any(panel.scale == 1 for panel in panels)
        texts.append("Scores are in hundredths" + (", except where less is better." if less else "."))
    if "best" in marks:
        texts.append(f"Bold: best {'mean' if several else 'score'} of the task.")
    if "level" in marks:
        texts[-1] += (
            f" =: not significantly worse than the best (paired t-test, Holm within the task, {level}); this is no "
            "proof that it is as good."
        )
    if any(comparison.p_t is not None for comparison in compared):
        counts = {table.comparisons for table in tables if table.comparisons}
        over = (
            f"all {counts.pop()} comparisons of the table"
            if len(counts) == 1
            else "all comparisons of its table"
        )
        texts.append(
            f"Differences are of best {_moment(panels)}s, paired by seed, with the interval of the t-test. Effect: "
            "Hedges' g, with the interval of the difference in standard deviations. p: paired t-test, studentised "
            f"bootstrap, and the t-test's after Holm's correction over {over}; bold below {level}."
        )
    if any(comparison.mcnemar is not None for comparison in compared):
        texts.append(
            "McNemar: validation rows that only the row's models and only the baseline's models get right, summed over "
            "seeds; twice the median p of the seeds. It tests these models, not the protocol."
        )
    cited = {n.source: n for row in rows for n in row.published}
    texts += [
        f"{n.source}: {n.cite}; {n.read}; {n.setting}. In brackets: our score minus it."
        for n in cited.values()
    ]
    return texts


def spread(of: Scores) -> str:
    """Return "83.03 ± 0.98"; "83.03" for one seed, "" for none."""
    if of.mean is None:
        return ""
    return f"{of.mean:.2f}" + ("" if of.sd is None else f" ± {of.sd:.2f}")


def p_value(p: float | None) -> str:
    """Return a p-value with two significant digits, or "<0.001"."""
    if p is None or p < 0.001:
        return "" if p is None else "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _score(row: Row) -> TableCell:
    return TableCell(spread(row.best) + (" =" if row.mark == "level" else ""), strong=row.mark == "best")


def _published(row: Row, source: str) -> str:
    for number in row.published:
        if number.source == source:
            gap = row.gap(number)
            return f"{number.value:.2f}" + ("" if gap is None else f" ({_signed(gap)})")
    return ""


def _signed(value: float | None) -> str:
    """Return the number with its sign; a minus is U+2212."""
    if value is None:
        return ""
    return f"{value:+.2f}".replace("-", "−") if round(value, 2) else "0.00"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"


# -- formats ----------------------------------------------------------------------------------------------------------


def render(tables: Sequence[Table], format: str = "md", *, explained: bool = True) -> str:
    """Return tables in a format, ending in a newline.

    A table of several tasks begins with an overview. Then each task has its scores, the comparisons with the baseline
    and notes. One legend is at the end. Columns without a value are left out.

    Args:
        tables: of `make_table`.
        format: "md"; "tex" (needs booktabs); "html", a fragment; "text", for a terminal; "csv", one line a task and
            row with everything in full precision, and neither notes nor legend.
        explained: append the legend.

    Raises:
        UserError: no such format.
    """
    if format not in FORMATS:
        raise UserError(
            f"unknown table format '{format}'.{nearest(format, FORMATS)} Expected {', '.join(FORMATS)}"
        )
    if format == "csv":
        return _csv(tables)
    write = WRITERS[format]
    parts = [part for table in tables for part in _table(table, write)]
    texts = legend(tables) if explained else []
    return "\n".join([*parts, *([write.legend(texts)] if texts else [])])


def table_of(folders: Iterable[Path | str], **options: Any) -> Table:
    """Return the table of the records in these folders; options are those of `make_table`."""
    return make_table(entries_of([r for folder in folders for r in read_results(folder)]), **options)


def _table(table: Table, write: Writer) -> Iterator[str]:
    if table.title:
        yield write.title(table.title)
    if len(table.panels) > 1:
        yield write.grid(overview(table))
    for panel in table.panels:
        yield write.grid(scores(panel))
        tested = tests(panel, table)
        if tested is not None:
            yield write.grid(tested)
        if panel.notes:
            yield write.notes(panel.notes)


class _Markdown:
    def title(self, text: str) -> str:
        return f"**{markdown(text)}**\n"

    def grid(self, grid: TableGrid) -> str:
        rule = ["---", *["---:"] * (len(grid.head) - 1)]
        lines = [map(markdown, grid.head), rule, *(map(self.cell, row) for row in grid.rows)]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{markdown(grid.caption, begins=True)}:\n\n{body}"

    def cell(self, cell: TableCell) -> str:
        if cell.code:
            return escaping.markdown_code(cell.text)
        return f"**{markdown(cell.text)}**" if cell.strong and cell.text else markdown(cell.text)

    def notes(self, lines: Sequence[str]) -> str:
        return "".join(f"- {escaping.markdown_notes(line)}\n" for line in lines)

    def legend(self, lines: Sequence[str]) -> str:
        return " ".join(map(escaping.markdown_notes, lines)) + "\n"


class _Latex:
    def title(self, text: str) -> str:
        return f"\\paragraph{{{latex(text)}}}\n"

    def grid(self, grid: TableGrid) -> str:
        head = " & ".join(latex(name) for name in grid.head)
        rows = "".join(" & ".join(map(self.cell, row)) + " \\\\\n" for row in grid.rows)
        columns = "l" + "r" * (len(grid.head) - 1)
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{latex(grid.caption)}}}\n\\begin{{tabular}}{{{columns}}}\n"
            f"\\toprule\n{head} \\\\\n\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )

    def cell(self, cell: TableCell) -> str:
        if cell.code:
            return rf"\texttt{{{latex(cell.text)}}}"
        return rf"\textbf{{{latex(cell.text)}}}" if cell.strong and cell.text else latex(cell.text)

    def notes(self, lines: Sequence[str]) -> str:
        return "".join(f"{escaping.latex_notes(line)}\\par\n" for line in lines)

    legend = notes


class _Html:
    def title(self, text: str) -> str:
        return f"<h3>{escaping.html(text)}</h3>\n"

    def grid(self, grid: TableGrid) -> str:
        head = "".join(f'<th scope="col">{escaping.html(name)}</th>' for name in grid.head)
        rows = "".join(
            f'<tr><th scope="row">{self.cell(first)}</th>{"".join(f"<td>{self.cell(c)}</td>" for c in rest)}</tr>\n'
            for first, *rest in grid.rows
        )
        caption = f"<caption>{escaping.html(grid.caption)}</caption>"
        return f"<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"

    def cell(self, cell: TableCell) -> str:
        text = escaping.html(cell.text)
        tag = "code" if cell.code else "strong" if cell.strong and text else ""
        return f"<{tag}>{text}</{tag}>" if tag else text

    def notes(self, lines: Sequence[str]) -> str:
        items = "".join(f"<li>{escaping.html_notes(line)}</li>\n" for line in lines)
        return f'<ul class="notes">\n{items}</ul>\n'

    def legend(self, lines: Sequence[str]) -> str:
        return f'<p class="legend">{escaping.html(" ".join(lines))}</p>\n'


class _Plain:
    def title(self, text: str) -> str:
        return one_line(text) + "\n"

    def grid(self, grid: TableGrid) -> str:
        caption = Text(one_line(grid.caption))
        table = RichTable(title=caption, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
        for i, name in enumerate(grid.head):
            table.add_column(Text(one_line(name)), justify="right" if i else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*(Text(f"{'*' if c.strong and c.text else ''}{one_line(c.text)}") for c in row))
        width = max(shutil.get_terminal_size((160, 24)).columns, 80)  # numbers would wrap in less
        console = Console(file=io.StringIO(), no_color=True, width=width)
        console.print(table)
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    def notes(self, lines: Sequence[str]) -> str:
        return "".join(f"- {one_line(line)}\n" for line in lines)

    def legend(self, lines: Sequence[str]) -> str:
        return self.notes([line.replace("Bold:", "*:").replace("bold below", "* below") for line in lines])


Writer = _Markdown | _Latex | _Html | _Plain
WRITERS: dict[str, Writer] = {"md": _Markdown(), "tex": _Latex(), "html": _Html(), "text": _Plain()}
FORMATS = (*WRITERS, "csv")


def _csv(tables: Sequence[Table]) -> str:
    lines = [_line(table, panel, row) for table in tables for panel in table.panels for row in panel.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: escaping.csv_text(value) for name, value in line.items()} for line in lines)
    return file.getvalue()


def _line(table: Table, panel: Panel, row: Row) -> dict[str, object]:
    """Return all numbers of a row; None is written as an empty field."""
    versus = row.against or PairedComparison(seeds=())
    test = versus.mcnemar
    line: dict[str, object] = {
        "table": table.title,
        "task": panel.task,
        "row": row.label,
        "metric": panel.metric,
        "greater_is_better": panel.greater_is_better,
        "profile": panel.profile,
        "backbone": panel.backbone,
        "seeds": " ".join(map(str, row.seeds)),
        "missing_seeds": " ".join(map(str, row.missing)),
        "best_mean": row.best.mean,
        "best_sd": row.best.sd,
        "last_mean": row.last.mean,
        "last_sd": row.last.sd,
        "mark": row.mark,
        "parameters": row.parameters,
        "seconds": row.seconds,
        "runs_timed": row.timed,
        "memory_mb": row.memory,
        "baseline": table.baseline,
        "pairs": len(versus.seeds) if row.against else None,
        "difference": versus.difference,
        "difference_low": versus.low,
        "difference_high": versus.high,
        "effect": versus.effect.value,
        "effect_low": versus.effect.low,
        "effect_high": versus.effect.high,
        "p_t": versus.p_t,
        "p_bootstrap": versus.p_bootstrap,
        "p_holm": row.p_holm,
        "comparisons": table.comparisons,
        **{f"mcnemar_{name}": getattr(test, name, None) for name in ("seeds", "gained", "lost", "p")},
    }
    for number in row.published:
        line[f"published_{number.source}"] = number.value
        line[f"difference_from_{number.source}"] = row.gap(number)
    return line


if __name__ == "__main__":
    print(render([table_of(sys.argv[1:])]), end="")
