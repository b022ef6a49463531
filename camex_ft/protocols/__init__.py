"""Merging protocols: one file each, a documented pure function on domain vectors and its registration.

    @protocol("ties", summary=..., source=...)
    def ties(tau, *, density: float = 1.0): ...

The function takes the domain vectors tau [N, ...] of one weight or bias and returns its *multiplier*, of the same
shape, or None for one everywhere; `T = keep(tau) * M tau` follows. Parameters that it names `training` (bool),
`generator` (`torch.Generator`) or `statistic` (a tensor as tau, see below) are passed in; every other keyword-only
parameter is an option of the protocol, with its type (and bounds: ``Annotated[float, Gt(0)]``) and default, in YAML
under ``merging.options``. A protocol with a base expert gets a curvature-aware twin, ``<name>-ca``, unless it is
registered with ``twin=False``.

A statistic is kept for every entry of the experts: it starts at 0 and is updated at every optimizer step by the
function `update`, (statistic, gradient of T, options that it names) -> statistic.

    @dynamic("ep-camex", summary=..., source=...)
    def ep_camex(carried, *, mean, gamma: float = 1.0): ...

registers dynamic merging: every layer merges with curvature, and the function makes the next layer's base expert of
what is `Carried` to this one. `mean` (1/N sum_i M_i tau_i) and `vectors` (`Vectors`) are passed in where it names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from camex_ft.moe.merging.base_expert import Carried, Step, Vectors
from camex_ft.moe.merging.domain_vectors import Keep
from camex_ft.utils.registry import PROTOCOLS

Weigh = Callable[..., "Tensor | None"]
Update = Callable[..., Tensor]
Form = Literal["dense", "outputs", "weights", "dynamic"]
PASSED_IN = ("training", "generator", "statistic", "mean", "vectors")
CURVED = "-ca"
MERGED = ("sequence", "segment", "token", "encoder")


def never(**options: Any) -> bool:
    """Of a multiplier that nothing is known of."""
    return False


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Merging protocol: how experts become one layer.

    Attributes:
        name: as in YAML.
        summary: one line for ``camex-ft ls protocols``.
        source: paper and equation.
        form: "dense" keeps the layer, "outputs" mixes the experts' outputs, "weights" merges their weights, "dynamic"
            also carries the base expert from layer to layer.
        base: a base expert E_m is stored, and domain vectors are merged onto it.
        curvature: domain vectors pass through a learned curvature M_i.
        weigh: multiplier of domain vectors, or None where they are taken as they are.
        update_statistic: of the statistic that the multiplier takes, or None.
        advance: makes the next layer's base expert, or None.
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
    weigh: Weigh | None = None
    update_statistic: Update | None = None
    advance: Step | None = None
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

    @property
    def random(self) -> bool:
        """Return whether the multiplier is drawn anew for every training step."""
        return self.weigh is not None and "generator" in inspect.signature(self.weigh).parameters

    @property
    def statistic(self) -> bool:
        """Return whether the multiplier depends on a running statistic of gradients."""
        return self.update_statistic is not None

    @property
    def needs_mean(self) -> bool:
        """Return whether `step` takes the mean of the transformed domain vectors."""
        return self.advance is not None and "mean" in inspect.signature(self.advance).parameters

    @property
    def bargains(self) -> bool:
        """Return whether `step` may solve for Nash weights."""
        return self.advance is not None and "vectors" in inspect.signature(self.advance).parameters

    @property
    def step(self) -> Step | None:
        """The step of the base expert to the next layer, (carried, mean=, vectors=) -> carried, or None."""
        if self.advance is None:
            return None
        named, advance = inspect.signature(self.advance).parameters, self.advance

        def step(carried: Carried, *, mean: Tensor | None, vectors: Vectors) -> Carried:
            given: dict[str, Any] = {"mean": mean, "vectors": vectors}
            return advance(carried, **{name: value for name, value in given.items() if name in named})

        return step

    def update(self, statistic: Tensor, gradient: Tensor) -> Tensor:
        """Return the statistic after an optimizer step, from the gradient of T; both [N, ...]."""
        assert self.update_statistic is not None
        return self.update_statistic(statistic, gradient)

    def bind(self, options: Mapping[str, Any]) -> Protocol:
        """Return the protocol with these values of its options."""
        bound = {**self.bound, **options}
        if self.advance is not None:
            return replace(self, bound=bound, advance=partial(self.advance, **options))
        if self.weigh is None:
            return self
        update = self.update_statistic
        return replace(
            self,
            bound=bound,
            weigh=partial(self.weigh, **_named(self.weigh, options)),
            update_statistic=update and partial(update, **_named(update, options)),
        )

    def keep(self, *, training: bool, seed: int, device: torch.device) -> Keep | None:
        """Return the multiplier as a function of tau alone, which gives the same result at every call.

        Args:
            training: passed to a function that names it.
            seed: of the generator, for a function that names one.
            device: where tau lies.
        """
        if self.weigh is None:
            return None
        names = inspect.signature(self.weigh).parameters
        weigh = partial(self.weigh, training=training) if "training" in names else self.weigh
        if not self.random:
            values = {k: p.default for k, p in self.options.items()}
            return Keep(weigh, self.pointwise(**{**values, **self.bound}))

        def drawn(tau: Tensor) -> Tensor | None:
            generator = torch.Generator(device=device)
            generator.manual_seed(seed)
            return weigh(tau, generator=generator)

        return Keep(drawn)


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
) -> Callable[[Weigh], Weigh]:
    """Register the decorated function as a protocol, and as ``<name>-ca`` where domain vectors exist to be curved.

    Args:
        name, summary, source, form, base, granularities: as of `Protocol`.
        pointwise: receives the protocol's options and says whether an entry's multiplier depends on that entry of all
            experts alone: such multipliers are made slice by slice, which is faster.
        update: of the statistic that the function takes; its keyword-only parameters are options as well.
        twin: also register the curvature-aware twin.
    """

    def register(weigh: Weigh) -> Weigh:
        options = _options(weigh) | (_options(update) if update else {})
        weighs = form == "weights" and base and get_type_hints(weigh).get("return") is not type(None)
        plain = Protocol(
            name=name,
            summary=summary,
            source=source,
            form=form,
            base=base and form == "weights",
            weigh=weigh if weighs else None,
            update_statistic=update,
            pointwise=pointwise,
            granularities=granularities,
            options=options,
            doc=inspect.getdoc(weigh) or "",
        )
        PROTOCOLS.add(name, plain)
        if plain.base and twin:
            curved = replace(
                plain,
                name=name + CURVED,
                summary=f"{summary}, curvature-aware",
                source=f"CAMEx (arXiv 2502.18821, section 3.2); {source}",
                curvature=True,
            )
            PROTOCOLS.add(curved.name, curved)
        return weigh

    return register


def dynamic(name: str, *, summary: str, source: str) -> Callable[[Step], Step]:
    """Register the decorated function, which makes the next layer's base expert, as a protocol of dynamic merging.

    There is no Euclidean one: without curvature, and with alpha = 1, the base expert cancels in
    E_m + sum_i s_i (E_i - E_m), and carrying it would change nothing.
    """

    def register(advance: Step) -> Step:
        made = Protocol(
            name=name,
            summary=summary,
            source=source,
            form="dynamic",
            curvature=True,
            advance=advance,
            options=_options(advance),
            doc=inspect.getdoc(advance) or "",
        )
        PROTOCOLS.add(name, made)
        return advance

    return register


def _registered(name: str, bound: Mapping[str, Any]) -> Protocol:
    """Return a registered protocol with values of its options."""
    found: Protocol = PROTOCOLS.get(name)
    return found.bind(bound) if bound else found


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters that are not passed in, with their types."""
    hints = get_type_hints(function, include_extras=True)
    return {
        k: p.replace(annotation=hints.get(k, Any))
        for k, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY and k not in PASSED_IN
    }


def _named(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that the function names."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
