"""The command line: exit codes, messages, and that each command hands over what it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import camex_ft.run
from camex_ft import cli
from camex_ft.launching import processes
from camex_ft.results import load_record
from camex_ft.utils import errors, registry
from camex_ft.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def process(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own: the exit code and both streams as a shell sees them."""
    command = [sys.executable, "-c", "import camex_ft_cli; camex_ft_cli.main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that notes its calls, and stands for `inference` too; what they do themselves is tested with them."""
    calls: list[tuple] = []
    fake = SimpleNamespace(
        calls=calls,
        run=lambda config, **options: calls.append(("run", config, options)),
        evaluate=lambda run: calls.append(("evaluate", run)) or {"accuracy": 0.51234567, "rows": 12},
        predict=lambda run, file, out: calls.append(("predict", run, file, out)) or "predictions.jsonl",
        generate=lambda run, prompt, **how: calls.append(("generate", run, prompt, how)) or "and so on",
    )
    for module in ("pipeline", "inference"):
        monkeypatch.setattr(camex_ft.run, module, fake, raising=False)
        monkeypatch.setitem(sys.modules, f"camex_ft.run.{module}", fake)
    return fake


def test_no_arguments_show_help():
    shown = invoke()
    for command in ("run", "validate", "plan", "ls", "cp", "doctor", "evaluate", "predict", "generate"):
        assert f" {command} " in shown.output


def test_version():
    shown = invoke("--version")
    assert shown.exit_code == 0
    assert shown.output == "camex_ft 0.1.0\n"


def test_run_hands_over_the_configuration_with_its_overrides(pipeline):
    assert invoke("run", "glue", "task.name=rte", "merging.protocol=smear").exit_code == 0
    assert invoke("run", "--force", "glue").exit_code == 0
    (_, first, plain), (_, second, forced) = pipeline.calls
    assert (first.task.name, first.merging.protocol, plain) == ("rte", "smear", {"force": False})
    assert (second.task.name, forced) == ("sst2", {"force": True})


def test_interruption_says_how_to_go_on(pipeline):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    pipeline.run = interrupt
    left = invoke("run", "glue")
    assert left.exit_code == errors.INTERRUPTED
    assert "goes on from the last checkpoint" in left.output


def test_several_processes_are_launched_with_the_same_arguments(pipeline, monkeypatch):
    """Without the options that asked for them; its exit code is the command's, and so are signals."""
    calls = []

    def launch(placed, arguments, written):
        calls.append((placed.processes, placed.device, placed.engine, arguments, written.task.name))
        return 1

    monkeypatch.setattr(processes, "launch", launch)
    left = invoke("run", "glue", "task.name=rte", "--cpus", "2", "--engine", "fsdp", "--force")
    assert left.exit_code == 1
    assert calls == [(2, "cpu", "fsdp", ["run", "glue", "task.name=rte", "--force"], "rte")]
    assert pipeline.calls == []

    def stopped(*_):
        raise processes.Stopped(15)

    monkeypatch.setattr(processes, "launch", stopped)
    ended = invoke("run", "glue", "--cpus", "2")
    assert (ended.exit_code, ended.output) == (
        143,
        "\nEnded by SIGTERM. The same command goes on from the last checkpoint.\n",
    )


def test_evaluate_prints_the_metrics(pipeline):
    assert invoke("evaluate", "results/runs/x").output == "accuracy: 0.5123\nrows: 12\n"
    assert pipeline.calls == [("evaluate", Path("results/runs/x"))]


def test_predict_hands_over_its_files(pipeline):
    assert invoke("predict", "r", "f.csv").output == "wrote predictions.jsonl\n"
    assert invoke("predict", "r", "f.csv", "--out", "o.jsonl").exit_code == 0
    assert pipeline.calls == [
        ("predict", Path("r"), Path("f.csv"), None),
        ("predict", Path("r"), Path("f.csv"), Path("o.jsonl")),
    ]


def test_generate_hands_over_how(pipeline):
    assert invoke("generate", "r", "it was").output == "and so on\n"
    many = ("--tokens", "5", "--beams", "3", "--sample", "--seed", "7")
    assert invoke("generate", "r", "it was", *many).exit_code == 0
    assert pipeline.calls == [
        ("generate", Path("r"), "it was", {"tokens": 50, "beams": 1, "sample": False, "seed": 0}),
        ("generate", Path("r"), "it was", {"tokens": 5, "beams": 3, "sample": True, "seed": 7}),
    ]
    assert invoke("generate", "r", "it was", "--tokens", "0").exit_code == 2


def test_validate_prints_yaml_that_begins_with_the_profile_and_its_reason():
    shown = invoke("validate", "glue", "profile=embedded", "merging.protocol=ties")
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[0] == "# profile embedded: asked for"
    assert yaml.safe_load(shown.output)["merging"]["protocol"] == "ties"


def test_validate_remarks_on_keys_without_effect():
    shown = invoke("validate", "glue", "profile=embedded", "merging.protocol=smear", "merging.alpha=0.5")
    assert "# merging.alpha has no effect" in shown.output


def test_what_validate_prints_is_a_configuration(tmp_path):
    first = invoke("validate", "glue", "profile=embedded")
    (tmp_path / "again.yaml").write_text(first.output)
    assert invoke("validate", str(tmp_path / "again.yaml")).output == first.output


def test_run_again_evaluate_and_predict_end_to_end(tmp_path, monkeypatch):
    """Two steps of a real run: the record is there, is not made twice, and the model answers later commands."""
    monkeypatch.chdir(tmp_path)
    small = [
        "profile=embedded",
        "merging.protocol=smear",
        "training.max_steps=2",
        "data.train_rows=16",
        "data.eval_rows=8",
    ]
    first = invoke("run", "glue", "backbone=embedded/bert", *small)
    assert first.exit_code == 0, first.output
    assert first.output.splitlines()[0] == "profile embedded: asked for"
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    record = load_record(folder)
    assert str(tmp_path) not in (folder / "record.json").read_text()
    assert f"best accuracy: {record.metrics.best:.4f}" in first.output

    written = (folder / "record.json").stat().st_mtime_ns
    assert "done already" in invoke("run", "glue", "backbone=embedded/bert", *small).output
    assert (folder / "record.json").stat().st_mtime_ns == written

    assert f"accuracy: {record.metrics.best:.4f}" in invoke("evaluate", str(folder)).output

    (tmp_path / "new.tsv").write_text("sentence\tlabel\na film\t1\n")
    told = invoke("predict", str(folder), "new.tsv", "--out", "answers.tsv")
    assert "wrote answers.tsv" in told.output
    assert len((tmp_path / "answers.tsv").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["protocols", "backbones", "embedded", "tasks"])
def test_ls_lists_every_entry_of_the_registry(kind):
    shown = invoke("ls", kind)
    first = [line.split()[0] for line in shown.output.splitlines()[1:] if line]
    entries = getattr(registry, kind.upper()).names()
    assert first == [f"embedded/{name}" if kind == "embedded" else name for name in entries]


def test_ls_configs_names_files_that_validate_takes():
    names = [line.split()[0] for line in invoke("ls", "configs").output.splitlines()[1:] if line]
    assert "glue" in names
    assert invoke("validate", "glue", "profile=embedded").exit_code == 0


def test_ls_without_a_kind_lists_all():
    shown = invoke("ls").output
    assert all(
        word in shown for word in ("ties-ca", "embedded/t5", "glue/sst2", "protocols/smear", "roberta")
    )


def test_every_listed_entry_has_a_summary():
    for kind in ("protocols", "backbones", "tasks", "configs"):
        for line in invoke("ls", kind).output.splitlines()[1:]:
            assert not line or len(line.split()) > 2, f"{kind}: {line}"


def test_cp_copies_a_configuration_that_validates(tmp_path):
    assert invoke("cp", "glue", str(tmp_path / "mine.yaml")).exit_code == 0
    assert invoke("validate", str(tmp_path / "mine.yaml"), "profile=embedded").exit_code == 0


def test_doctor_reports_each_subject(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = invoke("doctor")
    assert shown.exit_code == 0
    subjects = [line.split(":")[0] for line in shown.output.splitlines()]
    assert {"Python", "device", "hub", "hub cache", "disk", "profile auto"} <= set(subjects)
    assert "hub: [note] not asked: HF_HUB_OFFLINE is set" in shown.output


# Each of these reaches the user's terminal as one message and exit code 2.
BAD = [
    (["run", "glue", "merging.protocl=smear"], "protocol"),
    (["run", "glue", "merging"], "="),
    (["validate", "nowhere.yaml"], "nowhere.yaml"),
    (["ls", "protocls"], "Did you mean 'protocols'?"),
    (["cp", "gleu", "x.yaml"], "gleu"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_a_user_error(arguments, words, pipeline):
    error = invoke(*arguments).exception
    assert isinstance(error, UserError)
    assert words in str(error)
    assert pipeline.calls == []


def test_a_user_error_is_one_message_on_stderr_and_exit_code_2(tmp_path):
    done = process("cp", "gleu", "mine.yaml", cwd=tmp_path)  # the one that waits for no torch
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_exit_code_2():
    assert process("run", "--hlp").returncode == 2


def test_a_fault_of_ours_is_exit_code_1_with_the_traceback(capsys):
    def fail():
        raise RuntimeError("broken inside")

    assert errors.guard(fail) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: broken inside" in said
    assert "Traceback" in said
    assert "report it" in said


def test_success_is_exit_code_0():
    assert errors.guard(lambda: None) == 0


def test_plan_prints_tables_and_writes_numbers(tmp_path):
    file = tmp_path / "plan.json"
    shown = invoke("plan", "glue", "profile=embedded", "merging.protocol=smear", "--json", str(file))
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[0] == "profile embedded: asked for"
    (head,) = [line for line in shown.output.splitlines() if line.startswith("parameters")]
    assert head.split() == ["parameters", "dense", "smoe", "domain-ca", "ep-camex", "smear", "*"]
    assert [column["protocol"] for column in json.loads(file.read_text())["columns"]][-1] == "smear"
