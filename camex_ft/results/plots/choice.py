"""Choose and draw the pictures of a comparison, a run or an inspection; say why the others are left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from camex_ft.results.entries import Entry, Result, name_of
from camex_ft.results.plots import per_layer, scores, series
from camex_ft.utils.escaping import one_line

ROWS = 8  # of panels in one picture
SIMILAR = 12  # layers in the picture of similarities
GROUPS = {"domain": "domains", "label": "labels"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pictures of a comparison.

    Attributes:
        figures: by name; a name is fit for a file's.
        captions: of each figure; also its alternative text.
        left_out: names of pictures that lack data, with the reason.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, caption: str) -> None:
        """Add a picture."""
        self.figures[name], self.captions[name] = figure, caption


def choose(entries: Sequence[Entry], *, title: str, baseline: str = "dense") -> Choice:
    """Return the pictures of a comparison with captions, and reasons for those that lack data.

    Over all tasks: ``comparison``, and ``sweep-KEY`` for each numeric key of the rows that varies. For each task:
    ``loss-TASK``, ``score-TASK``, ``routing-domain-TASK``, ``routing-label-TASK``, ``load-TASK``, ``curvature-TASK``.

    Args:
        entries: cells of the grid; those without a result are passed over.
        title: of the comparison; each picture adds its own subject.
        baseline: label of the row that others are compared with.
    """
    choice, title, baseline = Choice(), one_line(title), one_line(baseline)
    entries = [replace(e, task=one_line(e.task), row=one_line(e.row)) for e in entries]
    by_task = {task: cells for task, cells in series.tasks_of(entries).items() if series.done(cells)}
    if not by_task:
        choice.left_out["comparison"] = "no run is done yet"
        return choice
    tasks = {task: series.task_scores(task, cells) for task, cells in by_task.items()}
    _add_comparison(choice, list(tasks.values()), title, baseline)
    for key in series.swept_keys(entries):
        _add_sweep(choice, by_task, tasks, key, title, baseline)
    for task, cells in by_task.items():
        own = title if task in title else f"{title}: {task}"
        _add_task(
            choice, _Task(name=task, cells=cells, title=own, baseline=baseline, suffix=f"-{slug(task)}")
        )
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

    Args:
        numbers: the content of ``inspection.json``.
        choice: pictures to add them to.
    """
    choice = choice or Choice()
    title = one_line(f"{numbers['task']}: {numbers['protocol']}, seed {numbers['seed']}")
    _add_similarity(choice, numbers["domain_vectors"], title)
    _add_spectrum(choice, numbers["spectrum"], title)
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
            "routing": {k: v.model_dump(mode="json") for k, v in result.record.routing.items()},
            "curvature": {k: v.model_dump(mode="json") for k, v in result.record.curvature.items()},
            "history": [dict(line) for line in result.history],
        }
        for entry, result in series.done(entries)
    ]


def slug(text: str) -> str:
    """Return a text fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


# -- all tasks --------------------------------------------------------------------------------------------------------


def _add_comparison(choice: Choice, tasks: Sequence[series.TaskScores], title: str, baseline: str) -> None:
    caption = "Best evaluation on the validation split, one seed a row."
    if any(task.has_several_seeds for task in tasks):
        caption = (
            "Best evaluation on the validation split: the mean over seeds with its 95% t-interval, and each seed as a "
            "ring. An arrow marks an interval that is cut off. The intervals are of single rows: see the paired tests "
            "in the table for differences between rows."
        )
    choice.add("comparison", scores.comparison(tasks, title=title, baseline=baseline), caption)


def _add_sweep(
    choice: Choice,
    by_task: Mapping[str, Sequence[Entry]],
    tasks: Mapping[str, series.TaskScores],
    key: str,
    title: str,
    baseline: str,
) -> None:
    name = f"sweep-{slug(key)}"
    shown = {task: lines for task, cells in by_task.items() if (lines := series.sweep_lines(cells, key))}
    if not shown:
        choice.left_out[name] = f"no row has results for two values of {key}"
        return
    base = {task: tasks[task].scores.get(baseline, np.array([])) for task in shown}
    figure = scores.sweep(
        shown,
        title=f"{title}: {name_of(key)}" if title else name_of(key),
        x_label=key,
        y_labels={task: tasks[task].metric for task in shown},
        levels={
            task: (baseline, float(np.nanmean(values)))
            for task, values in base.items()
            if np.isfinite(values).any()
        },
    )
    has_bands = any(len(line.values) > 1 for lines in shown.values() for line in lines)
    seeds = ": the mean over seeds, the band one standard deviation either side" if has_bands else ""
    choice.add(name, figure, f"Best score against {key}{seeds}.")


# -- one task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A task to draw: its cells, the common title of its pictures, and the end of their names."""

    name: str
    cells: Sequence[Entry]
    title: str
    baseline: str | None = None
    suffix: str = ""

    @property
    def results(self) -> list[Result]:
        return [result for _, result in series.done(self.cells)]

    @property
    def has_routing(self) -> bool:
        return any(result.record.routing for result in self.results)


def _add_task(choice: Choice, task: _Task) -> None:
    """Add the pictures of one task that have data."""
    _add_loss(choice, task)
    _add_scores(choice, task)
    for kind in GROUPS:
        _add_routing(choice, task, kind)
    _add_load(choice, task)
    _add_curvature(choice, task)


def _add_loss(choice: Choice, task: _Task) -> None:
    name, lines = f"loss{task.suffix}", series.losses(task.cells)
    if not lines:
        choice.left_out[name] = _why_not_logged(task, "training loss")
        return
    labels = {"title": f"{task.title}, training loss", "x_label": "epoch", "y_label": "training loss"}
    caption = f"{task.name}: training loss{_over_seeds(lines)}."
    choice.add(name, scores.curves(lines, baseline=task.baseline, **labels), caption)


def _add_scores(choice: Choice, task: _Task) -> None:
    name, lines = f"score{task.suffix}", series.epoch_scores(task.cells)
    if not any(len(line.x) > 1 for line in lines):
        choice.left_out[name] = (
            "no record holds the deciding metric of two evaluations"
            if any(len(result.record.metrics.per_epoch) > 1 for result in task.results)
            else "no run was evaluated more than once"
        )
        return
    metric = series.metric_label(task.results[0].record)
    labels = {"title": f"{task.title}, validation score", "x_label": "epoch", "y_label": metric}
    caption = f"{task.name}: {metric} on the validation split at every evaluation{_over_seeds(lines)}."
    choice.add(name, scores.curves(lines, baseline=task.baseline, **labels), caption)


def _over_seeds(lines: Sequence[series.Series]) -> str:
    """Explain line and band if a row has several seeds."""
    counts = {len(line.values) for line in lines}
    if counts == {1}:
        return ""
    some = " (of rows with several)" if 1 in counts else ""
    return f", the mean over seeds{some}; the band is one standard deviation either side"


def _why_not_logged(task: _Task, quantity: str) -> str:
    """Explain why no history has this quantity."""
    if not any(result.history for result in task.results):
        return "no history was saved beside these records"
    steps = max((int(line.get("step") or 0) for result in task.results for line in result.history), default=0)
    return f"the history holds no {quantity}: none was logged in {steps} steps, see training.logging_steps"


def _one_run(task: _Task, has_data: Callable[[Result], Any]) -> tuple[dict[str, Result], str]:
    """Return by row a run that has the data, at most `ROWS`, of one seed if all rows share one; and a caption.

    Runs are not averaged: expert 0 of one seed has nothing to do with expert 0 of another.
    """
    by_row = {
        row: [(entry.seed, result) for entry, result in pairs if has_data(result)]
        for row, pairs in series.rows_of(task.cells).items()
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
    if len({entry.seed for entry, _ in series.done(task.cells)}) == 1:
        caption = f"{text[:1].upper()}{text[1:]}{more}."
    else:
        caption = f"One run, {text}, since experts of different seeds do not correspond{more}."
    return {row: result for row, (_, result) in chosen.items()}, caption


def _add_routing(choice: Choice, task: _Task, kind: str) -> None:
    name = f"routing-{kind}{task.suffix}"
    if not task.has_routing:
        choice.left_out[name] = "no row has experts"
        return
    runs, of_seed = _one_run(task, lambda r: any(kind in layer.by for layer in r.record.routing.values()))
    if not runs:
        choice.left_out[name] = (
            f"the records hold no routing by {kind}: their {GROUPS[kind]} are unknown, or the records are older"
        )
        return
    groups, weights = series.routing_by(runs, kind)
    figure = per_layer.routing(weights, groups, title=f"{task.title}, routing by {kind}", x_label=kind)
    caption = f"{task.name}: mean routing weight of each expert for the inputs of each {kind}, by layer."
    choice.add(name, figure, f"{caption} {of_seed}")


def _add_load(choice: Choice, task: _Task) -> None:
    name = f"load{task.suffix}"
    if not task.has_routing:
        choice.left_out[name] = "no row has experts"
        return
    runs, of_seed = _one_run(task, lambda r: len(series.load_of(r)[0]) > 1)
    if not runs:
        was_logged = any(len(series.load_of(result)[0]) for result in task.results)
        choice.left_out[name] = (
            "the load of each expert was logged only once"
            if was_logged
            else _why_not_logged(task, "load of each expert")
        )
        return
    loads = {row: series.load_of(result) for row, result in runs.items()}
    figure = per_layer.load_over_time(loads, title=f"{task.title}, load over time")
    caption = (
        f"{task.name}: share of the inputs that route mostly to each expert during training, stacked from expert 0 at "
        "the bottom."
    )
    choice.add(name, figure, f"{caption} {of_seed}")


def _add_curvature(choice: Choice, task: _Task) -> None:
    name = f"curvature{task.suffix}"
    runs, of_seed = _one_run(task, lambda r: r.record.curvature)
    if not runs:
        choice.left_out[name] = "no row has a curvature"
        return
    distances = {row: series.distance_of(result) for row, result in runs.items()}
    title = f"{task.title}, distance of the curvature from the identity"
    caption = (
        f"{task.name}: relative distance of each expert's curvature from the identity, by layer (the mean over its "
        "matrices)."
    )
    choice.add(name, per_layer.distances(distances, title=title), f"{caption} {of_seed}")


# -- an inspection ----------------------------------------------------------------------------------------------------


def _add_similarity(choice: Choice, vectors: Mapping[str, Any], title: str) -> None:
    if not vectors:
        choice.left_out["similarity"] = "the model has no experts"
        return
    names = series.short_layers(list(vectors))
    shown = {names[n]: series.array(vectors[n]["cosine"]) for n in series.some_of(list(vectors), SIMILAR)}
    if not any(np.isfinite(matrix).any() for matrix in shown.values()):
        choice.left_out["similarity"] = "every expert equals its base expert, so there are no domain vectors"
        return
    choice.add(
        "similarity",
        per_layer.similarity(shown, title=f"{title}, similarity of domain vectors"),
        "Cosine similarity of the experts' domain vectors, all matrices and biases of a layer together: 1 for two "
        "experts that moved the same way from the base expert (without one, from the experts' mean).",
    )


def _add_spectrum(choice: Choice, spectra: Mapping[str, Any], title: str) -> None:
    if not spectra:
        choice.left_out["spectrum"] = "the model has no curvature"
        return
    names = series.short_layers(list(spectra))
    matrices = list(dict.fromkeys(matrix for by_matrix in spectra.values() for matrix in by_matrix))
    shown = {
        f"{names[layer]}, {matrix}": series.array(by_matrix[matrix]["values"])
        for matrix in matrices
        for layer, by_matrix in spectra.items()
        if matrix in by_matrix
    }
    is_exact = all(entry["exact"] for by_matrix in spectra.values() for entry in by_matrix.values())
    estimate = "estimated by Golub-Kahan bidiagonalisation from random starts"
    choice.add(
        "spectrum",
        per_layer.spectrum(shown, title=f"{title}, spectrum of the curvature", columns=len(spectra)),
        "Singular values of each expert's curvature, from the largest to the smallest, "
        f"{'computed from its factors' if is_exact else estimate}. The identity has 1 throughout; the numbers are "
        "those of the experts.",
    )
