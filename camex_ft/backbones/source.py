"""The files of a backbone, located and checked: a folder with weights, or a GGUF file.

The forms of its name are in `camex_ft.config.backbones`. Every fault is a `UserError` before a model is built.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from camex_ft.config import Config, gguf
from camex_ft.config.backbones import EMBEDDED, NEW, PACKAGE, bare, in_package, is_gguf, near_file
from camex_ft.utils import folders, hub, registry
from camex_ft.utils.errors import UserError

T = TypeVar("T")
Kind = Literal["embedded", "package", "folder", "file", "hub"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMS = "a hub id, a local folder, a .gguf file, package:NAME/PATH or embedded/<family>"
SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # a configuration and a tokenizer
NEEDED = [*SMALL, "*.safetensors"]
NOT_NEEDED = [
    "*/*",
    "model.*.safetensors",
    "consolidated*",
]  # other precisions and formats of the same weights


class OutOfReach(UserError):
    """A model of the hub is neither in the cache nor to be fetched."""


def kind(spec: str) -> Kind:
    """Return which of the five forms `spec` has, without a leading ``new:``.

    Raises:
        UserError: it has none of them, or looks like the path of a folder or file that does not exist.
    """
    spec = _named(bare, spec)
    if spec.startswith(EMBEDDED):
        return "embedded"
    if spec.startswith(PACKAGE):
        return "package"
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path) and spec.strip():  # not Path's own: it raises for a name that is too long
        return "folder"
    if os.path.isfile(path) and is_gguf(path):
        return "file"
    if os.path.isfile(path):
        raise UserError(f"backbone: '{spec}' is a file; expected the folder that holds it, or {FORMS}")
    if is_gguf(path):
        raise UserError(f"backbone: there is no file '{spec}'.{near_file(path)} Expected {FORMS}")
    if spec.startswith((".", "/", "~")) or spec.endswith("/") or "\\" in spec or spec.count("/") > 1:
        raise UserError(f"backbone: there is no folder '{spec}'; expected {FORMS}")
    if not hub.is_id(spec):
        raise UserError(f"backbone: '{spec}' is neither a folder nor a hub id; expected {FORMS}")
    return "hub"


def check(spec: str) -> Kind:
    """Check as much of `spec` as needs neither network nor model, and return its form.

    Raises:
        UserError: what is wrong with it, and what to do.
    """
    form = kind(spec)
    if form == "embedded":
        registry.EMBEDDED.get(spec.removeprefix(EMBEDDED))
    elif form != "hub":
        check_files(locate(spec), spec)
    return form


def trains_tokenizer(settled: Config, *, plain_text: bool) -> bool:
    """Return whether an embedded backbone meets text that its words do not make up: its tokenizer is trained on it.

    Args:
        settled: the resolved configuration.
        plain_text: of the task.
    """
    return plain_text and settled.data.source != "embedded" and settled.backbone.startswith(EMBEDDED)


def locate(spec: str, *, weights: bool = True) -> Path:
    """Return the folder or GGUF file of `spec`, absolute; not for embedded backbones.

    A hub id that is not in the cache is downloaded; for ``new:``, and without `weights`, its small files only.

    Raises:
        UserError: there is no such package, folder or model, or no network to fetch it.
    """
    form, name = kind(spec), bare(spec)
    if form == "package":
        return _named(in_package, name)
    if form == "hub":
        return _from_hub(name, NEEDED if weights and not spec.startswith(NEW) else SMALL)
    return Path(os.path.expanduser(name)).absolute()


def check_files(path: Path, spec: str, *, weights: bool = True) -> dict[str, Any] | gguf.Header:
    """Check the folder or GGUF file `path` of `spec`, without reading weights; return its configuration or header.

    Raises:
        UserError: it is not there, broken, truncated, or of a kind that is not read; see `check_folder`.
    """
    if not path.is_file():
        return check_folder(path, spec, weights=weights)
    try:
        return gguf.check(path)
    except UserError as error:
        raise UserError(f"backbone {spec}: {error}") from error


def check_folder(folder: Path, spec: str, *, weights: bool = True) -> dict[str, Any]:
    """Check that `folder` holds a configuration and complete safetensors weights; return the configuration.

    Of a ``new:`` backbone, and without `weights`, they are not asked for.

    Raises:
        UserError: the folder is not safe to read (`utils.folders.unsafe`), config.json is missing or broken, weights
            are missing, truncated or stored as pickle only, or the model has experts already.
    """
    weights = weights and not spec.startswith(NEW)
    if wrong := folders.unsafe(folder, weights=weights, linked=kind(spec) == "package"):
        raise UserError(f"backbone {spec}: {wrong}")
    config = _read_json(folder / "config.json", spec)
    if config.get("camex"):
        raise UserError(
            f"backbone {spec}: the model in it has experts already; expected the dense backbone that it came from, "
            "or a dense model of it: `camex-ft export RUN DIR --as dense`"
        )
    if spec.startswith(NEW):
        return config
    if config.get("quantization_config"):
        raise UserError(
            f"backbone {spec}: its weights are quantised; fine-tuning needs the original checkpoint"
        )
    if not weights:
        return config
    shards = weight_files(folder)
    if not shards:
        raise UserError(
            f"backbone {spec}: the folder has no weights: neither {WEIGHTS} nor {INDEX} with names of files"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"backbone {spec}: the checkpoint is incomplete: of the {len(shards)} files that {INDEX} names, "
            f"{len(missing)} are missing ({', '.join(missing[:3])}). Copy or download it again"
        )
    for shard in shards:
        _check_header(folder / shard, spec)
    return config


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that weights are loaded from, as in transformers; none where there are none.

    They need not be there: an index may name files that are missing.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    return sorted(set(folders.read_json(folder / INDEX)["weight_map"].values()))


def _named(find: Callable[[str], T], spec: str) -> T:
    """Call `find` on `spec`; its messages get the name of the key."""
    try:
        return find(spec)
    except UserError as error:
        raise UserError(f"backbone: {error}") from error


def _from_hub(spec: str, files: list[str]) -> Path:
    """Return the folder of a model in the hub cache, after a download where the hub has another or more of it."""
    try:
        return hub.fetch_model(spec, allow=files, ignore=NOT_NEEDED)
    except hub.NotFetched as error:
        if error.refused:
            message = f"{error.refused}. There is no folder of that name either; expected {FORMS}"
        else:
            message = (
                f"'{spec}' is not (or not whole) in the hub cache and cannot be fetched: {error.reason}. "
                "If the hub was there for a moment, the same command goes on with the download. "
                "Three ways to go on without it: fill the cache where there is network "
                f"(`hf download {spec}`; HF_HOME says where it lies) and bring it here; copy the model to a folder and "
                "write `backbone: ./that-folder`; or use a backbone that the project makes itself, such as embedded/t5"
            )
        raise OutOfReach(f"backbone: {message}") from error


def _read_json(path: Path, spec: str) -> dict[str, Any]:
    if not path.is_file():
        files = sorted(f.name for f in path.parent.glob("*") if is_gguf(f))
        hint = f". To use the GGUF file in it, write backbone: {bare(spec)}/{files[0]}" if files else ""
        raise UserError(
            f"backbone {spec}: the folder has no {path.name}, so it is not a transformers checkpoint{hint}"
        )
    try:
        content = folders.read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"backbone {spec}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"backbone {spec}: {path.name} holds no JSON object")
    return content


def _check_header(path: Path, spec: str) -> None:
    """Opening a safetensors file reads its header and compares the sizes it promises with the file's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"backbone {spec}: {path.name} is corrupt or truncated ({error}). Copy or download it again"
        ) from error
