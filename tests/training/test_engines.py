"""What a trainer refuses to go on from, and with; several processes are in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from camex_ft.config import TrainingConfig
from camex_ft.training.arguments import training_arguments
from camex_ft.training.checkpoint_folder import fault, processes, rows_at_once, write_manifest
from camex_ft.training.distributed import check_precision
from camex_ft.upcycling import trained_state
from camex_ft.utils.errors import UserError
from tests.helpers.lora_models import lora
from tests.helpers.training_runs import BATCH, model, same, trainer, weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process that takes BATCH rows at once."""
    folder = tmp_path_factory.mktemp("run")
    steps = {"save_steps": 2.0, "eval_steps": 2.0, "max_steps": 2}
    trainer(folder, save_strategy="steps", eval_strategy="steps", **steps).train()
    return folder / "checkpoint-2"


def test_a_checkpoint_knows_its_batch(checkpoint: Path) -> None:
    assert (processes(checkpoint), rows_at_once(checkpoint)) == (1, BATCH)


def test_other_batches_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).check(checkpoint)
    other = trainer(tmp_path, max_steps=2, per_device_train_batch_size=2 * BATCH)
    with pytest.raises(UserError, match=rf"{BATCH} rows at once.*take {2 * BATCH}.*global_batch_size"):
        other.check(checkpoint)


def test_the_checkpoint_of_another_engine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "latest").touch()
    write_manifest(checkpoint)
    try:
        assert fault(checkpoint) is None
        with pytest.raises(UserError, match="written by DeepSpeed"):
            trainer(tmp_path, max_steps=2).check(checkpoint)
    finally:
        (checkpoint / "latest").unlink()
        write_manifest(checkpoint)


@pytest.mark.parametrize(("world", "rows", "parts"), [("1", 12, 3), ("2", 6, 2), ("3", 4, 2)])
def test_rows_of_a_step_are_shared_out(
    world: str, rows: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    given = TrainingConfig.model_validate(
        {"global_batch_size": int(world) * rows * parts, "gradient_accumulation_steps": parts}
    )
    assert given.rows_a_device(int(world)) == rows
    with pytest.raises(UserError, match=f"do not share out evenly among {world} processes and {parts} micro"):
        TrainingConfig.model_validate(
            {"global_batch_size": 7, "gradient_accumulation_steps": parts}
        ).rows_a_device(int(world))


def test_the_arguments_have_a_devices_rows(tmp_path: Path) -> None:
    given = TrainingConfig.model_validate(
        {"global_batch_size": 12, "gradient_accumulation_steps": 3, "use_cpu": True}
    )
    assert training_arguments(given, output=tmp_path, best=None).per_device_train_batch_size == 4


def test_deepspeed_in_half_precision_is_refused_where_domain_vectors_would_be_lost() -> None:
    refused: dict[str, Any] = {"ties-ca": True, "smear": False, "smoe": False}
    for protocol, expected in refused.items():
        if expected:
            with pytest.raises(UserError, match=r"training.bf16: DeepSpeed .* --engine ddp or fsdp"):
                check_precision(model(protocol), "bf16")
        else:
            check_precision(model(protocol), "bf16")
        check_precision(model(protocol), "no")
    check_precision(lora("bert"), "bf16")


def test_checkpoints_of_low_rank_experts_hold_what_is_trained_and_can_be_gone_on_from(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2.0}
    settings |= {"eval_strategy": "no", "load_best_model_at_end": False}
    whole = trainer(tmp_path, lora("bert"), **settings)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == trained_state(whole.model).keys()
    assert sum(t.numel() for t in saved.values()) < sum(p.numel() for p in whole.model.parameters())
    resumed = trainer(tmp_path / "again", lora("bert"), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(whole), weights(resumed)) == []
