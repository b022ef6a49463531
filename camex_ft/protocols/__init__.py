"""Merging protocols: one file each, a documented pure function on domain vectors and its registration.

    @protocol("ties", summary=..., source=...)
    def ties(tau, *, density: float = 1.0): ...

The function takes the domain vectors tau [N, ...] of one weight or bias and returns its *multiplier*, of the same
shape, or None for one everywhere; `T = keep(tau) * M tau` follows. Parameters that it names `training` (bool) or
`generator` (`torch.Generator`) are passed in; every other keyword-only parameter is an option of the protocol, with its
type (and bounds: ``Annotated[float, Gt(0)]``) and default, in YAML under ``merging.options``. A protocol with a base
expert gets a curvature-aware twin, ``<name>-ca``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from camex_ft.moe.vectors import Keep
from camex_ft.registry import PROTOCOLS

Weigh = Callable[..., "Tensor | None"]
Form = Literal["dense", "outputs", "weights"]
PASSED_IN = ("training", "generator")
CURVED = "-ca"
MERGED = ("sequence", "segment", "token", "encoder")


def never(**options: Any) -> bool:
    """Of a multiplier that nothing is known of."""
    return False


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How experts become one layer.

    Attributes:
        name: as in YAML.
        summary: one line for ``camex-ft ls protocols``.
        source: paper and equation.
        form: "dense" keeps the layer, "outputs" mixes the experts' outputs, "weights" merges their weights.
        base: a base expert E_m is stored, and domain vectors are merged onto it.
        curvature: domain vectors pass through a learned curvature M_i.
        weigh: multiplier of domain vectors, or None where they are taken as they are.
        pointwise: options -> whether an entry's multiplier depends on that entry of all experts alone.
        granularities: groups of tokens that may share routing weights.
        options: the protocol's own parameters: name to `inspect.Parameter`.
        doc: docstring of the function that it was registered with: formula, convention, meaning of the options.
    """

    name: str
    summary: str
    source: str
    form: Form = "weights"
    base: bool = True
    curvature: bool = False
    weigh: Weigh | None = None
    pointwise: Callable[..., bool] = never
    granularities: tuple[str, ...] = MERGED
    options: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    doc: str = ""

    @property
    def random(self) -> bool:
        """Whether the multiplier is drawn anew for every training step."""
        return self.weigh is not None and "generator" in inspect.signature(self.weigh).parameters

    def bind(self, options: Mapping[str, Any]) -> Protocol:
        """Return the protocol with these values of its options."""
        if self.weigh is None:
            return self
        values = {k: p.default for k, p in self.options.items()} | dict(options)
        pointwise = self.pointwise(**values)
        return replace(self, weigh=partial(self.weigh, **options), pointwise=lambda **_: pointwise)

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
            return Keep(weigh, self.pointwise(**values))

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
) -> Callable[[Weigh], Weigh]:
    """Register the decorated function as a protocol, and as ``<name>-ca`` where domain vectors exist to be curved.

    `pointwise` receives the protocol's options and says whether an entry's multiplier depends on that entry of all
    experts alone: such multipliers are made slice by slice, which is faster.
    """

    def register(weigh: Weigh) -> Weigh:
        parameters = inspect.signature(weigh).parameters
        hints = get_type_hints(weigh, include_extras=True)
        options = {
            k: p.replace(annotation=hints.get(k, Any))
            for k, p in parameters.items()
            if p.kind is p.KEYWORD_ONLY and k not in PASSED_IN
        }
        weighs = form == "weights" and base and hints.get("return") is not type(None)
        plain = Protocol(
            name=name,
            summary=summary,
            source=source,
            form=form,
            base=base and form == "weights",
            weigh=weigh if weighs else None,
            pointwise=pointwise,
            granularities=granularities,
            options=options,
            doc=inspect.getdoc(weigh) or "",
        )
        PROTOCOLS.add(name, plain)
        if plain.base:
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
