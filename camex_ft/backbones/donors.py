"""Donors: dense checkpoints that were fine-tuned from one start, loaded as models of its shape and compared with it.

    load_donor(spec, start, ...)   -> model in float32, in evaluation mode
    check_same_shapes, Likeness    -> refuse a donor of another architecture, vocabulary or start
    donor_digest(spec)             -> SHA-256 of its files

A donor is a backbone's name (`camex_ft.config.backbones`), the folder of a finished run, whose model is taken, or
``adapter:PATH``, a LoRA adapter of PEFT that belongs on the start; PATH is a folder or an id on the hub.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.backbones import content, source
from camex_ft.backbones.loading import load
from camex_ft.config import UpcycleConfig
from camex_ft.config.schema import BASES, CHECKPOINTS
from camex_ft.utils import hub
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import ADAPTER as ADAPTER_CONFIG
from camex_ft.utils.folders import unsafe

ADAPTER = "adapter:"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of a finished run: its record, its model, and the file of an adapter with experts in it.
RECORD, MODEL, LOW_RANK = "record.json", "model", "adapter.json"
SAME_START = 0.5  # cosine between the matrices of donor and start; fine-tuned models have 0.9 and more
SHOWN = 3
# Entries of a configuration that change the function of a model and no shape.
FUNCTION = (
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "activation_function",
    "tie_word_embeddings",
)

Shapes = Mapping[str, tuple[int, ...]]


# -- where it is ------------------------------------------------------------------------------------------------------


def backbone_of(spec: str) -> str:
    """Return the name of the backbone that `spec` means: of a finished run the folder of its model, else `spec`.

    Raises:
        UserError: the run has no model, or one with experts of low rank.
    """
    folder = Path(os.path.expanduser(spec))
    if spec.startswith(ADAPTER) or not os.path.isfile(folder / RECORD):
        return spec
    model = folder / MODEL
    if not os.path.isdir(model):
        raise UserError(
            f"{spec} is a run without a model: output.model was false, or it was removed. `camex-ft run "
            f"{spec}/config.yaml output.model=true --force` runs it again and saves the model"
        )
    if os.path.isfile(model / LOW_RANK):
        raise UserError(
            f"{spec}: its model is an adapter with experts of low rank: expected a dense model, such as "
            f"`camex-ft export {spec} DIR --as dense` writes"
        )
    return str(model)


def check_donor(spec: str) -> None:
    """Check the files of a donor without reading weights; a hub id is downloaded.

    Raises:
        UserError: it is not there, broken, or no dense model and no adapter of PEFT.
    """
    if spec.startswith(ADAPTER):
        adapter_folder(spec)
    elif source.check(backbone_of(spec)) == "hub":
        source.check_files(source.locate(spec), spec)


def adapter_folder(spec: str) -> Path:
    """Return the folder that ``adapter:PATH`` means, downloaded if it is an id on the hub.

    Raises:
        UserError: there is none, or it holds no LoRA adapter of PEFT in safetensors that is safe to read.
    """
    name = spec.removeprefix(ADAPTER)
    folder = Path(os.path.expanduser(name))
    if not name.strip():
        raise UserError(f"'{spec}': expected adapter:PATH, the folder of a LoRA adapter or an id on the hub")
    if not os.path.isdir(folder):
        if name.startswith((".", "/", "~")) or not hub.is_id(name):
            raise UserError(
                f"{spec}: there is no folder '{name}'; expected that of a LoRA adapter, or an id on the hub"
            )
        try:
            folder = hub.fetch_model(name, allow=[ADAPTER_CONFIG, ADAPTER_WEIGHTS], ignore=["*/*"])
        except hub.NotFetched as error:
            reason = (
                error.refused or f"'{name}' is not in the hub cache and cannot be fetched: {error.reason}"
            )
            raise UserError(f"{spec}: {reason}") from error
    if wrong := unsafe(folder, adapter=True):
        raise UserError(f"{spec}: {wrong}")
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not os.path.isfile(folder / file)]
    if missing:
        raise UserError(
            f"{spec}: the folder has no {missing[0]}: expected a LoRA adapter that PEFT has saved"
        )
    return folder


def donor_digest(spec: str) -> str | None:
    """Return the SHA-256 (hex) of a donor's files; None for an embedded backbone.

    Raises:
        UserError: it is not there, or its files are at fault.
    """
    if not spec.startswith(ADAPTER):
        return content.read(backbone_of(spec)).sha256
    folder = adapter_folder(spec)
    return content.digest_files([folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS])


def checkpoints_of(upcycle: UpcycleConfig) -> tuple[str, ...]:
    """Return the checkpoints that an upcycling reads beside the backbone: its donors and, where it is one, its base."""
    if upcycle.init != CHECKPOINTS:
        return ()
    return (*upcycle.donors, *(() if upcycle.base in BASES else (upcycle.base,)))


def content_of(backbone: str, donors: Sequence[str] = ()) -> content.Content:
    """Return the content of a backbone, with that of the donors of its experts in the digest.

    Raises:
        UserError: the backbone or a donor is not there, or its files are at fault.
    """
    start = content.read(backbone)
    if not donors:
        return start
    digests = [start.sha256 or backbone, *(donor_digest(donor) or donor for donor in donors)]
    return content.Content(start.path, hashlib.sha256(json.dumps(digests).encode()).hexdigest())


def local_content_of(backbone: str, donors: Sequence[str] = ()) -> str | None:
    """Return the digest of `content_of` if all is on this machine's disk and in order; else None."""
    try:
        specs = (backbone, *map(backbone_of, donors))
        if any(not spec.startswith(ADAPTER) and source.kind(spec) == "hub" for spec in specs):
            return None
        return content_of(backbone, donors).sha256
    except UserError:
        return None


# -- loading ----------------------------------------------------------------------------------------------------------


def load_donor(
    spec: str,
    start: PreTrainedModel,
    *,
    head: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    **labels: Any,
) -> PreTrainedModel:
    """Return a donor under `head`, in float32 on the CPU, in evaluation mode; of the same shapes as `start`.

    Args:
        spec: a backbone's name, the folder of a finished run, or ``adapter:PATH``.
        start: model that the donor was fine-tuned from, under the same head; adapters are merged into a copy of it.
        head: a key of `heads.HEADS`.
        tokenizer: of `start`: the donor's has to have the same vocabulary. None: not compared.
        seed: of weights that the donor's checkpoint lacks (a new head).
        labels: label_names, num_labels and regression, as of `loading.load`.

    Raises:
        UserError: the donor is not there, or its architecture, vocabulary or start is another one.
    """
    if spec.startswith(ADAPTER):
        donor = with_adapter(copy.deepcopy(start).float(), spec)
    else:
        donor, own = load(backbone_of(spec), head=head, seed=seed, **labels)
        if tokenizer is not None:
            check_same_vocabulary(tokenizer, own, spec=spec)
    check_same_config(start.config, donor.config, spec=spec)
    check_same_shapes(shapes_of(start), shapes_of(donor), spec=spec)
    check_same_start(start, donor, spec=spec)
    return donor.eval()


def with_adapter(model: PreTrainedModel, spec: str) -> PreTrainedModel:
    """Return `model`, changed in place, with the adapter ``adapter:PATH`` merged into its weights.

    Raises:
        UserError: it is no LoRA adapter, or one of another model.
    """
    folder = adapter_folder(spec)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise UserError(f"{spec}: it is no LoRA adapter but one of the type {config.peft_type}")
        config.inference_mode = True
        adapted = PeftModel(model, config)
        result: Any = set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # PEFT and safetensors raise many types, all about the files
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"{spec}: the adapter does not fit the start: {said}") from error
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        lost = [*result.unexpected_keys, *missing]
        raise UserError(
            f"{spec}: the adapter does not fit the start: {len(lost)} tensors have no place, such as "
            f"{', '.join(lost[:SHOWN])}"
        )
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    merged.__dict__.pop("peft_config", None)
    return merged.eval()


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its name; of tied ones under the first name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# -- comparing --------------------------------------------------------------------------------------------------------


def check_same_config(start: PreTrainedConfig, donor: PreTrainedConfig, *, spec: str) -> None:
    """Raise `UserError` for a donor of another type of model, or with settings that change its function."""
    for key in ("model_type", *FUNCTION):
        here, there = getattr(start, key, None), getattr(donor, key, None)
        if here != there:
            raise UserError(
                f"{spec}: its {key} is {there}, that of the start is {here}: expected a donor of the start"
            )


def check_same_shapes(start: Shapes, donor: Shapes, *, spec: str) -> None:
    """Raise `UserError` unless both have tensors of the same names and shapes."""
    differ = [
        f"{name} is {list(donor[name])} instead of {list(shape)}"
        for name, shape in start.items()
        if name in donor and donor[name] != shape
    ]
    differ += [f"{name} is missing" for name in start if name not in donor]
    differ += [f"{name} is not in the start" for name in donor if name not in start]
    if differ:
        raise UserError(
            f"{spec}: {len(differ)} of its tensors are not those of the start ({'; '.join(differ[:SHOWN])}): expected "
            "a donor of the same architecture, vocabulary and labels"
        )


def check_same_vocabulary(
    start: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase, *, spec: str
) -> None:
    """Raise `UserError` unless both tokenizers have the same tokens under the same ids."""
    here, there = start.get_vocab(), donor.get_vocab()
    if here == there:
        return
    differ = sorted(
        (t for t in {*here, *there} if here.get(t) != there.get(t)), key=lambda t: here.get(t, math.inf)
    )
    examples = ", ".join(f"{t!r} ({here.get(t, 'none')}, {there.get(t, 'none')})" for t in differ[:SHOWN])
    raise UserError(
        f"{spec}: its tokenizer differs from that of the start in {len(differ):,} tokens of {len(here):,} (token, id "
        f"in the start, id in the donor: {examples}): expected a donor with the same vocabulary"
    )


@dataclass
class Likeness:
    """Cosine between all matrices of a donor and those of a start, tensor by tensor."""

    product: float = 0.0
    start: float = 0.0
    donor: float = 0.0

    def add(self, start: Tensor, donor: Tensor) -> None:
        """Take in one tensor of both; vectors, such as those of norms, say nothing about the start."""
        if start.dim() < 2 or not start.is_floating_point():
            return
        here, there = start.float().flatten(), donor.float().flatten()
        self.product += float(here @ there)
        self.start += float(here @ here)
        self.donor += float(there @ there)

    @property
    def cosine(self) -> float:
        """The cosine; 1 where there is nothing to compare."""
        norm = math.sqrt(self.start * self.donor)
        return self.product / norm if norm else 1.0

    def check(self, spec: str) -> None:
        """Raise `UserError` for a cosine below `SAME_START`."""
        if not self.cosine >= SAME_START:
            raise UserError(
                f"{spec}: the cosine between its matrices and those of the start is {self.cosine:.3f}: expected at "
                f"least {SAME_START}, as of a model that was fine-tuned from this start"
            )


@torch.no_grad()
def check_same_start(
    start: PreTrainedModel, donor: PreTrainedModel, *, spec: str, names: Iterable[str] | None = None
) -> None:
    """Raise `UserError` for a donor whose matrices are almost orthogonal to those of the start.

    Args:
        start, donor: models with parameters of the same names.
        spec: name of the donor, for the message.
        names: of the parameters to compare; None: all. Leave out those that the start lacks (a new head).
    """
    here, there = dict(start.named_parameters()), dict(donor.named_parameters())
    likeness = Likeness()
    for name in here if names is None else names:
        likeness.add(here[name], there[name])
    likeness.check(spec)
