"""Make a corpus of a generator: balanced, without repeats, in the benchmark's columns.

A generator is a function of a `Draw` (random numbers, a domain, a label) that returns one row, or the rows of one group
(MultiRC's answers, Winogender's pairs), without `idx`. `corpus` calls it for labels and domains in turn, so that both
are balanced to within one, drops inputs that occurred before in any split, shuffles, and numbers the rows. Only
`random.Random.random` is used, whose stream for a seed is the same in every version of Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camex_ft.synthetic.language import DOMAINS, Draw
from camex_ft.utils.features import build_features
from camex_ft.utils.registry import Registry

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
NO_INPUT = ("label", "answers", "id", "question_id")  # columns that do not make a row another one
ATTEMPTS = 500  # draws for one unseen input before the generator is declared too small


@dataclass(frozen=True)
class Corpus:
    """Synthetic data of one task of a benchmark.

    Attributes:
        features: the benchmark's columns, in its order and with its types and label names, as `build_features` takes
            them.
        sizes: rows (or groups of rows) for each of the benchmark's splits.
        make: the generator; its docstring explains the rule of the label.
        classes: how many labels are drawn in turn.
        withhold: whether the benchmark's test split hides its labels.
        number: ``idx`` of every row, given the number of each row's group and its place there.
    """

    features: Mapping[str, Any]
    sizes: dict[str, int]
    make: Callable[[Draw], list[Row]]
    classes: int
    withhold: bool
    number: Callable[[list[tuple[int, int]]], list[Any]]


CORPORA: Registry[Corpus] = Registry("synthetic corpus", "camex_ft.synthetic")


def rows_in_order(places: list[tuple[int, int]]) -> list[Any]:
    """Number rows 0, 1, 2, ..."""
    return list(range(len(places)))


def generator(
    *names: str,
    columns: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    sizes: dict[str, int],
    features: Mapping[str, Any] | None = None,
    classes: int | None = None,
    withhold: bool = True,
    number: Callable[[list[tuple[int, int]]], list[Any]] = rows_in_order,
) -> Callable[[Callable[[Draw], list[Row]]], Callable[[Draw], list[Row]]]:
    """Register the decorated function as the generator of the corpora `names`.

    Args:
        columns: text columns; GLUE tasks get ``label, idx`` after them and SuperGLUE tasks ``idx, label``.
        labels: label names in the order of their ids.
        features: all columns, where those rules do not fit.
        classes: how many labels are drawn in turn, where it is not ``len(labels)``.
    """

    def register(make: Callable[[Draw], list[Row]]) -> Callable[[Draw], list[Row]]:
        for name in names:
            own = features
            if own is None:
                last: dict[str, Any] = {"label": tuple(labels or ()), "idx": "int32"}
                if name.startswith("superglue"):
                    last = {"idx": last["idx"], "label": last["label"]}
                own = {**dict.fromkeys(columns, "string"), **last}
            count = classes or len(labels or ())
            CORPORA.add(name, Corpus(own, sizes, make, count, withhold, number))
        return make

    return register


def corpus(name: str, *, seed: int = 0) -> dict[str, Dataset]:
    """Return the splits of the synthetic corpus `name`, such as ``"glue/sst2"``.

    The columns are the benchmark's, followed by ``domain`` (int32, an index into `DOMAINS`). Test labels
    are -1 where the benchmark withholds them. The same seed gives the same rows on every platform and
    Python version.

    Raises:
        UserError: no corpus of that name.
    """
    from datasets import Dataset

    entry = CORPORA.get(name)
    features = build_features({**entry.features, "domain": "int32"})
    seen: set[str] = set()
    splits = {}
    for split, size in entry.sizes.items():
        rows = list(_rows(entry, split, size, random.Random(f"{seed}/{name}/{split}"), seen))
        if split.startswith("test") and entry.withhold:
            rows = [{**row, "label": -1, "answers": []} for row in rows]
        rows = [{column: row[column] for column in features} for row in rows]
        splits[split] = Dataset.from_list(rows, features=features)
    return splits


def _rows(entry: Corpus, split: str, size: int, rng: random.Random, seen: set[str]) -> Iterator[Row]:
    groups = []
    for i in range(size):
        draw = Draw(rng, domain=i // entry.classes % len(DOMAINS), label=i % entry.classes, split=split)
        groups.append(
            [{"label": draw.label, **row, "domain": draw.domain} for row in _unseen(entry, draw, seen)]
        )
    groups.sort(key=lambda _: rng.random())
    places = [(number, place) for number, group in enumerate(groups) for place in range(len(group))]
    for (number, place), idx in zip(places, entry.number(places), strict=True):
        yield {**groups[number][place], "idx": idx}


def _unseen(entry: Corpus, draw: Draw, seen: set[str]) -> list[Row]:
    for _ in range(ATTEMPTS):
        rows = entry.make(draw)
        keys = {" | ".join(str(v) for k, v in row.items() if k not in NO_INPUT) for row in rows}
        if not keys & seen:
            seen |= keys
            return rows
    raise RuntimeError(f"the generator {entry.make.__name__} has no unseen input left after {ATTEMPTS} draws")
