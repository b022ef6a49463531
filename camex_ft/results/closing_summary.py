"""The closing summary of a run: a table on a terminal, ``key: value`` lines elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camex_ft.results.record import Record
from camex_ft.utils.escaping import one_line, say


def summary_rows(record: Record, folder: Path | str) -> list[tuple[str, str]]:
    """Return (label, value) pairs: what was run, what came out, what it cost, where the record is."""
    metrics, cost = record.metrics, record.cost
    rows = [
        ("run", f"{record.task}, {record.backbone}, {record.protocol}, seed {record.seed}"),
        ("profile", f"{record.run.profile} ({_reason(record)})"),
        (f"best {metrics.primary}", f"{_number(metrics.best)} ({_best_of(record)})"),
        (f"last {metrics.primary}", _number(metrics.last)),
    ]
    rows += [(name, _number(value)) for name, value in metrics.all.items() if name != metrics.primary]
    scores = [layer.nmi for layer in record.routing.values() if layer.nmi is not None]
    if scores:
        rows.append(("routing NMI", f"{min(scores):.3f} to {max(scores):.3f} over {len(scores)} layers"))
    by_token = record.task.startswith("lm/")
    return [
        *rows,
        ("time", duration(record.run.seconds)),
        ("samples a second", _number(cost.samples_per_second, ".1f")),
        *([("tokens a second", _number(cost.tokens_per_second, ",.0f"))] if by_token else []),
        ("peak memory", f"{_number(cost.peak_memory_mb, ',.0f')} MB on {cost.device}"),
        ("record", os.path.relpath(Path(folder) / "record.json")),
    ]


def print_summary(record: Record, folder: Path | str, *, console: Console | None = None) -> None:
    """Print the closing summary to `console` (standard output by default)."""
    console = console or Console()
    rows = summary_rows(record, folder)
    if not console.is_terminal:
        for label, value in rows:
            say(console, one_line(f"{label}: {value}"))
        return
    table = Table(
        show_header=False, title=Text(one_line(f"{record.task}: {record.protocol}")), title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(one_line(label)), Text(one_line(value)))
    console.print(table)


def duration(seconds: float | None) -> str:
    """Return seconds as "42.0 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _best_of(record: Record) -> str:
    """Say which evaluation the best value is of."""
    if record.metrics.best is not None and not record.metrics.per_epoch:
        return "the final evaluation: training had none"
    return f"epoch {_number(record.metrics.best_epoch, 'g')}"


def _reason(record: Record) -> str:
    return record.run.profile_reason.removeprefix(f"profile {record.run.profile}: ")


def _number(value: float | None, spec: str = ".4f") -> str:
    return "not a number" if value is None else format(value, spec)
