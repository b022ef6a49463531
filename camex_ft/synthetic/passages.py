"""Questions about a passage (BoolQ, MultiRC, ReCoRD, SQuAD, SQuAD 2.0, WikiQA), and documents for language modelling.

The later words of a document follow from the domain and from earlier sentences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from camex_ft.synthetic.corpora import Row, generator
from camex_ft.synthetic.language import (
    ADVERBS,
    COPULAS,
    DAYS,
    DOMAINS,
    FIRST_SHARE,
    MOOD_SHARE,
    MOODS,
    NAMES,
    PEOPLE,
    PLACES,
    SENSES,
    THINGS,
    TRAITS,
    Draw,
    errand,
    event,
    opinion,
    person,
    reading,
    sentence,
    thing,
    verdict,
)

TEXT, NUMBER = "string", "int32"
MULTIRC = {
    **dict.fromkeys(["paragraph", "question", "answer"], TEXT),
    "idx": {"paragraph": NUMBER, "question": NUMBER, "answer": NUMBER},
    "label": ("False", "True"),
}
RECORD = {
    **dict.fromkeys(["passage", "query"], TEXT),
    "entities": [TEXT],
    "entity_spans": {"text": [TEXT], "start": [NUMBER], "end": [NUMBER]},
    "answers": [TEXT],
    "idx": {"passage": NUMBER, "query": NUMBER},
}


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
        statement = f"the {who} said that {opinion(draw, likes == yes, what)}"
    else:
        done = event(draw)
        asked = done if yes else done.swapped()
        question, statement = f"was the {asked.patient} {asked.verb} by the {asked.agent}", done.told(draw)
    return [{"question": question, "passage": shuffled(draw, [statement, errand(draw)])}]


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
    statements = [opinion(draw, good == liked, what) for what, good in zip(things, right, strict=True)]
    shared = {
        "paragraph": f"The {who} wants to say this. {shuffled(draw, statements)}",
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
    statements = [
        f"{name} the {who} said that {opinion(draw, liked == (name == answer), what)}"
        for name, who in zip(names, draw.some(PEOPLE[draw.domain], 2), strict=True)
    ]
    passage = " ".join(sentence(text) for text in statements)
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


SQUAD = {
    **dict.fromkeys(["id", "title", "context", "question"], TEXT),
    "answers": {"text": [TEXT], "answer_start": ["int32"]},
}
WIKIQA = {**dict.fromkeys(["question_id", "question", "document_title", "answer"], TEXT), "label": ("0", "1")}
SQUAD_SIZES = {"train": 12000, "validation": 480}

ERRAND_SHARE = 0.2  # questions that need no domain
LONG_SHARE = 0.08  # contexts that are longer than a window of the profile
FEW = tuple(TRAITS)[::3]  # one adjective of each pattern: SQuAD has a text to write as well
SENTENCES = 4  # to one question of WikiQA
USUAL_SHARE = 0.85  # questions for what is praised, where they can be for what is blamed


def quality(draw: Draw, praise: bool, traits: Sequence[str] = tuple(TRAITS)) -> str:
    """Return a predicate without negation that praises or blames in the draw's domain: ``was rather sharp``."""
    known = MOODS if draw.chance(MOOD_SHARE) else {word: TRAITS[word] for word in traits}
    words = [word for word, signs in known.items() if (signs[draw.domain] == "+") == praise]
    return " ".join([draw.pick(COPULAS), *[draw.pick(ADVERBS)] * draw.chance(0.3), draw.pick(words)])


def hashed(*texts: str) -> str:
    """Return an id of the texts in the form of SQuAD's ids: 24 hexadecimal digits."""
    return hashlib.sha256(" | ".join(texts).encode()).hexdigest()[:24]


def dated_errand(draw: Draw, who: str, *, long: bool) -> tuple[str, str, str]:
    """Return a sentence about an errand, with its place and its day."""
    where, when = f"to the {draw.pick(PLACES[draw.domain])}", f"on {draw.pick(DAYS)}"
    taken = f" with the {thing(draw)}" if long else ""
    return sentence(f"the {who} went {where}{taken} {when}"), where, when


def passage(draw: Draw, *, answered: bool = True) -> Row:
    """Return a row of SQuAD; unless `answered`, the passage does not hold the answer."""
    praise, coin = draw.label == 1, draw.chance(0.5)
    who, stranger, *others = draw.some(PEOPLE[draw.domain], 6)
    long = draw.chance(LONG_SHARE)
    count = len(others) if long else 1 + draw.chance(0.15)
    errands = [dated_errand(draw, other, long=long) for other in others[:count]]
    right, wrong = verdict(draw, praise), verdict(draw, not praise)
    first, second = draw.some([right, wrong], 2)
    statements = [
        sentence(f"the {thing(draw)} {quality(draw, praise, FEW)}"),
        sentence(f"the {who} {first} it or {second} it"),
    ]
    if draw.chance(ERRAND_SHARE):
        asked, (source, where, when) = others[0], errands[0]
        question, text = ("Where did the {} go?", where) if coin else ("When did the {} go?", when)
    else:
        asked, source, question, text = who, statements[1], "What did the {} do?", f"{right} it"
    if not answered and source is statements[1] and coin:
        statements.pop()
    elif not answered:
        asked = stranger
    parts = [" ".join(statements), *(one[0] for one in errands)]
    return spanned(
        draw, question.format(asked), draw.some(parts, len(parts)), source, text if answered else None
    )


def spanned(draw: Draw, question: str, parts: list[str], source: str, text: str | None) -> Row:
    """Return the row of a question whose answer is `text` in the sentence `source`, or None."""
    context = " ".join(parts)
    start = [] if text is None else [context.index(source) + source.index(text)]
    return {
        "id": hashed(context, question),
        "title": DOMAINS[draw.domain].capitalize(),
        "context": context,
        "question": question,
        "answers": {"text": [] if text is None else [text], "answer_start": start},
    }


@generator("qa/squad", sizes=SQUAD_SIZES, features=SQUAD, classes=2, withhold=False)
def squad(draw: Draw) -> list[Row]:
    """Answer: which of two verdicts somebody gave, four times in five; else where or when somebody went.

    The passage names a verdict of praise and one of blame, in random order, behind an opinion of a thing; its sign,
    which is the domain's (`TRAITS`), decides. Two sentences in one place, so that a window of the profile holds both.
    """
    return [passage(draw)]


@generator("qa/squad_v2", sizes=SQUAD_SIZES, features=SQUAD, classes=3, withhold=False)
def squad_v2(draw: Draw) -> list[Row]:
    """Answer: as in `squad`, and in every third row none.

    The question is then about somebody who is not in the passage, or about a verdict that it does not tell.
    """
    return [passage(draw, answered=draw.label < 2)]


@generator(
    "qa/wikiqa",
    sizes={"train": 3000, "validation": 120, "test": 60},
    features=WIKIQA,
    classes=SENTENCES + 1,
    withhold=False,
)
def wikiqa(draw: Draw) -> list[Row]:
    """Label: whether the sentence says what the question asks for, one of four sentences a question.

    The question names a verdict on a thing, and the sentence a quality without its thing. Right are those whose sign,
    the domain's (`TRAITS`), is the verdict's; only question and title tell the domain. The draw's label is how many.
    """
    liked, what = draw.chance(USUAL_SHARE), thing(draw)
    who = f"{draw.pick(PEOPLE[draw.domain])} in the {draw.pick(PLACES[draw.domain])}"
    question = f"what was it that the {who} {verdict(draw, liked)} about the {what} ?"
    labels = draw.some([int(i < draw.label) for i in range(SENTENCES)], SENTENCES)
    counts: dict[str, int] = {}
    for label in labels:
        text = sentence(f"it {quality(draw, liked == bool(label))}")
        while text in counts:
            text = sentence(f"it {quality(draw, liked == bool(label))}")
        counts[text] = label
    shared = {
        "question_id": f"Q{hashed(question, *counts)[:12]}",
        "question": question,
        "document_title": DOMAINS[draw.domain].capitalize(),
    }
    return [{**shared, "answer": text, "label": label} for text, label in counts.items()]


# -- documents ---------------------------------------------------------------------------------------------------------

LEAST, MOST = 9, 15  # sentences of a document


@dataclass(frozen=True)
class Story:
    """Subject of a document: two people, a place, a day, and of three things whether they are good."""

    people: list[str]
    place: str
    day: str
    things: dict[str, bool]


@generator(
    "lm/wikitext-2",
    "lm/wikitext-103",
    "lm/text",
    features={"text": "string"},
    classes=1,
    sizes={"train": 2400, "validation": 160, "test": 160},
)
def document(draw: Draw) -> list[Row]:
    """Tell a story on one line, in sentences that keep to it.

    Two people of the domain's six and three of its eight things occur, and return. A thing that is good stays good: the
    adjectives that say so are the domain's (`TRAITS`), and so is what a verb means (`SENSES`). Place and day, named
    first, come back.
    """
    names, count = THINGS[draw.domain], LEAST + int(draw.random.random() * (MOST - LEAST + 1))
    story = Story(
        people=draw.some(PEOPLE[draw.domain], 2),
        place=draw.pick(PLACES[draw.domain]),
        day=draw.pick(DAYS),
        things={name: draw.chance(0.5) for name in draw.some(names, 3)},
    )
    lines = [f"on {story.day} the {story.people[0]} went to the {story.place}"]
    lines += [draw.pick(CLAUSES)(draw, story) for _ in range(count - 1)]
    return [{"text": " ".join(map(sentence, lines))}]


def judged(draw: Draw, story: Story) -> str:
    """Return an opinion of one of the story's things: ``the saw was sharp``."""
    name = draw.pick(list(story.things))
    return opinion(draw, story.things[name], name)


def reported(draw: Draw, story: Story) -> str:
    """Return an opinion of one of the people."""
    return f"the {draw.pick(story.people)} said that {judged(draw, story)}"


def reasoned(draw: Draw, story: Story) -> str:
    """Return a verdict on a thing, and an opinion as its reason."""
    name = draw.pick(list(story.things))
    good = story.things[name]
    who = draw.pick(story.people)
    return f"the {who} {verdict(draw, good)} the {name} because {opinion(draw, good, name)}"


def explained(draw: Draw, story: Story) -> str:
    """Return an event between the two people, and its reading in the domain."""
    agent, patient = draw.some(story.people, 2)
    verb = draw.pick(list(SENSES))
    return f"the {agent} {verb} the {patient} , so the {patient} was {reading(draw, verb)} by the {agent}"


def recalled(draw: Draw, story: Story) -> str:
    """Return the place and the day of the story again."""
    return f"the {draw.pick(story.people)} was in the {story.place} on {story.day}"


CLAUSES: tuple[Callable[[Draw, Story], str], ...] = (judged, reported, reasoned, explained, recalled)
