"""The same experiment has the same hash, another one another; what is written to a run's folder is read back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camex_ft.config import Config, config_hash, load_config, resolve, to_yaml
from camex_ft.config.identity import folder_label
from camex_ft.config.validation import section_keys
from tests.helpers.config_trees import PLACE, leaves, tree

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def make(**sections: object) -> Config:
    return Config.model_validate({"profile": "embedded", "backbone": "embedded/t5", **sections})


@files
@given(leaves())
def test_what_is_written_is_read_back(write, values):
    config = Config.model_validate(tree(values))
    path = Path("written.yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert to_yaml(again) == to_yaml(config)


def test_a_resolved_configuration_is_written_in_full_and_resolves_to_itself(write, machine):
    config, _ = resolve(Config(), machine(cuda=True, hub=True))
    path = write(to_yaml(config))
    assert resolve(load_config(path), machine(hub=True))[0] == config


@given(leaves(min_size=2), st.randoms())
def test_the_order_of_keys_does_not_matter(values, order):
    shuffled = random.Random(order.random()).sample(list(values.items()), len(values))
    first, second = Config.model_validate(tree(values)), Config.model_validate(tree(dict(shuffled)))
    assert config_hash(first) == config_hash(second)


@given(leaves(), PLACE, PLACE)
def test_folders_do_not_matter(values, left, right):
    first, second = (
        Config.model_validate(tree({**values, ("output", "dir"): place, ("training", "resume"): place}))
        for place in (left, right)
    )
    assert config_hash(first) == config_hash(second)


def test_a_hash_is_eight_hexadecimal_digits_and_stays_what_it_is():
    """Records are found by it: a change of this value makes all earlier runs look like other experiments."""
    assert config_hash(make()) == "f8dd53da"


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"logging_steps": 7}},
        {"training": {"per_device_eval_batch_size": 7}},
        {"training": {"save_total_limit": 3}},
        {"training": {"resume": "never"}},
        {"training": {"report_to": "none"}},
        {"training": {"warmup_steps": 0}},  # the default of TrainingArguments, written
        {"training": {"router_learning_rate": 2e-4}},  # the learning rate, written
        {"merging": {"top_k": 8}},  # all experts, written
        {"merging": {"curvature": {"kind": "kronecker"}}},  # the default, written
        {"upcycle": {"noise": 0.5}},  # init is copy
        {"upcycle": {"drop": 0.1}},
        {"routing": {"router": "linear", "temperature": 1.0, "z_loss": 0.0}},
        {"routing": {"normalise": "before"}},  # all experts are chosen
        {"task": {"predict": True}},
        {"output": {"dir": "elsewhere"}},
    ],
)
def test_what_has_no_effect_does_not_matter(sections):
    assert config_hash(make(**sections)) == config_hash(make())


@pytest.mark.parametrize(
    "sections",
    [
        {"profile": "paper"},
        {"backbone": "embedded/bert"},
        {"task": {"name": "rte"}},
        {"task": {"max_length": 64}},
        {"data": {"train_rows": 100}},
        {"data": {"source": "hub"}},
        {"merging": {"protocol": "ties"}},
        {"merging": {"experts": 4}},
        {"merging": {"top_k": 2}},
        {"merging": {"alpha": 0.5}},
        {"merging": {"curvature": {"rank": 1}}},
        {"merging": {"curvature": {"kind": "diagonal"}}},
        {"merging": {"curvature": {"kind": "low-rank"}}},
        {"merging": {"options": {"density": 0.5}}},
        {"routing": {"granularity": "token"}},
        {"routing": {"noise": False}},
        {"routing": {"balance": 0.0}},
        {"routing": {"router": "cosine"}},
        {"routing": {"temperature": 0.5}},
        {"routing": {"z_loss": 1e-3}},
        {"merging": {"top_k": 2}, "routing": {"normalise": "before"}},
        {"upcycle": {"init": "drop"}},
        {"upcycle": {"layers": "every_other"}},
        {"upcycle": {"init": "noise"}},
        {"tuning": {"mode": "experts"}},
        {"training": {"learning_rate": 1e-3}},
        {"training": {"router_learning_rate": 1e-3}},
        {"training": {"curvature_learning_rate": 1e-3}},
        {"training": {"num_train_epochs": 1}},
        {"training": {"seed": 1}},
        {"training": {"warmup_steps": 10}},
    ],
)
def test_what_has_an_effect_matters(sections):
    assert config_hash(make(**sections)) != config_hash(make())


@pytest.mark.parametrize(
    ("always", "idle"),
    [
        ({"merging": {"protocol": "ties"}}, {"merging": {"protocol": "ties", "curvature": {"rank": 1}}}),
        (
            {"merging": {"protocol": "ties"}},
            {"merging": {"protocol": "ties", "curvature": {"kind": "low-rank"}}},
        ),
        ({"merging": {"protocol": "smear"}}, {"merging": {"protocol": "smear", "alpha": 0.5}}),
        (
            {"merging": {"protocol": "dense"}},
            {"merging": {"protocol": "dense", "experts": 3}, "routing": {"noise": False}},
        ),
        ({"merging": {"protocol": "dense"}}, {"merging": {"protocol": "dense"}, "upcycle": {"layers": [1]}}),
        ({"data": {"source": "hub"}}, {"data": {"source": "hub", "seed": 3}}),
        ({"routing": {"granularity": "token"}}, {"routing": {"granularity": "token", "segment": 3}}),
        ({"merging": {"top_k": 1}}, {"merging": {"top_k": 1}, "routing": {"temperature": 0.5}}),
        (
            {"merging": {"protocol": "smoe", "top_k": 2}, "routing": {"router": "expert-choice"}},
            {
                "merging": {"protocol": "smoe", "top_k": 2},
                "routing": {"router": "expert-choice", "balance": 0.5},
            },
        ),
        ({"upcycle": {"init": "drop"}}, {"upcycle": {"init": "drop", "drop": 0.5, "noise": 0.3}}),
        ({}, {"upcycle": {"each": 3, "base": "mean", "others": "first", "others_scale": 0.1}}),
        ({}, {"routing": {"fit": {"rows": 7}}}),
        ({"training": {"max_steps": 9}}, {"training": {"max_steps": 9, "num_train_epochs": 1}}),
        ({"upcycle": {"init": "noise"}}, {"upcycle": {"init": "noise", "noise": 0.01}}),
    ],
)
def test_a_key_that_another_makes_idle_does_not_matter(always, idle):
    assert config_hash(make(**always)) == config_hash(make(**idle))


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"source": "embedded", "seed": 3}},
        {"upcycle": {"init": "noise", "noise": 0.5}},
        {"upcycle": {"init": "drop", "drop": 0.1}},
        {"training": {"max_steps": 9}},
    ],
)
def test_and_matters_where_it_is_not_idle(sections):
    plain = {
        name: {k: v for k, v in keys.items() if k in ("source", "init")} for name, keys in sections.items()
    }
    assert config_hash(make(**sections)) != config_hash(make(**plain))


@pytest.mark.parametrize(
    "routing",
    [{"router": "expert-choice"}, {"temperature": 0.5, "normalise": "before"}, {"normalise": "before"}],
)
def test_routing_matters_where_few_experts_are_chosen(routing):
    few = {"protocol": "smoe", "top_k": 1}
    assert config_hash(make(merging=few, routing=routing)) != config_hash(make(merging=few))


LM = {"task": {"suite": "lm", "name": "text"}}
QA = {"task": {"suite": "qa", "name": "squad"}}
SMOE = {"merging": {"protocol": "smoe", "top_k": 2}}
LORA = {"merging": {"protocol": "domain"}, "tuning": {"mode": "lora"}}
DONORS = {"upcycle": {"init": "checkpoints", "from": ["./law", "./code"]}, "merging": {"experts": 2}}
FIT = {**DONORS, "routing": {"init": "fit"}}
SEGMENT = {"routing": {"granularity": "segment"}}
# key -> what it needs to have an effect, and another value than its default
COUNTS: dict[str, tuple[dict[str, Any], Any]] = {
    "profile": ({}, "paper"),
    "backbone": ({}, "embedded/gpt2"),
    "task.suite": ({}, "superglue"),
    "task.name": ({}, "rte"),
    "task.max_length": ({}, 7),
    "task.block_size": (LM, 8),
    "task.stride": (LM, 3),
    "task.doc_stride": (QA, 9),
    "task.answer_length": (QA, 4),
    "task.beams": (QA, 2),
    "data.source": ({}, "hub"),
    "data.dir": ({"data": {"source": "disk"}}, "elsewhere"),
    "data.train_rows": ({}, 7),
    "data.eval_rows": ({}, 7),
    "data.splits": ({}, {"train": "validation"}),
    "data.domain": ({}, 2),
    "data.seed": ({"data": {"source": "embedded"}}, 3),
    "merging.protocol": ({}, "domain"),
    "merging.experts": ({}, 3),
    "merging.top_k": ({}, 2),
    "merging.alpha": ({}, 0.5),
    "merging.curvature.kind": ({}, "diagonal"),
    "merging.curvature.rank": ({}, 3),
    "merging.options": ({}, {"density": 0.3}),
    "merging.keep_vectors": ({"merging": {"protocol": "dare"}}, False),
    "routing.init": (DONORS, "fit"),
    "routing.fit.rows": (FIT, 100),
    "routing.fit.from": (FIT, ["law.csv", "code.csv"]),
    "routing.granularity": ({}, "token"),
    "routing.router": (SMOE, "cosine"),
    "routing.temperature": (SMOE, 0.5),
    "routing.normalise": (SMOE, "before"),
    "routing.noise": ({}, False),
    "routing.balance": ({}, 0.5),
    "routing.z_loss": ({}, 0.5),
    "routing.segment": (SEGMENT, 7),
    "routing.first_segment": (SEGMENT, "self"),
    "upcycle.layers": ({}, [1]),
    "upcycle.init": ({}, "noise"),
    "upcycle.noise": ({"upcycle": {"init": "noise"}}, 0.5),
    "upcycle.drop": ({"upcycle": {"init": "drop"}}, 0.1),
    "upcycle.rank": ({"merging": {"protocol": "domain"}}, 4),
    "upcycle.from": (DONORS, ["./law", "./law"]),
    "upcycle.each": (DONORS, 2),
    "upcycle.base": (DONORS, "mean"),
    "upcycle.others": (DONORS, "first"),
    "upcycle.others_scale": ({"upcycle": {**DONORS["upcycle"], "others": "arithmetic"}}, 0.5),
    "tuning.mode": ({}, "experts"),
    "tuning.lora.rank": (LORA, 3),
    "tuning.lora.scale": (LORA, 2.0),
    "tuning.lora.dropout": (LORA, 0.5),
    "tuning.lora.attention": (LORA, False),
    "tuning.lora.targets": (LORA, ["q"]),
}
NO_RESULT = {"task.predict", "output.dir", "output.model"}


def test_every_key_counts_where_it_has_an_effect() -> None:
    """A new key is put into one of the two lists; those of `training` have tests of their own."""
    keys = {".".join(key) for key, section in section_keys() if section is None}
    assert {key for key in keys if not key.startswith("training.")} == {*COUNTS, *NO_RESULT}
    for key, (needed, value) in COUNTS.items():
        sections = copy.deepcopy(needed)
        *above, last = key.split(".")
        place = sections
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
        assert config_hash(make(**sections)) != config_hash(make(**needed)), key


def test_the_checkpoint_of_another_run_counts() -> None:
    hashes = [config_hash(make(), start=start) for start in ("", "0f", "1f")]
    assert len(set(hashes)) == 3 and hashes[0] == config_hash(make())


def test_of_a_data_folder_the_last_name_stays_and_a_fingerprint_takes_its_place():
    here, there = ({"data": {"source": "disk", "dir": f"{root}/sst2"}} for root in ("/a", "../b"))
    other = {"data": {"source": "disk", "dir": "/a/rte"}}
    assert config_hash(make(**here)) == config_hash(make(**there)) != config_hash(make(**other))
    assert config_hash(make(**here), data="0f") == config_hash(make(**other), data="0f")
    assert config_hash(make(**here), data="0f") != config_hash(make(**here), data="1f")


@pytest.mark.parametrize(
    ("suite", "name", "foreign", "counts"),
    [
        ("glue", "sst2", ("block_size", "stride", "doc_stride", "beams"), {"max_length": 7}),
        ("lm", "text", ("max_length", "doc_stride", "answer_length", "beams"), {"block_size": 8}),
        ("qa", "squad", ("block_size", "stride"), {"beams": 2}),
    ],
)
def test_a_task_has_the_options_of_its_kind_alone(
    suite: str, name: str, foreign: tuple[str, ...], counts: dict[str, int]
) -> None:
    def task(**changes: int) -> Config:
        return make(task={"suite": suite, "name": name, **changes})

    assert not set(foreign) & set(task().model_dump()["task"])
    assert config_hash(task(**counts)) != config_hash(task())


def test_half_a_block_is_the_stride_that_is_not_written() -> None:
    def digest(**task: int) -> str:
        return config_hash(make(task={"suite": "lm", "name": "text", "block_size": 64, **task}))

    assert digest(stride=32) == digest() != digest(stride=16)


def test_splits_count_where_they_are_others() -> None:
    def digest(**splits: str) -> str:
        return config_hash(make(data={"source": "embedded", "splits": splits}))

    assert digest(train="train") == digest() != digest(train="validation")


def test_the_model_of_a_run_goes_by_the_run() -> None:
    """All of them are folders called ``model``."""
    run = "results/runs/lm--text--embedded-gpt2--dense--seed42--0a1b2c3d/model"
    assert folder_label(run) == folder_label(f"/elsewhere/{run}") == "run-0a1b2c3d"
    assert folder_label("some/model") == "model"
    assert folder_label("/a/bert-base") == "bert-base"
    assert folder_label("runs/x--seed1--0a1b2c3d/checkpoints") == "checkpoints"
