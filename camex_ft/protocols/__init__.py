"""Merging protocols: one file each, a documented pure function on domain vectors and its registration.

    @protocol("ties", summary=..., source=...)
    def ties(tau, *, density: float = 1.0): ...

The function takes the domain vectors tau [N, ...] of one weight or bias and returns their multiplier, of the same
shape, or None for one everywhere; `T = multiplier(tau) * M tau` follows. Parameters that it names `training` (bool),
`generator` (`torch.Generator`) or `statistic` (a tensor as tau, see below) are passed in; every other keyword-only
parameter is an option of the protocol, with its type (and bounds: ``Annotated[float, Gt(0)]``) and default, in YAML
under ``merging.options``. Only the types of options are read, so that those of tensors may be imported for type checks
alone. A protocol with a base expert gets a curvature-aware twin, ``<name>-ca``, unless it is
registered with ``twin=False``.

A statistic has an entry for every entry of the experts: it starts at 0 and is updated at every optimizer step by the
function `update`, (statistic, gradient of T, options that it names) -> statistic.

    @dynamic("ep-camex", summary=..., source=...)
    def ep_camex(base, *, mean, gamma: float = 1.0): ...

registers dynamic merging: every layer merges with curvature, and the function computes the next layer's base expert
from this layer's `PropagatedBase`. `mean` (1/N sum_i M_i tau_i) and `vectors` (`LayerVectors`) are passed in where it
names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from camex_ft.utils.registry import PROTOCOLS

if TYPE_CHECKING:  # so that listing the protocols needs no torch
    from torch import Tensor

    from camex_ft.moe.merging.base_expert import Step
    from camex_ft.moe.merging.domain_vectors import Multiplier, MultiplierFunction

    Update = Callable[..., Tensor]

Form = Literal["dense", "outputs", "weights", "dynamic"]
PASSED_IN = ("training", "generator", "statistic", "mean", "vectors")
CURVATURE_AWARE = "-ca"
MERGED = ("sequence", "segment", "token", "encoder")


def never(**options: Any) -> bool:
    """Return False: by default nothing is assumed of a multiplier."""
    return False


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Merging protocol.

    Attributes:
        name: as in YAML.
        summary: one line for ``camex-ft ls protocols``.
        source: paper and equation.
        form: "dense" leaves the layer as it is, "outputs" mixes the experts' outputs, "weights" merges their weights,
            "dynamic" also propagates the base expert from layer to layer.
        base: a base expert E_m is stored, and domain vectors are merged onto it.
        curvature: domain vectors pass through a learned curvature M_i.
        function: multiplier of domain vectors, or None for one everywhere.
        update_statistic: of the statistic that the multiplier takes, or None.
        step: computes the next layer's base expert, or None.
        pointwise: options -> whether an entry's multiplier depends on that entry of all experts alone.
        granularities: groups of tokens that may share routing weights.
        options: the protocol's own parameters: name to `inspect.Parameter`.
        bound: values of options that were given; the others have their defaults.
        doc: docstring of the function that it was registered with: formula, convention, meaning of the options.
    """

    name: str
    summary: str
    source: str
    form: Form = "weights"
    base: bool = True
    curvature: bool = False
    function: MultiplierFunction | None = None
    update_statistic: Update | None = None
    step: Step | None = None
    pointwise: Callable[..., bool] = never
    granularities: tuple[str, ...] = MERGED
    options: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    bound: Mapping[str, Any] = field(default_factory=dict)
    doc: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name and the options: functions come from the registry of the process that unpickles."""
        return _registered, (self.name, dict(self.bound))

    def __deepcopy__(self, memo: dict[int, Any]) -> Protocol:
        """Return the protocol itself, which nothing changes."""
        return self

    @cached_property
    def multiplier(self) -> Multiplier | None:
        """The multiplier of domain vectors as a function of tau, or None for one everywhere."""
        from camex_ft.moe.merging.domain_vectors import Multiplier

        if self.function is None:
            return None
        names = inspect.signature(self.function).parameters
        options = {name: parameter.default for name, parameter in self.options.items()} | dict(self.bound)
        random = "generator" in names
        pointwise = not random and self.pointwise(**options)
        return Multiplier(
            self.function, pointwise=pointwise, random=random, takes_training="training" in names
        )

    @property
    def random(self) -> bool:
        """Return whether the multiplier is drawn anew for every training step."""
        return self.multiplier is not None and self.multiplier.random

    @property
    def statistic(self) -> bool:
        """Return whether the multiplier depends on a running statistic of gradients."""
        return self.update_statistic is not None

    @cached_property
    def needs_mean(self) -> bool:
        """Return whether `step` takes the mean of the transformed domain vectors."""
        return self.step is not None and "mean" in inspect.signature(self.step).parameters

    @cached_property
    def bargains(self) -> bool:
        """Return whether `step` takes the domain vectors, and so may solve for Nash weights."""
        return self.step is not None and "vectors" in inspect.signature(self.step).parameters

    def update(self, statistic: Tensor, gradient: Tensor) -> Tensor:
        """Return the statistic after an optimizer step, from the gradient of T; both [N, ...]."""
        assert self.update_statistic is not None
        return self.update_statistic(statistic, gradient)

    def bind(self, options: Mapping[str, Any]) -> Protocol:
        """Return the protocol with these values of its options."""
        bound = {**self.bound, **options}
        if self.step is not None:
            return replace(self, bound=bound, step=partial(self.step, **options))
        if self.function is None:
            return self
        update = self.update_statistic
        return replace(
            self,
            bound=bound,
            function=partial(self.function, **_named(self.function, options)),
            update_statistic=update and partial(update, **_named(update, options)),
        )


def protocol(
    name: str,
    *,
    summary: str,
    source: str,
    form: Form = "weights",
    base: bool = True,
    pointwise: Callable[..., bool] = never,
    granularities: tuple[str, ...] = MERGED,
    update: Update | None = None,
    twin: bool = True,
) -> Callable[[MultiplierFunction], MultiplierFunction]:
    """Register the decorated function as a protocol, and as ``<name>-ca`` where it has domain vectors.

    Args:
        name, summary, source, form, base, granularities: as of `Protocol`.
        pointwise: takes the protocol's options and returns whether an entry's multiplier depends on that entry of all
            experts alone: such multipliers are computed slice by slice, which is faster.
        update: of the statistic that the function takes; its keyword-only parameters are options as well.
        twin: also register the curvature-aware twin.
    """

    def register(function: MultiplierFunction) -> MultiplierFunction:
        options = _options(function) | (_options(update) if update else {})
        returned = inspect.signature(function).return_annotation
        multiplies = form == "weights" and base and returned not in (None, "None", type(None))
        euclidean = Protocol(
            name=name,
            summary=summary,
            source=source,
            form=form,
            base=base and form == "weights",
            function=function if multiplies else None,
            update_statistic=update,
            pointwise=pointwise,
            granularities=granularities,
            options=options,
            doc=inspect.getdoc(function) or "",
        )
        PROTOCOLS.add(name, euclidean)
        if euclidean.base and twin:
            curvature_aware = replace(
                euclidean,
                name=name + CURVATURE_AWARE,
                summary=f"{summary}, curvature-aware",
                source=f"CAMEx (arXiv 2502.18821, section 3.2); {source}",
                curvature=True,
            )
            PROTOCOLS.add(curvature_aware.name, curvature_aware)
        return function

    return register


def dynamic(name: str, *, summary: str, source: str) -> Callable[[Step], Step]:
    """Register the decorated function, which computes the next layer's base expert, as a dynamic merging protocol.

    There is no Euclidean one: without curvature, and with alpha = 1, the base expert cancels in
    E_m + sum_i s_i (E_i - E_m), and propagating it would change nothing.
    """

    def register(step: Step) -> Step:
        protocol = Protocol(
            name=name,
            summary=summary,
            source=source,
            form="dynamic",
            curvature=True,
            step=step,
            options=_options(step),
            doc=inspect.getdoc(step) or "",
        )
        PROTOCOLS.add(name, protocol)
        return step

    return register


def _registered(name: str, bound: Mapping[str, Any]) -> Protocol:
    """Return a registered protocol with values of its options."""
    protocol: Protocol = PROTOCOLS.get(name)
    return protocol.bind(bound) if bound else protocol


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters that are not passed in, with their types."""
    options = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in PASSED_IN
    }
    annotations = {n: p.annotation for n, p in options.items() if p.annotation is not p.empty}
    names = inspect.unwrap(function).__globals__
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), names, include_extras=True)
    return {n: p.replace(annotation=hints.get(n, Any)) for n, p in options.items()}


def _named(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that the function names."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
