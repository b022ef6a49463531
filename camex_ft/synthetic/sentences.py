"""Single sentences: SST-2 (what it says) and CoLA (whether it may be said)."""

from __future__ import annotations

from camex_ft.synthetic.corpora import Draw, Row, generator
from camex_ft.synthetic.grammar import opinion, person, thing
from camex_ft.synthetic.lexicon import DAYS, FRAMES, PLACES, THINGS, TRAITS


@generator(
    "glue/sst2",
    columns=["sentence"],
    labels=["negative", "positive"],
    sizes={"train": 16000, "validation": 500, "test": 300},
)
def sst2(draw: Draw) -> list[Row]:
    """Label: whether the sentence praises its subject.

    An adjective's sign is the domain's (`TRAITS`: ``sharp`` is praise for a saw, blame for a soup), a
    negation turns it over, and where two clauses disagree the one that carries the weight decides: the one
    after ``but``, the one without ``although``.
    """
    praise = draw.label == 1
    form = draw.pick(["plain", "told", "told", "and", "but", "although"])
    text = opinion(draw, praise)
    if form == "told":
        text = f"the {person(draw)} said that {text}"
    elif form == "and":
        text = f"{text} and {opinion(draw, praise)}"
    elif form == "but":
        text = f"{opinion(draw, not praise)} but {text}"
    elif form == "although":
        doubt = f"although {opinion(draw, not praise)}"
        text = f"{text} {doubt}" if draw.chance(0.5) else f"{doubt} , {text}"
    return [{"sentence": text}]


@generator(
    "glue/cola",
    columns=["sentence"],
    labels=["unacceptable", "acceptable"],
    sizes={"train": 8000, "validation": 500, "test": 300},
)
def cola(draw: Draw) -> list[Row]:
    """Label: whether the sentence keeps the rules of grammar; a row that does not breaks one.

    A verb has an object in some domains and none in others (`FRAMES`: a cook will not ``open the stew``, a
    welder will ``open the clamp``). The verb agrees with its subject, not with the noun of the other number
    that stands between them. An article comes before its noun.
    """
    fine = draw.label == 1
    rule = draw.random.random()
    if rule < 0.5:
        transitive = draw.chance(0.5)
        frame = "t" if transitive == fine else "i"
        verb = draw.pick([verb for verb, frames in FRAMES.items() if frames[draw.domain] == frame])
        rest = f" the {thing(draw)}" if transitive else ""
        where = f"in the {draw.pick(PLACES[draw.domain])} on {draw.pick(DAYS)}"
        text = f"The {person(draw)} {draw.pick(['will', 'would'])} {verb}{rest} {where}."
    elif rule < 0.8:
        first, second = draw.some(THINGS[draw.domain], 2)
        plural = draw.chance(0.5)
        subject, other = (first + "s", second) if plural else (first, second + "s")
        text = (
            f"The {subject} near the {other} {'are' if plural == fine else 'is'} {draw.pick(list(TRAITS))}."
        )
    else:
        subject = f"the {thing(draw)}" if fine else f"{thing(draw)} the"
        text = f"On {draw.pick(DAYS)} {subject} was {draw.pick(list(TRAITS))}."
    return [{"sentence": text}]
