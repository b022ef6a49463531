"""The pictures of a page: ``python -m camex_ft.results.gallery PAGE RECORDS`` draws them anew from committed records.

Between ``<!-- pictures FOLDER [NAME ...] -->`` and ``<!-- end -->`` stand the pictures of the records in that folder of
RECORDS, and of an inspection that lies in it (``FOLDER/inspection/inspection.json``): all of them, or those that are
named. The files are in ``pictures/FOLDER/`` beside the page. Each knows what it was drawn from, and by which code
(`plots.files`).
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
from camex_ft.results.plots import choose, is_stale, of_inspection, save, source
from camex_ft.results.plots.scenes import Choice
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.escaping import markdown

BLOCK = re.compile(
    r"<!-- pictures (?P<name>[\w-]+)(?P<chosen>(?: [\w.-]+)*) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL
)
FOLDER = "pictures"
INSPECTED = "inspected-"  # what the files' names begin with


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data that some pictures are drawn from: `data` stands for it in the files, whose names begin with `prefix`."""

    prefix: str
    data: Any
    draw: Callable[[], Choice]


def refresh(page: Path | str, records: Path | str) -> list[Path]:
    """Draw the pictures of a page's blocks, write the blocks that show them, and return the files."""
    page, written = Path(page), list[Path]()

    def made(block: re.Match[str]) -> str:
        target, chosen = page.parent / FOLDER / block["name"], block["chosen"].split()
        for old in target.glob("*.png"):
            old.unlink()
        lines = []
        for each in sources(Path(records) / block["name"]):
            choice = each.draw()
            for name, figure in choice.figures.items():
                if chosen and name not in chosen:
                    continue
                written.append(save(figure, target / f"{each.prefix}{name}.png", source=each.data))
                lines.append(shown(written[-1].relative_to(page.parent), choice.captions[name]))
        return f"<!-- pictures {block['name']}{block['chosen']} -->\n{''.join(lines)}<!-- end -->"

    write_atomically(page, BLOCK.sub(made, page.read_text(encoding="utf-8")))
    return written


def stale(page: Path | str, records: Path | str) -> list[str]:
    """Return what is not as `refresh` would write it: files, and blocks that show others than there are."""
    page, found = Path(page), list[str]()
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        files = sorted((page.parent / FOLDER / block["name"]).glob("*.png"))
        inside = re.findall(r"\]\((\S+\.png)\)", block["text"])
        if not files or sorted(inside) != [file.relative_to(page.parent).as_posix() for file in files]:
            found.append(f"the block {block['name']}")
        data = {each.prefix: each.data for each in sources(Path(records) / block["name"])}
        for file in files:
            prefix = INSPECTED if file.name.startswith(INSPECTED) else ""
            if prefix not in data or is_stale(file, data[prefix]):
                found.append(file.relative_to(page.parent).as_posix())
    return found


def sources(folder: Path) -> Iterator[Source]:
    """Yield what the pictures of a folder of records are drawn from."""
    entries = entries_of(read_results(folder))
    tasks = list(dict.fromkeys(entry.task for entry in entries))
    title = tasks[0] if len(tasks) == 1 else folder.name
    yield Source(prefix="", data=source(entries), draw=partial(choose, entries, title=title))
    file = folder / "inspection" / "inspection.json"
    if file.is_file():
        numbers = json.loads(file.read_text(encoding="utf-8"))
        yield Source(prefix=INSPECTED, data=numbers, draw=partial(of_inspection, numbers))


def shown(file: Path, caption: str) -> str:
    """Return Markdown that shows a picture with its caption."""
    text = markdown(caption)
    return f"![{text}]({file.as_posix()})\n\n*{text}*\n\n"


if __name__ == "__main__":
    for path in refresh(*sys.argv[1:]):
        print(path)
