"""Memory and disk that a merge needs, from the shapes of its tensors; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.filesize import decimal

from camex_ft.static.merge_inputs import BLOCK, row_slices, survey
from camex_ft.static.merge_spec import MergeSpec
from camex_ft.static.methods import Method
from camex_ft.static.tensor_files import TensorInfo
from camex_ft.utils.registry import MERGE_METHODS

FLOAT32, FLOAT64 = 4, 8  # bytes
# Tensors of a block beside the donors' own: masks, products and sums of a method's function.
TEMPORARY = 3


@dataclass(frozen=True, kw_only=True)
class MergeNeeds:
    """Memory and disk of a merge.

    Attributes:
        tensors, parameters: of the merged model.
        model: its size in the start's dtypes, in bytes.
        peak: most memory for tensors at a time, in bytes.
        scratch: disk for temporary files, in bytes.
        loaded: checkpoints that are loaded as a whole, one after the other.
        notes: remarks.
    """

    tensors: int
    parameters: int
    model: int
    peak: int
    scratch: int
    loaded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        share = self.peak / self.model
        rows = [
            f"tensors       {self.tensors:,} with {self.parameters:,} parameters",
            f"memory        {decimal(self.peak)} for tensors ({share:.2f} times the model), beside the libraries",
            f"disk          {decimal(self.model)} for the result, {decimal(self.scratch)} beside it while merging",
        ]
        if self.loaded:
            rows.append(f"loaded whole  {', '.join(self.loaded)}: one after the other")
        return [*rows, *self.notes]


def needs_of(spec: MergeSpec) -> MergeNeeds:
    """Return what a merge needs, after the checks that need no weights.

    Raises:
        UserError: the start or a donor is at fault.
    """
    layout = survey(spec)
    entry: Method = MERGE_METHODS.get(spec.method)
    loaded = [checkpoint.name for checkpoint in layout.rewritten()]
    whole = sum(info.entries for info in layout.infos.values()) * FLOAT32
    scratch = len(loaded) * whole
    peak = max(working_bytes(layout.infos, entry, donors=len(spec.donors)), whole * bool(loaded))
    notes = []
    if entry.statistic is not None:
        # a model with its gradients and sums, or with sums of outer products
        peak = max(peak, 3 * whole)
        scratch += len(spec.donors) * whole
        notes.append(
            "texts         each donor in float32, with its gradients or Gram matrices, one after the other"
        )
    if spec.search is not None:
        peak += whole
        notes.append(f"search        one merged model in float32, measured {spec.search.budget} times")
    if spec.dtype is not None:
        size = getattr(torch, spec.dtype).itemsize
        model = sum(
            i.entries * size if i.dtype.is_floating_point else i.nbytes for i in layout.infos.values()
        )
    else:
        model = sum(info.nbytes for info in layout.infos.values())
    return MergeNeeds(
        tensors=len(layout.infos),
        parameters=sum(info.entries for info in layout.infos.values()),
        model=model,
        peak=peak,
        scratch=scratch,
        loaded=tuple(loaded),
        notes=tuple(notes),
    )


def working_bytes(infos: Mapping[str, TensorInfo], entry: Method, *, donors: int) -> int:
    """Return the most memory that merging one tensor takes: its blocks, or the whole of it where the method asks."""
    peak = 0
    for info in infos.values():
        rows = row_slices(info)
        block = (
            info.entries if rows == [None] or not entry.pointwise else max(BLOCK, info.entries // len(rows))
        )
        size = FLOAT64 if entry.statistic == "gram" else FLOAT32
        peak = max(peak, block * size * (TEMPORARY * donors + TEMPORARY))
        if entry.per_donor is not None:
            peak = max(peak, TEMPORARY * info.entries * FLOAT32)
    return peak
