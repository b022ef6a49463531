"""The benchmarks' own files: GLUE's tsv and SuperGLUE's jsonl, as their archives hold them."""

import pytest
from task_files import load, write

from camex_ft import registry

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
