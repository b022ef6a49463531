"""Words and phrases of the synthetic data: four domains, and words whose meaning depends on the domain.

A *domain* is the world of a text: the tools of a workshop, a thriller, the dishes of a kitchen, a journey. Its nouns
show it. Three tables make it matter: `TRAITS` gives the domains in which an adjective is praise, `SENSES` which of two
readings a verb has, `FRAMES` whether a verb takes an object. In all of them half of the domains lie on either side, so
that a word alone tells nothing. The generators share the phrases: opinions, whose sign is the domain's, and events.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
DOMAINS = ("workshop", "thriller", "kitchen", "journey")

THINGS = (
    ["saw", "drill", "lathe", "hammer", "wrench", "chisel", "ladder", "clamp"],
    ["novel", "plot", "villain", "chase", "ending", "film", "scene", "sequel"],
    ["soup", "stew", "cake", "sauce", "roast", "salad", "pie", "broth"],
    ["flight", "cruise", "hike", "tour", "ride", "trail", "route", "voyage"],
)
PEOPLE = (
    ["carpenter", "welder", "plumber", "smith", "joiner", "builder"],
    ["detective", "author", "critic", "spy", "thief", "reader"],
    ["cook", "waiter", "baker", "guest", "butcher", "grocer"],
    ["pilot", "guide", "tourist", "sailor", "driver", "hiker"],
)
PLACES = (
    ["shed", "yard", "garage"],
    ["library", "theater", "studio"],
    ["bakery", "tavern", "market"],
    ["harbor", "station", "valley"],
)
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"]
ADVERBS = ["very", "quite", "rather", "truly"]
COPULAS = ["was", "seemed", "looked", "felt"]

# One sign a domain, in the order of DOMAINS: "+" where the adjective is praise.
TRAITS = {
    "predictable": "+--+",
    "quiet": "+--+",
    "dry": "+--+",
    "sharp": "++--",
    "heavy": "++--",
    "dark": "++--",
    "plain": "+-+-",
    "simple": "+-+-",
    "thin": "+-+-",
    "soft": "--++",
    "slow": "--++",
    "light": "--++",
    "hot": "-++-",
    "loud": "-++-",
    "rich": "-++-",
    "wild": "-+-+",
    "long": "-+-+",
    "winding": "-+-+",
}
MOODS = {"excellent": "++++", "superb": "++++", "awful": "----", "dreadful": "----"}
VERDICTS = {"+": ["liked", "enjoyed", "recommended"], "-": ["disliked", "regretted", "avoided"]}

# Past tense of a verb: its base form, its two readings, and which of them it has in each domain.
SENSES = {
    "charged": ("charge", ("billed", "attacked"), "0101"),
    "covered": ("cover", ("protected", "replaced"), "1010"),
    "spotted": ("spot", ("noticed", "supported"), "0011"),
    "crossed": ("cross", ("passed", "betrayed"), "1100"),
    "drilled": ("drill", ("trained", "questioned"), "0110"),
    "cut": ("cut", ("dismissed", "wounded"), "1001"),
    "toasted": ("toast", ("honored", "mocked"), "0101"),
    "shadowed": ("shadow", ("followed", "assisted"), "1010"),
}
# Verbs with one reading everywhere: the reason that only the one who does it can have, and the other's.
DEEDS = {
    "thanked": ("was grateful", "had helped"),
    "warned": ("was worried", "was careless"),
    "praised": ("was impressed", "had won"),
    "blamed": ("was angry", "was late"),
    "paid": ("had money", "had worked"),
}

# Verbs that take an object in some domains ("t") and none in the others ("i").
FRAMES = {"run": "titi", "turn": "itit", "open": "ttii", "move": "iitt", "start": "tiit", "finish": "itti"}
# Verbs of a deal that name either side of it, the giver ("g") or the taker ("t"), and those that name one everywhere.
DEALS = {
    "rented": "gtgt",
    "leased": "tgtg",
    "hired": "ggtt",
    "chartered": "ttgg",
    "licensed": "gttg",
    "sublet": "tggt",
}
SIDES = {"lent": "gggg", "borrowed": "tttt"}

# All other words of the templates and of the tasks' formatting; a test checks that no corpus needs more.
FUNCTION_WORDS = """
    a about according all although am an and answer answers any are as at bad be because bought but by
    candidate candidates cause choice context correct declined denies did dislike do does domain doubts effect
    entity everybody false for from gave go good had happened has have he her him his home how hypothesis i
    idea if in is it its know knows leave left like made many me more my near never no nobody not now of
    on one or our out over passage placeholder preferred premise put question reason reasons regret said
    same say says sentence she so some somebody statement swapped text than that the their them there they
    thing this title to true two use wants was we went were what when where whether which who whom why will with
    without wonders word work would yes you your
"""


def words() -> list[str]:
    """Return every word the project's generators can emit, lower-cased, sorted and without repeats."""
    words = set(FUNCTION_WORDS.split())
    for group in (*THINGS, *PEOPLE):
        words.update(group, (word + "s" for word in group))
    for group in (*PLACES, DAYS, ADVERBS, COPULAS, *VERDICTS.values()):
        words.update(group)
    words.update(name.lower() for name in NAMES)
    words.update(TRAITS, MOODS, FRAMES, SENSES, DEEDS, DEALS, SIDES, DOMAINS)
    for base, readings, _ in SENSES.values():
        words.update((base, *readings))
    for reasons in DEEDS.values():
        words.update(" ".join(reasons).split())
    return sorted(words)


@dataclass(frozen=True)
class Draw:
    """Random numbers for one row, with the domain and label that it is to have."""

    random: random.Random
    domain: int
    label: int
    split: str

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, each equally likely."""
        return items[int(self.random.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """Return True with that probability."""
        return self.random.random() < probability

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        left = list(items)
        return [left.pop(int(self.random.random() * len(left))) for _ in range(count)]


# Shares other than one half give parts of a rule a weak signal. Without it, a few minutes of gradient descent do not
# find a rule that is a pure exclusive-or of three parts.
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
    """Return a predicate that praises or blames: ``was not very sharp``. A negation turns the adjective over."""
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
    """Return a verb with the same sign in every domain: ``liked``, ``regretted``."""
    return draw.pick(VERDICTS["+" if praise else "-"])


def errand(draw: Draw) -> str:
    """Return a sentence about a place and a day, irrelevant to every question."""
    return f"the {person(draw)} went to the {draw.pick(PLACES[draw.domain])} on {draw.pick(DAYS)}"


@dataclass(frozen=True)
class Event:
    """An agent, a verb in the past tense, and a patient."""

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
