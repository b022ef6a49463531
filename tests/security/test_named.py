"""Names of comparisons, rows and files that a command writes: nothing lands elsewhere, and what cannot be is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from camex_ft.cli import app
from camex_ft.compare.cells import Comparison, make_comparison
from camex_ft.compare.slurm import PARAMETERS, check_folder, read
from camex_ft.compare.spec import Spec, read_spec
from camex_ft.config import load_config
from camex_ft.results.entries import Entry, keep_entries
from camex_ft.utils.errors import UserError
from tests.helpers.hostile import EVIL, names
from tests.helpers.machines import machine
from tests.helpers.synthetic_results import result

RESULT = result(task="glue/sst2", protocol="dense", seed=0, scores=[0.5, 0.75], old=True)
DENSE = Spec(config="glue", rows=[{"merging.protocol": "dense"}], seeds=1)
MADE = make_comparison(
    DENSE, overrides=["profile=embedded", "task.name=sst2", "output.dir=out"], environment=machine()
)
REFUSED = r"cannot be written|exists already"
# of a command line: no argument of a process has NUL in it, or what is not to be encoded
BAD_FILES = ["nowhere/x", ".", "there", "there/a.json/x", "x" * 400, "", "/proc/nothing/x", "/dev/full"]


def files(folder: Path) -> set[str]:
    """Every file below a folder, links not followed."""
    return {os.path.relpath(os.path.join(at, n), folder) for at, _, inner in os.walk(folder) for n in inner}


def refusal(do: Callable[[], object]) -> str:
    """What a `UserError` says, or the empty text where there is none."""
    try:
        do()
    except UserError as error:
        return str(error)
    return ""


@given(names)
def test_a_comparison_has_one_folder_below_comparisons(name: str) -> None:
    """Its name is that of its file, and of a task that the command line names."""
    made = make(name)
    assert made.folder.parent == Path("out/comparisons") and made.folder.name not in ("", ".", "..")
    assert len(made.folder.name.encode()) <= 240


def make(name: str) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:  # cells take long to make, and have nothing to do with it
        patch.setattr("camex_ft.compare.cells._seeds", lambda *_: MADE.cells)
        patch.setattr("camex_ft.compare.cells.load_config", lambda *_: None)
        patch.setattr("camex_ft.compare.cells.resolve", lambda *_, **__: (MADE.cells[0].settled, ""))
        return make_comparison(DENSE, name=name)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=6))
@example([("glue/a b", "x"), ("glue/a-b", "x"), ("glue/A b", "X")])
@example([("../..", "../../x"), ("/", "/etc/passwd"), ("..", "\0")])
@example([("t", "a" * 400 + end) for end in "xyz"])
def test_kept_records_lie_in_their_folder_and_none_takes_the_place_of_another(
    cells: list[tuple[str, str]],
) -> None:
    entries = [Entry(task=task, row=row, seed=0, result=RESULT) for task, row in cells]
    with TemporaryDirectory() as name:
        kept = Path(name) / "a" / "kept"
        assert keep_entries(entries, kept) == len(entries)
        made = files(Path(name))
    assert {os.path.dirname(path) for path in made} == {os.path.join("a", "kept")}
    assert len({path.lower() for path in made if path.endswith("seed0.json")}) == len(entries)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one of records."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "a.json").write_text(RESULT.record.to_json())
    return tmp_path


@pytest.mark.parametrize("name", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_cannot_be_written(name: str, there: Path) -> None:
    before = files(there)
    with pytest.raises(UserError, match=REFUSED):
        app(["table", "there", f"--out={name}"], standalone_mode=False)
    if name not in (".", "there", ""):  # folders, which a copy goes into
        with pytest.raises(UserError, match=REFUSED):
            app(["cp", "--", "glue", name], standalone_mode=False)
    assert files(there) == before


@pytest.mark.parametrize("name", [name for name in EVIL if "\0" not in name and "\ud800" not in name])
def test_a_table_is_written_to_the_file_that_is_named_alone(name: str, there: Path) -> None:
    (there / "in" / "deep").mkdir(parents=True)
    os.chdir(there / "in" / "deep")
    before = files(there)
    if os.path.isabs(name):
        return
    refused = refusal(lambda: app(["table", "../../there", f"--out={name}"], standalone_mode=False))
    assert "cannot be written" in (refused or "cannot be written")
    expected = set() if refused else {os.path.normpath(os.path.join("in", "deep", name))}
    assert files(there) - before == expected


@given(names)
def test_an_output_folder_is_a_path_or_refused(name: str) -> None:
    """In a file of YAML, where a text may hold any character; below it, a run makes one folder."""
    import yaml

    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        document: dict[str, Any] = {"extends": "glue", "profile": "embedded", "output": {"dir": name}}
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        made: list[str] = []
        refused = refusal(lambda: made.append(load_config(str(path), []).output.dir))
        if refused:
            assert "output.dir" in refused or "not valid YAML" in refused
        else:
            assert made == [name] and not any(ord(char) < 32 for char in name)
            assert name.encode("utf-8")


@given(names, st.sampled_from(sorted(PARAMETERS)))
@example("a\nrm -rf x", "setup")
@example("a\rb", "partition")
@example("a\x85b", "setup")
def test_what_reaches_the_script_of_a_job_is_one_line(text: str, key: str) -> None:
    try:
        made = read("slurm", [f"{key}={text}"])[key]
        check_folder(Path("/jobs") / text)
    except UserError:
        return
    assert len(made.splitlines()) == 1 and "\x1b" not in made


def test_a_folder_of_jobs_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot be written into a job's script"):
        check_folder(Path("/a\nrm -rf ~\n/jobs"))
    check_folder(Path("/data/someone's é/jobs"))


@pytest.mark.parametrize("name", ["../x.yaml", "...yaml", "..yaml", "a b.yaml", "-x.yaml", "x\ny.yaml"])
def test_a_specification_with_an_odd_name(name: str, there: Path) -> None:
    (there / "in").mkdir()
    os.chdir(there / "in")
    Path(name).write_text("config: glue\nrows: [{merging.protocol: dense}]\nseeds: 1\n")
    spec = read_spec(name)
    assert make(Path(name).stem).folder.parent == Path("out/comparisons")
    assert spec.seed_list() == [0]
