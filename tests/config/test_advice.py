"""Numbers at their edges, options that exclude each other, and advice that works when it is followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camex_ft.config import Config, ConfigErrors, config_hash, load_config
from camex_ft.training.arguments import training_arguments
from camex_ft.utils.errors import UserError

QUIET = ("training.load_best_model_at_end=false",)


def load(*overrides: str) -> Config:
    return load_config("glue", ["profile=embedded", *overrides])


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigErrors) as error:
        load(*overrides)
    return str(error.value)


def told(*overrides: str) -> str | None:
    """What a configuration is refused with, before any work is done; None where it is taken."""
    try:
        training_arguments(load(*overrides).training, output=Path("somewhere"), best=None)
    except (ConfigErrors, UserError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=0", "expected at least 1, or -1 for as many as the epochs have, got 0"),
        ("training.max_steps=-2", "expected at least -1"),
        ("training.num_train_epochs=0", "expected more than 0"),
        ("training.num_train_epochs=-1", "expected more than 0"),
        ("training.num_train_epochs=.nan", "expected a finite number"),
        ("training.learning_rate=-1e-3", "expected more than 0"),
        ("training.learning_rate=.inf", "expected a finite number"),
        ("training.logging_steps=0", "expected more than 0"),
        ("training.logging_steps=1.5", "expected a whole number of steps, or a fraction of them below 1"),
        ("training.eval_steps=0", "expected more than 0"),
        ("training.eval_steps=2.5", "expected a whole number of steps"),
        ("training.save_steps=-5", "expected more than 0"),
        ("training.eval_delay=-1", "expected at least 0"),
        ("training.per_device_train_batch_size=0", "expected at least 1"),
        ("training.per_device_eval_batch_size=0", "expected at least 1"),
        ("training.gradient_accumulation_steps=0", "expected at least 1"),
        ("training.eval_accumulation_steps=0", "expected at least 1"),
        ("training.dataloader_prefetch_factor=0", "expected at least 1"),
        ("training.torch_empty_cache_steps=0", "expected at least 1"),
        ("training.ddp_timeout=0", "expected at least 1"),
        ("training.warmup_steps=-1", "expected at least 0"),
        ("training.max_grad_norm=-1", "expected at least 0"),
        ("training.adam_beta2=1", "expected less than 1"),
        ("training.adam_epsilon=0", "expected more than 0"),
        ("training.label_smoothing_factor=1", "expected less than 1"),
        ("training.label_smoothing_factor=-0.1", "expected at least 0"),
        ("training.seed=4294967296", "expected less than 4,294,967,296"),
        ("training.data_seed=4294967296", "expected at most 4,294,967,295"),
        ("data.train_rows=0", "expected at least 1"),
        ("data.eval_rows=0", "expected at least 1"),
        (
            "training.include_num_input_tokens_seen=some",
            "expected true or false, or one of no, all, non_padding",
        ),
        ("training.include_for_metrics=[input]", "Did you mean 'inputs'?"),
        ("training.activation_checkpointing_kwargs={every_n_layer: 2}", "Did you mean 'every_n_layers'?"),
        (
            "training.activation_checkpointing_kwargs={every_n_layers: 0}",
            "expected a whole number, at least 1",
        ),
        ("training.debug=underflow_overflow", "the toolkit sets this itself"),
        ("training.enable_jit_checkpoint=true", "a run that gets SIGTERM is saved"),
    ],
)
def test_numbers_and_words_beyond_what_has_a_meaning(override: str, expected: str) -> None:
    said = refused(override)
    assert f"{override.partition('=')[0]}: " in said and expected in said


@pytest.mark.parametrize(
    "override",
    ["training.max_steps=1", "training.max_steps=-1", "training.num_train_epochs=1e-9", "training.logging_steps=0.5",
     "training.warmup_steps=1000000", "training.seed=4294967295", "training.label_smoothing_factor=0.999"],
)  # fmt: skip
def test_numbers_at_their_edges_that_have_a_meaning(override: str) -> None:
    assert told(override) is None


@pytest.mark.parametrize(
    "task", ["task.name=stsb", "task.suite=glue task.name=stsb training.num_train_epochs=1"]
)
def test_labels_that_are_numbers_are_not_smoothed(task: str) -> None:
    said = refused(*task.split(), "training.label_smoothing_factor=0.1")
    assert "training.label_smoothing_factor: labels of glue/stsb are numbers" in said and "expected 0" in said
    assert load(*task.split(), "training.label_smoothing_factor=0")
    assert load("task.name=sst2", "training.label_smoothing_factor=0.1")


# What is refused, words of the message, and the overrides by which its advice is followed: each is taken then.
ADVICE = [
    (
        ("training.fp16=true", "training.use_cpu=true"),
        "expected bf16: true with use_cpu: true",
        ("fp16=false", "bf16=true", "use_cpu=true"),
    ),
    (("training.fp16=true",), "or neither", ("fp16=false",)),
    (("training.bf16=true",), "use_cpu", ("bf16=true", "use_cpu=true")),
    (
        ("training.fp16=true", "training.bf16=true"),
        "expected one of fp16 and bf16",
        ("fp16=false", "use_cpu=true"),
    ),
    (
        ("training.fp16_full_eval=true", "training.bf16_full_eval=true"),
        "expected one of",
        ("bf16_full_eval=false",),
    ),
    (
        ("training.bf16=true", "training.use_cpu=true", "training.fp16_full_eval=true"),
        "expected bf16_full_eval: true",
        ("fp16_full_eval=false", "bf16_full_eval=true"),
    ),
    (("training.tf32=true",), "expected false", ("tf32=false",)),
    (("training.eval_strategy=no",), "expected epoch or steps", ("eval_strategy=epoch",)),
    (("training.eval_strategy=no",), "or load_best_model_at_end: false", ("load_best_model_at_end=false",)),
    (("training.save_strategy=no",), "expected eval_strategy's 'epoch' or best", ("save_strategy=best",)),
    (
        (
            "training.eval_strategy=steps",
            "training.save_strategy=steps",
            "training.eval_steps=3",
            "training.save_steps=5",
        ),
        "expected a multiple",
        ("save_steps=6",),
    ),
    (
        ("training.lr_scheduler_type=greedy", "training.eval_strategy=no", *QUIET),
        "expected epoch or steps",
        ("eval_strategy=epoch",),
    ),
    (
        ("training.save_strategy=best", "training.eval_strategy=no", *QUIET),
        "or eval_strategy: epoch",
        ("eval_strategy=epoch",),
    ),
    (("training.dataloader_prefetch_factor=2",), "of at least 1 with it", ("dataloader_num_workers=1",)),
    (
        ("training.dataloader_persistent_workers=true",),
        "of at least 1 with it",
        ("dataloader_num_workers=1",),
    ),
    (
        ("training.dataloader_multiprocessing_context=spawn",),
        "of at least 1 with it",
        ("dataloader_num_workers=1",),
    ),
    (
        ("training.global_batch_size=16", "training.auto_find_batch_size=true"),
        "raise training.gradient_accumulation_steps",
        ("auto_find_batch_size=false", "gradient_accumulation_steps=2"),
    ),
    (
        ("training.global_batch_size=9", "training.gradient_accumulation_steps=2"),
        "expected a multiple of 2",
        ("global_batch_size=10",),
    ),
    (
        ("training.activation_checkpointing_kwargs={use_reentrant: true}",),
        "expected false",
        ("activation_checkpointing_kwargs={use_reentrant: false}",),
    ),
    (("training.optim=adafactor", "training.optim_args=x"), "name=value", ("optim_args=x=1",)),
    (
        ("training.lr_scheduler_type=cosine_with_min_lr",),
        "lr_scheduler_kwargs",
        ("lr_scheduler_kwargs={min_lr: 1e-6}",),
    ),
    (("training.fsdp=full_shard",), "or no fsdp", ("fsdp=null",)),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU has not")
@pytest.mark.parametrize(
    ("given", "words", "followed"), ADVICE, ids=[" ".join(given) for given, _, _ in ADVICE]
)
def test_advice_works_when_it_is_followed(
    given: tuple[str, ...], words: str, followed: tuple[str, ...]
) -> None:
    said = told(*given)
    assert said is not None and words in said
    assert told(*given, *(f"training.{each}" for each in followed)) is None


# -- the hash


def settled(**training: object) -> str:
    values = {"profile": "embedded", "backbone": "embedded/t5", "training": training}
    return config_hash(Config.model_validate(values))


def test_where_no_steps_of_evaluations_are_said_those_of_logging_count() -> None:
    """They decide which evaluations choose the best model."""
    assert settled(logging_steps=7.0) == settled()
    assert settled(eval_strategy="steps", logging_steps=7.0) != settled(eval_strategy="steps")
    assert settled(eval_strategy="steps", logging_steps=7.0) == settled(eval_strategy="steps", eval_steps=7.0)
    assert settled(eval_strategy="steps", eval_steps=7.0, logging_steps=3.0) == settled(
        eval_strategy="steps", eval_steps=7.0
    )


@pytest.mark.parametrize(
    "training",
    [
        {"dataloader_drop_last": True},
        {"label_smoothing_factor": 0.1},
        {"bf16_full_eval": True},
        {"eval_delay": 1.0},
    ],
)
def test_options_that_change_a_result_are_part_of_the_hash(training: dict[str, object]) -> None:
    assert settled(**training) != settled()
