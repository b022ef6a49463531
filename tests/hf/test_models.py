"""What transformers checks of every model of its own, for upcycled ones: of every family, and of every form of merging.

Generation with and without a cache, padding, tied heads and adapters have tests elsewhere.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.backbones.heads import HEADS, has_head
from camex_ft.upcycling import expert_layers, load, model_classes
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import Case, dense, output, shake, upcycled
from tests.helpers.tiny import HIDDEN, LAYERS, VOCABULARY, family_names, gradients_twice, inputs_of

CLASSIFIER, LANGUAGE = "sequence-classification", ("seq2seq-lm", "causal-lm", "masked-lm")
FIRST = {name: registry.BACKBONES.get(name).model_types[0] for name in family_names()}
OTHER_FORMS = [(kind, protocol) for kind in ("bert", "gpt2", "t5") for protocol in ("smoe", "namex")]
DEFAULT = [
    ("bert", "smoe"),
    ("gpt2", "namex"),
    ("t5", "ties-ca"),
    ("llama", "ties-ca"),
]  # every form, both stacks
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow, id="-".join(case))
    for case in [*((kind, "ties-ca") for kind in FIRST.values()), *OTHER_FORMS]
]


@cache
def model_of(kind: str, protocol: str, head: str = CLASSIFIER) -> PreTrainedModel:
    """Return a model with shaken parameters; shared, so it is not to be changed."""
    return shake(upcycled(Case(kind, head, protocol, "auto")))


def language_head(kind: str) -> str:
    config = type(dense(kind, CLASSIFIER).config)
    return next(head for head in LANGUAGE if has_head(config, head))


@torch.no_grad()
def logits(model: PreTrainedModel, head: str = CLASSIFIER) -> Tensor:
    return output(model, inputs_of(model, head))


def shapes(value: Any) -> Any:
    """Return the shapes of an output's tensors, in its own nesting."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(part) for key, part in value.items() if key != "past_key_values"}
    return [shapes(part) for part in value] if isinstance(value, (tuple, list)) else type(value)


@pytest.mark.parametrize(
    ("kind", "protocol", "head"),
    [
        *(pytest.param(*case.values, "base", marks=case.marks, id=case.id) for case in CASES),
        ("gpt2", "ties-ca", CLASSIFIER),
    ],
)
def test_hidden_states_and_attentions_are_those_of_the_dense_model(
    kind: str, protocol: str, head: str
) -> None:
    """In number, place and shape; under a head, and as a model without one, whose class is then the body's."""
    made, plain = copy.deepcopy(model_of(kind, protocol, head)), copy.deepcopy(dense(kind, head))
    for model in (made, plain):
        model.set_attn_implementation("eager")  # which alone returns attentions
    inputs = inputs_of(made, head)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found, due = made(**inputs, **asked), plain(**inputs, **asked)
        listed = made(**inputs, **asked, return_dict=False)
    assert shapes(dict(found)) == shapes(dict(due))
    stack = "encoder_hidden_states" if made.config.is_encoder_decoder else "hidden_states"
    assert len(found[stack]) == LAYERS + 1 and found[stack][0].shape[-1] == HIDDEN
    assert isinstance(listed, tuple)
    assert [shapes(part) for part in listed if not hasattr(part, "get_seq_length")] == [
        shapes(part) for key, part in found.items() if key != "past_key_values"
    ]
    assert torch.equal(listed[0], next(iter(found.values())))


@pytest.mark.parametrize(("kind", "protocol"), CASES)
def test_evaluation_is_deterministic_and_a_copy_is_a_model_of_its_own(kind: str, protocol: str) -> None:
    made = model_of(kind, protocol)
    twin = copy.deepcopy(made)
    first = logits(made)
    assert type(twin) is type(made) and twin.config is not made.config
    assert torch.equal(logits(made), first) and torch.equal(logits(twin), first)
    shake(twin)
    assert not torch.equal(logits(twin), first) and torch.equal(logits(made), first)


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        *(("gpt2", "ties-ca"), ("t5", "smoe")),
        *(pytest.param(k, "ties-ca", marks=pytest.mark.slow) for k in ("distilbert", "mistral", "qwen2")),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(kind: str, protocol: str) -> None:
    """The types and forms that tests of training do not have."""
    made = copy.deepcopy(model_of(kind, protocol)).train()
    plain, again = gradients_twice(made, inputs_of(made, CLASSIFIER))
    assert plain.keys() == again.keys() and any("experts" in name or "base" in name for name in plain)
    for name, grad in plain.items():
        # the same operations on the same numbers
        torch.testing.assert_close(
            again[name], grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()), msg=name
        )


@pytest.mark.parametrize(("kind", "protocol"), CASES)
def test_resized_embeddings_saved_in_shards_are_loaded(kind: str, protocol: str, tmp_path: Path) -> None:
    """By our own `load` and by transformers' auto class; tied weights are stored once and stay tied."""
    head = language_head(kind)
    made = copy.deepcopy(model_of(kind, protocol, head))
    tied = is_tied(made)
    before = logits(made, head)
    made.resize_token_embeddings(VOCABULARY + 3)
    after = logits(made, head)
    assert made.config.vocab_size == VOCABULARY + 3 and after.shape[-1] == VOCABULARY + 3
    # a wider last matrix may be multiplied by another kernel
    torch.testing.assert_close(
        after[..., :VOCABULARY], before, rtol=1e-5, atol=1e-5 * float(before.abs().max())
    )
    made.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    stored = [name for shard in shards for name in load_file(tmp_path / shard)]
    assert sorted(stored) == sorted(index["weight_map"]) and len(stored) == len(set(stored))
    assert len(stored) == len({tensor.data_ptr() for tensor in made.state_dict().values()})
    for loaded in (load(tmp_path), HEADS[head].from_pretrained(tmp_path)):
        assert type(loaded) is type(made) and list(expert_layers(loaded)) == list(expert_layers(made))
        assert is_tied(made) is is_tied(loaded) is tied
        assert torch.equal(logits(loaded, head), after)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_shard_that_is_cut_short_or_gone(tmp_path: Path) -> None:
    model_of("bert", "ties-ca").save_pretrained(tmp_path, max_shard_size="4KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"weights cannot be read: .*written by camex_ft"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=file.name):
        load(tmp_path)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=["bfloat16", "float16"],
)
def test_a_model_s_precision_is_kept_and_can_be_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    made = copy.deepcopy(model_of("bert", "ties-ca")).to(dtype)
    made.save_pretrained(tmp_path)
    kind = HEADS[CLASSIFIER]
    for loaded in (
        load(tmp_path),
        kind.from_pretrained(tmp_path),
        kind.from_pretrained(tmp_path, device_map="cpu"),
    ):
        assert loaded.dtype == dtype
        assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
            n: t.dtype for n, t in made.state_dict().items()
        }
        assert torch.equal(logits(loaded), logits(made))
    wide = kind.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(logits(wide), logits(copy.deepcopy(made).float()))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_beams_that_are_drawn(kind: str) -> None:
    head = language_head(kind)
    model: Any = model_of(kind, "ties-ca", head)
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        ids = inputs_of(model, head)["input_ids"][:1]
        settings = {"num_beams": 3, "do_sample": True, "max_new_tokens": 4, "use_cache": use_cache}
        made.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[3]]},
        {"dola_layers": "low"},
    ],
    ids=["contrastive", "groups of beams", "constrained", "dola"],
)
def test_ways_to_generate_that_transformers_gave_up_are_refused_by_it(settings: dict[str, Any]) -> None:
    """They were moved to repositories of code, which nothing here would run."""
    model: Any = model_of("gpt2", "ties-ca", "causal-lm")
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, **settings)


def test_input_embeddings_can_be_exchanged_and_attention_chosen() -> None:
    made = copy.deepcopy(model_of("llama", "ties-ca"))
    expected = logits(made)
    fresh = torch.nn.Embedding(VOCABULARY, HIDDEN)
    with torch.no_grad():
        fresh.weight.copy_(made.get_input_embeddings().weight)
    made.set_input_embeddings(fresh)
    made.set_attn_implementation("eager")
    # another kernel, float32
    torch.testing.assert_close(logits(made), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_loading_from_a_state(tmp_path: Path) -> None:
    """As `from_pretrained(None, state_dict=...)` of transformers, and as `load_state_dict` of torch."""
    made = model_of("bert", "ties-ca")
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    other = model_classes.model_class(type(made)).from_pretrained(
        None, config=copy.deepcopy(made.config), state_dict=state
    )
    assert torch.equal(logits(other), logits(made))
    fresh = shake(copy.deepcopy(made))
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(made))
