"""What a newcomer meets: metadata, the README's commands, the Makefile's safety, and no trace of anybody's machine."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg")


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


CORE = requirements(setup["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in setup["options.extras_require"].items()}
PINS = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked_files() -> list[Path]:
    """The repository's own text files; without git, those of the folders that hold them."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def third_party_imports() -> set[str]:
    """Distributions that camex_ft imports anywhere, by their normalised names."""
    providers = importlib.metadata.packages_distributions()
    found: set[str] = set()
    for file in (ROOT / "camex_ft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"camex_ft"}:
                found.add(normal(providers.get(top, [top])[0]))
    return found


# Distributions whose modules belong to the interface of a declared one, and are held by it.
COME_WITH = {
    "annotated-types": "pydantic",
    "pydantic-core": "pydantic",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
}


def test_every_dependency_earns_its_place():
    # transformers imports these itself: for its Trainer, its checkpoints and its tokenizers.
    behind = {"accelerate", "safetensors", "sentencepiece", "protobuf"}
    unused = {normal(r.name) for r in CORE} - third_party_imports() - behind
    assert not unused, f"no module of camex_ft imports {sorted(unused)}"


def test_every_import_is_a_declared_dependency():
    undeclared = {COME_WITH.get(name, name) for name in third_party_imports()} - {
        normal(r.name) for r in [*CORE, *EXTRAS["slurm"], *EXTRAS["deepspeed"]]
    }
    assert not undeclared, f"imported but not in install_requires: {sorted(undeclared)}"


@pytest.mark.parametrize(
    "requirement", [*CORE, *(r for name in EXTRAS for r in EXTRAS[name])], ids=lambda r: r.name
)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_once_for_every_python(requirement, python):
    pins = [p for p in PINS if normal(p.name) == normal(requirement.name)]
    held = [p for p in pins if p.marker is None or p.marker.evaluate({"python_version": python})]
    assert len(held) == 1, f"{requirement.name} on Python {python}: {[str(p) for p in held]}"
    (pin,) = held[0].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_torch_is_pinned_to_a_plain_release():
    (torch,) = [p for p in PINS if p.name == "torch"]
    assert str(torch.specifier) == "==2.13.0"


def test_console_script_and_licence():
    assert "camex-ft = camex_ft_cli:main" in setup["options.entry_points"]["console_scripts"]
    assert setup["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert setup["options"]["python_requires"] == ">=3.10"


def test_the_readme_begins_with_the_two_commands():
    commands = re.findall(r"^    (make .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert commands[:2] == ["make glue TASK=sst2", "make test"]
    first = README.splitlines()[:6]
    assert any("make glue TASK=sst2" in line for line in first)
    assert any("make test" in line for line in first)


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make test" in script
    assert "make lint" in script
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_make_target_of_the_readme_exists():
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_every_file_that_the_readme_links_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


# Written in pieces, so that this file does not find itself.
PRIVATE = re.compile(
    "|".join(["/" + "work/", "/" + "tmp/w", "/" + r"home/(?!ann\b|somebody\b)\w", "/" + "root/"])
)


def test_no_file_names_a_machines_paths():
    found = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{file.relative_to(ROOT)}:{n}"
            for n, line in enumerate(text.splitlines(), 1)
            if PRIVATE.search(line)
        ]
    assert found == []


@pytest.fixture
def sandbox(tmp_path):
    """A copy of the Makefile with a finished installation whose camex-ft prints its arguments, one a line."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / ".venv" / "bin" / "camex-ft"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    script.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_make_glue_passes_only_what_was_given(sandbox):
    assert make(sandbox, "glue") == ["run", "configs/glue.yaml"]
    assert make(sandbox, "superglue", "TASK=boolq") == ["run", "configs/superglue.yaml", "task.name=boolq"]
    assert make(sandbox, "lm", "TASK=text") == ["run", "configs/lm.yaml", "task.name=text"]


def test_make_glue_passes_every_variable_and_set_last(sandbox):
    given = ["TASK=rte", "PROFILE=embedded", "BACKBONE=embedded/t5", "PROTOCOL=smear", "SEED=7", "FORCE=1"]
    assert make(sandbox, "glue", *given, "SET=a.b=c  d=[0,2]") == [
        "run",
        "--force",
        "configs/glue.yaml",
        "task.name=rte",
        "profile=embedded",
        "backbone=embedded/t5",
        "merging.protocol=smear",
        "training.seed=7",
        "a.b=c",
        "d=[0,2]",
    ]
    assert "--force" not in make(sandbox, "glue", "FORCE=0")


def test_make_passes_what_asks_for_several_processes(sandbox):
    given = ["GPUS=4", "ENGINE=fsdp", "NODES=2"]
    expected = ["run", "--nodes", "2", "--engine", "fsdp", "--gpus", "4", "configs/glue.yaml"]
    assert make(sandbox, "glue", *given) == expected
    assert make(sandbox, "qa", "CPUS=2") == ["run", "--cpus", "2", "configs/qa.yaml"]


@pytest.mark.parametrize("value", ["a b", "a'b", 'a"b', "a;touch x", "`touch x`", "a&b", "*", "a\\b"])
def test_values_reach_the_command_as_they_are(sandbox, value):
    assert make(sandbox, "glue", f"TASK={value}")[-1] == f"task.name={value}"
    assert make(sandbox, "glue", f"BACKBONE={value}")[-1] == f"backbone={value}"
    assert not (sandbox / "x").exists()


def test_set_is_split_at_blanks_and_not_taken_for_file_names(sandbox):
    assert make(sandbox, "glue", "SET=x=* y=[M]akefile z='q'")[-3:] == ["x=*", "y=[M]akefile", "z='q'"]


def test_the_default_target_lists_the_others(sandbox):
    listed = "\n".join(make(sandbox))
    for target in ("glue", "superglue", "lm", "test", "lint", "install", "clean"):
        assert f"make {target} " in listed


def test_an_old_python_is_refused_with_a_reason(sandbox):
    old = sandbox / "python"
    old.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    (sandbox / ".venv" / ".installed").unlink()
    done = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=sandbox, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert "is 3.9" in done.stderr
