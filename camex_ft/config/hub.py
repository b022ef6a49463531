"""The Hugging Face hub, asked with patience that ends: what its libraries leave without a time limit gets one here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

SECONDS = 5.0  # to wait for the hub's first answer, before it counts as out of reach
Kind = Literal["model", "dataset"]


def silence(name: str, kind: Kind) -> Exception | None:
    """Return why the hub says nothing about a repository, or None where it does; takes `SECONDS` at most.

    Args:
        name: its id.
        kind: what it holds.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except (
        Exception
    ) as error:  # each version of the hub's library has another transport, with errors of its own
        return error
    return None


@contextmanager
def bounded() -> Iterator[None]:
    """Give requests that have no time limit of their own one, as files have: a list of files may be waited for forever.

    That of files is ``HF_HUB_DOWNLOAD_TIMEOUT``, 10 seconds of silence unless it is set; the hub's library tries again
    several times.
    """
    from huggingface_hub import constants, get_session

    session = get_session()
    kept, session.timeout = session.timeout, constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        yield
    finally:
        session.timeout = kept


@contextmanager
def cache_alone() -> Iterator[None]:
    """Keep `datasets` from the network: it would ask several times for each file before it looks into its cache."""
    import datasets
    from huggingface_hub import constants

    kept = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = kept


def snapshot(name: str, kind: Kind) -> Path | None:
    """Return the folder of a repository in the hub cache, or None where it is not there; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def cause(error: BaseException) -> str:
    """Return the first line of an error, and of the one that it came from where that says more than its own."""
    said = _line(error)
    below = error.__cause__
    return f"{said} ({_line(below)})" if below is not None and _line(below) not in said else said


def refusal(error: BaseException, name: str, kind: Kind) -> str | None:
    """Return what to do where the hub has answered and refuses: gated, unknown or private, disabled; else None."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    what = "model" if kind == "model" else "data set"
    for each in _chain(error):
        if isinstance(each, errors.GatedRepoError):
            return f"'{name}' is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
        if isinstance(each, errors.RepositoryNotFoundError):
            return f"the hub has no {what} '{name}' (or it is private: log in with `hf auth login` or set HF_TOKEN)"
        if isinstance(each, errors.DisabledRepoError):
            return f"the hub has disabled the {what} '{name}': see {page}"
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status in (401, 403):
            return (
                f"the hub does not let you read '{name}' (HTTP {status}): see {page}, and log in with `hf auth login` "
                "or set HF_TOKEN to a token that is still valid"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _line(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if type(error).__name__ in first else f"{type(error).__name__}: {first}"
