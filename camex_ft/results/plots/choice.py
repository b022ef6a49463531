"""Choose and draw the pictures of a comparison, a run or an inspection; say why the others are left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from camex_ft.results.entries import Entry, Result, name_of
from camex_ft.results.plots import per_layer, scores, series
from camex_ft.results.plots.figures import save
from camex_ft.results.report import Picture
from camex_ft.utils.escaping import one_line

ROWS = 8  # of panels in one picture
SIMILAR = 12  # layers in the picture of similarities
Drawing = tuple[Figure, str] | str  # a figure and its caption, or the reason why there is none


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pictures of a comparison."""

    figures: dict[str, Figure] = field(default_factory=dict)  # by name; a name is fit for a file's
    captions: dict[str, str] = field(default_factory=dict)  # also the alternative texts
    left_out: dict[str, str] = field(default_factory=dict)  # pictures that lack data, with the reason

    def add(self, name: str, drawing: Drawing) -> None:
        """Add a picture, or the reason why it is left out."""
        if isinstance(drawing, str):
            self.left_out[name] = drawing
        else:
            self.figures[name], self.captions[name] = drawing

    def write(self, folder: Path, *, source: Any) -> list[Picture]:
        """Write each figure as a PNG file with the digest of its source; return them for a report."""
        files = {
            name: save(figure, folder / f"{name}.png", source=source) for name, figure in self.figures.items()
        }
        return [Picture(png=file.read_bytes(), caption=self.captions[name]) for name, file in files.items()]


def choose(entries: Sequence[Entry], *, title: str, baseline: str = "dense") -> Choice:
    """Return the pictures of a comparison with captions, and reasons for those that lack data.

    Over all tasks: ``comparison``, and ``sweep-KEY`` for each numeric key of the rows that varies. For each task:
    ``loss-TASK``, ``score-TASK``, ``routing-domain-TASK``, ``routing-label-TASK``, ``load-TASK``, ``curvature-TASK``.
    Cells without a result are passed over.
    """
    choice, title, baseline = Choice(), one_line(title), one_line(baseline)
    entries = [replace(e, task=one_line(e.task), row=one_line(e.row)) for e in entries]
    tasks: dict[str, list[Entry]] = {}
    for entry in entries:
        tasks.setdefault(entry.task, []).append(entry)
    tasks = {task: cells for task, cells in tasks.items() if series.done(cells)}
    if not tasks:
        choice.add("comparison", "no run is done yet")
        return choice
    best = {task: series.task_scores(task, cells) for task, cells in tasks.items()}
    choice.add("comparison", _comparison(list(best.values()), title, baseline))
    for key in series.swept_keys(entries):
        choice.add(f"sweep-{slug(key)}", _sweep(tasks, best, key, title, baseline))
    for task, cells in tasks.items():
        own = title if task in title else f"{title}: {task}"
        _add_task(choice, _Task(name=task, cells=cells, title=own, baseline=baseline), f"-{slug(task)}")
    return choice


def of_run(result: Result, *, title: str) -> Choice:
    """Return the pictures of one run, under the names ``loss``, ``score``, ``routing-domain`` and so on."""
    choice, record = Choice(), result.record
    task = one_line(record.task)
    entry = Entry(task=task, row=one_line(record.protocol), seed=record.seed, result=result)
    _add_task(choice, _Task(name=task, cells=[entry], title=one_line(title)))
    return choice


def of_inspection(numbers: Mapping[str, Any], choice: Choice | None = None) -> Choice:
    """Return the pictures ``similarity`` and ``spectrum`` of one run.

    `numbers` are the content of ``inspection.json``; the pictures are added to `choice`.
    """
    choice = choice or Choice()
    title = one_line(f"{numbers['task']}: {numbers['protocol']}, seed {numbers['seed']}")
    choice.add("similarity", _similarity(numbers["domain_vectors"], title))
    choice.add("spectrum", _spectrum(numbers["spectrum"], title))
    return choice


def source(entries: Sequence[Entry]) -> list[Any]:
    """Return the data that the pictures of these entries are drawn from, for `save` and `is_stale`."""
    return [
        {
            "task": entry.task,
            "row": entry.row,
            "keys": dict(entry.keys),
            "seed": entry.seed,
            "metrics": result.record.metrics.model_dump(mode="json", exclude={"correct"}),
            **result.record.model_dump(mode="json", include={"routing", "curvature"}),
            "history": [dict(line) for line in result.history],
        }
        for entry, result in series.done(entries)
    ]


def slug(text: str) -> str:
    """Return a text fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


# -- all tasks --------------------------------------------------------------------------------------------------------


def _comparison(tasks: Sequence[series.TaskScores], title: str, baseline: str) -> Drawing:
    caption = "Best evaluation on the validation split, one seed a row."
    if any(task.has_several_seeds for task in tasks):
        caption = (
            "Best evaluation on the validation split: the mean over seeds with its 95% t-interval, and each seed as a "
            "ring. An arrow marks an interval that is cut off. The intervals are of single rows: see the paired tests "
            "in the table for differences between rows."
        )
    return scores.comparison(tasks, title=title, baseline=baseline), caption


def _sweep(
    tasks: Mapping[str, Sequence[Entry]],
    best: Mapping[str, series.TaskScores],
    key: str,
    title: str,
    baseline: str,
) -> Drawing:
    shown = {task: lines for task, cells in tasks.items() if (lines := series.sweep_lines(cells, key))}
    if not shown:
        return f"no row has results for two values of {key}"
    base = {task: best[task].scores.get(baseline, np.array([])) for task in shown}
    figure = scores.sweep(
        shown,
        title=f"{title}: {name_of(key)}" if title else name_of(key),
        x_label=key,
        y_labels={task: best[task].metric for task in shown},
        levels={t: (baseline, float(np.nanmean(v))) for t, v in base.items() if np.isfinite(v).any()},
    )
    has_bands = any(len(line.values) > 1 for lines in shown.values() for line in lines)
    seeds = ": the mean over seeds, the band one standard deviation either side" if has_bands else ""
    return figure, f"Best score against {key}{seeds}."


# -- one task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A task to draw: its cells and the common title of its pictures."""

    name: str
    cells: Sequence[Entry]
    title: str
    baseline: str | None = None

    @property
    def results(self) -> list[Result]:
        return [result for _, result in series.done(self.cells)]

    @property
    def has_routing(self) -> bool:
        return any(result.record.routing for result in self.results)

    def curves(self, lines: Sequence[series.Series], subject: str, y_label: str, content: str) -> Drawing:
        """Draw lines over epochs; the caption explains line and band if a row has several seeds."""
        title = f"{self.title}, {subject}"
        figure = scores.curves(lines, title=title, x_label="epoch", y_label=y_label, baseline=self.baseline)
        counts = {len(line.values) for line in lines}
        some = " (of rows with several)" if 1 in counts else ""
        band = f", the mean over seeds{some}; the band is one standard deviation either side"
        return figure, f"{self.name}: {content}{'' if counts == {1} else band}."

    def without_log(self, quantity: str) -> str:
        """Explain why no history has this quantity."""
        if not any(result.history for result in self.results):
            return "no history was saved beside these records"
        steps = max(int(line.get("step") or 0) for result in self.results for line in result.history)
        return (
            f"the history holds no {quantity}: none was logged in {steps} steps, see training.logging_steps"
        )

    def one_run(self, has_data: Callable[[Result], Any]) -> tuple[dict[str, Result], str]:
        """Return by row a run that has the data, at most `ROWS`, of one seed if all rows share one; and a caption.

        Runs are not averaged: expert 0 of one seed has nothing to do with expert 0 of another.
        """
        by_row = {
            row: [(entry.seed, result) for entry, result in pairs if has_data(result)]
            for row, pairs in series.rows_of(self.cells).items()
        }
        by_row = {row: pairs for row, pairs in by_row.items() if pairs}
        times = Counter(seed for pairs in by_row.values() for seed in {seed for seed, _ in pairs})
        chosen = {
            row: min(pairs, key=lambda pair: (-times[pair[0]], pair[0]))
            for row, pairs in list(by_row.items())[:ROWS]
        }
        seeds = sorted({seed for seed, _ in chosen.values()})
        text = f"seed {seeds[0]}" if len(seeds) == 1 else f"one seed a row ({', '.join(map(str, seeds))})"
        more = f"; the first {len(chosen)} of {len(by_row)} rows" if len(by_row) > len(chosen) else ""
        if len({entry.seed for entry, _ in series.done(self.cells)}) == 1:
            caption = f"{text[:1].upper()}{text[1:]}{more}."
        else:
            caption = f"One run, {text}, since experts of different seeds do not correspond{more}."
        return {row: result for row, (_, result) in chosen.items()}, caption


def _add_task(choice: Choice, task: _Task, suffix: str = "") -> None:
    """Add the pictures of one task, under names with this suffix."""
    choice.add(f"loss{suffix}", _loss(task))
    choice.add(f"score{suffix}", _scores(task))
    choice.add(f"routing-domain{suffix}", _routing(task, "domain"))
    choice.add(f"routing-label{suffix}", _routing(task, "label"))
    choice.add(f"load{suffix}", _load(task))
    choice.add(f"curvature{suffix}", _curvature(task))


def _loss(task: _Task) -> Drawing:
    lines = series.losses(task.cells)
    subject = "training loss"
    return task.curves(lines, subject, subject, subject) if lines else task.without_log(subject)


def _scores(task: _Task) -> Drawing:
    lines = series.epoch_scores(task.cells)
    if any(len(line.x) > 1 for line in lines):
        metric = series.metric_label(task.results[0].record)
        return task.curves(
            lines, "validation score", metric, f"{metric} on the validation split at every evaluation"
        )
    if any(len(result.record.metrics.per_epoch) > 1 for result in task.results):
        return "no record holds the deciding metric of two evaluations"
    return "no run was evaluated more than once"


def _routing(task: _Task, kind: str) -> Drawing:
    if not task.has_routing:
        return "no row has experts"
    runs, of_seed = task.one_run(lambda r: any(kind in layer.by for layer in r.record.routing.values()))
    if not runs:
        return f"the records hold no routing by {kind}: their {kind}s are unknown, or the records are older"
    groups, weights = series.routing_by(runs, kind)
    figure = per_layer.routing(weights, groups, title=f"{task.title}, routing by {kind}", x_label=kind)
    caption = f"{task.name}: mean routing weight of each expert for the inputs of each {kind}, by layer."
    return figure, f"{caption} {of_seed}"


def _load(task: _Task) -> Drawing:
    if not task.has_routing:
        return "no row has experts"
    runs, of_seed = task.one_run(lambda r: len(series.load_of(r)[0]) > 1)
    if runs:
        loads = {row: series.load_of(result) for row, result in runs.items()}
        caption = (
            f"{task.name}: share of the inputs that route mostly to each expert during training, stacked from expert "
            f"0 at the bottom. {of_seed}"
        )
        return per_layer.load_over_time(loads, title=f"{task.title}, load over time"), caption
    if any(len(series.load_of(result)[0]) for result in task.results):
        return "the load of each expert was logged only once"
    return task.without_log("load of each expert")


def _curvature(task: _Task) -> Drawing:
    runs, of_seed = task.one_run(lambda r: r.record.curvature)
    if not runs:
        return "no row has a curvature"
    distances = {row: series.distance_of(result) for row, result in runs.items()}
    title = f"{task.title}, distance of the curvature from the identity"
    caption = (
        f"{task.name}: relative distance of each expert's curvature from the identity, by layer (the mean over its "
        f"matrices). {of_seed}"
    )
    return per_layer.distances(distances, title=title), caption


# -- an inspection ----------------------------------------------------------------------------------------------------


def _similarity(vectors: Mapping[str, Any], title: str) -> Drawing:
    if not vectors:
        return "the model has no experts"
    names = series.short_layers(list(vectors))
    shown = {names[n]: series.array(vectors[n]["cosine"]) for n in series.some_of(list(vectors), SIMILAR)}
    if not any(np.isfinite(matrix).any() for matrix in shown.values()):
        return "every expert equals its base expert, so there are no domain vectors"
    return (
        per_layer.similarity(shown, title=f"{title}, similarity of domain vectors"),
        "Cosine similarity of the experts' domain vectors, all matrices and biases of a layer together: 1 for two "
        "experts that moved the same way from the base expert (without one, from the experts' mean).",
    )


def _spectrum(spectra: Mapping[str, Any], title: str) -> Drawing:
    if not spectra:
        return "the model has no curvature"
    names = series.short_layers(list(spectra))
    matrices = list(dict.fromkeys(matrix for by_matrix in spectra.values() for matrix in by_matrix))
    shown = {
        f"{names[layer]}, {matrix}": series.array(by_matrix[matrix]["values"])
        for matrix in matrices
        for layer, by_matrix in spectra.items()
        if matrix in by_matrix
    }
    is_exact = all(entry["exact"] for by_matrix in spectra.values() for entry in by_matrix.values())
    how = "estimated by Golub-Kahan bidiagonalisation from random starts"
    return (
        per_layer.spectrum(shown, title=f"{title}, spectrum of the curvature", columns=len(spectra)),
        "Singular values of each expert's curvature, from the largest to the smallest, "
        f"{'computed from its factors' if is_exact else how}. The identity has 1 throughout; the numbers are those of "
        "the experts.",
    )
