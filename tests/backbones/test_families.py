"""Every family's description of its feed-forward layers computes what the layers compute, under every head."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from camex_ft.backbones import DenseFFN, family_of, generates
from camex_ft.utils.errors import UserError

Tiny = Callable[..., Any]


class ByHand(nn.Module):
    """The formula of `DenseFFN`'s docstring, from nothing but its fields."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        weights = self.ffn.weights
        up = functional.linear(x, *weights["up"])
        inner = (
            self.ffn.activation(functional.linear(x, *weights["gate"])) * up
            if "gate" in weights
            else self.ffn.activation(up)
        )
        inner = self.dropout(inner, self.ffn.inner_dropout)
        return self.dropout(functional.linear(inner, *weights["down"]), self.ffn.outer_dropout)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return functional.dropout(x, p) if p and self.training else x


def replaced(model: Any) -> Any:
    model = copy.deepcopy(model)
    for ffn in family_of(model).ffns(model):
        model.set_submodule(ffn.path, ByHand(ffn).train(model.training))
        for name in ffn.silence:
            model.set_submodule(name, nn.Identity())
    return model


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_description_computes_the_layer(
    model_type: str, head: str, variant: dict[str, Any], train: bool, tiny: Tiny, inputs: Tiny
) -> None:
    """With every FFN replaced by the formula, the model's output stays; in training under the same random numbers."""
    model = tiny(model_type, head, **variant).train(train)
    arguments = inputs(model, head)
    # float32 rounding of one fused product against another, on outputs of the order of 1
    torch.testing.assert_close(
        output(replaced(model), arguments), output(model, arguments), atol=1e-6, rtol=1e-5
    )


def test_all_layers_are_found(model_type: str, head: str, variant: dict[str, Any], tiny: Tiny) -> None:
    """Each stack's layers are listed from its first to its last, encoder first, with the sizes of the configuration."""
    model = tiny(model_type, head, **variant)
    found = [(ffn.stack, ffn.layer) for ffn in family_of(model).ffns(model)]
    encoder_only = head == "token-classification"
    if model.config.is_encoder_decoder:
        depths = {"encoder": 3, "decoder": 0 if encoder_only else variant.get("num_decoder_layers", 3)}
    else:
        depths = {stack: 3 for stack, _ in found[:1]}
    assert found == [(stack, layer) for stack, depth in depths.items() for layer in range(depth)]
    for ffn in family_of(model).ffns(model):
        assert (ffn.hidden_size, ffn.inner_size) == (8, 12)
        assert all(
            weight.shape == ((8, 12) if name == "down" else (12, 8))
            for name, (weight, _) in ffn.weights.items()
        )


def test_decoder_means_causal(model_type: str, variant: dict[str, Any], tiny: Tiny, inputs: Tiny) -> None:
    """Another last token changes the first position's FFN output in exactly the stacks called encoder."""
    model = tiny(model_type, **variant)
    arguments = {name: value[:1] for name, value in inputs(model, "base").items()}
    changed = {name: value.clone() for name, value in arguments.items()}
    changed["decoder_input_ids" if "decoder_input_ids" in changed else "input_ids"][:, -1] += 1
    first: dict[str, list[Tensor]] = {}
    ffns = family_of(model).ffns(model)
    for ffn in ffns:
        module = model.get_submodule(ffn.path)
        module.register_forward_hook(
            lambda _, __, y, path=ffn.path: first.setdefault(path, []).append(y[:, 0])
        )
    output(model, arguments)
    output(model, changed)
    for ffn in ffns:
        before, after = first[ffn.path]
        if ffn.stack == "decoder":
            assert torch.equal(before, after)
        elif not model.config.is_encoder_decoder:  # such an encoder never sees the decoder's tokens
            assert not torch.equal(before, after)


def test_weights_are_the_models_own(model_type: str, tiny: Tiny) -> None:
    """Views, not copies, and cut off from autograd: an upcycler decides when to copy."""
    model = tiny(model_type)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for ffn in family_of(model).ffns(model):
        for weight, bias in ffn.weights.values():
            assert weight.untyped_storage().data_ptr() in storages
            assert not weight.requires_grad
            assert bias is None or bias.untyped_storage().data_ptr() in storages


def test_activation_can_be_copied_and_pickled(model_type: str, tiny: Tiny) -> None:
    x = torch.linspace(-3, 3, 7)
    model = tiny(model_type)
    activation = family_of(model).ffns(model)[0].activation
    for other in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert torch.equal(other(x), activation(x))


def test_masks_cover_the_stacks(
    model_type: str, head: str, variant: dict[str, Any], tiny: Tiny, inputs: Tiny
) -> None:
    """Every stack with FFNs has an entry: the attention mask, but for a decoder with its own input, all of it real."""
    model = tiny(model_type, head, **variant)
    family, arguments = family_of(model), inputs(model, head)
    arguments = {name: value.flatten(0, -2) for name, value in arguments.items()}
    masks = family.masks(model, arguments)
    for stack in {ffn.stack for ffn in family.ffns(model)}:
        if stack == "decoder" and "decoder_input_ids" in arguments:
            mask = masks[stack]
            assert mask is None if generates(model) else mask is not None and mask.all()
        else:
            assert masks[stack] is arguments["attention_mask"]
    assert set(family.masks(model, {"input_ids": arguments["input_ids"]}).values()) == {None}


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 7, 7), torch.ones(7), {"full_attention": None}])
def test_other_masks_are_refused(model_type: str, mask: Any, tiny: Tiny) -> None:
    model = tiny(model_type)
    with pytest.raises(ValueError, match=r"attention_mask.*\[batch, length\]"):
        family_of(model).masks(model, {"attention_mask": mask})


def test_heads_that_generate(model_type: str, head: str, variant: dict[str, Any], tiny: Tiny) -> None:
    assert generates(tiny(model_type, head, **variant)) == (head in ("causal-lm", "seq2seq-lm"))


@pytest.mark.parametrize("chunked", ["bert", "electra", "roberta", "distilbert"])
def test_chunked_feed_forward_is_refused(chunked: str, tiny: Tiny) -> None:
    model = tiny(chunked, chunk_size_feed_forward=2)
    with pytest.raises(UserError, match="chunk_size_feed_forward: 2"):
        family_of(model).ffns(model)
