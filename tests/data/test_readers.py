"""Quotation marks of tsv files: written by pandas and spreadsheets, or part of the text as in GLUE's own files."""

import csv
import io
import logging
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camex_ft.data import sources
from camex_ft.data.readers import is_quoted
from camex_ft.utils import registry
from tests.helpers.task_files import SST2, complaint, load, write

FINE = 'he said "fine"'
TEXTS = [FINE, '"fine"', "tab\there", "two\nlines", "plain ", 'a "" b', '"', ""]
GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
MINIMAL, ALL, NONNUMERIC = csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC


def of_pandas(path, texts, **options):
    frame = pandas.DataFrame({"sentence": texts, "label": [i % 2 for i in range(len(texts))]})
    frame.to_csv(path, sep="\t", index=False, **options)


def sentences(path):
    return sources.load_file(SST2, path)["sentence"][:]


@pytest.mark.parametrize("quoting", [MINIMAL, ALL, NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "texts", [[FINE], TEXTS, ["tab\there"], ["two\r\nlines"], [FINE, "plain"], ["plain"]]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_pandas_is_read_as_it_was_written(tmp_path, quoting, end, texts, encoding, caplog):
    of_pandas(tmp_path / "mine.tsv", texts, quoting=quoting, lineterminator=end, encoding=encoding)
    assert sentences(tmp_path / "mine.tsv") == texts
    assert not caplog.records


@given(texts=st.lists(st.text(st.sampled_from('"\t\n ,a\u2028é')), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("quoting", [MINIMAL, ALL])
def test_what_a_writer_has_to_quote_comes_back(quoting, texts):
    """Of any texts, one of which holds a mark; none of which looks quoted where nothing has to be."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter="\t", quoting=quoting, lineterminator="\n")
    writer.writerows([["sentence", "label"], *([text, "0"] for text in [FINE, *texts])])
    assert is_quoted(stream.getvalue())


@given(texts=st.lists(st.text(st.sampled_from('" ,a\u2028é')), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_lone_mark_anywhere_turns_quoting_off(texts):
    assert not is_quoted("".join(f"{text}\t0\n" for text in ["sentence", 'a "b', *texts]))
    assert not is_quoted("".join(f"{text}\t0\n" for text in ["sentence", *texts, '"b']))


@pytest.mark.parametrize(
    "texts",
    [
        ['He said "no.'],
        ['"fine"'],  # what has to be quoted is not: a writer would have left the marks out
        ['"fine" he said', FINE],
        ['"open', 'close"'],
        ['12" and 14"'],
    ],
)
def test_glues_own_files_are_read_to_the_last_character(tmp_path, texts):
    lines = ["sentence\tlabel", *(f"{text}\t0" for text in texts)]
    (tmp_path / "mine.tsv").write_text("".join(f"{line}\n" for line in lines))
    assert sentences(tmp_path / "mine.tsv") == texts


def test_marks_around_two_fields_are_no_quotes(tmp_path):
    """Read with quotes it would be one field, and the row too short."""
    (tmp_path / "mine.tsv").write_text('sentence1\tsentence2\n"He went\tand came"\n')
    data = sources.load_file(registry.TASKS.get("glue/rte"), tmp_path / "mine.tsv")
    assert (data["sentence1"][:], data["sentence2"][:]) == (['"He went'], ['and came"'])


def test_a_text_of_one_column_may_hold_line_breaks(tmp_path):
    (tmp_path / "mine.tsv").write_text('text\n"two\nlines"\none\n')
    assert sources.load_file(registry.TASKS.get("lm/text"), tmp_path / "mine.tsv")["text"][:] == [
        "two\nlines",
        "one",
    ]


def test_files_without_header_are_read_by_the_same_rule(tmp_path):
    cola = registry.TASKS.get("glue/cola")
    rows = [["gj04", "1", "", FINE], ["gj04", "0", "*", "plain"]]
    for name, quoting, expected in (("own", None, FINE), ("pandas", MINIMAL, FINE), ("all", ALL, FINE)):
        with (tmp_path / f"{name}.tsv").open("w", newline="") as stream:
            if quoting is None:
                stream.writelines("\t".join(row) + "\n" for row in rows)
            else:
                csv.writer(stream, delimiter="\t", quoting=quoting).writerows(rows)
        assert sources.load_file(cola, tmp_path / f"{name}.tsv")["sentence"][:] == [expected, "plain"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", ["", '"'])
def test_every_line_end_ends_a_line(tmp_path, end, quoting):
    q = quoting
    lines = [f"{q}sentence{q}\t{q}label{q}", f"{q}a{q}\t0", "", f"{q}b{q}\t1"]
    (tmp_path / "train.tsv").write_bytes(end.join(lines).encode())
    assert load(tmp_path, splits=["train"])["train"]["sentence"][:] == ["a", "b"]


# -- notes


def notes(caplog, path):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="camex_ft"):
        sentences(path)
    return [record.getMessage() for record in caplog.records]


def test_a_note_names_the_first_row_that_looks_quoted(tmp_path, caplog):
    path = tmp_path / "mine.tsv"
    path.write_text('sentence\tlabel\nplain\t0\n"he said ""fine"""\t1\n5" long\t1\n')
    (note,) = notes(caplog, path)
    assert f"{path}: row 2" in note and "looks quoted" in note and "as part of the text" in note
    path.write_text('sentence\tlabel\nplain\t0\n"Hello, you"\t1\n')
    (note,) = notes(caplog, path)
    assert f"{path}: row 2" in note


def test_no_note_for_what_is_plain(tmp_path, caplog):
    path = tmp_path / "mine.tsv"
    path.write_text('sentence\tlabel\nplain\t0\nHe said "no.\t1\n"Yes" and "no"\t1\n"fine"\t0\n')
    assert notes(caplog, path) == []


@pytest.mark.skipif(not GLUE.is_dir(), reason="no ../shared/data/glue beside this checkout")
@pytest.mark.parametrize("name", ["cola", "rte", "wnli"])
def test_real_sentences_survive_both_ways_of_writing(tmp_path, name):
    """As GLUE writes them, without quotes, and as pandas does."""
    task = registry.TASKS.get(f"glue/{name}")
    data = sources.load(task, source="disk", dir=GLUE, splits=["validation"])
    frame = data["validation"].to_pandas()
    write(tmp_path / "own" / "validation.tsv", data["validation"].to_list())
    (tmp_path / "pandas").mkdir()
    frame.to_csv(tmp_path / "pandas" / "validation.tsv", sep="\t", index=False)
    for folder in ("own", "pandas"):
        loaded = sources.load(task, source="disk", dir=tmp_path / folder, splits=["validation"])
        assert sources.fingerprint(loaded) == sources.fingerprint(data)


# -- csv, and separators


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("quoting", [MINIMAL, ALL, NONNUMERIC])
def test_csv_is_always_read_with_quotes(tmp_path, quoting, encoding):
    texts = [*TEXTS, 'a, b "c"', "two\r\nlines"]
    frame = pandas.DataFrame({"sentence": texts, "label": 0})
    frame.to_csv(tmp_path / "mine.csv", index=False, quoting=quoting, encoding=encoding)
    assert sentences(tmp_path / "mine.csv") == texts


@pytest.mark.parametrize(
    ("suffix", "separator"), [("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", ","), ("tsv", ";")]
)
def test_another_separator_is_said(tmp_path, suffix, separator):
    (tmp_path / f"train.{suffix}").write_text(f"sentence{separator}label\nfine{separator}1\n")
    message = complaint(tmp_path, splits=["train"])
    assert f"train.{suffix}: glue/sst2 needs the columns sentence, label" in message
    assert f"its fields seem to be separated by {separator!r}" in message


# -- files that the package writes


def test_predictions_are_read_again(tmp_path):
    wikiqa = registry.TASKS.get("qa/wikiqa")
    texts = dict.fromkeys(["question", "document_title", "answer"], "a")
    ids = ['Q"1', "Q\t2", "Q3", "Q\n4"]
    write(tmp_path / "mine.jsonl", [{"question_id": name, **texts} for name in ids])
    rows = wikiqa.rows(sources.load_file(wikiqa, tmp_path / "mine.jsonl"), "test")
    wikiqa.submission([0.5] * 4, rows, tmp_path / "out.tsv")
    read = pandas.read_csv(tmp_path / "out.tsv", sep="\t")
    assert list(read["question_id"]) == ids and list(read["label"]) == [1] * 4
    assert is_quoted((tmp_path / "out.tsv").read_text())
