"""Write the tables and pictures of a page from committed records.

    python scripts/docs/results_page.py docs/results.md results/records

A block of the page ends with ``<!-- end -->`` and begins with one of these lines:

    <!-- FOLDER [FOLDER ...] -->           the table of the records in these folders
    <!-- legend -->                        the legend of all tables
    <!-- pictures FOLDER [NAME ...] -->    the pictures of the records in the folder, all or those that are named

Pictures also show the inspection in ``FOLDER/inspection/inspection.json`` if there is one. Their files are in
``pictures/FOLDER/`` beside the page and hold a digest of their data.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from camex_ft.results.entries import entries_of, read_results
from camex_ft.results.plots import Choice, choose, is_stale, of_inspection, save, source
from camex_ft.results.render import WRITERS, legend, render, table_of
from camex_ft.results.tables import Table
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.escaping import markdown

BLOCK = re.compile(r"<!-- (?P<names>(?!end )[\w. -]+) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)
LEGEND, PICTURES = "legend", "pictures"
INSPECTED = "inspected-"  # prefix of the files that show an inspection


def write_page(page: Path, records: Path) -> list[Path]:
    """Write the tables and pictures of a page; return the picture files."""
    write_atomically(page, with_tables(page.read_text(encoding="utf-8"), records))
    return write_pictures(page, records)


# -- tables -----------------------------------------------------------------------------------------------------------


def with_tables(text: str, records: Path) -> str:
    """Return the text of a page with new tables and legend; other blocks stay as they are."""
    tables = dict(_tables(text, records))

    def fresh(block: re.Match[str]) -> str:
        names = block["names"]
        if names == LEGEND:
            content = WRITERS["md"].legend(legend(list(tables.values())))
        elif names in tables:
            content = render([tables[names]], "md", explained=False)
        else:
            return block[0]
        return f"<!-- {names} -->\n{content}<!-- end -->"

    return BLOCK.sub(fresh, text)


def folders_of(text: str, records: Path) -> set[str]:
    """Return the folders of records that have a table on the page."""
    return {name for names, _ in _tables(text, records) for name in names.split()}


def _tables(text: str, records: Path) -> Iterator[tuple[str, Table]]:
    for block in BLOCK.finditer(text):
        folders = [records / name for name in block["names"].split()]
        if all(folder.is_dir() for folder in folders):
            yield block["names"], table_of(folders)


# -- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data of some pictures: `data` enters the digest of their files, whose names begin with `prefix`."""

    prefix: str
    data: Any
    draw: Callable[[], Choice]


def write_pictures(page: Path, records: Path) -> list[Path]:
    """Draw the pictures of a page, update the blocks that show them, and return the files."""
    written = list[Path]()

    def fresh(block: re.Match[str]) -> str:
        kind, *names = block["names"].split()
        if kind != PICTURES:
            return block[0]
        folder, *chosen = names
        target = page.parent / PICTURES / folder
        for old in target.glob("*.png"):
            old.unlink()
        lines = []
        for src in sources(records / folder):
            choice = src.draw()
            for name, figure in choice.figures.items():
                if not chosen or name in chosen:
                    file = save(figure, target / f"{src.prefix}{name}.png", source=src.data)
                    caption = markdown(choice.captions[name])
                    lines.append(
                        f"![{caption}]({file.relative_to(page.parent).as_posix()})\n\n*{caption}*\n\n"
                    )
                    written.append(file)
        return f"<!-- {block['names']} -->\n{''.join(lines)}<!-- end -->"

    write_atomically(page, BLOCK.sub(fresh, page.read_text(encoding="utf-8")))
    return written


def stale_pictures(page: Path, records: Path) -> list[str]:
    """Return the files and blocks that `write_pictures` would change."""
    stale = list[str]()
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        kind, *names = block["names"].split()
        if kind != PICTURES:
            continue
        files = sorted((page.parent / PICTURES / names[0]).glob("*.png"))
        paths = [file.relative_to(page.parent).as_posix() for file in files]
        if not files or sorted(re.findall(r"\]\((\S+\.png)\)", block["text"])) != paths:
            stale.append(f"the block {names[0]}")
        data = {src.prefix: src.data for src in sources(records / names[0])}
        for file, path in zip(files, paths, strict=True):
            prefix = INSPECTED if file.name.startswith(INSPECTED) else ""
            if prefix not in data or is_stale(file, data[prefix]):
                stale.append(path)
    return stale


def sources(folder: Path) -> Iterator[Source]:
    """Yield the data of the pictures of a folder of records."""
    entries = entries_of(read_results(folder))
    tasks = list(dict.fromkeys(entry.task for entry in entries))
    title = tasks[0] if len(tasks) == 1 else folder.name
    yield Source(prefix="", data=source(entries), draw=partial(choose, entries, title=title))
    file = folder / "inspection" / "inspection.json"
    if file.is_file():
        numbers = json.loads(file.read_text(encoding="utf-8"))
        yield Source(prefix=INSPECTED, data=numbers, draw=partial(of_inspection, numbers))


if __name__ == "__main__":
    for path in write_page(*map(Path, sys.argv[1:])):
        print(path)
