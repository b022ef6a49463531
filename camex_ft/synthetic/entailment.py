"""A text and what follows from it: RTE, MNLI, QNLI, CB, the diagnostics; pronouns and causes: WNLI, WSC, COPA."""

from __future__ import annotations

from camex_ft.synthetic.corpora import Row, generator
from camex_ft.synthetic.language import (
    DAYS,
    DEEDS,
    FIRST_SHARE,
    PEOPLE,
    PLACES,
    THINGS,
    Draw,
    Event,
    event,
    opinion,
    person,
    predicate,
    sentence,
    thing,
    verdict,
)

SIZES = {"train": 16000, "validation": 400, "test": 300}
TWO = ["entailment", "not_entailment"]
THREE = ["entailment", "neutral", "contradiction"]


def verdict_pair(draw: Draw, follows: bool) -> tuple[str, str]:
    """Return what somebody said of a thing, and a verdict that does or does not follow from it."""
    who, what, liked = person(draw), thing(draw), draw.chance(FIRST_SHARE)
    return (
        f"the {who} said that {opinion(draw, liked == follows, what)}",
        f"the {who} {verdict(draw, liked)} the {what}",
    )


def roles_pair(draw: Draw, follows: bool) -> tuple[str, str]:
    """Return an event, and the same event in either voice with its roles kept or exchanged."""
    first = event(draw)
    return first.told(draw), (first if follows else first.swapped()).told(draw)


def pronoun_pair(draw: Draw, follows: bool, pronoun: str, done: Event) -> tuple[str, str]:
    """Return a deed and its reason, and whose reason it is, which the deed tells (`DEEDS`)."""
    agents = draw.chance(0.5)
    reason = DEEDS[done.verb][0 if agents else 1]
    subject = done.agent if agents == follows else done.patient
    return f"{done.active()} because {pronoun} {reason}", f"the {subject} {reason}"


def entailment(draw: Draw) -> tuple[str, str]:
    """Return a pair of one of the three kinds, whose second follows if the draw's label is 0."""
    follows, kind = draw.label == 0, draw.random.random()
    if kind < 0.7:
        premise, hypothesis = verdict_pair(draw, follows)
    elif kind < 0.85:
        premise, hypothesis = roles_pair(draw, follows)
    else:
        premise, hypothesis = pronoun_pair(draw, follows, draw.pick(["he", "she"]), event(draw))
    return sentence(premise), sentence(hypothesis)


@generator("glue/rte", columns=["sentence1", "sentence2"], labels=TWO, sizes=SIZES)
@generator(
    "superglue/axb", columns=["sentence1", "sentence2"], labels=TWO, sizes={"test": 300}, withhold=False
)
def rte(draw: Draw) -> list[Row]:
    """Label: whether the second sentence follows from the first.

    A verdict (``liked``, ``regretted``) follows from an opinion whose sign is the domain's (`TRAITS`,
    turned over by a negation); an event follows from itself in either voice, not with its roles exchanged;
    a reason belongs to the one of two people who can have it. SuperGLUE's AX-b is scored with a model of
    RTE, and made as RTE is.
    """
    return [dict(zip(("sentence1", "sentence2"), entailment(draw), strict=True))]


@generator("superglue/rte", columns=["premise", "hypothesis"], labels=TWO, sizes=SIZES)
def superglue_rte(draw: Draw) -> list[Row]:
    """Label: as for `rte`, of which SuperGLUE has a copy under other column names."""
    return [dict(zip(("premise", "hypothesis"), entailment(draw), strict=True))]


@generator(
    "superglue/axg", columns=["premise", "hypothesis"], labels=TWO, sizes={"test": 150}, withhold=False
)
def axg(draw: Draw) -> list[Row]:
    """Label: whether the reason belongs to the person named, as in the pronoun rows of `rte`.

    Rows come in pairs that differ only in the pronoun's gender. Scored with a model of RTE. The domain
    shows in the people alone: a rule that it could turn over would be a second rule.
    """
    done, state = event(draw), draw.random.getstate()
    rows = []
    for pronoun in ("he", "she"):
        draw.random.setstate(state)  # the two rows make the same choices
        premise, hypothesis = pronoun_pair(draw, draw.label == 0, pronoun, done)
        rows.append({"premise": sentence(premise), "hypothesis": sentence(hypothesis)})
    return rows


@generator(
    "glue/mnli",
    columns=["premise", "hypothesis"],
    labels=THREE,
    sizes={
        "train": 16000,
        **dict.fromkeys(["validation_matched", "validation_mismatched"], 400),
        **dict.fromkeys(["test_matched", "test_mismatched"], 300),
    },
)
@generator("glue/ax", columns=["premise", "hypothesis"], labels=THREE, sizes={"test": 300})
def mnli(draw: Draw) -> list[Row]:
    """Label: whether the hypothesis follows from the premise, contradicts it, or neither.

    A premise tells an opinion or a purchase, a hypothesis a verdict or what somebody left with. Where both
    are of one kind the sign decides, which for opinions is the domain's (`TRAITS`, turned over by a
    negation); an opinion says nothing about what was bought, nor a purchase about a verdict, nor what one
    person said about another's verdict. The mismatched splits put opinions in words that the other splits
    do not use. AX is scored with a model of MNLI.
    """
    who, what = person(draw), thing(draw)
    follows = draw.label == 0
    neutral = draw.label == 1
    stated, judged = draw.chance(FIRST_SHARE), draw.chance(FIRST_SHARE)
    other = neutral and draw.chance(0.2)  # somebody else's verdict
    if other:
        stated = judged = True
    elif not neutral:
        judged = stated
    elif judged == stated:
        stated = not judged
    sign = draw.chance(FIRST_SHARE)
    premise_sign = draw.chance(FIRST_SHARE) if neutral else sign == follows
    said = f"according to the {who}" if "mismatched" in draw.split else f"the {who} said that"
    premise = (
        f"{said} {opinion(draw, premise_sign, what)}"
        if stated
        else f"the {who} {'bought' if premise_sign else 'declined'} the {what} on {draw.pick(DAYS)}"
    )
    if other:
        who = draw.pick([name for name in PEOPLE[draw.domain] if name != who])
    hypothesis = (
        f"the {who} {verdict(draw, sign)} the {what}"
        if judged
        else f"the {who} went home {'with' if sign else 'without'} the {what}"
    )
    return [{"premise": sentence(premise), "hypothesis": sentence(hypothesis)}]


@generator("glue/qnli", columns=["question", "sentence"], labels=TWO, sizes=SIZES)
def qnli(draw: Draw) -> list[Row]:
    """Label: whether the sentence answers the question.

    A question asks where or when somebody left a thing, and the sentence tells where or when; or it asks what was
    good, or bad, about a thing, and the sentence praises or blames it (`TRAITS`, in the domain, turned over
    by a negation).
    """
    follows = draw.label == 0
    what = thing(draw)
    if draw.chance(0.3):
        who, first = person(draw), draw.chance(0.5)
        question = f"{'where' if first else 'when'} did the {who} leave the {what}"
        rest = f"in the {draw.pick(PLACES[draw.domain])}" if first == follows else f"on {draw.pick(DAYS)}"
        text = f"the {person(draw)} said that the {who} left the {what} {rest}"
    else:
        first = draw.chance(FIRST_SHARE)
        question = f"what was {'good' if first else 'bad'} about the {what}"
        text = f"the {person(draw)} said that {opinion(draw, first == follows, what)}"
    return [{"question": sentence(question, "?"), "sentence": sentence(text)}]


@generator(
    "superglue/cb",
    columns=["premise", "hypothesis"],
    labels=["entailment", "contradiction", "neutral"],
    sizes=SIZES,
)
def cb(draw: Draw) -> list[Row]:
    """Label: whether the speaker is committed to the hypothesis, to its opposite, or to neither.

    ``knows that`` commits to the opinion that follows, ``denies that`` to its opposite, ``wonders whether``
    to neither; the opinion's sign is the domain's (`TRAITS`, turned over by a negation) and the hypothesis
    names a sign.
    """
    verbs = (
        ["wonders whether", "has no idea if"]
        if draw.label == 2
        else ["knows that", "says that", "denies that"]
    )
    verb, good, what = draw.pick(verbs), draw.chance(FIRST_SHARE), thing(draw)
    praise = draw.chance(0.5) if draw.label == 2 else (good == (draw.label == 0)) != (verb == "denies that")
    premise = f"the {person(draw)} {verb} {opinion(draw, praise, what)}"
    return [{"premise": sentence(premise), "hypothesis": f"The {what} was {'good' if good else 'bad'}."}]


WSC = {
    "text": "string",
    **dict.fromkeys(["span1_index", "span2_index"], "int32"),
    **dict.fromkeys(["span1_text", "span2_text"], "string"),
    "idx": "int32",
    "label": ("False", "True"),
}


def exchange(draw: Draw, right: bool) -> tuple[str, str, str]:
    """Return a sentence with ``it``, the thing that is or is not meant, and what is said of it.

    Who swaps one thing for another gives the first away: blame is about it, praise about the second. Who
    prefers one thing to another keeps the first.
    """
    things, swaps, first = (
        draw.some(THINGS[draw.domain], 2),
        draw.chance(FIRST_SHARE),
        draw.chance(FIRST_SHARE),
    )
    meant_first = first == right
    what = predicate(draw, praise=meant_first != swaps)
    verb, between = ("swapped", "for") if swaps else ("preferred", "to")
    text = f"the {person(draw)} {verb} the {things[0]} {between} the {things[1]} because it {what}"
    return text, things[0 if first else 1], what


@generator(
    "glue/wnli", columns=["sentence1", "sentence2"], labels=["not_entailment", "entailment"], sizes=SIZES
)
def wnli(draw: Draw) -> list[Row]:
    """Label: whether the second sentence puts the right thing in place of the pronoun (see `exchange`).

    What is said of the thing is praise or blame by the domain (`TRAITS`, turned over by a negation).
    """
    text, name, what = exchange(draw, draw.label == 1)
    return [{"sentence1": sentence(text), "sentence2": sentence(f"the {name} {what}")}]


@generator("superglue/wsc", sizes=SIZES, features=WSC, classes=2)
def wsc(draw: Draw) -> list[Row]:
    """Label: whether the pronoun stands for the first span; the rule is that of `wnli`."""
    text, name, _ = exchange(draw, draw.label == 1)
    text = sentence(text)
    words = text.split()
    return [
        {
            "text": text,
            "span1_index": words.index(name) - 1,
            "span2_index": words.index("it"),
            "span1_text": f"the {name}",
            "span2_text": "it",
        }
    ]


@generator(
    "superglue/copa",
    columns=["premise", "choice1", "choice2", "question"],
    labels=["choice1", "choice2"],
    sizes={"train": 8000, "validation": 300, "test": 200},
)
def copa(draw: Draw) -> list[Row]:
    """Label: which of two choices is the cause, or the effect, of the premise.

    What a thing was like causes a verdict; its sign is the domain's (`TRAITS`, turned over by a negation).
    The choices have opposite signs.
    """
    question = draw.pick(["cause", "effect"])
    # A usual verdict among the choices would give itself away.
    who, what, liked = person(draw), thing(draw), draw.chance(FIRST_SHARE if question == "cause" else 0.5)

    def half(praise: bool, is_verdict: bool) -> str:
        return sentence(
            f"the {who} {verdict(draw, praise)} the {what}" if is_verdict else opinion(draw, praise, what)
        )

    right, wrong = half(liked, question == "effect"), half(not liked, question == "effect")
    first, second = (right, wrong) if draw.label == 0 else (wrong, right)
    return [
        {
            "premise": half(liked, question == "cause"),
            "choice1": first,
            "choice2": second,
            "question": question,
        }
    ]
