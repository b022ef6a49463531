"""Upcycled models of the hub: fetched into its cache, with the patience and the messages that backbones have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from camex_ft.backbones.source import NEEDED, NOT_NEEDED
from camex_ft.utils import hub
from camex_ft.utils.errors import UserError


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form NAME/MODEL of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def fetch(name: str, *, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of a model in the hub cache, after a download where the hub has another or more of it.

    Args:
        name: its id.
        revision: a branch, tag or commit.
        options: of `huggingface_hub.snapshot_download`: token, cache_dir.

    Raises:
        UserError: the hub has no such model, or refuses, or cannot be asked and it is not in the cache.
    """
    silent = hub.silence(name, "model")
    try:
        with hub.bounded():
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=NEEDED,
                    ignore_patterns=NOT_NEEDED,
                    local_files_only=silent is not None,
                    **options,
                )
            )
    except Exception as error:  # each version of the hub's library has a transport with errors of its own
        reason = silent if silent is not None and isinstance(error, LocalEntryNotFoundError) else error
        why = hub.refusal(reason, name, "model") or (
            f"it is not in the hub cache and cannot be fetched: {hub.cause(reason)}"
        )
        raise UserError(f"there is no folder '{name}', and as an id on the hub: {why}") from error
