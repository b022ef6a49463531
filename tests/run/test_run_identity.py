"""A run is found again by what was run: its settings, its data and the content of its backbone, never by a path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from camex_ft import cli, synthetic
from camex_ft.compare.cells import make_comparison
from camex_ft.compare.outcome import entries
from camex_ft.compare.spec import read_spec
from camex_ft.config import load_config
from camex_ft.config.identity import hash_by_name
from camex_ft.results import Record, load_record
from camex_ft.results.entries import read_results
from camex_ft.run import pipeline
from tests.helpers.working_folder import folder

__all__ = ["folder"]

S = (
    *("profile=embedded", "merging.protocol=smear", "merging.experts=2", "upcycle.layers=[1]"),
    *(
        "training.max_steps=2",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.use_cpu=true",
    ),
    *("training.save_strategy=steps", "training.save_steps=2", "output.model=false", "output.dir=r"),
)
SENTENCES = ("a fine film", "a dull film", "fine acting , dull story", "good", "bad and boring")


def save(seed: int, place: Path) -> Path:
    """Save a backbone drawn from a seed; all have the same sizes and names."""
    for part in synthetic.backbone("bert", num_labels=2, seed=seed):
        part.save_pretrained(place)
    return place


def write_data(place: Path, rows: int = 8, shift: int = 0) -> None:
    place.mkdir(parents=True, exist_ok=True)
    lines = [{"sentence": SENTENCES[(n + shift) % 5], "label": n % 2} for n in range(rows)]
    for split in ("train", "validation"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(backbone: Path | str, *more: str) -> tuple[Record, str]:
    """Run, and return the record of the run that was shown, and what was printed."""
    shown = CliRunner().invoke(
        cli.app, ["run", "glue", "data.dir=d", f"backbone={backbone}", *S, *more], catch_exceptions=False
    )
    assert shown.exit_code == 0, shown.output
    name = shown.output.rpartition("r/runs/")[2].split("/")[0].split()[0]
    return load_record(Path("r/runs") / name), shown.output


@pytest.fixture
def data(folder: Path) -> Path:
    write_data(folder / "d")
    return folder


def names() -> set[str]:
    return {path.name for path in Path("r/runs").iterdir()}


def test_namesakes_and_a_replaced_backbone_are_runs_of_their_own(data: Path) -> None:
    """By absolute and relative path: three contents, three results; and each is found again by whatever path."""
    first, _ = run(save(0, data / "x" / "hf"))
    second, printed = run(save(1, data / "y" / "hf"))
    assert "done already" not in printed
    for path in ("x/hf", "./y/../x/hf", data / "x" / "hf"):
        again, printed = run(path)
        assert "done already" in printed and again == first
    Path("link").symlink_to("y/hf")
    assert run("link")[0] == second
    shutil.copytree("y/hf", "elsewhere/copy")  # the same content at another place is the same experiment
    assert run("elsewhere/copy")[0] == second
    shutil.rmtree("x/hf")
    third, printed = run(save(2, data / "x" / "hf"))
    assert "done already" not in printed
    assert f"{first.run.name} has the same settings, but the backbone changed since (SHA-256" in printed
    records = (first, second, third)
    assert len({record.metrics.all["loss"] for record in records}) == 3
    assert len({record.model.backbone_sha256 for record in records}) == 3
    assert names() == {record.run.name for record in records}


def test_changed_data_are_said(data: Path) -> None:
    save(0, data / "hf")
    first, _ = run("hf")
    write_data(data / "d", shift=1)
    second, printed = run("hf")
    assert f"{first.run.name} has the same settings, but the data changed since (SHA-256" in printed
    assert first.model.backbone_sha256 == second.model.backbone_sha256
    assert first.data.sha256 != second.data.sha256 and len(names()) == 2


@pytest.fixture
def without_content(data: Path) -> Callable[[str], Record]:
    """Run, and make of the record one that does not have the backbone's content, under the name that it had then."""

    def make(backbone: str) -> Record:
        record, _ = run(backbone)
        place = Path("r/runs") / record.run.name
        settled = load_config(str(place / "config.yaml"), [])
        name = f"{record.run.name[:-8]}{hash_by_name(settled, data=record.data.sha256)}"
        tree = json.loads((place / "record.json").read_text())
        tree["run"]["name"] = name
        del tree["model"]["backbone_sha256"]
        (place / "record.json").write_text(json.dumps(tree))
        place.rename(place.with_name(name))
        return load_record(Path("r/runs") / name)

    return make


def test_an_earlier_run_of_a_package_is_found(
    data: Path, without_content: Callable[[str], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a local folder it is not: a path says nothing about what it held."""
    package = data / "site" / "weights_of_mine"
    save(0, package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(data / "site")
    before = without_content("package:weights_of_mine/model")
    again, printed = run("package:weights_of_mine/model")
    assert again == before and "done already" in printed
    save(0, data / "hf")
    before = without_content("hf")
    again, printed = run("hf")
    assert again.run.name != before.run.name
    assert f"{before.run.name} has the same settings, but its record does not say which content" in printed


ROWS = """\
config: glue
tasks: [sst2]
rows: [{backbone: x/hf}, {backbone: y/hf}]
baseline: backbone x/hf
seeds: [42]
"""


def comparison():
    Path("spec.yaml").write_text(ROWS)
    settings = [text for text in S if not text.startswith("output.model")]
    return make_comparison(read_spec("spec.yaml"), overrides=["data.dir=d", "output.model=false", *settings])


def test_namesakes_are_rows_of_their_own(data: Path) -> None:
    save(0, data / "x" / "hf")
    save(1, data / "y" / "hf")
    done = {path: run(path)[0] for path in ("x/hf", data / "y" / "hf")}
    cells = comparison().cells
    found = entries(cells, read_results("r"))
    assert [entry.result.record for entry in found] == list(done.values())
    shutil.rmtree("y/hf")
    save(2, data / "y" / "hf")  # replaced: its run is to be done again
    assert [entry.result is None for entry in entries(cells, read_results("r"))] == [False, True]


def test_measuring_a_run_on_other_data_is_said(data: Path) -> None:
    """By `evaluate` and `export`, which read the data again; with what was measured in their place."""
    save(0, data / "hf")
    record, _ = run("hf", "output.model=true")
    place = Path("r/runs") / record.run.name
    same = CliRunner().invoke(cli.app, ["evaluate", str(place)])
    assert same.exit_code == 0 and same.stderr == ""
    write_data(data / "d", rows=6)
    other = CliRunner().invoke(cli.app, ["evaluate", str(place)])
    assert "validation_accuracy: " in other.stdout and "SHA-256" not in other.stdout
    measured = "Measured on the present data: validation (6 rows, 8 then)"
    said = f"and {record.data.sha256[:12]} in the record. {measured}"
    assert said in other.stderr and "the data differ from those of the run: their SHA-256 is " in other.stderr
    exported = CliRunner().invoke(cli.app, ["export", str(place), "out"])
    assert exported.exit_code == 0 and said in exported.stdout
    assert said in Path("out/README.md").read_text()


@pytest.mark.slow
def test_a_run_from_the_checkpoint_of_another_is_a_run_of_its_own(data: Path) -> None:
    """Its result is not that of the settings alone; from its own checkpoint it is."""

    class Stop(Exception):
        pass

    def interrupt(backbone: str, rate: float) -> Path:
        more = ("training.max_steps=4", f"training.learning_rate={rate}", f"backbone={backbone}")
        before = names() if Path("r/runs").exists() else set()
        config = load_config("glue", ["data.dir=d", *S, *more])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "make_record", raise_(Stop))
            with pytest.raises(Stop):
                pipeline.run(config)
        (name,) = names() - before
        return Path("r/runs") / name / "checkpoints" / "checkpoint-4"

    save(0, data / "hf")
    checkpoint = interrupt("hf", 1e-2)
    more = ("training.max_steps=4", f"training.resume={checkpoint}")
    other, printed = run("hf", "training.learning_rate=0.001", *more)
    assert "is of a run on other data" not in printed
    plain, printed = run("hf", "training.learning_rate=0.001", "training.max_steps=4")
    assert "done already" not in printed and plain.run.name != other.run.name
    save(1, data / "hf")
    replaced, printed = run("hf", "training.learning_rate=0.001", *more)
    assert "is of a run on other data, or of another backbone" in printed
    shutil.rmtree("hf")
    save(0, data / "hf")
    own, printed = run("hf", "training.learning_rate=0.01", *more)
    assert own.run.name == checkpoint.parents[1].name and "going on from checkpoint-4" in printed
    assert len({record.run.name for record in (other, plain, replaced, own)}) == 4


def raise_(error: type[Exception]) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail
