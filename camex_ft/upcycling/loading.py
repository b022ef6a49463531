"""Saved models read again, with everything about them checked: `load`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from camex_ft.errors import UserError
from camex_ft.folders import unsafe
from camex_ft.upcycling import adapters, classes, entry
from camex_ft.upcycling.adapters import restore
from camex_ft.upcycling.making import build
from camex_ft.upcycling.restructuring import plan_of

# what AutoModel and pipelines pass on of themselves, or what changes nothing about a folder
HARMLESS = (
    *("config", "use_safetensors", "trust_remote_code", "adapter_kwargs", "code_revision"),
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
)


def load(path: str | Path, *, backbone: PreTrainedModel | str | None = None) -> PreTrainedModel:
    """Return the model of a checkpoint folder: upcycled where its config says so, else dense; in evaluation mode.

    Args:
        path: the folder, a whole checkpoint or an adapter.
        backbone: of an adapter, the dense model it belongs on or where that is; None: the one it names.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit its own config, is of a newer version or not
            safe to read, or an adapter whose backbone is not there or another one.
    """
    folder = Path(path)
    why = unsafe(folder) if folder.is_dir() else None
    if why:
        raise UserError(f"{folder}: {why}")
    if adapters.is_adapter(folder):
        return with_adapter(folder, backbone)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json")
    config, kind = _described(folder)
    saved = getattr(config, entry.KEY, None)
    by = f" (it was {entry.written_by(saved)})" if saved is not None else ""
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:  # safetensors, transformers and the file system each raise their own
        raise UserError(
            f"{folder}: its weights cannot be read: {_first_line(error)}{by}. Expected the files as they were written: "
            "copy the folder again, or take another checkpoint"
        ) from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(k[0] for k in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{folder}: the checkpoint is incomplete or of another model: {len(wrong)} weights do not match, such as "
            f"{sorted(wrong)[0]}{by}. Expected weights and config.json of one model: copy the folder again"
        )
    made: PreTrainedModel = model.eval()
    return made


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
