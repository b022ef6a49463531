"""The report: one page that holds all it shows, and loads in a browser that has no network."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from camex_ft.results.plots import choose, png
from camex_ft.results.report import Picture, ReportSection, page, write_report
from tests.helpers.synthetic_results import grid, protocols

VOID = {"meta", "link", "img", "br", "hr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<script>alert('x')</script> & \"quoted\" </section>"
TABLE = "<table><thead><tr><th scope='col'>row</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>"


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    made = choose(grid(rows=protocols("dense", "ties-ca"), seeds=2, epochs=2), title="T")
    return [
        Picture(png=png(figure), alt=name, caption=made.captions[name])
        for name, figure in made.figures.items()
    ][:2]


@pytest.fixture
def sections(pictures) -> list[ReportSection]:
    return [
        ReportSection(
            title=f"Compared: {NASTY}",
            text=["First.", NASTY],
            command="camex-ft compare a.yaml && echo '<b>'",
        ),
        ReportSection(title="Scores", tables=[TABLE], notes=[NASTY]),
        ReportSection(title="Pictures", pictures=pictures),
    ]


def test_all_is_in_one_page(sections, tmp_path):
    path = write_report(sections, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    found = Page(text)
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value[:80]}>"
        assert not any(name.startswith("on") for name in attributes)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found.tags}


def test_text_is_escaped_and_still_said(sections):
    found = Page(page(sections))
    assert found.text.count(NASTY) == 4  # <title>, <h1>, a paragraph, a note
    assert "camex-ft compare a.yaml && echo '<b>'" in found.text


def test_pictures_have_texts_sizes_and_captions(sections, pictures):
    found = Page(page(sections))
    images = found.all("img")
    assert [image["alt"] for image in images] == [picture.alt for picture in pictures]
    assert all(int(image["width"]) > 300 and int(image["height"]) > 100 for image in images)
    assert all(picture.caption in found.text for picture in pictures)


def test_contents_lead_to_the_sections(sections):
    found = Page(page(sections))
    anchors = {attributes["id"] for attributes in found.all("section")}
    assert [a["href"] for a in found.all("a")] == ["#part-1", "#part-2"]
    assert {a["href"][1:] for a in found.all("a")} <= anchors
    assert TABLE in page(sections)


def test_one_section_needs_no_contents():
    assert Page(page([ReportSection(title="T")])).all("nav") == []


def test_a_page_needs_a_section_and_a_picture_a_png():
    with pytest.raises(ValueError, match="at least one section"):
        page([])
    with pytest.raises(ValueError, match="PNG"):
        page([ReportSection(title="T", pictures=[Picture(png=b"GIF89a", alt="x")])])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_without_network_shows_it_all(sections, tmp_path):
    """Nothing is asked of the network, nothing is refused or complained of, and every picture is decoded.

    It is opened as it is, for its console, and with a script added that writes down what it sees.
    """
    report = write_report(sections, tmp_path / "report.html").read_text(encoding="utf-8")
    probe = (
        # drawing decodes a picture at once, where decode() would end after the page is dumped
        "<script>addEventListener('load', () => { const images = [...document.images];"
        "const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        "const decoded = i => { pen.clearRect(0, 0, 1, 1); pen.drawImage(i, 0, 0);"
        "return pen.getImageData(0, 0, 1, 1).data[3] === 255; };"
        "document.body.dataset.seen = images.filter(i => i.naturalWidth > 300 && decoded(i)).length + '/' + "
        "images.length; document.body.dataset.loaded = performance.getEntriesByType('resource').filter("
        "e => !e.name.startsWith('data:')).length; document.body.dataset.wide = "
        "document.documentElement.scrollWidth > innerWidth; document.body.dataset.width = innerWidth; });</script>"
    )
    # the probe is a script, which the report itself forbids
    probed = report.replace("default-src 'none'", "script-src 'unsafe-inline'; default-src 'none'")
    assert probed != report
    (tmp_path / "probed.html").write_text(probed.replace("</main>", f"</main>{probe}"), encoding="utf-8")
    for name, size in (("report.html", 1400), ("probed.html", 1400), ("probed.html", 400)):
        dom, complaints = open_page(tmp_path / name, tmp_path / f"{name}-{size}", width=size)
        assert complaints == []
        if name == "probed.html":
            assert 'data-seen="2/2"' in dom
            assert 'data-loaded="0"' in dom
            assert 'data-wide="false"' in dom


def open_page(path: Path, profile: Path, *, width: int) -> tuple[str, list[str]]:
    """Return the page's elements once it is loaded, and what it wrote to the console."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        f"--window-size={width},1000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=5000",
        "--dump-dom",
        path.as_uri(),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]
