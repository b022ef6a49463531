"""Requirements of a run from outside the package that this machine lacks, found before any work is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from camex_ft.config import gguf, training_arguments
from camex_ft.config.backbones import EMBEDDED, NEW, PACKAGE, bare, in_package, is_gguf, near_file
from camex_ft.config.problems import Key
from camex_ft.config.schema import ADAPTER, BASES, CHECKPOINTS, Config
from camex_ft.config.shipped import expand
from camex_ft.utils import hub, registry
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.system import Environment

Lack = tuple[Key, str]


def local_backbone(spec: str) -> Path | None:
    """Return the folder or GGUF file that a backbone's name means, or None for a hub id, a package or an embedded one.

    A leading ``new:`` makes no difference.
    """
    spec = spec.removeprefix(NEW)
    if spec.startswith((EMBEDDED, PACKAGE)):
        return None
    path = expand(spec)
    looks_local = (
        spec.startswith((".", "/", "~")) or spec.count("/") > 1 or is_gguf(spec) or os.path.isdir(path)
    )
    return path if looks_local else None


def missing_from_hub(config: Config, environment: Environment) -> list[str]:
    """Return, in words for a message, what a run needs from the hub and can get neither there nor from its cache."""
    missing = []
    backbone, new = config.backbone.removeprefix(NEW), config.backbone.startswith(NEW)
    hub_id = local_backbone(backbone) is None and not backbone.startswith((EMBEDDED, PACKAGE))
    cached = environment.architecture if new else environment.model
    if hub_id and not cached(backbone) and not environment.hub():
        missing.append(f"the backbone {backbone}")
    if config.data.source == "hub":
        task = registry.TASKS.get(config.task.id)
        if not environment.data(task.hub, task.configuration) and not environment.hub():
            missing.append(f"the data set {task.hub} ({task.configuration})")
    return missing


def lacking(config: Config, environment: Environment) -> Iterator[Lack]:
    """Yield everything that a resolved configuration needs and this machine lacks, with the key that needs it."""
    missing = missing_from_hub(config, environment)
    wrong = _wrong_backbone(config.backbone)
    if wrong:
        yield ("backbone",), wrong
    if missing and not (wrong and missing[0].startswith("the backbone")):
        own = ("backbone",) if missing[0].startswith("the backbone") else ("data", "source")
        yield ("profile",) if config.profile == "paper" else own, _three_ways(config, missing)
    yield from _donors(config)
    if config.data.source == "disk" and config.data.path is not None:
        yield from _folder(("data", "dir"), config.data.path)
    if config.training.resume not in ("auto", "never") and not os.path.isdir(expand(config.training.resume)):
        hint = nearest(config.training.resume, ("auto", "never"))
        there = f"there is no folder '{config.training.resume}'.{hint}"
        yield ("training", "resume"), f"expected auto, never or a checkpoint's folder, and {there}"
    for name in training_arguments.missing_reporters((config.training.model_extra or {}).get("report_to")):
        yield (
            ("training", "report_to"),
            f"the package of {name} is not installed: install it, or leave {name} out",
        )
    yield from _writable(("output", "dir"), config.output.path)


def _donors(config: Config) -> Iterator[Lack]:
    """Yield the donors, and the sources of their texts, that are not there."""
    upcycle, routing = config.upcycle, config.routing
    if upcycle.init == CHECKPOINTS:
        specs = [("from", donor) for donor in upcycle.donors]
        specs += [("base", upcycle.base)] if upcycle.base not in BASES else []
        for key, spec in specs:
            wrong = _wrong_backbone(spec.removeprefix(ADAPTER))
            if wrong:
                yield ("upcycle", key), wrong
    if routing.init == "fit" and not isinstance(routing.fit.sources, str):
        for place in routing.fit.sources:
            path = expand(place)
            if not os.path.exists(path):
                yield ("routing", "fit", "from"), f"there is no file or folder '{place}'.{_near(path)}"


def _wrong_backbone(spec: str) -> str:
    """Return the fault of a backbone's name, or of the package, folder or GGUF file that it means; "" for none."""
    try:
        name = bare(spec)
        path = in_package(name) if name.startswith(PACKAGE) else local_backbone(name)
        if path is not None and is_gguf(path) and os.path.isfile(path):
            gguf.check(path)
            return ""
    except UserError as error:
        return str(error)
    if path is None:
        return (
            ""
            if name.startswith(EMBEDDED) or hub.is_id(name)
            else f"'{name}' is neither a folder nor a hub id such as google-t5/t5-base"
        )
    if is_gguf(path) and not os.path.isdir(path):
        return f"there is no file '{name}'.{near_file(path)}"
    return "" if os.path.isdir(path) else f"there is no folder '{name}'.{_near(path)}"


def _three_ways(config: Config, missing: list[str]) -> str:
    task = registry.TASKS.get(config.task.id)
    backbone = config.backbone.removeprefix(NEW)
    own = backbone in registry.EMBEDDED.names()
    hint = f"For the package's own, write backbone={EMBEDDED}{backbone}. " if own else ""
    instead = "profile=embedded" if config.profile == "paper" else "backbone=auto data.source=auto"
    return (
        f"the run needs {' and '.join(missing)}; the Hugging Face hub does not answer and its cache "
        f"does not hold it. {hint}Three ways to provide it: (1) the hub cache: where there is a network, run "
        f"`hf download {backbone}` and `hf download --repo-type dataset {task.hub}`, then copy the cache "
        "here or let HF_HOME point to it; (2) data.dir=FOLDER with the train, validation and test files; "
        f"(3) backbone=FOLDER of a local checkpoint, beside (1) or (2) for the data. Or {instead}, which needs nothing."
    )


def _folder(key: Key, path: Path) -> Iterator[Lack]:
    if not os.path.exists(path):
        yield key, f"there is no folder '{path}'.{_near(path)}"
    elif not os.path.isdir(path):
        yield key, f"expected a folder, and '{path}' is a file"
    elif not os.access(path, os.R_OK | os.X_OK):
        yield key, f"the folder '{path}' cannot be read: check its permissions"


def _writable(key: Key, path: Path) -> Iterator[Lack]:
    runs = path / "runs"
    standing = next(parent for parent in (runs, path, *path.parents) if os.path.exists(parent))
    if standing == runs and not os.path.isdir(runs):
        yield key, f"'{path}' cannot be written: expected a folder, and '{runs}' is a file"
    elif not os.path.isdir(standing):
        yield key, f"expected a folder, and '{standing}' is a file"
    elif not os.access(standing, os.W_OK | os.X_OK):
        yield key, f"'{path}' cannot be written: no permission in '{standing}'"
    else:
        try:  # permissions alone do not tell, as of a file system that takes no files
            with tempfile.TemporaryFile(dir=standing):
                pass
        except OSError as error:
            yield key, f"'{path}' cannot be written: {error.strerror or error} in '{standing}'"


def _near(path: Path) -> str:
    parent = path.parent
    return (
        nearest(path.name, (p.name for p in parent.iterdir() if p.is_dir())) if os.path.isdir(parent) else ""
    )
