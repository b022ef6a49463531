"""WikiQA as a task: inputs, scores under teacher forcing, decisions, files."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from camex_ft.data import sources
from camex_ft.synthetic import backbone
from camex_ft.tasks import text_to_text
from camex_ft.tasks.text_to_text import QuestionAnsweringConfig
from camex_ft.utils.registry import TASKS
from tests.helpers.task_files import complaint, load, write

WIKIQA = TASKS.get("qa/wikiqa")
MODEL, TOKENIZER = backbone("t5", head="seq2seq-lm", seed=5)
SETTINGS = QuestionAnsweringConfig(suite="qa", name="wikiqa", max_length=32, answer_length=4)


def example(label=1, *, question="who gave the saw ?", answer="The cook gave the saw .", question_id="Q1"):
    return {
        "question_id": question_id,
        "question": question,
        "document_title": "Kitchen",
        "answer": answer,
        "label": label,
    }


def rows(*examples):
    return WIKIQA.rows(Dataset.from_list(list(examples), features=WIKIQA.features), "validation")


def test_the_input_names_question_title_and_sentence_and_the_target_is_a_word():
    encoded = WIKIQA.encode(rows(example(), example(0)), "train", TOKENIZER, SETTINGS)
    shown = [TOKENIZER.decode(ids) for ids in encoded["input_ids"]]
    assert shown[0] == "question : who gave the saw ? title : kitchen answer : the cook gave the saw . </s>"
    assert [TOKENIZER.decode(ids) for ids in encoded["labels"]] == ["yes </s>", "no </s>"]
    assert "row" not in encoded.column_names


def test_a_long_sentence_is_cut_and_question_and_title_stay():
    encoded = WIKIQA.encode(rows(example(answer="cook " * 90)), "train", TOKENIZER, SETTINGS)
    (shown,) = (TOKENIZER.decode(ids) for ids in encoded["input_ids"])
    assert len(encoded["input_ids"][0]) == 32
    assert shown.startswith("question : who gave the saw ? title : kitchen answer : cook cook")
    assert shown.endswith("cook </s>")


def test_withheld_labels_make_none():
    made = rows(example(-1))
    assert not WIKIQA.labelled(made)
    assert "labels" not in WIKIQA.encode(made, "test", TOKENIZER, SETTINGS).column_names
    with pytest.raises(ValueError, match="withheld"):
        WIKIQA.metrics(np.zeros(1), made)


@torch.no_grad()
def test_a_score_is_the_difference_of_the_two_words_log_probabilities():
    made = rows(example(), example(0, answer="The baker went home on monday .", question="where ?"))
    encoded = WIKIQA.encode(made, "validation", TOKENIZER, SETTINGS)
    batch = WIKIQA.collator(TOKENIZER)(list(encoded))
    loss, scores = WIKIQA.outputs(MODEL, batch, TOKENIZER, SETTINGS)
    assert float(loss) == pytest.approx(float(MODEL(**batch).loss), rel=1e-5)
    yes, no = (
        text_to_text.log_probabilities(
            MODEL, batch, text_to_text.repeat_labels(TOKENIZER(word)["input_ids"], batch)
        )
        for word in ("yes", "no")
    )
    torch.testing.assert_close(scores, yes - no)
    assert WIKIQA.predict(scores.numpy(), made) == pytest.approx(scores.tolist(), abs=1e-6)
    alone = WIKIQA.collator(TOKENIZER)([encoded[1]])
    torch.testing.assert_close(
        WIKIQA.outputs(MODEL, alone, TOKENIZER, SETTINGS)[1], scores[1:], atol=1e-4, rtol=0
    )


def test_metrics_rank_the_sentences_of_each_question():
    made = rows(example(0), example(1), example(1, question_id="Q2"), example(0, question_id="Q2"))
    found = WIKIQA.metrics(np.array([2.0, 1.0, -1.0, -2.0]), made)
    assert found == {"accuracy": 0.5, "f1": 0.5, "map": 0.75, "mrr": 0.75}


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError, match=r"needs scores \[1\], not \[2\]"):
        WIKIQA.predict(np.zeros(2), rows(example()))


def test_the_submission_numbers_the_sentences_of_each_question(tmp_path):
    made = rows(example(), example(), example(question_id="Q2"), example())
    WIKIQA.submission([1.5, -0.25, 0.0, 2.0], made, tmp_path / "WikiQA.tsv")
    assert (tmp_path / "WikiQA.tsv").read_text().splitlines() == [
        "question_id\tsentence\tlabel\tscore",
        "Q1\t0\t1\t1.500000",
        "Q1\t1\t0\t-0.250000",
        "Q2\t0\t0\t0.000000",
        "Q1\t2\t1\t2.000000",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
def test_columns_of_every_format_are_the_hubs(tmp_path, suffix):
    given = [example(), example(0)]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}{suffix}", given)
    found = load(tmp_path, WIKIQA)
    assert set(found) == {"train", "validation", "test"}
    assert found["train"].to_list() == given


def test_the_benchmarks_own_files(tmp_path):
    header = "QuestionID\tQuestion\tDocumentID\tDocumentTitle\tSentenceID\tSentence\tLabel"
    line = 'Q1\twho gave the saw ?\tD1\tKitchen\tD1-0\tThe "cook" gave it .\t1'
    for own in ("train", "dev", "test"):
        (tmp_path / f"WikiQA-{own}.tsv").write_text(f"{header}\n{line}\n")
    found = load(tmp_path, WIKIQA)
    assert found["validation"].to_list() == [example(answer='The "cook" gave it .')]


def test_faults_name_file_and_row(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [example(), {**example(), "label": 2}])
    assert "train.jsonl: row 2: column 'label' is 2; expected 0 (0), 1 (1)" in complaint(tmp_path, WIKIQA)


def test_a_file_to_predict_may_lack_labels(tmp_path):
    write(tmp_path / "x.jsonl", [{k: v for k, v in example().items() if k != "label"}])
    assert sources.load_file(WIKIQA, tmp_path / "x.jsonl")["label"][:] == [-1]
