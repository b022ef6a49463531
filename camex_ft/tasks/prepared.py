"""The data of a run, from examples to what the model reads and what its outputs are scored against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from camex_ft.tasks.base import Predictions, Task
from camex_ft.tasks.metrics import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from camex_ft.config import TaskConfig

ROW = "row"


@dataclass(frozen=True)
class Prepared:
    """Rows and encoded rows by split, both in the examples' order.

    `origin` says of each encoded row which row it belongs to, None where they are one for one.
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
        for split, each in rows.items():
            made = task.encode(each, split, tokenizer, settings)
            several = ROW in made.column_names
            origin[split] = np.asarray(made[ROW][:]) if several else None
            encoded[split] = made.remove_columns(ROW) if several else made
        return cls(task, rows, encoded, origin)

    @property
    def train(self) -> Dataset | None:
        """The encoded train split, or None where only a file is predicted."""
        return self.encoded.get(self.task.splits["train"])

    @property
    def validation(self) -> dict[str, Dataset]:
        """The encoded validation splits."""
        return {
            split: self.encoded[split] for split in self.task.splits["validation"] if split in self.encoded
        }

    @property
    def test(self) -> tuple[str, ...]:
        """Names of the test splits that there are."""
        return tuple(split for split in self.task.splits["test"] if split in self.rows)

    @property
    def primary(self) -> tuple[str, str]:
        """The validation split that decides, and its primary metric."""
        split = self.task.splits["validation"][0]
        return split, self.task.owner(split).primary

    @property
    def greater_is_better(self) -> bool:
        """Return whether more of the primary metric is better."""
        return self.task.owner(self.primary[0]).greater_is_better

    def labelled(self, split: str) -> bool:
        """Return whether the split is there and has something to measure it by."""
        return split in self.rows and self.task.labelled(self.rows[split])

    def score(self, split: str, outputs: Any) -> Scores:
        """Return the metrics of what was collected of a split; none where its labels are withheld."""
        if not self.labelled(split):
            return {}
        return self.task.owner(split).metrics(outputs, self.rows[split], self.origin[split])

    def predict(self, split: str, outputs: Any) -> Predictions:
        """Return the task's decisions on what was collected of a split."""
        return self.task.predict(outputs, self.rows[split], self.origin[split])

    def kinds(self, split: str) -> dict[str, np.ndarray]:
        """Return of what kind each encoded row is, [encoded rows]: its true "domain", its "label", as far as known."""
        rows, origin = self.rows[split], self.origin[split]
        found = {"domain": np.asarray(rows["domain"][:])} if "domain" in rows.column_names else {}
        names = self.task.owner(split).kind_names
        if names and self.labelled(split):
            found["label"] = np.asarray(names)[np.asarray(rows["label"][:])]
        return {name: each if origin is None else each[origin] for name, each in found.items()}

    def correct(self, split: str, outputs: Any) -> np.ndarray | None:
        """Return which rows of a split were got right, [rows], bool; None where that is not a matter of yes or no."""
        if not self.labelled(split):
            return None
        return self.task.owner(split).correct(outputs, self.rows[split], self.origin[split])
