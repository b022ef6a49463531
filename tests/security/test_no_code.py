"""What the package never does: load pickles, run code that came with a model, build shell strings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "camex_ft").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / "Makefile"])
# Calls by the end of their dotted name.
NEVER = {
    *(
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "joblib.load",
        "shelve.open",
        "marshal.loads",
    ),
    *(
        "dill.load",
        "cloudpickle.load",
        "cloudpickle.loads",
        "np.fromfile",
        "numpy.fromfile",
        "torch.hub.load",
    ),
    *(
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "eval",
        "exec",
        "compile",
    ),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "__import__", "torch.jit.load"),
    *("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "tempfile.mktemp"),
}
# Keyword arguments and the values that they never have.
NEVER_GIVEN = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of such an expression, without what it cannot name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    """Calls that are never made, and imports of modules that only load or run what they get."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in NEVER or any(name.endswith(f".{each}") for each in NEVER if "." in each):
                yield f"line {node.lineno}: {name}"
            for given in node.keywords:
                if given.arg in NEVER_GIVEN and not (
                    isinstance(given.value, ast.Constant) and given.value.value is not NEVER_GIVEN[given.arg]
                ):
                    yield f"line {node.lineno}: {given.arg}={ast.unparse(given.value)}"
            if name.endswith("from_pretrained") and not name.startswith("super()"):
                yield from _pretrained(node, name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (
                f"line {node.lineno}: import {n}"
                for n in names
                if n in ("pickle", "shelve", "marshal", "dill")
            )
        elif isinstance(node, ast.Dict):  # that may become keyword arguments
            for key, value in zip(node.keys, node.values, strict=True):
                named = key.value if isinstance(key, ast.Constant) else None
                if named in NEVER_GIVEN and ast.unparse(value) == str(NEVER_GIVEN[named]):
                    yield f"line {node.lineno}: {named!r}: {ast.unparse(value)}"


def _pretrained(node: ast.Call, name: str) -> Iterator[str]:
    """Transformers' automatic classes are told every time that no code is to be run."""
    automatic = ".Auto" in f".{name}" or "HEADS" in ast.unparse(node.func)
    if automatic and not any(given.arg == "trust_remote_code" for given in node.keywords):
        yield f"line {node.lineno}: {name} without trust_remote_code=False"


def test_nothing_of_the_kind() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(faults(ast.parse(path.read_text("utf-8"))))
        for path in SOURCES
    }
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "import pickle",
        "from pickle import load",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=y)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "transformers.AutoConfig.from_pretrained(x)",
        "torch.load(f, weights_only=False)",
        "yaml.load(x, Loader=yaml.Loader)",
        "os.system('x')",
        "eval(x)",
        "d = {'trust_remote_code': True}",
    ],
)
def test_it_would_be_found(text: str) -> None:
    assert list(faults(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile(x)",
        "torch.compile(m)",
        "subprocess.run(x)",
        "self.load(x)",
        "config.load(x)",
    ],
)
def test_what_only_looks_alike(text: str) -> None:
    assert not list(faults(ast.parse(text)))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_build_no_commands_from_input(path: Path) -> None:
    """No eval, no sh -c with a variable in it; and make leaves variables of the user's to the shell's own."""
    text = path.read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(^|[;&|(\s])eval\s", code)
    assert not re.search(r"\b(ba)?sh\s+-c\s+[^']*\$", code)
    if path.name == "Makefile":
        users = re.search(r"^export (.+)$", text, re.M)
        assert users is not None
        for name in users[1].split():
            assert not re.search(rf"^\t.*(?<!\$)\$[({{]{name}[)}}]", text, re.M), f"$({name}) in a recipe"
