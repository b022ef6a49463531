"""Writes `docs/configuration.md` from the schema: ``python -m camex_ft.config.document > docs/configuration.md``."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic.fields import FieldInfo

from camex_ft.config.problems import Key, show
from camex_ft.config.profiles import PROFILES, under
from camex_ft.config.reading import Document
from camex_ft.config.schema import Config, Section, TaskConfig, task_kinds
from camex_ft.config.shipped import ROOT
from camex_ft.config.training_arguments import OWNED
from camex_ft.config.validation import section_keys
from camex_ft.config.values import MOST
from camex_ft.utils.escaping import markdown_cell
from camex_ft.utils.registry import TASKS

HEAD = """\
# Configuration

Generated from the schema by `python -m camex_ft.config.document > docs/configuration.md`. Do not edit it by hand.

```yaml
# my.yaml -- run: camex-ft run my.yaml task.name=rte
extends: glue                    # a path or a list of paths, relative to this file, or names from `camex-ft ls configs`
task: {name: sst2}
merging: {protocol: ties, options: {density: 0.5}}
training: {learning_rate: 2e-4, warmup_steps: 0.1}
```

What wins, from weak to strong: the defaults below, the profile (`configs/profiles/`), `extends` in order, the file,
and `key=value` on the command line, in order. Mappings are merged key by key; lists and single values are replaced. A
value on the command line is YAML too: `upcycle.layers=[0,2]`, `merging.top_k=null`,
`merging={protocol: smear, experts: 4}`. Which profile `auto` stands for is settled when a run starts; the first line of
its output says which, and why.

`camex-ft validate my.yaml` reports everything that is wrong at once, each with its line. Files are read by the rules
of YAML 1.2: `2e-4` is a number, `no` is text unless the key is a switch, where `yes`, `no`, `on` and `off` work. Tags,
merge keys (`<<`) and keys that occur twice are refused.

Paths are relative to the working folder, those in `extends` to their file.
"""
TRAINING = """\
Any other field of `transformers.TrainingArguments` may stand here too, and is checked against its type there. These
may not, because the toolkit sets them itself:

| key | why |
|---|---|
"""
OPTIONS = """
Some fields mean a little more, or less, than in transformers:

- `bf16_full_eval`, `fp16_full_eval`: evaluations and predictions run under autocast, those in training as well. The
  model is not cast: what is trained and saved is what it is without the option.
- `dataloader_drop_last`: of training alone; an evaluation has all of its rows.
- `label_smoothing_factor`: of the training loss; the `loss` and `perplexity` of an evaluation are the plain ones. It
  is refused where labels are numbers (stsb).
- `eval_strategy: no`: the final evaluation is the best and the last one, and the closing summary says so.

## Trackers

To follow a run in TensorBoard, Weights & Biases, MLflow or Trackio, install the extra of that name and name it:

    pip install -e ".[tensorboard]"
    camex-ft run glue training.report_to=tensorboard
    tensorboard --logdir results/runs

What they write is in the run's folder `logs`, and stays when the run is done; `--force` removes it with the rest. A
variable that says otherwise (`TENSORBOARD_LOGGING_DIR`, `WANDB_DIR`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`) wins.
`camex-ft evaluate` and `predict` tell no tracker.
"""


PROFILED = """\
## Profiles

The defaults in the tables further down hold where a profile says nothing. These say, and suites that are not named have
the first table:
"""


TABLE_HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]


def document() -> str:
    """Return the reference of all keys in Markdown."""
    parts = [HEAD, PROFILED, _profiles(), _table("Top level", Config, ())]
    for key, section in section_keys():
        if section is not None:
            parts.append(_table("`" + ".".join(key) + "`", section, key))
        if section is TaskConfig:
            parts += map(_kind_table, task_kinds())
    return "\n".join(parts)


def _profiles() -> str:
    """Return a table of the profiles, and one for each suite that has profiles of its own."""
    suites = sorted({file.stem.partition("-")[2] for file in (ROOT / "profiles").glob("*-*.yaml")})
    return "\n".join(map(_profile_table, ("", *suites)))


def _profile_table(suite: str) -> str:
    written = Document({"task": {"suite": suite}} if suite else {})
    said = [under(name, written).values for name in PROFILES]
    left_out = [("profile",), ("task", "suite"), ("task", "name")]
    keys = [key for key, section in section_keys() if section is None and key not in left_out]
    head = [f"Suite `{suite}`:\n"] if suite else []
    lines = [*head, f"| key | {' | '.join(f'`{name}`' for name in PROFILES)} |", "|---|---|---|"]
    for key in keys:
        values = [_at(values, key) for values in said]
        if any(values):
            shown = " | ".join(f"`{value}`" if value else "" for value in values)
            lines.append(f"| `{'.'.join(key)}` | {shown} |")
    return "\n".join(lines) + "\n"


def _at(values: Any, key: Key) -> str:
    for part in key:
        values = values.get(part, {})
    return "" if values == {} else str(values)


def _kind_table(kind: type[TaskConfig]) -> str:
    """Return the table of the keys that one kind of task declares."""
    own = {name: field for name, field in kind.model_fields.items() if name not in TaskConfig.model_fields}
    tasks = (name for name in TASKS.names() if TASKS.get(name).config_class is kind)
    suites = dict.fromkeys(f"`{name.partition('/')[0]}`" for name in tasks)
    intro = (kind.__doc__ or "").strip().splitlines()[0]
    head = [f"### Tasks of {kind.kind}", "", f"{intro} Suites: {', '.join(suites)}.", "", *TABLE_HEAD]
    return "\n".join([*head, *(_row(("task", name), field) for name, field in own.items())]) + "\n"


def _table(title: str, section: type[Section], above: tuple[str, ...]) -> str:
    lines = [f"## {title}", ""]
    if above:
        lines += [(section.__doc__ or "").strip().splitlines()[0], ""]
    lines += TABLE_HEAD
    for name, field in section.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            lines.append(_row((*above, field.alias or name), field))
    text = "\n".join(lines) + "\n"
    if above == ("training",):
        rows = (f"| `training.{key}` | {reason} |" for key, reason in OWNED.items())
        text += "\n" + TRAINING + "\n".join(rows) + "\n" + OPTIONS
    return text


def _row(key: Key, field: FieldInfo) -> str:
    words = type_words(field.annotation, field.metadata)
    meaning = markdown_cell(field.description or "")
    return f"| `{'.'.join(key)}` | {words} | `{_default(field)}` | {meaning} |"


def type_words(hint: Any, metadata: Iterable[Any] = ()) -> str:
    """Return an annotation in words, with its bounds: "number, more than 0, at most 1".

    Args:
        hint: the annotation; bounds on it or on a member of its union are found.
        metadata: bounds that were taken off it, as pydantic does.
    """
    bounds = [text for part in (*metadata, *_metadata(hint)) for text in _bounds(part)]
    return ", ".join([" or ".join(_kinds(hint)), *dict.fromkeys(bounds)])


def _kinds(hint: Any) -> Iterator[str]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _kinds(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _kinds(member)
    elif origin is typing.Literal:
        yield ", ".join(f"`{word}`" for word in typing.get_args(hint))
    elif origin is tuple:
        yield "list of texts"
    elif hint is Any:
        yield "`all`, `every_other` or a list of whole numbers"
    else:
        names = {bool: "switch", int: "whole number", float: "number", str: "text", type(None): "null"}
        yield names.get(hint, "mapping")


def _metadata(hint: Any) -> Iterator[Any]:
    """Yield the bounds on an annotation, or on a member of its union."""
    for member in (hint, *typing.get_args(hint)):
        if typing.get_origin(member) is typing.Annotated:
            for part in typing.get_args(member)[1:]:
                yield from part.metadata if isinstance(part, FieldInfo) else (part,)


def _bounds(part: Any) -> Iterator[str]:
    for name, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        bound = getattr(part, name, None)
        if bound is not None and bound != MOST:  # of every count: no news
            yield f"{words} {bound:g}" if abs(bound) < 1e6 else f"{words} {bound}"


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    return (
        value if isinstance(value, str) else "null" if value is None else "{}" if value == {} else show(value)
    )


if __name__ == "__main__":
    print(document(), end="")
