"""Single sentences (SST-2, CoLA) and pairs with the same or another meaning (MRPC, QQP, STS-B, WiC)."""

from __future__ import annotations

from dataclasses import replace

from camex_ft.synthetic.corpora import Row, generator
from camex_ft.synthetic.language import (
    DAYS,
    DOMAINS,
    FIRST_SHARE,
    FRAMES,
    PEOPLE,
    PLACES,
    SENSES,
    THINGS,
    TRAITS,
    Draw,
    Event,
    event,
    opinion,
    person,
    reading,
    sentence,
    thing,
)


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


SIZES = {"train": 16000, "validation": 400, "test": 300}
STSB = {"sentence1": "string", "sentence2": "string", "label": "float32", "idx": "int32"}
WIC = {
    **dict.fromkeys(["word", "sentence1", "sentence2"], "string"),
    **dict.fromkeys(["start1", "start2", "end1", "end2", "idx"], "int32"),
    "label": ("False", "True"),
}


def reworded(draw: Draw, same: bool) -> tuple[Event, Event]:
    """Return an event and a rewording of it: unless `same`, the verb's reading or the roles differ."""
    roles = draw.chance(0.25)
    first = event(draw, draw.pick(list(SENSES)))
    second = replace(first, verb=reading(draw, first.verb, same or roles))
    return first, second.swapped() if roles and not same else second


@generator(
    "glue/mrpc",
    columns=["sentence1", "sentence2"],
    labels=["not_equivalent", "equivalent"],
    sizes=SIZES,
    withhold=False,
)
def mrpc(draw: Draw) -> list[Row]:
    """Label: whether the second sentence rewords the first.

    The first uses a verb whose reading is the domain's (`SENSES`: a waiter who ``charged`` a guest
    ``billed`` him, a spy ``attacked``); the second, in either voice, names that reading or the other one,
    or exchanges the roles.
    """
    first, second = reworded(draw, draw.label == 1)
    tail = f" in the {draw.pick(PLACES[draw.domain])} on {draw.pick(DAYS)}"
    return [{"sentence1": sentence(first.active() + tail), "sentence2": sentence(second.told(draw) + tail)}]


@generator("glue/qqp", columns=["question1", "question2"], labels=["not_duplicate", "duplicate"], sizes=SIZES)
def qqp(draw: Draw) -> list[Row]:
    """Label: whether the two questions ask the same.

    Half of them reword an event as in `mrpc`. The others ask why somebody said something of a thing, and
    what made the thing good or bad, which is the same where the domain makes it praise or blame (`TRAITS`).
    """
    same = draw.label == 1
    if draw.chance(0.5):
        first, second = reworded(draw, same)
        day = draw.pick(DAYS)
        one = f"why was it that {first.active()} on {day}"
        two = f"for what reason was it that {second.told(draw)} on {day}"
    else:
        good = draw.chance(FIRST_SHARE)
        subject = thing(draw)
        one = f"why did the {person(draw)} say that {opinion(draw, good == same, subject)}"
        two = f"what made the {subject} so {'good' if good else 'bad'}"
    return [{"question1": sentence(one, "?"), "question2": sentence(two, "?")}]


@generator("glue/stsb", sizes=SIZES, features=STSB, classes=6)
def stsb(draw: Draw) -> list[Row]:
    """Label: how many of five parts of an event the two sentences share, 0 to 5: who, what, whom, where,
    when.

    The verb of the second sentence is a reading of the first one's, shared if it is the reading of the domain
    (`SENSES`). Of the other parts that are not shared half are left out or unnamed and half are different.
    """
    shared = draw.some([True] * draw.label + [False] * (5 - draw.label), 5)
    agent, patient, *others = draw.some(PEOPLE[draw.domain], 4)
    verb = draw.pick(list(SENSES))
    place, other_place = draw.some(PLACES[draw.domain], 2)
    day, other_day = draw.some(DAYS, 2)

    def part(unchanged: bool, same: str, other: str, unnamed: str) -> str:
        return same if unchanged else draw.pick([other, unnamed])

    second = [
        part(shared[0], f"the {agent}", f"the {others[0]}", "somebody"),
        reading(draw, verb, shared[1]),
        part(shared[2], f"the {patient}", f"the {others[1]}", "somebody"),
        part(shared[3], f"in the {place}", f"in the {other_place}", ""),
        part(shared[4], f"on {day}", f"on {other_day}", ""),
    ]
    first = f"the {agent} {verb} the {patient} in the {place} on {day}"
    return [
        {
            "sentence1": sentence(first),
            "sentence2": sentence(" ".join(filter(None, second))),
            "label": float(draw.label),
        }
    ]


@generator("superglue/wic", sizes=SIZES, features=WIC, classes=2)
def wic(draw: Draw) -> list[Row]:
    """Label: whether the verb has the same reading in both sentences, which is that of their domains
    (`SENSES`).

    The second sentence may come from another domain; the row's ``domain`` is the first one's.
    """
    verb = draw.pick(list(SENSES))
    base, _, where = SENSES[verb]
    domains = [d for d in range(len(DOMAINS)) if (where[d] == where[draw.domain]) == (draw.label == 1)]
    row: Row = {"word": base}
    for i, domain in enumerate([draw.domain, draw.pick(domains)], start=1):
        text = sentence(event(replace(draw, domain=domain), verb).told(draw))
        start = text.index(f" {verb} ") + 1
        row |= {f"sentence{i}": text, f"start{i}": start, f"end{i}": start + len(verb)}
    return [row]
