"""Shipped facts: they agree with what was published of each backbone, and with data sets that are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml

import camex_ft.estimate
from camex_ft.config.shipped import ROOT
from camex_ft.estimate.columns import known_backbone, known_rows

FILE = Path(camex_ft.estimate.__file__).with_name("facts.yaml")
FACTS = yaml.safe_load(FILE.read_text(encoding="utf-8"))
LM = {"t5": transformers.AutoModelForSeq2SeqLM} | dict.fromkeys(
    ["gpt2", "llama", "qwen2", "mistral"], transformers.AutoModelForCausalLM
)


@pytest.mark.parametrize("name", FACTS["backbones"])
def test_a_shape_has_the_published_parameters(name):
    config = transformers.AutoConfig.for_model(**known_backbone(name))
    with torch.device("meta"):
        model = LM.get(config.model_type, transformers.AutoModel).from_config(config)
    found = sum(parameter.numel() for parameter in model.parameters())
    apart = known_backbone(name).get("tie_word_embeddings") is False
    if apart and config.tie_word_embeddings:  # this version ties T5's output embedding whatever the file says
        found += config.vocab_size * config.hidden_size
    assert found == FACTS["backbones"][name]["parameters"]


def test_every_backbone_of_the_hub_that_configurations_name_is_known():
    lines = [line for file in sorted(ROOT.rglob("*.yaml")) for line in file.read_text().splitlines()]
    named = {line.split()[1] for line in lines if line.startswith("backbone:")}
    elsewhere = ("auto", "embedded/", "package:")
    assert {name for name in named if not name.startswith(elsewhere)} == set(FACTS["backbones"])
    assert known_backbone("new:openai-community/gpt2") == known_backbone("openai-community/gpt2")
    assert known_backbone("somebody/else") is None


def test_rows_are_those_that_the_model_reads():
    assert known_rows("glue/rte") == {"train": 2490, "validation": 277, "test": 3000}
    assert known_rows("superglue/copa") == {"train": 800, "validation": 200, "test": 1000}
    assert known_rows("superglue/record") is None and known_rows("lm/text") is None
