"""Requests to the Hugging Face hub with a time limit, and the messages for what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from camex_ft.utils.errors import chain

SECONDS = 5.0  # to wait for the hub's first answer, before it counts as out of reach
TRIES = 3  # at getting any answer to a request
Kind = Literal["model", "dataset"]


def silence(name: str, kind: Kind) -> Exception | None:
    """Return why the hub says nothing about a repository, or None where it does; takes `SECONDS` at most."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except Exception as error:  # the library's transport, and its errors, differ from version to version
        return error
    return None


@contextmanager
def bounded() -> Iterator[None]:
    """End what the hub's library would wait for: forever for a list of files, for minutes for a file.

    Requests without a time limit get that of files, ``HF_HUB_DOWNLOAD_TIMEOUT``: 10 seconds of silence unless it is
    set. What has been asked for `TRIES` times without any answer is not asked for again. A download that goes on,
    however slowly, asks for another part each time.

    Raises:
        TimeoutError: there is no answer.
    """
    from huggingface_hub import constants, get_session

    tries: Counter[tuple[str, str, str]] = Counter()

    def before(request: Any) -> None:
        waits = request.extensions.get("timeout") or {}
        if not any(waits.values()):
            limits = dict.fromkeys(("connect", "read", "write", "pool"), constants.HF_HUB_DOWNLOAD_TIMEOUT)
            request.extensions["timeout"] = limits
        tries[what(request)] += 1
        if tries[what(request)] > TRIES:
            raise TimeoutError(f"asked {TRIES} times for {request.url}, and the hub says nothing")

    def after(response: Any) -> None:
        tries.pop(what(response.request), None)

    def what(request: Any) -> tuple[str, str, str]:
        return request.method, str(request.url), request.headers.get("range", "")

    hooks = get_session().event_hooks
    hooks["request"].append(before)
    hooks["response"].append(after)
    try:
        yield
    finally:
        hooks["request"].remove(before)
        hooks["response"].remove(after)


class NotFetched(Exception):
    """A repository of the hub is neither in the cache, or not whole, nor to be fetched.

    Attributes:
        refused: what to do where the hub has answered and refuses; None where it does not answer.
        reason: the first line of what went wrong.
    """

    def __init__(self, refused: str | None, reason: str) -> None:
        super().__init__(refused or reason)
        self.refused, self.reason = refused, reason


def is_id(name: str) -> bool:
    """Return whether a name has the form of an id on the hub: MODEL or NAME/MODEL."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def config_folder(name: str, *, fetch: bool) -> Path:
    """Return the folder in the hub cache with a model's ``config.json``.

    Args:
        name: id of the model.
        fetch: download the file where the cache does not have it.

    Raises:
        NotFetched: it is not in the cache, and not fetched.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json")
    if isinstance(path, str):
        return Path(path).parent
    if not fetch:
        raise NotFetched(None, f"{name} is not in the cache")
    return fetch_model(name, allow=["config.json"], ignore=[])


def fetch_model(name: str, *, allow: Sequence[str], ignore: Sequence[str], **options: Any) -> Path:
    """Return the folder of a model in the hub cache, after a download where the hub has another or more of it.

    Args:
        name: its id.
        allow, ignore: patterns of the files that are fetched, and of those that are not.
        options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir.

    Raises:
        NotFetched: the hub has no such model, or refuses, or cannot be asked and it is not in the cache.
    """
    from huggingface_hub import errors, snapshot_download

    silent = silence(name, "model")
    options |= {"allow_patterns": list(allow), "ignore_patterns": list(ignore)}
    try:
        with bounded():
            return Path(snapshot_download(name, local_files_only=silent is not None, **options))
    except Exception as error:  # the library's transport, and its errors, differ from version to version
        reason = silent if silent is not None and isinstance(error, errors.LocalEntryNotFoundError) else error
        raise NotFetched(refusal(reason, name, "model"), cause(reason)) from error


@contextmanager
def cache_alone() -> Iterator[None]:
    """Keep `datasets` from the network: it would ask several times for each file before it looks into its cache."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def is_prepared(name: str, configuration: str) -> bool:
    """Return whether the cache of `datasets` holds one configuration of a data set, ready to be read."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / name.replace("/", "___") / configuration
    return any(folder.glob("*/*/dataset_info.json"))


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
    what, login = "model" if kind == "model" else "data set", "log in with `hf auth login` or set HF_TOKEN"
    for inner in chain(error):
        if isinstance(inner, errors.GatedRepoError):
            return f"'{name}' is gated: ask for access at {page}, then {login}"
        if isinstance(inner, errors.RepositoryNotFoundError):
            return f"the hub has no {what} '{name}' (or it is private: {login})"
        if isinstance(inner, errors.DisabledRepoError):
            return f"the hub has disabled the {what} '{name}': see {page}"
        status = getattr(getattr(inner, "response", None), "status_code", None)
        if status in (401, 403):
            reason = f"the hub does not let you read '{name}' (HTTP {status}): see {page}"
            return f"{reason}, and {login} to a token that is still valid"
    return None


def _line(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if type(error).__name__ in first else f"{type(error).__name__}: {first}"
