"""The record: its schema, strict JSON, and the packed bits of correct rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from camex_ft.results.record import Metrics, Record, all_finite, dumps, load_record, pack, unpack
from camex_ft.utils.errors import UserError

SAMPLE = {
    "run": {
        "name": "glue--sst2--embedded-bert--smear--seed42--0123abcd",
        "profile": "embedded",
        "profile_reason": "no CUDA device",
        "status": "done",
        "started": "2026-11-21T10:00:00Z",
        "seconds": 61.25,
        "command": "camex-ft run configs/glue.yaml",
        "exit": 0,
    },
    "config": {"merging": {"protocol": "smear", "experts": 4}},
    "task": "glue/sst2",
    "protocol": "smear",
    "backbone": "embedded/bert",
    "seed": 42,
    "metrics": {
        "primary": "accuracy",
        "best": 0.95,
        "best_epoch": 2.0,
        "last": 0.94,
        "per_epoch": [{"epoch": 1.0, "accuracy": 0.9}, {"epoch": 2.0, "accuracy": 0.95}],
        "all": {"accuracy": 0.95, "loss": 0.2},
    },
    "routing": {"encoder.0": {"entropy": 1.1, "load": [0.25, 0.75], "nmi": 0.5}},
    "curvature": {"encoder.0.up": {"distance": [0.1, 0.2], "condition": [1.5, 2.0]}},
    "model": {"parameters": 100, "trainable": 90, "active": 40, "flops_per_token": 80},
    "cost": {"samples_per_second": 12.5, "peak_memory_mb": 512.0, "device": "cpu"},
    "data": {"source": "embedded", "id": "glue/sst2 seed 0", "rows": {"train": 10}, "sha256": "00"},
    "environment": {"versions": {"python": "3.11.7"}, "commit": "abc", "dirty": False, "host": "cpu-2"},
}


def test_written_and_read_back_the_same(tmp_path):
    record = Record.model_validate(SAMPLE)
    (tmp_path / "record.json").write_text(record.to_json(), encoding="utf-8")
    assert load_record(tmp_path) == load_record(tmp_path / "record.json") == record


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_that_are_not_finite_become_null(bad):
    record = Record.model_validate(
        SAMPLE
        | {
            "metrics": SAMPLE["metrics"]
            | {"best": bad, "last": bad, "per_epoch": [{"epoch": 1.0, "loss": bad}], "all": {"loss": bad}},
            "config": {"weight": bad, "nested": [{"x": bad}]},
        }
    )
    read = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["metrics"]["best"] is None
    assert read["metrics"]["last"] is None
    assert read["metrics"]["per_epoch"] == [{"epoch": 1.0, "loss": None}]
    assert read["metrics"]["all"] == {"loss": None}
    assert read["config"] == {"weight": None, "nested": [{"x": None}]}


def test_numpy_numbers_become_pythons():
    metrics = Metrics.model_validate(SAMPLE["metrics"] | {"best": np.float32(0.5), "last": np.int64(1)})
    assert type(metrics.best) is float
    assert metrics.best == 0.5
    assert metrics.last == 1.0


def test_unknown_keys_and_missing_parts_are_refused():
    with pytest.raises(ValidationError, match="hostname"):
        Record.model_validate(SAMPLE | {"hostname": "x"})
    with pytest.raises(ValidationError, match="metrics"):
        Record.model_validate({k: v for k, v in SAMPLE.items() if k != "metrics"})


def test_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Record.model_validate(SAMPLE).seed = 3


def test_missing_record_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no record\.json"):
        load_record(tmp_path)
    with pytest.raises(UserError, match=r"no record\.json"):
        load_record(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "JSON"),
        ("[]", "the file"),
        (json.dumps(SAMPLE | {"seed": "x"}), "seed"),
        ("\xff", "not a record"),
    ],
)
def test_broken_record_is_the_users_error_and_names_the_part(tmp_path, text, names):
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=names):
        load_record(tmp_path)


leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text()
trees = st.recursive(leaves, lambda t: st.lists(t) | st.dictionaries(st.text(), t), max_leaves=10)


@given(trees)
def test_any_tree_becomes_strict_json(tree):
    read = json.loads(dumps(tree), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == all_finite(tree)


def test_arrays_become_lists():
    assert all_finite({"a": np.array([1.0, np.nan]), 2: (np.float64(3), np.array(4))}) == {
        "a": [1.0, None],
        "2": [3.0, 4],
    }


@given(st.lists(st.booleans(), max_size=40))
def test_what_is_packed_comes_back(bits: list[bool]) -> None:
    assert unpack(pack(bits)).tolist() == bits


def test_as_text() -> None:
    assert pack([True, False, True]) == "3:a0"


def test_text_that_holds_too_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bits for 9 rows"):
        unpack("9:ff")
