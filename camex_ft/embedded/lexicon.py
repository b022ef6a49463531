"""The words of the embedded corpora: four domains, and words whose meaning depends on the domain.

A *domain* is the world a text talks about: the tools of a workshop, a thriller, the dishes of a kitchen, a journey. It
shows in the nouns. Two tables make it matter: `TRAITS` says in which domains an adjective is praise, and `SENSES` says
which of two readings a verb has. In both, half of the domains lie on either side, so a word alone says nothing.
"""

from __future__ import annotations

DOMAINS = ("workshop", "thriller", "kitchen", "journey")

THINGS = (
    "saw drill lathe hammer wrench chisel ladder clamp".split(),
    "novel plot villain chase ending film scene sequel".split(),
    "soup stew cake sauce roast salad pie broth".split(),
    "flight cruise hike tour ride trail route voyage".split(),
)
PEOPLE = (
    "carpenter welder plumber smith joiner builder".split(),
    "detective author critic spy thief reader".split(),
    "cook waiter baker guest butcher grocer".split(),
    "pilot guide tourist sailor driver hiker".split(),
)
PLACES = (
    "shed yard garage".split(),
    "library theater studio".split(),
    "kitchen tavern market".split(),
    "harbor station valley".split(),
)
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
NAMES = "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Leo".split()

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
MOODS = {
    "excellent": "++++",
    "superb": "++++",
    "awful": "----",
    "dreadful": "----",
}  # the same in every domain
VERDICTS = {"+": "liked enjoyed recommended".split(), "-": "disliked regretted avoided".split()}

# Past tense of a verb: its two readings, and which of them it has in each domain.
SENSES = {
    "charged": (("billed", "attacked"), "0101"),
    "covered": (("protected", "replaced"), "1010"),
    "spotted": (("noticed", "supported"), "0011"),
    "crossed": (("passed", "betrayed"), "1100"),
    "drilled": (("trained", "questioned"), "0110"),
    "cut": (("dismissed", "wounded"), "1001"),
    "toasted": (("honored", "mocked"), "0101"),
    "shadowed": (("followed", "assisted"), "1100"),
}
DEEDS = "thanked warned praised blamed paid called".split()  # one reading everywhere

# Verbs that take an object in some domains ("t") and none in the others ("i"): base form and the frame in each domain.
FRAMES = {
    "run": "titi",
    "turn": "itit",
    "open": "ttii",
    "move": "iitt",
    "start": "tiit",
    "finish": "itti",
}

ASKERS = "friend neighbor colleague visitor".split()
ADVERBS = "very quite rather truly".split()
COPULAS = "was seemed looked felt".split()

# Everything else that a template may hold; tests check that no corpus emits a word that is missing here.
FUNCTION_WORDS = """
a about according after all also although am an and answer any anybody are as asked at because been before believes
both bought but buy buys by can cause chance choice could day decided declined denies did do does doubts during each
effect entity everybody event find for from good grateful guilty had happened has have he helped her here him his how
hypothesis i if in is it its kept knows later less like likes made makes maybe mean more most my near need never news no
nobody not of off on one only or our out over passage person place placeholder premise question regrets said same say
says sentence she should so some somebody sorry statement tell text than that the their them then there they thing
thinks this those though time to too true false two under unless used was way we wears went were what when where
whether which while who whom why will with wonders word worth would yes yesterday yet you your
"""


def words() -> list[str]:
    """Return every word the project's generators can emit, lower-cased, sorted and without repeats."""
    found = set(FUNCTION_WORDS.split())
    for group in (*THINGS, *PEOPLE):
        found.update(group, (word + "s" for word in group))
    for group in (*PLACES, DAYS, NAMES, ASKERS, ADVERBS, COPULAS, DEEDS, *VERDICTS.values(), DOMAINS):
        found.update(word.lower() for word in group)
    found.update(TRAITS, MOODS, SENSES)
    found.update(word for readings, _ in SENSES.values() for word in readings)
    found.update(form for verb in FRAMES for form in (verb, verb + "s", verb + "es"))
    return sorted(found)
