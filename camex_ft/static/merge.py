"""Merge checkpoints of one start tensor by tensor, into a model or a folder that is whole or absent."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.exporting.export import check_target
from camex_ft.results.run_folder import full_disk
from camex_ft.run.steps import quieten
from camex_ft.static.coefficient_search import SearchPoint, search
from camex_ft.static.merge_card import CARD, RECORD, merge_card, merge_record
from camex_ft.static.merge_inputs import (
    MergeInputs,
    generation_of,
    name_of_class,
    open_inputs,
    row_slices,
    survey,
)
from camex_ft.static.merge_spec import MergeSpec, make_spec
from camex_ft.static.merge_statistics import Statistics, gather
from camex_ft.static.methods import Method
from camex_ft.static.methods.means import average
from camex_ft.static.tensor_files import SHARD, TensorInfo, write_tensors
from camex_ft.utils.durable import UNFINISHED, whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import MERGE_METHODS

Say = Callable[[str], None]
START = "the start in memory"


@dataclass
class Merged:
    """A merged checkpoint, as it was written.

    Attributes:
        folder: of the checkpoint.
        record: content of its ``merge.json``.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return lines for the terminal: the start, the donors with their weights, the tensors."""
        record = self.record
        by_name = isinstance(record["weights"], dict)
        weights = [
            "" if by_name or record["weights"] is None else w for w in record["weights"] or record["donors"]
        ]
        rows = [("start", "", "", record["start"])]
        for number, donor in enumerate(record["donors"]):
            weight = "by name" if by_name else weights[number]
            rows.append((f"donor {number + 1}", weight, f"{donor['cosine']:.4f}", donor))
        table = [f"{'':8}  {'weight':>8}  {'cosine':>7}  {'SHA-256':8}  checkpoint"]
        for role, weight, cosine, each in rows:
            table.append(
                f"{role:8}  {weight!s:>8}  {cosine:>7}  {str(each['sha256'] or '')[:8]:8}  {each['name']}"
            )
        options = ", ".join(f"{name} {value}" for name, value in record["options"].items())
        counts = ", ".join(f"{count:,} {kind}" for kind, count in record["tensors"].items())
        return [*table, f"method: {record['method']} ({options})", f"tensors: {counts}"]


def merge(
    start: PreTrainedModel | str | Path,
    donors: Sequence[PreTrainedModel | str | Path],
    *,
    method: str = "ties",
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    output: Path | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Return the merge of several fine-tuned checkpoints of one start: a model of the start's class.

    Args:
        start: model that the donors were fine-tuned from: a transformers model, or a name as in `MergeSpec.start`.
        donors: models of the same class, or names as in `MergeSpec.donors`; they stay as they are.
        method: see ``camex-ft ls methods``.
        options: of the method.
        weights: one for each donor, or patterns of tensor names to such lists.
        output: new or empty folder that the model is also written to, with a record and a card.
        tokenizer: written beside the model; default: that of a start that is no model.
        settings: head, dtype, seed, data and search, as in `MergeSpec`.

    Raises:
        UserError: a donor is not one of the start, or the settings do not fit the method.
    """
    named = {START: start} | {f"donor {n} in memory": donor for n, donor in enumerate(donors)}
    models = {name: each for name, each in named.items() if isinstance(each, PreTrainedModel)}
    names = [name if name in models else str(each) for name, each in named.items()]
    values = {
        "start": names[0],
        "from": names[1:],
        "method": method,
        "options": dict(options or {}),
        "weights": dict(weights) if isinstance(weights, Mapping) else weights and [float(w) for w in weights],
        **settings,
    }
    spec = make_spec({key: value for key, value in values.items() if value is not None})
    if output is not None:
        folder = write_merge(spec, output, models=models, tokenizer=tokenizer).folder
        return _loaded(start, folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_merge(spec, Path(scratch) / "model", models=models, tokenizer=tokenizer).folder
        return _loaded(start, folder)


def write_merge(
    spec: MergeSpec,
    output: Path | str,
    *,
    models: Mapping[str, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say = lambda line: None,
    shard: int = SHARD,
) -> Merged:
    """Merge as the specification says, and write the checkpoint to a folder, whole or not at all.

    Args:
        spec: of the merge.
        output: new or empty folder.
        models: models in memory, by the names that stand for them in `spec`.
        tokenizer: written beside the model; default: the start's.
        say: takes lines on the progress.
        shard: bytes of tensors in one file.

    Raises:
        UserError: an input is at fault, the folder is in use, or there is no room.
    """
    target = check_target(Path(output))
    quieten()
    layout = survey(spec, models)
    entry: Method = MERGE_METHODS.get(spec.method)
    with full_disk(str(target)), scratch_beside(target) as scratch:
        inputs = open_inputs(layout, scratch)
        if lost := spec.unmatched(layout.infos):
            raise UserError(
                f"weights: no tensor has a name like {', '.join(lost)}: see the names in the start"
            )
        for note in inputs.notes:
            say(note)
        statistics = gather(spec, inputs, entry, scratch / "statistics") if entry.statistic else None
        candidates: list[SearchPoint] = []
        if spec.search is not None:
            spec, candidates = search(
                spec, inputs, lambda changed: TensorMerge(changed, inputs, statistics).blocks, say=say
            )
        merging = TensorMerge(spec, inputs, statistics)
        infos = {
            name: TensorInfo(info.shape, getattr(torch, spec.dtype))
            if spec.dtype and info.dtype.is_floating_point
            else info
            for name, info in layout.infos.items()
        }
        with whole_folder(target) as folder:
            write_tensors(folder, infos, merging.blocks, shard=shard)
            config = layout.config
            config.architectures = [name_of_class(layout)]
            config.dtype = next(info.dtype for info in infos.values() if info.dtype.is_floating_point)
            config.save_pretrained(folder)
            if (generation := generation_of(layout)) is not None:
                generation.save_pretrained(folder)
            tokenizer = tokenizer or layout.tokenizer
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            record = merge_record(spec, inputs, candidates, merging.counts, infos)
            (folder / RECORD).write_text(record.text(), encoding="utf-8")
            (folder / CARD).write_text(merge_card(target.name, record), encoding="utf-8")
            check_target(target)  # again: it may have been filled meanwhile
    return Merged(target, record.content)


@dataclass
class TensorMerge:
    """Merged tensors of the inputs, one at a time.

    Attributes:
        spec: of the merge.
        inputs: start and donors.
        statistics: of texts, for methods that take them.
        counts: tensors that were merged, equal in all, and new, as far as they were read.
    """

    spec: MergeSpec
    inputs: MergeInputs
    statistics: Statistics | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entry: Method = MERGE_METHODS.get(self.spec.method)
        self.options = self.entry.settled(self.spec.options)

    @torch.no_grad()
    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a merged tensor in blocks of rows, in float32 or wider; one that is equal in all as it is."""
        inputs, entry = self.inputs, self.entry
        info = inputs.start.infos.get(name) or inputs.donors[0].infos[name]
        new, whole = name in inputs.new, not info.dtype.is_floating_point
        arguments: dict[str, Any] = {"weights": torch.tensor(self.spec.weights_of(name), dtype=torch.float32)}
        if entry.per_donor is not None and not (new or whole):
            shared = {key: value for key, value in self.options.items() if entry.shares(key)}
            numbers = [entry.per_donor(self._task_vector(name, donor), **shared) for donor in inputs.donors]
            arguments["thresholds"] = torch.stack(numbers)
        if entry.takes("generator"):
            arguments["generator"] = seeded_generator(name, inputs.layout.seed)
        changed = False
        for rows in row_slices(info) if entry.pointwise or new else [None]:
            start = inputs.start.read(name, rows)
            if whole:
                yield start
                continue
            donors = self._donors(name, rows, start)
            if not new and all(torch.equal(donor, start.to(donor)) for donor in donors):
                yield start
                continue
            changed = True
            if new:
                yield average(donors, weights=arguments["weights"])
                continue
            if self.statistics is not None:
                arguments |= self.statistics.arguments(name, rows)
            yield self._merged(start.to(donors), donors, arguments)
        kind = "new" if new else "merged" if changed else "equal"
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _merged(self, start: Tensor, donors: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Call the method's function with what it names."""
        tensors: dict[str, Any] = {"start": start, **arguments}
        if self.entry.takes("tau"):
            tensors["tau"] = donors.sub_(start)
        else:
            tensors["donors"] = donors
        taken = {name: value for name, value in tensors.items() if self.entry.takes(name)}
        merged: Tensor = self.entry.function(**taken, **self.options)
        return merged

    def _donors(self, name: str, rows: slice | None, start: Tensor) -> Tensor:
        """Return the donors' tensors, [N, ...], in float32 or wider."""
        dtype = torch.promote_types(start.dtype, torch.float32)
        donors = torch.empty((len(self.inputs.donors), *start.shape), dtype=dtype)
        for tensor, donor in zip(donors, self.inputs.donors, strict=True):
            tensor.copy_(donor.read(name, rows))
        return donors

    def _task_vector(self, name: str, donor: Any) -> Tensor:
        """Return the whole task vector of one donor."""
        start = self.inputs.start.read(name)
        tau: Tensor = donor.read(name).to(torch.promote_types(start.dtype, torch.float32), copy=True)
        return tau.sub_(start)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yield a folder for temporary files beside `target`, on the same file system."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seeded_generator(name: str, seed: int) -> torch.Generator:
    """Return a source of draws that depends on the seed and the tensor's name, and not on the order of tensors."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _loaded(start: Any, folder: Path) -> PreTrainedModel:
    """Return the model in a folder, under the start's own class or its head's."""
    if isinstance(start, PreTrainedModel):
        return type(start).from_pretrained(folder, dtype="auto").eval()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = kind.from_pretrained(folder, dtype="auto")
    return model.eval()
