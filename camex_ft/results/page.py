"""The tables of a page: ``python -m camex_ft.results.page PAGE RECORDS`` writes them anew from committed records.

What stands between ``<!-- FOLDER [FOLDER ...] -->`` and ``<!-- end -->`` is the table of the records in these folders
of RECORDS, and between ``<!-- legend -->`` and ``<!-- end -->`` what the signs of all of them mean.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from camex_ft.results.cells import legend
from camex_ft.results.render import WRITERS, render, table_of
from camex_ft.results.tables import Table
from camex_ft.utils.durable import write_atomically

BLOCK = re.compile(r"<!-- (?P<names>(?!end )[\w -]+) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)
LEGEND = "legend"


def refresh(page: str, records: Path | str) -> str:
    """Return the page with the text of its blocks made anew; blocks of other names stay as they are."""
    tables = dict(_tables(page, Path(records)))

    def made(block: re.Match[str]) -> str:
        names = block["names"]
        if names == LEGEND:
            text = WRITERS["md"].legend(legend(list(tables.values())))
        elif names in tables:
            text = render([tables[names]], "md", explained=False)
        else:
            return block[0]
        return f"<!-- {names} -->\n{text}<!-- end -->"

    return BLOCK.sub(made, page)


def folders_of(page: str, records: Path | str) -> set[str]:
    """Return the folders of records that a page has tables of."""
    return {name for names, _ in _tables(page, Path(records)) for name in names.split()}


def _tables(page: str, records: Path) -> Iterator[tuple[str, Table]]:
    for block in BLOCK.finditer(page):
        folders = [records / name for name in block["names"].split()]
        if all(folder.is_dir() for folder in folders):
            yield block["names"], table_of(folders)


if __name__ == "__main__":
    file, folder = map(Path, sys.argv[1:])
    write_atomically(file, refresh(file.read_text(encoding="utf-8"), folder))
