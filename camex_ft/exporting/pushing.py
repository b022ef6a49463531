"""To the hub: a model's files and its card, each of them named before anything is sent, and nothing else."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal

from camex_ft.config.backbones import NEW, is_gguf
from camex_ft.results import find_done
from camex_ft.results.card import NAME, card
from camex_ft.run.pipeline import MODEL
from camex_ft.tasks.base import Task
from camex_ft.upcycling import adapters
from camex_ft.utils import folders
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

# what transformers, camex_ft and `export` write; a folder with anything else in it is not sent
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter.safetensors")
ABOUT = (
    "config.json",
    "generation_config.json",
    "adapter.json",
    "export.json",
    "model.safetensors.index.json",
)
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    "chat_template.jinja",
)
TEXTS = (NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
ALLOWED = (*WEIGHTS, *ABOUT, *TOKENIZER, *TEXTS)
UNAUTHORISED, FORBIDDEN = 401, 403
# of the library below, another one from version to version
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files that would be sent, and where to.

    Attributes:
        folder: of the model.
        repo_id: where to.
        files: names and sizes in bytes, in order.
        card: text of README.md where the folder has none; None where it has, or nothing is known to make one of.
    """

    folder: Path
    repo_id: str
    files: tuple[tuple[str, int], ...]
    card: str | None = None

    def lines(self) -> list[str]:
        """Return every file with its size, and the sum."""
        width = max(len(name) for name, _ in self.files)
        total = sum(size for _, size in self.files)
        listed = [f"{name:{width}}  {decimal(size):>9}" for name, size in self.files]
        return [f"{self.folder} -> {self.repo_id}", *listed, f"{'in all':{width}}  {decimal(total):>9}"]


def upload_of(source: Path | str, repo_id: str, *, license: str | None = None) -> Upload:
    """Return what `push` would send, without a network.

    Args:
        source: a finished run, whose model is sent, or the folder of a model.
        repo_id: NAME/MODEL, or MODEL of one's own.
        license: of the weights, for a card that is made here.

    Raises:
        UserError: there is no model, its folder holds what is no part of one, or the name is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"'{repo_id}' is no name on the hub: {str(error).rstrip('.')}. Expected NAME/MODEL"
        ) from error
    given = Path(source)
    record = find_done(given) if given.is_dir() else None
    folder = given if record is None else given / MODEL
    _check(folder, given)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    made = None
    if record is not None and NAME not in files:
        task: Task = TASKS.get(record.task)
        made = card(record, head=task.head, task=task, license=license)
        files[NAME] = len(made.encode())
    _check_backbone(folder)
    return Upload(folder=folder, repo_id=repo_id, files=tuple(sorted(files.items())), card=made)


def push(upload: Upload, *, private: bool = False) -> str:
    """Make the repository if it is not there, send the files in one commit, and return its address.

    Args:
        upload: of `upload_of`.
        private: for a repository that is made now; one that is there and public is refused then.

    Raises:
        UserError: the hub cannot be reached, or does not let this user.
    """
    operations = [
        CommitOperationAdd(
            path_in_repo=name,
            path_or_fileobj=upload.card.encode()
            if upload.card and name == NAME
            else str(upload.folder / name),
        )
        for name, _ in upload.files
    ]
    api = HfApi()
    try:
        repo = api.create_repo(upload.repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo.repo_id).private:
            raise UserError(
                f"{repo.repo_id} is there already and public: nothing was sent. Expected another name"
            )
        sent = api.create_commit(repo.repo_id, operations, commit_message="Upload by camex_ft")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"the hub does not know who you are: log in with `hf auth login`. ({_first(error)})"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(_refused(error, upload.repo_id)) from error
    except (HTTP_ERROR, OSError) as error:
        raise UserError(
            f"{upload.repo_id}: the hub cannot be reached: {_first(error)}. Expected a connection, and HF_HUB_OFFLINE "
            "not set; --dry-run needs none"
        ) from error
    return str(sent.repo_url)


def _check(folder: Path, given: Path) -> None:
    if not folder.is_dir():
        why = (
            "keeps no model: output.model was false, or it was removed" if folder != given else "is no folder"
        )
        raise UserError(f"{given} {why}: expected a finished run with its model, or the folder of a model")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is neither a finished run nor the folder of a model: it has no config.json. Expected a run in "
            "results/runs, or what `camex-ft export` wrote"
        )
    fault = folders.unsafe(folder)
    if fault:
        raise UserError(f"{folder} is not sent: {fault}")
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    other = [name for name in names if not any(fnmatch.fnmatchcase(name, known) for known in ALLOWED)]
    if other:
        raise UserError(
            f"{folder} is not sent: {', '.join(other[:5])} {'is' if len(other) == 1 else 'are'} no part of a model. "
            "Expected weights, configuration, tokenizer and card alone; move the rest elsewhere"
        )
    if not any(fnmatch.fnmatchcase(name, known) for name in names for known in WEIGHTS):
        raise UserError(f"{folder} is not sent: it has no weights. Expected {WEIGHTS[0]}")


def _check_backbone(folder: Path) -> None:
    """Raise `UserError` where an adapter names its backbone by a path of this machine."""
    if not adapters.is_adapter(folder):
        return
    name = adapters.read(folder).name.removeprefix(NEW)
    if name.startswith((".", "/", "~")) or is_gguf(name) or (name and Path(name).exists()):
        raise UserError(
            f"{folder} is not sent: it is an adapter of the backbone {name}, which is a path of this machine: nobody "
            f"else finds it. Expected the backbone's id on the hub as `name` in {adapters.ABOUT} and in config.json, "
            "both under `backbone`"
        )


def _refused(error: HfHubHTTPError, repo_id: str) -> str:
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code == UNAUTHORISED:
        return f"{repo_id}: the hub does not know who you are (401): log in with `hf auth login`"
    if code == FORBIDDEN:
        return (
            f"{repo_id}: the hub does not let you write there (403): expected a name of your own or of an organisation "
            "that you belong to, and a token that may write"
        )
    return f"{repo_id}: the hub refuses: {_first(error)}"


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
