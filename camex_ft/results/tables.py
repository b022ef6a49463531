"""Tables of runs, as numbers: scores over seeds, tests against a baseline, published numbers. `render` writes them.

Published numbers are those of published.yaml: one entry a number, each with its source.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import yaml

from camex_ft.results.entries import Entry, cautions, done, refuse_mixture, who
from camex_ft.results.record import unpack
from camex_ft.results.statistics import PairedComparison, compare, finite, holm, paired_t, pairs
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.escaping import quoted

BASELINE = "dense"
LEVEL = 0.05
PROFILE = "paper"  # of the published recipe

# -- published numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number, in hundredths or a perplexity as it is."""

    value: float
    source: str  # short name, such as "camex"
    cite: str  # the paper
    read: str  # table or other place from which the number was read
    setting: str  # known conditions of the measurement


def experiments() -> tuple[str, ...]:
    """Return the names of the published experiments."""
    return tuple(_load()["experiments"])


def published_numbers(name: str, task: str, row: str) -> tuple[Published, ...]:
    """Return the published numbers of a row of an experiment, one a source; empty if there are none.

    Raises:
        UserError: there is no such experiment.
    """
    cells = _experiment(name)["tasks"].get(task, {}).get("rows", {}).get(row, {})
    sources = _load()["sources"]
    return tuple(Published(value=value, source=source, **sources[source]) for source, value in cells.items())


def why_not(name: str, task: str, *, profile: str, backbone: str, metric: str) -> str:
    """Return the reason why runs are not comparable with the published ones, else ""."""
    experiment = _experiment(name)
    if task not in experiment["tasks"]:
        return ""
    expected = experiment["tasks"][task]["metric"]
    backbones = experiment["backbones"]
    if profile != PROFILE:
        return f"they are of profile {PROFILE}, these runs of profile {profile}"
    if backbone not in backbones:
        wanted = " or ".join(backbones[:1]) or "a model of the authors' own, which no backbone here is"
        return f"they are of {wanted}, these runs of {backbone}"
    return "" if metric == expected else f"they are {expected}, these are {metric}"


def _experiment(name: str) -> Mapping[str, Any]:
    known = _load()["experiments"]
    if name not in known:
        raise UserError(
            f"published: no experiment is called '{name}'; there are {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]


@lru_cache(maxsize=1)
def _load() -> Mapping[str, Any]:
    text = resources.files("camex_ft.results").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score a seed. `mean` and `sd`, the sample standard deviation, are None for too few seeds."""

    by_seed: Mapping[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: a setting with which a task was run."""

    label: str
    keys: Mapping[str, Any]
    best: Scores  # at the best epoch, in the table's unit
    last: Scores
    seeds: tuple[int, ...]
    missing: tuple[int, ...]  # seeds whose cells are not finished
    parameters: int | None = None
    seconds: float | None = None  # mean time of the `timed` runs, which were not interrupted
    timed: int = 0
    memory: float | None = None  # mean peak in MB
    mark: Literal["", "best", "level"] = ""  # level: not significantly worse than the best
    against: PairedComparison | None = None  # with the baseline's best epochs
    p_holm: float | None = None  # of its t-test, corrected over all comparisons of the table
    published: tuple[Published, ...] = ()

    def gap(self, number: Published) -> float | None:
        """Return our mean at the best epoch minus a published number."""
        return None if self.best.mean is None else self.best.mean - number.value


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One task."""

    task: str
    metric: str  # the primary one; "" without runs
    greater_is_better: bool
    scale: float  # factor of its scores, applied: 100, or 1 if less is better
    profile: str
    backbone: str
    rows: tuple[Row, ...]
    moment: Literal["epoch", "evaluation"] = "epoch"  # epoch: all runs were evaluated after each one
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Panels that are tested together: Holm's correction is over `comparisons` tests."""

    title: str
    baseline: str
    level: float
    panels: tuple[Panel, ...]
    comparisons: int


def make_table(
    entries: Sequence[Entry],
    *,
    baseline: str = BASELINE,
    published: str | None = None,
    title: str = "",
    level: float = LEVEL,
) -> Table:
    """Return the table of a grid's cells: a panel for each task, a row for each label, the baseline first.

    Tests are on `level` after correction, intervals of 1 - level.

    Raises:
        UserError: the runs of a task do not belong to one experiment (see `entries.refuse_mixture`), or there is no
            such published experiment.
    """
    panels = [
        _panel(
            task, [e for e in entries if e.task == task], baseline=baseline, published=published, level=level
        )
        for task in dict.fromkeys(entry.task for entry in entries)
    ]
    tested = [
        (i, row.label, row.against.p_t)
        for i, panel in enumerate(panels)
        for row in panel.rows
        if row.against is not None and len(row.against.seeds) > 1
    ]
    corrected = holm([p for *_, p in tested])
    adjusted = {(i, label): p for (i, label, _), p in zip(tested, corrected, strict=True)}
    panels = [
        replace(panel, rows=tuple(replace(row, p_holm=adjusted.get((i, row.label))) for row in panel.rows))
        for i, panel in enumerate(panels)
    ]
    return Table(title=title, baseline=baseline, level=level, panels=tuple(panels), comparisons=len(tested))


def _panel(
    task: str, entries: Sequence[Entry], *, baseline: str, published: str | None, level: float
) -> Panel:
    runs = done(entries)
    refuse_mixture(task, runs)
    first = runs[0].record if runs else None
    greater = first.metrics.greater_is_better if first else True
    scale = 100.0 if greater else 1.0
    labels = sorted(dict.fromkeys(entry.row for entry in entries), key=lambda label: label != baseline)
    seeds = sorted({entry.seed for entry in entries})
    rows = [_row(label, [e for e in entries if e.row == label], seeds, scale) for label in labels]
    rows = _marked(rows, greater=greater, level=level)
    base = next((row for row in rows if row.label == baseline), None)
    if base is not None:
        against = [None if row is base else _against(row, base, runs, level) for row in rows]
        rows = [replace(row, against=comparison) for row, comparison in zip(rows, against, strict=True)]
    training = [run.record.config.get("training") for run in runs]
    strategies = {part.get("eval_strategy", "epoch") for part in training if isinstance(part, Mapping)}
    notes = _notes(rows, runs, baseline)
    if published is not None and first is not None:
        run, metric = first.run, first.metrics.primary
        reason = why_not(published, task, profile=run.profile, backbone=first.backbone, metric=metric)
        if reason:
            notes.append(f"no published numbers: {reason}")
        else:
            known = {row.label: published_numbers(published, task, row.label) for row in rows}
            rows = [replace(row, published=known[row.label]) for row in rows]
    return Panel(
        task=task,
        metric=first.metrics.primary if first else "",
        greater_is_better=greater,
        scale=scale,
        moment="epoch" if strategies <= {"epoch"} else "evaluation",
        profile=first.run.profile if first else "",
        backbone=", ".join(dict.fromkeys(run.record.backbone for run in runs)),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _row(label: str, entries: Sequence[Entry], seeds: Sequence[int], scale: float) -> Row:
    """Return a row without marks and tests; `seeds` are all seeds of the panel."""
    runs = sorted(done(entries), key=lambda run: run.seed)
    finished = tuple(run.seed for run in runs)
    records = [run.record for run in runs]
    seconds = [r.run.seconds for r in records if r.run.resumed is None and r.run.seconds is not None]
    memory = [r.cost.peak_memory_mb for r in records if r.cost.peak_memory_mb is not None]
    return Row(
        label=label,
        keys=entries[0].keys,
        best=_scores(runs, "best", scale),
        last=_scores(runs, "last", scale),
        seeds=finished,
        missing=tuple(seed for seed in seeds if seed not in finished),
        parameters=records[0].model.parameters if runs else None,
        seconds=statistics.fmean(seconds) if seconds else None,
        timed=len(seconds),
        memory=statistics.fmean(memory) if memory else None,
    )


def _scores(runs: Sequence[Entry], which: str, scale: float) -> Scores:
    values = {run.seed: getattr(run.record.metrics, which) for run in runs}
    return Scores(by_seed={seed: scale * value for seed, value in values.items() if finite(value)})


def _against(row: Row, base: Row, runs: Sequence[Entry], level: float) -> PairedComparison:
    def answers(label: str) -> dict[int, np.ndarray]:
        correct = {run.seed: run.record.metrics.correct for run in runs if run.row == label}
        return {seed: unpack(text) for seed, text in correct.items() if text is not None}

    ours, theirs = answers(row.label), answers(base.label)
    return compare(row.best.by_seed, base.best.by_seed, correct=ours, baseline_correct=theirs, level=level)


def _marked(rows: Sequence[Row], *, greater: bool, level: float) -> list[Row]:
    """Mark the best of the rows with the most seeds, and rows that are not significantly worse."""
    most = max((len(row.best.by_seed) for row in rows), default=0)
    whole = [row for row in rows if len(row.best.by_seed) == most and most > 0]
    if not whole or len(rows) < 2:
        return list(rows)
    sign = 1 if greater else -1
    best = max(whole, key=lambda row: sign * (row.best.mean or 0.0))
    paired = [pairs(row.best.by_seed, best.best.by_seed) for row in rows]
    tested = [i for i, row in enumerate(rows) if row is not best and len(paired[i][0]) > 1]
    p = holm([paired_t(*paired[i][1:])[0] for i in tested])
    marks: dict[int, Literal["best", "level"]] = {
        i: "level"
        for i, value in zip(tested, p, strict=True)
        if value is not None and (value >= level or sign * np.mean(paired[i][1] - paired[i][2]) > 0)
    }
    for i, row in enumerate(rows):
        if row in whole and math.isclose(row.best.mean or 0.0, best.best.mean or 0.0, rel_tol=1e-12):
            marks[i] = "best"
    return [replace(row, mark=marks.get(i, "")) for i, row in enumerate(rows)]


def _notes(rows: Sequence[Row], runs: Sequence[Entry], baseline: str) -> list[str]:
    notes = []
    labels = [row.label for row in rows]
    if baseline not in labels:
        hint = nearest(baseline, labels)
        notes.append(f"no tests: there is no row {quoted(baseline)} to compare with.{hint}")
    missing = [f"{quoted(row.label)} {', '.join(map(str, row.missing))}" for row in rows if row.missing]
    if missing:
        notes.append(f"missing seeds: {'; '.join(missing)}")
    without = [run for run in runs if not finite(run.record.metrics.best)]
    if without:
        notes.append(f"left out, as the score is not a number: {who(without)}")
    resumed = [run for run in runs if run.record.run.resumed is not None]
    if resumed:
        notes.append(f"interrupted and resumed, so not in the mean times: {who(resumed)}")
    return [*notes, *cautions(runs)]
