"""Cells that are done already, by this machine's data: each data set is read once, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from camex_ft.backbones import content
from camex_ft.compare.cells import Cell
from camex_ft.compare.running import DONE, FAILED, State
from camex_ft.config import resolve
from camex_ft.data import sources
from camex_ft.results import find_done
from camex_ft.run import steps
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS


def survey(
    cells: Sequence[Cell], *, force: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[State]:
    """Return the state of every cell before anything runs: done, waiting, or failed for want of what it needs.

    Each data set and each backbone is read once; those of the hub that are not in its cache are downloaded.

    Args:
        cells: of one or several comparisons; what two of them share occurs once.
        force: take none for done.
        say: told what is being read.

    Raises:
        UserError: no cell can run.
    """
    steps.quieten()
    digests: dict[str, tuple[str, str | None] | UserError] = {}
    states: dict[str, State] = {}
    for cell in cells:
        key = json.dumps([cell.task, cell.settled.data.model_dump(mode="json"), cell.settled.backbone])
        if key not in digests:
            say(f"reading {cell.task}")
            digests[key] = _digests(cell)
        digest = digests[key]
        if isinstance(digest, UserError):
            reason = " ".join(str(digest).split())
            states[f"{cell}: {cell.command}"] = State(cell=cell, status=FAILED, reason=reason)
            continue
        name = steps.name_of(cell.settled, *digest)
        state = State(cell=cell, name=name)
        if not force and find_done(cell.settled.output.path / "runs" / name) is not None:
            state.status, state.before = DONE, True
        states.setdefault(name, state)
    if all(state.status == FAILED for state in states.values()):
        raise next(digest for digest in digests.values() if isinstance(digest, UserError))
    return list(states.values())


def _digests(cell: Cell) -> tuple[str, str | None] | UserError:
    """Return the SHA-256 of a cell's data and of its backbone's content, or why it cannot run here."""
    try:
        resolve(cell.settled)
        data = sources.fingerprint(steps.load_splits(cell.settled, TASKS.get(cell.task)))
        return data, content.read(cell.settled.backbone).sha256
    except UserError as error:
        return error
