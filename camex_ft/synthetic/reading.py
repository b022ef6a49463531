"""Questions about a passage: BoolQ, MultiRC and ReCoRD."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Features, List, Value

from camex_ft.synthetic.corpora import Draw, Row, generator
from camex_ft.synthetic.grammar import (
    FIRST_SHARE,
    errand,
    event,
    opinion,
    person,
    sentence,
    thing,
    verdict,
)
from camex_ft.synthetic.lexicon import NAMES, PEOPLE, THINGS

TEXT, NUMBER = Value("string"), Value("int32")
MULTIRC = Features(
    {
        **dict.fromkeys(["paragraph", "question", "answer"], TEXT),
        "idx": {"paragraph": NUMBER, "question": NUMBER, "answer": NUMBER},
        "label": ClassLabel(names=["False", "True"]),
    }
)
RECORD = Features(
    {
        **dict.fromkeys(["passage", "query"], TEXT),
        "entities": List(TEXT),
        "entity_spans": {"text": List(TEXT), "start": List(NUMBER), "end": List(NUMBER)},
        "answers": List(TEXT),
        "idx": {"passage": NUMBER, "query": NUMBER},
    }
)


def shuffled(draw: Draw, clauses: list[str]) -> str:
    """Return the clauses as sentences, in random order."""
    return " ".join(sentence(text) for text in draw.some(clauses, len(clauses)))


@generator(
    "superglue/boolq",
    columns=["question", "passage"],
    labels=["False", "True"],
    sizes={"train": 16000, "validation": 400, "test": 300},
)
def boolq(draw: Draw) -> list[Row]:
    """Label: whether the answer to the question is yes.

    Three questions in four ask whether somebody did like or regret a thing, which the sign of the passage's
    opinion decides (`TRAITS`, in the domain, turned over by a negation); the others ask who did something
    to whom, of an event told in either voice. The passage has a sentence beside the one asked about.
    """
    yes = draw.label == 1
    if draw.chance(0.75):
        who, what, likes = person(draw), thing(draw), draw.chance(FIRST_SHARE)
        question = f"did the {who} {'like' if likes else 'regret'} the {what}"
        told = f"the {who} said that {opinion(draw, likes == yes, what)}"
    else:
        done = event(draw)
        asked = done if yes else done.swapped()
        question, told = f"was the {asked.patient} {asked.verb} by the {asked.agent}", done.told(draw)
    return [{"question": question, "passage": shuffled(draw, [told, errand(draw)])}]


def multirc_numbers(places: list[tuple[int, int]]) -> list[Any]:
    """Number paragraphs, questions (one a paragraph) and answers, each over the whole split."""
    return [{"paragraph": group, "question": group, "answer": i} for i, (group, _) in enumerate(places)]


@generator(
    "superglue/multirc",
    sizes={"train": 6000, "validation": 160, "test": 100},
    features=MULTIRC,
    classes=4,
    number=multirc_numbers,
)
def multirc(draw: Draw) -> list[Row]:
    """Label: whether the answer, one of three things, is right.

    The paragraph tells an opinion of each thing. Right are the things whose opinion has the sign asked for,
    which is the domain's (`TRAITS`, turned over by a negation). The draw's label is how many of them are right.
    """
    right = draw.some([i < draw.label for i in range(3)], 3)
    things = draw.some(THINGS[draw.domain], 3)
    liked, who = draw.chance(FIRST_SHARE), person(draw)
    told = [opinion(draw, good == liked, what) for what, good in zip(things, right, strict=True)]
    shared = {
        "paragraph": f"The {who} wants to say this. {shuffled(draw, told)}",
        "question": f"What did the {who} {'like' if liked else 'dislike'}?",
    }
    return [
        {**shared, "answer": f"The {what}", "label": int(good)}
        for what, good in zip(things, right, strict=True)
    ]


def record_numbers(places: list[tuple[int, int]]) -> list[Any]:
    """Number passages and queries, one a passage."""
    return [{"passage": group, "query": group} for group, _ in places]


@generator(
    "superglue/record",
    sizes={"train": 8000, "validation": 200, "test": 150},
    features=RECORD,
    classes=2,
    number=record_numbers,
)
def record(draw: Draw) -> list[Row]:
    """Answer: which of two people the query's gap stands for.

    Both give their opinion of a thing, one praises it and one blames it (`TRAITS`, in the domain, turned
    over by a negation), and the query names a verdict. The draw's label is which of the two speaks first.
    """
    names, what, liked = draw.some(NAMES, 2), thing(draw), draw.chance(FIRST_SHARE)
    answer = names[draw.label]
    told = [
        f"{name} the {who} said that {opinion(draw, liked == (name == answer), what)}"
        for name, who in zip(names, draw.some(PEOPLE[draw.domain], 2), strict=True)
    ]
    passage = " ".join(sentence(text) for text in told)
    starts = [passage.index(name) for name in names]
    spans = {"text": names, "start": starts, "end": [s + len(n) for s, n in zip(starts, names, strict=True)]}
    return [
        {
            "passage": passage,
            "query": f"@placeholder {verdict(draw, liked)} the {what}.",
            "entities": sorted(names),
            "entity_spans": spans,
            "answers": [answer],
        }
    ]
