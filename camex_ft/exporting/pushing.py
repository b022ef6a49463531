"""Push a model's files and its card to the hub: a list of known files, shown before anything is sent."""

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
    *("config.json", "generation_config.json", "adapter.json", "export.json", "merge.json"),
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
    """Files of a model's folder to send to a repository."""

    folder: Path
    repo_id: str
    files: tuple[tuple[str, int], ...]  # names and sizes in bytes, in order
    card: str | None = None  # text of README.md if the folder has none and its record is known; else None

    def lines(self) -> list[str]:
        """Return a line for each file with its size, and the total."""
        width = max(len(name) for name, _ in self.files)
        total = sum(size for _, size in self.files)
        listed = [f"{name:{width}}  {decimal(size):>9}" for name, size in self.files]
        return [f"{self.folder} -> {self.repo_id}", *listed, f"{'total':{width}}  {decimal(total):>9}"]


def upload_of(source: Path | str, repo_id: str, *, license: str | None = None) -> Upload:
    """Return the files that `push` would send; this needs no network.

    The source is a finished run, whose model is sent, or the folder of a model.

    Raises:
        UserError: there is no model, its folder has other files too, or the name is not valid on the hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"'{repo_id}' is not a valid name on the hub: {str(error).rstrip('.')}. Expected NAME/MODEL"
        ) from error
    origin = Path(source)
    record = find_done(origin) if origin.is_dir() else None
    folder = origin if record is None else origin / MODEL
    _check(folder, origin)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    text = None
    if record is not None and NAME not in files:
        task: Task = TASKS.get(record.task)
        text = card(record, head=task.head, task=task, license=license)
        files[NAME] = len(text.encode())
    _check_backbone(folder)
    return Upload(folder=folder, repo_id=repo_id, files=tuple(sorted(files.items())), card=text)


def push(upload: Upload, *, private: bool = False) -> str:
    """Create the repository if needed, send the files in one commit, and return its address.

    With `private` a new repository is private, and a public one that exists is refused.

    Raises:
        UserError: the hub cannot be reached or denies access.
    """
    contents: dict[str, str | bytes] = {name: str(upload.folder / name) for name, _ in upload.files}
    if upload.card:
        contents[NAME] = upload.card.encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi()
    try:
        repo = api.create_repo(upload.repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo.repo_id).private:
            raise UserError(
                f"{repo.repo_id} exists already and is public: nothing was sent. Use another name"
            )
        sent = api.create_commit(repo.repo_id, operations, commit_message="Upload by camex_ft")
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code == UNAUTHORISED or isinstance(error, LocalTokenNotFoundError):
            message = f"the hub does not know who you are: log in with `hf auth login`. ({_first(error)})"
        elif code == FORBIDDEN:
            message = "the hub denies write access (403). Use a name of your own or of your organisation, and a token "
            message += "with write permission"
        else:
            message = f"the hub refused the request: {_first(error)}"
        raise UserError(f"{upload.repo_id}: {message}") from error
    except (HTTP_ERROR, OSError) as error:
        raise UserError(
            f"{upload.repo_id}: the hub cannot be reached: {_first(error)}. Expected a connection, and HF_HUB_OFFLINE "
            "not set; --dry-run needs none"
        ) from error
    return str(sent.repo_url)


def _check(folder: Path, origin: Path) -> None:
    if not folder.is_dir():
        lost = "has no model: output.model was false, or it was removed"
        why = "is not a folder" if folder == origin else lost
        raise UserError(f"{origin} {why}: expected a finished run with its model, or the folder of a model")
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
            f"{folder} is not sent: {', '.join(other[:5])} {'is' if len(other) == 1 else 'are'} not part of a model. "
            "Expected only weights, configuration, tokenizer and card; move the rest elsewhere"
        )
    if not any(fnmatch.fnmatchcase(name, known) for name in names for known in WEIGHTS):
        raise UserError(f"{folder} is not sent: it has no weights. Expected {WEIGHTS[0]}")


def _check_backbone(folder: Path) -> None:
    """Raise `UserError` if an adapter names its backbone by a path on this machine."""
    if not adapters.is_adapter(folder):
        return
    name = adapters.read(folder).name.removeprefix(NEW)
    if name.startswith((".", "/", "~")) or is_gguf(name) or (name and Path(name).exists()):
        raise UserError(
            f"{folder} is not sent: its backbone {name} is a path on this machine, which others don't have. "
            f"Expected the backbone's id on the hub as `name` in {adapters.ABOUT} and in config.json, "
            "both under `backbone`"
        )


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
