"""The trainer: losses, learning rates, statistics, the order of rows, a loss that is not finite."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from camex_ft.moe.context import LayerRouting
from camex_ft.training.batches import EpochSampler
from camex_ft.training.callbacks.monitoring import by_sequence
from camex_ft.training.checkpoint_folder import checkpoints, fault, newest
from camex_ft.training.trainer import CURVATURE, ROUTER, CamexTrainer
from camex_ft.upcycling import expert_layers, routing_context
from camex_ft.utils.errors import UserError
from tests.helpers.tiny import LAYERS
from tests.helpers.training_runs import (
    BATCH,
    STEPS_AN_EPOCH,
    VALIDATION,
    model,
    pad,
    rows,
    same,
    trainer,
    weights,
)

EXPERTS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CamexTrainer:
    """One run of two epochs, with length grouping, noise and dropout."""
    made = trainer(tmp_path_factory.mktemp("trained"))
    made.train()
    return made


def batch() -> dict[str, torch.Tensor]:
    return pad(list(rows(BATCH, 3)))


# -- loss


def test_balance_losses_are_in_the_training_loss(tmp_path: Path) -> None:
    made = trainer(tmp_path, model(balance=0.7))
    made.model.train()
    torch.manual_seed(0)
    found = made.compute_loss(made.model, batch())
    torch.manual_seed(0)
    expected = made.model(**batch()).loss
    balance = routing_context(made.model).last.balance_loss()
    assert torch.equal(found, expected + balance)
    assert balance > 1e-3  # noise sets importance apart


def test_balance_losses_are_not_in_the_evaluation_loss(tmp_path: Path) -> None:
    found = [
        trainer(tmp_path, model(balance=b, noise=False)).evaluate()["eval_validation_loss"]
        for b in (0.0, 9.0)
    ]
    assert found[0] == found[1]
    made = model().eval()
    with torch.no_grad():
        losses = [made(**pad([row])).loss.item() for row in rows(VALIDATION, 2)]
    # float32, batches of 4, 4 and 2 in place of single rows
    assert found[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_one_process_with_several_gpus_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2  # what one process on a node with two GPUs would find
    with pytest.raises(UserError, match="--gpus 2"):
        CamexTrainer(model=model(), args=arguments)
    assert CamexTrainer(model=model("dense"), args=arguments).context is None


def test_a_dense_model_trains_without_routing(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        model("dense"),
        max_steps=2,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    made.train()
    assert made.context is None and made.routing == {}
    assert not [
        k for entry in made.state.log_history for k in entry if k.startswith(("routing", "curvature"))
    ]


# -- the same seed, the same weights


def test_the_same_seed_gives_the_same_weights(trained: CamexTrainer, tmp_path: Path) -> None:
    again = trainer(tmp_path)
    again.train()
    assert same(weights(again), weights(trained)) == []


def test_another_seed_gives_other_weights(trained: CamexTrainer, tmp_path: Path) -> None:
    other = trainer(tmp_path, seed=7)
    other.train()
    assert same(weights(other), weights(trained))


# -- learning rates


def test_router_and_curvature_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        weight_decay=0.1,
        router_learning_rate=3e-3,
        curvature_learning_rate=5e-4,
        learning_rate=1e-2,
    )
    names = {id(p): n for n, p in made.model.named_parameters()}
    seen = {}
    for group in made.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in seen, "in two groups"
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(seen) == set(names.values())
    for name, (rate, decay) in seen.items():
        if CURVATURE in name:
            assert (rate, decay) == (5e-4, 0.0), name  # decay would pull it away from the identity
        elif ROUTER in name:
            assert rate == 3e-3, name
        else:
            assert rate == 1e-2, name
    assert seen["bert.encoder.layer.0.intermediate.up.experts"] == (1e-2, 0.1)
    assert seen["bert.encoder.layer.0.intermediate.router.gate"] == (3e-3, 0.1)
    assert seen["bert.embeddings.LayerNorm.weight"] == (1e-2, 0.0)
    assert {CURVATURE in n for n in seen} == {ROUTER in n for n in seen} == {True, False}


def test_a_learned_temperature_has_the_router_s_rate_and_no_decay(tmp_path: Path) -> None:
    """Decay would pull t towards 1."""
    made = trainer(tmp_path, model(router="cosine"), weight_decay=0.1, router_learning_rate=3e-3)
    names = {id(p): n for n, p in made.model.named_parameters()}
    groups = made.create_optimizer().param_groups
    seen = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(seen) == set(names.values())
    assert seen["bert.encoder.layer.0.intermediate.router.log_temperature"] == (3e-3, 0.0)
    assert seen["bert.encoder.layer.0.intermediate.router.gate"] == (3e-3, 0.1)


def test_without_rates_of_their_own_they_have_everyone_s(tmp_path: Path) -> None:
    assert {g["lr"] for g in trainer(tmp_path).create_optimizer().param_groups} == {1e-2}


def test_the_schedule_scales_every_rate(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, router_learning_rate=1e-3, max_steps=4, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, lr_scheduler_type="linear",
    )  # fmt: skip
    made.create_optimizer_and_scheduler(4)
    before = [g["lr"] for g in made.optimizer.param_groups]
    made.optimizer.step()
    made.lr_scheduler.step()
    assert [g["lr"] for g in made.optimizer.param_groups] == pytest.approx([0.75 * rate for rate in before])
    assert len(set(before)) == 2


# -- a loss that is not finite


class Spoil(TrainerCallback):
    """Makes the model give NaN from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(accumulation: int, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        callbacks=[Spoil(3)],
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="no",
        load_best_model_at_end=False,
        logging_steps=100.0,
    )
    with pytest.raises(UserError, match=r"NaN or infinite at step 3.*training.learning_rate"):
        made.train()
    kept, notes = newest(tmp_path)
    assert kept.name == "checkpoint-2" and notes == []


# -- what is logged


def test_training_steps_log_routing_and_curvature(trained: CamexTrainer) -> None:
    steps = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(2, 2 * STEPS_AN_EPOCH + 1, 2))
    for entry in steps:
        assert 0 < entry["routing_entropy"] <= np.log(EXPERTS)
        assert 1 / EXPERTS <= entry["routing_max_load"] <= 1
        assert entry["curvature_distance"] > 0
    distances = [entry["curvature_distance"] for entry in steps]
    assert distances[-1] > distances[0]


def test_evaluations_log_no_training_statistics(trained: CamexTrainer) -> None:
    found = [e for e in trained.state.log_history if "eval_validation_loss" in e]
    assert len(found) == 2
    assert not [k for e in found for k in e if "routing" in k or "curvature" in k]


def test_the_best_epoch_is_kept(trained: CamexTrainer) -> None:
    found = [
        e["eval_validation_accuracy"] for e in trained.state.log_history if "eval_validation_accuracy" in e
    ]
    assert trained.state.best_metric == max(found)
    assert trained.evaluate()["eval_validation_accuracy"] == max(found)
    kept = checkpoints(Path(trained.args.output_dir))
    assert kept and all(fault(path) is None for path in kept)


# -- evaluation


def test_logits_are_in_the_rows_order(trained: CamexTrainer) -> None:
    assert isinstance(trained._get_train_sampler(), EpochSampler)  # training groups by length
    data = rows(VALIDATION, 2)
    trained.model.eval()
    with torch.no_grad():
        expected = torch.cat([trained.model(**pad([row])).logits for row in data])
    # float32; batches are padded, which changes nothing but the order of sums
    np.testing.assert_allclose(trained.collect(data), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_routing_is_that_of_each_row(trained: CamexTrainer) -> None:
    trained.evaluate("validation")
    layers = expert_layers(trained.model)
    assert list(trained.routing) == list(layers) and len(layers) == LAYERS
    trained.model.eval()
    for i, row in enumerate(rows(VALIDATION, 2)):
        with torch.no_grad():
            trained.model(**pad([row]))
        for name, layer in routing_context(trained.model).last.layers.items():
            np.testing.assert_allclose(trained.routing[name][i], layer.weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "granularity"), [("t5", "auto"), ("bert", "segment"), ("gpt2", "token")]
)
def test_every_backbone_and_granularity_evaluates(model_type: str, granularity: str, tmp_path: Path) -> None:
    """T5 returns hidden states beside its logits; segments and tokens come to one routing a sequence."""
    given = model("ties", model_type, granularity=granularity, segment=3)
    made = trainer(tmp_path, given)
    assert 0 <= made.evaluate("validation")["eval_accuracy"] <= 1
    assert len(made.routing) == len(expert_layers(given))
    for weights_ in made.routing.values():
        assert weights_.shape == (VALIDATION, EXPERTS)
        np.testing.assert_allclose(weights_.sum(1), 1, rtol=1e-5)  # float32
    assert made.collect(rows(5, 4)).shape == (5, 2)


def test_by_sequence_is_the_mean_over_the_groups_that_count() -> None:
    s = torch.tensor([[[1.0, 0], [0.5, 0.5], [0, 1]], [[1, 0], [1, 0], [0, 1]]])
    assert torch.equal(by_sequence(LayerRouting(s[:, 0])), s[:, 0])
    assert by_sequence(LayerRouting(s)).tolist() == [
        [0.5, 0.5],
        [2 / 3, 1 / 3],
    ] or torch.allclose(by_sequence(LayerRouting(s)), torch.tensor([[0.5, 0.5], [2 / 3, 1 / 3]]))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert by_sequence(LayerRouting(s, mask)).tolist() == [[0.75, 0.25], [0, 0]]


# -- order of training rows


def grouped(lengths: list[int]) -> LengthGroupedSampler:
    return LengthGroupedSampler(BATCH, lengths=lengths)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 60).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(grouped(lengths), seed)
        torch.manual_seed(np.random.default_rng().integers(1000))
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(60)) and len(EpochSampler(grouped(lengths), 1)) == 60
    assert order(1, 2) != order(1, 3) and order(1, 2) != order(2, 2)


def test_data_seed_decides_the_order(tmp_path: Path) -> None:
    def order(**settings: Any) -> list[int]:
        return list(trainer(tmp_path, **settings)._get_train_sampler())

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave the global random state as it was."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def test_one_class_overrides_few_private_methods() -> None:
    """Private methods change between releases of transformers without notice: there are six, in one place."""
    private = [name for name in vars(CamexTrainer) if name.startswith("_") and not name.startswith("__")]
    overridden = [name for name in private if hasattr(Trainer, name)]
    assert CamexTrainer.__mro__[1] is Trainer
    assert len(overridden) <= 8, overridden
    lines = [inspect.getsourcelines(vars(CamexTrainer)[name])[1] for name in overridden]
    others = [
        inspect.getsourcelines(member)[1]
        for name, member in vars(CamexTrainer).items()
        if inspect.isfunction(member) and name not in overridden
    ]
    assert min(lines) > max(others), "they stand together, below the public hooks"
    assert all(inspect.getdoc(vars(CamexTrainer)[name]) for name in overridden)
