"""Base class of tasks: where their data lie, what the model reads, what its outputs are scored against.

A task holds the benchmark's columns (`features`, exactly the hub's). Its kind, a subclass of `Task`, says how examples
become rows, rows become model inputs, and what is collected of the model becomes predictions and metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from datasets import Dataset, Features

from camex_ft.config.schema import TaskConfig
from camex_ft.tasks.metrics import Scores
from camex_ft.utils.architectures import positions
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Settings = TypeVar("Settings", bound=TaskConfig)
Example = Mapping[str, Any]
Row = dict[str, Any]
Predictions = Sequence[Any]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]

PLAIN_SPLITS: Mapping[str, Any] = {"train": "train", "validation": ("validation",), "test": ("test",)}
WITHHELD = -1


def nothing_wrong(example: Example) -> str | None:
    """Find no fault with an example: the check of tasks whose columns have nothing to do with each other."""
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC, Generic[Settings]):
    """One task of a benchmark; its type parameter is the model of the keys that its kind takes under `task`.

    Attributes:
            head: what the backbone gets; a key of `camex_ft.backbones.heads.HEADS`.
        config_class: the model of the keys that this kind of task takes under `task`.
            plain_text: whether its data may be text files, and folders of them.
        words: the answers that a text-to-text model chooses among; empty where it generates one.
        suite: such as ``"glue"``; the registry's name is ``suite/name``.
        name: of the task, such as ``"sst2"``.
        benchmark_name: the benchmark's own name, of its folder and its submission file, such as ``"SST-2"``.
        summary: one line for listings.
        hub: hub id of the data set that holds the task as a configuration; empty where there is none.
        hub_config: that configuration, where it is not `name`.
        features: columns, types and label names, exactly the hub's.
        primary: name of the metric that tables show and that chooses the best epoch.
        greater_is_better: whether more of the primary metric is better.
        check: what is wrong with an example, or None; for faults that types and label names do not show.
        splits: ``train`` (one name), ``validation`` and ``test`` (tuples of names).
        files: test split -> name of its submission file; empty where the benchmark takes none.
        aliases: column -> its header in the benchmark's own files, where it differs.
        headerless: columns of the benchmark's own tsv files that have no header line.
        unpack: record of the benchmark's own jsonl files -> examples.
        grouped: whether rows belong together by their ``idx``, which then must differ from row to row.
        numbered: whether a data set without ``idx`` can be numbered row by row.
        label_range: least and greatest value of a column ``label`` that holds numbers.
        train_from: the task whose train and validation splits a test-only diagnostic uses.
        unique: the column whose values differ from row to row, where it is not ``idx``.
        answered: whether every example outside test splits has an answer in its column ``answers``.
        absent: column that the files of test splits may lack -> what stands there then.
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
    features: Features
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
        """Names of the values of the rows' column ``label``, where routing is shown by them."""
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
        """Raise `UserError` for examples that make no split, where that does not show in any one of them."""
        return

    def check_backbone(self, config: PreTrainedConfig, settings: Settings) -> None:
        """Raise `UserError` for a backbone whose positions are fewer than the lengths that `settings` ask for."""
        limit = positions(config)
        for key in settings.lengths:
            length = getattr(settings, key)
            if limit is not None and length > limit:
                raise UserError(
                    f"task.{key} is {length}; the backbone reads at most {limit} tokens: expected task.{key}={limit} "
                    "or less"
                )

    def within(self, config: PreTrainedConfig, settings: Settings) -> Settings:
        """Return `settings` with lengths that the backbone reads: longer ones are those of earlier versions."""
        limit = positions(config)
        long = [key for key in settings.lengths if limit is not None and getattr(settings, key) > limit]
        return settings.model_copy(update=dict.fromkeys(long, limit)) if long else settings

    def backbone_options(self) -> dict[str, Any]:
        """Return what `backbones.load.load` is told beside the head."""
        return {}

    @abstractmethod
    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return what is scored, in the examples' order, without a tokenizer; ``domain`` stays where it is there."""

    @abstractmethod
    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> Dataset:
        """Return the inputs of the model, one or several for each of the `rows` of `split`, in their order.

        Where they are not one for one, a column ``row`` (int, an index into `rows`) says what each belongs to;
        `Prepared` takes it off before the model sees it.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the function that makes a batch of encoded rows."""

    def outputs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
    ) -> tuple[Tensor | None, Any]:
        """Return the loss of one evaluation batch, or None, and what is collected of it: a tensor or tuple of tensors.

        Their first dimension is the encoded row; a second one may differ from batch to batch and is padded with -100.
        The routing that is recorded is that of the last forward pass. Without a loss of its own the metric ``loss``, if
        there is one, is reported in its place. `inputs` hold ``use_cache: False`` where the model knows it.
        """
        made = model(**inputs)
        loss, logits = (made.loss if "labels" in inputs else None), made.logits
        return loss, logits

    @abstractmethod
    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Predictions:
        """Return decisions in the task's own terms.

        Args:
            outputs: what `outputs` collected, as arrays, in the order of the encoded rows.
            rows: what `rows` returned, in the same order.
            origin: of each encoded row, the row that it belongs to; None where they are one for one.
        """

    @abstractmethod
    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return the metrics, the primary one among them; arguments as of `predict`."""

    def correct(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> np.ndarray | None:
        """Return which rows were got right, [rows], bool; None where right and wrong is not said row by row.

        Arguments as of `predict`.
        """
        return None

    @abstractmethod
    def labelled(self, rows: Dataset) -> bool:
        """Return whether there is something to measure `rows` by."""

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write `predictions` of a whole test split in the form that the benchmark's site takes (see `files`)."""
        raise self.no_predictions()

    def no_predictions(self) -> UserError:
        """Return the error that says why this task writes no predictions, and what to do instead."""
        return UserError(
            f"{self.id} has no predictions to write; `camex-ft evaluate RUN` measures {self.primary}"
        )


def labelled(rows: Dataset) -> bool:
    """Return whether every row has its label; a benchmark's own test splits mostly have not."""
    return WITHHELD not in set(rows["label"][:])
