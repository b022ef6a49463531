"""Records and histories with odd values: read and shown, or a message and exit code 2."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from camex_ft.cli import app
from camex_ft.results import print_summary
from camex_ft.results.card import card
from camex_ft.results.entries import entries_of, read_results
from camex_ft.results.plots import choose, of_run
from camex_ft.results.record import load_record
from camex_ft.utils.errors import UserError, guard
from camex_ft.utils.logs import read_lines
from tests.helpers.synthetic_results import result

RESULT = result(task="glue/sst2", protocol="ties-ca", seed=0, scores=[0.5, 0.75])
RECORD: dict[str, Any] = json.loads(RESULT.record.to_json())
LINES: list[dict[str, Any]] = [
    {"step": n, "epoch": n / 4, "loss": 1 / n, "grad_norm": 1.0, "routing_load": {"encoder.0": [0.5, 0.5]}}
    for n in range(1, 9)
]
ODD: list[Any] = [
    *(None, True, "x", "", [], {}, [1], {"a": 1}, -1, 0, 1.5, 10**30, 10**400, 2**63),
    *(float("nan"), float("inf"), "\ud800", "a\0b", "\x1b[31m", [[]], {"": None}, "x" * 10_000),
]
GONE = object()


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*above, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*above, 0))


def changed(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if odd is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = odd
    return made


def show(folder: Path) -> None:
    """Show a folder of records in all ways."""
    for form in ("text", "md", "tex", "csv", "html"):
        app(["table", str(folder), "--format", form], standalone_mode=False)
    results = read_results(folder)
    print_summary(load_record(folder / "a.json"), folder)
    card(results[0].record, head="sequence-classification")
    choose(entries_of(results), title="x")
    of_run(results[0], title="x")


def fault(folder: Path, record: Any, lines: list[Any]) -> str:
    """What showing a folder with this record says where it ends with a traceback, or the empty text."""
    folder.mkdir(exist_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            (folder / "a.json").write_text(json.dumps(record), encoding="utf-8", errors="surrogatepass")
            (folder / "a.history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        except (ValueError, UnicodeError):
            return ""
        code = guard(lambda: show(folder))
    return "" if code in (0, 2) else said.getvalue()


def try_some(folder: Path, count: int | None, seed: int) -> list[str]:
    tries: list[tuple[str, tuple[Any, ...], Any]] = []
    for place in places(RECORD):
        tries += [("record", place, odd) for odd in [*ODD, GONE]]
    for place in places(LINES[2]):
        tries += [("line", place, odd) for odd in [*ODD, GONE]]
    random.Random(seed).shuffle(tries)
    faults = []
    for what, place, odd in tries[:count]:
        record = changed(RECORD, place, odd) if what == "record" else RECORD
        line = changed(LINES[2], place, odd) if what == "line" else LINES[2]
        if said := fault(folder, record, [*LINES[:2], line, *LINES[3:]]):
            last = [text for text in said.strip().splitlines() if text][-4:-2]
            faults.append(f"{what} {place}: {'gone' if odd is GONE else repr(odd)[:40]}: {last}")
            print(faults[-1], flush=True)
    return faults


def test_some_odd_values(tmp_path: Path) -> None:
    assert fault(tmp_path / "whole", RECORD, LINES) == ""
    assert try_some(tmp_path / "odd", 3, 0) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_odd_values_everywhere(tmp_path: Path) -> None:
    assert try_some(tmp_path / "odd", 600, 1) == []


REASONS: dict[str, tuple[Any, str]] = {
    "a step in words": ({"step": "x"}, "its step is 'x': expected a whole number"),
    "no step": ({"loss": 1.0}, "it has no step"),
    "a step before all": ({"step": -1}, "its step is -1"),
    "a truth value": ({"step": True}, "its step is True"),
    "no object": ([1], "it is no object"),
    "a loss in words": ({"step": 1, "loss": "x"}, "its 'loss' is 'x': expected a number"),
    "a loss beyond floats": ({"step": 1, "loss": 10**400}, "expected a number"),
    "a loss that is none": ({"step": 1, "loss": float("nan")}, "expected a number"),
    "load as a number": ({"step": 1, "routing_load": 3}, "expected lists of numbers by layer"),
    "load of texts": ({"step": 1, "routing_load": {"a": ["x"]}}, "expected lists of numbers by layer"),
    "an epoch in words": ({"step": 1, "epoch": "x"}, "its 'epoch' is 'x'"),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_odd_line_is_passed_over_with_the_reason(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, said = REASONS[name]
    file = tmp_path / "history.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [LINES[0], line, LINES[1]]))
    assert read_lines(file) == LINES[:2]
    assert f"{file}: line 2 is passed over: " in caplog.text and said in caplog.text


def test_loads_of_another_number_of_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A layer has as many experts in every line: none, one more or none at all cannot be drawn."""
    file = tmp_path / "history.jsonl"
    odd = [changed(LINES[1], ("routing_load", "encoder.0"), shares) for shares in ([], [1], [0.5, 0.3, 0.2])]
    file.write_text("".join(json.dumps(line) + "\n" for line in [LINES[0], *odd, LINES[2]]))
    assert read_lines(file) == [LINES[0], LINES[2]]
    assert caplog.text.count("experts, and 2 in lines before") == 3


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("routing", "bert.encoder.layer.2.ffn", "by", "label"), {}),
        (("routing", "bert.encoder.layer.2.ffn", "by", "label", "no", 0), GONE),
        (("routing", "bert.encoder.layer.2.ffn", "load", 0), GONE),
        (("curvature", "bert.encoder.layer.2.ffn", "distance", 0), GONE),
        (("model", "parameters"), 10**40),
        (("model", "parameters"), -1),
    ],
)
def test_a_record_whose_parts_do_not_agree_is_none(
    place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(changed(RECORD, place, value)))
    with pytest.raises(UserError, match="not a record of this version"):
        load_record(tmp_path / "a.json")


def test_lines_that_are_cut_short_or_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end that a killed run leaves is no news."""
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'{"step": 1}\n\n{"step": 2, "lo')
    assert read_lines(file) == [{"step": 1}] and caplog.text == ""
    file.write_bytes(b'\xff\xfe\n{"a\n' + b"[" * 100_000 + b'\n{"step": 2}')
    assert read_lines(file) == [{"step": 2}] and caplog.text.count("is passed over") == 3
    assert read_lines(tmp_path / "nothing") == []


def test_a_record_that_is_a_folder_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"no record\.json here|expected a file"):
        read_results(tmp_path)
