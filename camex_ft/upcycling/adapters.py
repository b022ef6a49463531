"""Adapters: the trained parameters of a model with low-rank experts, saved without the backbone.

    adapter.safetensors   the trained parameters and the buffers that change, under their names in the model
    adapter.json          the backbone: where it is, and a SHA-256 of all that stays frozen; the plan; versions
    config.json           of the model, as transformers writes it

`upcycling.load` makes the backbone again, restructures it as the plan says, compares the SHA-256, and puts the trained
parameters in, which gives the same logits bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from camex_ft.backbones.heads import HEADS, head_of, labels_of
from camex_ft.backbones.loading import load as load_backbone
from camex_ft.backbones.source import NEEDED, NOT_NEEDED
from camex_ft.config.backbones import EMBEDDED
from camex_ft.upcycling.plan import DONORS, FORMAT, KEY, check_format, plain_config, versions
from camex_ft.utils import hub
from camex_ft.utils.durable import by_umask
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import read_json

BACKBONE = "backbone"  # in the entry of a model's config
WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
NOT_PLAN = (BACKBONE, DONORS, "format", "versions")


@dataclass(frozen=True, kw_only=True)
class About:
    """Description of an adapter, from its own files.

    Attributes:
        folder: of the adapter.
        plan: the sections of the configuration, as mappings.
        name: of the backbone, as in a configuration; "" if it has none.
        head: a key of `backbones.heads.HEADS`.
        seed: of new weights.
        dtype: of the frozen weights.
        sha256: of the frozen weights, their names and shapes; "" for a model on the meta device.
    """

    folder: Path
    plan: Mapping[str, Any]
    name: str
    head: str
    seed: int
    dtype: torch.dtype
    sha256: str

    def dense(self, name: str | None) -> PreTrainedModel:
        """Return the backbone, under the head and with the labels of the adapter's model.

        Raises:
            UserError: the backbone is missing.
        """
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # of many types, all about the file's content
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"{self.folder}: its config.json is not usable: {said}") from error
        spec = name or self.name
        if not spec:
            raise UserError(
                f"{self.folder} is an adapter and does not say which backbone it belongs to: call "
                "load(folder, backbone=...) with the dense model or its folder"
            )
        try:
            model = (
                _embedded(config, self.head, self.seed)
                if spec.startswith(EMBEDDED)
                else self._read(spec, config)
            )
        except UserError as error:
            raise UserError(
                f"{self.folder} is an adapter, and its backbone {spec} cannot be made: {error}\nIf it lies elsewhere: "
                "load(folder, backbone=...) with the dense model or its folder"
            ) from error
        model.config.problem_type = getattr(config, "problem_type", None)
        model.name_or_path = model.config.name_or_path = spec
        return model

    def _read(self, spec: str, config: Any) -> PreTrainedModel:
        return load_backbone(spec, head=self.head, seed=self.seed, **labels_of(config, self.head))[0]

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UserError` unless the model's frozen weights are those that the adapter was trained on."""
        sha256 = fingerprint(model)
        if self.sha256 and sha256 != self.sha256:
            raise UserError(
                f"{self.folder} is an adapter of another backbone than {model.name_or_path or 'the one given'}: its "
                f"frozen weights have the SHA-256 {self.sha256[:12]}..., these {sha256[:12]}...: expected the weights "
                "that it was trained on (of a backbone with new weights, also the same seed and version of torch)"
            )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / ABOUT).is_file()


def locate(name: Any, arguments: Mapping[str, Any]) -> Path | None:
    """Return the folder of an adapter, fetched from the hub if necessary, or None if `name` is no adapter.

    Args:
        name: a folder or an id on the hub, as `from_pretrained` takes it; None: weights are given otherwise.
        arguments: of `from_pretrained`.
    """
    if name is None or Path(str(name)).is_dir():
        return Path(str(name)) if name is not None and is_adapter(Path(str(name))) else None
    entry = getattr(arguments.get("config"), KEY, None) or {}
    if BACKBONE not in entry or not is_hub_id(str(name)):
        return None
    options = {key: arguments.get(key) for key in ("revision", "token", "cache_dir")}
    folder = fetch(str(name), **{key: value for key, value in options.items() if value is not None})
    return folder if is_adapter(folder) else None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form NAME/MODEL of the hub."""
    return hub.is_id(name) and name.count("/") == 1


def fetch(name: str, **options: Any) -> Path:
    """Return the folder of an upcycled model in the hub cache, downloaded where the hub has another or more of it.

    Args:
        name: its id.
        options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir.

    Raises:
        UserError: the hub has no such model, or refuses, or cannot be asked and it is not in the cache.
    """
    try:
        return hub.fetch_model(name, allow=NEEDED, ignore=NOT_NEEDED, **options)
    except hub.NotFetched as error:
        why = error.refused or f"it is not in the hub cache and cannot be fetched: {error.reason}"
        raise UserError(f"there is no folder '{name}', and as an id on the hub: {why}") from error


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model is saved as an adapter: it was upcycled with ``tuning.mode: lora``."""
    entry = getattr(getattr(model, "config", None), KEY, None) or {}
    return BACKBONE in entry


def source_of(model: PreTrainedModel, *, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return an adapter's entry for the backbone that `model` was made from: all frozen weights belong to it."""
    return {
        "name": model.name_or_path or "",
        "head": head_of(model),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the frozen parameters with their names, shapes and dtypes; "" on the meta device."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            return ""
        if not parameter.requires_grad:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
            raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the saved buffers by name, detached."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {**trained, **buffers}


def save(model: PreTrainedModel, folder: str | Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model to a folder that `upcycling.load` reads: an adapter for low-rank experts, else the whole model.

    Args:
        model: with or without experts.
        folder: created if missing.
        state: the model's gathered state, if an engine has sharded its parameters; None: the parameters themselves.
    """
    if not has_adapter(model):
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = trained_state(model)
    tensors = {name: (names if state is None else state)[name] for name in names}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        target / WEIGHTS,
        metadata={"format": "pt"},
    )
    by_umask(target, [target / WEIGHTS])
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # as torch names a sharded one
    model.config.save_pretrained(target)
    if model.can_generate() and isinstance(model.generation_config, GenerationConfig):
        model.generation_config.save_pretrained(target)
    entry = getattr(model.config, KEY)
    about = {
        "format": FORMAT,
        "backbone": entry[BACKBONE],
        "plan": {name: section for name, section in entry.items() if name not in NOT_PLAN},
        "versions": versions(),
    }
    (target / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> About:
    """Read the description of an adapter; `UserError` if it cannot be read."""
    try:
        said = read_json(folder / ABOUT)
        check_format(said, what=f"{folder}: its {ABOUT}")
        backbone = said["backbone"]
        dtype = getattr(torch, backbone["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{backbone['dtype']!r:.40} is no number format")
        rest = {key: backbone[key] for key in ("name", "head", "seed", "sha256")}
        return About(folder=folder, plan=dict(said["plan"]), dtype=dtype, **rest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its {ABOUT} is not usable: {type(error).__name__}: {error}") from error


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the trained parameters of an adapter into a model of the same plan, in place.

    Raises:
        UserError: the folder's weights cannot be read, or are of another model.
    """
    path = Path(folder)
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: its {WEIGHTS} cannot be read: {str(error).splitlines()[0]}") from error
    due = trained_state(model)
    shapes = {name: tensor.shape for name, tensor in due.items()}
    saved = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
    if wrong:
        raise UserError(
            f"{path}: the adapter is incomplete or of another model: {len(wrong)} weights do not match, such as "
            f"{wrong[0]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            due[name].copy_(tensor)  # the parameters' own memory


def _embedded(config: Any, head: str, seed: int) -> PreTrainedModel:
    """Rebuild a tiny backbone: its weights follow from the configuration and the seed."""
    plain = plain_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PreTrainedModel, HEADS[head].from_config(plain).eval())
