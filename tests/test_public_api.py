"""The public names of the package, imported when they are first asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import camex_ft
from tests.helpers.invariant_cases import MERGING, dense
from tests.helpers.tiny import inputs_of


@pytest.mark.parametrize("name", camex_ft.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    assert getattr(camex_ft, name).__doc__
    assert name in camex_ft._PLACES


def test_public_names_are_those_of_their_modules() -> None:
    import camex_ft.config
    import camex_ft.run.pipeline
    import camex_ft.static.merge
    import camex_ft.upcycling
    import camex_ft.utils.errors

    assert camex_ft.train is camex_ft.run.pipeline.run
    assert camex_ft.merge is camex_ft.static.merge.merge
    assert camex_ft.upcycle is camex_ft.upcycling.upcycle
    assert camex_ft.load is camex_ft.upcycling.load
    assert camex_ft.load_config is camex_ft.config.load_config
    assert camex_ft.UserError is camex_ft.utils.errors.UserError


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'camex_ft' has no attribute 'upcicle'"):
        camex_ft.upcicle  # noqa: B018


def test_upcycle_save_load(tmp_path: Path) -> None:
    model = dense("llama", "causal-lm")
    made = camex_ft.upcycle(model, merging=MERGING).eval()
    made.save_pretrained(tmp_path)
    inputs = inputs_of(model, "causal-lm")
    with torch.no_grad():
        assert torch.equal(camex_ft.load(tmp_path)(**inputs).logits, made(**inputs).logits)


def test_user_errors_are_exceptions_of_their_own() -> None:
    with pytest.raises(camex_ft.UserError):
        camex_ft.load_config("no such file.yaml", [])
