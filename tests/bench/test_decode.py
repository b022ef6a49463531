"""`camex-ft bench decode`: what is fed, where it begins anew, and the figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.bench.decode import Decoding, bench_decode, dense_model, upcycled
from camex_ft.bench.settings import DecodeBench
from camex_ft.upcycling import cached
from camex_ft.utils.errors import UserError

FIGURES = {"dense_step_s", "step_s", "ratio_dense", "first_token_s", "merging_a_token_s", "times"}


def tiny(**given: Any) -> DecodeBench:
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
    settings = tiny(batch=4, same_prompt=same, experts=4)
    decoding = Decoding(upcycled(dense_model(settings), settings), settings)
    with cached(decoding.model):
        decoding()
    kept = [layer.kept for layer in decoding.cache.routing.layers.values()]
    assert [len(each.keys) for each in kept] == [1 if same else 4] * 2


def test_every_repeat_begins_at_the_end_of_the_prompt():
    settings = tiny(batch=2)
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


def test_figures():
    figures = bench_decode(tiny())
    assert set(figures) == FIGURES
    assert figures["ratio_dense"] == figures["step_s"] / figures["dense_step_s"]
    assert {len(each) for each in figures["times"].values()} == {2}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "decode", *arguments])


def test_the_record_is_shown_and_kept(tmp_path):
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
    shown = json.loads(invoke(*small, "--json", "--save", str(tmp_path)).stdout)
    assert set(shown) == FIGURES | {"kind", "settings", "machine"}
    (file,) = tmp_path.iterdir()
    assert file.name == "decode-ties-ca-embedded-llama-b1-l10-t8-n8-k8-r1-float32-cpu.json"
    table = invoke(*small, "--no-save", "--same-prompt").output
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
def test_bad_input_is_a_user_error(arguments, words):
    error = invoke(*arguments, "--no-save").exception
    assert isinstance(error, UserError)
    assert words in str(error)
