"""Schema of a configuration: every key, its type, default and meaning.

The models hold what was written and the defaults; what follows from the profile is filled in by `profiles.resolve`.
`docs/configuration.md` is generated from the descriptions below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from camex_ft.config.problems import Key, Origin
from camex_ft.config.values import (
    MOST,
    Bool,
    Count,
    Every,
    Experts,
    Interval,
    Layers,
    NonNegative,
    Place,
    Positive,
    Rank,
    Share,
    Steps,
    Text,
)
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

CHECKPOINTS = "checkpoints"
OWN_EXPERTS = "own-experts"
ADAPTER = "adapter:"  # before the folder of a LoRA adapter, among donors
BASES = ("start", "mean")  # any other base is a checkpoint
DONOR_KEYS = ("from", "each", "base", "others", "others_scale")


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


def without(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the values but for these keys: without effect, they leave the hash of an experiment as it was."""
    return {key: value for key, value in values.items() if key not in keys}


class TaskConfig(Section):
    """The task: the keys that every kind of task takes.

    A kind of task declares its own keys in its own file, as a subclass that its `Task.config_class` names.

    Attributes:
        kind: name of the kind of task, for messages and documentation.
        lengths: keys that hold a number of tokens; the first is of the longest input, the last of the longest target.
    """

    kind: ClassVar[str] = ""
    lengths: ClassVar[tuple[str, ...]] = ()

    suite: Text = Field(default="glue", description="Benchmark: the part of a task's name before the slash.")
    name: Text = Field(default="sst2", description="Task of the suite (`camex-ft ls tasks`).")
    predict: Bool = Field(
        default=False,
        description="Also predict the test split and write it in the benchmark's submission format.",
    )

    @property
    def id(self) -> str:
        """Name in the registry of tasks, such as ``glue/sst2``."""
        return f"{self.suite}/{self.name}"

    @property
    def length(self) -> int:
        """Tokens of the longest input."""
        return int(getattr(self, self.lengths[0]))

    @property
    def target_length(self) -> int:
        """Tokens of the longest target of a text-to-text model."""
        return int(getattr(self, self.lengths[-1]))

    @property
    def summary(self) -> str:
        """The length of an input in words, for the head of a run."""
        return f"up to {self.length} tokens" if self.lengths else ""

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield the values that exclude each other: the keys concerned, the one to show first, and a message."""
        yield from ()

    def implied(self) -> dict[str, Any]:
        """Return the values that keys with the value null stand for."""
        return {}


def task_kinds() -> tuple[type[TaskConfig], ...]:
    """Return the models of the registered kinds of task, in the order of their tasks' names."""
    return tuple(dict.fromkeys(TASKS.get(name).config_class for name in TASKS.names()))


def task_id(task: Mapping[str, Any]) -> str:
    """Return the name in the registry of tasks that the keys `suite` and `name` give."""
    fields = TaskConfig.model_fields
    return "/".join(str(task.get(key, fields[key].default)) for key in ("suite", "name"))


def task_kind(task: Mapping[str, Any]) -> type[TaskConfig] | None:
    """Return the model of the keys of a task, of which `suite` and `name` are read; None for an unknown task."""
    known = task_id(task) in TASKS.names()
    return TASKS.get(task_id(task)).config_class if known else None


def _as_task(value: Any) -> Any:
    """Validate the keys of a task by the model of its kind."""
    if not isinstance(value, Mapping):
        return value
    return (task_kind(value) or TaskConfig).model_validate(dict(value))


class DataConfig(Section):
    """The source of the rows."""

    source: Literal["auto", "hub", "disk", "embedded"] = Field(
        default="auto",
        description="`hub`: Hugging Face hub or its cache; `disk`: the folder `dir`; `embedded`: corpora that the "
        "package makes; `auto`: `disk` where `dir` is given, else the profile's own.",
    )
    dir: Place | None = Field(
        default=None,
        description="Folder with train, validation and test files (parquet, jsonl, csv or tsv; texts also as txt, or "
        "as folders of txt files); relative to the working folder.",
    )
    train_rows: Count | None = Field(default=None, description="Use the first N training rows; null: all.")
    eval_rows: Count | None = Field(
        default=None, description="Use the first N rows of each validation split; null: all."
    )
    splits: dict[str, str] = Field(
        default={},
        description="Which split of the data serves as which: `{train: validation, validation: test}`; one that is not "
        "named serves as itself.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="Seed of the embedded corpus; no effect elsewhere."
    )
    domain: Annotated[int, Field(ge=0, le=MOST)] | None = Field(
        default=None,
        description="Use the rows of this domain alone, numbered from 0, in every split; for embedded corpora, which "
        "know their domains. null: all.",
    )

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `domain` out where it is not set, as before there was one."""
        return without(serialise(self), () if self.domain is not None else ("domain",))

    @property
    def path(self) -> Path | None:
        """`dir` as a path, with ``~`` expanded."""
        return None if self.dir is None else Path(os.path.expanduser(self.dir))


class CurvatureConfig(Section):
    """The learned maps M_i of the protocols that end in -ca."""

    kind: Literal["kronecker", "diagonal", "low-rank"] = Field(
        default="kronecker",
        description="`kronecker`: sums of Kronecker products, the paper's; `diagonal`: a factor for each entry, from "
        "outer products; `low-rank`: the identity and a map of low rank on either side.",
    )
    rank: Rank = Field(default=8, description="Terms R in each curvature M_i; 1 is the cheapest.")


class MergingConfig(Section):
    """The merging protocol and its options."""

    protocol: Text = Field(default="ties-ca", description="Merging protocol (`camex-ft ls protocols`).")
    experts: Experts = Field(default=8, description="Experts N in each layer, at least 2; `dense` has none.")
    top_k: Count | None = Field(
        default=None, description="Experts with a routing weight above 0, at most `experts`; null: all."
    )
    alpha: NonNegative = Field(
        default=1.0, description="Step size of merging: E_hat = E_m + alpha * sum of s_i P_i(tau_i)."
    )
    curvature: CurvatureConfig = Field(
        default=CurvatureConfig(), description="For protocols with curvature only."
    )
    options: dict[str, Any] = Field(
        default={}, description="The protocol's own options, see `docs/protocols.md`."
    )
    keep_vectors: bool = Field(
        default=True,
        description="Make transformed domain vectors once for all micro-batches of an optimizer step, and once for an "
        "evaluation. Takes the memory of the experts again, with gradient accumulation twice.",
    )

    @property
    def k(self) -> int:
        """Experts that an input is routed to: `top_k`, or all."""
        return self.experts if self.top_k is None else self.top_k


class FitConfig(Section):
    """The texts that routers are fitted to; for `routing.init: fit`."""

    rows: Count = Field(
        default=200, description="Texts of each donor, the first ones; their labels are not used."
    )
    sources: Literal["data"] | Annotated[tuple[Place, ...], Field(min_length=1, strict=False)] = Field(
        default="data",
        alias="from",
        description="`data`: the training rows of each donor's own run, as that run records them; or a list with a "
        "folder (as `data.dir`) or file of rows for each donor, in their order.",
    )


class RoutingConfig(Section):
    """The routing weights."""

    init: Literal["random", "fit"] = Field(
        default="random",
        description="Start of the routers. `random`: small random weights; `fit`: layer by layer a logistic "
        "regression from the router's input to the donor that a text belongs to, for `upcycle.init: checkpoints`.",
    )
    fit: FitConfig = Field(default=FitConfig(), description="For `init: fit` only.")

    granularity: Literal["auto", "sequence", "segment", "token", "encoder"] = Field(
        default="auto",
        description="Tokens that share routing weights. `auto`: `sequence` for encoders and under a classification "
        "head, `segment` for causal language models, `encoder` for decoders that generate.",
    )
    router: Literal["linear", "cosine", "expert-choice"] = Field(
        default="linear",
        description="Logits of the experts. `linear`: x W; `cosine`: cosines of x with the columns of W, over a "
        "learned temperature; `expert-choice`: those of `linear`, by which each expert takes its best tokens of a "
        "sequence (`smoe`, in models that do not generate).",
    )
    temperature: Positive = Field(
        default=1.0, description="Divides the logits within the softmax; below 1 routing is sharper."
    )
    normalise: Literal["after", "before"] = Field(
        default="after",
        description="Softmax `after` the `top_k` experts were chosen, over them, or `before`, over all, so that the "
        "weights of the chosen sum to less than 1.",
    )
    noise: Bool = Field(default=True, description="Learned noise on the router's logits, in training only.")
    balance: NonNegative = Field(default=1e-2, description="Coefficient of the balance loss; 0 turns it off.")
    z_loss: NonNegative = Field(
        default=0.0,
        description="Coefficient of the z-loss, the mean square of logsumexp of the logits; 0 turns it off.",
    )
    segment: Count = Field(
        default=256, description="Length of a segment, in tokens; for granularity `segment`."
    )
    first_segment: Literal["prior", "self"] = Field(
        default="prior",
        description="Routing of the first segment. `prior`: a learned prior, strictly causal; `self`: its own mean, so "
        "that a token sees its segment's future.",
    )

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `init` and `fit` out of random routers, as before there were others."""
        return without(serialise(self), () if self.init == "fit" else ("init", "fit"))


class UpcycleConfig(Section):
    """The conversion of dense feed-forward layers into experts."""

    layers: Layers = Field(
        default="all",
        description="Layers that get experts: `all`; `every_other`, in each stack every second one and so its last; "
        "or a list of positions from 0, the decoder's after the encoder's. Of a sparse mixture, blocks with experts "
        "alone count.",
    )
    init: Literal["copy", "noise", "drop", "checkpoints", "own-experts"] = Field(
        default="copy",
        description="`copy`: experts start equal to the dense layer; `noise`: with noise added to them; `drop`: with "
        "some of their inner units drawn anew; `checkpoints`: as those of the donors, `from`; `own-experts`: as those "
        "of the backbone, a sparse mixture, with its routers, and their mean as the base; the backbone sets "
        "`merging.experts`, `merging.top_k` and, for `smoe`, `routing.normalise`.",
    )
    noise: NonNegative = Field(
        default=0.01,
        description="For `init: noise`: standard deviation, as a fraction of the weight matrix's own.",
    )
    drop: Share = Field(
        default=0.5,
        description="For `init: drop`: share of each expert's inner units that are drawn anew.",
    )
    rank: Rank | None = Field(
        default=None,
        description="Rank of each expert's difference from a base that is not trained, as B_i A_i; of donors the "
        "nearest such matrices. null: whole matrices. With `tuning.mode: lora`, `tuning.lora.rank` says it.",
    )
    donors: Annotated[tuple[Place, ...], Field(strict=False)] = Field(
        default=(),
        alias="from",
        description="For `init: checkpoints`, as are the keys below: the donors, fine-tuned from `backbone`. Each is a "
        "backbone's name (hub id, folder, GGUF file), a run's folder, or `adapter:` and the folder of a LoRA adapter "
        "of `backbone`.",
    )
    each: Experts = Field(
        default=1, description="Experts from each donor; `merging.experts` is their number in all."
    )
    base: Place = Field(
        default="start",
        description="Base expert. `start`: the backbone's own layer; `mean`: the donors' mean; or a checkpoint.",
    )
    others: Literal["average", "arithmetic", "ties", "first"] = Field(
        default="average",
        description="Parameters outside the experts. `average`: the donors' mean; `arithmetic`: the backbone's plus "
        "`others_scale` times the sum of the donors' differences from it; `ties`: the same with the differences merged "
        "by TIES; `first`: the first donor's.",
    )
    others_scale: NonNegative = Field(
        default=0.8, description="Step size, for `others: arithmetic` and `ties`."
    )

    @property
    def count(self) -> int:
        """Number of experts that the donors give."""
        return len(self.donors) * self.each

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `rank` and the keys of donors out where they are not set, as before there were such keys."""
        idle = () if self.init == CHECKPOINTS else DONOR_KEYS
        return without(serialise(self), idle if self.rank is not None else ("rank", *idle))


class LoraConfig(Section):
    """Experts of low rank, and LoRA beside them; for `tuning.mode: lora`."""

    rank: Rank = Field(default=8, description="Rank r of each expert's domain vector B_i A_i, and of LoRA's.")
    scale: Positive = Field(
        default=1.0, description="Multiplies B_i A_i, and in attention what PEFT calls lora_alpha / r."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Probability of dropout on what A_i is multiplied with, in training."
    )
    attention: Bool = Field(
        default=True,
        description="LoRA on attention, by PEFT. With `dense` the feed-forward maps get it in any case.",
    )
    targets: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="Names of attention's maps that get LoRA, such as [q, v]; null: those that PEFT names for the "
        "backbone's type.",
    )


class TuningConfig(Section):
    """The parameters that are trained."""

    mode: Literal["full", "experts", "lora", "router", "router+curvature"] = Field(
        default="full",
        description="`full`: all parameters; `experts`: experts, base, router, curvature and head; `lora`: experts of "
        "low rank on a frozen base, router, curvature, head and LoRA on attention; `router`: routers alone; "
        "`router+curvature`: these and the curvature.",
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="For `mode: lora` only.")

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `lora` out in other modes, as before there was one: hashes of experiments stay what they were."""
        return without(serialise(self), () if self.mode == "lora" else ("lora",))


class TrainingConfig(Section):
    """The training: the keys below and any other field of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")

    learning_rate: Positive = Field(default=2e-4, description="Peak learning rate.")
    router_learning_rate: Positive | None = Field(
        default=None, description="Learning rate of routers; null: `learning_rate`."
    )
    curvature_learning_rate: Positive | None = Field(
        default=None, description="Learning rate of curvature factors; null: `learning_rate`."
    )
    num_train_epochs: Positive = Field(
        default=5.0, description="Passes over the training rows; may be a fraction."
    )
    max_steps: Steps = Field(
        default=-1, description="Optimizer steps, 1 or more, in place of epochs; -1: epochs count."
    )
    per_device_train_batch_size: Count = Field(default=16, description="Sequences a device and step.")
    global_batch_size: Count | None = Field(
        default=None,
        description="Sequences of an optimizer step, over all processes and micro-batches; sets "
        "`per_device_train_batch_size`, so that any number of processes trains the same. null: so many a device.",
    )
    per_device_eval_batch_size: Count = Field(
        default=32, description="Sequences a device and evaluation step."
    )
    weight_decay: NonNegative = Field(default=0.0, description="Decoupled weight decay of the optimizer.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=42, description="Seed of new parameters, dropout, router noise and the order of the data."
    )
    eval_strategy: Interval = Field(default="epoch", description="When the validation splits are scored.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = Field(
        default="epoch", description="When a checkpoint is written; the same as `eval_strategy`, or `best`."
    )
    save_total_limit: Count | None = Field(
        default=2, description="Checkpoints kept, the best one among them; null: all."
    )
    load_best_model_at_end: Bool = Field(
        default=True, description="Keep the best epoch on the validation split."
    )
    logging_steps: Every = Field(
        default=50.0, description="Steps from one logged line to the next; below 1, a fraction."
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] = Field(
        default="group_by_length", description="Order of training rows; grouping by length saves padding."
    )
    resume: Text = Field(
        default="auto",
        description="`auto`: go on from the run's last checkpoint; `never`: start anew; or a checkpoint's folder.",
    )

    def rows_a_device(self, processes: int = 1) -> int:
        """Return how many sequences a device takes at a time.

        Raises:
            UserError: those of a step do not share out evenly.
        """
        rows = self.global_batch_size
        if rows is None:
            return self.per_device_train_batch_size
        parts = int((self.model_extra or {}).get("gradient_accumulation_steps") or 1)
        if rows % (processes * parts):
            raise UserError(
                f"training.global_batch_size: {rows} rows do not share out evenly among {processes} processes and "
                f"{parts} micro-batches; expected a multiple of {processes * parts}"
            )
        return rows // (processes * parts)

    @property
    def trackers(self) -> list[str]:
        """The trackers of `report_to`, ``all`` among them as it is; none where it is not given."""
        named = (self.model_extra or {}).get("report_to") or []
        return [tracker for tracker in ([named] if isinstance(named, str) else named) if tracker != "none"]

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `transformers.TrainingArguments`: all keys but those of the toolkit."""
        return {name: value for name, value in self.model_dump().items() if name not in OWN_KEYS}


OWN_KEYS = ("router_learning_rate", "curvature_learning_rate", "resume", "global_batch_size")


class OutputConfig(Section):
    """The place of results."""

    dir: Place = Field(
        default="results", description="Folder of results, from the working folder; runs are in its `runs`."
    )
    model: Bool = Field(
        default=True,
        description="Keep the best epoch's model when the run is done; false: the record alone, as for a large grid.",
    )

    @property
    def path(self) -> Path:
        """`dir` as a path, with ``~`` expanded."""
        return Path(os.path.expanduser(self.dir))


class Config(Section):
    """One run."""

    profile: Literal["auto", "paper", "embedded"] = Field(
        default="auto",
        description="Defaults of all keys that are not written. `paper`: the published recipe, on real data; "
        "`embedded`: minutes on a CPU without network; `auto`: `paper` where CUDA and the hub or its cache are there.",
    )
    backbone: Text = Field(
        default="auto",
        description="Hub id, folder, .gguf file, `package:NAME/PATH` or `embedded/FAMILY` (`camex-ft ls backbones`); "
        "`new:` and one of the first four: its architecture and tokenizer, weights drawn from the seed; `auto`: the "
        "profile's own.",
    )
    task: Annotated[SerializeAsAny[TaskConfig], BeforeValidator(_as_task)] = Field(
        default_factory=lambda: _as_task({})
    )
    data: DataConfig = DataConfig()
    merging: MergingConfig = MergingConfig()
    routing: RoutingConfig = RoutingConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    output: OutputConfig = OutputConfig()

    _origins: Mapping[Key, Origin] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Two configurations are equal if they say the same, wherever it was written."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # holds dicts: `identity.config_hash` is the stable hash
