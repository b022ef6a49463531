"""The data of a run, from examples to what the model reads and what its logits are scored against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from camex_ft.tasks.base import Task, labelled
from camex_ft.tasks.encode import encode
from camex_ft.tasks.metrics import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Rows and encoded rows by split; the rows of a split and its encoded rows are in the same order."""

    task: Task
    rows: Mapping[str, Dataset]
    encoded: Mapping[str, Dataset]

    @classmethod
    def make(
        cls,
        task: Task,
        splits: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
    ) -> Prepared:
        """Format and tokenise the examples of all splits."""
        rows = {split: task.rows(examples, split) for split, examples in splits.items()}
        encoded = {split: encode(each, tokenizer, max_length=max_length) for split, each in rows.items()}
        return cls(task, rows, encoded)

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

    def labelled(self, split: str) -> bool:
        """Return whether the split is there and has labels."""
        return split in self.rows and labelled(self.rows[split])

    def score(self, split: str, logits: np.ndarray) -> Scores:
        """Return the metrics of a split's logits; none where its labels are withheld."""
        if not self.labelled(split):
            return {}
        return self.task.owner(split).metrics(logits, self.rows[split])

    def domains(self, split: str) -> np.ndarray | None:
        """Return the true domain of each row, where it is known; [rows]."""
        rows = self.rows[split]
        return np.asarray(rows["domain"][:]) if "domain" in rows.column_names else None
