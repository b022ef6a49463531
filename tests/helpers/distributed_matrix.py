"""Cases of small runs that sharding must not change: families, heads, protocols, tuning modes, options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.config import TrainingConfig
from camex_ft.training.arguments import training_arguments
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import freeze, upcycle
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers import training_runs
from tests.helpers.distributed_training import SGD, still
from tests.helpers.invariant_cases import dense
from tests.helpers.lora_models import FIRST, LORA
from tests.helpers.tiny import EOS, PAD, make

CLASSIFIER = "sequence-classification"
GENERATE = 5  # tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of three steps.

    Attributes:
        model_type, head, variant: of the backbone; variant has fields of its configuration.
        merging, routing, tuning: sections of the configuration.
        settings: of the trainer.
        generates: evaluation generates.
        tolerance: of weights and losses; float32, sums of a batch in another order, over three steps of SGD. Measured:
            7e-7, and 1e-6 where Nash weights carry the base.
    """

    model_type: str = "bert"
    head: str = CLASSIFIER
    variant: Mapping[str, Any] = field(default_factory=dict)
    merging: Mapping[str, Any] = field(default_factory=dict)
    routing: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = False
    tolerance: float = 5e-6


TIED = {"tie_word_embeddings": True}
CAUSAL, SEQ2SEQ = "causal-lm", "seq2seq-lm"
CHECKPOINTING = {"activation_checkpointing": True}
ACCUMULATION = {"gradient_accumulation_steps": 2}
BF16 = {"bf16": True}
LOW = {"tuning": LORA, "merging": {"protocol": "domain-ca"}}
CASES: dict[str, Case] = {
    **{kind: Case(model_type=kind) for kind in FIRST},
    **{f"{kind}-{CAUSAL}": Case(model_type=kind, head=CAUSAL) for kind in ("gpt2", "llama", "mistral", "qwen2")},
    f"llama-{CAUSAL}-tied": Case(model_type="llama", head=CAUSAL, variant=TIED),
    f"t5-{SEQ2SEQ}": Case(model_type="t5", head=SEQ2SEQ, generates=True),
    f"t5-{SEQ2SEQ}-untied": Case(model_type="t5", head=SEQ2SEQ, variant={"tie_word_embeddings": False}, generates=True),
    **{name: Case(merging={"protocol": name}) for name in PROTOCOLS.names()},
    **{f"gpt2-{p}": Case(model_type="gpt2", head=CAUSAL, merging={"protocol": p}) for p in ("namex-full", "smoe")},
    **{f"granularity-{g}": Case(routing={"granularity": g}) for g in ("segment", "token")},
    **{f"curvature-{k}": Case(merging={"curvature": {"kind": k, "rank": 2}}) for k in ("kronecker", "diagonal")},
    "experts": Case(tuning={"mode": "experts"}),
    "lora": Case(**LOW),
    "lora-smoe": Case(tuning=LORA, merging={"protocol": "smoe"}),
    f"lora-gpt2-{CAUSAL}": Case(model_type="gpt2", head=CAUSAL, **LOW),
    f"lora-t5-{SEQ2SEQ}": Case(model_type="t5", head=SEQ2SEQ, **LOW, generates=True),
    "checkpointing": Case(settings=CHECKPOINTING),
    f"checkpointing-llama-{CAUSAL}": Case(model_type="llama", head=CAUSAL, settings=CHECKPOINTING),
    "checkpointing-namex-full": Case(merging={"protocol": "namex-full"}, settings=CHECKPOINTING),
    "checkpointing-lora": Case(**LOW, settings=CHECKPOINTING),
    "accumulation": Case(settings=ACCUMULATION),
    f"accumulation-llama-{CAUSAL}": Case(model_type="llama", head=CAUSAL, settings=ACCUMULATION),
    f"accumulation-t5-{SEQ2SEQ}": Case(model_type="t5", head=SEQ2SEQ, settings=ACCUMULATION),
    # 8 bits of precision in every product, of other rows at a time; what is made of experts stays in float32. Where it
    # did not, losses were up to 1e-2 apart
    "bf16": Case(settings=BF16, tolerance=5e-4),
    "bf16-ep-camex": Case(merging={"protocol": "ep-camex"}, settings=BF16, tolerance=5e-4),
    f"bf16-llama-{CAUSAL}": Case(model_type="llama", head=CAUSAL, settings=BF16, tolerance=5e-4),
    "bf16-lora": Case(**LOW, settings=BF16, tolerance=5e-4),
}  # fmt: skip


def model(case: Case) -> PreTrainedModel:
    """The model of a case, without dropout, noise and random masks."""
    start = (
        make(case.model_type, case.head, dict(case.variant))
        if case.variant
        else dense(case.model_type, case.head)
    )
    made = upcycle(
        start,
        merging={"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 2}, **case.merging},
        routing={"noise": False, "segment": 3, **case.routing},
        tuning=case.tuning,
        seed=1,
    )
    freeze(made, case.tuning.get("mode", "full"))
    for module in made.modules():  # probabilities that are kept as numbers
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return still(made)


def rows(count: int, seed: int, head: str) -> Any:
    """Rows of several lengths; of a head that generates, the labels are the tokens."""
    data = training_runs.rows(count, seed)
    if head == CLASSIFIER:
        return data
    return data.map(lambda row: {"labels": row["input_ids"]}, load_from_cache_file=False)


def pad(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch to its longest row, labels too."""
    if not isinstance(batch[0]["labels"], list):
        return training_runs.pad(batch)
    made = training_runs.pad([{**row, "labels": 0} for row in batch])
    width = made["input_ids"].shape[1]
    padded = [[*row["labels"], *[-100] * (width - len(row["labels"]))] for row in batch]
    return {**made, "labels": torch.tensor(padded)}


def scored(made: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Outputs of an evaluation of a head that predicts tokens: each row's mean log-likelihood, padding apart; [B]."""
    found = made(**inputs)
    labels = inputs["labels"]
    logits = found.logits if made.config.is_encoder_decoder else found.logits[:, :-1]
    labels = labels if made.config.is_encoder_decoder else labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return found.loss, losses.sum(1) / (labels != -100).sum(1)


def generated(made: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Outputs of an evaluation that generates: tokens, filled up to one width; [B, 1 + GENERATE]."""
    made = getattr(made, "module", made)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    loss = made(**inputs).loss
    found = made.generate(
        **given, max_new_tokens=GENERATE, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
    )
    return loss, torch.nn.functional.pad(found, (0, 1 + GENERATE - found.shape[1]), value=PAD)


def trainer(case: Case, folder: Path) -> CamexTrainer:
    """A trainer whose steps take 8 rows over all processes and micro-batches."""
    settings = {
        "per_device_eval_batch_size": 4,  # of 10 rows two processes fill the last batch up
        "global_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **SGD,
        **case.settings,
    }
    torch.manual_seed(0)
    extra = {"outputs": generated if case.generates else scored} if case.head != CLASSIFIER else {}
    return CamexTrainer(
        model=model(case),
        args=training_arguments(TrainingConfig.model_validate(settings), output=folder, best=None),
        train_dataset=rows(32, 1, case.head),
        eval_dataset={"validation": rows(10, 2, case.head)},
        data_collator=pad,
        score=lambda name, outputs: {
            "sum": float(outputs[0].sum() if isinstance(outputs, tuple) else outputs.sum())
        },
        **extra,
    )


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """What must not depend on the number of processes. All processes take part."""
    made = trainer(case, folder)
    made.train()
    collected = made.collect(rows(10, 2, case.head))
    metrics = made.evaluate("validation", metric_key_prefix="final")
    state = made.full_state() or made.accelerator.unwrap_model(made.model).state_dict()  # statistics too
    parameters = dict(made.accelerator.unwrap_model(made.model).named_parameters())
    return {
        "losses": [line["loss"] for line in made.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in made.state.log_history if "loss" in line],
        "loads": made.monitor.loads,
        "loss": metrics["final_loss"],
        "outputs": torch.as_tensor(collected[0] if isinstance(collected, tuple) else collected),
        "routing": {name: torch.as_tensor(s) for name, s in made.routing.items()},
        "weights": {n: tensor.clone() for n, tensor in state.items()},
        "trained": sorted(n for n, p in parameters.items() if p.requires_grad),
        "sharded": sorted(n for n, p in parameters.items() if type(p).__name__ == "DTensor"),
    }
