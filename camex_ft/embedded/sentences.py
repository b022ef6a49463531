"""Single sentences: SST-2 (opinion) and CoLA (grammar)."""

from __future__ import annotations

from camex_ft.embedded.corpora import Draw, Row, generator
from camex_ft.embedded.grammar import opinion
from camex_ft.embedded.lexicon import PEOPLE

SIZES = {"train": 8000, "validation": 500, "test": 300}


@generator("glue/sst2", columns=["sentence"], labels=["negative", "positive"], sizes=SIZES)
def sst2(draw: Draw) -> list[Row]:
    """Label: whether the sentence praises its subject.

    An adjective's sign is the domain's (`TRAITS`: ``sharp`` is praise for a saw, blame for a soup), a negation turns it
    over, and where two clauses disagree the one that carries the weight decides: the one after ``but``, the one without
    ``although``.
    """
    praise = draw.label == 1
    form = draw.pick(["plain", "plain", "plain", "and", "but", "although"])
    text = opinion(draw, praise)
    if form == "and":
        text = f"{text} and {opinion(draw, praise)}"
    elif form == "but":
        text = f"{opinion(draw, not praise)} but {text}"
    elif form == "although":
        doubt = f"although {opinion(draw, not praise)}"
        text = f"{text} {doubt}" if draw.chance(0.5) else f"{doubt} , {text}"
    elif draw.chance(0.5):
        text = f"the {draw.pick(PEOPLE[draw.domain])} said that {text}"
    return [{"sentence": text}]
