"""A disk without room: told as such, whichever library has met it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from camex_ft.errors import UserError

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch have errors of their own; torch's writer does not pass the reason on: there is hardly another.
SAID = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b")
TORCH = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos")


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came of, says that there is no room to write."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in ERRNOS:
            return True
        if SAID.search(str(seen)) or TORCH.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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
        said = (
            "a file of torch's was cut short"
            if TORCH.search(str(error))
            else str(error).strip().partition("\n")[0]
        )
        raise UserError(
            f"output.dir: there is no room left to write in '{folder}': {said}. "
            "Make room: the same command goes on from the last checkpoint. training.save_total_limit=1 keeps fewer "
            "checkpoints, output.model=false no model"
        ) from error
