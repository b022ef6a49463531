"""Weights that are missing, foreign or of another shape: no model is ever filled up with random experts.

What the auto classes may make new is what was not saved because it belongs to another head.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from camex_ft.backbones.heads import HEADS
from camex_ft.upcycling import expert_layers, load
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import Case, shake, upcycled
from tests.helpers.tiny import inputs_of

CLASSIFIER, FILE = "sequence-classification", "model.safetensors"
BODY, LAYER = "bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1.intermediate"


def save(folder: Path, kind: str, head: str, protocol: str = "ties-ca") -> Any:
    made = shake(upcycled(Case(kind, head, protocol, "auto")))
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, "bert", CLASSIFIER)
    return folder


@pytest.fixture
def spoil(saved: Path, tmp_path: Path) -> Any:
    """A function that changes the weights of a copy of the checkpoint, and returns its folder."""

    def change(spoilt: dict[str, torch.Tensor | None]) -> Path:
        tensors: dict[str, Any] = {**load_file(saved / FILE), **spoilt}
        save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / FILE, {"format": "pt"})
        (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
        return tmp_path

    return change


SPOILT: dict[str, dict[str, torch.Tensor | None]] = {
    "an expert is missing": {f"{LAYER}.up.experts": None},
    "a router is missing": {f"{LAYER}.router.gate": None},
    "an expert of another shape": {f"{LAYER}.up.experts": torch.zeros(3, 4, 4)},
    "the body is incomplete": {BODY: None},
    "the body is of another width": {BODY: torch.zeros(4, 4)},
    "an expert too many": {"bert.encoder.layer.7.intermediate.up.experts": torch.zeros(3, 4, 4)},
    "weights of another model": {"h.0.mlp.c_fc.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_checkpoint_that_is_not_whole(name: str, spoil: Any) -> None:
    """By our own `load`, by the saved class, and by another one: the body."""
    folder, (wrong,) = spoil(SPOILT[name]), SPOILT[name]
    readers = [load, *(HEADS[head].from_pretrained for head in (CLASSIFIER, "base"))]
    for read in readers:
        with pytest.raises(
            UserError, match=r"weights do not match, such as .*, which .*written by camex_ft"
        ) as said:
            read(folder)
        assert wrong.removeprefix("bert.") in str(said.value) and str(folder) in str(said.value)


def test_no_option_fills_experts_at_random(spoil: Any) -> None:
    """Where other sizes are asked for, those outside experts and routers are taken, as of a new number of labels."""
    kind = HEADS[CLASSIFIER]
    folder = spoil({})
    with pytest.raises(
        UserError, match=r"classifier.bias, which has another shape.*ignore_mismatched_sizes=True"
    ):
        kind.from_pretrained(folder, num_labels=5)
    made, info = kind.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert made.classifier.out_features == 5 and {key[0] for key in info["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    folder = spoil(SPOILT["an expert of another shape"])
    with pytest.raises(UserError, match=rf"{LAYER}.up.experts, which has another shape"):
        kind.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("named", [None, ["CamexNothing"], ["CamexGPT2LMHeadModel"]])
def test_without_the_saved_class_all_weights_have_to_be_there(named: Any, spoil: Any) -> None:
    """What it does not say, or says of another type of model, excuses nothing."""
    folder = spoil({})
    config = AutoConfig.from_pretrained(folder)
    config.architectures = named
    assert HEADS[CLASSIFIER].from_pretrained(folder, config=copy.deepcopy(config))
    with pytest.raises(UserError, match=r"2 weights .* such as classifier.bias, which is of another model"):
        HEADS["base"].from_pretrained(folder, config=config)


def test_a_missing_head_of_the_saved_class_is_a_fault(spoil: Any) -> None:
    folder = spoil({"classifier.weight": None})
    with pytest.raises(UserError, match=r"classifier.weight, which is missing"):
        HEADS[CLASSIFIER].from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "head", "other"),
    [
        ("bert", CLASSIFIER, "masked-lm"),  # which has no pooler
        ("bert", "masked-lm", CLASSIFIER),  # which has
        ("gpt2", "causal-lm", CLASSIFIER),
        ("t5", "seq2seq-lm", CLASSIFIER),
    ],
)
def test_another_head_is_new_and_all_else_is_as_saved(
    kind: str, head: str, other: str, tmp_path: Path
) -> None:
    made = save(tmp_path, kind, head)
    found = HEADS[other].from_pretrained(tmp_path)
    own = {name.split(".", 1)[-1]: tensor for name, tensor in made.state_dict().items()}
    experts = tuple(expert_layers(found))
    taken = {n: t for n, t in found.state_dict().items() if n.startswith(experts)}
    assert taken and list(expert_layers(made))
    for name, tensor in taken.items():
        matches = [
            value for known, value in own.items() if name.endswith(known) and value.shape == tensor.shape
        ]
        assert any(torch.equal(value, tensor) for value in matches), name


@pytest.mark.parametrize(("kind", "head"), [("gpt2", "causal-lm"), ("t5", "seq2seq-lm")])
@torch.no_grad()
def test_a_language_model_is_routed_as_one_under_every_head(kind: str, head: str, tmp_path: Path) -> None:
    """Its body gives its hidden states, bit for bit; and a classifier made of it still does when it is saved again."""
    made = save(tmp_path / "lm", kind, head)
    inputs = inputs_of(made, head)
    listed = made(**inputs, output_hidden_states=True)
    due = (listed.decoder_hidden_states if kind == "t5" else listed.hidden_states)[-1]
    assert torch.equal(HEADS["base"].from_pretrained(tmp_path / "lm")(**inputs).last_hidden_state, due)
    classifier = HEADS[CLASSIFIER].from_pretrained(tmp_path / "lm", num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    assert json.loads((tmp_path / "classifier" / "config.json").read_text())["camex"]["causal"] is True
    again = load(tmp_path / "classifier")
    grains = [
        [layer.settings.grouping.granularity for layer in expert_layers(m).values()]
        for m in (made, classifier, again)
    ]
    assert grains[0] == grains[1] == grains[2]
    given = inputs_of(again, CLASSIFIER)
    assert torch.equal(again(**given).logits, classifier(**given).logits)


def test_a_body_becomes_no_language_model(tmp_path: Path) -> None:
    """Its router has no weights for the first segment, which was not there to be learned."""
    save(tmp_path, "gpt2", CLASSIFIER)
    with pytest.raises(UserError, match=r"router.prior, which is missing"):
        HEADS["causal-lm"].from_pretrained(tmp_path)
