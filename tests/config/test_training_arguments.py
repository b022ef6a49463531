"""Keys of `training:` against `transformers.TrainingArguments`: what it accepts, the schema accepts."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from camex_ft.config import Config, TrainingConfig
from camex_ft.config.training_arguments import COMMON, OWNED, coerce, default, fields

OPEN = sorted(set(fields()) - set(OWNED))


@pytest.mark.parametrize("name", OPEN)
def test_a_default_is_a_value_that_the_field_takes(name):
    value = default(name)
    if value is not None:
        plain = json.loads(json.dumps(value, default=lambda word: word.value))  # as YAML would give it
        assert coerce(name, plain) == plain


@pytest.mark.parametrize("name", OPEN)
def test_something_else_is_refused(name):
    with pytest.raises(ValueError, match=r"^expected "):
        coerce(name, object())


@pytest.mark.parametrize("name", COMMON)
def test_fields_that_are_known_without_transformers_are_as_it_has_them(name):
    assert COMMON[name] == fields()[name]


def test_the_fields_of_the_schema_are_fields_of_transformers_or_the_toolkits_own(tmp_path):
    arguments = Config().training.arguments()
    made = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **arguments)
    for name, value in arguments.items():
        assert getattr(made, name) == value
    assert set(TrainingConfig.model_fields) - set(arguments) == {
        "router_learning_rate",
        "curvature_learning_rate",
        "resume",
        "global_batch_size",
    }


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("warmup_steps", 3, 3.0),
        ("fp16", "no", False),
        ("tf32", "on", True),
        ("optim", "adafactor", "adafactor"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 2}}),
        ("fsdp_config", None, None),
        ("debug", "underflow_overflow", "underflow_overflow"),
    ],
)
def test_values_as_yaml_gives_them(name, value, taken):
    assert coerce(name, value) == taken
    assert type(coerce(name, value)) is type(taken)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", True),
        ("warmup_steps", float("nan")),
        ("gradient_accumulation_steps", 1.0),
        ("optim", "adam"),
        ("fp16", 1),
        ("run_name", 3),
        ("include_for_metrics", "loss"),
        ("lr_scheduler_type", 3),
    ],
)
def test_values_of_another_kind(name, value):
    with pytest.raises(ValueError, match=r"^expected "):
        coerce(name, value)
