"""An export in words: for the terminal, the card, and as numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from camex_ft.results.provenance import versions
from camex_ft.utils.escaping import markdown, markdown_notes, quoted
from camex_ft.utils.registry import PROTOCOLS

if TYPE_CHECKING:
    from camex_ft.exporting.measure import Exported
    from camex_ft.exporting.routing import MeanRouting

FORMAT = 1
TITLES = {"dense": "What merging once has cost", "folded": "What folding has changed"}


def lines(made: Exported) -> list[str]:
    """Return what the terminal shows: metrics before and after, and what was lost."""
    width = max(map(len, made.after))
    table = [f"{'':{width}}  {'run':>10}  {made.form:>10}  {'change':>10}"]
    for name, after in made.after.items():
        before = made.before[name]
        table.append(f"{name:{width}}  {before:10.4f}  {after:10.4f}  {_change(before, after):>10}")
    return [*table, "", *_said(made)]


def sections(made: Exported) -> list[tuple[str, str]]:
    """Return the card's section: the same in Markdown."""
    rows = [
        f"| {markdown(name)} | {made.before[name]:.4f} | {after:.4f} | {_change(made.before[name], after)} |"
        for name, after in made.after.items()
    ]
    head = f"| metric | the run's model | {made.form} | change |"
    table = "\n".join([head, "|---|---|---|---|", *rows])
    return [(TITLES[made.form], "\n\n".join([table, *map(markdown_notes, _said(made))]))]


def numbers(made: Exported) -> dict[str, Any]:
    """Return everything that was measured, for ``export.json``; nothing in it is private."""
    routing = made.routing
    return {
        "format": FORMAT,
        "as": made.form,
        "run": made.record.run.name,
        "protocol": made.record.protocol,
        "calibration": {"split": made.split, "rows": made.rows},
        "metrics": {"merged": made.before, made.form: made.after},
        "parameters": {"merged": made.parameters[0], made.form: made.parameters[1]},
        "logits": {"difference": made.difference.largest, "largest": made.difference.scale},
        "seconds": {"merged": made.seconds.before, made.form: made.seconds.after},
        "routing": {}
        if routing is None
        else {
            name: {
                "weights": weights.tolist(),
                "entropy": routing.entropy[name],
                "lost": routing.lost[name],
            }
            for name, weights in routing.weights.items()
        },
        "versions": versions(),
    }


def _said(made: Exported) -> list[str]:
    before, after = made.parameters
    spent = made.seconds
    said = [
        f"Logits differ by {made.difference.largest:.2g} at most, where the largest is {made.difference.scale:.3g}. "
        f"{after:,} parameters in place of {before:,}. A forward pass takes {spent.after * 1e3:.3g} ms in place of "
        f"{spent.before * 1e3:.3g} ms (x {spent.ratio:.2f}; medians, in turns)."
    ]
    if made.note:
        said.append(f"{made.note[0].upper()}{made.note[1:]}.")
    if made.routing is None:
        return [*said, "The run has no experts: this is its model, under the plain class."]
    return [*said, *_routing(made, made.routing)] if made.form == "dense" else said


def _routing(made: Exported, routing: MeanRouting) -> list[str]:
    experts = len(next(iter(routing.weights.values())))
    entropy, lost = list(routing.entropy.values()), list(routing.lost.values())
    rows = "row" if made.rows == 1 else "rows"
    said = [
        f"Routing weights are the means over the first {made.rows:,} {rows} of the {made.split} split. By layer, they "
        f"have an entropy of {_range(entropy)} nats for one input (at most {math.log(experts):.3f} with {experts} "
        f"experts), and {_range(lost)} nats that told inputs apart are lost."
    ]
    if PROTOCOLS.get(made.record.protocol).form == "outputs":
        said.append(
            f"{quoted(made.record.protocol)} mixes the outputs of experts, and not their weights: the mean expert, "
            "with a non-linearity within, is another function even where all inputs are routed alike."
        )
    return said


def _change(before: float, after: float) -> str:
    return f"{round(after - before, 4) + 0.0:+.4f}"  # never -0.0000


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
