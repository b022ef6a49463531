"""Finished cells, found by the hash of their configuration, data and backbone, wherever their records lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from camex_ft.backbones import content
from camex_ft.compare.cells import Cell
from camex_ft.config.identity import folder_label
from camex_ft.config.needs import local_backbone
from camex_ft.results.entries import Entry, Result
from camex_ft.results.experiment import has_settings


def entries(cells: Sequence[Cell], results: Iterable[Result]) -> list[Entry]:
    """Return the cells with their results; of several, as where data have changed since, the newest.

    A record belongs to a cell if its name ends in the hash that the cell's configuration has on the record's data and
    the record's backbone, and that backbone is the cell's: by its content where that is on this machine's disk and in
    the record, else by its name.
    """
    contents = {name: content.read_local(name) for name in {cell.settled.backbone for cell in cells}}
    found: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        record = result.record
        found[record.task, record.protocol, record.seed].append(result)
    made = []
    for cell in cells:
        some = found[cell.task, cell.settled.merging.protocol, cell.seed]
        here = contents[cell.settled.backbone]
        own = sorted((r for r in some if belongs(r, cell, here)), key=lambda r: r.record.run.started)
        newest = own[-1] if own else None
        made.append(Entry(task=cell.task, row=cell.row, keys=cell.keys, seed=cell.seed, result=newest))
    return made


def belongs(result: Result, cell: Cell, backbone: str | None = None) -> bool:
    """Return whether a result is that of a cell, whose backbone has this content (None: it is not known)."""
    record, name = result.record, cell.settled.backbone
    known, local = record.model.backbone_sha256, local_backbone(name)
    if known is None:  # its hash has the name
        same = True
    elif backbone is not None:
        same = known == backbone
    elif local is not None:
        same = folder_label(record.backbone) == folder_label(local)
    else:
        same = record.backbone == name
    return same and has_settings(record, cell.settled)
