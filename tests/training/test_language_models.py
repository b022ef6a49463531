"""Training models that predict tokens: how micro-batches add up, no key-value caches, the loss's scale, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from camex_ft.training.callbacks.monitoring import Speed
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import upcycle
from tests.helpers.invariant_cases import dense
from tests.helpers.tiny import VOCABULARY

HEADS = {"gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq-lm"}
ROWS, LENGTH = 16, 6
# float32: sums of 8 and of 16 rows in another order, once through SGD with rate 0.1 on gradients of about 1
TOLERANCE = 2e-6


def rows(*, twice: bool, uneven: bool) -> Dataset:
    """Rows of one width, the second half the first again or not, the first half with fewer tokens to predict."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    if twice:
        ids[ROWS // 2 :] = ids[: ROWS // 2]
    labels = ids.clone()
    if uneven:
        labels[: ROWS // 2, 2:] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: each.tolist() for name, each in columns.items()}).with_format("torch")


def trainer(
    model_type: str, folder: Path, data: Dataset, *, balance: float = 0.0, **changes: Any
) -> CamexTrainer:
    model = upcycle(
        dense(model_type, HEADS[model_type]),
        merging={"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 2}},
        routing={"noise": False, "balance": balance, "segment": 2},
        seed=1,
    )
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    evaluated = {"one": data, "two": data}
    return CamexTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=evaluated)


def step(
    model_type: str, folder: Path, data: Dataset, micro: int, balance: float
) -> tuple[dict[str, Tensor], float]:
    """The parameters after one step over all rows, and the loss that was logged."""
    made = trainer(
        model_type,
        folder,
        data,
        balance=balance,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=ROWS // micro,
    )
    made.train()
    return dict(made.model.named_parameters()), made.state.log_history[0]["loss"]


@pytest.mark.parametrize("model_type", HEADS)
@pytest.mark.parametrize(
    ("twice", "uneven", "balance"),
    [(False, True, 0.0), (True, False, 0.5)],
    ids=["tokens count alike wherever they are", "balance losses are a mean"],
)
def test_micro_batches_make_the_same_step(
    model_type: str, twice: bool, uneven: bool, balance: float, tmp_path: Path
) -> None:
    """The balance loss is not linear in the batch, so there both halves hold the same rows."""
    data = rows(twice=twice, uneven=uneven)
    whole, loss = step(model_type, tmp_path, data, ROWS, balance)
    parts, summed = step(model_type, tmp_path, data, ROWS // 2, balance)
    start = dict(dense(model_type, HEADS[model_type]).named_parameters())
    assert [n for n in start if n in whole and not torch.equal(whole[n], start[n])], "nothing was trained"
    assert summed == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        scale = max(1.0, float(value.detach().abs().max()))
        close = torch.allclose(parts[name], value, rtol=0, atol=TOLERANCE * scale)
        assert close, f"{name}: {(parts[name] - value).abs().max():.1e}"


@pytest.mark.parametrize("model_type", HEADS)
def test_the_loss_is_the_mean_over_the_tokens_that_are_predicted(model_type: str, tmp_path: Path) -> None:
    data = rows(twice=False, uneven=True)
    made = trainer(model_type, tmp_path, data)
    with torch.no_grad():
        expected = made.model(**data[:]).loss.item()
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(
        expected, rel=1e-4
    )  # logged with 4 digits or more


@pytest.mark.parametrize("model_type", HEADS)
def test_no_pass_makes_a_cache_and_the_configuration_stays(model_type: str, tmp_path: Path) -> None:
    data = rows(twice=False, uneven=False)
    made = trainer(model_type, tmp_path, data)
    made.model.config.use_cache = True
    seen = []
    made.model.register_forward_hook(lambda module, args, kwargs, out: seen.append(out), with_kwargs=True)
    made.train()
    made.collect(data)
    assert len(seen) == 1 + 2  # 16 rows at once, then 8 and 8
    assert [out.get("past_key_values") for out in seen] == [None] * 3
    assert made.model.config.use_cache is True


class Stop(TrainerCallback):
    """Ends a run at a step, as a signal would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 2


def test_tokens_a_second_are_those_of_this_process_without_padding(tmp_path: Path) -> None:
    data = rows(twice=False, uneven=False).to_dict()
    data["attention_mask"] = [[1] * (LENGTH - 2) + [0] * 2] * ROWS
    padded = Dataset.from_dict(data).with_format("torch")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    made = trainer("gpt2", tmp_path, padded, **settings)
    made.add_callback(Stop())
    made.train()
    assert int(made.progress.tokens) == 2 * 4 * (LENGTH - 2)
    again = trainer("gpt2", tmp_path, padded, **settings)
    metrics = again.train(resume_from_checkpoint=True).metrics
    assert again.state.global_step == 4
    assert int(again.progress.tokens) == 2 * 4 * (LENGTH - 2)
    again.progress.evaluating = 0.25 * metrics["train_runtime"]
    training = 0.75 * metrics["train_runtime"]
    found = again.speed(metrics)
    assert found is not None
    assert found.tokens == pytest.approx(32 / training)
    assert found.samples == pytest.approx(8 / training)


def test_there_is_no_speed_where_nothing_was_trained(tmp_path: Path) -> None:
    made = trainer("gpt2", tmp_path, rows(twice=False, uneven=False))
    assert made.speed({"train_runtime": 2.0, "train_samples_per_second": 8.0}) is None
    made.progress.rows = 16
    assert made.speed({"train_runtime": 0.0}) is None
    assert made.speed({"train_runtime": 2.0}) == Speed(8.0, 0.0)


def test_evaluations_in_training_are_timed_once(tmp_path: Path) -> None:
    data = rows(twice=False, uneven=False)
    made = trainer("gpt2", tmp_path, data, max_steps=2, eval_strategy="steps", eval_steps=1)
    made.train()
    spent = [
        v
        for entry in made.state.log_history
        for k, v in entry.items()
        if k.endswith("_runtime") and "eval" in k
    ]
    assert len(spent) == 4
    assert sum(spent) <= made.progress.evaluating <= sum(spent) * 1.5 + 0.5
