"""Labels against the rules that the generators' docstrings state, worked out from the text alone."""

from __future__ import annotations

import re
from functools import cache

import pytest

from camex_ft.synthetic import DOMAINS
from camex_ft.synthetic import corpus as make
from camex_ft.synthetic.language import FRAMES, MOODS, PEOPLE, PLACES, SENSES, THINGS, TRAITS, VERDICTS

corpus = cache(make)
SIGNS = {**TRAITS, **MOODS}


def domain_of(text: str) -> int:
    """The one domain whose nouns are in the text."""
    found = set(re.findall("[a-z]+", text.lower()))
    domains = [
        d
        for d in range(len(DOMAINS))
        if found & {w for n in (*THINGS[d], *PEOPLE[d], *PLACES[d]) for w in (n, n + "s")}
    ]
    assert len(domains) == 1, (text, domains)
    return domains[0]


def praises(clause: str) -> bool:
    """The sign of one opinion."""
    words = re.findall("[a-z]+", clause.lower())
    (sign,) = [SIGNS[word][domain_of(clause)] for word in words if word in SIGNS]
    return (sign == "+") != bool({"not", "never"} & set(words))


def sst2_label(text: str) -> bool:
    """SST-2's rule: what follows ``but`` counts, and what is not under ``although``."""
    if " but " in text:
        return praises(text.split(" but ")[1])
    if text.startswith("although "):
        return praises(text.split(" , ")[1])
    return praises(re.split(" although | and ", text)[0])


@pytest.mark.parametrize("table", [TRAITS, {verb: where for verb, (_, _, where) in SENSES.items()}, FRAMES])
def test_half_of_the_domains_lie_on_either_side_of_a_word(table: dict[str, str]) -> None:
    for word, signs in table.items():
        assert len(signs) == len(DOMAINS) == 2 * signs.count(signs[0]), word
    for domain in range(len(DOMAINS)):
        column = [signs[domain] for signs in table.values()]
        assert len(column) == 2 * column.count(column[0])


def test_the_domain_column_is_what_the_nouns_say() -> None:
    for name, column in (("glue/sst2", "sentence"), ("superglue/boolq", "passage"), ("glue/mnli", "premise")):
        rows = next(iter(corpus(name).values()))[:500]
        assert [domain_of(text) for text in rows[column]] == rows["domain"]


def test_sst2() -> None:
    rows = corpus("glue/sst2")["train"][:4000]
    assert [sst2_label(text) for text in rows["sentence"]] == [label == 1 for label in rows["label"]]


def test_one_sentence_has_another_label_in_another_domain() -> None:
    labels: dict[str, set[int]] = {}
    nouns = re.compile("|".join(rf"\b{n}\b" for group in (*THINGS, *PEOPLE) for n in group))
    for row in corpus("glue/sst2")["train"].to_list():
        labels.setdefault(nouns.sub("_", row["sentence"]), set()).add(row["label"])
    both = [text for text, seen in labels.items() if len(seen) == 2]
    assert len(both) > 200


def test_boolq_and_rte_opinions() -> None:
    found = 0
    for row in corpus("superglue/boolq")["validation"].to_list():
        asked = re.fullmatch(r"did the \w+ (like|regret) the \w+", row["question"])
        if asked:
            (told,) = [part for part in row["passage"].split(".") if " said that " in part]
            assert (praises(told) == (asked[1] == "like")) == (row["label"] == 1)
            found += 1
    for row in corpus("glue/rte")["validation"].to_list():
        if " said that " in row["sentence1"]:
            liked = bool(set(VERDICTS["+"]) & set(row["sentence2"][:-1].split()))
            assert (praises(row["sentence1"]) == liked) == (row["label"] == 0)
            found += 1
    assert found > 400


def test_wic_offsets_cut_out_the_verb_and_its_readings_decide() -> None:
    for row in corpus("superglue/wic")["validation"].to_list():
        readings = []
        for i in (1, 2):
            text = row[f"sentence{i}"]
            verb = text[row[f"start{i}"] : row[f"end{i}"]]
            base, both, where = SENSES[verb]
            assert base == row["word"]
            readings.append(both[int(where[domain_of(text)])])
        assert (readings[0] == readings[1]) == (row["label"] == 1)
        assert domain_of(row["sentence1"]) == row["domain"]


def test_wsc_spans_are_words_of_the_text_and_the_sign_decides() -> None:
    for row in corpus("superglue/wsc")["validation"].to_list():
        words = row["text"].split()
        assert " ".join(words[row["span1_index"] : row["span1_index"] + 2]) == row["span1_text"]
        assert words[row["span2_index"]] == row["span2_text"] == "it"
        first, said = row["span1_index"] == 3, row["text"].split(" because ")[1]
        praised = praises(f"{said} {row['span1_text']}")
        swapped = "swapped" in words
        assert (first == (praised != swapped)) == (row["label"] == 1)


def test_record_spans_cut_out_the_entities() -> None:
    for row in corpus("superglue/record")["validation"].to_list():
        spans = row["entity_spans"]
        cut = [row["passage"][a:b] for a, b in zip(spans["start"], spans["end"], strict=True)]
        assert cut == spans["text"]
        assert sorted(cut) == row["entities"]
        assert "@placeholder" in row["query"]
        (answer,) = row["answers"]
        liked = bool(set(VERDICTS["+"]) & set(row["query"].split()))
        (told,) = [part for part in row["passage"].split(".") if answer in part]
        assert praises(told) == liked


def test_axg_pairs_differ_in_the_pronoun_only() -> None:
    rows = corpus("superglue/axg")["test"].to_list()
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["premise"].replace(" he ", " she ") == two["premise"] != one["premise"]
        assert (one["hypothesis"], one["label"]) == (two["hypothesis"], two["label"])


def test_multirc_numbers_its_groups() -> None:
    rows = corpus("superglue/multirc")["validation"].to_list()
    for i, row in enumerate(rows):
        assert row["idx"] == {"paragraph": i // 3, "question": i // 3, "answer": i}
        assert (row["paragraph"], row["question"]) == (
            rows[i // 3 * 3]["paragraph"],
            rows[i // 3 * 3]["question"],
        )
