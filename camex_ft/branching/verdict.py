"""The result of a study: a table of scores, tests against the first baseline, and a line that names the row ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from camex_ft.branching.source_scores import StudyScores
from camex_ft.branching.stages import Study
from camex_ft.branching.study import ALL, AVERAGE, BEST, OWN, START
from camex_ft.results.render import WRITERS, TableCell, TableGrid, p_value
from camex_ft.results.report import ReportSection, write_report
from camex_ft.results.statistics import PairedComparison, compare, holm
from camex_ft.results.tables import LEVEL, Scores
from camex_ft.utils.durable import write_atomically

MARKDOWN, HTML = "report.md", "report.html"


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row.

    Attributes:
        label: of its step, or of a row that every study has.
        sources: scores on each source, in the table's unit; of `OWN` without `ALL`.
        mean: mean over the branches' sources.
        steps: optimizer steps of its training in all.
        against: comparison of `mean` with that of the first baseline; None where it is not tested.
        p_holm: p of its t-test, corrected over all comparisons.
    """

    label: str
    sources: Mapping[str, Scores]
    mean: Scores
    steps: int | None = None
    against: PairedComparison | None = None
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """The rows of a study, tested against `baseline`, a label; `scale` is the factor of the scores, applied."""

    rows: tuple[StudyRow, ...]
    baseline: str
    metric: str
    sign: int
    scale: float
    seeds: int

    def row(self, label: str) -> StudyRow | None:
        """Return the row of a label."""
        return next((row for row in self.rows if row.label == label), None)


def make_study_table(study: Study, scores: StudyScores) -> StudyTable:
    """Return the table: start, branches, what they give without training, baselines, merged models."""
    spec, sign = study.spec, 1 if scores.greater_is_better else -1
    scale = 100.0 if scores.greater_is_better else 1.0
    by_row: dict[str, dict[int, dict[str, float]]] = {}
    for (row, seed, source), score in scores.scores.items():
        by_row.setdefault(row, {}).setdefault(seed, {})[source] = scale * score
    for seed in spec.seed_list():
        of_branches = {label: by_row[label][seed] for label in spec.labels if seed in by_row.get(label, {})}
        if len(of_branches) < len(spec.labels):
            continue
        best = max(of_branches.values(), key=lambda of: sign * fmean(of[label] for label in spec.labels))
        by_row.setdefault(BEST, {})[seed] = best
        by_row.setdefault(OWN, {})[seed] = {label: of[label] for label, of in of_branches.items()}
    order = (START, *spec.labels, OWN, BEST, AVERAGE, *spec.baselines, *spec.merged)
    rows = [
        StudyRow(
            label=label,
            sources={
                source: Scores(by_seed={seed: of[source] for seed, of in by_row[label].items()})
                for source in (*spec.labels, *(() if label == OWN else (ALL,)))
            },
            mean=Scores(
                by_seed={seed: fmean(of[s] for s in spec.labels) for seed, of in by_row[label].items()}
            ),
            steps=scores.steps.get(spec.labels[0] if label in (BEST, OWN) else label),
        )
        for label in order
        if label in by_row
    ]
    baseline = next(iter(spec.baselines))
    return StudyTable(
        rows=tuple(_tested(rows, baseline, (BEST, AVERAGE, *spec.baselines, *spec.merged))),
        baseline=baseline,
        metric=scores.metric,
        sign=sign,
        scale=scale,
        seeds=len(spec.seed_list()),
    )


def _tested(rows: Sequence[StudyRow], baseline: str, labels: Sequence[str]) -> list[StudyRow]:
    """Return the rows, those of `labels` with their comparisons with the baseline."""
    base = next((row for row in rows if row.label == baseline), None)
    if base is None:
        return list(rows)
    tested = {
        row.label: compare(row.mean.by_seed, base.mean.by_seed, level=LEVEL)
        for row in rows
        if row.label in labels and row is not base
    }
    p = dict(zip(tested, holm([comparison.p_t for comparison in tested.values()]), strict=True))
    return [
        StudyRow(
            label=row.label,
            sources=row.sources,
            mean=row.mean,
            steps=row.steps,
            against=tested.get(row.label),
            p_holm=p.get(row.label),
        )
        for row in rows
    ]


# -- words ------------------------------------------------------------------------------------------------------------


def verdict(table: StudyTable) -> str:
    """Return the line that names the row ahead of the baseline, or says that no difference was found."""
    base = table.row(table.baseline)
    tested = [row for row in table.rows if row.against is not None and row.against.difference is not None]
    if base is None or base.mean.mean is None or not tested:
        return f"No result: '{table.baseline}', or every row to compare with it, is missing."

    def lead(row: StudyRow) -> float:
        assert row.against is not None and row.against.difference is not None
        return table.sign * row.against.difference

    significant = [row for row in tested if row.p_holm is not None and row.p_holm < LEVEL]
    ahead = [row for row in significant if lead(row) > 0]
    best = max(ahead or tested, key=lead)
    numbers = (
        f"{_number(best.mean)} against {_number(base.mean)} of '{base.label}' in the mean over the sources, "
        f"{_against(best)}"
    )
    seeds = len(best.against.seeds) if best.against is not None else 0
    tests = f"Holm's correction over {len(tested)} comparison{'s' * (len(tested) > 1)}, {seeds} seeds"
    if seeds < 2:
        return (
            f"One seed, so no test: the best other row, '{best.label}', has {numbers}. Set seeds: 3 or more."
        )
    if ahead:
        return f"'{best.label}' won: {numbers}, p {p_value(best.p_holm)} after {tests}."
    if len(significant) == len(tested):
        return f"'{base.label}' won: the best other row, '{best.label}', has {numbers}, p < {LEVEL:g} after {tests}."
    shown = p_value(best.p_holm) or "unknown"
    return f"No row ahead of '{base.label}' was found: '{best.label}' has {numbers}, p {shown} after {tests}."


def notes(table: StudyTable, study: Study) -> list[str]:
    """Return the remarks on the table: steps, rows that need an explanation, missing seeds."""
    spec, base = study.spec, table.row(table.baseline)
    trained = [row for row in table.rows if row.label in (AVERAGE, *spec.baselines, *spec.merged)]
    lines = ["steps: optimizer steps in all, with those of the runs that a row continues or merges."]
    other = [row for row in trained if base is not None and row.steps != base.steps]
    if base is not None and base.steps is not None:
        same = "Every trained row has as many" if not other else "Other steps"
        rows = ", ".join(f"'{row.label}' {_steps(row.steps)}" for row in other)
        lines[0] += f" {same} as '{base.label}'." if not other else f" {same} than '{base.label}': {rows}."
    lines.append(
        f"{OWN}: on each source, the branch that was trained on it, as if the source were known; a bound, not tested. "
        f"{BEST}: of each seed, the branch with the best mean, chosen on these validation data. {AVERAGE}: the dense "
        f"model of the mean parameters, without training. {ALL}: the validation data of the configuration; mean: over "
        "the other sources."
    )
    if table.scale != 1:
        lines.append(
            "Scores are in hundredths." + " ±: standard deviation over the seeds." * (table.seeds > 1)
        )
    missing = [f"'{row.label}'" for row in table.rows if len(row.mean.by_seed) < table.seeds]
    labels = {row.label for row in table.rows}
    missing += [f"'{step.label}'" for step in study.steps if step.label not in labels]
    if missing:
        lines.append(f"Not of all seeds, since runs failed: {', '.join(missing)}.")
    return lines


def _steps(steps: int | None) -> str:
    return "" if steps is None else f"{steps:,}"


def _number(scores: Scores) -> str:
    if scores.mean is None:
        return ""
    return f"{scores.mean:.1f}" + ("" if scores.sd is None else f" ± {scores.sd:.1f}")


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}".replace("-", "−")


def _against(row: StudyRow) -> str:
    comparison = row.against
    assert comparison is not None
    interval = _interval(comparison)
    return _signed(comparison.difference) + (
        f" ({100 * (1 - LEVEL):g}% interval {interval})" if interval else ""
    )


def _interval(comparison: PairedComparison) -> str:
    if comparison.low is None or comparison.high is None:
        return ""
    return f"{_signed(comparison.low)} to {_signed(comparison.high)}"


# -- tables and files -------------------------------------------------------------------------------------------------


def grids(table: StudyTable, study: Study) -> list[TableGrid]:
    """Return the scores, rows x sources, and the tests."""
    sources = (*study.spec.labels, ALL)
    compared = [row for row in table.rows if row.label != OWN and row.label not in study.spec.labels]
    best = max((table.sign * row.mean.mean for row in compared if row.mean.mean is not None), default=None)
    rows = [
        (
            TableCell(text=row.label),
            TableCell(text=_steps(row.steps)),
            *(TableCell(text=_mean(row.sources.get(source))) for source in sources),
            TableCell(
                text=_number(row.mean),
                strong=row in compared and row.mean.mean is not None and table.sign * row.mean.mean == best,
            ),
        )
        for row in table.rows
    ]
    better = "" if table.sign > 0 else ", less is better"
    caption = f"{study.base.task.id}, {table.metric}{better}, {table.seeds} seed{'s' * (table.seeds > 1)}"
    kinds = {label.rpartition(" ")[0] for label in study.spec.labels}
    kind = kinds.pop() if len(kinds) == 1 else ""
    heads = [label.removeprefix(f"{kind} ") if kind else label for label in study.spec.labels]
    caption += f", by {kind}" if kind else ""
    scores = TableGrid(caption=caption, head=("row", "steps", *heads, ALL, "mean"), rows=tuple(rows))
    tests = [
        (
            TableCell(text=row.label),
            TableCell(text=_signed(row.against.difference)),
            TableCell(text=_interval(row.against)),
            TableCell(text=p_value(row.against.p_t)),
            TableCell(text=p_value(row.p_holm), strong=row.p_holm is not None and row.p_holm < LEVEL),
        )
        for row in table.rows
        if row.against is not None
    ]
    head = ("row", "difference", f"{100 * (1 - LEVEL):g}% interval", "p (t)", "p (Holm)")
    against = TableGrid(
        caption=f"mean over the sources against {table.baseline}", head=head, rows=tuple(tests)
    )
    return [scores, *([against] if tests else [])]


def _mean(scores: Scores | None) -> str:
    return "" if scores is None or scores.mean is None else f"{scores.mean:.1f}"


def write_results(
    study: Study, scores: StudyScores, command: str, *, tell: Callable[[str], None] = print
) -> StudyTable:
    """Print the verdict and the tables, write them as Markdown and HTML, and return the table.

    Args:
        study: with its steps.
        scores: of its rows.
        command: that makes them, for the report.
        tell: prints a text.
    """
    table = make_study_table(study, scores)
    first, remarks, parts = verdict(table), notes(table, study), grids(table, study)
    about = [study.spec.about] if study.spec.about else []
    study.folder.mkdir(parents=True, exist_ok=True)
    write = WRITERS["md"]
    body = [first, "", *about, f"{study.reason}. Command: `{command}`", ""]
    body += [*(write.grid(grid) for grid in parts), write.notes(remarks)]
    write_atomically(study.folder / MARKDOWN, "\n".join(body))
    section = ReportSection(
        title=study.title,
        text=[first, *about, f"{study.reason}."],
        command=command,
        tables=[WRITERS["html"].grid(grid) for grid in parts],
        notes=remarks,
    )
    write_report([section], study.folder / HTML)
    plain = WRITERS["text"]
    tell("\n".join([first, "", *(plain.grid(grid) for grid in parts), plain.notes(remarks)]))
    tell(f"wrote {study.folder / HTML}")
    return table
