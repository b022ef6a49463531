"""Upcycling: what is copied, what is new, which granularity, what is trained; loading; generation.

That the function is preserved, and that saving and loading changes no logit, are invariants 1 and 8.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.config import MergingConfig, RoutingConfig, UpcycleConfig
from camex_ft.moe.layers.ffn import MergedFFN, MixtureFFN
from camex_ft.upcycling import expert_layers, freeze, granularity_of, load, routing_context, upcycle
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import MERGING, dense, shake
from tests.helpers.tiny import LAYERS, VOCABULARY, inputs_of, make

CLASSIFIER = "sequence-classification"


def upcycled(model_type: str = "bert", head: str = CLASSIFIER, **sections: Any) -> PreTrainedModel:
    return upcycle(dense(model_type, head), **{"merging": MERGING, **sections}).eval()


def routers(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".router." in n}


# -- what is copied and what is new


def test_upcycling_twice_is_refused() -> None:
    with pytest.raises(UserError, match="has experts already: upcycle the dense model"):
        upcycle(upcycled(), merging=MERGING)


def test_the_dense_model_is_left_as_it_is() -> None:
    original = make("gpt2", "causal-lm", {})
    before = {n: p.clone() for n, p in original.state_dict().items()}
    shape = [(n, type(m)) for n, m in original.named_modules()]
    made = upcycle(original, merging=MERGING)
    shake(made)
    assert [(n, type(m)) for n, m in original.named_modules()] == shape
    assert all(torch.equal(p, before[n]) for n, p in original.state_dict().items())
    assert getattr(original.config, "camex", None) is None
    assert not {p.data_ptr() for p in original.parameters()} & {p.data_ptr() for p in made.parameters()}


def test_dense_has_no_experts() -> None:
    made = upcycled(merging={"protocol": "dense"})
    assert not expert_layers(made) and routing_context(made) is None
    assert getattr(made.config, "camex", None) is None
    inputs = inputs_of(made, CLASSIFIER)
    assert torch.equal(made(**inputs).logits, dense("bert", CLASSIFIER)(**inputs).logits)
    upcycle(made, merging=MERGING)  # it is still dense, so it may get experts


def test_the_seed_is_that_of_the_new_parameters() -> None:
    before = torch.get_rng_state()
    one, same, other = (routers(upcycled(seed=s, upcycle={"init": "noise"})) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global random state was changed"
    assert all(torch.equal(p, same[n]) for n, p in one.items())
    gates = [n for n in one if n.endswith("gate")]
    assert len(gates) == LAYERS and not any(torch.equal(one[n], other[n]) for n in gates)
    assert not torch.equal(one[gates[0]], one[gates[1]])


def test_noise_sets_experts_apart_by_a_fraction_of_the_weights() -> None:
    made = upcycled(upcycle={"init": "noise", "noise": 0.5})
    plain = upcycled()
    for name, layer in expert_layers(made).items():
        for linear, before in (
            (layer.up, expert_layers(plain)[name].up),
            (layer.down, expert_layers(plain)[name].down),
        ):
            assert torch.equal(linear.base, before.base)
            added = linear.experts - before.experts
            # about 300 draws: the standard error of a standard deviation is 1 / sqrt(600) = 0.04 of it; five of them
            assert (added.std() / before.base.std()).item() == pytest.approx(0.5, rel=0.2)
            assert not torch.equal(added[0], added[1])
            assert (linear.expert_bias != before.expert_bias).all()


def test_the_mode_and_dtype_of_the_model_stay() -> None:
    model = make("bert", CLASSIFIER, {}).to(torch.bfloat16).train()
    made = upcycle(model, merging=MERGING)
    layer = next(iter(expert_layers(made).values()))
    assert layer.training and layer.up.experts.dtype == layer.up.curvature.a1.dtype == torch.bfloat16
    assert not next(iter(expert_layers(upcycled()).values())).training


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2]), ("every_other", [0, 2]), ([2, 0], [0, 2]), ([1], [1])],
)
def test_layers_are_those_asked_for(layers: Any, expected: list[int]) -> None:
    made = upcycled(upcycle={"layers": layers})
    assert list(expert_layers(made)) == [f"bert.encoder.layer.{i}.intermediate" for i in expected]
    assert made.config.camex["upcycle"]["layers"] == layers


def test_both_stacks_count() -> None:
    found = list(expert_layers(upcycled("t5", upcycle={"layers": [1, LAYERS]})))
    assert ["encoder" in n for n in found] == [True, False]


@pytest.mark.parametrize(("protocol", "kind"), [("smoe", MixtureFFN), ("ties", MergedFFN)])
def test_the_form_of_the_protocol_decides_the_layer(protocol: str, kind: type) -> None:
    made = upcycled(merging={"protocol": protocol, "experts": 3, "options": {}})
    assert all(type(layer) is kind for layer in expert_layers(made).values())
    assert len(expert_layers(made)) == LAYERS


def test_sections_may_be_mappings_or_configurations() -> None:
    sections = {
        "merging": MergingConfig(protocol="ties", experts=4, top_k=2, options={"density": 0.5}),
        "routing": RoutingConfig(granularity="token", balance=0.5, noise=False),
        "upcycle": UpcycleConfig(layers=(1,)),
    }
    one = upcycled(**sections)
    two = upcycled(**{k: v.model_dump() for k, v in sections.items()})
    assert one.config.camex == two.config.camex
    json.dumps(one.config.camex)
    (layer,) = expert_layers(one).values()
    found = layer.settings
    assert (found.experts, found.top_k, found.balance, found.noise) == (4, 2, 0.5, False)
    assert found.grouping.granularity == "token" and found.rule.multiplier.function.keywords == {
        "density": 0.5
    }


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"merging": {"protocol": "tiess"}}, "Did you mean 'ties'"),
        ({"merging": {"experts": 1}}, "expected at least 2 experts"),
        ({"merging": {"experts": 2, "top_k": 3}}, "top_k is 3"),
        ({"merging": {"alpha": -1.0}}, "alpha"),
        ({"merging": {"expert": 2}}, "expert"),
        ({"routing": {"granularity": "word"}}, "granularity"),
        ({"upcycle": {"layers": [7]}}, "no layer 7"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        upcycled(**sections)


def test_an_unknown_backbone_is_refused() -> None:
    from transformers import OPTConfig, OPTModel

    small = OPTConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        ffn_dim=8,
        num_attention_heads=2,
        word_embed_proj_dim=8,
    )
    with pytest.raises(UserError, match=r"unknown backbone type 'opt'.*camex_ft/backbones/families/opt.py"):
        upcycle(OPTModel(small), merging=MERGING)


# -- granularity


@pytest.mark.parametrize(
    ("model_type", "head", "stack", "protocol", "asked", "expected"),
    [
        ("bert", CLASSIFIER, "encoder", "ties", "auto", "sequence"),
        ("gpt2", CLASSIFIER, "decoder", "ties", "auto", "sequence"),
        ("gpt2", "causal-lm", "decoder", "ties", "auto", "segment"),
        ("t5", CLASSIFIER, "decoder", "ties", "auto", "sequence"),
        ("t5", "seq2seq-lm", "encoder", "ties", "auto", "sequence"),
        ("t5", "seq2seq-lm", "decoder", "ties", "auto", "encoder"),
        ("t5", "seq2seq-lm", "encoder", "ties", "encoder", "sequence"),
        ("t5", CLASSIFIER, "decoder", "ties", "encoder", "encoder"),
        ("t5", "seq2seq-lm", "encoder", "ties", "sequence", "sequence"),
        ("gpt2", "causal-lm", "decoder", "ties", "token", "token"),
        ("bert", CLASSIFIER, "encoder", "ties", "segment", "segment"),
        ("bert", CLASSIFIER, "encoder", "smoe", "auto", "token"),
        ("t5", "seq2seq-lm", "decoder", "smoe", "auto", "token"),
    ],
)
def test_granularity(
    model_type: str, head: str, stack: str, protocol: str, asked: str, expected: str
) -> None:
    routing = RoutingConfig.model_validate({"granularity": asked})
    found = granularity_of(PROTOCOLS.get(protocol), routing, stack=stack, model=dense(model_type, head))
    assert found == expected


@pytest.mark.parametrize(
    ("model_type", "head", "stack", "protocol", "asked", "said"),
    [
        ("gpt2", "causal-lm", "decoder", "ties", "sequence", "would let tokens of GPT2LMHeadModel"),
        ("t5", "seq2seq-lm", "decoder", "ties", "sequence", "routed by their future"),
        ("bert", CLASSIFIER, "encoder", "ties", "encoder", "BertForSequenceClassification has one stack"),
        ("gpt2", "causal-lm", "decoder", "smoe", "segment", "smoe does not allow segment; it allows token"),
    ],
)
def test_granularities_that_cannot_be(
    model_type: str, head: str, stack: str, protocol: str, asked: str, said: str
) -> None:
    routing = RoutingConfig.model_validate({"granularity": asked})
    with pytest.raises(UserError, match=said):
        granularity_of(PROTOCOLS.get(protocol), routing, stack=stack, model=dense(model_type, head))


# -- what is trained


def test_full_trains_everything() -> None:
    made = upcycled()
    freeze(made, "full")
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_experts_trains_expert_layers_and_head(model_type: str) -> None:
    made = upcycled(model_type)
    freeze(made, "experts")
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    layers = tuple(expert_layers(made))
    head = tuple(n for n, _ in made.named_children() if n != made.base_model_prefix)
    assert head and trained == {n for n, _ in made.named_parameters() if n.startswith((*layers, *head))}
    assert len(trained) < len(list(made.parameters()))


@pytest.mark.parametrize(
    ("model_type", "head", "tied"),  # transformers ties T5's always
    [
        ("t5", "seq2seq-lm", True),
        ("gpt2", "causal-lm", True),
        ("gpt2", "causal-lm", False),
        ("llama", "causal-lm", True),
        ("llama", "causal-lm", False),
    ],
)
def test_a_language_modelling_head_is_trained_unless_it_is_tied(
    model_type: str, head: str, tied: bool
) -> None:
    given = make(model_type, head, {"tie_word_embeddings": tied})
    made = upcycle(given, merging={"protocol": "smear", "experts": 2})
    freeze(made, "experts")
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    own = tuple(expert_layers(made)) + (() if tied else ("lm_head",))
    assert trained == {n for n, _ in made.named_parameters() if n.startswith(own)}
    assert any(n.startswith("lm_head") for n in trained) is not tied


def test_experts_of_a_dense_model_cannot_be_trained() -> None:
    with pytest.raises(UserError, match=r"tuning.mode: experts needs layers with experts"):
        freeze(dense("bert", CLASSIFIER), "experts")


# -- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    upcycled().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint folder to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_loading_needs_no_upcycling(checkpoint: Path) -> None:
    made = load(checkpoint)
    assert not made.training and list(expert_layers(made)) and routing_context(made) is not None
    with pytest.raises(UserError, match="has experts already"):
        upcycle(made)


def test_dense_checkpoints_load_too(tmp_path: Path) -> None:
    dense("bert", CLASSIFIER).save_pretrained(tmp_path)
    assert not expert_layers(load(tmp_path))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere: expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a checkpoint folder: it has no config.json$"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "nonsense"}'])
def test_a_config_that_is_not_usable(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"its config.json (is not usable|cannot be read)"):
        load(checkpoint)


def test_an_unknown_architecture(checkpoint: Path) -> None:
    config(checkpoint, architectures=["BertForMindReading"])
    with pytest.raises(UserError, match=r"config.json is not usable: .*BertForMindReading"):
        load(checkpoint)


def test_an_unknown_protocol_of_a_checkpoint(checkpoint: Path) -> None:
    camex = json.loads((checkpoint / "config.json").read_text())["camex"]
    camex["merging"]["protocol"] = "gone"
    config(checkpoint, camex=camex)
    with pytest.raises(UserError, match="unknown protocol 'gone'"):
        load(checkpoint)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_weights(checkpoint: Path, size: int) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: size if size >= 0 else len(whole) // 2])
    with pytest.raises(UserError, match="its weights cannot be read"):
        load(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its weights cannot be read"):
        load(checkpoint)


GATE = "bert.encoder.layer.0.intermediate.router.gate"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(GATE),
        lambda t: t.update({GATE: torch.zeros(2, 2)}),
        lambda t: t.update({GATE + "s": t.pop(GATE)}),
        lambda t: t.update({GATE.replace("layer.0", "layer.9"): t[GATE].clone()}),
    ],
    ids=["missing", "other shape", "other name", "one more"],
)
def test_weights_that_do_not_match(checkpoint: Path, change: Any) -> None:
    weights(checkpoint, change)
    with pytest.raises(
        UserError, match=r"incomplete or of another model: \d+ weights do not match.*router.gate"
    ):
        load(checkpoint)


def test_a_checkpoint_of_other_settings_does_not_match(checkpoint: Path) -> None:
    camex = json.loads((checkpoint / "config.json").read_text())["camex"]
    camex["upcycle"]["layers"] = [0]
    config(checkpoint, camex=camex)
    with pytest.raises(UserError, match="incomplete or of another model"):
        load(checkpoint)


# -- gradient checkpointing


def gradients(model_type: str, *, checkpointing: bool) -> dict[str, Tensor]:
    """Two forward passes with different masks, then one backward pass through both, with noise and dropout."""
    made = upcycled(model_type, merging={**MERGING, "protocol": "dare-ca", "top_k": 2}).train()
    if checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_of(made, CLASSIFIER)
    context = routing_context(made)
    torch.manual_seed(0)
    total = torch.zeros(())
    for ids, mask in ((0, 1), (1, 0)):
        one = {k: v[[ids, mask]] for k, v in inputs.items()}  # the rows change places, and so do their masks
        total = total + made(**one).logits.square().sum() + context.last.balance_loss()
    total.backward()
    return {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_no_gradient(model_type: str) -> None:
    plain, again = (gradients(model_type, checkpointing=c) for c in (False, True))
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        # the same operations on the same numbers, in the same order but for sums over the two passes
        torch.testing.assert_close(
            again[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name
        )


def test_reentrant_checkpointing_is_refused() -> None:
    made = upcycled("llama").train()
    made.activation_checkpointing_enable({"use_reentrant": True})
    made.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing would lose the balance loss"):
        made(**inputs_of(made, CLASSIFIER))
    assert routing_context(made).active is None


@pytest.mark.parametrize(
    ("model_type", "head", "granularity"),
    [
        ("t5", "seq2seq-lm", "auto"),
        ("t5", "seq2seq-lm", "segment"),
        ("gpt2", "causal-lm", "auto"),
        ("llama", "causal-lm", "auto"),
    ],
)
def test_what_generates_trains_with_gradient_checkpointing(
    model_type: str, head: str, granularity: str
) -> None:
    """What runs again in the backward pass, after the forward pass is over, is routed as it was."""
    made = upcycle(
        dense(model_type, head),
        merging={"protocol": "ties-ca", "experts": 3},
        routing={"granularity": granularity, "segment": 3},
    ).train()
    inputs = {k: v for k, v in inputs_of(made, head).items() if not k.startswith("decoder")}

    def gradients() -> dict[str, torch.Tensor]:
        made.zero_grad()
        torch.manual_seed(0)
        made(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}

    plain = gradients()
    made.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    assert [n for n, grad in plain.items() if not torch.equal(grad, again[n])] == []


# -- generation


def prompt(length: int) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    return ids


def generator(model_type: str, head: str, **routing: Any) -> PreTrainedModel:
    made = upcycle(dense(model_type, head), merging=MERGING, routing={"segment": 3, **routing}).eval()
    shake(made)
    made.generation_config.eos_token_id = None  # every sequence gets its full length
    return made


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("granularity", ["segment", "token"])
def test_greedy_generation_is_the_argmax_of_full_passes(model_type: str, granularity: str) -> None:
    made = generator(model_type, "causal-lm", granularity=granularity)
    expected = prompt(4)
    found = made.generate(
        expected,
        max_new_tokens=5,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for scores in found.scores:
        with torch.no_grad():
            logits = made(input_ids=expected).logits[:, -1]
        # float32, logits of about 10
        torch.testing.assert_close(scores, logits, rtol=1e-5, atol=1e-5)
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found.sequences, expected)
    assert len(found.scores) == 5


def test_the_encoder_s_routing_is_the_input_s(tmp_path: Path) -> None:
    """A decoder given encoder outputs is routed by them, as by the encoder itself."""
    made = generator("t5", "seq2seq-lm")
    inputs = {**inputs_of(made, "seq2seq-lm")}
    with torch.no_grad():
        whole = made(**inputs).logits
        encoded = made.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        ids = inputs.pop("input_ids")
        again = made(**inputs, encoder_outputs=encoded).logits
        other = made(**inputs, encoder_outputs=(encoded[0].roll(1, 0),)).logits
    assert torch.equal(again, whole)
    assert not torch.allclose(other, whole) and len(ids) == 2
