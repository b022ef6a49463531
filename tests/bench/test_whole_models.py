"""`camex-ft bench step` and `decode`: the models at their published sizes, a step, fed tokens, and the figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.bench import whole_models
from camex_ft.bench.settings import PUBLISHED, DecodeBench, StepBench
from camex_ft.bench.whole_models import (
    Decoding,
    TrainingStep,
    bench_decode,
    bench_step,
    dense_model,
    upcycled,
)
from camex_ft.upcycling import cached, expert_layers, routing_context
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import EMBEDDED

FIGURES = {
    "dense_step_s",
    "step_s",
    "ratio_dense",
    "peak_rss_gb",
    "building_peak_rss_gb",
    "parameters",
    "times",
}


def tiny(**given: Any) -> StepBench:
    defaults = {"backbone": "embedded/t5", "batch": 2, "length": 6, "experts": 2, "repeats": 2}
    return StepBench(**{**defaults, **given})


# -- backbones --------------------------------------------------------------------------------------------------------

# As published, without a head; and the head for two classes.
PARAMETERS = {
    "t5-base": 222_903_552 + (768 * 768 + 768) + (768 * 2 + 2),
    "gpt2": 124_439_808 + 768 * 2,
    "bert-base-uncased": 109_482_240 + (768 * 2 + 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_backbone_has_its_number_of_parameters(name):
    with torch.device("meta"):
        assert whole_models.build(name).num_parameters() == PARAMETERS[name]


def test_t5_base_with_eight_experts_has_over_a_billion():
    with torch.device("meta"):
        made = upcycled(whole_models.build("t5-base"), StepBench())
    assert len(expert_layers(made)) == 24
    assert 1.1e9 < made.num_parameters() < 1.2e9


@pytest.mark.parametrize("family", EMBEDDED.names())
def test_every_embedded_family_takes_a_step(family):
    settings = tiny(backbone=f"embedded/{family}")
    dense = dense_model(settings)
    model = upcycled(dense, settings)
    for each in (dense, model):
        before = [p.detach().clone() for p in each.parameters()]
        TrainingStep(each, settings)()
        assert any(not torch.equal(p, old) for p, old in zip(each.parameters(), before, strict=True))
        assert all(p.grad is None for p in each.parameters())
        assert all(p.isfinite().all() for p in each.parameters())


@pytest.mark.parametrize("family", EMBEDDED.names())
def test_inputs_are_words_without_padding_on_all_positions(family):
    model = whole_models.build(f"embedded/{family}")
    config: Any = model.config
    given = whole_models.inputs(model, batch=3, length=20)
    ids = given["input_ids"]
    assert ids.shape == given["attention_mask"].shape == (3, 20)
    assert given["attention_mask"].all()
    assert (ids != config.pad_token_id).all()
    if config.model_type == "t5":
        assert (ids == config.eos_token_id).nonzero().tolist() == [[0, 19], [1, 19], [2, 19]]
    assert torch.equal(ids, whole_models.inputs(model, batch=3, length=20)["input_ids"])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_all_positions_can_be_used_and_no_more(family):
    model = whole_models.build(f"embedded/{family}")
    with pytest.raises(UserError, match=r"--length is 100000: \w+ has (\d+) positions") as told:
        whole_models.inputs(model, batch=1, length=100_000)
    limit = int(str(told.value).split("has ")[1].split()[0])
    model(**whole_models.inputs(model, batch=1, length=limit))
    with pytest.raises(UserError):
        whole_models.inputs(model, batch=1, length=limit + 1)


# -- a step -----------------------------------------------------------------------------------------------------------


def test_all_layers_have_experts_that_differ_from_the_base():
    model = upcycled(dense_model(tiny(top_k=1)), tiny(top_k=1))
    layers = expert_layers(model).values()
    assert len(layers) == 4
    for each in layers:
        assert (each.settings.experts, each.settings.top_k, each.settings.rank) == (2, 1, 1)
        assert not torch.equal(each.up.experts[0], each.up.base)
        assert each.training


def test_the_loss_is_the_models_and_the_balance_losses():
    settings = tiny(backbone="embedded/t5")
    model = upcycled(dense_model(settings), settings)
    taken = TrainingStep(model, settings)
    torch.manual_seed(0)  # of the routing noise
    total = taken.loss()
    balance = routing_context(model).last.balance_loss()
    torch.manual_seed(0)
    own = model(**taken.batch).loss
    assert balance > 0
    torch.testing.assert_close(total, own + balance)


def test_the_number_format_is_that_of_parameters():
    model = dense_model(tiny(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    TrainingStep(upcycled(model, tiny(dtype="bfloat16")), tiny())()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures(monkeypatch):
    monkeypatch.setattr(whole_models, "in_child", lambda function, *given: function(*given))
    figures = bench_step(tiny(protocol="smear"))
    assert set(figures) == FIGURES
    assert list(figures["times"]) == ["dense", "upcycled"]
    assert {len(each) for each in figures["times"].values()} == {2}
    assert figures["ratio_dense"] == figures["step_s"] / figures["dense_step_s"]
    assert 0.05 < figures["peak_rss_gb"] < 20
    assert figures["parameters"]["upcycled"] > figures["parameters"]["dense"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "step", *arguments])


def test_the_record_is_shown_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_models, "in_child", lambda function, *given: function(*given))
    small = [
        "--backbone",
        "embedded/bert",
        "--batch",
        "2",
        "--length",
        "6",
        "--experts",
        "2",
        "--repeats",
        "1",
    ]
    shown = json.loads(invoke(*small, "--json", "--save", str(tmp_path)).stdout)
    assert set(shown) == FIGURES | {"kind", "settings", "machine"}
    assert shown["settings"]["backbone"] == "embedded/bert"
    (file,) = tmp_path.iterdir()
    assert file.name == "step-ties-ca-embedded-bert-b2-l6-n2-k2-r1-float32-cpu.json"
    table = invoke(*small, "--no-save").output
    rows = [line.split()[0] for line in table.splitlines() if line]
    assert [row for row in rows if row in ("dense", "upcycled")] == ["dense", "upcycled"]
    assert "peak_rss_gb: " in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbone", "t5-bas"], "Did you mean 't5-base'?"),
        (["--backbone", "embedded/brt"], "Did you mean 'embedded/bert'?"),
        (["--protocol", "dense"], "the dense model, which dense keeps"),
        (["--protocol", "tie-ca"], "Did you mean 'ties-ca'?"),
        (["--experts", "1"], "--experts is 1"),
        (["--length", "0"], "--length is 0"),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_user_error(arguments, words, monkeypatch):
    monkeypatch.setattr(whole_models, "in_child", lambda *_: pytest.fail("measured"))
    error = invoke(*arguments, "--no-save").exception
    assert isinstance(error, UserError)
    assert words in str(error)


# -- decoding ---------------------------------------------------------------------------------------------------------

DECODING_FIGURES = {"dense_step_s", "step_s", "ratio_dense", "first_token_s", "merging_a_token_s", "times"}


def tiny_decode(**given: Any) -> DecodeBench:
    defaults = {
        "backbone": "embedded/gpt2",
        "length": 10,
        "tokens": 3,
        "segment": 8,
        "experts": 2,
        "repeats": 2,
    }
    return DecodeBench(**{**defaults, **given})


@pytest.mark.parametrize("same", [False, True])
def test_rows_share_a_merged_expert_where_they_share_a_prompt(same):
    settings = tiny_decode(batch=4, same_prompt=same, experts=4)
    decoding = Decoding(upcycled(dense_model(settings), settings), settings)
    with cached(decoding.model):
        decoding()
    merged = [layer.merged for layer in decoding.cache.layers[-1].state.layers.values()]
    assert [len(experts.keys) for experts in merged] == [1 if same else 4] * 2


def test_every_repeat_begins_at_the_end_of_the_prompt():
    settings = tiny_decode(batch=2)
    for model in (dense_model(settings), upcycled(dense_model(settings), settings)):
        decoding = Decoding(model, settings)
        seen = []
        model.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output.logits))
        for _ in range(2):
            decoding()
            assert decoding.cache.get_seq_length() == 13
            decoding.back()
            assert decoding.cache.get_seq_length() == 10
        torch.testing.assert_close(torch.stack(seen[:3]), torch.stack(seen[3:]))


def test_decoding_figures():
    figures = bench_decode(tiny_decode())
    assert set(figures) == DECODING_FIGURES
    assert figures["ratio_dense"] == figures["step_s"] / figures["dense_step_s"]
    assert {len(each) for each in figures["times"].values()} == {2}


def invoke_decode(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "decode", *arguments])


def test_the_decoding_record_is_shown_and_saved(tmp_path):
    small = [
        "--backbone",
        "embedded/llama",
        "--length",
        "10",
        "--tokens",
        "2",
        "--segment",
        "8",
        "--repeats",
        "1",
    ]
    shown = json.loads(invoke_decode(*small, "--json", "--save", str(tmp_path)).stdout)
    assert set(shown) == DECODING_FIGURES | {"kind", "settings", "machine"}
    (file,) = tmp_path.iterdir()
    assert file.name == "decode-ties-ca-embedded-llama-b1-l10-t8-n8-k8-r1-float32-cpu.json"
    table = invoke_decode(*small, "--no-save", "--same-prompt").output
    assert [
        w for line in table.splitlines() if line for w in line.split()[:1] if w in ("dense", "upcycled")
    ] == [
        "dense",
        "upcycled",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "6", "--length", "10", "--segment", "8"], "segment of 8 has 6 tokens left"),
        (["--protocol", "dense"], "the dense model, which dense keeps"),
        (["--backbone", "bert-base-uncased"], "has no head 'causal-lm'"),
        (["--backbone", "embedded/bert"], "has no head 'causal-lm'"),
    ],
    ids=" ".join,
)
def test_bad_decoding_input_is_a_user_error(arguments, words):
    error = invoke_decode(*arguments, "--no-save").exception
    assert isinstance(error, UserError)
    assert words in str(error)
