"""Finding a model's family, choosing layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.backbones import DenseFFN, family_for, family_of, select_layers
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError


def listing(encoder: int, decoder: int) -> list[DenseFFN]:
    weights = {"up": (torch.zeros(2, 1), None), "down": (torch.zeros(1, 2), None)}
    depths = {"encoder": encoder, "decoder": decoder}
    return [DenseFFN(f"{s}.{i}", s, i, weights, torch.relu) for s, n in depths.items() for i in range(n)]  # type: ignore[arg-type]


def test_every_type_belongs_to_one_family() -> None:
    types = [t for name in registry.BACKBONES.names() for t in registry.BACKBONES.get(name).model_types]
    assert len(types) == len(set(types))
    for name in registry.BACKBONES.names():
        family = registry.BACKBONES.get(name)
        assert family.name == name
        assert family.summary
        assert all(family_for(t) is family for t in family.model_types)


@pytest.mark.parametrize(
    ("unknown", "near"), [("qwen4_moe", "qwen3_moe"), ("mistrall", "mistral"), ("gpt-2", "gpt2")]
)
def test_unknown_type_says_which_file_to_add(unknown: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        family_for(unknown)
    message = str(error.value)
    assert f"Did you mean '{near}'?" in message
    assert f"camex_ft/backbones/families/{unknown.replace('-', '_')}.py" in message
    assert "bert, camembert, deepseek_v2, distilbert, electra, gpt2, llama" in message


def test_other_modules_have_no_family() -> None:
    with pytest.raises(UserError, match="Linear is not a transformers model"):
        family_of(torch.nn.Linear(1, 1))


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from camex_ft.backbones import register\n"
        "@register('toy', model_types=['toy-lm'], masks=lambda model, inputs: {'decoder': None})\n"
        "def ffns(model):\n"
        "    '''Toy: decoder.'''\n"
        "    return []\n"
    )
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(model_type="toy-lm"))
    try:
        family = family_of(model)  # type: ignore[arg-type]
        assert (family.name, family.summary) == ("toy", "Toy: decoder.")
        assert "toy" in registry.BACKBONES.names()
    finally:
        registry.BACKBONES.remove("toy")


@given(st.integers(0, 9), st.integers(0, 9))
def test_every_other_layer(encoder: int, decoder: int) -> None:
    """In each stack half of the layers, rounded up, two apart, the last one among them; `all` is all."""
    ffns = listing(encoder, decoder)
    assert select_layers(ffns, "all") == ffns
    chosen = select_layers(ffns, "every_other")
    for stack, depth in (("encoder", encoder), ("decoder", decoder)):
        layers = [ffn.layer for ffn in chosen if ffn.stack == stack]
        assert layers == sorted(range(depth - 1, -1, -2))


def test_listed_layers_count_through_the_stacks() -> None:
    ffns = listing(2, 3)
    assert [ffn.path for ffn in select_layers(ffns, [4, 0, 2])] == ["encoder.0", "decoder.0", "decoder.2"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 5], r"no layer 5; this backbone's layers are 0 to 4 \(encoder 0 to 1, decoder 2 to 4\)"),
        ([-1], "no layer -1; "),
        ([True], "no layer True; "),
        ([1, 1], "names a layer twice"),
        ([], "the list is empty"),
        ("every-other", "Did you mean 'every_other'"),
    ],
)
def test_layers_that_do_not_exist(layers: list[int] | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_layers(listing(2, 3), layers)
