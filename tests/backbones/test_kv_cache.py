"""Key-value caches that carry the state of routing: going on, copies, other models, threads, ways to generate."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from camex_ft.upcycling import upcycle
from tests.helpers.invariant_cases import SEGMENT, Case, dense, shake, upcycled
from tests.helpers.tiny import VOCABULARY

TOLERANCE = 1e-9  # float64, the same sums in another order
NEW = 2 * SEGMENT + 2


def model_of(model_type: str = "gpt2", protocol: str = "ties-ca") -> PreTrainedModel:
    made = shake(upcycled(Case(model_type, "causal-lm", protocol, "auto"))).double()
    made.generation_config.eos_token_id = None
    return made


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    defaults = {"max_new_tokens": NEW, "use_cache": True, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**defaults, **settings})


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("prompt", [1, SEGMENT, 2 * SEGMENT + 1])
def test_generation_goes_on_from_the_cache_that_it_returned(prompt: int) -> None:
    model, ids = model_of(), ids_of(2, prompt)
    whole = generate(model, ids, max_new_tokens=9)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    again = generate(model, first.sequences, max_new_tokens=5, past_key_values=first.past_key_values)
    assert torch.equal(again, whole)


def test_a_new_turn_of_a_conversation_goes_on() -> None:
    """The prompt of the second call is longer than what the first one returned."""
    model = model_of()
    first = generate(model, ids_of(1, 4), max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids_of(1, 5, seed=3)], dim=1)
    expected = generate(model, longer)
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values), expected)


def test_copies_of_a_prompt_s_cache_go_their_own_ways() -> None:
    model, prefix = model_of(), ids_of(1, SEGMENT + 1)
    cache = DynamicCache()
    logits(model, prefix, cache)
    for seed in (1, 2):
        ids = torch.cat([prefix, ids_of(1, 4, seed=seed)], dim=1)
        assert torch.equal(
            generate(model, ids, past_key_values=copy.deepcopy(cache)), generate(model, ids, use_cache=False)
        )
    close(logits(model, ids[:, len(prefix[0]) :], cache), logits(model, ids)[:, len(prefix[0]) :])


def test_two_texts_take_turns() -> None:
    """Nothing of one call, or of one model, is seen by another."""
    models = [model_of(protocol=p) for p in ("ties-ca", "domain")]
    texts, caches = [ids_of(2, 9, seed=s) for s in (1, 2)], [DynamicCache(), DynamicCache()]
    for t in range(9):
        for model, text, cache in zip(models, texts, caches, strict=True):
            close(logits(model, text[:, t : t + 1], cache), logits(model, text)[:, t : t + 1])


def test_threads_share_a_model_and_nothing_else() -> None:
    model = model_of()
    texts = [ids_of(1, 3 + i, seed=i) for i in range(6)]
    expected = [generate(model, text, use_cache=False) for text in texts]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda text: generate(model, text), texts))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("protocol", ["dense", "domain"])
def test_a_cache_of_another_model_is_refused(protocol: str) -> None:
    model, ids, cache = model_of(), ids_of(1, 5), DynamicCache()
    other = (
        dense("gpt2", "causal-lm")
        if protocol == "dense"
        else upcycled(Case("gpt2", "causal-lm", protocol, "auto"))
    )
    logits(copy.deepcopy(other).double(), ids, cache)  # `dense` is shared by all tests
    with pytest.raises(RuntimeError, match="was not filled by this model"):
        logits(model, ids, cache)


def test_an_emptied_cache_starts_anew() -> None:
    model, cache = model_of(), DynamicCache(config=model_of().config)
    logits(model, ids_of(2, 5), cache)
    cache.reset()
    ids = ids_of(1, 7, seed=2)
    close(logits(model, ids, cache), logits(model, ids))


def test_rows_are_repeated_and_chosen() -> None:
    model, ids, cache = model_of(), ids_of(2, 8), DynamicCache()
    logits(model, ids[:, :5], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    rows = torch.tensor([1, 0])
    for t in range(5, 8):
        close(logits(model, ids[rows, t : t + 1], cache), logits(model, ids[rows])[:, t : t + 1])


def test_a_cache_stays_of_its_kind() -> None:
    cache = DynamicCache()
    logits(model_of(), ids_of(1, 5), cache)
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    assert cache.get_seq_length() == 5


def test_nothing_is_kept_when_a_cache_is_gone() -> None:
    model = model_of()
    cache = generate(model, ids_of(2, 5), return_dict_in_generate=True).past_key_values
    watched = weakref.ref(cache)
    del cache
    gc.collect()
    assert watched() is None


def test_training_keeps_no_state() -> None:
    model = model_of().train()
    ids = ids_of(2, 8)
    made = model(ids, labels=ids, use_cache=False)
    made.loss.backward()
    assert made.past_key_values is None


WAYS: dict[str, dict[str, Any]] = {
    "a fixed cache": {"cache_implementation": "static"},
    "a prompt in pieces": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": "itself"},
    "a poor assistant": {"assistant_model": "dense"},
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_generate(way: str, kind: str) -> None:
    model, settings = model_of(kind), dict(WAYS[way])
    helpers = {
        "itself": lambda: copy.deepcopy(model),
        "dense": lambda: copy.deepcopy(dense(kind, "causal-lm")),
    }
    if "assistant_model" in settings:
        settings["assistant_model"] = helpers[settings["assistant_model"]]().double()
        settings["assistant_model"].generation_config.eos_token_id = None
    for prompt in (1, SEGMENT, SEGMENT + 2):
        ids = ids_of(1, prompt)
        assert torch.equal(generate(model, ids, **settings), generate(model, ids, use_cache=False))


def test_a_fixed_cache_with_padding() -> None:
    """`generate` passes ready-made masks then; what they hide is padding."""
    model, ids = model_of("llama"), ids_of(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    found = model.generate(ids, use_cache=True, cache_implementation="static", **settings)
    assert torch.equal(found, expected)


def test_a_fixed_cache_of_the_caller() -> None:
    model, ids = model_of("llama"), ids_of(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        close(logits(model, ids[:, part], cache), logits(model, ids)[:, part])


def test_guidance_compares_with_a_text_of_its_own() -> None:
    model, ids = model_of(), ids_of(1, 5)
    settings = {"guidance_scale": 1.5, "negative_prompt_ids": ids_of(1, 3, seed=4)}
    assert torch.equal(generate(model, ids, **settings), generate(model, ids, use_cache=False, **settings))


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(RuntimeError, match="use generate, with padding on the left"):
        model_of()(ids_of(1, 4), read_index=[])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_documents_are_computed_as_alone(kind: str) -> None:
    """As transformers takes them: position ids begin anew, no attention mask, no cache."""
    model, lengths = model_of(kind), [4, 1, 2 * SEGMENT + 1]
    ids = ids_of(2, sum(lengths))  # position ids hold for all rows
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    close(packed, alone)
    with torch.no_grad():  # the same from embeddings, which do not tell of rows that share position ids
        embedded = model.get_input_embeddings()(ids)
        close(model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits, alone)


def test_t5_goes_on_by_segments_too() -> None:
    made = upcycle(
        dense("t5", "seq2seq-lm"),
        merging={"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 2}},
        routing={"granularity": "segment", "segment": SEGMENT},
    ).eval()
    model = shake(made).double()
    model.generation_config.eos_token_id = None
    for beams in (1, 3):
        found, expected = (
            generate(model, ids_of(2, 6), num_beams=beams, use_cache=cached) for cached in (True, False)
        )
        assert torch.equal(found, expected)
