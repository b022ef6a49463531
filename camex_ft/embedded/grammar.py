"""Phrases that the generators share: opinions, whose sign depends on the domain, and events, who did what to whom."""

from __future__ import annotations

from dataclasses import dataclass

from camex_ft.embedded.corpora import Draw
from camex_ft.embedded.lexicon import ADVERBS, COPULAS, DEEDS, MOODS, PEOPLE, SENSES, THINGS, TRAITS

MOOD_SHARE = 0.25  # opinions made with a word that means the same everywhere


def sentence(text: str, end: str = ".") -> str:
    """Return `text` with a capital first letter and a final mark."""
    return text[0].upper() + text[1:] + end


def trait(draw: Draw, praise: bool) -> str:
    """Return an adjective that is praise in the draw's domain, or blame."""
    table = MOODS if draw.chance(MOOD_SHARE) else TRAITS
    return draw.pick([word for word, signs in table.items() if (signs[draw.domain] == "+") == praise])


def predicate(draw: Draw, praise: bool) -> str:
    """Return what is said of a thing, such as ``was not very sharp``; a negation turns the adjective's sign over."""
    negated = draw.chance(0.25)
    parts = [draw.pick(COPULAS)]
    if negated:
        parts.append(draw.pick(["not", "never"]))
    if draw.chance(0.4):
        parts.append(draw.pick(ADVERBS))
    return " ".join([*parts, trait(draw, praise != negated)])


def opinion(draw: Draw, praise: bool, thing: str | None = None) -> str:
    """Return a clause that praises or blames a thing of the draw's domain: ``the soup was not sharp``."""
    return f"the {thing or draw.pick(THINGS[draw.domain])} {predicate(draw, praise)}"


@dataclass(frozen=True)
class Event:
    """Who did what to whom, in one domain; `verb` is a past tense."""

    agent: str
    verb: str
    patient: str

    def active(self) -> str:
        """Return ``the cook thanked the guest``."""
        return f"the {self.agent} {self.verb} the {self.patient}"

    def passive(self) -> str:
        """Return ``the guest was thanked by the cook``."""
        return f"the {self.patient} was {self.verb} by the {self.agent}"

    def clause(self, draw: Draw) -> str:
        """Return either voice."""
        return self.passive() if draw.chance(0.5) else self.active()

    def swapped(self) -> Event:
        """Return the event with the roles exchanged."""
        return Event(self.patient, self.verb, self.agent)


def event(draw: Draw, verbs: list[str] | None = None) -> Event:
    """Return an event between two people of the draw's domain."""
    agent, patient = draw.some(PEOPLE[draw.domain], 2)
    return Event(agent, draw.pick(verbs or DEEDS), patient)


def reading(draw: Draw, verb: str, right: bool = True) -> str:
    """Return the verb's reading in the draw's domain, or the reading it has elsewhere."""
    readings, where = SENSES[verb]
    return readings[int(where[draw.domain]) ^ (not right)]
