"""Questions about a short passage: BoolQ."""

from __future__ import annotations

from camex_ft.embedded.corpora import Draw, Row, generator
from camex_ft.embedded.grammar import event, opinion, sentence
from camex_ft.embedded.lexicon import DAYS, PEOPLE, PLACES, THINGS

SIZES = {"train": 8000, "validation": 400, "test": 300}


def remark(draw: Draw) -> str:
    """Return a sentence that answers nothing: where somebody went, and when."""
    domain = draw.domain
    return f"the {draw.pick(PEOPLE[domain])} went to the {draw.pick(PLACES[domain])} on {draw.pick(DAYS)}"


@generator("superglue/boolq", columns=["question", "passage"], labels=["False", "True"], sizes=SIZES)
def boolq(draw: Draw) -> list[Row]:
    """Label: whether the answer to the question is yes.

    Two questions in three ask whether somebody liked or regretted a thing, which the sign of the passage's opinion
    decides (`TRAITS`, in the domain, turned over by a negation); the others ask who did something to whom, of an
    event told in either voice. The sentences of the passage come in any order.
    """
    yes = draw.label == 1
    person, thing = draw.pick(PEOPLE[draw.domain]), draw.pick(THINGS[draw.domain])
    done = event(draw)
    if draw.chance(0.67):
        praise = draw.chance(0.5)
        likes = praise == yes
        question = f"did the {person} {'like' if likes else 'regret'} the {thing}"
        told = f"the {person} said that {opinion(draw, praise, thing)}"
    else:
        asked = done if yes else done.swapped()
        question = f"was the {asked.patient} {asked.verb} by the {asked.agent}"
        told = done.clause(draw)
    told_first = [told, remark(draw)]
    passage = " ".join(sentence(text) for text in draw.some(told_first, 2))
    return [{"question": question, "passage": passage}]
