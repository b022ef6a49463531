"""SQuAD and SQuAD 2.0 as tasks: rows, windows with their targets, decisions, files and faults."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from camex_ft.data import sources
from camex_ft.synthetic import backbone
from camex_ft.tasks import text_to_text
from camex_ft.tasks.base import Prepared
from camex_ft.tasks.qa import answer_fault, place_of
from camex_ft.tasks.text_to_text import QuestionAnsweringConfig
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS
from tests.helpers.task_files import complaint, load, write

SQUAD, SQUAD2 = TASKS.get("qa/squad"), TASKS.get("qa/squad_v2")
MODEL, TOKENIZER = backbone("t5", head="seq2seq-lm")
CONTEXT = "The cook gave the saw to the baker . " * 4 + "The guest went home on monday ."


def example(number=0, *, text="guest", context=CONTEXT, question="who went home ?"):
    golds = (
        {"text": [text], "answer_start": [context.index(text)]} if text else {"text": [], "answer_start": []}
    )
    return {"id": f"q{number}", "title": "a", "context": context, "question": question, "answers": golds}


def rows(*examples, task=SQUAD, split="validation"):
    return task.rows(Dataset.from_list(list(examples), features=task.features), split)


def settings(**changes):
    return QuestionAnsweringConfig(
        **{"suite": "qa", "name": "squad", "max_length": 32, "doc_stride": 6, "answer_length": 5, **changes}
    )


def targets(encoded):
    return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in encoded["labels"]]


# -- rows and windows -------------------------------------------------------------------------------------------------


def test_rows_know_where_the_first_answer_is():
    two = example(1)
    two["answers"] = {"text": [" guest", "The guest"], "answer_start": [CONTEXT.index(" guest"), 148]}
    found = rows(example(), two).to_list()
    assert [row["answers"] for row in found] == [["guest"], [" guest", "The guest"]]
    assert [CONTEXT[row["start"] : row["end"]] for row in found] == ["guest", "guest"]
    assert rows(example(text=""), task=SQUAD2)[0]["start"] == -1


def test_a_window_with_the_whole_answer_has_it_as_target_and_another_one_none():
    encoded = SQUAD.encode(rows(example()), "train", TOKENIZER, settings())
    held = ["guest" in TOKENIZER.decode(ids) for ids in encoded["input_ids"]]
    assert targets(encoded) == ["guest" if has else "no answer" for has in held]
    assert held == [False, True, True]  # windows share tokens, and here the answer
    assert encoded["row"][:] == [0] * len(held)


def test_windows_of_several_rows_keep_their_order_and_say_their_row():
    short = example(1, context="The cook went home .", text="cook")
    encoded = SQUAD.encode(rows(example(), short, example(2)), "validation", TOKENIZER, settings())
    per_row = [encoded["row"][:].count(row) for row in range(3)]
    assert encoded["row"][:] == [row for row, count in enumerate(per_row) for _ in range(count)]
    assert per_row[0] == per_row[2] > 2
    assert per_row[1] == 1


def test_a_window_that_cuts_the_answer_is_trained_on_by_neither_target_and_evaluated_all_the_same():
    context = "cook " * 18 + "saw drill lathe " + "baker " * 12
    made = rows(example(context=context, text="saw drill lathe"))
    evaluated = SQUAD.encode(made, "validation", TOKENIZER, settings(doc_stride=4))
    trained = SQUAD.encode(made, "train", TOKENIZER, settings(doc_stride=4))
    cut = [
        i
        for i, ids in enumerate(evaluated["input_ids"])
        if 0 < sum(word in TOKENIZER.decode(ids) for word in ("saw", "drill", "lathe")) < 3
    ]
    assert len(cut) == 1
    assert [targets(evaluated)[i] for i in cut] == ["no answer"]
    assert trained["input_ids"][:] == [ids for i, ids in enumerate(evaluated["input_ids"]) if i not in cut]
    assert targets(trained).count("saw drill lathe") == 1


def test_without_a_window_to_train_on_there_is_an_error_that_says_what_to_raise():
    context = "cook " * 60
    made = rows(example(context=context.strip(), text=context.strip()))
    with pytest.raises(UserError, match=r"no window of 32 tokens holds a whole answer of the train split"):
        SQUAD.encode(made, "train", TOKENIZER, settings())


def test_a_long_answer_is_cut_with_its_end_token():
    made = rows(
        example(context="The cook gave the saw to the baker .", text="cook gave the saw to the baker")
    )
    encoded = SQUAD.encode(made, "train", TOKENIZER, settings(answer_length=4))
    assert [TOKENIZER.decode(ids) for ids in encoded["labels"]] == ["cook gave the </s>"]


def test_withheld_answers_make_no_labels():
    encoded = SQUAD.encode(rows(example(text="")), "test", TOKENIZER, settings())
    assert "labels" not in encoded.column_names
    assert not SQUAD.labelled(rows(example(), example(1, text="")))
    assert SQUAD2.labelled(rows(example(), example(1, text=""), task=SQUAD2))
    assert not SQUAD2.labelled(rows(example(text=""), task=SQUAD2))


def test_a_batch_pads_labels_with_what_the_loss_leaves_out():
    encoded = SQUAD.encode(rows(example(), example(1, text="The guest")), "validation", TOKENIZER, settings())
    batch = SQUAD.collator(TOKENIZER)([{k: row[k] for k in row if k != "row"} for row in encoded])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    lengths = [len(ids) for ids in encoded["labels"]]
    assert ((batch["labels"] != -100).sum(-1)).tolist() == lengths
    assert (batch["attention_mask"].sum(-1)).tolist() == [len(ids) for ids in encoded["input_ids"]]
    without = SQUAD.collator(TOKENIZER)([{"input_ids": [5, 1], "attention_mask": [1, 1]}])
    assert set(without) == {"input_ids", "attention_mask"}


def test_a_batch_is_padded_on_the_right_whatever_the_side_of_the_tokenizer(monkeypatch):
    encoded = SQUAD.encode(rows(example(), example(1, text="The guest")), "validation", TOKENIZER, settings())
    batch = [{k: row[k] for k in row if k != "row"} for row in encoded]
    right = SQUAD.collator(TOKENIZER)(batch)
    for side in ("padding_side", "truncation_side"):
        monkeypatch.setattr(TOKENIZER, side, "left")
    left = SQUAD.collator(TOKENIZER)(batch)
    assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)
    assert bool((left["labels"][:, 0] != -100).all()) and bool((left["attention_mask"][:, 0] == 1).all())
    assert (
        SQUAD.encode(rows(example()), "train", TOKENIZER, settings())["input_ids"][0] == batch[0]["input_ids"]
    )


@torch.no_grad()
@pytest.mark.parametrize("question", ["", "  "])
def test_a_question_may_be_empty_and_a_context_may_not(question, tmp_path):
    encoded = SQUAD.encode(rows(example(question=question)), "validation", TOKENIZER, settings())
    batch = SQUAD.collator(TOKENIZER)([{k: row[k] for k in row if k != "row"} for row in encoded])
    assert torch.isfinite(SQUAD.outputs(MODEL, batch, TOKENIZER, settings())[0])
    write(tmp_path / "train.jsonl", [{**example(), "context": question}])
    assert "row 1: column 'context' is blank" in complaint(tmp_path, SQUAD, splits=["train"])


# -- outputs and decisions --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("task", [SQUAD, SQUAD2], ids=lambda task: task.name)
@pytest.mark.parametrize("beams", [1, 2])
def test_outputs_are_answers_and_their_scores(task, beams):
    data = Prepared.make(
        task,
        {"validation": Dataset.from_list([example(), example(1)], features=task.features)},
        TOKENIZER,
        settings(beams=beams),
    )
    batch = task.collator(TOKENIZER)(list(data.encoded["validation"]))
    loss, (texts, scores) = task.outputs(MODEL, batch, TOKENIZER, settings(beams=beams))
    assert float(loss) == pytest.approx(float(MODEL(**batch).loss), rel=1e-5)
    assert scores.shape == (len(data.origin["validation"]), 2 if task.optional else 1)
    said = text_to_text.decode_texts(texts.numpy())
    again = text_to_text.generate_answers(MODEL, batch, TOKENIZER, length=5, beams=beams)
    kept = [[token for token in ids if token != -100] for ids in again.tolist()]
    assert said == TOKENIZER.batch_decode(kept, skip_special_tokens=True)
    torch.testing.assert_close(scores[:, 0], text_to_text.log_probabilities(MODEL, batch, again))
    if task.optional:
        none = text_to_text.target_tokens("no answer", TOKENIZER, 5)
        torch.testing.assert_close(
            scores[:, 1],
            text_to_text.log_probabilities(MODEL, batch, text_to_text.repeat_labels(none, batch)),
        )
    found = data.score("validation", (texts.numpy(), scores.numpy()))
    assert set(found) >= {"exact_match", "f1"}


@torch.no_grad()
def test_the_last_forward_pass_is_the_teacher_forced_one():
    calls = []

    class Watched(nn.Module):
        config, generation_config = MODEL.config, MODEL.generation_config

        def forward(self, **inputs):
            calls.append("forward")
            return MODEL(**inputs)

        def generate(self, **inputs):
            calls.append("generate")
            return MODEL.generate(**inputs)

    batch = SQUAD.collator(TOKENIZER)(
        [{"input_ids": [5, 6, 1], "attention_mask": [1, 1, 1], "labels": [7, 1]}]
    )
    SQUAD2.outputs(Watched(), batch, TOKENIZER, settings())
    assert calls == ["forward", "forward", "generate", "forward"]


def collected(*windows, optional=False):
    texts = text_to_text.encode_texts([text for text, *_ in windows]).numpy()
    return np.pad(texts, ((0, 0), (0, 2)), constant_values=-100), np.array([scores for _, *scores in windows])


def test_decisions_are_by_example_over_its_windows():
    both = rows(example(), example(1, text="baker"))
    outputs = collected(("no answer", -0.1), ("the guest", -1.0), ("cook", -2.0), ("baker", -3.0))
    origin = np.array([0, 0, 0, 1])
    assert SQUAD.predict(outputs, both, origin) == ["the guest", "baker"]
    assert SQUAD.metrics(outputs, both, origin) == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize("text", ["A", "$", "the", "..."])
@pytest.mark.parametrize("task", [SQUAD, SQUAD2], ids=lambda task: task.name)
def test_an_answer_of_articles_or_punctuation_wins_over_worse_ones(task, text, tmp_path):
    one = task.rows(
        Dataset.from_list([example(context=f"It is {text} .", text=text)], features=task.features),
        "validation",
    )
    none = [-5.0] * task.optional
    outputs = collected((text, -0.1, *none), ("far worse", -3.0, *none), ("no answer", -0.01, *none))
    predicted = task.predict(outputs, one, np.array([0, 0, 0]))
    assert predicted == [text]
    assert task.metrics(outputs, one, np.array([0, 0, 0]))["exact_match"] == 1.0
    task.submission(predicted, one, tmp_path / "said.json")
    assert json.loads((tmp_path / "said.json").read_text()) == {one["id"][0]: text}


def test_no_answer_is_decided_by_its_score():
    both = rows(example(), example(1, text=""), example(2, text=""), task=SQUAD2)
    outputs = collected(("guest", -1.0, -2.0), ("guest", -1.0, -0.5), ("no answer", -0.1, -0.1))
    assert SQUAD2.predict(outputs, both, np.arange(3)) == ["guest", "", ""]
    assert SQUAD2.metrics(outputs, both, np.arange(3)) == dict.fromkeys(
        [f"{part}{name}" for part in ("", "has_answer_", "no_answer_") for name in ("exact_match", "f1")], 1.0
    )


def test_outputs_without_their_rows_are_refused():
    with pytest.raises(ValueError, match="needs the row of each of the 1 windows"):
        SQUAD.predict(collected(("x", -1.0)), rows(example()))
    with pytest.raises(ValueError, match="nothing to measure"):
        SQUAD.metrics(collected(("x", -1.0)), rows(example(text="")), np.zeros(1, dtype=int))


def test_the_submission_is_the_scripts_json(tmp_path):
    SQUAD.submission(["Zoë", ""], rows(example(), example(1)), tmp_path / "deep" / "SQuAD.json")
    written = (tmp_path / "deep" / "SQuAD.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"q0": "Zoë", "q1": ""}
    assert "Zoë" in written


# -- data -------------------------------------------------------------------------------------------------------------


def nested(*examples, impossible=()):
    def asked(one):
        golds = [{"text": t, "answer_start": s} for t, s in zip(*one["answers"].values(), strict=True)]
        plain = {"id": one["id"], "question": one["question"], "answers": golds}
        return (
            {**plain, "is_impossible": True, "plausible_answers": golds} if one["id"] in impossible else plain
        )

    paragraphs = [{"context": one["context"], "qas": [asked(one)]} for one in examples]
    return {"version": "1.1", "data": [{"title": "a", "paragraphs": paragraphs}]}


@pytest.mark.parametrize("said", [False, "false", None, 0])
def test_answers_stay_where_is_impossible_is_not_true(tmp_path, said):
    own = nested(example())
    own["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = said
    (tmp_path / "train.json").write_text(json.dumps(own))
    assert load(tmp_path, SQUAD2, splits=["train"])["train"].to_list() == [example()]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_columns_of_every_format_are_the_hubs(tmp_path, suffix):
    given = [example(), example(1, text="baker")]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}{suffix}", given)
    found = load(tmp_path, SQUAD)
    assert set(found) == {"train", "validation"}
    assert found["train"].to_list() == given
    assert found["train"].features == SQUAD.features


@pytest.mark.parametrize("indent", [None, 1])
def test_the_benchmarks_own_files(tmp_path, indent):
    given = [example(), example(1, text="baker")]
    for name in ("train-v1.1", "dev-v1.1"):
        (tmp_path / f"{name}.json").write_text(json.dumps(nested(*given), indent=indent))
    assert load(tmp_path, SQUAD)["validation"].to_list() == given


def test_impossible_questions_have_no_answers(tmp_path):
    given = [example(), example(1, text="baker")]
    for name in ("train-v2.0", "dev-v2.0"):
        (tmp_path / f"{name}.json").write_text(json.dumps(nested(*given, impossible=("q1",))))
    found = load(tmp_path, SQUAD2)["train"]
    assert found[0] == given[0]
    assert found[1]["answers"] == {"text": [], "answer_start": []}


def test_a_test_file_may_lack_answers(tmp_path):
    bare = {name: value for name, value in example().items() if name != "answers"}
    write(tmp_path / "x.jsonl", [bare])
    for task in (SQUAD, SQUAD2):
        assert sources.load_file(task, tmp_path / "x.jsonl")[0]["answers"] == {"text": [], "answer_start": []}
    qas = [{"id": "q0", "question": "who ?"}]
    own = {"data": [{"title": "a", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert sources.load_file(SQUAD, tmp_path / "own.json")[0]["question"] == "who ?"


WRONG = example(1)
WRONG["answers"] = {"text": ["guest"], "answer_start": [3]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (WRONG, "row 2: answer 'guest': answer_start is 3"),
        (example(1, text=""), "row 2: column 'answers' is empty; expected at least one gold answer"),
        (example(0), "row 2: column 'id' is 'q0', as in row 1; expected a different id"),
        ({**example(1), "context": "  "}, "row 2: column 'context' is blank"),
        ({**example(1), "answers": {"text": ["guest"]}}, "row 2: column 'answers' is .* answer_start"),
        ({**example(1), "question": None}, "row 2: column 'question' is null; expected a text"),
    ],
)
def test_faults_name_file_and_row(tmp_path, second, message):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [example(), second])
    said = complaint(tmp_path, SQUAD)
    assert "train.jsonl" in said
    assert re.search(message, said), said


def test_questions_of_version_2_may_have_no_answer(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [example(), example(1, text="")])
    assert len(load(tmp_path, SQUAD2)["train"]) == 2


def test_missing_answers_are_missed_outside_test_files(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [{k: v for k, v in example().items() if k != "answers"}])
    assert "needs the column answers" in complaint(tmp_path, SQUAD)


@pytest.mark.parametrize("source", ["hub", "embedded"])
def test_the_test_split_is_only_on_disk(source):
    with pytest.raises(UserError, match=r"the test split is not published; expected data\.source=disk"):
        sources.load(SQUAD, source=source, splits=["test"])


ROME = "Anna met Bob  in\nRome. Rome was hot."


@pytest.mark.parametrize(
    ("text", "start", "cut"),
    [
        ("Rome", 17, "Rome"),
        ("Rome", 23, "Rome"),
        (" Rome", 16, "Rome"),  # a blank before it
        ("Rome ", 17, "Rome"),  # a blank behind it
        (" Bob", 9, "Bob"),  # a blank in the answer that the position leaves out
        ("Bob", 8, "Bob"),  # and the other way round
        ("Bob in Rome", 9, "Bob  in\nRome"),  # other blanks inside
        ("Rome.", 17, "Rome."),
    ],
)
def test_an_answer_is_found_with_its_blanks_or_without(text, start, cut):
    found = place_of(ROME, text, start)
    assert found is not None
    assert ROME[slice(*found)] == cut


@pytest.mark.parametrize(
    ("text", "start"),
    [("Rome", 18), ("rome", 17), ("Rome", -1), ("Rome", 99), ("", 0), (" ", 8), ("R.me", 17)],
)
def test_an_answer_is_not_found_elsewhere(text, start):
    assert place_of(ROME, text, start) is None


def of_rome(*answers, context=ROME):
    golds = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return {"context": context, "answers": golds}


def test_what_real_data_holds_is_no_fault():
    assert answer_fault(of_rome()) is None
    assert (
        answer_fault(of_rome(("Rome", 17), ("Rome", 17), (" Rome ", 22))) is None
    )  # twice the same, blanks around


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            of_rome(("Rome", 18)),
            r"answer 'Rome': answer_start is 18, where the context \(36 characters\) has 'ome.'",
        ),
        (of_rome(("Rome", 18)), "it is at 17"),
        (of_rome(("Paris", 0)), "has 'Anna '; expected .* it is nowhere in the context"),
        (of_rome(("Rome", 17), (" ", 3)), "a blank text"),
        (of_rome(("Rome", 99)), "answer_start is 99"),
        (of_rome(context=" \n"), "'context' is blank"),
        ({"context": "x", "answers": {"text": ["x"], "answer_start": []}}, "1 texts and 0 of answer_start"),
    ],
)
def test_faults_say_what_was_expected(row, message):
    found = answer_fault(row)
    assert found is not None
    assert re.search(message, found), found
