"""Forms of a backbone's name, the value of `backbone:`, and the checks of it that need no model.

embedded/<family>     made by the project itself
package:NAME/PATH     a folder or a .gguf file inside an installed package, which is found and not imported
./folder, ./x.gguf    a folder with config.json, safetensors weights and a tokenizer; a file that has all of them
org/name              a model id of the Hugging Face hub, from its cache or downloaded
new:SPEC              architecture and tokenizer of any of these but the first, weights drawn from the seed
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from camex_ft.config import gguf
from camex_ft.utils import hub
from camex_ft.utils.errors import UserError, nearest

EMBEDDED, PACKAGE, NEW = "embedded/", "package:", "new:"


def bare(spec: str) -> str:
    """Return `spec` without a leading ``new:``.

    Raises:
        UserError: what follows ``new:`` is nothing, is new already, or is embedded, which is always new.
    """
    if not spec.startswith(NEW):
        return spec
    rest = spec.removeprefix(NEW)
    if rest.startswith(EMBEDDED):
        raise UserError(
            f"'{spec}': the weights of an embedded backbone are drawn from the seed already: write {rest}"
        )
    if not rest.strip() or rest.startswith(NEW):
        raise UserError(f"'{spec}': expected new: and one folder, .gguf file, package:NAME/PATH or hub id")
    return rest


def is_gguf(spec: str | Path) -> bool:
    """Return whether a name is that of a GGUF file."""
    return str(spec).lower().endswith(gguf.SUFFIX)


def in_package(spec: str) -> Path:
    """Return the folder (with a config.json) or GGUF file that ``package:NAME/PATH`` means.

    Raises:
        UserError: there is no such package, or nothing of that name in it; names what there is.
    """
    name, _, inside = spec.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(f"'{spec}': expected package:NAME/PATH, NAME a top-level package as in `import NAME`")
    package = importlib.util.find_spec(name)  # finds a top-level package without running any of its code
    if package is None:
        hint = name.replace("_", "-")
        raise UserError(f"'{spec}': there is no installed package '{name}' (try: pip install {hint})")
    roots = [Path(root).resolve() for root in package.submodule_search_locations or []]
    path = PurePosixPath(inside)
    if ".." in path.parts or path.is_absolute() or "\\" in inside or not inside.isprintable():
        raise UserError(
            f"'{spec}': the path must stay inside the package ('..' and absolute paths are refused)"
        )
    for root in roots:
        place = (root / path).resolve()
        # not Path's own: it raises for a name that is too long
        there = os.path.isfile(place if is_gguf(place) else place / "config.json")
        if there and place.is_relative_to(root):
            return place
    lacks = "no such file" if is_gguf(inside) else f"no config.json in '{inside}'"
    models = sorted({name for root in roots for name in _models(root)})
    known = f" Models in it: {', '.join(models[:8])}." if models else ""
    raise UserError(f"'{spec}': package {name} has {lacks}.{nearest(inside, models)}{known}")


def _models(root: Path) -> Iterator[str]:
    """Yield what below `root` has weights: folders by their safetensors files, and GGUF files."""
    for path in root.rglob("*"):
        if path.suffix == ".safetensors":
            yield path.parent.relative_to(root).as_posix()
        elif is_gguf(path):
            yield path.relative_to(root).as_posix()


def near_file(path: Path) -> str:
    """Return a hint at the nearest GGUF file in the folder of `path`, with a list of the others."""
    there = sorted(p.name for p in path.parent.glob("*") if is_gguf(p)) if os.path.isdir(path.parent) else []
    return nearest(path.name, there) + (f" There: {', '.join(there[:8])}." if there else "")


def read_config(spec: str, *, fetch: bool = False) -> Any:
    """Return a backbone's ``config.json`` as an object with its keys as attributes; None where it is not at hand.

    Args:
        spec: name of the backbone.
        fetch: ask the hub for the file if its cache does not have it.
    """
    name = spec.removeprefix(NEW)
    if name.startswith(EMBEDDED) or is_gguf(name):
        return None
    try:
        if name.startswith(PACKAGE):
            folder = in_package(name)
        elif os.path.isdir(os.path.expanduser(name)):
            folder = Path(os.path.expanduser(name))
        elif hub.is_id(name):
            folder = hub.config_folder(name, fetch=fetch)
        else:
            return None
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UserError, hub.NotFetched, OSError, ValueError):
        return None  # reported where the backbone is checked
    return SimpleNamespace(**values) if isinstance(values, dict) else None
