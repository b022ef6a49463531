"""Links where a command writes or removes: what the user named is followed; in a run's folder they are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from camex_ft.exporting.export import check_target
from camex_ft.results.run_folder import RunFolder
from camex_ft.utils import durable
from camex_ft.utils.errors import UserError, guard
from tests.helpers.hostile import within

Change = Callable[[Path], object]


def tree(folder: Path) -> dict[str, str]:
    """Every name below a folder with what it is: where a link leads, or a file's text."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a file that nobody is to touch."""
    made = tmp_path / "elsewhere"
    made.mkdir()
    (made / "precious").write_text("x")
    return made


NAMES = (
    "checkpoints",
    "model",
    "predictions",
    "record.json",
    "history.jsonl",
    "config.yaml",
    ".lock",
    "other",
)
TARGETS = ("folder", "file", "nothing", "loop", "run")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_folder_of_a_run_is_refused(
    name: str, target: str, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "results", "run")
    path = run.path / name
    leads = {
        "folder": elsewhere,
        "file": elsewhere / "precious",
        "nothing": tmp_path / "nothing",
        "loop": path,
    }
    path.symlink_to(leads.get(target, run.path))
    before = tree(tmp_path)

    def work() -> None:
        with run.alone():
            raise AssertionError

    assert guard(work) == 2
    assert f"{path} is a link" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_link_in_place_of_a_run_is_refused_and_one_to_the_output_folder_followed(
    elsewhere: Path, tmp_path: Path
) -> None:
    (tmp_path / "results").symlink_to(elsewhere)
    run = RunFolder.create(tmp_path / "results", "run")
    with run.alone():
        run.append_history({"step": 1})
    assert (elsewhere / "runs" / "run" / "history.jsonl").is_file()
    (tmp_path / "results" / "runs" / "other").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"), RunFolder.create(tmp_path / "results", "other").alone():
        pass
    assert (elsewhere / "precious").read_text() == "x"


@pytest.mark.parametrize(
    "change",
    [
        lambda run: (run / "record.json").mkdir(),
        lambda run: (run / "config.yaml").mkdir(),
        lambda run: (run / ".lock").mkdir(),
        lambda run: (run / ".owner.json").mkdir(),
        lambda run: (run / "checkpoints").write_text(""),
        lambda run: os.mkfifo(run / "checkpoints"),
    ],
)
def test_a_name_of_another_kind_is_refused(change: Change, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    change(run.path)
    with pytest.raises(UserError, match=r"is not a (file|folder)\. Remove it"), run.alone():
        pass


@pytest.mark.parametrize("name", [".owner.json", "history.jsonl", "config.yaml", "record.json", ".lock"])
def test_a_pipe_in_the_folder_of_a_run_is_not_waited_for(name: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    os.mkfifo(run.path / name)
    with within(5), run.alone():
        assert run.read_history() == []
        run.rewind_history(0)
        run.write_config("a: 1\n")
    assert run.config.read_text() == "a: 1\n"


@pytest.mark.parametrize("owner", [{"pid": 10**30}, {"pid": "x"}, {"pid": True, "host": 3}, [], "[" * 10**5])
def test_any_owner(owner: object, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    text = owner if isinstance(owner, str) else json.dumps(owner)
    (run.path / ".owner.json").write_text(text)
    with run.alone():
        pass


def test_an_export_goes_where_a_link_leads(elsewhere: Path, tmp_path: Path) -> None:
    """The link stays, and nothing is left beside it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    target = check_target(tmp_path / "out")
    with durable.whole_folder(target) as folder:
        (folder / "config.json").write_text("{}")
    found = {"disk": "folder", "disk/config.json": "{}", "out": "disk"}
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("elsewhere")} == found


@pytest.mark.parametrize("target", ["folder", "file", "nothing", "loop"])
def test_an_export_is_not_written_to_a_link_to_what_is_full_or_gone(
    target: str, elsewhere: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    leads = {
        "folder": elsewhere,
        "file": elsewhere / "precious",
        "nothing": tmp_path / "nothing",
        "loop": path,
    }
    path.symlink_to(leads[target])
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"is there already|cannot be written"):
        check_target(path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["folder", "nothing", "file", "loop"])
def test_what_takes_the_place_of_a_link_leaves_its_target(name: str, elsewhere: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    leads = {
        "folder": elsewhere,
        "file": elsewhere / "precious",
        "nothing": tmp_path / "nothing",
        "loop": path,
    }
    path.symlink_to(leads[name])
    (tmp_path / ".model.unfinished").symlink_to(elsewhere)
    (tmp_path / ".model.removed.unfinished").symlink_to(elsewhere)
    with durable.whole_folder(path) as folder:
        (folder / "a").write_text("")
    assert tree(tmp_path) == {
        "elsewhere": "folder",
        "elsewhere/precious": "x",
        "model": "folder",
        "model/a": "",
    }


def test_a_file_that_is_named_by_a_link_is_written_where_it_leads(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "table.md").symlink_to(elsewhere / "precious")
    (tmp_path / "new.md").symlink_to(elsewhere / "new")
    durable.write_named(tmp_path / "table.md", "a")
    durable.write_named(tmp_path / "new.md", "b")
    assert tree(elsewhere) == {"precious": "a", "new": "b"}
    assert (tmp_path / "table.md").is_symlink() and (tmp_path / "new.md").is_symlink()
    durable.write_named(Path(os.devnull), "c")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("command", ["predict", "inspect"])
def test_nothing_is_written_through_a_link_in_a_run(command: str, elsewhere: Path, tmp_path: Path) -> None:
    """Unless it is named."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    names = {"predict": ("predictions", "rows.tsv"), "inspect": ("inspection",)}[command]
    (run.path / names[0]).symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link: files would be written to its target"):
        run.own(*names)
    (run.path / names[0]).unlink()
    assert run.own(*names) == run.path.joinpath(*names)
