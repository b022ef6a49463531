"""Start and donors of a merge: found, compared, and their tensors made readable one by one.

A folder with safetensors under the model's own names is read where it is. Anything else (a GGUF file, an embedded
backbone, an adapter, a folder without the head) is loaded, written to a scratch folder tensor by tensor, and freed
before the next one is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.backbones import loading, source
from camex_ft.backbones.donors import (
    ADAPTER,
    Likeness,
    backbone_of,
    check_donor,
    check_same_config,
    check_same_shapes,
    check_same_vocabulary,
    donor_digest,
    with_adapter,
)
from camex_ft.backbones.heads import CLASSIFIERS, HEADS, has_head
from camex_ft.config import gguf, load_config
from camex_ft.config.backbones import EMBEDDED, NEW
from camex_ft.results import RunFolder
from camex_ft.static.merge_spec import MergeSpec
from camex_ft.static.tensor_files import FolderReader, ModelReader, TensorInfo, TensorReader, write_tensors
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import EMBEDDED as EMBEDDED_FAMILIES

BLOCK = 1 << 20  # entries of a large tensor that are merged at a time
Models = Mapping[str, PreTrainedModel]


# -- found and compared, without weights ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A start or a donor.

    Attributes:
        name: as in the specification.
        spec: of the backbone that it means: of a run the folder of its model, else the name.
        path: folder or GGUF file; None for an embedded backbone, an adapter and a model in memory.
        model: in memory; None for any other.
    """

    name: str
    spec: str
    path: Path | None = None
    model: PreTrainedModel | None = None

    @property
    def is_adapter(self) -> bool:
        """Return whether it is an adapter, which belongs on the start."""
        return self.model is None and self.spec.startswith(ADAPTER)

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub, or None if it is not from there."""
        known = self.model is None and not self.is_adapter
        return (
            self.spec if known and source.kind(self.spec) == "hub" and not self.spec.startswith(NEW) else None
        )

    @property
    def folder(self) -> Path | None:
        """The folder with weights, or None for any other form."""
        new = self.spec.startswith(NEW)
        return self.path if self.path is not None and self.path.is_dir() and not new else None

    def config(self, head: str = "") -> PreTrainedConfig:
        """Return the configuration; of an embedded backbone under `head`."""
        if self.model is not None:
            return copy.deepcopy(self.model.config)
        if self.path is None:
            return loading.configuration(self.spec, head=head or "base")
        try:
            return transformers.AutoConfig.from_pretrained(
                **loading.where(self.path), trust_remote_code=False
            )
        except Exception as error:  # of many types, all about the file's content
            raise UserError(f"{self.spec}: its configuration is not usable: {error}") from error

    def tokenizer(self, head: str) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, or None for a model in memory, an adapter and a folder without one."""
        if self.model is not None or self.is_adapter:
            return None
        if self.path is None:
            family = EMBEDDED_FAMILIES.get(self.spec.removeprefix(EMBEDDED))
            return cast("PreTrainedTokenizerBase", family.configuration(head=head)[1])
        if self.path.is_dir() and not any((self.path / name).is_file() for name in loading.VOCABULARIES):
            return None
        tokenizer = loading.read_tokenizer(self.path, self.spec)
        if self.path.is_file():
            loading.only_its_own(
                cast(Any, tokenizer), cast("gguf.Header", source.check_files(self.path, self.spec))
            )
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class MergeLayout:
    """Start and donors before their weights are read.

    Attributes:
        start, donors: in the order of the specification.
        head: a key of `heads.HEADS`.
        labels: of a classifier, as of `loading.load`.
        seed: of an embedded start's weights, of new heads, and of draws.
        config: of the merged model.
        tokenizer: of the start; None if it has none.
        infos: tensors of the merged model, in its order; the dtypes are those of the start.
    """

    start: Checkpoint
    donors: tuple[Checkpoint, ...]
    head: str
    labels: Mapping[str, Any]
    seed: int
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    infos: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The start and the donors."""
        return (self.start, *self.donors)

    def in_place(self, checkpoint: Checkpoint) -> FolderReader | None:
        """Return the reader of a folder that has all tensors of the model under its names, else None."""
        if checkpoint.folder is None:
            return None
        reader = FolderReader(checkpoint.folder)
        return reader if set(self.infos) <= set(reader.infos) else None

    def rewritten(self) -> list[Checkpoint]:
        """Return the checkpoints that are loaded and written to a scratch folder."""
        return [each for each in self.checkpoints if each.model is None and self.in_place(each) is None]


def survey(spec: MergeSpec, models: Models | None = None) -> MergeLayout:
    """Find start and donors, and compare configurations, labels and tokenizers; no weights are read.

    Args:
        spec: of the merge.
        models: models in memory, by the names that stand for them in `spec`.

    Raises:
        UserError: one is not there or broken, or a donor is not one of the start.
    """
    start, *donors = (_checkpoint(name, models or {}) for name in (spec.start, *spec.donors))
    head = spec.head or _head(start, donors)
    if head not in HEADS:
        raise UserError(f"head: unknown '{head}'.{nearest(head, HEADS)} Known: {', '.join(HEADS)}")
    config = start.config(head)
    if not has_head(type(config), head):
        raise UserError(f"head: {config.model_type} has no head '{head}'")
    whole = [donor for donor in donors if not donor.is_adapter]
    for donor in whole:
        check_same_config(config, donor.config(head), spec=donor.name)
    labels: dict[str, Any] = {}
    if head in CLASSIFIERS:
        labels, config = _labels(start, whole, head, config)
    tokenizer = start.tokenizer(head)
    for donor in whole:
        other = donor.tokenizer(head)
        if tokenizer is not None and other is not None:
            check_same_vocabulary(tokenizer, other, spec=donor.name)
    layout = MergeLayout(
        start=start,
        donors=tuple(donors),
        head=head,
        labels=labels,
        seed=_seed(spec),
        config=config,
        tokenizer=tokenizer,
    )
    return replace(layout, infos=_infos(layout))


def _checkpoint(name: str, models: Models) -> Checkpoint:
    if name in models:
        if getattr(models[name].config, "camex", None):
            raise UserError(f"{name}: the model has experts: expected a dense one")
        return Checkpoint(name=name, spec=name, model=models[name])
    check_donor(name)
    if name.startswith(ADAPTER):
        return Checkpoint(name=name, spec=name)
    spec = backbone_of(name)
    embedded = source.kind(spec) == "embedded"
    return Checkpoint(name=name, spec=spec, path=None if embedded else source.locate(spec))


def _head(start: Checkpoint, donors: Iterable[Checkpoint]) -> str:
    """Return the head of the first configuration that names one: the start's, else the donors'."""
    for checkpoint in (start, *donors):
        if not checkpoint.is_adapter and (head := _own_head(checkpoint)) not in ("", "base"):
            return head
    raise UserError(
        "head: neither the start nor a donor says which head it has: expected one of " + ", ".join(HEADS)
    )


def _own_head(checkpoint: Checkpoint) -> str:
    """Return the head that a checkpoint was saved under, or nothing."""
    if checkpoint.model is None and checkpoint.path is None:
        return ""
    config = checkpoint.config()
    named = (
        type(checkpoint.model).__name__ if checkpoint.model else next(iter(config.architectures or ()), "")
    )
    if not named and checkpoint.path is not None and checkpoint.path.is_file():
        return "causal-lm"  # GGUF files hold language models
    return next((h for h in HEADS if has_head(type(config), h) and named == _class(config, h).__name__), "")


def _class(config: PreTrainedConfig, head: str) -> type[PreTrainedModel]:
    """Return the class of the model that a configuration has under a head."""
    mapping: Any = HEADS[head]._model_mapping
    classes = mapping[type(config)]
    return cast("type[PreTrainedModel]", classes[0] if isinstance(classes, (list, tuple)) else classes)


def _labels(
    start: Checkpoint, donors: list[Checkpoint], head: str, config: PreTrainedConfig
) -> tuple[dict[str, Any], PreTrainedConfig]:
    """Return the labels that all have, as of `loading.load`, and the start's configuration with them."""
    named = [each for each in (start, *donors) if _own_head(each) == head]
    labelled = {each.name: each.config(head) for each in named}
    if not labelled:
        return {}, config
    (first, own), *others = labelled.items()
    assert own.id2label is not None  # transformers gives every configuration two
    for other, theirs in others:
        assert theirs.id2label is not None
        if own.id2label != theirs.id2label or own.problem_type != theirs.problem_type:
            here, there = list(own.id2label.values()), list(theirs.id2label.values())
            raise UserError(
                f"{other}: its labels are {there}, those of {first} are {here}: expected the same labels"
            )
    for key in ("id2label", "label2id", "problem_type"):
        setattr(config, key, getattr(own, key))
    if own.problem_type == "regression":
        return {"regression": True}, config
    return {"label_names": list(own.id2label.values())}, config


def _seed(spec: MergeSpec) -> int:
    """Return the seed of the specification, else that of all donors that are runs, else 0."""
    if spec.seed is not None:
        return spec.seed
    files = [RunFolder(Path(donor)).config for donor in spec.donors]
    seeds = {load_config(str(file)).training.seed for file in files if file.is_file()}
    return seeds.pop() if len(seeds) == 1 else 0


def _infos(layout: MergeLayout) -> dict[str, TensorInfo]:
    """Return the tensors of the merged model; their dtypes are those in the start's files."""
    start = layout.start
    if start.model is not None:
        return dict(ModelReader(start.model).infos)
    skeleton = loading.skeleton(start.spec, head=layout.head, path=start.path, **layout.labels)
    infos = dict(ModelReader(skeleton).infos)
    if start.folder is None:
        return infos
    stored = FolderReader(start.folder).infos
    floating = {info.dtype for info in stored.values() if info.dtype.is_floating_point}
    usual = floating.pop() if len(floating) == 1 else torch.float32
    return {
        name: replace(info, dtype=stored[name].dtype if name in stored else usual)
        if info.dtype.is_floating_point
        else info
        for name, info in infos.items()
    }


# -- their tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Start and donors, compared and readable.

    Attributes:
        layout: of them.
        start, donors: readers of their tensors.
        new: names of tensors that the start's checkpoint lacks, of a new head: they have no task vectors.
        cosines: of each donor's matrices with the start's.
        sha256: of each checkpoint's files, the start's first; None for embedded backbones and models in memory.
        notes: remarks for the user.
    """

    layout: MergeLayout
    start: TensorReader
    donors: tuple[TensorReader, ...]
    new: frozenset[str] = frozenset()
    cosines: tuple[float, ...] = ()
    sha256: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()

    def model(self, blocks: Callable[[str], Iterable[Tensor]]) -> PreTrainedModel:
        """Return a model in float32 whose tensors are read block by block; in evaluation mode."""
        layout = self.layout
        if layout.start.model is not None:
            model = copy.deepcopy(layout.start.model).float()
        else:
            with torch.random.fork_rng(devices=[]):
                model = HEADS[layout.head].from_config(
                    layout.config, dtype=torch.float32, trust_remote_code=False
                )
        fill(model, layout.infos, blocks)
        return model.eval()

    def donor_model(self, number: int) -> PreTrainedModel:
        """Return one of the donors as a model in float32; in evaluation mode."""
        return self.model(lambda name: [self.donors[number].read(name)])


@torch.no_grad()
def fill(model: PreTrainedModel, names: Iterable[str], blocks: Callable[[str], Iterable[Tensor]]) -> None:
    """Set the named tensors of a model, in place, from their blocks of rows."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in names:
        begin = 0
        for block in blocks(name):
            if tensors[name].dim() == 0:
                tensors[name].copy_(block)
            else:
                tensors[name][begin : begin + len(block)].copy_(block)
                begin += len(block)


def row_slices(info: TensorInfo, most: int | None = None) -> list[slice | None]:
    """Return slices of rows with at most `most` entries (`BLOCK`) each, or [None] for the whole tensor."""
    most = most or BLOCK
    if not info.shape or info.entries <= most:
        return [None]
    rows = max(1, most * info.shape[0] // info.entries)
    return [slice(begin, min(begin + rows, info.shape[0])) for begin in range(0, info.shape[0], rows)]


def open_inputs(layout: MergeLayout, scratch: Path) -> MergeInputs:
    """Return start and donors with readers of their tensors, after all comparisons.

    Args:
        layout: of `survey`.
        scratch: folder for the tensors of those that are not read where they are.

    Raises:
        UserError: a donor has other tensors than the start, or another start.
    """
    readers = []
    for number, checkpoint in enumerate(layout.checkpoints):
        reader: TensorReader | None = layout.in_place(checkpoint)
        if checkpoint.model is not None:
            reader = ModelReader(checkpoint.model)
        if reader is None:
            reader = _rewritten(layout, checkpoint, scratch / str(number))
        shapes = {name: info.shape for name, info in reader.infos.items() if name in layout.infos}
        own = {name: info.shape for name, info in layout.infos.items()}
        check_same_shapes(own, shapes, spec=checkpoint.name)
        readers.append(reader)
    inputs = MergeInputs(layout=layout, start=readers[0], donors=tuple(readers[1:]), new=_new_names(layout))
    cosines, notes = _compare(inputs)
    sha256 = [None if each.model is not None else donor_digest(each.spec) for each in layout.checkpoints]
    return replace(inputs, cosines=cosines, sha256=tuple(sha256), notes=(*_new_note(inputs), *notes))


def _rewritten(layout: MergeLayout, checkpoint: Checkpoint, folder: Path) -> FolderReader:
    """Load a checkpoint, write its tensors to a folder, and return their reader."""
    backbone = layout.start if checkpoint.is_adapter else checkpoint
    model = backbone.model
    if model is None:
        model = loading.load(
            backbone.spec, head=layout.head, seed=layout.seed, path=backbone.path, **layout.labels
        )[0]
    elif checkpoint.is_adapter:
        model = copy.deepcopy(model).float()
    if checkpoint.is_adapter:
        model = with_adapter(model, checkpoint.spec)
    reader = ModelReader(model)
    folder.mkdir(parents=True)
    write_tensors(folder, reader.infos, lambda name: [reader.read(name)])
    return FolderReader(folder)


def _new_names(layout: MergeLayout) -> frozenset[str]:
    """Return the names of tensors that the start's files lack: those of a new head."""
    start = layout.start
    if start.path is None or start.spec.startswith(NEW):
        return frozenset()
    if start.path.is_file():
        stored = ModelReader(loading.skeleton(start.spec, head="causal-lm", path=start.path)).infos
    else:
        stored = FolderReader(start.path).infos
    with torch.device("meta"):
        bare_model = transformers.AutoModel.from_config(layout.config)
    backbone = {name for name, _ in bare_model.named_parameters() if not name.startswith("pooler.")}
    prefix = f"{bare_model.base_model_prefix}."
    names = [
        name for name in layout.infos if name not in stored and name.removeprefix(prefix) not in backbone
    ]
    return frozenset(name for name in names if name.removeprefix(prefix) not in stored)


def _new_note(inputs: MergeInputs) -> Iterator[str]:
    if inputs.new:
        names = ", ".join(sorted(inputs.new)[:3])
        yield f"the start has no {names}: the weighted mean of the donors' is taken"


def _compare(inputs: MergeInputs) -> tuple[tuple[float, ...], Iterator[str]]:
    """Return the cosine of each donor with the start, and remarks; `UserError` for a donor of another start."""
    likeness = [Likeness() for _ in inputs.donors]
    differing = set()
    for name, info in inputs.layout.infos.items():
        if name in inputs.new:
            continue
        for rows in row_slices(info):
            start = inputs.start.read(name, rows)
            for each, donor in zip(likeness, inputs.donors, strict=True):
                tensor = donor.read(name, rows)
                each.add(start, tensor)
                if not info.dtype.is_floating_point and not torch.equal(start, tensor):
                    differing.add(name)
    for each, checkpoint in zip(likeness, inputs.layout.donors, strict=True):
        each.check(checkpoint.name)
    notes = (f"{name} holds whole numbers that differ: the start's are taken" for name in sorted(differing))
    return tuple(each.cosine for each in likeness), notes


def generation_of(layout: MergeLayout) -> GenerationConfig | None:
    """Return the start's settings for generation, or None for a model that does not generate."""
    start = layout.start
    if start.model is not None:
        return getattr(start.model, "generation_config", None)
    if start.folder is not None and (start.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(start.folder)
    generates = layout.head in ("causal-lm", "seq2seq-lm")
    return GenerationConfig.from_model_config(layout.config) if generates else None


def name_of_class(layout: MergeLayout) -> str:
    """Return the name of the merged model's class."""
    return (
        type(layout.start.model).__name__
        if layout.start.model
        else _class(layout.config, layout.head).__name__
    )
