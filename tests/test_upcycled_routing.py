"""Routers and ways to upcycle in whole models: refused, preserved, saved, checkpointed, generating."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from camex_ft.upcycling import expert_layers, load, routing_context, upcycle
from camex_ft.utils.errors import FunctionChanged, UserError
from tests.helpers.invariant_cases import dense, shake
from tests.helpers.tiny import gradients_twice, inputs_of

CLASSIFIER = "sequence-classification"
CHOICE = {"router": "expert-choice"}
SMOE = {"protocol": "smoe", "experts": 3, "top_k": 1}
SMEAR = {"protocol": "smear", "experts": 3, "top_k": 2}
OPTIONS = [
    (SMEAR, {"router": "cosine", "temperature": 0.5, "z_loss": 0.1}),
    (SMEAR, {"normalise": "before", "temperature": 2.0}),
    (SMOE, {**CHOICE, "z_loss": 0.1}),
]


def upcycled(model_type: str = "bert", head: str = CLASSIFIER, **sections: Any) -> PreTrainedModel:
    changed = any(word in str(sections) for word in ("'before'", "'init': 'drop'"))
    with pytest.warns(FunctionChanged) if changed else contextlib.nullcontext():
        return upcycle(dense(model_type, head), **{"merging": SMOE, **sections}).eval()


@pytest.mark.parametrize(
    ("model_type", "head", "sections", "said"),
    [
        ("bert", CLASSIFIER, {"merging": SMEAR, "routing": CHOICE}, "smear merges weights: use it with smoe"),
        (
            "gpt2",
            "causal-lm",
            {"routing": CHOICE},
            "GPT2LMHeadModel, which generates, be routed by their future",
        ),
        ("t5", "seq2seq-lm", {"routing": CHOICE}, "T5ForConditionalGeneration, which generates"),
        ("bert", CLASSIFIER, {"routing": {"temperature": 0.0}}, "temperature"),
        ("bert", CLASSIFIER, {"routing": {"router": "cos"}}, "router"),
        ("bert", CLASSIFIER, {"upcycle": {"drop": 2.0}}, "drop"),
    ],
)
def test_what_cannot_be_is_refused(model_type: str, head: str, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        upcycled(model_type, head, **sections)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_expert_choice_preserves_the_function(model_type: str) -> None:
    made, plain = upcycled(model_type, routing=CHOICE), dense(model_type, CLASSIFIER)
    inputs = inputs_of(made, CLASSIFIER)
    torch.testing.assert_close(made(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-5)


def test_expert_choice_of_an_encoder_whose_decoder_generates() -> None:
    made = upcycled("t5", "seq2seq-lm", routing=CHOICE, upcycle={"layers": [0, 2]})
    assert {layer.stack for layer in expert_layers(made).values()} == {"encoder"}
    shake(made)
    prompt = inputs_of(made, "seq2seq-lm")["input_ids"][:1]
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(made.generate(prompt, **given), made.generate(prompt, use_cache=False, **given))


def test_expert_choice_sees_neither_neighbours_nor_padding() -> None:
    made = shake(upcycled(routing=CHOICE)).double()
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    alone = made(input_ids=ids[:1], attention_mask=torch.ones(1, 6)).logits
    padded = torch.nn.functional.pad(ids, (0, 4), value=3)
    mask = torch.ones(3, 10)
    mask[0, 6:] = 0
    torch.testing.assert_close(
        made(input_ids=padded, attention_mask=mask).logits[:1], alone, rtol=0, atol=1e-9
    )
    assert routing_context(made).last.balance_loss() == 0


@pytest.mark.parametrize(("merging", "routing"), OPTIONS)
def test_a_saved_model_is_routed_as_before(
    merging: dict[str, Any], routing: dict[str, Any], tmp_path: Path
) -> None:
    made = shake(upcycled(merging=merging, routing=routing))
    made.save_pretrained(tmp_path)
    inputs = inputs_of(made, CLASSIFIER)
    assert torch.equal(load(tmp_path)(**inputs).logits, made(**inputs).logits)


@pytest.mark.parametrize(("merging", "routing"), OPTIONS)
def test_gradient_checkpointing_changes_no_gradient(merging: dict[str, Any], routing: dict[str, Any]) -> None:
    made = shake(upcycled(merging=merging, routing=routing)).train()
    plain, again = gradients_twice(made, inputs_of(made, CLASSIFIER))
    assert plain.keys() == again.keys()
    assert [n for n, grad in plain.items() if not torch.equal(grad, again[n])] == []
    assert all(plain[n].any() for n in plain if n.endswith(("router.gate", "log_temperature")))


@pytest.mark.parametrize(
    ("model_type", "head", "granularity"),
    [("gpt2", "causal-lm", "segment"), ("llama", "causal-lm", "token"), ("t5", "seq2seq-lm", "encoder")],
)
@pytest.mark.parametrize("routing", [OPTIONS[0][1], OPTIONS[1][1]])
def test_generating_with_a_cache_is_generating_without(
    model_type: str, head: str, granularity: str, routing: dict[str, Any]
) -> None:
    given = {**routing, "granularity": granularity, "segment": 3}
    made = shake(upcycled(model_type, head, merging=SMEAR, routing=given)).double()
    prompt = inputs_of(made, head)["input_ids"][:1]
    asked = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "output_logits": True}
    one, two = (
        made.generate(prompt, use_cache=c, return_dict_in_generate=True, **asked) for c in (True, False)
    )
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("init", ["noise", "drop"])
def test_experts_are_set_apart_once(init: str, tmp_path: Path) -> None:
    """By the seed of upcycling; loading draws nothing, and finds them as they were saved."""
    made, same, other = (upcycled("t5", upcycle={"init": init}, seed=s) for s in (3, 3, 4))
    first = {n: p for n, p in made.named_parameters() if n.endswith(".experts")}
    assert first and all(torch.equal(p, dict(same.named_parameters())[n]) for n, p in first.items())
    assert not any(torch.equal(p, dict(other.named_parameters())[n]) for n, p in first.items())
    assert all(not torch.equal(p[0], p[1]) for p in first.values())
    made.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in first.items())
    assert loaded.config.camex["upcycle"]["init"] == init


def test_loading_draws_no_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upcycled(upcycle={"init": "drop"}).save_pretrained(tmp_path)
    monkeypatch.setattr("camex_ft.upcycling.expert_init.drop_units", lambda *_: pytest.fail("drawn again"))
    load(tmp_path)


def test_base_experts_are_not_dropped() -> None:
    made = upcycled(merging={"protocol": "domain", "experts": 3}, upcycle={"init": "drop", "drop": 1.0})
    plain = upcycled(merging={"protocol": "domain", "experts": 3})
    for name, layer in expert_layers(made).items():
        assert torch.equal(layer.up.base, expert_layers(plain)[name].up.base)
        assert (layer.up.experts != layer.up.base).all()
