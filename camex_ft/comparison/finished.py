"""Which cells have a record: found by the hash of their configuration and data, wherever the records lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from camex_ft.comparison.cells import Cell
from camex_ft.config import config_hash
from camex_ft.results.entries import Entry, Result


def entries(cells: Sequence[Cell], results: Iterable[Result]) -> list[Entry]:
    """Return the cells with their results; of several, as where data have changed since, the newest.

    A record belongs to a cell if its name ends in the hash that the cell's configuration has on the record's data.
    """
    found: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        record = result.record
        found[record.task, record.protocol, record.seed].append(result)
    made = []
    for cell in cells:
        some = found[cell.task, cell.settled.merging.protocol, cell.seed]
        own = sorted((r for r in some if belongs(r, cell)), key=lambda r: r.record.run.started)
        newest = own[-1] if own else None
        made.append(Entry(task=cell.task, row=cell.row, keys=cell.keys, seed=cell.seed, result=newest))
    return made


def belongs(result: Result, cell: Cell) -> bool:
    """Return whether a result is that of a cell."""
    name = result.record.run.name
    return name.endswith("--" + config_hash(cell.settled, data=result.record.data.sha256))
