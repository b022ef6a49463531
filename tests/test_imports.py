"""Data flows one way: which module may import which, read from the sources and from a fresh interpreter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "camex_ft"
FILES = sorted(PACKAGE.rglob("*.py"))
ARCHITECTURE = PACKAGE.parent / "docs/architecture.md"

# A module may import from its own layer and from those above it in this list.
LAYERS = (
    ("utils",),
    ("config",),
    ("moe",),
    ("protocols",),
    ("backbones",),
    ("synthetic",),
    ("tasks",),
    ("data",),
    ("upcycling",),
    ("hf",),
    ("training",),
    ("results",),
    ("launching",),
    ("run",),
    ("exporting",),
    ("analysis",),
    ("estimate",),
    ("bench",),
    ("compare",),
    ("static",),
    ("branching",),
    ("cli",),
    ("__main__",),
    ("",),  # camex_ft/__init__.py: the public API
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Narrower than the order: the only parts of camex_ft that these layers may use beside themselves.
ONLY = {
    "moe": set(),
    "results": {"utils", "config"},
    "synthetic": {"utils", "backbones"},
}
# Third-party packages that a layer may use, and those that it may not, wherever in the file.
ALLOWED = {
    "utils": {"rich", "torch", "datasets", "huggingface_hub"},
    "moe": {"torch"},
    "protocols": {"torch", "annotated_types"},
}
# ask torch and datasets, or how datasets does it, inside functions
PROBES = {"camex_ft.utils.system", "camex_ft.utils.hub", "camex_ft.cli.doctor"}
FORBIDDEN = {
    "config": {"torch", "datasets"},
    "results": {"torch", "transformers", "datasets", "accelerate"},
    "launching": {"transformers", "datasets", "accelerate"},
    "cli": {"torch", "transformers", "datasets"},
}


# Libraries that take long to import.
HEAVY = ("torch", "transformers", "datasets", "evaluate", "sklearn", "scipy", "pandas", "pyarrow")


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module and its line, at the top and inside functions; `from camex_ft import x` is camex_ft.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            if node.module == "camex_ft":
                yield from ((f"camex_ft.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


def offences(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`."""
    layer, found = layer_of(module), []
    for name, line in imports(ast.parse(source)):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top == "camex_ft":
            target = layer_of(name)
            if target not in RANK:
                found.append(f"{where}: no such layer")
            elif RANK[target] > RANK[layer] or (RANK[target] == RANK[layer] and target != layer):
                found.append(f"{where}: against the direction of the layers")
            elif target != layer and target not in ONLY.get(layer, {target}):
                found.append(f"{where}: '{layer}' may use only {sorted(ONLY[layer])} of camex_ft")
        elif top not in sys.stdlib_module_names:
            if top not in ALLOWED.get(layer, {top}):
                found.append(f"{where}: '{layer}' may use only {sorted(ALLOWED[layer])}")
            if top in FORBIDDEN.get(layer, set()) and module not in PROBES:
                found.append(f"{where}: not in '{layer}'")
    return found


def test_every_module_has_a_layer():
    assert FILES
    unplaced = {layer_of(module_name(file)) for file in FILES} - set(RANK)
    assert not unplaced, f"give them a place in LAYERS: {sorted(unplaced)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    assert offences(module_name(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("camex_ft.utils.errors", "from camex_ft.config import load_config"),
        ("camex_ft.moe.layers.ffn", "from camex_ft.utils.errors import UserError"),
        ("camex_ft.moe.layers.ffn", "def f():\n    import transformers"),
        ("camex_ft.config.schema", "import torch.nn"),
        ("camex_ft.results.record", "from camex_ft import upcycling"),
        ("camex_ft.results.record", "def f():\n    from torch import Tensor"),
        ("camex_ft.run.pipeline", "from camex_ft.cli import app"),
        ("camex_ft.cli.doctor", "from camex_ft import load_config"),
        ("camex_ft.tasks.glue", "import camex_ft"),
        ("camex_ft.tasks.glue", "from camex_ft.nowhere import x"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(offences(module, source)) == 1


def imported_files(source: str, modules: Iterable[str]) -> set[str]:
    """The modules of the package that a file imports: at its top, in functions and for type checks alone."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {str(node.module)}
    return found & known


def cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of one import cycle, each imported by the next; none where there is no cycle."""
    try:
        TopologicalSorter({name: set(targets) - {name} for name, targets in graph.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_is_part_of_an_import_cycle():
    sources = {module_name(file): file.read_text(encoding="utf-8") for file in FILES}
    assert cycle({name: imported_files(source, sources) for name, source in sources.items()}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from camex_ft.a import x",
        "def f():\n    import camex_ft.a",
        "if TYPE_CHECKING:\n    from camex_ft import a",
    ],
)
def test_a_cycle_is_found_wherever_its_imports_stand(back):
    sources = {
        "camex_ft.a": "from camex_ft.b import y",
        "camex_ft.b": "from camex_ft import c",
        "camex_ft.c": back,
    }
    assert set(cycle({name: imported_files(source, sources) for name, source in sources.items()})) == set(
        sources
    )


def test_the_architecture_page_has_a_line_for_every_layer():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    table = page[page.index("## Packages") : page.index("Some layers are narrower")]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]  # below the head
    listed = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in lines]
    assert [tuple("" if n == "__init__" else n for n in names) for names in listed] == [*LAYERS]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import camex_ft", ("datasets",)),
        ("import camex_ft_cli, camex_ft", ("torch", "transformers", "datasets")),
        ("import camex_ft_cli, camex_ft.config", ("torch", "datasets")),
        ("import camex_ft_cli, camex_ft.results", ("torch", "transformers", "datasets", "sklearn")),
        (
            "import camex_ft_cli, camex_ft.cli",
            ("torch", "transformers", "datasets", "sklearn", "camex_ft.config"),
        ),
    ],
)
def test_importing_stays_light(statement, absent):
    """What is shown at once (`camex-ft --help`) does not wait for torch."""
    code = f"{statement}; import sys; print(*[m for m in {absent!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert found == []


@pytest.mark.parametrize(
    "command",
    [
        "ls",
        "validate glue profile=embedded",
        "validate lm profile=embedded",
        "validate qa profile=embedded",
        "validate glue profile=embedded merging.protocol=namex training.warmup_steps=10 training.max_grad_norm=0.5",
    ],
)
def test_commands_that_only_look_stay_light(command, tmp_path):
    """They list and check what is registered, without the libraries that train on it."""
    code = (
        "import sys, camex_ft_cli\n"
        "try: camex_ft_cli.main()\n"
        f"finally: print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    ("command", "registers"),
    [
        (["-m", "camex_ft", "--version"], False),
        (["-c", "import camex_ft", "-m", "camex_ft"], True),
    ],
)
def test_programs_of_the_package_register_nothing(command, registers):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], check=True, capture_output=True, text=True
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert ("transformers" in modules) is registers
