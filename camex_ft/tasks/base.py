"""Base class of tasks, and the data of a run as a task prepares them.

A task holds the benchmark's columns (`features`, exactly the hub's). Its kind, a subclass of `Task`, turns examples
into rows, rows into model inputs, and the collected outputs of the model into predictions and metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from camex_ft.config.schema import TaskConfig
from camex_ft.utils.durable import write_named
from camex_ft.utils.errors import UserError
from camex_ft.utils.features import build_features
from camex_ft.utils.registry import TASKS, positions

if TYPE_CHECKING:  # so that listing the tasks needs neither torch nor datasets
    from datasets import Dataset, Features
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores

Settings = TypeVar("Settings", bound=TaskConfig)
Example = Mapping[str, Any]
Row = dict[str, Any]
Predictions = Sequence[Any]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]

PLAIN_SPLITS: Mapping[str, Any] = {"train": "train", "validation": ("validation",), "test": ("test",)}
WITHHELD = -1  # label that a benchmark does not publish
IGNORED = -100  # label of a token that is not scored
ROW = "row"


def nothing_wrong(example: Example) -> str | None:
    """Accept every example: the check of tasks whose columns do not depend on each other."""
    return None


class FeaturesField:
    """Field of a task that takes features, or columns as `build_features` does, and is read as features."""

    def __get__(self, task: Task[Any] | None, owner: type[Task[Any]]) -> Features:
        """Return the features, built when they are first read: `datasets` takes a second to import."""
        if task is None:
            raise AttributeError("features")  # of a class: the field has no default
        features = vars(task)["features"] = build_features(vars(task)["features"])
        return features

    def __set__(self, task: Task[Any], features: Mapping[str, Any]) -> None:
        vars(task)["features"] = features


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC, Generic[Settings]):
    """One task of a benchmark; its type parameter is the model of the keys that its kind takes under `task`.

    Attributes:
        head: the head of the backbone; a key of `HEADS`.
        config_class: the model of the keys that this kind of task takes under `task`.
        plain_text: whether its data may be text files, and folders of them.
        words: the answers that a text-to-text model chooses among; empty for generated answers.
        suite: such as ``"glue"``; the registry's name is ``suite/name``.
        name: of the task, such as ``"sst2"``.
        benchmark_name: the benchmark's own name, of its folder and its submission file, such as ``"SST-2"``.
        summary: one line for listings.
        hub: hub id of the data set that holds the task as a configuration; empty for none.
        hub_config: that configuration, if it is not `name`.
        features: columns, types and label names, exactly the hub's; given as `Features`, or as `build_features` takes
            them.
        primary: name of the metric that tables show and that chooses the best epoch.
        greater_is_better: whether more of the primary metric is better.
        check: returns the fault of an example, or None; for faults that types and label names do not show.
        splits: ``train`` (one name), ``validation`` and ``test`` (tuples of names).
        files: test split -> name of its submission file; empty if the benchmark takes none.
        aliases: column -> its header in the benchmark's own files, if it differs.
        headerless: columns of the benchmark's own tsv files that have no header line.
        unpack: record of the benchmark's own jsonl files -> examples.
        grouped: whether rows belong together by their ``idx``, which then must differ from row to row.
        numbered: whether a data set without ``idx`` can be numbered row by row.
        label_range: least and greatest value of a column ``label`` that holds numbers.
        train_from: the task whose train and validation splits a test-only diagnostic uses.
        unique: the column whose values differ from row to row, if it is not ``idx``.
        answered: whether every example outside test splits has an answer in its column ``answers``.
        absent: column that the files of test splits may lack -> the value in its place.
        unpublished: splits that only the user's own files have.
        stems: split -> names, without ending, of the benchmark's own files.
        texts: names of the texts that a row is made of, for the example on a model card.
    """

    head: ClassVar[str]
    config_class: ClassVar[type[TaskConfig]] = TaskConfig
    plain_text: ClassVar[bool] = False
    words: ClassVar[tuple[str, ...]] = ()

    suite: str
    name: str
    benchmark_name: str
    summary: str
    hub: str
    hub_config: str | None = None
    features: FeaturesField = FeaturesField()
    primary: str
    greater_is_better: bool = True
    check: Callable[[Example], str | None] = nothing_wrong
    splits: Mapping[str, Any] = field(default_factory=lambda: PLAIN_SPLITS)
    files: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    unpack: Callable[[Example], list[Row]] | None = None
    grouped: bool = False
    numbered: bool = True
    label_range: tuple[float, float] | None = None
    train_from: str | None = None
    unique: str | None = None
    answered: bool = True
    absent: Mapping[str, Any] = field(default_factory=dict)
    unpublished: tuple[str, ...] = ()
    stems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: tuple[str, ...] = ("text",)

    @property
    def id(self) -> str:
        """The registry's name, ``suite/name``."""
        return f"{self.suite}/{self.name}"

    @property
    def regression(self) -> bool:
        """Return whether labels are real numbers."""
        return False

    @property
    def kind_names(self) -> tuple[str, ...]:
        """Names of the classes in the rows' column ``label``, by which routing is shown; empty for none."""
        return ()

    @property
    def configuration(self) -> str:
        """The configuration of the hub's data set that holds the task."""
        return self.hub_config or self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every data file must have; a missing ``idx`` is numbered where it can be."""
        left_out = {"label", *self.absent, *["idx"] * self.numbered}
        return tuple(c for c in self.features if c not in left_out)

    def all_splits(self) -> tuple[str, ...]:
        """Return train, validation and test splits in this order."""
        return (self.splits["train"], *self.splits["validation"], *self.splits["test"])

    def owner(self, split: str) -> Task:
        """Return the task whose columns `split` has: itself, or for a diagnostic's train data the `train_from` task."""
        if self.train_from is None or split in self.splits["test"]:
            return self
        donor: Task = TASKS.get(self.train_from)
        return donor

    def check_split(self, dataset: Dataset, split: str) -> None:
        """Raise `UserError` for a fault of the whole split that no single example shows."""
        return

    def check_backbone(self, config: PreTrainedConfig, settings: Settings) -> None:
        """Raise `UserError` for a backbone with fewer positions than the lengths in `settings`."""
        limit = positions(config)
        for key in settings.lengths:
            length = getattr(settings, key)
            if limit is not None and length > limit:
                raise UserError(
                    f"task.{key} is {length}; the backbone reads at most {limit} tokens: expected task.{key}={limit} "
                    "or less"
                )

    def within(self, config: PreTrainedConfig, settings: Settings) -> Settings:
        """Return `settings` with no length above the backbone's limit, which earlier versions did not check."""
        limit = positions(config)
        long = [key for key in settings.lengths if limit is not None and getattr(settings, key) > limit]
        return settings.model_copy(update=dict.fromkeys(long, limit)) if long else settings

    def backbone_options(self) -> dict[str, Any]:
        """Return further arguments of `backbones.loading.load` beside the head."""
        return {}

    @abstractmethod
    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the rows to score, in the examples' order, not tokenised; with ``domain`` if the examples have it."""

    @abstractmethod
    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> Dataset:
        """Return the inputs of the model, one or several for each of the `rows` of `split`, in their order.

        If they are not one for one, a column ``row`` holds the index of each input's row; `Prepared` removes it.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the function that collates encoded rows to a batch."""

    def outputs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
    ) -> tuple[Tensor | None, Any]:
        """Return the loss of one evaluation batch, or None, and its outputs to collect: a tensor or tuple of tensors.

        Their first dimension is the encoded row; a second one may differ from batch to batch and is padded with -100.
        The recorded routing is that of the last forward pass. If the loss is None, the metric ``loss`` is reported in
        its place. `inputs` hold ``use_cache: False`` for models that know it.
        """
        output = model(**inputs)
        return (output.loss if "labels" in inputs else None), output.logits

    @abstractmethod
    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Predictions:
        """Return decisions in the task's own terms.

        Args:
            outputs: the collected `outputs`, as arrays, in the order of the encoded rows.
            rows: the result of `rows`, in the same order.
            origin: index of each encoded row's row; None if they are one for one.
        """

    @abstractmethod
    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return the metrics, the primary one among them; arguments as of `predict`."""

    def correct(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> np.ndarray | None:
        """Return the mask of correct rows, [rows], bool; None for tasks that are not judged row by row.

        Arguments as of `predict`.
        """
        return None

    def labelled(self, rows: Dataset) -> bool:
        """Return whether `rows` have the labels that metrics need."""
        return labelled(rows)

    def check_labelled(self, rows: Dataset) -> None:
        """Raise `ValueError` for rows without the labels that metrics need."""
        if not self.labelled(rows):
            raise ValueError(
                f"{self.id}: the labels of these rows are withheld, so there is nothing to measure"
            )

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write `predictions` of a whole test split in the form that the benchmark's site takes (see `files`)."""
        raise self.no_predictions()

    def no_predictions(self) -> UserError:
        """Return the error for a task that writes no predictions."""
        return UserError(
            f"{self.id} has no predictions to write; `camex-ft evaluate RUN` measures {self.primary}"
        )


def map_rows(
    rows: Dataset, function: Callable[..., Any], features: Mapping[str, Any], desc: str, **options: Any
) -> Dataset:
    """Return `rows` mapped by a function to exactly the columns `features`; options are those of `Dataset.map`."""
    return rows.map(
        function,
        remove_columns=rows.column_names,
        features=build_features(features),
        load_from_cache_file=False,  # the cache's key does not see a change of the code
        desc=desc,
        **options,
    )


def write_submission(path: str | Path, text: str) -> None:
    """Write a submission file, whole or not at all, and the folder that it is in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_named(Path(path), text)


def labelled(rows: Dataset) -> bool:
    """Return whether every row has its label; most test splits of benchmarks have none."""
    return WITHHELD not in set(rows["label"][:])


@dataclass(frozen=True)
class Prepared:
    """Rows and encoded rows by split, both in the examples' order.

    `origin` holds the index of each encoded row's row, or None if they are one for one.
    """

    task: Task
    rows: Mapping[str, Dataset]
    encoded: Mapping[str, Dataset]
    origin: Mapping[str, np.ndarray | None]

    @classmethod
    def make(
        cls,
        task: Task,
        splits: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase,
        settings: TaskConfig,
    ) -> Prepared:
        """Format and tokenise the examples of all splits."""
        rows = {split: task.rows(examples, split) for split, examples in splits.items()}
        encoded, origin = {}, {}
        for split, of_split in rows.items():
            inputs = task.encode(of_split, split, tokenizer, settings)
            several = ROW in inputs.column_names
            origin[split] = np.asarray(inputs[ROW][:]) if several else None
            encoded[split] = inputs.remove_columns(ROW) if several else inputs
        return cls(task, rows, encoded, origin)

    @property
    def train(self) -> Dataset | None:
        """The encoded train split, or None when a file is predicted."""
        return self.encoded.get(self.task.splits["train"])

    @property
    def validation(self) -> dict[str, Dataset]:
        """The encoded validation splits."""
        return {
            split: self.encoded[split] for split in self.task.splits["validation"] if split in self.encoded
        }

    @property
    def test(self) -> tuple[str, ...]:
        """Names of the test splits in the data."""
        return tuple(split for split in self.task.splits["test"] if split in self.rows)

    @property
    def primary(self) -> tuple[str, str]:
        """The validation split that chooses the best epoch, and its primary metric."""
        split = self.task.splits["validation"][0]
        return split, self.task.owner(split).primary

    @property
    def greater_is_better(self) -> bool:
        """Return whether more of the primary metric is better."""
        return self.task.owner(self.primary[0]).greater_is_better

    def labelled(self, split: str) -> bool:
        """Return whether the split is in the data and has its labels."""
        return split in self.rows and self.task.labelled(self.rows[split])

    def score(self, split: str, outputs: Any) -> Scores:
        """Return the metrics of a split's collected outputs; none if its labels are withheld."""
        if not self.labelled(split):
            return {}
        return self.task.owner(split).metrics(outputs, self.rows[split], self.origin[split])

    def predict(self, split: str, outputs: Any) -> Predictions:
        """Return the task's decisions on a split's collected outputs."""
        return self.task.predict(outputs, self.rows[split], self.origin[split])

    def kinds(self, split: str) -> dict[str, np.ndarray]:
        """Return the true "domain" and the "label" of each encoded row, [encoded rows], as far as they are known."""
        rows, origin = self.rows[split], self.origin[split]
        kinds = {"domain": np.asarray(rows["domain"][:])} if "domain" in rows.column_names else {}
        names = self.task.owner(split).kind_names
        if names and self.labelled(split):
            kinds["label"] = np.asarray(names)[np.asarray(rows["label"][:])]
        return {name: each if origin is None else each[origin] for name, each in kinds.items()}

    def correct(self, split: str, outputs: Any) -> np.ndarray | None:
        """Return the mask of a split's correct rows, [rows], bool; None for tasks that are not judged row by row."""
        if not self.labelled(split):
            return None
        return self.task.owner(split).correct(outputs, self.rows[split], self.origin[split])
