"""A table of records: ``python -m camex_ft.results.tables FOLDER`` prints it in Markdown; several folders side by side.

One row a protocol, the mean and the standard deviation over its seeds; where a protocol's records differ in how they
merge, route or upcycle, one row for each way, named by what differs. Records of different data, backbone, profile or
task never share a table.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from camex_ft.errors import UserError
from camex_ft.results.record import Record, load_record
from camex_ft.results.summary import duration

HEAD = ("protocol", "seeds", "best epoch", "last epoch", "difference", "parameters", "time", "memory")
SECTIONS = ("merging", "routing", "upcycle")
BASELINE = "dense"


def read_records(folder: Path | str) -> list[Record]:
    """Return the records in the json files of `folder`, sorted by name; `UserError` if there is none."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise UserError(f"{folder}: no records (*.json) here")
    return [load_record(file) for file in files]


def table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the rows of the table, its head first; the baseline comes first, then the protocols by name.

    Scores are in hundredths, those of which less is better (perplexity) as they are; mean and sample standard deviation
    over seeds. `difference` is that of the mean best score from the baseline's. Best is the best epoch on the
    validation split, as the paper reports it. Time and memory are means, memory the peak of the process or GPU.

    Raises:
        UserError: the records are of different experiments.
    """
    for name, values in _shared(records).items():
        if len(values) > 1:
            raise UserError(
                f"these records differ in {name}, so one table can't hold them: {', '.join(values)}"
            )
    by_protocol: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_protocol[record.protocol].append(record)
    base = _scores(by_protocol.get(BASELINE, []), "best")
    order = sorted(by_protocol, key=lambda name: (name != BASELINE, name))
    rows = []
    for protocol in order:
        for way, some in _ways(by_protocol[protocol]).items():
            rows.append(_row(protocol, way, some, base))
    return [HEAD, *rows]


def beside(tables: Mapping[str, Sequence[Sequence[str]]]) -> list[tuple[str, ...]]:
    """Return one table of several, title -> rows: of each the best epoch, its difference, time and memory.

    The rows are those of the longest table; one that another lacks is empty there.
    """
    chosen = [HEAD.index(name) for name in ("best epoch", "difference", "time", "memory")]
    found = {title: {row[0]: [row[i] for i in chosen] for row in rows[1:]} for title, rows in tables.items()}
    head = (
        HEAD[0],
        *(f"{title}: {HEAD[i]}" if i == chosen[0] else HEAD[i] for title in tables for i in chosen),
    )
    longest = max(found.values(), key=len)
    blank = [""] * len(chosen)
    return [
        head,
        *((name, *(cell for part in found.values() for cell in part.get(name, blank))) for name in longest),
    ]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows, the first of which is the head, as a Markdown table."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shared(records: Sequence[Record]) -> dict[str, set[str]]:
    return {
        "task": {r.task for r in records},
        "backbone": {r.backbone for r in records},
        "profile": {r.run.profile for r in records},
        "data (sha256)": {r.data.sha256 for r in records},
        "primary metric": {r.metrics.primary for r in records},
    }


def _ways(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return one protocol's records by what they differ in, such as "options.angle 0.5"; "" where in nothing."""
    flat = [dict(_leaves({name: r.config.get(name) for name in SECTIONS})) for r in records]
    differing = sorted({k for f in flat for k in f if len({str(other.get(k)) for other in flat}) > 1})
    found: dict[str, list[Record]] = defaultdict(list)
    for values, record in sorted(
        zip(flat, records, strict=True), key=lambda pair: [str(pair[0].get(k)) for k in differing]
    ):
        words = (f"{key.partition('.')[2]} {_short(values.get(key))}" for key in differing)
        found[", ".join(words)].append(record)
    return found


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(records: Sequence[Record], which: str) -> list[float]:
    found = [(getattr(record.metrics, which), record.metrics.greater_is_better) for record in records]
    return [100 * value if hundredths else value for value, hundredths in found if value is not None]


def _row(protocol: str, way: str, records: Sequence[Record], base: Sequence[float]) -> tuple[str, ...]:
    best = _scores(records, "best")
    gap = statistics.mean(best) - statistics.mean(base) if best and base and protocol != BASELINE else None
    seconds = [r.run.seconds for r in records if r.run.seconds is not None]
    memory = [r.cost.peak_memory_mb for r in records if r.cost.peak_memory_mb is not None]
    return (
        f"`{protocol}`" + (f" {way}" if way else ""),
        ", ".join(str(seed) for seed in sorted(r.seed for r in records)),
        _spread(best),
        _spread(_scores(records, "last")),
        "" if gap is None else f"{gap:+.2f}",
        f"{records[0].model.parameters / 1e6:.3g} M",
        duration(statistics.mean(seconds)) if seconds else "",
        f"{statistics.mean(memory):,.0f} MB" if memory else "",
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def of_folders(folders: Sequence[Path | str]) -> str:
    """Return the table of a folder of records, or of several side by side under their tasks' names, in Markdown."""
    made = {records[0].task: table(records) for records in map(read_records, folders)}
    return markdown(beside(made) if len(folders) > 1 else next(iter(made.values())))


if __name__ == "__main__":
    print(of_folders(sys.argv[1:]), end="")
