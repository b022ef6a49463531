"""Questions with answers in a text: SQuAD, SQuAD 2.0 and WikiQA."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from datasets import ClassLabel, Features, List, Value

from camex_ft.synthetic.corpora import Draw, Row, generator
from camex_ft.synthetic.grammar import sentence, thing, verdict
from camex_ft.synthetic.lexicon import ADVERBS, COPULAS, DAYS, DOMAINS, MOODS, PEOPLE, PLACES, TRAITS

TEXT = Value("string")
SQUAD = Features(
    {
        **dict.fromkeys(["id", "title", "context", "question"], TEXT),
        "answers": {"text": List(TEXT), "answer_start": List(Value("int32"))},
    }
)
WIKIQA = Features(
    {
        **dict.fromkeys(["question_id", "question", "document_title", "answer"], TEXT),
        "label": ClassLabel(names=["0", "1"]),
    }
)
SIZES = {"train": 12000, "validation": 480}

MOOD_SHARE = 0.25  # words that mean the same everywhere: without them the others take longer to learn
ERRAND_SHARE = 0.2  # questions that need no domain
LONG_SHARE = 0.08  # contexts that are longer than a window of the profile
FEW = tuple(TRAITS)[::3]  # one adjective of each pattern: SQuAD has a text to write as well
SENTENCES = 4  # to one question of WikiQA
USUAL_SHARE = 0.85  # questions for what is praised, where they can be for what is blamed


def quality(draw: Draw, praise: bool, traits: Sequence[str] = tuple(TRAITS)) -> str:
    """Return what praises or blames a thing of the draw's domain: ``was rather sharp``. Nothing turns it over."""
    known = MOODS if draw.chance(MOOD_SHARE) else {word: TRAITS[word] for word in traits}
    words = [word for word, signs in known.items() if (signs[draw.domain] == "+") == praise]
    return " ".join([draw.pick(COPULAS), *[draw.pick(ADVERBS)] * draw.chance(0.3), draw.pick(words)])


def hashed(*texts: str) -> str:
    """Return an id for what the texts say, in the form of SQuAD's own: 24 hexadecimal digits."""
    return hashlib.sha256(" | ".join(texts).encode()).hexdigest()[:24]


def errand(draw: Draw, who: str, *, long: bool) -> tuple[str, str, str]:
    """Return a sentence about where somebody went and when, then the place and the day as it names them."""
    where, when = f"to the {draw.pick(PLACES[draw.domain])}", f"on {draw.pick(DAYS)}"
    taken = f" with the {thing(draw)}" if long else ""
    return sentence(f"the {who} went {where}{taken} {when}"), where, when


def passage(draw: Draw, *, answered: bool = True) -> Row:
    """Return a row of SQuAD. Where it is not `answered`, the passage does not say what the question asks."""
    praise, coin = draw.label == 1, draw.chance(0.5)
    who, stranger, *others = draw.some(PEOPLE[draw.domain], 6)
    long = draw.chance(LONG_SHARE)
    count = len(others) if long else 1 + draw.chance(0.15)
    errands = [errand(draw, other, long=long) for other in others[:count]]
    right, wrong = verdict(draw, praise), verdict(draw, not praise)
    first, second = draw.some([right, wrong], 2)
    told = [
        sentence(f"the {thing(draw)} {quality(draw, praise, FEW)}"),
        sentence(f"the {who} {first} it or {second} it"),
    ]
    if draw.chance(ERRAND_SHARE):
        asked, (source, where, when) = others[0], errands[0]
        question, text = ("Where did the {} go?", where) if coin else ("When did the {} go?", when)
    else:
        asked, source, question, text = who, told[1], "What did the {} do?", f"{right} it"
    if not answered and source is told[1] and coin:
        told.pop()
    elif not answered:
        asked = stranger
    parts = [" ".join(told), *(one[0] for one in errands)]
    return spanned(
        draw, question.format(asked), draw.some(parts, len(parts)), source, text if answered else None
    )


def spanned(draw: Draw, question: str, parts: list[str], source: str, text: str | None) -> Row:
    """Return the row of a question whose answer is `text` in the sentence `source`, or is not there."""
    context = " ".join(parts)
    start = [] if text is None else [context.index(source) + source.index(text)]
    return {
        "id": hashed(context, question),
        "title": DOMAINS[draw.domain].capitalize(),
        "context": context,
        "question": question,
        "answers": {"text": [] if text is None else [text], "answer_start": start},
    }


@generator("qa/squad", sizes=SIZES, features=SQUAD, classes=2, withhold=False)
def squad(draw: Draw) -> list[Row]:
    """Answer: which of two verdicts somebody gave, four times in five; else where or when somebody went.

    The passage names a verdict of praise and one of blame, in random order, behind an opinion of a thing; its sign,
    which is the domain's (`TRAITS`), decides. Two sentences in one place, so that a window of the profile holds both.
    """
    return [passage(draw)]


@generator("qa/squad_v2", sizes=SIZES, features=SQUAD, classes=3, withhold=False)
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
    told: dict[str, int] = {}
    for label in labels:
        text = sentence(f"it {quality(draw, liked == bool(label))}")
        while text in told:
            text = sentence(f"it {quality(draw, liked == bool(label))}")
        told[text] = label
    shared = {
        "question_id": f"Q{hashed(question, *told)[:12]}",
        "question": question,
        "document_title": DOMAINS[draw.domain].capitalize(),
    }
    return [{**shared, "answer": text, "label": label} for text, label in told.items()]
