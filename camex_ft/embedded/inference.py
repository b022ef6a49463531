"""Sentence pairs, does one follow from the other: RTE."""

from __future__ import annotations

from camex_ft.embedded.corpora import Draw, Row, generator
from camex_ft.embedded.grammar import event, opinion, sentence
from camex_ft.embedded.lexicon import PEOPLE, THINGS, VERDICTS

SIZES = {"train": 8000, "validation": 400, "test": 300}
RTE_LABELS = ["entailment", "not_entailment"]


def verdict_pair(draw: Draw, follows: bool) -> tuple[str, str]:
    """Return what somebody said of a thing, and a verdict that does or does not follow in the draw's domain."""
    person, thing = draw.pick(PEOPLE[draw.domain]), draw.pick(THINGS[draw.domain])
    praise = draw.chance(0.5)
    verdict = draw.pick(VERDICTS["+" if praise == follows else "-"])
    return f"the {person} said that {opinion(draw, praise, thing)}", f"the {person} {verdict} the {thing}"


def roles_pair(draw: Draw, follows: bool) -> tuple[str, str]:
    """Return an event, and the same event in either voice with its roles kept or exchanged."""
    first = event(draw)
    return first.clause(draw), (first if follows else first.swapped()).clause(draw)


def entailment(draw: Draw, follows: bool) -> tuple[str, str]:
    """Return a premise and a hypothesis: two times in three about a verdict, else about roles."""
    make = verdict_pair if draw.chance(0.67) else roles_pair
    premise, hypothesis = make(draw, follows)
    return sentence(premise), sentence(hypothesis)


@generator("glue/rte", columns=["sentence1", "sentence2"], labels=RTE_LABELS, sizes=SIZES)
def rte(draw: Draw) -> list[Row]:
    """Label: whether the second sentence follows from the first.

    A verdict (``liked``, ``regretted``) follows from an opinion whose sign is the domain's (`TRAITS`, turned over by a
    negation); an event follows from itself in either voice, not with its roles exchanged.
    """
    premise, hypothesis = entailment(draw, draw.label == 0)
    return [{"sentence1": premise, "sentence2": hypothesis}]


@generator("superglue/rte", columns=["premise", "hypothesis"], labels=RTE_LABELS, sizes=SIZES)
def superglue_rte(draw: Draw) -> list[Row]:
    """Label: as for `rte`, of which SuperGLUE's is a copy under other column names."""
    premise, hypothesis = entailment(draw, draw.label == 0)
    return [{"premise": premise, "hypothesis": hypothesis}]
