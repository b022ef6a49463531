"""From the words after `backbone:` to a checked folder of weights.

    embedded/<family>     made by the project itself (no folder)
    package:NAME/PATH     a folder inside an installed package, which is found and not imported
    ./folder              a folder with config.json, safetensors weights and a tokenizer
    org/name              a model id of the Hugging Face hub, from its cache or downloaded

Everything that can be wrong with it is said as a `UserError` before a model is built.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from camex_ft import registry
from camex_ft.errors import UserError, nearest

Kind = Literal["embedded", "package", "folder", "hub"]
EMBEDDED, PACKAGE = "embedded/", "package:"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMS = "a hub id, a local folder, package:NAME/PATH or embedded/<family>"
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = [
    "*/*",
    "model.*.safetensors",
    "consolidated*",
]  # other precisions and formats of the same weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def kind(spec: str) -> Kind:
    """Return which of the four forms `spec` has.

    Raises:
        UserError: it has none, or it looks like the path of a folder that does not exist.
    """
    if spec.startswith(EMBEDDED):
        return "embedded"
    if spec.startswith(PACKAGE):
        return "package"
    path = Path(spec).expanduser()
    if path.is_dir() and spec.strip():
        return "folder"
    if path.is_file():
        raise UserError(f"backbone: '{spec}' is a file; expected the folder that holds it, or {FORMS}")
    if spec.startswith((".", "/", "~")) or spec.endswith("/") or "\\" in spec or spec.count("/") > 1:
        raise UserError(f"backbone: there is no folder '{spec}'; expected {FORMS}")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(spec)
    except HFValidationError as error:
        raise UserError(f"backbone: '{spec}' is neither a folder nor a hub id; expected {FORMS}") from error
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
        check_folder(locate(spec), spec)
    return form


def locate(spec: str) -> Path:
    """Return the folder of `spec`, downloaded if it is a hub id that is not in the cache; not for embedded backbones.

    Raises:
        UserError: there is no such package, folder or model, or no network to fetch it.
    """
    form = kind(spec)
    if form == "package":
        return _in_package(spec)
    if form == "hub":
        return _from_hub(spec)
    return Path(spec).expanduser()


def check_folder(folder: Path, spec: str) -> dict[str, Any]:
    """Check that `folder` holds a configuration and complete safetensors weights; return the configuration.

    Raises:
        UserError: config.json is missing or broken, weights are missing, truncated or stored as pickle only.
    """
    config = _read_json(folder / "config.json", spec)
    if config.get("quantization_config"):
        raise UserError(
            f"backbone {spec}: its weights are quantised; fine-tuning needs the original checkpoint"
        )
    if (folder / WEIGHTS).is_file():  # as in transformers, before the index
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = sorted(set(_read_json(folder / INDEX, spec).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise UserError(
                f"backbone {spec}: the checkpoint is incomplete: of the {len(shards)} files that {INDEX} names, "
                f"{len(missing)} are missing ({', '.join(missing[:3])}). Copy or download it again"
            )
    else:
        raise UserError(_no_weights(folder, spec))
    for shard in shards:
        _check_header(folder / shard, spec)
    return config


def _in_package(spec: str) -> Path:
    name, _, inside = spec.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(
            f"backbone: '{spec}': expected package:NAME/PATH, NAME a top-level package as in `import NAME`"
        )
    found = importlib.util.find_spec(name)  # finds a top-level package without running any of its code
    if found is None:
        hint = name.replace("_", "-")
        raise UserError(f"backbone: '{spec}': package {name} is not installed here (try: pip install {hint})")
    roots = [Path(root).resolve() for root in found.submodule_search_locations or []]
    path = PurePosixPath(inside)
    if ".." in path.parts or path.is_absolute() or "\\" in inside:
        raise UserError(
            f"backbone: '{spec}': the path must stay inside the package ('..' and absolute paths are refused)"
        )
    for root in roots:
        folder = (root / path).resolve()
        if (folder / "config.json").is_file() and folder.is_relative_to(root):
            return folder
    weights = [(root, file) for root in roots for file in root.rglob("*.safetensors")]
    models = sorted({file.parent.relative_to(root).as_posix() for root, file in weights})
    known = f" Folders with weights in it: {', '.join(models[:8])}." if models else ""
    raise UserError(
        f"backbone: '{spec}': package {name} has no config.json in '{inside}'.{nearest(inside, models)}{known}"
    )


def _from_hub(spec: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(spec, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED))
    except errors.GatedRepoError as error:
        raise UserError(
            f"backbone: '{spec}' is gated: ask for access at https://huggingface.co/{spec}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"backbone: the hub has no model '{spec}' (or it is private: log in with `hf auth login`), "
            f"and there is no folder of that name; expected {FORMS}"
        ) from error
    except (
        errors.HfHubHTTPError,
        OSError,
    ) as error:  # every network failure is one of these, LocalEntryNotFound too
        raise UserError(
            f"backbone: '{spec}' is not in the hub cache and the hub cannot be reached ({_first_line(error)}). "
            f"Three ways to go on: fill the cache where there is network (`hf download {spec}`; HF_HOME says where "
            "it lies) and bring it here; copy the model to a folder and write `backbone: ./that-folder`; "
            "or use a backbone that the project makes itself, such as embedded/t5"
        ) from error


def _read_json(path: Path, spec: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"backbone {spec}: the folder has no {path.name}, so it is not a transformers checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"backbone {spec}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"backbone {spec}: {path.name} holds no JSON object")
    return content


def _no_weights(folder: Path, spec: str) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if not pickles:
        return f"backbone {spec}: the folder has no weights: neither {WEIGHTS} nor {INDEX}"
    return (
        f"backbone {spec}: its weights are stored only as {', '.join(pickles[:3])}, a format that can run code when "
        f"loaded and is refused; expected {WEIGHTS}. If you trust it, convert it once: load it with transformers "
        "elsewhere and call save_pretrained"
    )


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
