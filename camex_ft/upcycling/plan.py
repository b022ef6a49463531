"""The plan of an upcycling, and the entry ``camex`` in a model's config that holds it.

merging, routing, upcycle[, tuning]   sections of the configuration
backbone                              of low-rank experts: see `adapters`
donors                                of the experts: the name and the SHA-256 of each
causal                                of a language model under another head: it is routed as before
format, versions                      added when it is saved
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar, cast

from transformers import PreTrainedConfig, PreTrainedModel

from camex_ft.backbones import generates
from camex_ft.config import MergingConfig, RoutingConfig, TuningConfig, UpcycleConfig
from camex_ft.config.rules import DROPPED, not_low_rank
from camex_ft.config.schema import Section
from camex_ft.moe.routing.router import Granularity
from camex_ft.protocols import Protocol
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

KEY = "camex"
CAUSAL = "causal"  # in the entry: routing is that of a language model, whatever the head
DONORS = "donors"
LORA = "lora"
FORMAT = 1
PACKAGES = ("camex_ft", "torch", "transformers", "peft")
NAME = "Camex"  # begins the names of the classes of upcycled models
Options = TypeVar("Options", bound=Section)
ConfigKind = TypeVar("ConfigKind", bound=PreTrainedConfig)


class Plan(NamedTuple):
    """Plan of an upcycling, as the configuration's sections say it."""

    merging: MergingConfig
    routing: RoutingConfig
    upcycle: UpcycleConfig
    tuning: TuningConfig

    def sections(self) -> dict[str, Any]:
        """Return the sections as a saved config holds them; `tuning` only if it changes the model's structure."""
        sections = {name: section.model_dump(mode="json") for name, section in self._asdict().items()}
        return sections if self.tuning.mode == LORA else {k: v for k, v in sections.items() if k != "tuning"}


def plan_of(sections: Mapping[str, Any]) -> Plan:
    """Return the plan of sections or mappings; `UserError` for unknown keys and impossible combinations."""
    plan = Plan(
        _section(MergingConfig, sections.get("merging")),
        _section(RoutingConfig, sections.get("routing")),
        _section(UpcycleConfig, sections.get("upcycle")),
        _section(TuningConfig, sections.get("tuning")),
    )
    if plan.tuning.mode == LORA or plan.upcycle.rank is not None:
        _check_low_rank(PROTOCOLS.get(plan.merging.protocol), plan)
    return plan


def _section(kind: type[Options], values: Any) -> Options:
    if isinstance(values, kind):
        return values
    try:
        return kind.model_validate(dict(values or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__}: {error}") from error


def _check_low_rank(protocol: Protocol, plan: Plan) -> None:
    why = not_low_rank(protocol)
    if why:
        raise UserError(f"{'tuning.mode' if plan.tuning.mode == LORA else 'upcycle.rank'}: {why}")
    if plan.upcycle.init == "drop" and protocol.form != "dense":
        raise UserError(f"upcycle.init: {DROPPED}")


def granularity_of(
    protocol: Protocol, routing: RoutingConfig, *, stack: str, model: PreTrainedModel
) -> Granularity:
    """Return the granularity of one stack's layers, with `auto` decided.

    A model that was trained as a language model is routed as one under another head, too (``causal`` in the entry).

    Raises:
        UserError: the protocol does not allow it, or tokens of a model that generates would see their future.
    """
    said = getattr(model.config, KEY, None) or {}
    causal = stack == "decoder" and (generates(model) or bool(said.get(CAUSAL)))
    both = getattr(model.config, "is_encoder_decoder", False)
    _check_choice(protocol, routing, causal=causal, model=model)
    wanted: str = routing.granularity
    if wanted == "encoder" and not both:
        raise UserError(
            f"routing.granularity: encoder needs a backbone with an encoder and a decoder; {_name(model)} has one stack"
        )
    if wanted in ("auto", "encoder"):
        if "sequence" not in protocol.granularities:
            wanted = protocol.granularities[0]
        elif stack == "decoder" and both and (causal or wanted == "encoder"):
            wanted = "encoder"
        else:
            wanted = "segment" if causal else "sequence"
    if wanted not in protocol.granularities:
        raise UserError(
            f"routing.granularity: {protocol.name} does not allow {wanted}; "
            f"it allows {', '.join(protocol.granularities)}"
        )
    if wanted == "sequence" and causal:
        raise UserError(
            f"routing.granularity: sequence would let tokens of {_name(model)}, which generates, be routed by their "
            "future; use auto, segment or token"
        )
    return cast(Granularity, wanted)


def _check_choice(
    protocol: Protocol, routing: RoutingConfig, *, causal: bool, model: PreTrainedModel
) -> None:
    if routing.router != "expert-choice":
        return
    if protocol.form != "outputs":
        raise UserError(
            f"routing.router: expert-choice lets experts take tokens, and {protocol.name} merges weights: use it with "
            "smoe, or linear or cosine"
        )
    if causal:
        raise UserError(
            f"routing.router: expert-choice would let tokens of {_name(model)}, which generates, be routed by their "
            "future: an expert takes the best tokens of a whole sequence; use linear or cosine"
        )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def donors_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the name and the SHA-256 of each donor of a model's experts; none where they have none."""
    return list((getattr(model.config, KEY, None) or {}).get(DONORS) or ())


def versions() -> dict[str, str]:
    """Return the versions of the packages that a saved model depends on."""
    return {name: _version(name) for name in PACKAGES}


def stamped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with this format and these versions."""
    return {**saved, "format": FORMAT, "versions": versions()}


def plan_of_entry(saved: Any) -> Plan:
    """Return the plan of an entry.

    Raises:
        UserError: its format is newer or its content unknown; names the versions that wrote it.
    """
    if not isinstance(saved, Mapping):
        raise UserError(
            f"the entry `{KEY}` of its config.json is {saved!r:.80}: expected a mapping with the plan"
        )
    check_format(saved, what=f"the entry `{KEY}` of its config.json")
    try:
        plan = plan_of(saved)
        PROTOCOLS.get(plan.merging.protocol)
        return plan
    except UserError as error:
        raise UserError(
            f"the entry `{KEY}` of its config.json says what this version of camex_ft does not know: {error}\n"
            f"It was {written_by(saved)}; this is camex_ft {_version('camex_ft')}. If that one is newer: install it"
        ) from error


def check_format(saved: Mapping[str, Any], *, what: str) -> None:
    """Raise `UserError` unless this version reads the format; an entry in memory has none yet."""
    number = saved.get("format", 0)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        raise UserError(
            f"{what} is of format {number!r:.40}, {written_by(saved)}; this is camex_ft {_version('camex_ft')}, which "
            f"reads formats up to {FORMAT}: " + ("install that version" if newer else "the file is damaged")
        )


def written_by(saved: Any) -> str:
    """Return "written by camex_ft 0.1.0, torch ..." with the versions that the entry holds."""
    said = saved.get("versions") if isinstance(saved, Mapping) else None
    known = [f"{name} {said[name]}" for name in PACKAGES if name in said] if isinstance(said, Mapping) else []
    return "written by " + (", ".join(known) or "a version of camex_ft that does not say which")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def recast(config: PreTrainedConfig, kind: type[ConfigKind]) -> ConfigKind:
    """Return a shallow copy of a configuration as an object of another class, with the same values."""
    recast_config = object.__new__(kind)
    recast_config.__dict__.update(config.__dict__)
    recast_config.__dict__.pop("model_type", None)  # the class's own; a loaded configuration repeats it
    return recast_config


def plain_kind(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """Return the class of a configuration, or of an upcycled model's the class that it was made from."""
    return getattr(type(config), "plain", type(config))


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration as of the dense model: of the plain class, without the entry ``camex``."""
    plain = recast(copy.deepcopy(config), plain_kind(config))
    plain.__dict__.pop(KEY, None)
    plain.architectures = [name.removeprefix(NAME) for name in plain.architectures or ()] or None
    return plain
