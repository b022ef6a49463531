"""The cells of a table as text: headings, rows, legend. `render` puts them into a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camex_ft.results.stats import Comparison
from camex_ft.results.summary import duration
from camex_ft.results.tables import Panel, Row, Scores, Table


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Text, as it is in Unicode. `code` is a name of the package, `strong` the best of its column."""

    text: str
    code: bool = False
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table to write: a caption, headings, rows of as many cells, the first of which names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def overview(table: Table) -> Grid:
    """Return rows x tasks, of the best epochs (or evaluations); rows in the order in which they first come."""
    labels = list(dict.fromkeys(row.label for panel in table.panels for row in panel.rows))
    found = [{row.label: row for row in panel.rows} for panel in table.panels]
    rows = [
        (
            Cell(text=label, code=True),
            *(_score(of[label]) if label in of else Cell(text="") for of in found),
        )
        for label in labels
    ]
    head = (
        "row",
        *(f"{panel.task} ({panel.metric})" if panel.metric else panel.task for panel in table.panels),
    )
    return Grid(caption=f"Best {_moment(table.panels)}", head=head, rows=tuple(rows))


def scores(panel: Panel) -> Grid:
    """Return a task's scores and costs, and what is published, one column a source."""
    sources = list(dict.fromkeys(number.source for row in panel.rows for number in row.published))
    moment = panel.moment
    head = ("row", "seeds", f"best {moment}", f"last {moment}", "parameters", "time", "memory")
    rows = [
        (
            Cell(text=row.label, code=True),
            Cell(text=", ".join(map(str, row.seeds))),
            _score(row),
            Cell(text=spread(row.last)),
            Cell(text="" if row.parameters is None else f"{row.parameters / 1e6:.3g} M"),
            Cell(text="" if row.seconds is None else duration(row.seconds)),
            Cell(text="" if row.memory is None else f"{row.memory:,.0f} MB"),
            *(Cell(text=_published(row, source)) for source in sources),
        )
        for row in panel.rows
    ]
    grid = Grid(caption=_caption(panel), head=(*head, *sources), rows=tuple(rows))
    return _without_empty_columns(grid)


def tests(panel: Panel, table: Table) -> Grid | None:
    """Return a task's comparisons with the baseline; None where there is nothing to compare."""
    against = [(row, row.against) for row in panel.rows if row.against is not None and row.against.seeds]
    if not against:
        return None
    percent = f"{100 * (1 - table.level):g}% interval"
    head = ("row", "pairs", "difference", percent, "effect", "p (t)", "p (bootstrap)", "p (Holm)", "McNemar")
    rows = [
        (
            Cell(text=row.label, code=True),
            Cell(text=str(len(c.seeds))),
            Cell(text=_signed(c.difference)),
            Cell(text=_interval(c.low, c.high)),
            Cell(text=_effect(c)),
            Cell(text=p_value(c.p_t)),
            Cell(text=p_value(c.p_bootstrap)),
            Cell(text=p_value(row.p_holm), strong=row.p_holm is not None and row.p_holm < table.level),
            Cell(text=_mcnemar(c)),
        )
        for row, c in against
    ]
    grid = Grid(caption=f"{panel.task} against {table.baseline}", head=head, rows=tuple(rows))
    return _without_empty_columns(grid)


def _moment(panels: Sequence[Panel]) -> str:
    """Return what scores are of: an epoch, or an evaluation where any run was not evaluated by epochs."""
    return next((panel.moment for panel in panels if panel.moment != "epoch"), "epoch")


def legend(tables: Sequence[Table]) -> list[str]:
    """Return what the signs in these tables mean, one sentence an entry, only of those that are there."""
    panels = [panel for table in tables for panel in table.panels]
    rows = [row for panel in panels for row in panel.rows]
    level = f"{100 * tables[0].level:g}%" if tables else "5%"
    said = []
    if any(len(row.seeds) > 1 for row in rows):
        said.append("±: sample standard deviation over the seeds.")
    if any(panel.scale != 1 for panel in panels):
        less = any(panel.scale == 1 for panel in panels)
        said.append("Scores are in hundredths" + ("; where less is better, as they are." if less else "."))
    if any(row.mark == "best" for row in rows):
        mean = "mean" if any(len(row.seeds) > 1 for row in rows) else "score"
        level_rows = any(row.mark == "level" for row in rows)
        said.append(
            f"Bold: best {mean} of the task."
            + (
                f" =: not significantly worse than the best (paired t-test, Holm within the task, {level}), which is "
                "no proof of being as good."
                if level_rows
                else ""
            )
        )
    if any(row.against is not None and row.against.p_t is not None for row in rows):
        counts = {table.comparisons for table in tables if table.comparisons}
        over = (
            f"all {counts.pop()} comparisons of the table"
            if len(counts) == 1
            else "all comparisons of its table"
        )
        said.append(
            f"Differences are of best {_moment(panels)}s, paired by seed, with the interval of the t-test. Effect: "
            "Hedges' g, with the interval of the difference in standard deviations. p: paired t-test, studentised "
            f"bootstrap, and the t-test's after Holm's correction over {over}; bold below {level}."
        )
    if any(row.against is not None and row.against.mcnemar is not None for row in rows):
        said.append(
            "McNemar: validation rows that the row's models have right and the baseline's wrong, and the reverse, "
            "summed over seeds; twice the median p of the seeds. It is about these models, not about the protocol."
        )
    cited = {n.source: n for row in rows for n in row.published}
    said += [
        f"{n.source}: {n.cite}; {n.read}; {n.setting}. In brackets ours minus it." for n in cited.values()
    ]
    return said


def spread(of: Scores) -> str:
    """Return "83.03 ± 0.98", without the second part for one seed, and nothing for none."""
    if of.mean is None:
        return ""
    return f"{of.mean:.2f}" + ("" if of.sd is None else f" ± {of.sd:.2f}")


def p_value(p: float | None) -> str:
    """Return a p-value with two digits that count, "<0.001" below that."""
    if p is None:
        return ""
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _score(row: Row) -> Cell:
    text = spread(row.best) + (" =" if row.mark == "level" else "")
    return Cell(text=text, strong=row.mark == "best")


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


def _effect(found: Comparison) -> str:
    effect = found.effect
    if effect.value is None:
        return ""
    within = _interval(effect.low, effect.high)
    return _signed(effect.value) + (f" ({within})" if within else "")


def _mcnemar(found: Comparison) -> str:
    test = found.mcnemar
    return "" if test is None else f"{test.gained} : {test.lost}, p {p_value(test.p)}"


def _caption(panel: Panel) -> str:
    better = "" if panel.greater_is_better else ", less is better"
    parts = (f"{panel.metric}{better}" if panel.metric else "not run yet", panel.backbone)
    return ", ".join([panel.task, *(part for part in parts if part)])


def _without_empty_columns(grid: Grid) -> Grid:
    kept = [i for i in range(len(grid.head)) if i == 0 or any(row[i].text for row in grid.rows)]
    return Grid(
        caption=grid.caption,
        head=tuple(grid.head[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in grid.rows),
    )
