"""Find the runs of an experiment: of the same settings, data and backbone content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from camex_ft.config import Config, config_hash, load_config
from camex_ft.config.identity import hash_by_name
from camex_ft.results.record import Record
from camex_ft.results.run_folder import RunFolder, find_done
from camex_ft.utils.errors import UserError

SHOWN = 12  # digits of a SHA-256
HASH = re.compile(r".*--[0-9a-f]{8}")  # of a run folder's name


def find_folder(output: Path, name: str) -> str | None:
    """Return the name of the run folder in `output` that has the hash of `name`, a finished one first, or None.

    The label of the backbone is ignored: the same content may have another name.
    """
    folders = _matching(output, name, 2)
    if not folders:
        return None
    return min(folders, key=lambda folder: (find_done(folder) is None, folder.name != name)).name


def may_be_of(folder: Path, backbone: str | None) -> bool:
    """Return whether the record in a folder, if there is one, allows this content of the backbone."""
    if not folder.is_dir():
        return False
    record = find_done(folder)
    return record is None or record.model.backbone_sha256 in (None, backbone)


def has_settings(record: Record, settled: Config) -> bool:
    """Return whether a run had the settings of a configuration, regardless of data and backbone content."""
    data, content = record.data.sha256, record.model.backbone_sha256
    hashes = {hash_by_name(settled, data=data)}
    if content is not None:
        hashes.add(config_hash(settled, data=data, backbone=content))
    return record.run.name.rpartition("--")[2] in hashes


def changes(settled: Config, name: str, *, data: str, backbone: str | None) -> Iterator[str]:
    """Yield a line for each run with the same settings and another hash: its data or backbone changed since.

    Args:
        settled: the resolved configuration.
        name: of the run to start.
        data, backbone: SHA-256 of its data and of its backbone's content.
    """
    for folder in _matching(settled.output.path, name, -1):
        if folder.name == name:
            continue
        record = find_done(folder)
        if record is None:
            if _was_interrupted(folder, settled):
                yield (
                    f"{folder.name} was interrupted. It has the same settings but other data or another backbone, "
                    "so this run starts from the beginning"
                )
            continue
        if not has_settings(record, settled):
            continue
        parts = [("data", record.data.sha256, data), ("backbone", record.model.backbone_sha256, backbone)]
        changed = [
            f"the {part} changed since (SHA-256 {before[:SHOWN]} then, {now[:SHOWN]} now)"
            if before is not None
            else f"its record does not say which content the {part} had (SHA-256 {now[:SHOWN]} now)"
            for part, before, now in parts
            if now is not None and before != now
        ]
        if changed:
            yield f"{record.run.name} has the same settings, but {' and '.join(changed)}: running again"


def differs(checkpoint: Path, *, data: str, backbone: str | None) -> bool:
    """Return whether a checkpoint is known to belong to a run on other data or of another backbone.

    This is known only for a checkpoint in the folder of its run.
    """
    folder = checkpoint.resolve().parent.parent
    settled = _settings(folder)
    if settled is None or not HASH.fullmatch(folder.name):
        return False
    hashes = (config_hash(settled, data=data, backbone=backbone or ""), hash_by_name(settled, data=data))
    return not folder.name.endswith(hashes)


def _was_interrupted(folder: Path, settled: Config) -> bool:
    """Return whether a run without a record has checkpoints, and the settings of a configuration."""
    run = RunFolder(folder)
    other = _settings(folder) if run.checkpoints.is_dir() and any(run.checkpoints.iterdir()) else None
    return other is not None and hash_by_name(other, data="-") == hash_by_name(settled, data="-")


def _settings(folder: Path) -> Config | None:
    """Return the configuration in the folder of a run, or None without a readable one."""
    try:
        return load_config(RunFolder(folder).config)
    except UserError:
        return None


def _matching(output: Path, name: str, part: int) -> list[Path]:
    """Return the run folders in `output` whose names equal `name` except in one part."""
    parts = name.split("--")
    parts[part] = "*"
    folders = (output / "runs").glob("--".join(parts))
    return sorted(path for path in folders if path.is_dir() and path.name.count("--") == len(parts) - 1)
