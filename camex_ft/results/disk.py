"""A disk without room: told as such, whichever library has met it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from camex_ft.utils.errors import UserError, is_full, reason_full


@contextmanager
def full_disk(folder: str) -> Iterator[None]:
    """Make an error of a full disk a `UserError`.

    Args:
        folder: where results go: ``output.dir``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"output.dir: there is no room left to write in '{folder}': {reason_full(error)}. "
            "Make room: the same command goes on from the last checkpoint. training.save_total_limit=1 keeps fewer "
            "checkpoints, output.model=false no model"
        ) from error
