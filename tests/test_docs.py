"""The documentation holds what it promises: links lead somewhere, commands parse, examples run, lists are complete."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import typer

import camex_ft
from camex_ft import cli
from camex_ft.branching.stages import make_study
from camex_ft.branching.study import is_study, read_study
from camex_ft.compare.cells import make_comparison
from camex_ft.compare.spec import is_spec, of_config, read_spec
from camex_ft.config import load_config
from camex_ft.data import sources
from camex_ft.static.merge_spec import read_merge_spec
from camex_ft.utils import registry
from scripts.docs import protocols as protocols_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
REGISTRIES = (registry.PROTOCOLS, registry.BACKBONES, registry.TASKS)
# What make's variables stand for in the configuration.
VARIABLES = {
    "TASK": "task.name",
    "PROFILE": "profile",
    "BACKBONE": "backbone",
    "PROTOCOL": "merging.protocol",
    "SEED": "training.seed",
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page. Its first line may name the file that it stands for: ``# my.yaml``."""

    page: Path
    language: str
    text: str

    @property
    def file(self) -> str:
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\b", self.text)
        return named[1] if named else ""

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.file or self.text.splitlines()[0]}"


def blocks(language: str) -> list[Block]:
    """All blocks in this language, in the order of the pages."""
    found = [Block(page, *match) for page in PAGES for match in FENCE.findall(read(page))]
    return [block for block in found if block.language == language]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its fenced and indented blocks."""
    return re.sub(r"^ {4}.*$", "", FENCE.sub("", read(page)), flags=re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands between backquotes in the running text of a page, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# -- links ------------------------------------------------------------------------------------------------------------


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", prose(page)):
            if "://" not in target:
                yield page, target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), list(links()), ids=lambda part: getattr(part, "stem", part))
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    there = (page.parent / file).resolve() if file else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


def test_every_page_is_linked() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page, target in links()}
    assert set(PAGES[1:]) <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_that_are_named_exist(page: Path) -> None:
    named = [s for s in spans(page) if re.fullmatch(r"(camex_ft|tests|docs|configs|scripts)/[\w./*-]*", s)]
    assert [name for name in named if not list(ROOT.glob(name))] == []


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(program: str) -> list[tuple[str, list[str]]]:
    """(page, arguments) of each command of `program`: in blocks, in running text and in the heads of YAML files."""
    found = []
    for page in PAGES:
        lines = re.findall(r"^ {4}(.+)$", FENCE.sub("", read(page)), flags=re.MULTILINE)
        lines += [*spans(page), *re.findall(r"run: (.+)", read(page))]
        for line in lines:
            match = re.match(rf"(?:[A-Z_]+=\S+ )*{program}\b ?(.*)", line)
            if match:
                words = shlex.split(match[1].partition(" > ")[0], comments=True)
                found.append((page.stem, words))
    return found


def name(command: tuple[str, list[str]]) -> str:
    """A test's name."""
    return " ".join([command[0], *command[1]])


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that each page shows; Python files are registered as plug-ins for one test."""
    before = {kind: kind.names() for kind in REGISTRIES}
    plugins = tmp_path / "plugins"
    for folder in (plugins, *(tmp_path / page.stem for page in PAGES)):
        folder.mkdir()
    for block in [*blocks("python"), *blocks("yaml")]:
        file = Path(block.file)
        folder = plugins if file.suffix == ".py" else tmp_path / block.page.stem
        if block.file and not file.name.startswith("test_"):
            (folder / file.name).write_text(block.text, encoding="utf-8")
    monkeypatch.setenv(registry.PLUGINS, str(plugins))
    yield tmp_path
    for kind, names in before.items():
        for added in set(kind.names()) - set(names):
            kind.remove(added)


@pytest.mark.parametrize("command", [c for c in commands("camex-ft") if c[1]], ids=name)
def test_a_command_parses_and_its_configuration_is_valid(
    command: Any, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, (subcommand, *arguments) = command
    monkeypatch.chdir(examples / page)
    known: Any = typer.main.get_command(cli.app)
    assert subcommand in known.commands
    if not arguments:
        return  # the command is only spoken of
    given = known.commands[subcommand].make_context(subcommand, list(arguments)).params
    config = given.get("config", "CONFIG")
    if config != "CONFIG":  # a placeholder
        overrides = [o for o in given.get("overrides") or () if o != "KEY=VALUE"]
        load_config(ROOT / config if (ROOT / config).is_file() else config, overrides)
    if given.get("spec", "SPEC") == "SPEC":
        pass
    elif subcommand == "merge":
        assert read_merge_spec(given["spec"], given["overrides"] or ()).donors
    else:
        assert make_study(read_study(given["spec"]), overrides=given["overrides"] or ()).steps
    words = [w for w in given.get("specs", ()) if w not in ("FOLDER", "SPEC")]
    paths = [str(ROOT / w) if (ROOT / w).exists() else w for w in words if "=" not in w]
    for path in paths:
        if not Path(path).is_dir():
            spec = read_spec(path) if is_spec(path) else of_config(path, protocols=given["protocols"].split())
            assert make_comparison(spec, overrides=[w for w in words if "=" in w]).cells


@pytest.mark.parametrize("command", commands("make"), ids=name)
def test_a_make_target_exists_and_takes_its_variables(command: Any) -> None:
    targets = [word for word in command[1] if "=" not in word]
    assert set(targets) <= set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    values = dict(word.split("=", 1) for word in command[1] if "=" in word)
    taken = set(re.findall(r"^(\w+) \?=", MAKEFILE, flags=re.MULTILINE))
    taken |= set(re.findall(r"^export (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split())
    assert set(values) <= taken
    if set(targets) & {"glue", "superglue"}:
        overrides = [f"{VARIABLES[k]}={v}" for k, v in values.items() if k in VARIABLES]
        load_config(targets[0], [*overrides, *values.get("SET", "").split()])


@pytest.mark.parametrize("command", [*commands("python -m"), *commands("pytest")], ids=name)
def test_a_module_or_test_file_exists(command: Any) -> None:
    first = command[1][0]
    assert (ROOT / first).exists() if "/" in first else importlib.util.find_spec(first)


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_valid_configuration(block: Block, examples: Path) -> None:
    file = examples / "shown.yaml"
    file.write_text(block.text, encoding="utf-8")
    if re.search(r"^from:", block.text, flags=re.MULTILINE):
        assert read_merge_spec(file).donors
    elif is_study(file):
        assert make_study(read_study(file)).steps
    elif is_spec(file):
        assert make_comparison(read_spec(file)).cells
    else:
        load_config(file)


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the size of the run."""
    small = ["profile=embedded", "data.train_rows=16", "data.eval_rows=8", "training.max_steps=2"]
    monkeypatch.setattr(camex_ft, "load_config", lambda path, given: load_config(path, [*given, *small]))
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {}
    for block in blocks("python"):
        if block.page.name == "README.md":
            exec(block.text, shown)
    assert type(shown["model"]) is not type(shown["dense"])  # a class of its own, which knows of experts
    for made in (shown["model"], shown["trained"]):
        assert made.config.camex["merging"]["protocol"] == "ties-ca"
    assert shown["record"].task == "glue/rte"


def test_the_example_of_a_protocol_does_what_its_test_says(examples: Path) -> None:
    assert {"agree", "agree-ca"} <= set(registry.PROTOCOLS.names())
    (shown,) = [block for block in blocks("python") if Path(block.file).name.startswith("test_")]
    defined: dict[str, Any] = {}
    exec(shown.text, defined)
    tests = [value for key, value in defined.items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_example_of_a_backbone_keeps_the_function(examples: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.AutoConfig.for_model("gpt_neox", vocab_size=20, **sizes)
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    made = camex_ft.upcycle(dense, merging={"protocol": "agree-ca", "experts": 2})
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():  # products in another order: 1e-7 relative on logits below 1
        torch.testing.assert_close(made(ids, use_cache=False).logits, dense(ids).logits, rtol=0, atol=1e-6)


def test_the_example_of_a_task_reads_its_files(examples: Path) -> None:
    task = registry.TASKS.get("own/subj")
    for split in ("train", "validation"):
        rows = [{"sentence": "it rained", "label": 0}, {"sentence": "a joy", "label": 1}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (examples / f"{split}.jsonl").write_text(text, encoding="utf-8")
    data = sources.load(task, source="disk", dir=examples)
    rows = task.rows(data["validation"], "validation")
    assert task.metrics([[2.0, 1.0], [0.0, 3.0]], rows)["accuracy"] == 1.0


# -- lists ------------------------------------------------------------------------------------------------------------


def test_every_invariant_is_told_of() -> None:
    told = spans(ROOT / "docs" / "method.md")
    files = [f.relative_to(ROOT).as_posix() for f in (ROOT / "tests" / "invariants").glob("test_*.py")]
    assert [file for file in files if file not in told] == []


# -- protocols.md -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(registry.PLUGINS in os.environ, reason="plug-ins would be on the page")
def test_the_page_of_protocols_is_fresh() -> None:
    stale = "run: python scripts/docs/protocols.py > docs/protocols.md"
    assert read(ROOT / "docs" / "protocols.md") == protocols_page.document(), stale


@pytest.mark.parametrize("name", registry.PROTOCOLS.names())
def test_a_protocol_has_a_formula_a_convention_and_a_meaning_of_every_option(name: str) -> None:
    protocol = registry.PROTOCOLS.get(name)
    text, meanings = protocols_page.parse(protocol.doc)
    assert text
    assert protocol.form == "dense" or "Convention: " in text
    assert "Args:" not in text
    assert set(protocol.options) <= set(meanings)
    assert protocol.source
