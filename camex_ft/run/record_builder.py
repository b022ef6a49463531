"""From a trained model to its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, cast

from transformers import PreTrainedModel

from camex_ft.config import Config
from camex_ft.results import Record, command_line, strip_paths
from camex_ft.results import environment as software
from camex_ft.results.record import Cost, Data, LayerCurvature, Metrics, Model, RoutingStatistics, Run, pack
from camex_ft.results.routing import layer_routing
from camex_ft.tasks.base import Prepared
from camex_ft.training.cost import Speed, devices, peak_memory_mb, rows_read
from camex_ft.training.distributed import largest
from camex_ft.training.history import best_and_last, epochs, only_metrics
from camex_ft.training.monitor import curvature_statistics
from camex_ft.training.trainer import CamexTrainer


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a run beside its trainer.

    Attributes:
        name: of its folder.
        started: when it began, in seconds since 1970.
        reason: which profile, and why, as `config.resolve` says it.
        data_sha256: fingerprint of its data.
        speed: of training; None where there was nothing left to train.
        resumed: the step that an interrupted run went on from; None where it was not interrupted.
        counted: numbers of the model's parameters, as `describe` has them.
        tokenizer: what was made for this text; None where the backbone's own serves.
        backbone_sha256: SHA-256 of the backbone's content; None for an embedded one.
    """

    name: str
    started: float
    reason: str
    data_sha256: str
    speed: Speed | None
    counted: Mapping[str, int]
    resumed: int | None = None
    tokenizer: str | None = None
    backbone_sha256: str | None = None


def make_record(config: Config, data: Prepared, trainer: CamexTrainer, facts: Facts) -> Record:
    """Return the record of a run whose best model is in `trainer`; evaluates it once more, with its test splits."""
    split, primary = data.primary
    rows = epochs(trainer.state.log_history)
    greater = data.greater_is_better
    final, routing, correct = _evaluate(data, trainer)
    state = trainer.state
    scored = list(rows)
    if not trainer.keeps_best and (not rows or rows[-1]["step"] < state.global_step):
        # no evaluation in training was of the model that is kept
        scored.append({"step": state.global_step, "epoch": state.epoch or 0.0, **final})
    outcome = best_and_last(scored, f"{split}_{primary}", greater_is_better=greater)
    model = cast(PreTrainedModel, trainer.model)
    curvature = curvature_statistics(model, condition=True)
    gpus = devices(trainer.args)
    return Record(
        run=Run(
            name=facts.name,
            profile=cast(Any, config.profile),
            profile_reason=facts.reason.partition(": ")[2],
            status="done",
            started=datetime.fromtimestamp(facts.started, timezone.utc).isoformat(timespec="seconds"),
            seconds=time.time() - facts.started,
            command=command_line(),
            exit=0,
            resumed=facts.resumed,
        ),
        config=strip_paths(config.model_dump(mode="json")),
        task=config.task.id,
        protocol=config.merging.protocol,
        backbone=strip_paths(config.backbone),
        seed=config.training.seed,
        metrics=Metrics(
            primary=primary,
            greater_is_better=greater,
            best=outcome.best,
            best_epoch=outcome.best_epoch,
            last=outcome.last,
            per_epoch=[dict(row) for row in rows],
            all={k.removeprefix(f"{split}_"): v for k, v in final.items()},
            test=_test(data, trainer),
            correct=correct,
        ),
        routing=routing,
        curvature={name: LayerCurvature.model_validate(entry) for name, entry in curvature.items()},
        model=Model(**facts.counted, tokenizer=facts.tokenizer, backbone_sha256=facts.backbone_sha256),
        cost=_cost(data, trainer, facts, gpus),
        data=Data(
            source=cast(Any, config.data.source),
            id=data.task.hub if config.data.source == "hub" else strip_paths(config.data.dir or data.task.id),
            rows={split: len(each) for split, each in data.rows.items()},
            sha256=facts.data_sha256,
        ),
        environment=software(gpus=gpus),
    )


def _evaluate(
    data: Prepared, trainer: CamexTrainer
) -> tuple[dict[str, float], dict[str, RoutingStatistics], str | None]:
    """Return the metrics of all validation splits, and of the one that decides the routing and what was right."""
    metrics: dict[str, float] = {}
    routing: dict[str, RoutingStatistics] = {}
    correct: str | None = None
    for name in data.validation:
        found = trainer.evaluate(name, metric_key_prefix=f"final_{name}")
        metrics.update(only_metrics(found, prefix="final_"))
        if name == data.primary[0]:
            kinds = data.kinds(name)
            routing = {layer: layer_routing(s, kinds) for layer, s in trainer.routing.items()}
            found_right = data.correct(name, trainer.outcome)
            correct = None if found_right is None else pack(found_right)
    return metrics, routing, correct


def _cost(data: Prepared, trainer: CamexTrainer, facts: Facts, gpus: Sequence[str]) -> Cost:
    """Return the cost of a training, interruptions included in its steps, epochs and rows."""
    epochs_done = float(trainer.state.epoch or 0.0)
    batch = trainer.args.train_batch_size * trainer.args.world_size
    rows = 0 if data.train is None else len(data.train)
    return Cost(
        samples_per_second=facts.speed.samples if facts.speed else None,
        tokens_per_second=facts.speed.tokens if facts.speed else None,
        peak_memory_mb=largest(peak_memory_mb(trainer.args.device.type)),
        device=" x ".join([gpus[0], str(len(gpus))]) if gpus else "cpu",
        processes=trainer.args.world_size,
        engine=trainer.engine,
        rows_a_step=trainer.rows_a_step(),
        steps=trainer.state.global_step,
        epochs=epochs_done,
        rows=rows_read(epochs_done, rows, batch, drop_last=trainer.args.dataloader_drop_last),
    )


def _test(data: Prepared, trainer: CamexTrainer) -> dict[str, Any] | None:
    scores: dict[str, Any] = {}
    for split in data.test:
        if data.labelled(split):
            metrics: Mapping[str, float] = data.score(split, trainer.collect(data.encoded[split]))
            scores.update(metrics if len(data.test) == 1 else {f"{split}_{k}": v for k, v in metrics.items()})
    return scores or None
