"""Sentences about reference and causes, for WNLI, WSC and COPA."""

from __future__ import annotations

from datasets import ClassLabel, Features, Value

from camex_ft.synthetic.corpora import Draw, Row, generator
from camex_ft.synthetic.grammar import FIRST_SHARE, opinion, person, predicate, sentence, thing, verdict
from camex_ft.synthetic.lexicon import THINGS

SIZES = {"train": 16000, "validation": 400, "test": 300}
WSC = Features(
    {
        "text": Value("string"),
        **dict.fromkeys(["span1_index", "span2_index"], Value("int32")),
        **dict.fromkeys(["span1_text", "span2_text"], Value("string")),
        "idx": Value("int32"),
        "label": ClassLabel(names=["False", "True"]),
    }
)


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
