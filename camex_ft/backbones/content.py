"""The content of a backbone as one SHA-256: its configuration, tokenizer and weights, wherever they are.

    digest of a file    SHA-256 over the SHA-256 of its blocks, which several threads read and hash
    digest of a folder  SHA-256 over names and digests of the files that are loaded from it

A large file is hashed once: its digest is cached in the assets cache of `huggingface_hub` (``HF_ASSETS_CACHE``,
``HF_HOME`` or ``XDG_CACHE_HOME`` say where), under its path, and holds as long as size, times and inode are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from camex_ft.backbones import source
from camex_ft.config import gguf
from camex_ft.config.backbones import NEW
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError

BLOCK = 1 << 24  # bytes; part of the definition of a file's digest
PIECE = 1 << 20  # bytes that a thread holds
THREADS = 8
LARGE = 1 << 22  # bytes from which on a digest is cached
SETTLED = 2.0  # seconds since the last change of a file, before which another one may not show in its times
HEX = re.compile(r"[0-9a-f]{64}")


class Content(NamedTuple):
    """The files of a backbone: where they are, and their digest. Both are None for an embedded backbone."""

    path: Path | None = None
    sha256: str | None = None


def read(spec: str) -> Content:
    """Return the content of the backbone `spec`; a hub id that is not in the cache is downloaded.

    Raises:
        UserError: `spec` or its files are at fault, see `source.locate` and `source.check_files`.
    """
    if source.check(spec) == "embedded":
        return Content()
    path = source.locate(spec)
    source.check_files(path, spec)
    try:
        return Content(path, digest(path, weights=not spec.startswith(NEW)))
    except OSError as error:
        raise UserError(f"backbone {spec}: {error.filename} cannot be read: {error.strerror}") from error


def digest(path: Path, *, weights: bool = True) -> str:
    """Return the SHA-256 (hex) of the files that are loaded from a folder, or of a GGUF file, wherever it is.

    Args:
        path: the folder or file, complete: see `source.check_files`.
        weights: whether weights are loaded; of a GGUF file without them the header counts.

    Raises:
        OSError: a file cannot be read.
    """
    if path.is_file():
        size = path.stat().st_size
        return _of_file(path, size if weights else min(size, gguf.read_header(path).start))
    return digest_files(_files(path, weights))


def digest_files(files: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) over the names and digests of files, whatever their order."""
    sha256 = hashlib.sha256()
    for file in sorted(files):
        sha256.update(json.dumps([file.name, _of_file(file, file.stat().st_size)]).encode())
    return sha256.hexdigest()


def _files(folder: Path, weights: bool) -> Iterable[Path]:
    """Return the files that are loaded from a folder."""
    entries = (entry for entry in folder.iterdir() if entry.is_file())
    small = [e for e in entries if any(fnmatchcase(e.name, pattern) for pattern in source.SMALL)]
    return [*small, *((folder / name for name in source.weight_files(folder)) if weights else ())]


def _of_file(path: Path, length: int) -> str:
    """Return the digest of the first `length` bytes of a file, from the cache where they are there unchanged."""
    if length < LARGE:
        return _hash(path, length)
    state = _state(path, length)
    entry = _entry(path)
    if entry is not None and (cached := _cached(entry, state)):
        return cached
    sha256 = _hash(path, length)
    changed = max(state["mtime"], state["ctime"]) / 1e9
    if entry is not None and state == _state(path, length) and time.time() - changed > SETTLED:
        with contextlib.suppress(OSError):  # without it the file is hashed again
            write_atomically(entry, json.dumps({**state, "sha256": sha256}))
    return sha256


def _hash(path: Path, length: int) -> str:
    starts = range(0, length, BLOCK)
    with ThreadPoolExecutor(min(THREADS, len(starts) or 1, os.cpu_count() or 1)) as pool:
        blocks = pool.map(lambda start: _block(path, start, min(BLOCK, length - start)), starts)
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _block(path: Path, start: int, length: int) -> bytes:
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length:
            count = file.readinto(buffer[: min(PIECE, length)])
            if not count:
                raise OSError(None, "it ends before its end: it is being written", str(path))
            sha256.update(buffer[:count])
            length -= count
    return sha256.digest()


def _state(path: Path, length: int) -> dict[str, int]:
    """Return what changes when a file does: its inode and times (ns), beside the bytes that count."""
    about = path.stat()
    return {
        "length": length,
        "size": about.st_size,
        "mtime": about.st_mtime_ns,
        "ctime": about.st_ctime_ns,
        "inode": about.st_ino,
    }


def _entry(path: Path) -> Path | None:
    """Return the cache's file for the digest of `path`, or None where there can be no cache."""
    from huggingface_hub import cached_assets_path

    try:
        folder = cached_assets_path("camex_ft", namespace="backbones", subfolder="sha256")
    except (OSError, ValueError):
        return None
    return folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"


def _cached(entry: Path, state: dict[str, int]) -> str | None:
    """Return the digest that the cache has of a file in this state, or None."""
    try:
        stored = json.loads(entry.read_bytes())
        sha256 = stored.pop("sha256")
        return sha256 if stored == state and HEX.fullmatch(sha256) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
