"""The tables and pictures of docs/results.md are those of the committed records, and stale ones are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camex_ft.results.entries import keep_result
from scripts.docs.results_page import BLOCK, folders_of, stale_pictures, with_tables, write_pictures
from tests.helpers.synthetic_results import grid, protocols

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
RECORDS = ROOT / "results" / "records"
RESULTS = PAGE.read_text(encoding="utf-8")


def blocks(page: str) -> dict[str, str]:
    return {block["names"]: block["text"] for block in BLOCK.finditer(page)}


def test_committed_tables_are_those_of_the_committed_records() -> None:
    """Else: python scripts/docs/results_page.py docs/results.md results/records"""
    made = blocks(with_tables(RESULTS, RECORDS))
    assert blocks(RESULTS) == made
    assert len(made) > 5 and made["legend"].startswith("±")


def test_all_committed_records_are_in_a_table() -> None:
    assert folders_of(RESULTS, RECORDS) == {path.name for path in RECORDS.iterdir()}


def test_only_tables_are_written_anew() -> None:
    page = "a\n<!-- qa-squad -->\nstale\n<!-- end -->\nb\n<!-- nothing -->\nkept\n<!-- end -->\n<!-- remark -->\n"
    made = with_tables(page, RECORDS)
    assert "stale" not in made and "| `ties-ca` | 42 |" in made
    assert made.startswith("a\n<!-- qa-squad -->\n") and made.endswith(page.partition("b\n")[2])
    assert with_tables(made, RECORDS) == made


def test_committed_pictures_are_those_of_the_committed_records() -> None:
    """Else: python scripts/docs/results_page.py docs/results.md results/records"""
    assert any(names.startswith("pictures ") for names in blocks(RESULTS))
    assert stale_pictures(PAGE, RECORDS) == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one block of pictures, drawn."""
    folder = tmp_path_factory.mktemp("gallery")
    for entry in grid(rows=protocols("dense", "ties-ca"), seeds=2):
        assert entry.result is not None
        keep_result(entry.result, folder / "records" / "some", f"{entry.row}-{entry.seed}")
    made = folder / "page.md"
    made.write_text("before\n<!-- pictures some -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    write_pictures(made, folder / "records")
    return made


def test_the_block_shows_every_picture(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = sorted((page.parent / "pictures" / "some").glob("*.png"))
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert len(files) > 3 and all(f"(pictures/some/{file.name})" in text for file in files)
    assert stale_pictures(page, page.parent / "records") == []


def test_a_block_can_choose_its_pictures(page: Path) -> None:
    chosen = page.with_name("chosen") / "page.md"
    chosen.parent.mkdir()
    chosen.write_text("<!-- pictures some comparison -->\n<!-- end -->\n", encoding="utf-8")
    (file,) = write_pictures(chosen, page.parent / "records")
    assert file == chosen.parent / "pictures" / "some" / "comparison.png"
    assert chosen.read_text(encoding="utf-8").startswith("<!-- pictures some comparison -->\n![")
    assert stale_pictures(chosen, page.parent / "records") == []


def test_a_changed_record_makes_its_pictures_stale(page: Path) -> None:
    record = page.parent / "records" / "some" / "dense-0.json"
    before = record.read_text(encoding="utf-8")
    values = json.loads(before)
    values["metrics"]["best"] += 0.01
    record.write_text(json.dumps(values), encoding="utf-8")
    try:
        files = sorted((page.parent / "pictures" / "some").glob("*.png"))
        assert stale_pictures(page, page.parent / "records") == [
            f"pictures/some/{file.name}" for file in files
        ]
    finally:
        record.write_text(before, encoding="utf-8")


def test_a_picture_that_is_missing_or_not_shown_is_found(page: Path) -> None:
    extra = page.parent / "pictures" / "some" / "extra.png"
    extra.write_bytes(b"no picture")
    try:
        assert stale_pictures(page, page.parent / "records") == ["the block some", "pictures/some/extra.png"]
    finally:
        extra.unlink()
