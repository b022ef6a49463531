"""Tables as Markdown, LaTeX, CSV, HTML or text.

``python -m camex_ft.results.render FOLDER ...`` prints that of the records in these folders, in Markdown.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from camex_ft.results.cells import Cell, Grid, legend, overview, scores, tests
from camex_ft.results.entries import entries_of, read_results
from camex_ft.results.tables import Panel, Row, Table, make_table
from camex_ft.utils import escaping
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.escaping import latex, markdown, one_line


def render(tables: Sequence[Table], format: str = "md", *, explained: bool = True) -> str:
    """Return tables in a format, ending in a newline.

    An overview first where a table has several tasks; then of each task the scores, and where they are tested, the
    comparisons with the baseline; notes below; one legend at the end. Columns without a value are left out.

    Args:
        tables: of `make_table`.
        format: "md"; "tex" (needs booktabs); "html", a fragment; "text", for a terminal; "csv", one line a task and
            row with everything in full precision, and neither notes nor legend.
        explained: with the legend.

    Raises:
        UserError: no such format.
    """
    if format not in FORMATS:
        raise UserError(
            f"no table format is called '{format}'; there are {', '.join(FORMATS)}.{nearest(format, FORMATS)}"
        )
    if format == "csv":
        return _csv(tables)
    write = WRITERS[format]
    parts = [part for table in tables for part in _table(table, write)]
    said = legend(tables) if explained else []
    return "\n".join([*parts, *([write.legend(said)] if said else [])])


def table_of(folders: Iterable[Path | str], **options: Any) -> Table:
    """Return the table of the records in these folders; options are those of `make_table`."""
    results = [result for folder in folders for result in read_results(folder)]
    return make_table(entries_of(results), **options)


def _table(table: Table, write: _Markdown | _Latex | _Html | _Plain) -> Iterator[str]:
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

    def grid(self, grid: Grid) -> str:
        rule = ["---", *["---:"] * (len(grid.head) - 1)]
        lines = [
            [markdown(name) for name in grid.head],
            rule,
            *([self.cell(c) for c in row] for row in grid.rows),
        ]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{markdown(grid.caption, begins=True)}:\n\n{body}"

    def cell(self, cell: Cell) -> str:
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

    def grid(self, grid: Grid) -> str:
        head = " & ".join(latex(name) for name in grid.head)
        rows = "".join(" & ".join(self.cell(c) for c in row) + " \\\\\n" for row in grid.rows)
        columns = "l" + "r" * (len(grid.head) - 1)
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{latex(grid.caption)}}}\n\\begin{{tabular}}{{{columns}}}\n"
            f"\\toprule\n{head} \\\\\n\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )

    def cell(self, cell: Cell) -> str:
        if cell.code:
            return rf"\texttt{{{latex(cell.text)}}}"
        return rf"\textbf{{{latex(cell.text)}}}" if cell.strong and cell.text else latex(cell.text)

    def notes(self, lines: Sequence[str]) -> str:
        return "".join(f"{escaping.latex_notes(line)}\\par\n" for line in lines)

    legend = notes


class _Html:
    def title(self, text: str) -> str:
        return f"<h3>{escaping.html(text)}</h3>\n"

    def grid(self, grid: Grid) -> str:
        head = "".join(f'<th scope="col">{escaping.html(name)}</th>' for name in grid.head)
        rows = "".join(
            f'<tr><th scope="row">{self.cell(first)}</th>{"".join(f"<td>{self.cell(c)}</td>" for c in rest)}</tr>\n'
            for first, *rest in grid.rows
        )
        caption = f"<caption>{escaping.html(grid.caption)}</caption>"
        return f"<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"

    def cell(self, cell: Cell) -> str:
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

    def grid(self, grid: Grid) -> str:
        caption = Text(one_line(grid.caption))
        table = RichTable(title=caption, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
        for i, name in enumerate(grid.head):
            table.add_column(Text(one_line(name)), justify="right" if i else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*(Text(f"{'*' if c.strong and c.text else ''}{one_line(c.text)}") for c in row))
        width = max(shutil.get_terminal_size((160, 24)).columns, 80)  # in less, numbers would fall to pieces
        console = Console(file=io.StringIO(), no_color=True, width=width)
        console.print(table)
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    def notes(self, lines: Sequence[str]) -> str:
        return "".join(f"- {one_line(line)}\n" for line in lines)

    def legend(self, lines: Sequence[str]) -> str:
        return self.notes([line.replace("Bold:", "*:").replace("bold below", "* below") for line in lines])


WRITERS: dict[str, _Markdown | _Latex | _Html | _Plain] = {
    "md": _Markdown(),
    "tex": _Latex(),
    "html": _Html(),
    "text": _Plain(),
}
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
    """Return all that a table knows of a row; None, which is written as nothing, where it knows nothing."""
    found = row.against
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
        "pairs": len(found.seeds) if found else None,
        "difference": found.difference if found else None,
        "difference_low": found.low if found else None,
        "difference_high": found.high if found else None,
        "effect": found.effect.value if found else None,
        "effect_low": found.effect.low if found else None,
        "effect_high": found.effect.high if found else None,
        "p_t": found.p_t if found else None,
        "p_bootstrap": found.p_bootstrap if found else None,
        "p_holm": row.p_holm,
        "comparisons": table.comparisons,
    }
    test = found.mcnemar if found else None
    for name in ("seeds", "gained", "lost", "p"):
        line[f"mcnemar_{name}"] = getattr(test, name) if test else None
    for number in row.published:
        line[f"published_{number.source}"] = number.value
        line[f"difference_from_{number.source}"] = row.gap(number)
    return line


if __name__ == "__main__":
    print(render([table_of(sys.argv[1:])]), end="")
