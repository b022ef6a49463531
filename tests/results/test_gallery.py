"""The pictures of docs/results.md are those of the committed records, and a stale one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camex_ft.results.entries import keep_result
from camex_ft.results.gallery import BLOCK, refresh, stale
from tests.helpers.synthetic_results import grid, protocols

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"


def test_committed_pictures_are_those_of_the_committed_records() -> None:
    """Else: python -m camex_ft.results.gallery docs/results.md results/records"""
    assert BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert stale(PAGE, ROOT / "results" / "records") == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one block, drawn."""
    folder = tmp_path_factory.mktemp("gallery")
    for entry in grid(rows=protocols("dense", "ties-ca"), seeds=2):
        assert entry.result is not None
        keep_result(entry.result, folder / "records" / "some", f"{entry.row}-{entry.seed}")
    made = folder / "page.md"
    made.write_text("before\n<!-- pictures some -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    refresh(made, folder / "records")
    return made


def test_the_block_shows_every_picture(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = sorted((page.parent / "pictures" / "some").glob("*.png"))
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert len(files) > 3 and all(f"(pictures/some/{file.name})" in text for file in files)
    assert stale(page, page.parent / "records") == []


def test_a_block_can_choose_its_pictures(page: Path) -> None:
    chosen = page.with_name("chosen") / "page.md"
    chosen.parent.mkdir()
    chosen.write_text("<!-- pictures some comparison -->\n<!-- end -->\n", encoding="utf-8")
    (file,) = refresh(chosen, page.parent / "records")
    assert file == chosen.parent / "pictures" / "some" / "comparison.png"
    assert chosen.read_text(encoding="utf-8").startswith("<!-- pictures some comparison -->\n![")
    assert stale(chosen, page.parent / "records") == []


def test_a_changed_record_makes_its_pictures_stale(page: Path) -> None:
    record = page.parent / "records" / "some" / "dense-0.json"
    before = record.read_text(encoding="utf-8")
    values = json.loads(before)
    values["metrics"]["best"] += 0.01
    record.write_text(json.dumps(values), encoding="utf-8")
    try:
        files = sorted((page.parent / "pictures" / "some").glob("*.png"))
        assert stale(page, page.parent / "records") == [f"pictures/some/{file.name}" for file in files]
    finally:
        record.write_text(before, encoding="utf-8")


def test_a_picture_that_is_missing_or_not_shown_is_found(page: Path) -> None:
    extra = page.parent / "pictures" / "some" / "extra.png"
    extra.write_bytes(b"no picture")
    try:
        assert stale(page, page.parent / "records") == ["the block some", "pictures/some/extra.png"]
    finally:
        extra.unlink()
