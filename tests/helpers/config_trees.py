"""Hypothesis strategies: valid configurations, as trees of plain values, and what is done to them."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import strategies as st

RATE = st.floats(1e-7, 1.0)
# PyYAML writes the line break U+0085 in a way that it reads as a space
LETTERS = st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\x85")
WORD = st.text(LETTERS, min_size=1, max_size=12)
PLACE = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
KEYS: dict[tuple[str, ...], st.SearchStrategy[Any]] = {
    ("profile",): st.sampled_from(["auto", "paper", "embedded"]),
    ("task", "name"): st.sampled_from(["sst2", "rte", "mnli", "stsb"]),
    ("task", "max_length"): st.integers(1, 4096),
    ("task", "predict"): st.booleans(),
    ("data", "train_rows"): st.none() | st.integers(1, 10**6),
    ("data", "eval_rows"): st.none() | st.integers(1, 10**6),
    ("data", "seed"): st.integers(0, 10**6),
    ("merging", "protocol"): st.sampled_from(["smear", "domain", "ties-ca", "dare-ca"]),
    ("merging", "experts"): st.integers(8, 16),
    ("merging", "top_k"): st.none() | st.integers(1, 4),
    ("merging", "alpha"): st.floats(0, 2),
    ("merging", "curvature", "kind"): st.sampled_from(["kronecker", "diagonal", "low-rank"]),
    ("merging", "curvature", "rank"): st.integers(1, 16),
    ("routing", "granularity"): st.sampled_from(["auto", "sequence", "segment", "token"]),
    ("routing", "router"): st.sampled_from(["linear", "cosine"]),
    ("routing", "temperature"): st.floats(0.01, 100),
    ("routing", "normalise"): st.sampled_from(["after", "before"]),
    ("routing", "z_loss"): st.floats(0, 1),
    ("routing", "noise"): st.booleans(),
    ("routing", "balance"): st.floats(0, 1),
    ("routing", "segment"): st.integers(1, 1024),
    ("routing", "first_segment"): st.sampled_from(["prior", "self"]),
    ("upcycle", "layers"): st.sampled_from(["all", "every_other"])
    | st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    ("upcycle", "init"): st.sampled_from(["copy", "noise", "drop"]),
    ("upcycle", "drop"): st.floats(0, 1),
    ("upcycle", "noise"): st.floats(0, 1),
    ("tuning", "mode"): st.sampled_from(["full", "experts"]),
    ("training", "learning_rate"): RATE,
    ("training", "router_learning_rate"): st.none() | RATE,
    ("training", "curvature_learning_rate"): st.none() | RATE,
    ("training", "num_train_epochs"): st.floats(0.1, 20),
    ("training", "per_device_train_batch_size"): st.integers(1, 64),
    ("training", "weight_decay"): st.floats(0, 1),
    ("training", "seed"): st.integers(0, 2**32 - 1),
    ("training", "resume"): st.sampled_from(["auto", "never"]) | WORD,
    ("training", "run_name"): WORD,  # a field of TrainingArguments, and free text
    ("training", "lr_scheduler_type"): st.sampled_from(["linear", "cosine", "constant"]),
    ("training", "bf16"): st.booleans(),
    ("output", "dir"): PLACE,
}
Tree = dict[str, Any]
Leaves = dict[tuple[str, ...], Any]


@st.composite
def leaves(draw: st.DrawFn, *, min_size: int = 1) -> Leaves:
    """Valid values of some keys, in any order."""
    keys = draw(st.lists(st.sampled_from(list(KEYS)), min_size=min_size, max_size=12, unique=True))
    return {key: draw(KEYS[key]) for key in keys}


def tree(values: Leaves) -> Tree:
    """Nest dotted keys."""
    nested: Tree = {}
    for key, value in values.items():
        inner = nested
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = value
    return nested


def one_line(value: Any) -> str:
    """YAML of a value on one line, quoted by PyYAML's own 1.1 rules: a writer independent of the package's."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .replace("\n...", "")
        .strip()
    )
