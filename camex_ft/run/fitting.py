"""Check a configuration against what files say: the backbone's, before its weights are read or a model is built, and
the headers of the data's."""

from __future__ import annotations

from pathlib import Path

from camex_ft.backbones import source
from camex_ft.backbones.base import family_of, select_layers
from camex_ft.config import Config, ConfigErrors, Problem
from camex_ft.config.backbones import EMBEDDED
from camex_ft.tasks.base import Task
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError


def check_files(settled: Config) -> None:
    """Check the files that a resolved configuration names, as far as that is quick: no weights, no rows.

    Raises:
        ConfigErrors: all that is wrong.
    """
    task, data = registry.TASKS.get(settled.task.id), settled.data
    problems = []
    try:
        check_backbone(settled, task)
    except UserError as error:
        problems.append(Problem(str(error), settled._origins.get(("backbone",))))
    try:
        if data.source == "disk" and data.path is not None:
            from camex_ft.data.split_files import check_headers

            check_headers(task, data.path, data.splits)
    except UserError as error:
        problems.append(Problem(str(error), settled._origins.get(("data", "dir"))))
    if problems:
        raise ConfigErrors(problems)


def check_backbone(settled: Config, task: Task, path: Path | None = None) -> None:
    """Check the files of a backbone, its type and head, lengths against its positions, and `upcycle.layers`.

    Args:
        settled: the resolved configuration.
        task: its task.
        path: of the backbone's files; without it a hub id is not looked at, which would take a network.

    Raises:
        UserError: what is wrong, and what was expected.
    """
    spec, options = settled.backbone, task.backbone_options()
    form = source.check(spec)
    if (form == "hub" and path is None) or (form == "embedded" and _surely_fits(settled, task)):
        return
    from camex_ft.backbones.loading import configuration, skeleton

    config = configuration(spec, head=task.head, path=path, **options)
    task.check_backbone(config, settled.task)
    layers = settled.upcycle.layers
    if not isinstance(layers, str) and registry.PROTOCOLS.get(settled.merging.protocol).form != "dense":
        model = skeleton(spec, head=task.head, path=path, **options)
        select_layers(family_of(model).ffns(model), layers)


def _surely_fits(settled: Config, task: Task) -> bool:
    """Return whether an embedded backbone needs no check of its configuration, which would import transformers."""
    plain = type(task).check_backbone is Task.check_backbone and isinstance(settled.upcycle.layers, str)
    lengths = [getattr(settled.task, key) for key in settled.task.lengths]
    tiny = registry.EMBEDDED.get(settled.backbone.removeprefix(EMBEDDED))
    return plain and bool(tiny.suits(task.head, max(lengths, default=0)))
