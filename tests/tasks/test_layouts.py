"""The benchmarks' own files: GLUE's tsv and SuperGLUE's jsonl, as their archives hold them."""

import pytest

from camex_ft.data import sources
from camex_ft.utils import registry
from tests.helpers.task_files import complaint, load, write
from tests.helpers.task_kinds import of_suite

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
    first, _, rest = row.partition("\t")
    numbered = header is not None and header.startswith(("index", "id"))
    second = f"{int(first) + 7}\t{rest}" if numbered else row
    train = "".join(f"{line}\n" for line in (header, row, second) if line)
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / folder / file).write_text(train, encoding="utf-8")
    cells = ["0"] * len(test_header.split("\t"))
    (tmp_path / folder / "test.tsv").write_text(f"{test_header}\n" + "\t".join(cells) + "\n")
    loaded = load(tmp_path, registry.TASKS.get(f"glue/{name}"))
    numbers = [int(first), int(first) + 7] if numbered else [0, 1]
    assert loaded["train"].to_list() == [{**expected, "idx": number} for number in numbers]
    assert loaded["validation"].num_rows == 2
    assert loaded["test"]["label"][:] == [-1]


@pytest.mark.parametrize("name", of_suite("glue"))
@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_predictions_have_the_numbers_of_their_rows(tmp_path, name, suffix, examples):
    task = registry.TASKS.get(f"glue/{name}")
    header = "id" if name == "qqp" else "index"
    texts = [column for column in task.columns if column != "idx"]
    rows = [
        {header: i, **{c: row[c] for c in texts}}
        for i, row in zip((101, 100), examples(task.id), strict=True)
    ]
    write(tmp_path / f"test.{suffix}", rows)
    split = task.splits["test"][0]
    made = task.rows(sources.load_file(task, tmp_path / f"test.{suffix}"), split)
    task.submission([0, 1], made, tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "101", "100"]


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        ({"idx": [7, 5]}, [7, 5]),
        ({"idx": [7, 5], "index": [1, 2]}, [7, 5]),
        ({"index": ["7", "5.0"]}, [7, 5]),
        ({"pairID": ["31193n", "101457e"]}, [0, 1]),
        ({"id": ["a", "b"]}, [0, 1]),
        ({}, [0, 1]),
    ],
)
def test_which_column_numbers_the_rows(tmp_path, columns, numbers):
    texts = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    names = [*texts, *columns]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(texts | columns).values(), strict=True)]
    write(tmp_path / "mine.jsonl", rows)
    assert sources.load_file(registry.TASKS.get("glue/mnli"), tmp_path / "mine.jsonl")["idx"][:] == numbers


@pytest.mark.parametrize(
    ("name", "column"), [("glue/sst2", "index"), ("glue/qqp", "id"), ("superglue/boolq", "idx")]
)
def test_two_rows_of_one_number_cannot_be_predicted(tmp_path, name, column, examples):
    rows = [{**row, column: 4} for row in examples(name)]
    for row in rows:
        row.pop("idx") if column != "idx" else None
    write(tmp_path / "test.jsonl", rows)
    task = registry.TASKS.get(name)
    message = complaint(tmp_path, task, splits=["test"])
    assert (
        "test.jsonl: row 2: column 'idx' is 4, as in row 1; expected a different idx for each row" in message
    )
    write(tmp_path / "train.jsonl", rows)  # nothing is predicted of these
    assert load(tmp_path, task, splits=["train"])["train"]["idx"][:] == [4, 4]


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
