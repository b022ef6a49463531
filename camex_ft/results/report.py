"""Reports: one HTML file with all of its content, for a browser without network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camex_ft.utils.durable import write_atomically
from camex_ft.utils.escaping import html as escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --paper: #ffffff; --line: #d5d9de; --tint: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a4abb3; --paper: #16181b; --line: #3a3f46; --tint: #22262b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
       font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem clamp(0.8rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.2rem 0 0.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.6rem; padding-top: 0.8rem; border-top: 1px solid var(--line);
     overflow-wrap: anywhere; }
p { max-width: 46rem; }
nav ul { margin: 0.4rem 0; padding-left: 1.2rem; columns: 18rem auto; }
a { color: inherit; text-underline-offset: 0.15em; }
pre { background: var(--tint); padding: 0.7rem 0.9rem; border-radius: 4px; overflow-x: auto; font-size: 0.86rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 0.8rem 0; }
.table table { margin-bottom: 0.9rem; }
.table p { color: var(--soft); font-size: 0.92rem; }
.picture { overflow-x: auto; background: #ffffff; border-radius: 4px; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.28rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; }
thead th { text-align: right; vertical-align: bottom; border-bottom: 2px solid var(--soft); }
thead th:first-child { text-align: left; }
figure { margin: 1.4rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 46rem; margin-top: 0.4rem; color: var(--soft); font-size: 0.9rem; }
.notes { color: var(--soft); font-size: 0.92rem; padding-left: 1.2rem; max-width: 46rem; }
@media (prefers-color-scheme: dark) { .picture { padding: 6px; } }
@media print {
  :root { --ink: #000000; --soft: #333333; --paper: #ffffff; --line: #999999; --tint: #f3f3f3; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; }
  .table, .picture { overflow: visible; }
  figure img { min-width: 0 !important; }
  table { font-size: 0.72rem; }
  th, td { padding: 0.15rem 0.35rem; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in a report.

    Attributes:
        png: the file's bytes.
        caption: shown below it.
        alt: alternative text; by default the caption.
    """

    png: bytes
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A section of a report.

    Attributes:
        title: of the section; the first section's is the report's.
        text: paragraphs.
        command: that produces the content, to be copied.
        tables: fragments of HTML, inserted unchanged.
        notes: short remarks, such as reasons for what is left out.
    """

    title: str
    text: Sequence[str] = ()
    command: str = ""
    tables: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


def write_report(sections: Sequence[ReportSection], path: Path | str) -> Path:
    """Write a report as one HTML file, which loads nothing and runs nothing; return its path.

    Args:
        sections: its content. Text is escaped; tables are HTML, with text escaped by the caller.
        path: of the file; its folder is made.
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
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
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
    data = base64.b64encode(picture.png).decode("ascii")
    width, height = _size(picture.png)
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure>\n<div class="picture" tabindex="0"><img src="data:image/png;base64,{data}" '
        f'alt="{escape(picture.alt or picture.caption)}" width="{width}" height="{height}" '
        # on a narrow screen a picture scrolls sideways instead of shrinking
        f'style="min-width: min({width}px, 36rem)"></div>\n{caption}\n</figure>'
    )


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height in pixels from the header of a PNG."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("a report's picture is a PNG: expected its signature")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
