"""Saved models read again, with everything about them checked: `load`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from camex_ft.upcycling import adapters, classes, entry
from camex_ft.upcycling.adapters import restore
from camex_ft.upcycling.fetching import fetch, is_hub_id
from camex_ft.upcycling.layers import expert_layers
from camex_ft.upcycling.making import build
from camex_ft.upcycling.restructuring import plan_of
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import unsafe

# what AutoModel and pipelines pass on of themselves, or what changes nothing about a folder
HARMLESS = (
    *("config", "use_safetensors", "trust_remote_code", "adapter_kwargs", "code_revision"),
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
)


def load(
    path: str | Path, *, backbone: PreTrainedModel | str | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Return the model of a checkpoint folder: upcycled where its config says so, else dense; in evaluation mode.

    Args:
        path: the folder, a whole checkpoint or an adapter; or its id on the hub, NAME/MODEL, where there is no folder
            of that name: it is downloaded into the hub cache. A `Path` is always a folder.
        backbone: of an adapter, the dense model it belongs on or where that is; None: the one it names.
        revision: of an id on the hub: a branch, tag or commit.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit its own config, is of a newer version or not
            safe to read, or an adapter whose backbone is not there or another one; the hub has no such model, or cannot
            be asked.
    """
    folder = Path(path)
    if not str(path):
        raise UserError("there is no folder '': expected that of a model, or an id on the hub, NAME/MODEL")
    if not folder.is_dir() and isinstance(path, str) and is_hub_id(path):
        folder = fetch(path, revision=revision)
    elif not folder.exists():
        raise UserError(
            f"there is no folder {path}: expected that of a model, or an id on the hub, NAME/MODEL"
        )
    why = unsafe(folder) if folder.is_dir() else None
    if why:
        raise UserError(f"{folder}: {why}")
    if adapters.is_adapter(folder):
        return with_adapter(folder, backbone)
    if not (folder / "config.json").is_file():
        near = f": did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json{near}")
    config, kind = _described(folder)
    saved = getattr(config, entry.KEY, None)
    by = f" (it was {entry.written_by(saved)})" if saved is not None else ""
    dense: dict[str, Any] = (
        {} if saved is not None else {"ignore_mismatched_sizes": True}
    )  # they are reported below, by name
    try:
        loaded: Any = kind.from_pretrained(
            folder, config=config, use_safetensors=True, dtype="auto", output_loading_info=True, **dense
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, transformers and the file system each raise their own
        raise UserError(
            f"{folder}: its weights cannot be read: {_first_line(error)}{by}. Expected the files as they were written: "
            "copy the folder again, or take another checkpoint"
        ) from error
    model, info = loaded
    check_weights(folder, wrong_weights(model, info))
    made: PreTrainedModel = model.eval()
    return made


def read_as(
    kind: Any, read: Callable[..., Any], name: Any, args: Sequence[Any], given: dict[str, Any]
) -> Any:
    """Return what `from_pretrained` of a class of upcycled models returns; see `classes.Upcycled`.

    Args:
        kind: the class.
        read: transformers' own `from_pretrained` of it.
        name, args, given: what it was called with.
    """
    adapter = _adapter(name, given)
    if adapter is not None:
        return adapter_as(kind, adapter, given)
    asked, resized = given.pop("output_loading_info", False), given.get("ignore_mismatched_sizes", False)
    settings = {"use_safetensors": True, **given}  # a pickle is never read
    try:
        model, info = read(
            name, *args, **{**settings, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    check_weights(name, wrong_weights(model, info, resized=resized), getattr(model.config, entry.KEY, None))
    return (model, info) if asked else model


classes.Upcycled.reader = staticmethod(read_as)


def wrong_weights(
    model: PreTrainedModel, info: Mapping[str, Any], *, resized: bool = False
) -> dict[str, str]:
    """Return the weights that loading did not find as it should have, by name, each with what is wrong.

    What another head than the saved one has or lacks is right, and so are other sizes where they are `resized`; but
    experts and routers have to be there, whatever is asked for.
    """
    missing, foreign = set(info["missing_keys"]), set(info["unexpected_keys"])
    shaped = {key[0] for key in info["mismatched_keys"]}
    layers = tuple(f"{path}." for path in expert_layers(model))
    saved = _saved_class(model.config)
    if saved is not None and saved is not type(model) and missing | foreign:
        start = f"{model.base_model_prefix}."
        known = {name.removeprefix(start) for name in _names(saved, model.config)}
        missing = {n for n in missing if n.startswith(layers) or n.removeprefix(start) in known}
        foreign = {n for n in foreign if n.removeprefix(start) not in known}
    if resized:
        shaped = {name for name in shaped if name.startswith(layers)}
    return {
        **dict.fromkeys(foreign, "is of another model"),
        **dict.fromkeys(shaped, "has another shape"),
        **dict.fromkeys(missing, "is missing"),
    }


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of upcycled models that a configuration was saved with; None where it does not say one."""
    named = classes.class_named(str((config.architectures or [""])[0]))
    kind = None if named is None else classes.model_class(named)
    return kind if kind is not None and kind.config_class is type(config) else None


def _names(kind: type[PreTrainedModel], config: PreTrainedConfig) -> list[str]:
    """Return the names of the weights of a class's models, without making any."""
    with torch.device("meta"):
        return list(kind(copy.deepcopy(config)).state_dict())


def check_weights(name: Any, wrong: Mapping[str, str], saved: Any = None) -> None:
    """Raise `UserError` where weights are wrong (`wrong_weights`), with what wrote them."""
    if not wrong:
        return
    first = min(wrong)
    by = f" (it was {entry.written_by(saved)})" if saved is not None else ""
    heads = "has another shape" in wrong.values()
    raise UserError(
        f"{name}: the checkpoint is incomplete or of another model: {len(wrong)} weights do not match, such as "
        f"{first}, which {wrong[first]}{by}. Expected weights and config.json of one model: copy the folder again"
        + (
            ". Where other sizes are meant, as of a new head: from_pretrained(..., ignore_mismatched_sizes=True)"
            if heads
            else ""
        )
    )


def _adapter(name: Any, given: Mapping[str, Any]) -> Path | None:
    """Return the folder of an adapter, fetched from the hub where it is there, or None where it is none."""
    if name is None or Path(str(name)).is_dir():
        return Path(str(name)) if name is not None and adapters.is_adapter(Path(str(name))) else None
    kept = getattr(given.get("config"), entry.KEY, None) or {}
    if adapters.BACKBONE not in kept or not is_hub_id(str(name)):
        return None
    options = {key: given[key] for key in ("revision", "token", "cache_dir") if given.get(key) is not None}
    folder = fetch(str(name), **options)
    return folder if adapters.is_adapter(folder) else None


def _described(folder: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Return the configuration in a folder and the class of its model."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here; each one is about the file's content
        raise UserError(f"{folder}: its config.json is not usable: {_first_line(error)}") from error
    named = config.architectures or ["none"]
    kind = classes.class_named(str(named[0]))
    if kind is None:
        raise UserError(
            f"{folder}: its config.json is not usable: transformers has no model {named[0]!r:.80}"
        )
    if getattr(config, entry.KEY, None) is not None:
        kind = classes.model_class(kind)
        config.__class__ = classes.config_class(type(config))  # saved before upcycled models had classes
    return config, kind


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def with_adapter(folder: Path, backbone: PreTrainedModel | str | None) -> PreTrainedModel:
    """Return an adapter's model: its backbone made again, restructured, with what was trained put in."""
    about = adapters.read(folder)
    model = copy.deepcopy(backbone) if isinstance(backbone, PreTrainedModel) else about.dense(backbone)
    build(_with_dtype(model, about.dtype), plan_of(about.plan), seed=about.seed)
    about.check(model)
    restore(model, folder)
    return model.eval()


def adapter_as(kind: type, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """Return an adapter's model for `from_pretrained` of its class.

    Raises:
        UserError: the arguments ask for what only a whole checkpoint can be, or the model is of another class.
    """
    why = unsafe(folder)
    if why:
        raise UserError(f"{folder}: {why}")
    given = {
        name: value for name, value in arguments.items() if value is not None and not name.startswith("_")
    }
    asked = [n for n, value in given.items() if n not in HARMLESS and (n, value) != ("dtype", "auto")]
    if asked:
        raise UserError(
            f"{folder} is an adapter, and {asked[0]} is for whole checkpoints: expected camex_ft.load(folder), then "
            "what is to be changed of the model"
        )
    model = with_adapter(folder, None)
    if type(model) is not kind:
        raise UserError(
            f"{folder} is an adapter of a {type(model).__name__}, not of a {kind.__name__}: expected that class, or "
            "camex_ft.load(folder)"
        )
    return model


def _with_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    made: PreTrainedModel = model if model.dtype == dtype else model.to(dtype)
    return made
