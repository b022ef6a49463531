"""Data from disk: formats, layouts, and one message for everything that can be wrong with a file."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from camex_ft import registry
from camex_ft.errors import UserError
from camex_ft.tasks import sources

SST2 = registry.TASKS.get("glue/sst2")
ROWS = [
    {"sentence": 'a "quoted, word', "label": 1, "idx": 0},
    {"sentence": "dull ", "label": 0, "idx": 1},
    {"sentence": "Zoë's naïve\nstory", "label": 1, "idx": 2},
]


def write(path: Path, rows, columns=None):
    """Write `rows` in the format that the suffix names."""
    columns = columns or list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
                for row in rows
            )
    else:
        lines = [
            "\t".join(columns),
            *("\t".join(str(row[c]).replace("\n", " ") for c in columns) for row in rows),
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with good jsonl files of SST-2."""
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", ROWS)
    return tmp_path


def load(dir, task=SST2, **options):
    return sources.load(task, source="disk", dir=dir, **options)


def complaint(dir, task=SST2, **options) -> str:
    """Return the message, on one line, of the `UserError` that loading raises."""
    with pytest.raises(UserError) as caught:
        load(dir, task, **options)
    return re.sub(r"\s+", " ", str(caught.value))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{suffix}", ROWS)
    loaded = load(tmp_path)
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"].features == SST2.features
    assert loaded["train"].to_list() == ROWS
    write(tmp_path / "reference" / "train.jsonl", ROWS)
    write(tmp_path / "reference" / "validation.jsonl", ROWS)
    assert sources.fingerprint(loaded) == sources.fingerprint(load(tmp_path / "reference"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("name", registry.TASKS.names())
def test_every_task_and_format(tmp_path, examples, name, suffix):
    task = registry.TASKS.get(name)
    rows = examples(name)
    for split in task.splits["test"]:
        write(tmp_path / task.name / f"{split}.{suffix}", rows)
    loaded = load(tmp_path, task, splits=task.splits["test"])
    for split in task.splits["test"]:
        assert loaded[split].features == task.features
        expected = Dataset.from_list(rows, features=task.features).to_list()
        assert loaded[split].to_list() == expected


def test_tsv_has_no_quoting(tmp_path):
    write(tmp_path / "train.tsv", ROWS)
    write(tmp_path / "validation.tsv", ROWS)
    assert load(tmp_path)["train"]["sentence"][:] == ['a "quoted, word', "dull ", "Zoë's naïve story"]


# GLUE's own files: header and a row each of train and of test, and what the hub makes of the train row.
ZIP = {
    "cola": (
        "CoLA",
        None,
        'gj04\t1\t\tHe said "no.',
        {"sentence": 'He said "no.', "label": 1},
        "index\tsentence",
    ),
    "sst2": ("SST-2", "sentence\tlabel", "dull \t0", {"sentence": "dull ", "label": 0}, "index\tsentence"),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\tA "b.\tB a.',
        {"sentence1": 'A "b.', "sentence2": "B a.", "label": 1},
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "9\t1\t2\tWhy?\tWhy not?\t0",
        {"question1": "Why?", "question2": "Why not?", "label": 0},
        "id\tquestion1\tquestion2",
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tsentence1\tsentence2\tscore",
        "0\tnews\tA.\tB.\t3.800",
        {"sentence1": "A.", "sentence2": "B.", "label": pytest.approx(3.8)},
        "index\tgenre\tsentence1\tsentence2",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        "0\tWho?\tI.\tnot_entailment",
        {"question": "Who?", "sentence": "I.", "label": 1},
        "index\tquestion\tsentence",
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        "0\tA.\tB.\tentailment",
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
        "index\tsentence1\tsentence2",
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        "0\tA.\tB.\t1",
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        "index\tsentence1\tsentence2",
    ),
}


@pytest.mark.parametrize("name", ZIP)
def test_glue_zip_layout(tmp_path, name):
    folder, header, row, expected, test_header = ZIP[name]
    (tmp_path / folder).mkdir()
    train = f"{header}\n{row}\n{row}\n" if header else f"{row}\n{row}\n"
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / folder / file).write_text(train, encoding="utf-8")
    cells = ["0"] * len(test_header.split("\t"))
    (tmp_path / folder / "test.tsv").write_text(f"{test_header}\n" + "\t".join(cells) + "\n")
    loaded = load(tmp_path, registry.TASKS.get(f"glue/{name}"))
    assert loaded["train"].to_list() == [{**expected, "idx": 0}, {**expected, "idx": 1}]
    assert loaded["validation"].num_rows == 2
    assert loaded["test"]["label"][:] == [-1]


def test_glue_zip_layout_of_mnli_and_its_diagnostics(tmp_path):
    header = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
    (tmp_path / "MNLI").mkdir()
    for file in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / "MNLI" / f"{file}.tsv").write_text(header + f"0\tg\t{file}\tB\tneutral\tcontradiction\n")
    (tmp_path / "AX.tsv").write_text("index\tsentence1\tsentence2\n0\tP\tH\n")
    loaded = load(tmp_path, registry.TASKS.get("glue/ax"))
    assert list(loaded) == ["train", "validation_matched", "validation_mismatched", "test"]
    assert loaded["validation_matched"].to_list() == [
        {"premise": "dev_matched", "hypothesis": "B", "label": 2, "idx": 0}
    ]
    assert loaded["test"].to_list() == [{"premise": "P", "hypothesis": "H", "label": -1, "idx": 0}]


def test_a_diagnostics_folder_may_stand_beside_its_tasks(tmp_path, examples):
    for split in ("train", "validation"):
        write(tmp_path / "RTE" / f"{split}.jsonl", examples("superglue/rte"))
    write(tmp_path / "AX-b" / "AX-b.jsonl", examples("superglue/axb"))
    loaded = load(tmp_path / "AX-b", registry.TASKS.get("superglue/axb"))
    assert loaded["train"].column_names == ["premise", "hypothesis", "idx", "label"]
    assert loaded["test"].column_names == ["sentence1", "sentence2", "idx", "label"]
    assert loaded["test"]["label"][:] == [0, 1]  # not withheld, though a test split


# SuperGLUE's own files: one record, and the examples that the hub makes of it.
RECORDS = {
    "boolq": (
        {"question": "is it", "passage": "It is.", "idx": 4, "label": True},
        [{"question": "is it", "passage": "It is.", "idx": 4, "label": 1}],
    ),
    "cb": (
        {"premise": "P", "hypothesis": "H", "label": "neutral", "idx": 0},
        [{"premise": "P", "hypothesis": "H", "idx": 0, "label": 2}],
    ),
    "copa": (
        {"premise": "P", "choice1": "A", "choice2": "B", "question": "cause", "label": 1, "idx": 0},
        [{"premise": "P", "choice1": "A", "choice2": "B", "question": "cause", "idx": 0, "label": 1}],
    ),
    "wsc": (
        {
            "text": "Ann met Eve .",
            "target": {"span2_index": 2, "span1_index": 0, "span1_text": "Ann", "span2_text": "Eve"},
            "idx": 0,
            "label": False,
        },
        [
            {
                "text": "Ann met Eve .",
                "span1_index": 0,
                "span2_index": 2,
                "span1_text": "Ann",
                "span2_text": "Eve",
                "idx": 0,
                "label": 0,
            }
        ],
    ),
    "multirc": (
        {
            "idx": 2,
            "passage": {
                "text": "Ann met Eve.",
                "questions": [
                    {
                        "question": "Who?",
                        "idx": 6,
                        "answers": [
                            {"text": "Ann", "idx": 30, "label": 1},
                            {"text": "Bo", "idx": 31, "label": 0},
                        ],
                    }
                ],
            },
        },
        [
            {
                "paragraph": "Ann met Eve.",
                "question": "Who?",
                "answer": answer,
                "idx": {"paragraph": 2, "question": 6, "answer": number},
                "label": label,
            }
            for answer, number, label in (("Ann", 30, 1), ("Bo", 31, 0))
        ],
    ),
    "record": (
        {
            "source": "daily",
            "passage": {
                "text": "Rome and Ann; Rome",
                "entities": [{"start": 14, "end": 17}, {"start": 0, "end": 3}, {"start": 9, "end": 11}],
            },
            "qas": [
                {
                    "query": "@placeholder is old",
                    "idx": 5,
                    "answers": [
                        {"start": 0, "end": 3, "text": "Rome"},
                        {"start": 14, "end": 17, "text": "Rome"},
                    ],
                }
            ],
            "idx": 1,
        },
        [
            {
                "passage": "Rome and Ann; Rome",
                "query": "@placeholder is old",
                "entities": ["Ann", "Rome"],
                "answers": ["Rome"],
                "idx": {"passage": 1, "query": 5},
            }
        ],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_superglue_zip_layout(tmp_path, name):
    record, expected = RECORDS[name]
    task = registry.TASKS.get(f"superglue/{name}")
    for file in ("train", "val"):
        write(tmp_path / task.benchmark_name / f"{file}.jsonl", [record])
    loaded = load(tmp_path, task)
    assert loaded["validation"].to_list() == expected


def test_the_hubs_numbered_parquet_shards(tmp_path):
    for number in (0, 1):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", [{**ROWS[number], "idx": number}])
    write(tmp_path / "validation-00000-of-00001.parquet", ROWS)
    assert load(tmp_path)["train"].to_list() == ROWS[:2]


def test_label_ids_follow_the_files_own_names(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    data = Dataset.from_list(
        [{"sentence": "good", "label": 0}, {"sentence": "bad", "label": 1}], features=features
    )
    data.to_parquet(tmp_path / "validation.parquet")
    assert load(tmp_path, splits=["validation"])["validation"]["label"][:] == [1, 0]


def test_labels_by_name_in_any_case_and_as_numbers(tmp_path):
    rows = [{"sentence": "a", "label": label} for label in ("positive", "NEGATIVE", "1", "0", "1.0")]
    write(tmp_path / "validation.csv", rows)
    assert load(tmp_path, splits=["validation"])["validation"]["label"][:] == [1, 0, 1, 0, 1]


def test_test_labels_may_be_missing_empty_or_minus_one(tmp_path):
    for labels in ([-1, -1], ["", ""], [-1.0, "nan"], [-1, 1]):
        write(tmp_path / "test.csv", [{"sentence": "a", "label": label} for label in labels])
        loaded = load(tmp_path, splits=["test"])["test"]["label"][:]
        assert loaded == [-1, 1 if labels == [-1, 1] else -1]
    write(tmp_path / "test.csv", [{"sentence": "a"}, {"sentence": "b"}])
    assert load(tmp_path, splits=["test"])["test"].to_list() == [
        {"sentence": "a", "label": -1, "idx": 0},
        {"sentence": "b", "label": -1, "idx": 1},
    ]


def test_first_rows(folder):
    loaded = load(folder, train_rows=2, eval_rows=1)
    assert {split: len(data) for split, data in loaded.items()} == {"train": 2, "validation": 1, "test": 3}
    assert loaded["train"].to_list() == ROWS[:2]
    assert len(load(folder, train_rows=99)["train"]) == 3


def test_any_file_can_be_predicted_on(tmp_path):
    write(tmp_path / "mine.csv", [{"sentence": "fine"}])
    data = sources.load_file(SST2, tmp_path / "mine.csv")
    assert data.to_list() == [{"sentence": "fine", "label": -1, "idx": 0}]
    with pytest.raises(UserError, match=r"mine\.txt: unknown format '\.txt'"):
        sources.load_file(SST2, tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"none\.csv: cannot be read: No such file"):
        sources.load_file(SST2, tmp_path / "none.csv")


# What can be wrong


def test_missing_folder(folder):
    message = complaint(folder.parent / (folder.name + "x"))
    assert "there is no folder" in message and f"Did you mean '{folder.name}'?" in message


def test_file_instead_of_folder(folder):
    assert "is a file; expected the folder" in complaint(folder / "train.jsonl")


def test_unreadable_folder(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "cannot be read: Permission denied" in complaint(folder)


def test_no_folder_given():
    with pytest.raises(UserError, match=r"data\.dir is not set"):
        sources.load(SST2, source="disk")


def test_no_split_file(tmp_path):
    (tmp_path / "training.txt").touch()
    message = complaint(tmp_path)
    assert "no split file of glue/sst2" in message
    assert "train with .parquet, .jsonl, .json, .csv or .tsv" in message and "holds training.txt" in message


def test_one_split_missing(folder):
    (folder / "validation.jsonl").unlink()
    message = complaint(folder)
    assert "no validation split of glue/sst2" in message and "found test.jsonl, train.jsonl" in message


def test_missing_test_split_is_an_error_only_if_asked_for(folder):
    (folder / "test.jsonl").unlink()
    assert list(load(folder)) == ["train", "validation"]
    assert "no test split" in complaint(folder, splits=["test"])


def test_unknown_split(folder):
    assert "no split 'validaton'. Did you mean 'validation'?" in complaint(folder, splits=["validaton"])


def test_two_files_for_one_split(folder):
    write(folder / "dev.csv", ROWS)
    message = complaint(folder)
    assert "dev.csv, validation.jsonl all could be the validation split" in message


def test_missing_columns(folder):
    write(folder / "train.jsonl", [{"sentences": "a", "label": 1, "extra": 2}])
    message = complaint(folder)
    assert "train.jsonl: glue/sst2 needs the column sentence; found sentences, label, extra." in message
    assert "Did you mean 'sentences'?" in message


def test_missing_label_column(folder):
    write(folder / "validation.jsonl", [{"sentence": "a"}])
    assert "validation.jsonl: glue/sst2 needs the column label; found sentence" in complaint(folder)


def test_multirc_needs_its_question_numbers(tmp_path, examples):
    rows = [{k: v for k, v in row.items() if k != "idx"} for row in examples("superglue/multirc")]
    write(tmp_path / "test.csv", rows)
    message = complaint(tmp_path, registry.TASKS.get("superglue/multirc"), splits=["test"])
    assert "test.csv: superglue/multirc needs the column idx" in message


@pytest.mark.parametrize("label", [2, -1, 7.0, "good", "", None, 0.5, True])
def test_label_out_of_range(folder, label):
    write(folder / "train.jsonl", [ROWS[0], {**ROWS[1], "label": label}])
    if label is True:
        assert load(folder)["train"]["label"][:] == [1, 1]
        return
    message = complaint(folder)
    assert "train.jsonl: row 2: column 'label' is" in message
    assert "expected 0 (negative), 1 (positive), or one of these names" in message


@pytest.mark.parametrize("label", [5.1, -0.5, float("nan"), "high", None])
def test_regression_label_out_of_range(tmp_path, examples, label):
    rows = examples("glue/stsb")
    rows[1]["label"] = label
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get("glue/stsb"), splits=["train"])
    assert "row 2: column 'label' is" in message and "expected a number from 0 to 5" in message


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_empty_split(folder, suffix):
    (folder / "train.jsonl").unlink()
    path = folder / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(
            pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path
        )
    else:
        path.write_text(
            {"json": "[]", "jsonl": "\n"}.get(
                suffix, "sentence,label\n".replace(",", "\t" * (suffix == "tsv") or ",")
            )
        )
    assert f"train.{suffix}: the train split of glue/sst2 is empty" in complaint(folder)


def test_file_of_no_bytes(folder):
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").touch()
    assert "is empty" in complaint(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sentence,label\nfine,1\ndull,0,9\n", "row 2 (line 3) has 3 fields; expected 2: sentence, label"),
        ("sentence,label\nfine,1\ndull\n", "row 2 (line 3) has 1 fields; expected 2: sentence, label"),
        ('sentence,label\nfine,1\n"dull,0\nbad,0\n', "row 2 (line 3) is broken: unexpected end of data"),
        ('sentence,label\n"a"b,1\n', "row 1 (line 2) is broken"),
        ("sentence,sentence\na,1\n", "a column occurs twice in the header"),
    ],
)
def test_broken_csv_row(folder, text, expected):
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text(text)
    assert expected in complaint(folder)


def test_broken_tsv_row(folder):
    (folder / "train.jsonl").unlink()
    (folder / "train.tsv").write_text('sentence\tlabel\n"fine\t1\nno label\n')
    assert "train.tsv: row 2 (line 3) has 1 fields; expected 2" in complaint(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"sentence": "a", "label": 1}\n{"sentence": "b"\n', "line 2 is not JSON"),
        ('{"sentence": "a", "label": 1}\n[1, 2]\n', "row 2 is a JSON list; expected an object"),
        ('[{"sentence": "a",\n "label"}]', "line 2 is not JSON"),
    ],
)
def test_broken_json(folder, text, expected):
    (folder / "train.jsonl").write_text(text)
    assert f"train.jsonl: {expected}" in complaint(folder)


def test_wrong_nesting(tmp_path):
    write(tmp_path / "test.jsonl", [{"idx": 0, "passage": {"text": "a", "question": []}}])
    message = complaint(tmp_path, registry.TASKS.get("superglue/multirc"), splits=["test"])
    assert (
        "row 1 has neither the columns paragraph, question, answer, idx nor the nesting of MultiRC's"
        in message
    )


def test_undecodable_file(folder):
    (folder / "train.jsonl").write_bytes(
        b'{"sentence": "a", "label": 1}\n{"sentence": "caf\xe9", "label": 1}\n'
    )
    assert "train.jsonl: line 2 holds byte 0xe9, which is not UTF-8" in complaint(folder)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "nothing"])
def test_corrupt_parquet(folder, damage):
    (folder / "train.jsonl").unlink()
    path = folder / "train.parquet"
    write(path, ROWS * 100)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "rubbish": b"PAR1" + b"x" * 90, "nothing": b""}[damage])
    assert "train.parquet: not a readable parquet file" in complaint(folder)


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (7, "7"), (["a"], "['a']")])
def test_text_that_is_none(folder, value, shown):
    write(folder / "train.jsonl", [*ROWS, {"sentence": value, "label": 1, "idx": 3}])
    assert f"train.jsonl: row 4: column 'sentence' is {shown}; expected a text" in complaint(folder)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("copa", {"question": "why"}, "column 'question' is 'why'; expected 'cause' or 'effect'"),
        ("wic", {"end1": 99}, "columns 'start1', 'end1' are 4, 99; expected 0 <= start < end <= 17"),
        ("wic", {"start2": 12}, "columns 'start2', 'end2' are 12, 12"),
        ("wic", {"start1": "x"}, "column 'start1' is 'x'; expected a whole number"),
        (
            "wsc",
            {"span2_index": 6},
            "column 'span2_index' is 6; expected the number of a word of 'text', 0 to 5",
        ),
        ("wsc", {"span1_index": None}, "column 'span1_index' is null; expected a whole number"),
        ("record", {"query": "no gap"}, "column 'query' has no '@placeholder'"),
        ("record", {"entities": []}, "column 'entities' is empty"),
        ("record", {"entities": "Rome"}, "column 'entities' is 'Rome'; expected JSON"),
        ("record", {"answers": []}, "column 'answers' is empty; expected at least one gold answer"),
        ("multirc", {"idx": {"paragraph": 1}}, "expected an object with paragraph, question, answer"),
    ],
)
def test_faults_of_single_examples(tmp_path, examples, name, changes, expected):
    rows = examples(f"superglue/{name}")
    rows[1].update(changes)
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get(f"superglue/{name}"), splits=["train"])
    assert f"train.jsonl: row 2: {expected}" in message or (
        "row 2: column 'idx'" in message and expected in message
    )


def test_groups_need_different_numbers(tmp_path, examples):
    rows = examples("superglue/copa")
    rows[1]["idx"] = rows[0]["idx"]
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get("superglue/copa"), splits=["train"])
    assert "idx 0 occurs twice" in message
