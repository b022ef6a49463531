"""Phrases that the generators share: opinions, whose sign is the domain's, and who did what to whom."""

from __future__ import annotations

from dataclasses import dataclass

from camex_ft.synthetic.corpora import Draw
from camex_ft.synthetic.lexicon import (
    ADVERBS,
    COPULAS,
    DAYS,
    DEEDS,
    MOODS,
    PEOPLE,
    PLACES,
    SENSES,
    THINGS,
    TRAITS,
    VERDICTS,
)

# Shares other than one half give parts of a rule a weak signal of their own, without which a rule that is a pure
# exclusive-or of three parts is not found by gradient descent in the minutes there are.
MOOD_SHARE = 0.25  # opinions made with a word that means the same everywhere
NEGATED_SHARE = 0.2
FIRST_SHARE = 0.85  # where one of two forms is to be the usual one


def sentence(text: str, end: str = ".") -> str:
    """Return `text` with a capital first letter and a final mark."""
    return text[0].upper() + text[1:] + end


def person(draw: Draw) -> str:
    """Return somebody of the draw's domain."""
    return draw.pick(PEOPLE[draw.domain])


def thing(draw: Draw) -> str:
    """Return something of the draw's domain."""
    return draw.pick(THINGS[draw.domain])


def predicate(draw: Draw, praise: bool) -> str:
    """Return what is said of a thing: ``was not very sharp``. A negation turns the adjective over."""
    negated = draw.chance(NEGATED_SHARE)
    parts = [draw.pick(COPULAS)]
    if negated:
        parts.append(draw.pick(["not", "never"]))
    if draw.chance(0.4):
        parts.append(draw.pick(ADVERBS))
    table = MOODS if draw.chance(MOOD_SHARE) else TRAITS
    signed = [word for word, signs in table.items() if (signs[draw.domain] == "+") == (praise != negated)]
    return " ".join([*parts, draw.pick(signed)])


def opinion(draw: Draw, praise: bool, subject: str | None = None) -> str:
    """Return a clause that praises or blames a thing of the draw's domain: ``the soup was not sharp``."""
    return f"the {subject or thing(draw)} {predicate(draw, praise)}"


def verdict(draw: Draw, praise: bool) -> str:
    """Return a verb that says the same of a thing in every domain: ``liked``, ``regretted``."""
    return draw.pick(VERDICTS["+" if praise else "-"])


def errand(draw: Draw) -> str:
    """Return where somebody went and when, which has to do with nothing."""
    return f"the {person(draw)} went to the {draw.pick(PLACES[draw.domain])} on {draw.pick(DAYS)}"


@dataclass(frozen=True)
class Event:
    """Who did what to whom; `verb` is a past tense."""

    agent: str
    verb: str
    patient: str

    def active(self) -> str:
        """Return ``the cook thanked the guest``."""
        return f"the {self.agent} {self.verb} the {self.patient}"

    def passive(self) -> str:
        """Return ``the guest was thanked by the cook``."""
        return f"the {self.patient} was {self.verb} by the {self.agent}"

    def told(self, draw: Draw) -> str:
        """Return either voice."""
        return self.passive() if draw.chance(0.5) else self.active()

    def swapped(self) -> Event:
        """Return the event with the roles exchanged."""
        return Event(self.patient, self.verb, self.agent)


def event(draw: Draw, verb: str | None = None) -> Event:
    """Return an event between two people of the draw's domain."""
    agent, patient = draw.some(PEOPLE[draw.domain], 2)
    return Event(agent, verb or draw.pick(list(DEEDS)), patient)


def reading(draw: Draw, verb: str, right: bool = True) -> str:
    """Return the verb's reading in the draw's domain, or the one it has elsewhere."""
    _, readings, where = SENSES[verb]
    return readings[int(where[draw.domain]) ^ (not right)]
