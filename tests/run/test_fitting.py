"""A configuration against a backbone's files: type, lengths against positions, layers; before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.config import Config
from camex_ft.run.fitting import check_backbone
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import families, positions
from tests.helpers.tiny import config_of, inputs_of, make, model_types
from tests.helpers.working_folder import folder

__all__ = ["folder"]

TABLES = [t for t in model_types() if families()[t].name in ("bert", "roberta", "distilbert", "gpt2")]
RELATIVE = [t for t in model_types() if families()[t].name == "t5"]


def settled(backbone: str, suite: str = "glue", name: str = "sst2", **sections: Any) -> Config:
    task = {"suite": suite, "name": name, **sections.pop("task", {})}
    return Config.model_validate({"profile": "embedded", "backbone": backbone, "task": task, **sections})


def check(config: Config, path: Path | None = None) -> str:
    """Return what is wrong, or the empty text."""
    try:
        check_backbone(config, registry.TASKS.get(config.task.id), path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", TABLES)
def test_a_model_reads_as_many_tokens_as_its_positions_and_no_more(kind: str) -> None:
    model = make(kind, "base", {})
    limit = positions(model.config)
    assert limit is not None

    def read(length: int) -> None:
        ids = inputs_of(model, "base")["input_ids"][:1, :1].expand(1, length)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    read(limit)
    with pytest.raises((IndexError, RuntimeError)):
        read(limit + 1)


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_have_no_end(kind: str) -> None:
    """Also where a configuration says `n_positions`, as the published T5's do."""
    assert positions(config_of(kind, {"n_positions": 8})) is None


def test_of_an_upcycled_model_and_of_an_unknown_type() -> None:
    assert positions(SimpleNamespace(model_type="camex_bert", max_position_embeddings=7)) == 7
    assert positions(SimpleNamespace(model_type="vit", max_position_embeddings=7)) is None


LENGTHS = [
    ("bert", {"max_position_embeddings": 512}, 512),
    ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ("distilbert", {"max_position_embeddings": 100}, 100),
    ("gpt2", {"max_position_embeddings": 64}, 64),
    ("llama", {"max_position_embeddings": 40}, 40),
]
SHORT = [("glue", "sst2"), ("glue", "rte"), ("superglue", "record"), ("superglue", "wic")]


@pytest.mark.parametrize(("kind", "sizes", "limit"), LENGTHS)
def test_a_length_beyond_the_positions_is_refused(
    tmp_path: Path, kind: str, sizes: dict[str, int], limit: int
) -> None:
    config_of(kind, sizes).save_pretrained(tmp_path / "model")
    for suite, name in SHORT:
        for length, expected in ((limit, ""), (limit + 1, f"expected task.max_length={limit} or less")):
            config = settled(f"new:{tmp_path}/model", suite, name, task={"max_length": length})
            assert check(config).endswith(expected) and bool(check(config)) == bool(expected)
    said = check(settled(f"new:{tmp_path}/model", task={"max_length": 600}))
    assert said.startswith(f"task.max_length is 600; the backbone reads at most {limit} tokens")


def test_a_default_that_is_not_written_counts(tmp_path: Path) -> None:
    config_of("bert", {"max_position_embeddings": 32}).save_pretrained(tmp_path)
    assert check(settled(f"new:{tmp_path}")).startswith(
        "task.max_length is 128; the backbone reads at most 32 "
    )


def test_lengths_of_other_suites(tmp_path: Path) -> None:
    config_of("gpt2", {"max_position_embeddings": 64}).save_pretrained(tmp_path / "gpt2")
    config_of("t5", {}).save_pretrained(tmp_path / "t5")
    modelling = settled(f"new:{tmp_path}/gpt2", "lm", "text", task={"block_size": 65})
    assert check(modelling).startswith("task.block_size is 65; the backbone reads at most 64 tokens")
    answering = {"max_length": 9999, "answer_length": 9999}
    assert check(settled(f"new:{tmp_path}/t5", "qa", "squad", task=answering)) == ""


def test_answers_need_positions_too() -> None:
    """Of a decoder that has some: no family of the package is one, a plug-in may be."""
    task = registry.TASKS.get("qa/squad")
    settings = settled("embedded/t5", "qa", "squad", task={"max_length": 8, "answer_length": 9}).task
    bounded: Any = SimpleNamespace(model_type="bert", max_position_embeddings=8)
    with pytest.raises(UserError, match=r"task\.answer_length is 9; the backbone reads at most 8 tokens"):
        task.check_backbone(bounded, settings)


def test_a_run_of_an_earlier_version_is_measured_with_what_its_backbone_reads() -> None:
    task = registry.TASKS.get("glue/sst2")
    bounded: Any = SimpleNamespace(model_type="bert", max_position_embeddings=512)
    settings = settled("embedded/bert", task={"max_length": 600}).task
    assert task.within(bounded, settings) == settings.model_copy(update={"max_length": 512})
    short = settled("embedded/bert", task={"max_length": 512}).task
    assert task.within(bounded, short) is short


@pytest.mark.parametrize("new", ["", "new:"])
def test_a_folder_of_another_type_is_named_with_its_type_and_those_that_serve(
    tmp_path: Path, new: str
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.AlbertConfig(**sizes, embedding_size=8, vocab_size=9)
    transformers.AlbertForSequenceClassification(config).save_pretrained(tmp_path)
    said = check(settled(f"{new}{tmp_path}"))
    assert said.startswith(
        f"backbone {new}{tmp_path}: it holds a model of the type 'albert', which no backbone family serves. "
        "Supported types: bert, camembert, deepseek_v2, distilbert, electra, gpt2, llama"
    )
    assert "Did you mean" not in said


def test_a_hub_id_is_looked_at_where_its_files_are_known(tmp_path: Path) -> None:
    config_of("bert", {"max_position_embeddings": 32}).save_pretrained(tmp_path)
    assert check(settled("new:org/name")) == ""
    assert check(settled("new:org/name"), tmp_path).startswith("task.max_length is 128")


@pytest.mark.parametrize("backbone", ["embedded/bert", "new:folder"])
def test_layers_that_a_backbone_does_not_have_are_refused(folder: Path, backbone: str) -> None:
    config_of("bert", {"num_hidden_layers": 2, "max_position_embeddings": 512}).save_pretrained("folder")
    said = check(settled(backbone, upcycle={"layers": [1, 2]}))
    assert said == "upcycle.layers: no layer 2; this backbone's layers are 0 to 1 (encoder 0 to 1)"
    assert check(settled(backbone, upcycle={"layers": [0, 1]})) == ""
    assert check(settled(backbone, upcycle={"layers": [7]}, merging={"protocol": "dense"})) == ""


# -- the commands


def invoke(*arguments: str) -> tuple[int, str]:
    shown = CliRunner().invoke(cli.app, list(arguments))
    return (
        2 if isinstance(shown.exception, UserError) else shown.exit_code
    ), f"{shown.output}{shown.exception}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("backbone=embedded/roberta", "task.max_length=513"),
            "task.max_length is 513; the backbone reads at most 512",
        ),
        (("backbone=embedded/bert", "upcycle.layers=[5]"), "upcycle.layers: no layer 5"),
        (("backbone=./gone",), "there is no folder './gone'"),
    ],
)
def test_run_and_validate_say_it_before_a_model_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr("camex_ft.run.pipeline.load_model", lambda *_: pytest.fail("a model is built"))
    for command in ("validate", "run"):
        code, said = invoke(command, "glue", "profile=embedded", *overrides)
        assert code == 2 and expected in said
    assert not list(folder.glob("results/runs/*"))


def test_validate_says_all_that_is_wrong_with_files_at_once(folder: Path) -> None:
    Path("d").mkdir()
    Path("d/train.jsonl").write_text('{"label": 1}\n')
    written = "profile: embedded\nbackbone: embedded/bert\ntask: {max_length: 513}\ndata:\n  dir: d\n"
    Path("run.yaml").write_text(written)
    code, said = invoke("validate", "run.yaml")
    assert code == 2 and "The configuration has 2 problems:" in said
    assert "run.yaml:2: task.max_length is 513; the backbone reads at most 512 tokens" in said
    assert "run.yaml:5: d/train.jsonl: glue/sst2 needs the column sentence" in said


def test_validate_says_what_is_wrong_with_a_folder(folder: Path) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": "bert"}))
    code, said = invoke("validate", "glue", "profile=embedded", "backbone=./model")
    assert code == 2 and "backbone ./model: the folder has no weights" in said
