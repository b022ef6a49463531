"""Methods of static merging: documented pure functions on the tensors of a start and its donors.

    @method("arithmetic", summary=..., source=...)
    def arithmetic(start, tau, *, weights, scale: float = 1.0): ...

The function returns the merged tensor, of the shape of `start`. Parameters of these names are passed in where it names
them; every other keyword-only parameter is an option, with its type (and bounds: ``Annotated[float, Gt(0)]``) and
default, in YAML under ``options``. All tensors are in float32 or wider.

    start        tensor of the start; [...]
    donors       tensors of the donors; [N, ...]
    tau          task vectors, donors - start; [N, ...]
    weights      of the donors, for this tensor; [N]
    thresholds   what `per_donor` returned for each whole task vector; [N]
    statistic    of the donors, see `Method.statistic`; [N, ...]
    transposed   whether a matrix is stored as [in, out], as in GPT-2
    generator    `torch.Generator`, seeded by the merge's seed and the tensor's name

Large tensors come in blocks of rows where the method is pointwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from camex_ft.utils.registry import MERGE_METHODS

if TYPE_CHECKING:  # so that listing the methods needs no torch
    from torch import Tensor

    MergeFunction = Callable[..., Tensor]

Statistic = Literal["fisher", "gram"]
PASSED_IN = ("start", "donors", "tau", "weights", "thresholds", "statistic", "transposed", "generator")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Method of static merging.

    Attributes:
        name: as in YAML.
        summary: one line for ``camex-ft ls methods``.
        source: paper and equation.
        function: returns a merged tensor.
        per_donor: returns a number for a donor's whole task vector, before blocks of it are merged; or None.
        statistic: what the method takes of texts: "fisher", the mean square of the gradients of a row, as the tensor
            itself; "gram", the mean outer product of the inputs of a linear map, [in, in]. None: no texts are needed.
        pointwise: an entry depends on that entry of all tensors alone, and on the thresholds.
        count: number of donors; None: any.
        ranges: option -> least and greatest value that a search tries.
        options: the method's own parameters: name to `inspect.Parameter`.
        doc: docstring of the function: formula, convention, meaning of the options.
    """

    name: str
    summary: str
    source: str
    function: MergeFunction
    per_donor: Callable[..., Tensor] | None = None
    statistic: Statistic | None = None
    pointwise: bool = True
    count: int | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    options: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    doc: str = ""

    def takes(self, name: str) -> bool:
        """Return whether the function names this parameter."""
        return name in inspect.signature(self.function).parameters

    def shares(self, name: str) -> bool:
        """Return whether `per_donor` names this option."""
        return self.per_donor is not None and name in inspect.signature(self.per_donor).parameters

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every option, the default where it is not in `options`."""
        return {name: options.get(name, parameter.default) for name, parameter in self.options.items()}


def method(
    name: str,
    *,
    summary: str,
    source: str,
    per_donor: Callable[..., Tensor] | None = None,
    statistic: Statistic | None = None,
    pointwise: bool = True,
    count: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Callable[[MergeFunction], MergeFunction]:
    """Register the decorated function as a method of static merging; arguments as of `Method`."""

    def register(function: MergeFunction) -> MergeFunction:
        entry = Method(
            name=name,
            summary=summary,
            source=source,
            function=function,
            per_donor=per_donor,
            statistic=statistic,
            pointwise=pointwise,
            count=count,
            ranges=ranges or {},
            options=_options(function),
            doc=inspect.getdoc(function) or "",
        )
        MERGE_METHODS.add(name, entry)
        return function

    return register


def along(numbers: Tensor, tensors: Tensor) -> Tensor:
    """Return N numbers in a shape that multiplies tensors [N, ...] one by one."""
    return numbers.to(tensors).view(-1, *[1] * (tensors.dim() - 1))


def weighted(tensors: Tensor, weights: Tensor) -> Tensor:
    """Return each of the tensors [N, ...] times its weight."""
    return tensors * along(weights, tensors)


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters that are not passed in, with their types."""
    options = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in PASSED_IN
    }
    annotations = {name: parameter.annotation for name, parameter in options.items()}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=annotations), function.__globals__, include_extras=True
    )
    return {name: parameter.replace(annotation=hints[name]) for name, parameter in options.items()}
