"""The record of a run: the schema of ``record.json``, reading it, and the closing summary that shows it.

It holds everything that a table or a comparison needs, and nothing that differs between equal runs: no absolute path,
no host name. It is strict JSON: a number that is not finite becomes ``null``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import one_line, say
from camex_ft.utils.routing_health import routing_warnings


def finite(value: Any) -> Any:
    """Return a number as Python's own, and None in place of NaN and the infinities; anything else unchanged."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def all_finite(value: Any) -> Any:
    """Apply `finite` to every leaf of nested dicts, lists and tuples; NumPy arrays become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): all_finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_finite(v) for v in value]
    return finite(value)


def is_empty(value: Any) -> bool:
    """Return whether a field holds nothing, and is left out of the record."""
    return not value


Number = Annotated[float | None, BeforeValidator(finite)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Tree = Annotated[dict[str, Any], BeforeValidator(all_finite)]


class RecordSection(BaseModel):
    """A part of the record: immutable, and without keys that the schema does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(RecordSection):
    """Circumstances of the run.

    `profile` is the one in force, with the reason for it; `started` is UTC, ISO 8601; `exit` is the exit code. `status`
    is "done" for a finished run. `resumed` is the step from which an interrupted run was resumed: `seconds` and the
    speed are of the last part alone.
    """

    name: str
    profile: Literal["paper", "embedded"]
    profile_reason: str
    status: Literal["done", "failed"]
    started: str
    seconds: Number
    command: str
    exit: int
    resumed: Count | None = None


class Metrics(RecordSection):
    """Validation metrics: `primary` is the name of `best` and `last`; `all` holds all metrics of the saved model.

    `per_epoch` holds the evaluations during training. If the saved model is that of the last step and was not
    among them, the final evaluation counts as one more; without evaluations in training it gives `best` and `last`.
    `correct` holds one bit a row of the first validation split, see `pack`.
    """

    primary: str
    greater_is_better: bool = True
    best: Number
    best_epoch: Number
    last: Number
    per_epoch: list[dict[str, Number]]
    all: dict[str, Number]
    test: dict[str, Number] | None = None
    correct: str | None = None


class RouterFit(RecordSection):
    """Fitted router of one layer before training: the share of each donor's held-out texts that go to its experts."""

    accuracy: list[Number]
    nmi: Number


class RoutingStatistics(RecordSection):
    """Routing of the validation inputs by one layer: see `camex_ft.run.record_builder`. `nmi` needs known domains.

    `by` holds the mean routing weights [N] of each group of inputs: ``{"label": {"entailment": [...], ...}, ...}``.
    """

    entropy: Number
    load: list[Number]
    nmi: Number = None
    by: dict[str, dict[str, list[Number]]] = Field(default_factory=dict)
    fit: RouterFit | None = Field(default=None, exclude_if=is_empty)  # as before there were fitted routers

    @model_validator(mode="after")
    def _of_the_same_experts(self) -> RoutingStatistics:
        count = len(self.load)
        if any(not kinds or any(len(w) != count for w in kinds.values()) for kinds in self.by.values()):
            raise ValueError(f"expected routing weights of the {count} experts of its load")
        return self


class LayerCurvature(RecordSection):
    """Per expert, the relative distance of the curvature from the identity and, if cheap, its condition number."""

    distance: list[Number]
    condition: list[Number] | None = None


class Donor(RecordSection):
    """Donor of experts; `sha256` is of its content, None for an embedded backbone."""

    name: str
    sha256: str | None = None


class Model(RecordSection):
    """Size of the model: all parameters, trainable ones, those active for a token, FLOPs of a forward pass per token.

    `tokenizer` describes one that was trained on the text. `backbone_sha256` is of the backbone's content
    (`camex_ft.backbones.content`), with `donors` of that and theirs, None for an embedded one and in older records.
    """

    parameters: Count
    trainable: Count
    active: Count
    flops_per_token: Number = None
    tokenizer: str | None = None
    backbone_sha256: str | None = None
    donors: list[Donor] = Field(default_factory=list, exclude_if=is_empty)  # as before there were donors


class Cost(RecordSection):
    """Cost of training on a kind of device ("cpu", "NVIDIA H100 80GB HBM3 x 2") in a number of processes.

    Tokens are counted without padding; memory is of the largest process; `rows_a_step` is of the largest optimizer
    step, over all processes. `steps`, `epochs` and `rows` are of the whole training, interruptions included. A row (or
    a window or block of a task that has these) counts each time it is read.
    """

    samples_per_second: Number
    tokens_per_second: Number = None
    peak_memory_mb: Number
    device: str
    processes: Count = 1
    engine: str | None = None
    rows_a_step: Count | None = None
    steps: Count | None = None
    epochs: Number = None
    rows: Count | None = None


class Data(RecordSection):
    """Data of training and evaluation: `id` is a hub id, a folder's name or the embedded corpus's."""

    source: Literal["hub", "disk", "embedded"]
    id: str
    rows: dict[str, Count]
    sha256: str


class Software(RecordSection):
    """The software: versions of Python and the core packages, commit of the sources (None if unknown), kind of host."""

    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    host: str


class Record(RecordSection):
    """One run, in full. `routing` and `curvature` map a layer's name to its statistics; both are empty for `dense`."""

    run: Run
    config: Tree
    task: str
    protocol: str
    backbone: str
    seed: int
    metrics: Metrics
    routing: dict[str, RoutingStatistics] = Field(default_factory=dict)
    curvature: dict[str, LayerCurvature] = Field(default_factory=dict)
    model: Model
    cost: Cost
    data: Data
    environment: Software

    @model_validator(mode="after")
    def _of_as_many_experts_everywhere(self) -> Record:
        counts = {len(layer.load) for layer in self.routing.values()}
        counts |= {len(layer.distance) for layer in self.curvature.values()}
        if len(counts) > 1:
            raise ValueError(f"layers of {' and '.join(map(str, sorted(counts)))} experts in one run")
        return self

    def to_json(self) -> str:
        """Return strict JSON, indented, ending in a newline."""
        return dumps(self.model_dump(mode="json"), indent=2) + "\n"


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON: numbers that are not finite become null."""
    return json.dumps(all_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def load_record(path: Path | str) -> Record:
    """Return the record in the file, or in the run folder, at `path`; `UserError` if there is none or it is broken."""
    path = Path(path)
    file = path / "record.json" if path.is_dir() else path
    # os.path, as Path raises for a name that is too long; a pipe or device might never end
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{file}: expected a file")
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no record.json here. A run writes it at its end") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{file}: not a record of this version of camex_ft ({where}: {first['msg']})"
        ) from error


# -- correct rows, one bit each ---------------------------------------------------------------------------------------


def pack(correct: Sequence[bool] | np.ndarray) -> str:
    """Return ``<rows>:<hexadecimal digits>`` of one bit a row, 1 = right, the first row in the highest bit."""
    bits = np.asarray(correct, dtype=bool)
    return f"{len(bits)}:{np.packbits(bits).tobytes().hex()}"


def unpack(text: str) -> np.ndarray:
    """Return the rows that `pack` encoded; [rows], bool. `ValueError` for other text."""
    rows, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))
    if not 0 <= len(bits) - int(rows) < 8:
        raise ValueError(f"{len(bits)} bits for {rows} rows")
    return bits[: int(rows)].astype(bool)


# -- closing summary --------------------------------------------------------------------------------------------------


def summary_rows(record: Record, folder: Path | str) -> list[tuple[str, str]]:
    """Return (label, value) pairs: what was run, what came out, what it cost, where the record is."""
    metrics, cost, profile = record.metrics, record.cost, record.run.profile
    evaluated = f"epoch {_number(metrics.best_epoch, 'g')}"
    if metrics.best is not None and not metrics.per_epoch:
        evaluated = "the final evaluation: training had none"
    rows = [
        ("run", f"{record.task}, {record.backbone}, {record.protocol}, seed {record.seed}"),
        ("profile", f"{profile} ({record.run.profile_reason.removeprefix(f'profile {profile}: ')})"),
        (f"best {metrics.primary}", f"{_number(metrics.best)} ({evaluated})"),
        (f"last {metrics.primary}", _number(metrics.last)),
    ]
    rows += [(name, _number(value)) for name, value in metrics.all.items() if name != metrics.primary]
    scores = [layer.nmi for layer in record.routing.values() if layer.nmi is not None]
    if scores:
        rows.append(("routing NMI", f"{min(scores):.3f} to {max(scores):.3f} over {len(scores)} layers"))
    by_token = record.task.startswith("lm/")
    return [
        *rows,
        ("time", duration(record.run.seconds)),
        ("samples a second", _number(cost.samples_per_second, ".1f")),
        *([("tokens a second", _number(cost.tokens_per_second, ",.0f"))] if by_token else []),
        ("peak memory", f"{_number(cost.peak_memory_mb, ',.0f')} MB on {cost.device}"),
        ("record", os.path.relpath(Path(folder) / "record.json")),
    ]


def warnings_of(record: Record) -> list[str]:
    """Return warnings about the routing of a run's final model (`utils.routing_health`)."""
    entropies = {name: layer.entropy for name, layer in record.routing.items()}
    return routing_warnings(entropies, {name: layer.load for name, layer in record.routing.items()})


def print_summary(record: Record, folder: Path | str, *, console: Console | None = None) -> None:
    """Print the closing summary to `console` (standard output by default)."""
    console = console or Console()
    title = Text(one_line(f"{record.task}: {record.protocol}"))
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary_rows(record, folder):
        if not console.is_terminal:
            say(console, one_line(f"{label}: {value}"))
        table.add_row(Text(one_line(label)), Text(one_line(value)))
    if console.is_terminal:
        console.print(table)
    for warning in warnings_of(record):
        say(console, f"warning: {warning}")


def duration(seconds: float | None) -> str:
    """Return seconds as "42.0 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float | None, spec: str = ".4f") -> str:
    return "not a number" if value is None else format(value, spec)
