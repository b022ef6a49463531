"""The manifest of a checkpoint: which files it has, how long they are, their SHA-256, and which versions wrote them."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from camex_ft.utils.durable import open_regular
from camex_ft.utils.folders import read_json

MANIFEST = "manifest.json"
FORMAT = 1  # of a checkpoint's folder; higher where an older version would read it wrongly
PACKAGES = ("camex_ft", "torch", "transformers")
BLOCK = 1 << 20


def write(folder: Path, *, extra: bool = False) -> None:
    """Write the manifest of all files in a folder.

    Args:
        folder: of a checkpoint that is complete.
        extra: it is there to go on from and not one that the settings ask for.
    """
    files = {
        name: {"size": path.stat().st_size, "sha256": digest(path)} for name, path in _files(folder).items()
    }
    made = {"format": FORMAT, "extra": extra, "versions": versions(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of what writes a checkpoint."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            found[name] = "unknown"
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    made = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            made.update(block)
    return made.hexdigest()


def identity(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which has those of all files; of none, that of its path."""
    path = folder / MANIFEST
    return digest(path) if path.is_file() else hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, or an empty one where there is none that can be read."""
    try:
        made = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    if not isinstance(made, dict) or not isinstance(made.get("format"), int):
        return {}
    files, by = made.get("files"), made.get("versions", {})
    whole = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    return made if whole and isinstance(by, dict) else {}


def fault(folder: Path) -> str | None:
    """Return what the names and sizes of a checkpoint's files say is wrong with it, or None."""
    made = read(folder)
    if not made:
        return (
            f"it has no {MANIFEST} that can be read: it was cut short, or another program or version wrote it"
        )
    if made["format"] > FORMAT:
        by = made.get("versions", {}).get("camex_ft", "unknown")
        return f"it is of format {made['format']}, from camex_ft {by}, and this version reads up to {FORMAT}"
    there, listed = _files(folder), made["files"]
    for name in listed:
        if name not in there:
            return f"it has no {name}"
        size = there[name].stat().st_size
        if size != listed[name].get("size"):
            return f"its {name} cannot be read: it has {size} bytes and was written with {listed[name].get('size')}"
    more = sorted(there.keys() - listed.keys())
    return f"its {more[0]} is not of it" if more else None


def damage(folder: Path) -> str | None:
    """Return which file's contents are not those that were written, or None; all are read."""
    for name, entry in read(folder)["files"].items():
        try:
            found = digest(folder / name)
        except OSError as error:
            return f"its {name} cannot be read: {error.strerror or error}"
        if found != entry.get("sha256"):
            return f"its {name} is damaged: its SHA-256 is not the one that was written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Return all files in a folder by their names, but for the manifest; links and the like count as files."""
    found = {}
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in [*names, *links]:
            path = Path(parent) / name
            found[path.relative_to(folder).as_posix()] = path
    found.pop(MANIFEST, None)
    return found
