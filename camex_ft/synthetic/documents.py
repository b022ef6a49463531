"""Documents for language modelling, whose later words follow from the domain and from earlier sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from camex_ft.synthetic.corpora import Draw, Row, generator
from camex_ft.synthetic.language import (
    DAYS,
    PEOPLE,
    PLACES,
    SENSES,
    THINGS,
    opinion,
    reading,
    sentence,
    verdict,
)

LEAST, MOST = 9, 15  # sentences of a document


@dataclass(frozen=True)
class Story:
    """Subject of a document: two people, a place, a day, and of three things whether they are good."""

    people: list[str]
    place: str
    day: str
    things: dict[str, bool]


@generator(
    "lm/wikitext-2",
    "lm/wikitext-103",
    "lm/text",
    features={"text": "string"},
    classes=1,
    sizes={"train": 2400, "validation": 160, "test": 160},
)
def document(draw: Draw) -> list[Row]:
    """Tell a story on one line, in sentences that keep to it.

    Two people of the domain's six and three of its eight things occur, and return. A thing that is good stays good: the
    adjectives that say so are the domain's (`TRAITS`), and so is what a verb means (`SENSES`). Place and day, named
    first, come back.
    """
    names, count = THINGS[draw.domain], LEAST + int(draw.random.random() * (MOST - LEAST + 1))
    story = Story(
        people=draw.some(PEOPLE[draw.domain], 2),
        place=draw.pick(PLACES[draw.domain]),
        day=draw.pick(DAYS),
        things={name: draw.chance(0.5) for name in draw.some(names, 3)},
    )
    lines = [f"on {story.day} the {story.people[0]} went to the {story.place}"]
    lines += [draw.pick(SENTENCES)(draw, story) for _ in range(count - 1)]
    return [{"text": " ".join(map(sentence, lines))}]


def judged(draw: Draw, story: Story) -> str:
    """Return an opinion of one of the story's things: ``the saw was sharp``."""
    name = draw.pick(list(story.things))
    return opinion(draw, story.things[name], name)


def reported(draw: Draw, story: Story) -> str:
    """Return an opinion of one of the people."""
    return f"the {draw.pick(story.people)} said that {judged(draw, story)}"


def reasoned(draw: Draw, story: Story) -> str:
    """Return a verdict on a thing, and an opinion as its reason."""
    name = draw.pick(list(story.things))
    good = story.things[name]
    who = draw.pick(story.people)
    return f"the {who} {verdict(draw, good)} the {name} because {opinion(draw, good, name)}"


def explained(draw: Draw, story: Story) -> str:
    """Return an event between the two people, and its reading in the domain."""
    agent, patient = draw.some(story.people, 2)
    verb = draw.pick(list(SENSES))
    return f"the {agent} {verb} the {patient} , so the {patient} was {reading(draw, verb)} by the {agent}"


def recalled(draw: Draw, story: Story) -> str:
    """Return the place and the day of the story again."""
    return f"the {draw.pick(story.people)} was in the {story.place} on {story.day}"


SENTENCES: tuple[Callable[[Draw, Story], str], ...] = (judged, reported, reasoned, explained, recalled)
