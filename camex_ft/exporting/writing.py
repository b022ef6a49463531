"""An export's folder: model, tokenizer, numbers and card, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft import upcycling
from camex_ft.exporting.show import numbers, sections
from camex_ft.results.card import NAME, card
from camex_ft.results.record import dumps
from camex_ft.results.run_folder import full_disk
from camex_ft.tasks.base import Task
from camex_ft.utils.durable import unfinished, whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import writing

if TYPE_CHECKING:
    from camex_ft.exporting.measure import Exported

NUMBERS = "export.json"


def check_target(target: Path) -> Path:
    """Return a folder's path, where a link leads to; `UserError` unless it is new or empty and can be written.

    It is replaced as a whole, so that what holds it has to be writable.
    """
    with writing(target):  # also what its name alone keeps from being written
        target = target.expanduser()
        if target.is_dir():
            target = target.resolve()
        with suppress(FileNotFoundError):
            unfinished(target).lstat()
        empty = target.is_dir() and not any(target.iterdir())
        if empty and target.is_mount():
            raise ValueError("it is a file system of its own; expected a new folder in it")
        if empty or not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                return target
    raise UserError(f"{target} is there already: expected a new or empty folder, so that nothing is mixed")


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    exported: Exported,
    head: str,
    license: str | None,
    task: Task | None = None,
) -> None:
    """Write the folder.

    Raises:
        UserError: there is no room.
    """
    split = f"{primary_split(exported)}_"
    text = card(
        exported.record,
        head=head,
        task=task,
        form="adapter" if upcycling.adapters.has_adapter(model) else exported.form,
        metrics={k.removeprefix(split): v for k, v in exported.after.items() if k.startswith(split)},
        license=license,
        sections=sections(exported),
    )
    with full_disk(str(target)), whole_folder(target) as folder:
        upcycling.save(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / NUMBERS).write_text(dumps(numbers(exported), indent=2) + "\n", encoding="utf-8")
        (folder / NAME).write_text(text, encoding="utf-8")
        check_target(target)  # again: it may have been filled meanwhile


def primary_split(exported: Exported) -> str:
    """Return the name of the validation split that decides."""
    metric = exported.record.metrics.primary
    return next(name for name in exported.before if name.endswith(f"_{metric}")).removesuffix(f"_{metric}")
