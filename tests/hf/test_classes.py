"""Upcycled models under classes and a model type of their own: found by transformers' auto classes and pipelines."""

from __future__ import annotations

import ast
import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
from transformers.models.auto import modeling_auto

from camex_ft import hf, synthetic
from camex_ft.backbones.heads import HEADS
from camex_ft.upcycling import adapters, load, model_classes, plain_class, plain_config, upcycle
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import Case, dense, shake, upcycled
from tests.helpers.lora_models import LORA
from tests.helpers.tiny import VOCABULARY, inputs_of, model_types

CLASSIFIER = "sequence-classification"
MERGING = {"protocol": "ties-ca", "experts": 2, "curvature": {"rank": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    shake(upcycled(Case("bert", CLASSIFIER, "ties-ca", "auto"))).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A folder to spoil: its files are copies."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, **entry: Any) -> None:
    file = folder / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "camex": {**said["camex"], **entry}}))


# -- names


@pytest.mark.parametrize("kind", model_types())
def test_every_type_and_head_has_a_class_that_the_auto_class_gives(kind: str) -> None:
    config = transformers.CONFIG_MAPPING[f"camex_{kind}"]
    plain = transformers.CONFIG_MAPPING[kind]
    assert config.__name__ == f"Camex{plain.__name__}" and config.model_type == f"camex_{kind}"
    assert issubclass(config, plain) and config is model_classes.config_class(
        plain
    ) is model_classes.config_class(config)
    assert (
        f"camex_{kind}" in transformers.CONFIG_MAPPING
        and f"camex_no{kind}" not in transformers.CONFIG_MAPPING
    )
    for head in HEADS:
        of: Any = HEADS[head]._model_mapping
        if plain not in of:
            assert config not in of
            continue
        found, dense_one = of[config], of[plain]
        dense_one = dense_one[0] if isinstance(dense_one, tuple) else dense_one
        assert found.__name__ == f"Camex{dense_one.__name__}" and plain_class(found) is dense_one
        assert found.config_class is config and dense_one.config_class is plain
        assert getattr(model_classes, found.__name__) is found is model_classes.class_named(found.__name__)


def test_what_is_upcycled_says_so_everywhere() -> None:
    made = upcycled(Case("t5", "seq2seq-lm", "ties-ca", "auto"))
    assert type(made).__name__ == "CamexT5ForConditionalGeneration"
    assert {type(m.config).__name__ for m in made.modules() if hasattr(m, "config")} == {"CamexT5Config"}
    assert type(dense("t5", "seq2seq-lm").config) is transformers.T5Config  # which it is a copy of
    plain = plain_config(made.config)
    assert (
        type(plain) is transformers.T5Config and not hasattr(plain, "camex") and hasattr(made.config, "camex")
    )


def test_classes_and_configurations_are_pickled_by_name() -> None:
    made = upcycled(Case("bert", CLASSIFIER, "ties-ca", "auto"))
    assert pickle.loads(pickle.dumps(type(made))) is type(made)
    assert pickle.loads(pickle.dumps(made.config)).to_dict() == made.config.to_dict()
    with pytest.raises(AttributeError, match="has no attribute 'CamexNothing'"):
        model_classes.CamexNothing  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'BertModel'"):
        model_classes.BertModel  # noqa: B018


def test_the_trainer_knows_what_a_model_is_for() -> None:
    """It shifts labels, where they are smoothed, by the name of the class."""
    upcycled(Case("gpt2", "causal-lm", "ties-ca", "auto"))
    assert "CamexGPT2LMHeadModel" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_peft_adapts_what_it_adapts_of_the_plain_type() -> None:
    found = []
    for model in (dense("llama", "causal-lm"), upcycled(Case("llama", "causal-lm", "ties-ca", "auto"))):
        made = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
        found.append([name for name, module in made.named_modules() if isinstance(module, LoraLayer)])
    assert found[0] == found[1] != []


def test_a_model_of_the_class_needs_the_plan() -> None:
    with pytest.raises(UserError, match=r"has no entry `camex`.*camex_ft.upcycle\(dense model\)"):
        model_classes.model_class(transformers.BertModel)(
            model_classes.config_class(transformers.BertConfig)()
        )
    with pytest.raises(ValueError, match="camex_vit"):  # transformers knows vit, no family does
        AutoConfig.for_model("camex_vit", camex={"merging": MERGING}, num_hidden_layers=1)


# -- loading


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_body_is_loaded_from_a_model_with_a_head(kind: str, tmp_path: Path) -> None:
    """llama's classifier makes its body by the class of its configuration: it is restructured once, not twice."""
    made = shake(upcycled(Case(kind, CLASSIFIER, "ties-ca", "auto")))
    made.save_pretrained(tmp_path)
    inputs = inputs_of(made, CLASSIFIER)
    with torch.no_grad():
        body = AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state
        assert torch.equal(body, made.base_model(**inputs).last_hidden_state)


def test_from_a_configuration_alone(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    made = HEADS[CLASSIFIER].from_config(config)
    assert (
        type(made).__name__ == "CamexBertForSequenceClassification"
        and type(config).model_type == "camex_bert"
    )
    assert {n: t.shape for n, t in made.state_dict().items()} == {
        n: t.shape for n, t in load(saved).state_dict().items()
    }


NEWER = (
    r"of format 2, written by camex_ft 9.9; this is camex_ft .* reads formats up to 1: install that version"
)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"format": 2, "versions": {"camex_ft": "9.9"}}, NEWER),
        ({"format": "1"}, r"is of format '1', written by camex_ft .* the file is damaged"),
        ({"format": -1}, r"is of format -1.* the file is damaged"),
        (
            {"merging": {"protocol": "gone"}},
            r"(?s)does not know: unknown protocol 'gone'.*It was written by camex_ft",
        ),
        (
            {"merging": {"sorcery": 1}, "versions": {}},
            r"(?s)sorcery.*by a version of camex_ft that does not say which",
        ),
        ({"upcycle": 3}, r"(?s)entry `camex`"),
    ],
    ids=["newer", "no number", "negative", "unknown protocol", "unknown key", "no section"],
)
def test_an_entry_that_this_version_does_not_read(entry: dict[str, Any], said: str, checkpoint: Path) -> None:
    edit(checkpoint, **entry)
    for read in (load, HEADS[CLASSIFIER].from_pretrained):
        with pytest.raises(UserError, match=said):
            read(checkpoint)


@pytest.mark.parametrize(
    "named", [["logging"], ["AutoModel"], [7], "CamexBert", ["GPT2LMHeadModel"], ["CamexNothing"]]
)
def test_an_architecture_that_is_none(named: Any, checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": named}))
    with pytest.raises(UserError, match=r"(?s)config.json is not usable|weights"):
        load(checkpoint)


def test_pickled_weights_are_not_read(checkpoint: Path) -> None:
    torch.save(load(checkpoint).state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError):
        load(checkpoint)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        HEADS[CLASSIFIER].from_pretrained(checkpoint)


# -- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = synthetic.backbone("bert", head=CLASSIFIER)
    model.name_or_path = model.config.name_or_path = "embedded/bert"
    adapters.save(upcycle(model, merging={**MERGING, "protocol": "domain-ca"}, tuning=LORA), folder)
    return folder


def test_an_adapter_is_loaded_by_the_auto_class(adapter: Path) -> None:
    made, expected = HEADS[CLASSIFIER].from_pretrained(adapter), load(adapter)
    ids = torch.tensor([[5, 6, 7]])
    assert type(made) is type(expected)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, expected(ids).logits)
    _, tokenizer = synthetic.backbone("bert", head=CLASSIFIER)
    (found,) = pipeline("text-classification", model=str(adapter), tokenizer=tokenizer)("the film")
    assert found["label"] in expected.config.label2id


@pytest.mark.parametrize("asked", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}])
def test_an_adapter_is_refused_with_what_is_for_whole_checkpoints(
    asked: dict[str, Any], adapter: Path
) -> None:
    with pytest.raises(
        UserError, match=rf"is an adapter, and {next(iter(asked))} is for .*camex_ft.load\(folder\)"
    ):
        HEADS[CLASSIFIER].from_pretrained(adapter, **asked)
    with pytest.raises(
        UserError, match=r"an adapter of a CamexBertForSequenceClassification, not of a CamexBertModel"
    ):
        AutoModel.from_pretrained(adapter)


# -- pipelines


def test_pipelines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="transformers")
    texts = ["the child praised the film", "the film"]
    model, tokenizer = synthetic.backbone("bert", head=CLASSIFIER)
    made = shake(upcycle(model, merging=MERGING))
    for part in (made, tokenizer):
        part.save_pretrained(tmp_path / "classifier")
    found = pipeline("text-classification", model=str(tmp_path / "classifier"), top_k=None)(
        texts, batch_size=2
    )
    with torch.no_grad():
        due = made(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1)
    # the same operations in float32, on rows that may be padded otherwise
    assert [sorted(one["score"] for one in row) for row in found] == [
        pytest.approx(sorted(row.tolist()), abs=1e-6) for row in due
    ]
    writer, tokenizer = synthetic.backbone("gpt2", head="causal-lm")
    made = shake(upcycle(writer, merging=MERGING))
    for part in (made, tokenizer):
        part.save_pretrained(tmp_path / "writer")
    write = pipeline("text-generation", model=str(tmp_path / "writer"))
    settings = {"max_new_tokens": 5, "do_sample": False}
    inputs = tokenizer(texts[0], return_tensors="pt")
    (row,) = made.generate(**inputs, **settings)  # type: ignore[operator]
    new = write(texts[0], return_full_text=False, **settings)[0]["generated_text"]
    assert new == tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_tokenizer_is_that_of_the_plain_type(family: str, tmp_path: Path) -> None:
    """Also where only the model's configuration says which it is."""
    model, tokenizer = synthetic.backbone(family, head="base")
    found = []
    for name, made in (("plain", model), ("upcycled", upcycle(model, merging=MERGING))):
        made.config.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").unlink()
        found.append(AutoTokenizer.from_pretrained(tmp_path / name))
    assert type(found[0]) is type(found[1])
    assert found[0]("the child praised")["input_ids"] == found[1]("the child praised")["input_ids"]


# -- when transformers is imported

SCRIPT = """
import sys
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification as Auto
folder = sys.argv[1]
for kind in (AutoConfig, AutoModel, Auto):
    try:
        kind.from_pretrained(folder)
    except ValueError as error:
        assert "model type `camex_bert` but Transformers does not recognize" in str(error), error
    else:
        raise AssertionError(kind)
import camex_ft
print(type(Auto.from_pretrained(folder)).__name__)
"""


def test_transformers_itself_knows_no_type_of_ours() -> None:
    """So it refuses them all where camex_ft was not imported."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not [kind for kind in CONFIG_MAPPING_NAMES if kind.startswith("camex")]


@pytest.mark.slow
def test_transformers_alone_refuses_it_and_camex_ft_may_be_imported_later(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.split() == ["CamexBertForSequenceClassification"], done.stderr


FIRST = """
import sys
import camex_ft
from transformers import AutoConfig, AutoModelForSequenceClassification
config = AutoConfig.from_pretrained(sys.argv[1])
import pickle
from camex_ft.upcycling.model_classes import CamexBertConfig, CamexBertForSequenceClassification
assert type(config) is pickle.loads(pickle.dumps(CamexBertConfig)) is CamexBertConfig
print(type(AutoModelForSequenceClassification.from_pretrained(sys.argv[1])).__name__)
"""
PLUGIN = """
from camex_ft.backbones.base import register
from camex_ft.backbones.layouts import bert_ffns, encoder_stack, one_stack

@register("megatron", model_types=("megatron-bert", "no-type-of-transformers"), masks=one_stack(encoder_stack))
def ffns(model):
    "Megatron-BERT: encoder."
    return bert_ffns(model)
"""
OF_PLUGIN = """
import camex_ft
from transformers import AutoModel, CONFIG_MAPPING
config = CONFIG_MAPPING["camex_megatron-bert"]
print(config.__name__, AutoModel._model_mapping[config].__name__)
"""


def run(code: str, *arguments: str, plugins: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CAMEX_FT_PLUGINS": plugins}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)


@pytest.mark.slow
def test_camex_ft_may_be_imported_first(saved: Path) -> None:
    done = run(FIRST, str(saved))
    assert done.stdout.split() == ["CamexBertForSequenceClassification"], done.stderr


def test_families_of_plug_ins_are_registered_too(tmp_path: Path) -> None:
    (tmp_path / "megatron.py").write_text(PLUGIN)
    done = run(OF_PLUGIN, plugins=str(tmp_path))
    assert done.stdout.split() == ["CamexMegatronBertConfig", "CamexMegatronBertModel"], done.stderr


def test_a_plug_in_that_cannot_be_imported_is_warned_of(tmp_path: Path) -> None:
    done = run("import camex_ft; print('imported')", plugins=str(tmp_path / "none"))
    assert done.stdout.split() == ["imported"] and "CAMEX_FT_PLUGINS names" in done.stderr


def test_nothing_hooks_into_imports_or_changes_the_class_of_an_object() -> None:
    for file in sorted(Path(hf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("meta_path", "path_hooks"), f"{file}:{node.lineno}"
                assert node.attr != "__class__" or isinstance(node.ctx, ast.Load), f"{file}:{node.lineno}"


def test_a_copy_of_a_configuration_upcycles_nothing() -> None:
    made = upcycled(Case("bert", "base", "ties-ca", "auto"))
    again = copy.deepcopy(made.config)
    again.vocab_size = VOCABULARY + 1
    assert type(again) is type(made.config) and made.config.vocab_size == VOCABULARY
