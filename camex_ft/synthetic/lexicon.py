"""The words of the embedded corpora: four domains, and words whose meaning depends on the domain.

A *domain* is the world a text talks about: the tools of a workshop, a thriller, the dishes of a kitchen, a
journey. It shows in the nouns. Three tables make it matter: `TRAITS` says in which domains an adjective is
praise, `SENSES` which of two readings a verb has, `FRAMES` whether a verb takes an object. In all of them
half of the domains lie on either side, so that a word alone says nothing.
"""

from __future__ import annotations

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

# Everything else that a template or a task's own formatting may hold; a test checks that no corpus needs more.
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
    found = set(FUNCTION_WORDS.split())
    for group in (*THINGS, *PEOPLE):
        found.update(group, (word + "s" for word in group))
    for group in (*PLACES, DAYS, ADVERBS, COPULAS, *VERDICTS.values()):
        found.update(group)
    found.update(name.lower() for name in NAMES)
    found.update(TRAITS, MOODS, FRAMES, SENSES, DEEDS, DEALS, SIDES, DOMAINS)
    for base, readings, _ in SENSES.values():
        found.update((base, *readings))
    for reasons in DEEDS.values():
        found.update(" ".join(reasons).split())
    return sorted(found)
