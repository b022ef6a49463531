"""Reports: one HTML file with all of its content, for a browser without network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from camex_ft.utils.durable import write_atomically
from camex_ft.utils.escaping import html as escape

STYLE = resources.files("camex_ft.results").joinpath("report.css").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in a report."""

    png: bytes  # the file's bytes
    caption: str = ""  # shown below it
    alt: str = ""  # alternative text; by default the caption


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A section of a report."""

    title: str  # of the section; the first section's is the report's
    text: Sequence[str] = ()  # paragraphs
    command: str = ""  # that produces the content, to be copied
    tables: Sequence[str] = ()  # fragments of HTML, inserted unchanged
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()  # short remarks, such as reasons for what is left out


def write_report(sections: Sequence[ReportSection], path: Path | str) -> Path:
    """Write a report as one HTML file, which loads nothing and runs nothing; return its path.

    Text is escaped; tables are HTML, with text escaped by the caller.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(sections))
    return path


def page(sections: Sequence[ReportSection]) -> str:
    """Return the report as HTML.

    Raises:
        ValueError: there is no section.
    """
    if not sections:
        raise ValueError("a report needs at least one section: expected one with the title")
    title = escape(sections[0].title)
    links = "".join(
        f'<li><a href="#part-{i}">{escape(s.title)}</a></li>\n' for i, s in enumerate(sections[1:], start=1)
    )
    contents = f'<nav aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>\n' if len(sections) > 2 else ""
    body = "\n".join(_section(i, s, after=contents if i == 0 else "") for i, s in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # fragments can load nothing, and browsers do not ask for an icon
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _section(number: int, section: ReportSection, *, after: str) -> str:
    level = "h1" if number == 0 else "h2"
    parts = [f"<{level}>{escape(section.title)}</{level}>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.command:
        parts.append(f"<pre><code>{escape(section.command)}</code></pre>")
    parts += [f'<div class="table" tabindex="0">\n{table}\n</div>' for table in section.tables]
    parts += [_picture(picture) for picture in section.pictures]
    if section.notes:
        notes = "".join(f"<li>{escape(note)}</li>\n" for note in section.notes)
        parts.append(f'<ul class="notes">\n{notes}</ul>')
    return f'<section id="part-{number}">\n' + "\n".join(parts) + f"\n{after}</section>"


def _picture(picture: Picture) -> str:
    png = picture.png
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("a report's picture is a PNG: expected its signature")
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")  # pixels
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        '<figure>\n<div class="picture" tabindex="0">'
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}" '
        f'alt="{escape(picture.alt or picture.caption)}" width="{width}" height="{height}" '
        # on a narrow screen a picture scrolls sideways instead of shrinking
        f'style="min-width: min({width}px, 36rem)"></div>\n{caption}\n</figure>'
    )
