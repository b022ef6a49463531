"""Configurations that something is wrong with: the shipped ones, made tiny, with a few mutations each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

from camex_ft.config.reading import compose
from camex_ft.config.shipped import list_configs
from camex_ft.config.validation import section_keys

# Whatever a mutation does not aim at stays this small: one that turns out valid is run.
TINY: dict[str, Any] = {
    "profile": "embedded",
    "data.train_rows": 6,
    "data.eval_rows": 4,
    "merging.experts": 2,
    "merging.curvature.rank": 1,
    "training.max_steps": 1,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.dataloader_num_workers": 0,
}
TINY_OPTIONS: dict[str, dict[str, Any]] = {"lm": {"task.block_size": 16}}  # suite -> options of its tasks
LARGE = [10**3, 10**6, 10**9, 2**31, 2**63, 10**30]
NUMBERS = [0, -1, 1, 2, 3, 0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"), *LARGE]
PLAIN_TEXT = """
auto none null true yes all glue sst2 dense ties-ca smear smoe fisher ep-camex namex lora experts embedded hub
disk embedded/bert embedded/gpt2 embedded/brt new: new:embedded/t5 package: package:os/path package:../x ~
~nobody/x /dev/null /etc . .. ../../etc/passwd regression adamw_torch adafactor linear cosine steps epoch best
no sequence segment token 1e3 0x10 1_000 2026-01-01 $(id) `id` {task} %s %(x)s
"""
PLAIN = PLAIN_TEXT.split()
WORDS = [
    *PLAIN,
    *(
        "",
        " ",
        "a\0b",
        "a\nb",
        "'; rm -rf x; '",
        '"',
        "é" * 300,
        "x" * 5000,
        "\u202e",
        "\ud800",
        "\U0001f600",
        "\u0130",
    ),
    "!!python/object:os.system x",
]
ODD: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [1],
    [0, 0],
    ["a"],
    {"a": 1},
    {"": None},
    [None],
    {"a": {"b": []}},
]
Values = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """A configuration as text, and the overrides that keep small what no mutation aims at."""

    text: bytes
    overrides: tuple[str, ...]


def values() -> st.SearchStrategy[Any]:
    """Values that a key may be given, few of which it takes."""
    text = st.sampled_from(WORDS) | st.text(max_size=8)
    odd = st.sampled_from(ODD).map(copy.deepcopy)  # later mutations put values into it
    return st.sampled_from(NUMBERS) | st.integers(-3, 9) | text | odd


def leaves(tree: Values, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in tree.items():
        found.append((*above, name))
        if isinstance(value, dict):
            found += leaves(value, (*above, name))
    return found


def put(tree: Values, key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        inner = tree.get(part)
        if not isinstance(inner, dict):
            inner = tree[part] = {}
        tree = inner
    tree[key[-1]] = value


def drop(tree: Values, key: tuple[str, ...]) -> Any:
    for part in key[:-1]:
        tree = tree[part]
    return tree.pop(key[-1])


TRAINING_TEXT = """
warmup_steps optim lr_scheduler_type gradient_accumulation_steps gradient_checkpointing bf16 fp16
max_grad_norm label_smoothing_factor eval_steps save_steps dataloader_num_workers seed data_seed torch_compile
auto_find_batch_size neftune_noise_alpha report_to adam_beta1 debug dataloader_drop_last full_determinism
optim_args lr_scheduler_kwargs fsdp deepspeed use_cpu eval_accumulation_steps group_by_length
evaluation_strategy output_dir push_to_hub eval_delay
"""
TRAINING = TRAINING_TEXT.split()
KNOWN = [key for key, _ in section_keys()] + [("training", name) for name in TRAINING]
TOPS = ("glue", "superglue", "lm", "qa", "protocols")
BASES = [each.name for each in list_configs() if each.name.split("/")[0] in TOPS]
BASES += [
    "backbones/embedded-bert",
    "backbones/embedded-gpt2",
    "backbones/embedded-t5-gated",
    "profiles/embedded",
]


def _set(draw: Callable[..., Any], tree: Values) -> tuple[str, ...]:
    key = draw(st.sampled_from(KNOWN))
    put(tree, key, draw(values()))
    return key


def _drop(draw: Callable[..., Any], tree: Values) -> tuple[str, ...]:
    key = draw(st.sampled_from(leaves(tree)))
    drop(tree, key)
    return ()  # what is dropped is at its default, and kept small all the same


def _rename(draw: Callable[..., Any], tree: Values) -> tuple[str, ...]:
    key = draw(st.sampled_from(leaves(tree)))
    value = drop(tree, key)
    name = key[-1]
    near = st.sampled_from([name[:-1], name + "s", name.upper(), name.replace("_", "-"), "é", "", " "])
    other = draw(near | st.text(max_size=5))
    put(tree, (*key[:-1], other), value)
    return ()


def _move(draw: Callable[..., Any], tree: Values) -> tuple[str, ...]:
    """Put a section or value where another belongs."""
    key = draw(st.sampled_from(leaves(tree)))
    target = draw(st.sampled_from(KNOWN))
    put(tree, target, copy.deepcopy(drop(tree, key)))
    return target


def _stray(draw: Callable[..., Any], tree: Values) -> tuple[str, ...]:
    mappings = [
        ("data", "splits"),
        ("merging", "options"),
        ("upcycle", "layers"),
        ("tuning", "lora", "targets"),
    ]
    key = draw(st.sampled_from(mappings))
    names = st.sampled_from([*PLAIN[:20], "train", "validation", "mask", "drop", "ratio"])
    inner = st.dictionaries(names, values(), max_size=3)
    put(tree, key, draw(inner | st.lists(values(), max_size=3)))
    return key


TREE = (_set, _set, _set, _drop, _rename, _move, _stray)
BYTES: tuple[Callable[[bytes, int], bytes], ...] = (
    lambda text, at: text[:at],
    lambda text, at: text[:at] + b"\0" + text[at:],
    lambda text, at: text[:at] + b"\xff\xfe" + text[at:],
    lambda text, at: text[:at] + b"\t" + text[at:],
    lambda text, at: text[:at] + b": [}" + text[at:],
    lambda text, at: text[:at] + b"\r" + text[at:],
    lambda text, at: text[:at] + "\u2028".encode() + text[at:],
    lambda text, at: b"\xef\xbb\xbf" + text,
    lambda text, at: text.decode().encode("utf-16"),
    lambda text, at: text + text,
    lambda text, at: text + b"\n---\n" + text,
    lambda text, at: text + b"\ntask: !!python/object/apply:os.system ['touch loot']\n",
    lambda text, at: text + b"\nextends: [glue, nowhere, .]\n",
    lambda text, at: text + b"\nextends: config.yaml\n",
    lambda text, at: b"a: &a [x, x]\nb: &b [*a, *a, *a, *a]\n" + text,
    lambda text, at: b"%YAML 9.9\n---\n" + text,
    lambda text, at: b"&a " + text[:at] + b" *a " + text[at:],
    lambda text, at: text.replace(b":", b" :", 1),
    lambda text, at: text.replace(b"\n", b"\n ", 1),
)


@st.composite
def bad(draw: Callable[..., Any]) -> Bad:
    """A shipped configuration with one to three mutations of its values, or of its text."""
    tree = copy.deepcopy(compose(draw(st.sampled_from(BASES))).values)
    aimed = [draw(st.sampled_from(TREE))(draw, tree) for _ in range(draw(st.integers(1, 3))) if leaves(tree)]
    text = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        change = draw(st.sampled_from(BYTES))
        text = change(text.replace(b"\xed\xa0\x80", b"?"), draw(st.integers(0, len(text))))
    at = {".".join(key) for key in aimed}
    task = tree.get("task")
    suite = task.get("suite") if isinstance(task, dict) else None
    tiny = {**TINY, **(TINY_OPTIONS.get(str(suite)) or {"task.max_length": 16})}
    kept = {k: v for k, v in tiny.items() if not any(k == a or k.startswith(f"{a}.") for a in at if a)}
    return Bad(text, tuple(f"{key}={value}" for key, value in kept.items()))
