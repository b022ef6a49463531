"""Loads from the hub as asked, a line of JSON each: {home, what, words} in; {code, said, value, seconds} out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import close_session

from camex_ft.backbones.loading import load
from camex_ft.cli import app
from camex_ft.data import sources
from camex_ft.utils import hub, system
from camex_ft.utils.errors import guard
from camex_ft.utils.registry import TASKS


def use(home: Path) -> None:
    """Take the caches below `home`, and forget what was found out before: as in a process of its own."""
    constants.HF_HOME = str(home)
    constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = str(home / "hub")
    constants.HF_ASSETS_CACHE = str(home / "assets")
    datasets.config.HF_DATASETS_CACHE = home / "datasets"
    datasets.config.HF_CACHE_HOME = str(home)
    system.hub_answers.cache_clear()
    for made in HfFileSystem._cache.values():  # lists of files that it has seen
        made.invalidate_cache()
    HfFileSystem.clear_instance_cache()
    hub.SECONDS = 1.0
    close_session()


def data(name: str, *overrides: str) -> Any:
    splits = sources.load(TASKS.get(name), source="hub")
    return {split: [len(rows), sources.fingerprint({split: rows})] for split, rows in splits.items()}


def backbone(spec: str, head: str = "base") -> Any:
    model, _ = load(spec, head=head, num_labels=2 if head == "sequence-classification" else None)
    return sum(float(p.detach().double().sum()) for p in model.parameters())


def command(*words: str) -> Any:
    return app([*words], standalone_mode=False)


WAYS = {"data": data, "backbone": backbone, "command": command}


def answer(home: str, what: str, words: list[str]) -> dict[str, Any]:
    use(Path(home))
    said, value, start = io.StringIO(), [], time.monotonic()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = guard(lambda: value.append(WAYS[what](*words)))
    logging.getLogger().removeHandler(handler)
    return {
        "code": code,
        "said": said.getvalue(),
        "value": (value or [None])[0],
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    out = sys.stdout
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line)), default=str), file=out, flush=True)
