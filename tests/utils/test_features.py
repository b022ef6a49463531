"""Columns declared in plain Python, as features of `datasets`."""

from __future__ import annotations

from datasets import ClassLabel, Features, List, Value

from camex_ft.utils.features import build_features


def test_every_kind_of_column() -> None:
    columns = {
        "text": "string",
        "ids": ["int32"],
        "ranges": [["int32"]],
        "label": ("no", "yes"),
        "idx": {"passage": "int32", "words": ["string"]},
        "own": Value("float32"),
    }
    assert build_features(columns) == Features(
        {
            "text": Value("string"),
            "ids": List(Value("int32")),
            "ranges": List(List(Value("int32"))),
            "label": ClassLabel(names=["no", "yes"]),
            "idx": {"passage": Value("int32"), "words": List(Value("string"))},
            "own": Value("float32"),
        }
    )


def test_features_stay_as_they_are() -> None:
    features = Features({"text": Value("string")})
    assert build_features(features) is features
