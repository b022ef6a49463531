"""The record of a run, from its inputs and its trained model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedModel

from camex_ft.results import Record, command_line, environment, strip_paths
from camex_ft.results.record import (
    Cost,
    Data,
    Donor,
    LayerCurvature,
    Metrics,
    Model,
    RouterFit,
    RoutingStatistics,
    Run,
    pack,
)
from camex_ft.run.steps import RunInputs, trained_tokenizer
from camex_ft.tasks.base import Prepared
from camex_ft.training.callbacks.monitoring import Speed, curvature_statistics
from camex_ft.training.callbacks.reporting import best_and_last, epochs, only_metrics
from camex_ft.training.cost import devices, peak_memory_mb, rows_read
from camex_ft.training.distributed import largest
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling.plan import donors_of
from camex_ft.upcycling.router_fit import FitQuality


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Outcome of a training.

    Attributes:
        speed: None if a checkpoint of the finished training was there.
        resumed: the step that an interrupted run went on from; None if it was not interrupted.
    """

    speed: Speed | None = None
    resumed: int | None = None


def make_record(
    inputs: RunInputs,
    data: Prepared,
    trainer: CamexTrainer,
    counts: Mapping[str, int],
    result: TrainingResult,
    fitted: Mapping[str, FitQuality] | None = None,
) -> Record:
    """Return the record of a run whose best model is in `trainer`; evaluates it once more, with its test splits.

    Args:
        inputs: of the run.
        data: its prepared data.
        trainer: after training.
        counts: numbers of the model's parameters, see `camex_ft.training.cost.describe`.
        result: of the training.
        fitted: quality of fitted routers, by layer.
    """
    settled, task = inputs.settled, data.task
    final, routing, correct = _evaluate(data, trainer)
    gpus = devices(trainer.args)
    curvature = curvature_statistics(cast(PreTrainedModel, trainer.model), condition=True)
    return Record(
        run=Run(
            name=inputs.folder.path.name,
            profile=cast(Any, settled.profile),
            profile_reason=inputs.reason.partition(": ")[2],
            status="done",
            started=datetime.fromtimestamp(inputs.started, timezone.utc).isoformat(timespec="seconds"),
            seconds=time.time() - inputs.started,
            command=command_line(),
            exit=0,
            resumed=result.resumed,
        ),
        config=strip_paths(settled.model_dump(mode="json")),
        task=settled.task.id,
        protocol=settled.merging.protocol,
        backbone=strip_paths(settled.backbone),
        seed=settled.training.seed,
        metrics=_metrics(data, trainer, final, correct),
        routing=with_fit(routing, fitted or {}),
        curvature={name: LayerCurvature.model_validate(entry) for name, entry in curvature.items()},
        model=Model(
            **counts,
            tokenizer=trained_tokenizer(settled, task, trainer.processing_class),
            backbone_sha256=inputs.backbone.sha256,
            donors=[Donor(**donor) for donor in donors_of(cast(PreTrainedModel, trainer.model))],
        ),
        cost=_cost(data, trainer, result.speed, gpus),
        data=Data(
            source=cast(Any, settled.data.source),
            id=task.hub if settled.data.source == "hub" else strip_paths(settled.data.dir or task.id),
            rows={split: len(rows) for split, rows in data.rows.items()},
            sha256=inputs.data_sha256,
        ),
        environment=environment(gpus=gpus),
    )


def _metrics(
    data: Prepared, trainer: CamexTrainer, final: Mapping[str, float], correct: str | None
) -> Metrics:
    """Return the metrics of the evaluations in training and of the final one."""
    split, primary = data.primary
    state, greater = trainer.state, data.greater_is_better
    evaluations = epochs(state.log_history)
    scored = list(evaluations)
    if not trainer.keeps_best and (not scored or scored[-1]["step"] < state.global_step):
        # no evaluation in training was of the model of the last step, which is saved
        scored.append({"step": state.global_step, "epoch": state.epoch or 0.0, **final})
    outcome = best_and_last(scored, f"{split}_{primary}", greater_is_better=greater)
    return Metrics(
        primary=primary,
        greater_is_better=greater,
        best=outcome.best,
        best_epoch=outcome.best_epoch,
        last=outcome.last,
        per_epoch=[dict(row) for row in evaluations],
        all={k.removeprefix(f"{split}_"): v for k, v in final.items()},
        test=_test(data, trainer),
        correct=correct,
    )


def _evaluate(
    data: Prepared, trainer: CamexTrainer
) -> tuple[dict[str, float], dict[str, RoutingStatistics], str | None]:
    """Return the metrics of all validation splits, and the routing and the correct rows of the first one."""
    metrics: dict[str, float] = {}
    routing: dict[str, RoutingStatistics] = {}
    correct: str | None = None
    for name in data.validation:
        scores = trainer.evaluate(name, metric_key_prefix=f"final_{name}")
        metrics.update(only_metrics(scores, prefix="final_"))
        if name == data.primary[0]:
            kinds = data.kinds(name)
            routing = {layer: layer_routing(s, kinds) for layer, s in trainer.routing.items()}
            is_correct = data.correct(name, trainer.outcome)
            correct = None if is_correct is None else pack(is_correct)
    return metrics, routing, correct


def _cost(data: Prepared, trainer: CamexTrainer, speed: Speed | None, gpus: Sequence[str]) -> Cost:
    """Return the cost of a training, interruptions included in its steps, epochs and rows."""
    epochs_done = float(trainer.state.epoch or 0.0)
    batch = trainer.args.train_batch_size * trainer.args.world_size
    rows = 0 if data.train is None else len(data.train)
    return Cost(
        samples_per_second=speed.samples if speed else None,
        tokens_per_second=speed.tokens if speed else None,
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


# -- routing statistics -----------------------------------------------------------------------------------------------


ROUNDING = 1e-3  # of a sum of weights in the lowest precision that routing has


def entropy(weights: ArrayLike) -> float:
    """Return the mean over inputs of -sum_i s_i ln s_i, in nats: 0 for one-hot routing, ln N for uniform.

    Args:
        weights: routing weights s; [n, N], each row >= 0 and summing to 1; a row that sums to less, as with a softmax
            before the choice of experts, is scaled to 1. NaN for n = 0.
    """
    s = _weights(weights)
    total = s.sum(axis=1, keepdims=True)
    s = s / np.where((total > 0) & (total < 1 - ROUNDING), total, 1.0)
    terms = np.where(s > 0, s * np.log(np.where(s > 0, s, 1.0)), 0.0)
    return float(-terms.sum(axis=1).mean()) if len(s) else float("nan")


def load(weights: ArrayLike) -> np.ndarray:
    """Return the share of inputs whose largest routing weight is each expert's; [N], float64, sums to 1 (0 for n = 0).

    A tie counts for the expert of lowest index.
    """
    s = _weights(weights)
    return np.bincount(s.argmax(axis=1), minlength=s.shape[1]) / max(len(s), 1)


def nmi(assignments: ArrayLike, domains: ArrayLike) -> float:
    """Return the normalised mutual information I(a; d) / mean(H(a), H(d)) of two labellings; 0 independent, 1 the same.

    Args:
        assignments: the expert of each input; [n], integers.
        domains: its true domain; [n], integers.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(np.asarray(domains), np.asarray(assignments)))


def with_fit(
    routing: Mapping[str, RoutingStatistics], fitted: Mapping[str, FitQuality]
) -> dict[str, RoutingStatistics]:
    """Return the layers' entries of the record with the quality of their fitted routers before training."""
    fits = {name: RouterFit(accuracy=list(q.accuracy), nmi=q.nmi) for name, q in fitted.items()}
    return {name: entry.model_copy(update={"fit": fits.get(name)}) for name, entry in routing.items()}


def means_by(weights: ArrayLike, kinds: ArrayLike) -> dict[str, list[float | None]]:
    """Return the mean routing weights [N] of the inputs of each kind, to 4 decimals; kinds by name.

    Args:
        weights: routing weights s; [n, N].
        kinds: of each input; [n], such as labels or domains.
    """
    s, kinds = _weights(weights), np.asarray(kinds)
    return {str(kind): s[kinds == kind].mean(axis=0).round(4).tolist() for kind in np.unique(kinds)}


def layer_routing(weights: ArrayLike, kinds: Mapping[str, ArrayLike] | None = None) -> RoutingStatistics:
    """Return one layer's entry of the record from routing weights [n, N].

    Args:
        weights: routing weights s; [n, N]. An input is assigned to the expert of its largest one.
        kinds: of what kind each input is, [n], by the name of the distinction; "domain" is scored against (`nmi`).
    """
    s, kinds = _weights(weights), kinds or {}
    score = nmi(s.argmax(axis=1), kinds["domain"]) if "domain" in kinds else None
    by = {name: means_by(s, each) for name, each in kinds.items()}
    return RoutingStatistics(entropy=entropy(s), load=load(s).tolist(), nmi=score, by=by)


def _weights(weights: ArrayLike) -> np.ndarray:
    s = np.asarray(weights, dtype=np.float64)
    if s.ndim != 2:
        raise ValueError(f"routing weights are [inputs, experts], not of shape {s.shape}")
    return s
