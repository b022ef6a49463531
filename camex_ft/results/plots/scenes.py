"""The pictures of one task's runs, each left out with a reason where its numbers are not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from camex_ft.results.entries import Entry, Result
from camex_ft.results.plots import curves as curve
from camex_ft.results.plots import data, layers, lines, maps

ROWS = 8  # of panels in one picture
GROUPS = {"domain": "domains", "label": "labels"}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Material of the pictures of one task: its entries, their common title, and the end of their names."""

    task: str
    entries: Sequence[Entry]
    title: str
    baseline: str | None = None
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pictures of a comparison.

    Attributes:
        figures: by name, which is fit for a file's.
        captions: of each figure, what it shows; also its text for those who do not see it.
        left_out: names of pictures that were not made, and why.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, caption: str) -> None:
        """Take a picture in."""
        self.figures[name], self.captions[name] = figure, caption


def draw_task(made: Choice, scene: Scene) -> None:
    """Add what applies to the runs of one task."""
    for one in (_loss, _score, _routing, _load, _curvature):
        one(made, scene)


def _loss(made: Choice, scene: Scene) -> None:
    name, series = f"loss{scene.suffix}", data.losses(scene.entries)
    if not series:
        made.left_out[name] = _no_losses(scene.entries)
        return
    made.add(
        name,
        curve.curves(
            series,
            title=f"{scene.title}, training loss",
            x_label="epoch",
            y_label="training loss",
            baseline=scene.baseline,
        ),
        f"{scene.task}: training loss{_over_seeds(series)}.",
    )


def _score(made: Choice, scene: Scene) -> None:
    name, series = f"score{scene.suffix}", data.epoch_scores(scene.entries)
    if not any(len(s.x) > 1 for s in series):
        more = any(len(result.record.metrics.per_epoch) > 1 for _, result in data.done(scene.entries))
        made.left_out[name] = (
            "no record holds the deciding metric of two evaluations"
            if more
            else "no run was evaluated more than once"
        )
        return
    label = data.metric_label(data.done(scene.entries)[0][1].record)
    made.add(
        name,
        curve.curves(
            series,
            title=f"{scene.title}, validation score",
            x_label="epoch",
            y_label=label,
            baseline=scene.baseline,
        ),
        f"{scene.task}: {label} on the validation split at every evaluation{_over_seeds(series)}.",
    )


def _over_seeds(series: Sequence[data.Series]) -> str:
    """Return what a line and its band are, where a row has several seeds; else nothing."""
    counts = {len(s.values) for s in series}
    if counts == {1}:
        return ""
    some = "" if 1 not in counts else ", where a row has several"
    return f", the mean over seeds{some}; the band is one standard deviation either side"


def _no_losses(entries: Sequence[Entry]) -> str:
    """Return why there is no training loss to draw."""
    results = [result for _, result in data.done(entries)]
    if not any(result.history for result in results):
        return "no history was kept beside these records"
    steps = max((int(line.get("step") or 0) for result in results for line in result.history), default=0)
    return f"the history holds no training loss: none was logged in {steps} steps, see training.logging_steps"


def _one_run(
    entries: Sequence[Entry], has: Callable[[Result], Any]
) -> tuple[dict[str, tuple[Entry, Result]], int]:
    """Return by row a run that has the data, at most `ROWS`, of one seed if all share one; and how many rows have it.

    Runs are not averaged: expert 0 of one seed has nothing to do with expert 0 of another.
    """
    found = {row: [pair for pair in some if has(pair[1])] for row, some in data.rows_of(entries).items()}
    found = {row: some for row, some in found.items() if some}
    times = Counter(seed for some in found.values() for seed in {entry.seed for entry, _ in some})
    chosen = {
        row: min(some, key=lambda pair: (-times[pair[0].seed], pair[0].seed)) for row, some in found.items()
    }
    return dict(list(chosen.items())[:ROWS]), len(found)


def _said(runs: Mapping[str, tuple[Entry, Result]], count: int, entries: Sequence[Entry]) -> str:
    seeds = sorted({entry.seed for entry, _ in runs.values()})
    words = f"seed {seeds[0]}" if len(seeds) == 1 else f"one seed a row ({', '.join(map(str, seeds))})"
    more = f"; the first {len(runs)} of {count} rows" if count > len(runs) else ""
    if len({entry.seed for entry, _ in data.done(entries)}) == 1:
        return f"{words[:1].upper()}{words[1:]}{more}."
    return f"One run, {words}, since experts of different seeds do not correspond{more}."


def _routing(made: Choice, scene: Scene) -> None:
    for kind, plural in GROUPS.items():
        name = f"routing-{kind}{scene.suffix}"
        runs, count = _one_run(scene.entries, lambda r: any(kind in v.by for v in r.record.routing.values()))  # noqa: B023
        if not runs:
            routed = any(result.record.routing for _, result in data.done(scene.entries))
            made.left_out[name] = (
                f"the records hold no routing by {kind}: their {plural} are not known, or the records are older"
                if routed
                else "no row has experts"
            )
            continue
        groups, weights = layers.routing_by({row: result for row, (_, result) in runs.items()}, kind)
        made.add(
            name,
            maps.routing(weights, groups, title=f"{scene.title}, routing by {kind}", x_label=kind),
            f"{scene.task}: mean routing weight that each expert gets from the inputs of each {kind}, by layer. "
            + _said(runs, count, scene.entries),
        )


def _load(made: Choice, scene: Scene) -> None:
    name = f"load{scene.suffix}"
    runs, count = _one_run(scene.entries, lambda r: len(layers.loads(r)[0]) > 1)
    if not runs:
        routed = any(result.record.routing for _, result in data.done(scene.entries))
        lines_of = any(layers.loads(result)[0].size for _, result in data.done(scene.entries))
        made.left_out[name] = (
            "no row has experts"
            if not routed
            else "the load of each expert was logged only once"
            if lines_of
            else _no_losses(scene.entries).replace("training loss", "load of each expert")
        )
        return
    shown = {row: layers.load_of(result) for row, (_, result) in runs.items()}
    made.add(
        name,
        lines.load_over_time(shown, title=f"{scene.title}, load over time"),
        f"{scene.task}: share of the inputs whose largest routing weight is each expert's while training, stacked from "
        "expert 0 at the bottom. " + _said(runs, count, scene.entries),
    )


def _curvature(made: Choice, scene: Scene) -> None:
    name = f"curvature{scene.suffix}"
    runs, count = _one_run(scene.entries, lambda r: r.record.curvature)
    if not runs:
        made.left_out[name] = "no row has a curvature"
        return
    made.add(
        name,
        maps.distances(
            {row: layers.distance_of(result) for row, (_, result) in runs.items()},
            title=f"{scene.title}, distance of the curvature from the identity",
        ),
        f"{scene.task}: how far each expert's curvature is from the identity, relative, by layer (the mean over its "
        "matrices). " + _said(runs, count, scene.entries),
    )
