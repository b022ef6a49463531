"""From a file to a settled configuration: `load_config`, then `resolve`, which applies a profile.

    built-in defaults < profile < extends < file < overrides

A profile holds defaults that lie under what the user writes. It is a shipped file, `profiles/<profile>.yaml`, or
`profiles/<profile>-<suite>.yaml` where a suite has one of its own. A key that the user sets wins over it; the value
`auto` counts as not set.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from camex_ft.config.backbones import EMBEDDED
from camex_ft.config.needs import lacking, missing_from_hub
from camex_ft.config.problems import ConfigErrors, Problem
from camex_ft.config.reading import Document, compose, merge
from camex_ft.config.rules import mixture_of, options_of
from camex_ft.config.schema import CHECKPOINTS, OWN_EXPERTS, Config, MergingConfig, task_kind
from camex_ft.config.shipped import ROOT
from camex_ft.config.validation import check
from camex_ft.utils.registry import PROTOCOLS
from camex_ft.utils.system import Environment

PROFILES = ("paper", "embedded")
AUTO = "auto"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return what the file at `path` (or the shipped configuration of that name) says, with overrides applied.

    It does not hold the profile's defaults yet: `resolve` puts them under what was written. Combinations are checked
    with them all the same: a problem under every profile that the run may have is reported here.

    Args:
        path: a YAML file, or a name from ``camex-ft ls configs``.
        overrides: ``a.b=value``, the value in YAML; later ones win.

    Raises:
        ConfigErrors: everything that is wrong, with files and lines.
    """
    written = compose(path, overrides)
    if not written.values and written.problems:
        raise ConfigErrors(written.problems)
    problems_by_profile = [check(under(profile, written))[1] for profile in candidates(written)]
    problems = _common(problems_by_profile)
    if problems:
        raise ConfigErrors(problems)
    return check(written)[0]


def _common(problems_by_profile: list[list[Problem]]) -> list[Problem]:
    """Return the problems that occur under every profile that the run may have."""
    first, *others = problems_by_profile
    return [
        p
        for p in first
        if all(any(p.key == q.key and p.origin == q.origin for q in other) for other in others)
    ]


def resolve(
    config: Config, environment: Environment | None = None, *, needs: bool = True
) -> tuple[Config, str]:
    """Return `config` with its profile applied and nothing left to `auto`, and in words which profile, and why.

    `routing.granularity` stays as written: it depends on the backbone's stacks. Resolving twice changes nothing.

    Args:
        config: what was written.
        environment: what the machine has.
        needs: see to it that all that a run needs is there: data, weights, folders.

    Raises:
        ConfigErrors: combinations that can't be, or something that the run needs and this machine lacks.
    """
    environment = environment or Environment()
    written = Document(config.model_dump(exclude_unset=True), dict(config._origins))
    profile, reason = _choose(config, written, environment)
    document = under(profile, written)
    resolved, problems = check(document)
    if problems:
        raise ConfigErrors(_named(problems, profile))
    lacking_here = lacking(resolved, environment) if needs else ()
    lacks = [Problem(message, document.origin(key), key) for key, message in lacking_here]
    if lacks:
        raise ConfigErrors(lacks)
    return _complete(resolved), f"profile {profile}: {reason}"


def under(profile: str, written: Document) -> Document:
    """Return the document that `written` makes with a profile's defaults under it."""
    task = written.values.get("task")
    suite = task.get("suite", "glue") if isinstance(task, dict) else "glue"
    own = ROOT / "profiles" / f"{profile}-{suite}.yaml"
    defaults = compose(own if own.is_file() else ROOT / "profiles" / f"{profile}.yaml")
    _drop_options_of_other_kinds(defaults, written)
    document = merge(defaults, _without_auto(written))
    if document.values.get("profile") == AUTO:
        document.values["profile"] = profile
    experts = _experts_of_donors(_section(written, "upcycle"))
    if experts and "experts" not in _section(written, "merging"):
        document.values.setdefault("merging", {})["experts"] = experts
    _set_own_experts(document, written)
    data = _section(written, "data")
    if data.get("source", AUTO) == AUTO and data.get("dir") is not None:
        document.values.setdefault("data", {})["source"] = "disk"
    return document


def _experts_of_donors(upcycle: dict[str, Any]) -> int:
    """Return the number of experts that the donors of a section give; 0 without donors, or where it is faulty."""
    donors, each = upcycle.get("from"), upcycle.get("each", 1)
    listed = upcycle.get("init") == CHECKPOINTS and isinstance(donors, (list, tuple)) and type(each) is int
    return len(cast("list[Any]", donors)) * each if listed else 0


def _set_own_experts(document: Document, written: Document) -> None:
    """Set the numbers that a mixture as the start determines, where they were not written."""
    merging = _section(document, "merging")
    protocol = merging.get("protocol", MergingConfig().protocol)
    known = protocol in PROTOCOLS.names() and PROTOCOLS.get(protocol).form != "dense"
    if _section(document, "upcycle").get("init") != OWN_EXPERTS or not known:
        return
    described = mixture_of(str(document.values.get("backbone", "")), fetch=True)
    if described is None or described[1] is None:
        return
    mixture, said = described[1], _section(written, "merging")
    own = {"experts": mixture.experts, "top_k": mixture.top_k}
    document.values["merging"] = {**merging, **{k: v for k, v in own.items() if said.get(k) is None}}
    if PROTOCOLS.get(protocol).form == "outputs" and "normalise" not in _section(written, "routing"):
        document.values["routing"] = {**_section(document, "routing"), "normalise": mixture.normalise}


def _drop_options_of_other_kinds(defaults: Document, written: Document) -> None:
    """Take out the profile's options of tasks that are of another kind than the task that was written."""
    task = defaults.values.get("task", {})
    kind = task_kind({**task, **_section(written, "task")})
    if kind is not None:
        defaults.values["task"] = {key: value for key, value in task.items() if key in kind.model_fields}


def candidates(written: Document) -> tuple[str, ...]:
    """Return the profiles that `written` may turn out to have."""
    said = written.values.get("profile", AUTO)
    return (said,) if said in PROFILES else ("embedded",) if _embedded(written) else PROFILES


def _embedded(written: Document) -> str:
    """Return the key that asks for something embedded, which the profile `paper` does not take, or nothing."""
    if str(written.values.get("backbone")).startswith(EMBEDDED):
        return "backbone"
    return "data.source" if _section(written, "data").get("source") == "embedded" else ""


def _choose(config: Config, written: Document, environment: Environment) -> tuple[str, str]:
    if config.profile != AUTO:
        without_cuda = config.profile == "paper" and not environment.cuda()
        return config.profile, "asked for" + ("; without a CUDA device, on the CPU" if without_cuda else "")
    if _embedded(written):
        return "embedded", f"{_embedded(written)} is embedded"
    if not environment.cuda():
        return "embedded", "there is no CUDA device"
    paper, problems = check(under("paper", written))
    missing = [] if problems else missing_from_hub(paper, environment)
    if missing:
        return (
            "embedded",
            f"the Hugging Face hub does not answer, and its cache lacks {' and '.join(missing)}",
        )
    return "paper", "CUDA and all that it needs are there"


def _without_auto(written: Document) -> Document:
    """Take out the values `auto` that stand for the profile's own."""
    values = deepcopy(written.values)
    if values.get("backbone") == AUTO:
        del values["backbone"]
    if isinstance(values.get("data"), dict) and values["data"].get("source") == AUTO:
        del values["data"]["source"]
    return Document(values, written.origins, written.problems)


def _complete(config: Config) -> Config:
    """Write out every default, those of the protocol's options among them."""
    values = config.model_dump()
    options = values["merging"]["options"]
    values["merging"]["options"] = {**options_of(PROTOCOLS.get(config.merging.protocol)), **options}
    complete = Config.model_validate(values)
    complete._origins = config._origins
    return complete


def _section(document: Document, name: str) -> dict[str, Any]:
    section = document.values.get(name)
    return section if isinstance(section, dict) else {}


def _named(problems: list[Problem], profile: str) -> list[Problem]:
    return [Problem(f"{p.message} (profile {profile})", p.origin, p.key) for p in problems]
