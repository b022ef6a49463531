"""JSON files of a model's folder: whichever key has a file opened, code imported or kernels fetched, it is refused."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from camex_ft import synthetic
from camex_ft.backbones import loading as backbones
from camex_ft.utils import folders
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import EMBEDDED

SOURCES = sorted(Path(transformers.__file__).parent.glob("**/tokenization*.py"))
OPENS = ("open", "Load", "load_vocab", "load_json", "load_spm", "from_file", "load", "load_vocab_and_emoji")
# Parameters that no JSON file reaches: of classes that a tokenizer makes itself, and of `save_pretrained`.
INTERNAL = {"rewriting_rules", "model", "save_directory", "tokenizer_path"}
SECRET = "BEGIN PRIVATE KEY"


def opened_keys() -> Iterator[str]:
    """Keys that transformers' tokenizers declare as files, and parameters that they open."""
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        parameters = {
            arg.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__init__"
            for arg in (*node.args.args, *node.args.kwonlyargs)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                if any(getattr(t, "id", "").lower() == "vocab_files_names" for t in node.targets):
                    yield from (ast.literal_eval(key) for key in node.value.keys if key is not None)
            elif isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                first = ast.unparse(node.args[0]).removeprefix("self.")
                if name in OPENS and first in parameters:
                    yield first


def test_every_key_that_a_tokenizer_of_transformers_opens_is_known(tmp_path: Path) -> None:
    keys = set(opened_keys()) - INTERNAL
    assert {"vocab", "vocab_file", "merges_file", "source_spm", "word_shape_file"} <= keys
    passed = {
        key
        for key in keys
        if folders.reference_fault("tokenizer_config.json", {key: "/etc/hostname"}, tmp_path) is None
    }
    assert passed == set()


def bert(folder: Path) -> Path:
    """A backbone whose tokenizer has no tokenizer.json."""
    dense, _ = synthetic.backbone("bert", num_labels=2, seed=0)
    dense.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("tokenizer_config.json", {"vocab": "{}"}),
        ("tokenizer_config.json", {"init_inputs": ["{}"]}),
        ("special_tokens_map.json", {"vocab": "{}"}),
        (
            "tokenizer.json",
            {"added_tokens": [], "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": "{}"}},
        ),
    ],
)
def test_a_file_of_the_machine_does_not_become_a_vocabulary(
    file: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the working folder, by its name alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(SECRET + "\n")
    made = bert(tmp_path / "model")
    assert "a" in backbones.load(str(made), head="base")[1].get_vocab()
    for secret in (str(tmp_path / ".env"), ".env", "../.env"):
        content = {"version": "1.0", "tokenizer_class": "BertTokenizer", **fields}
        (made / file).write_text(json.dumps(content).replace("{}", secret))
        with pytest.raises(UserError, match="which is no file of the folder itself"):
            backbones.load(str(made), head="base")


STALE = {
    "special_tokens_map_file": "/home/somebody/.cache/huggingface/hub/models--a--b/special_tokens_map.json",
    "tokenizer_file": "C:\\Users\\somebody\\tokenizer.json",
    "name_or_path": "google/t5-v1_1-base",
    "vocab_file": "spiece.model",
    "merges_file": None,
    "sp_model_kwargs": {},
    "init_inputs": [],
    "auto_map": None,
    "extra_ids": 100,
    "chat_template": "{% include '/etc/passwd' %}",
    "unk_token": "/",
    "vocab": [["/", -1.5], ["</s>", 0.0]],
}


def test_paths_that_saved_tokenizers_carry_from_another_machine_are_no_fault(tmp_path: Path) -> None:
    """As in flan-t5's own configuration; but a file that is there is refused, whoever wrote its name."""
    assert folders.reference_fault("tokenizer_config.json", STALE, tmp_path) is None
    for key in ("special_tokens_map_file", "tokenizer_file"):
        (tmp_path / "secret").touch()
        assert folders.reference_fault("tokenizer_config.json", {key: str(tmp_path / "secret")}, tmp_path)
    config = {
        "_name_or_path": "/data/model",
        "attn_implementation": "sdpa",
        "experts_implementation": None,
    }
    config |= {"use_mamba_kernels": True, "kernel_size": [3], "_attn_implementation_autoset": True}
    assert folders.reference_fault("config.json", config, tmp_path) is None
    tokens = {"auto_map": 1, "vocab": 2, "a/b": 3}
    assert (
        folders.reference_fault("tokenizer.json", {"model": {"vocab": tokens, "merges": ["a b"]}}, tmp_path)
        is None
    )


@pytest.mark.parametrize("family", EMBEDDED.names())
def test_what_transformers_saves_is_no_fault(family: str, tmp_path: Path) -> None:
    dense, tokenizer = synthetic.backbone(family, seed=0)
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert folders.unsafe(tmp_path) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["/x", "a/b", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "vocab",
                    "a_file",
                    "kernels",
                    "auto_map",
                    "quantization_config",
                    "_type",
                    "model",
                    "",
                    "transformers_weights",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from([*folders.CONFIGS, "tokenizer.json", "tokenizer.4.0.json"]), JSON)
def test_any_json_is_judged(name: str, content: Any) -> None:
    said = folders.reference_fault(name, content, Path("/nowhere"))
    assert said is None or (said.isprintable() and len(said) < 400)


def test_looking_at_a_folder_takes_milliseconds(tmp_path: Path) -> None:
    """With the tokenizer of GPT-2's size: 50,000 tokens and as many merges, 2 MB."""
    made = bert(tmp_path / "model")
    words = [f"word{n}" for n in range(50_000)]
    model = {
        "type": "BPE",
        "vocab": {word: n for n, word in enumerate(words)},
        "merges": list(zip(words, words, strict=True)),
    }
    (made / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        assert folders.unsafe(made) is None
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1  # some 10 ms here, and 0.4 on a folder without a tokenizer.json
