"""Options of the Trainer with merged experts: precision, checkpointing, accumulation, optimizers, compiling."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from camex_ft.config import TrainingConfig, load_config
from camex_ft.training.arguments import training_arguments
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import expert_layers, freeze
from camex_ft.utils.errors import UserError
from tests.helpers.lora_models import lora
from tests.helpers.training_runs import BATCH, model, same, trainer, weights

KINDS = ("ties-ca", "ep-camex", "smoe", "lora")
BRIEF = {
    "max_steps": 2,
    "logging_steps": 1.0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "train_sampling_strategy": "sequential",
}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def made(kind: str, *, still: bool = False, **routing: Any) -> PreTrainedModel:
    """A model with merged experts, with a mixture, or with experts of low rank, ready to be trained."""
    if kind == "lora":
        found = lora("bert", protocol="domain-ca", routing={"segment": 3, **routing})
        freeze(found, "lora")
    else:
        found = model(kind, **routing)
    for module in found.modules() if still else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return found


def trained(
    folder: Path, kind: str, *, still: bool = False, routing: Any = (), **settings: Any
) -> CamexTrainer:
    run = trainer(folder, made(kind, still=still, **dict(routing)), **{**BRIEF, **settings})
    run.train()
    return run


def losses(run: CamexTrainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def assert_close(one: CamexTrainer, other: CamexTrainer, tolerance: float) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = max(1.0, float(value.abs().max()))
        assert torch.allclose(value, right[name], rtol=0, atol=tolerance * scale), (
            f"{name}: {(value - right[name]).abs().max():.1e}"
        )


# -- precision


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind: str, tmp_path: Path) -> None:
    """Products are in bfloat16, with 8 bits of precision; weights, routing and what is made of experts in float32."""
    seen: set[torch.dtype] = set()
    exact = trained(tmp_path / "32", kind, still=True, routing={"noise": False}, **SGD)
    run = trainer(tmp_path / "16", made(kind, still=True, noise=False), **{**BRIEF, **SGD}, bf16=True)
    layer = next(iter(expert_layers(run.model).values()))
    layer.inner_dropout.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    run.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.context.last.layers[layer.name].weights.dtype == torch.float32
    assert losses(run) == pytest.approx(losses(exact), abs=2e-2)  # 2 ** -8 of logits of about 1, in 3 layers
    assert losses(run) != losses(exact)
    assert same(weights(run), weights(exact))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tf32": True}, "training.tf32: needs a GPU of .* Ampere .*expected false"),
        ({"fp16": True}, "training.fp16: needs a GPU: expected bf16: true"),
        ({"bf16": True, "use_cpu": False}, "training: .*bf16"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU has not")
def test_what_the_hardware_has_not_is_told_before_training(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        arguments(**given)


def arguments(**given: Any) -> Any:
    section = TrainingConfig.model_validate({"use_cpu": True, **given})
    return training_arguments(section, output=Path("somewhere"), best=None)


# -- memory


@pytest.mark.parametrize("kind", [*KINDS, "namex-full"])
def test_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    """What runs again draws the same dropout, noise and masks: bit for bit, the log included."""
    plain = trained(tmp_path / "plain", kind)
    run = trained(tmp_path / "again", kind, activation_checkpointing=True)
    assert run.model.is_activation_checkpointing
    assert same(weights(run), weights(plain)) == []
    assert losses(run) == losses(plain) and run.monitor.loads == plain.monitor.loads


def test_its_former_name_is_known_too() -> None:
    assert arguments(gradient_checkpointing=True).activation_checkpointing
    with pytest.raises(UserError, match="use_reentrant"):
        arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize("kind", KINDS)
def test_two_micro_batches_are_one(kind: str, tmp_path: Path) -> None:
    """Noise, dropout and the balance loss, which is not linear in the batch, are off (invariant 10)."""
    routing = {"noise": False, "balance": 0.0}
    whole = trained(tmp_path / "whole", kind, still=True, routing=routing, **SGD)
    parts = trained(
        tmp_path / "parts",
        kind,
        still=True,
        routing=routing,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        **SGD,
    )
    assert_close(parts, whole, 2e-6)  # float32: a mean of two means, twice through SGD with rate 0.1
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    assert same(weights(whole), dict(made(kind, still=True, **routing).state_dict()))  # it did train


# -- optimizers


@pytest.mark.parametrize("kind", ["ep-camex", "lora"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd"])
def test_optimizers(optim: str, kind: str, tmp_path: Path) -> None:
    """Every trained parameter moves, frozen ones stay, and router and curvature have rates of their own."""
    rates = {"router_learning_rate": 3e-3, "curvature_learning_rate": 5e-4}
    run = trainer(tmp_path, made(kind), **{**BRIEF, **rates, "optim": optim, "max_steps": 1})
    start = weights(run)
    run.train()
    names = {name for name, p in run.model.named_parameters() if p.requires_grad}
    moved = set(same(weights(run), start))
    assert moved & names and not {n for n, p in run.model.named_parameters() if not p.requires_grad} & moved
    assert any("experts" in name or "expert_" in name for name in moved)
    assert any("router" in name for name in moved)
    assert len({group["initial_lr"] for group in run.optimizer.param_groups}) >= 2


def test_fused_is_what_plain_is(tmp_path: Path) -> None:
    one, other = (
        trained(tmp_path / o, "ties-ca", optim=o, adam_epsilon=1e-2)
        for o in ("adamw_torch", "adamw_torch_fused")
    )
    assert "fused" in repr(other.optimizer) and other.optimizer.param_groups[0]["fused"]
    assert_close(one, other, 1e-5)  # float32; epsilon keeps Adam from making steps out of rounding


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao"), ("galore_adamw", "galore_torch")],
)
def test_an_optimizer_without_its_package_is_told_before_training(optim: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"training.optim: {optim} is not available here.*{package}"):
        arguments(optim=optim)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_adam_trains_experts(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, optim="adamw_bnb_8bit")
    assert "bitsandbytes" in type(run.optimizer.optimizer).__module__ and len(losses(run)) == 2


def test_arguments_of_an_optimizer_that_it_does_not_take_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.optim: grokadamw"):  # no package
        arguments(optim="grokadamw")
    with pytest.raises(UserError, match=r"training\.optim_args: .*expected names with values"):
        arguments(optim_args="betas=(0.1,0.2)")


# -- compiling


@pytest.mark.slow
def test_compiled_models_train(tmp_path: Path) -> None:
    """Layers with experts run as they are, between compiled pieces."""
    plain = trained(tmp_path / "plain", "ties-ca", still=True, routing={"noise": False}, **SGD)
    run = trained(
        tmp_path / "compiled", "ties-ca", still=True, routing={"noise": False}, **SGD,
        torch_compile=True, torch_compile_backend="aot_eager",
    )  # fmt: skip
    assert_close(run, plain, 1e-6)


# -- the global batch


def test_a_global_batch_and_a_batch_that_is_found_contradict_each_other() -> None:
    given = ["training.auto_find_batch_size=true", "training.global_batch_size=16"]
    with pytest.raises(UserError, match=r"training.auto_find_batch_size.*training.global_batch_size, 16"):
        load_config("glue", given)
    assert load_config("glue", given[:1]) and load_config("glue", given[1:])
