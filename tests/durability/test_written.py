"""Files that commands write on a full disk: exit code 2, and what was there before stays."""

from __future__ import annotations

import ast
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from camex_ft.cli import app
from camex_ft.compare.outcome import ComparisonOutcome, write_all
from camex_ft.estimate.show import write_json
from camex_ft.results.entries import entries_of, keep_result
from camex_ft.results.plots import save
from camex_ft.results.render import table_of
from camex_ft.results.report import ReportSection, write_report
from camex_ft.utils import durable
from camex_ft.utils.errors import guard
from tests.helpers.synthetic_results import result

PACKAGE = Path(__file__).parents[2] / "camex_ft"
OLD = "what was there before\n" * 4
RESULT = replace(
    result(task="glue/sst2", protocol="dense", seed=0, scores=[0.5, 0.75], old=True),
    history=({"step": 1, "epoch": 0.5, "loss": 0.7},),
)

# Writes that do not go through `durable`, and why they need not.
APART = {
    ("estimate/measured.py", "CLEAR.write_text"): "a switch of the kernel's",
    ("compare/running.py", "state.log.open"): "what a process prints while it runs",
    ("compare/worker.py", "os.fdopen"): "a pipe",
    ("utils/durable.py", "os.fdopen"): "the draft itself",
    ("utils/durable.py", "path.open"): "a pipe or device that the user named",
    ("exporting/export.py", ".write_text"): "in the draft of a folder",
    ("static/merge.py", ".write_text"): "in the draft of a folder",
    ("static/tensor_files.py", ".write_text"): "in the draft of a folder",
    ("static/tensor_files.py", ".open"): "in the draft of a folder",
    ("launching/rank.py", ".write_text"): "for the process that started this one",
    ("run/pipeline.py", ".write_text"): "in the draft of a folder",
    ("estimate/columns.py", ".write_text"): "in a temporary folder",
    ("results/run_folder.py", "self.history.open"): "a line is added; one that is cut short is passed over",
    ("results/plots/figures.py", "figure.savefig"): "into memory",
    ("training/checkpoint_folder.py", ".write_text"): "in the draft of a folder",
    ("upcycling/adapters.py", ".write_text"): "in a folder that the caller makes whole",
}
WRITES = ("write_text", "write_bytes", "savefig", "copyfile", "copy", "copy2", "copytree", "fdopen", "open")


def writes(file: Path) -> Iterator[tuple[str, str]]:
    """Calls in a file that write to a path, as the file's name and what is called."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [
            a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)
        ]
        opened = name not in ("open", "fdopen") or any(
            isinstance(mode, str) and set(mode) & set("wax") and len(mode) < 4 for mode in modes
        )
        of = ast.unparse(node.func)
        if name in WRITES and opened and not (name == "copy" and not of.startswith("shutil")):
            yield file.relative_to(PACKAGE).as_posix(), of if of.isascii() and "(" not in of else f".{name}"


def test_every_file_is_written_aside() -> None:
    found = {place for file in sorted(PACKAGE.rglob("*.py")) for place in writes(file)}
    assert found == set(APART)


@contextmanager
def full(size: int = 8) -> Iterator[None]:
    """No file can grow beyond so many bytes: "File too large", as where the disk or a quota is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tables(folder: Path) -> Any:
    """Write a comparison's tables, pictures and report."""

    class Spec:
        baseline, about = "dense", ""

        def seed_list(self) -> list[int]:
            return [0]

        config = "glue"

    class Made:
        spec, title, profile, reason, output = Spec(), "A title", "embedded", "profile embedded: tiny", folder
        name = "x"

    made = Made()
    made.folder = folder  # type: ignore[attr-defined]
    entries = tuple(entries_of([RESULT]))
    outcome: Any = ComparisonOutcome(comparison=made, entries=entries, table=table_of([folder / "records"]))  # type: ignore[arg-type]
    return write_all([outcome], "camex-ft compare")


class Plan:
    def as_json(self) -> dict[str, str]:
        return {"a": OLD}


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "table --out": (
        "out",
        lambda f: app(["table", str(f / "records"), f"--out={f / 'out'}"], standalone_mode=False),
    ),
    "cp": ("glue.yaml", lambda f: app(["cp", "glue", str(f)], standalone_mode=False)),
    "plan --json": ("out", lambda f: write_json(Plan(), f / "out")),  # type: ignore[arg-type]
    "table --keep": ("a.json", lambda f: keep_result(RESULT, f, "a")),
    "the history of a kept record": ("a.history.jsonl", lambda f: keep_result(RESULT, f, "a")),
    "a picture": ("a.png", lambda f: save(Figure(), f / "a.png", source=1)),
    "a report": ("a.html", lambda f: write_report([ReportSection(title=OLD)], f / "a.html")),
    "compare": ("table.md", tables),
    "predict": ("out", lambda f: durable.write_named(f / "out", OLD)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_what_was_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, write = FILES[name]
    (tmp_path / "records").mkdir()
    keep_result(RESULT, tmp_path / "records", "a")
    write(tmp_path)  # all that is imported on the way is
    assert (tmp_path / file).stat().st_size > 8
    new = name == "cp"  # never writes over a file
    if new:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(OLD)
    before = sorted(path.name for path in tmp_path.iterdir())
    with full():
        code = guard(lambda: write(tmp_path))
    said = capsys.readouterr().err
    assert code == 2 and "File too large" in said and "Traceback" not in said, said
    assert new or (tmp_path / file).read_text() == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_printed_to_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """As in `camex-ft table ... > table.md`; the buffer is written when the command has ended."""
    import subprocess
    import sys

    code = (
        "import camex_ft_cli, sys; from camex_ft.utils.errors import guard; "
        "sys.exit(guard(lambda: print('x' * 100)))"
    )
    with open("/dev/full", "w") as disk:
        done = subprocess.run([sys.executable, "-c", code], stdout=disk, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no room left to write")
