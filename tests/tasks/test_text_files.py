"""Texts from disk: files of every format, folders of files, what is missing; which split serves as which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camex_ft.data import sources
from camex_ft.tasks import lm
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS
from tests.helpers.task_files import ROWS, complaint, load, write

WIKITEXT, TEXT = TASKS.get("lm/wikitext-2"), TASKS.get("lm/text")
RAW = " \n = Title = \n \n One line with é . \n Two , \u2028 one line . \n"
HUB = ["", " = Title = \n", "", " One line with é . \n", " Two , \u2028 one line . \n"]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2"


def text(data: Any) -> str:
    return lm.stream_text(data["text"])


def put(folder: Path, **files: str) -> Path:
    """Write text files; two underscores stand for a folder's slash."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_rows_in_every_format_are_the_text_of_the_raw_file(suffix: str, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "rows" / f"{split}.{suffix}", [{"text": row} for row in HUB])
    raw = put(tmp_path / "raw", train=RAW, valid=RAW, test=RAW)
    of_rows, of_raw = load(tmp_path / "rows", WIKITEXT), load(raw, WIKITEXT)
    assert list(of_rows) == list(of_raw) == ["train", "validation", "test"]
    for split, data in of_rows.items():
        assert text(data) == text(of_raw[split])


def test_a_split_may_be_a_folder_of_text_files(tmp_path: Path) -> None:
    put(tmp_path, train__b="second\n", train__a__deep="first", validation="x")
    assert text(load(tmp_path, TEXT)["train"]) == "first\nsecond\n"


def test_the_tasks_own_folder_is_found(tmp_path: Path) -> None:
    put(tmp_path, **{"WikiText-2__train": "a b", "WikiText-2__validation": "c d"})
    assert text(load(tmp_path, WIKITEXT)["validation"]) == "c d\n"


def test_without_validation_the_message_says_what_to_do(tmp_path: Path) -> None:
    message = complaint(put(tmp_path, train="a b", test="c d"), TEXT)
    assert "no validation split of lm/text" in message
    assert "or .txt, or a folder validation/ of .txt files" in message
    assert "data.splits={validation: NAME}" in message


def test_text_files_are_not_for_other_tasks(tmp_path: Path) -> None:
    assert (
        ".txt"
        not in complaint(put(tmp_path / "a", notes="a b"), TASKS.get("glue/sst2")).partition("holds")[0]
    )


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    put(tmp_path, train="a b", train__a="c d", validation="e f")
    assert "train.txt, train all could be the train split" in complaint(tmp_path, TEXT)


@pytest.mark.parametrize("content", ["", "\n\n", " \n"])
def test_a_file_without_words_is_refused(content: str, tmp_path: Path) -> None:
    message = complaint(put(tmp_path, train="a b", validation=content), TEXT)
    assert "the validation split holds no text" in message


def test_a_byte_that_is_no_text_is_named(tmp_path: Path) -> None:
    put(tmp_path, train="a b", validation="c d")
    (tmp_path / "train.txt").write_bytes(b"one\ntw\xff\n")
    assert "train.txt: line 2 holds byte 0xff" in complaint(tmp_path, TEXT)


# -- which split serves as which


def test_one_split_serves_as_another(tmp_path: Path) -> None:
    put(tmp_path, validation="v v", test="t t")
    loaded = load(tmp_path, WIKITEXT, serves={"train": "validation", "validation": "test"})
    assert {split: text(data) for split, data in loaded.items()} == {
        "train": "v v\n",
        "validation": "t t\n",
        "test": "t t\n",
    }


def test_any_file_may_serve_and_so_may_any_task(tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    loaded = load(tmp_path, serves={"train": "mine", "validation": "yours"})
    assert list(loaded) == ["train", "validation"] and loaded["train"].to_list() == ROWS


def test_the_embedded_corpus_serves_too() -> None:
    task = TASKS.get("glue/rte")
    plain = sources.load(task, source="embedded")
    turned = sources.load(task, source="embedded", serves={"train": "validation", "validation": "train"})
    assert turned["train"].to_list() == plain["validation"].to_list()
    assert turned["validation"].to_list() == plain["train"].to_list()
    with pytest.raises(UserError, match=r"no split 'valdation'. Did you mean 'validation'\? They have train"):
        sources.load(task, source="embedded", serves={"train": "valdation"})


def test_a_split_that_the_task_has_not_is_explained(tmp_path: Path) -> None:
    message = complaint(put(tmp_path, train="a b"), TEXT, serves={"valid": "train"})
    assert (
        "lm/text has no split 'valid'. Did you mean 'validation'? It has train, validation, test" in message
    )


def test_a_file_that_is_not_there_is_explained(tmp_path: Path) -> None:
    message = complaint(put(tmp_path, train="a b"), TEXT, serves={"validation": "tset"})
    assert "no tset split of lm/text" in message and "found train.txt" in message


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/wikitext2 beside this checkout")
def test_wikitext2_as_it_was_published() -> None:
    loaded = load(SHARED, WIKITEXT, serves={"train": "validation", "validation": "test"})
    words = {split: len(text(data).split()) for split, data in loaded.items()}
    # the published counts have a mark for each line's end, which raw files write as a line feed
    lines = {split: len(data) for split, data in loaded.items()}
    assert words["train"] + lines["train"] == 217_646
    assert words["validation"] + lines["validation"] == 245_569
