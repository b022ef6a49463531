"""Fisher information and Gram matrices of texts against plain loops, and merges with them end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camex_ft import synthetic
from camex_ft.static.merge import write_merge
from camex_ft.static.merge_inputs import open_inputs, survey
from camex_ft.static.merge_spec import make_spec
from camex_ft.static.merge_statistics import fisher_information, gather, gram_matrices, read_task
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import MERGE_METHODS
from tests.helpers import merge_reference as reference
from tests.helpers.merge_reference import doubles, llamas, save

SMALL = {"profile": "embedded", "data.train_rows": 40, "data.eval_rows": 20}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def batches(model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (count, 9), generator=generator)
    return [{"input_ids": row[None], "labels": row[None]} for row in ids]


def test_fisher_information_is_the_mean_of_squared_gradients_of_rows() -> None:
    model, _ = synthetic.backbone("llama", head="causal-lm")
    rows = batches(model)
    information = fisher_information(model, iter(rows))
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        squares = [torch.autograd.grad(model(**row).loss, parameter)[0].double().square() for row in rows]
        torch.testing.assert_close(
            information[name].double(), torch.stack(squares).mean(0), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gram_matrices_are_means_over_the_tokens_that_enter_a_map(family: str) -> None:
    model, _ = synthetic.backbone(family, head="causal-lm")
    rows = batches(model)
    grams = gram_matrices(model, iter(rows))
    path = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    seen: list[Tensor] = []
    module: nn.Module = model.get_submodule(path)
    module.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].double()))
    for row in rows:
        model(**row)
    tokens = torch.cat([each.flatten(0, -2) for each in seen]).detach()
    expected = tokens.T @ tokens / len(tokens)
    torch.testing.assert_close(grams[f"{path}.weight"].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_merge_by_statistics_is_the_formula(tmp_path: Path, method: str) -> None:
    start, tokenizer, donors = llamas(2)
    places = [save(m, tokenizer, tmp_path / str(n)) for n, m in enumerate([start, *donors])]
    data = {"config": "lm", "set": {**SMALL, "backbone": "embedded/llama"}, "rows": 6}
    weights = [1.0, 0.5]
    spec = make_spec(
        {"start": places[0], "from": places[1:], "method": method, "weights": weights, "data": data}
    )
    inputs = open_inputs(survey(spec), tmp_path / "scratch")
    statistics = gather(spec, inputs, MERGE_METHODS.get(method), tmp_path / "statistics")
    merged = write_merge(spec, tmp_path / "out")
    assert merged.record["data"]["rows"] == 6
    model = type(start).from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        base, stacked = doubles([start], name)[0], doubles(donors, name)
        statistic = statistics.arguments(name, None)["statistic"]
        if statistic is None:
            assert method == "regmean"
            assert parameter.dim() == 1 or "embed" in name
            expected = reference.average(base, stacked, weights)
        else:
            expected = reference.FORMULAS[method](base, stacked, weights, statistic.double())
        torch.testing.assert_close(parameter.detach().double(), expected, **CLOSE)


def test_gpt2s_maps_are_merged_in_their_own_orientation(tmp_path: Path) -> None:
    start, tokenizer = synthetic.backbone("gpt2", head="causal-lm")
    donors = [reference.perturbed(start, seed) for seed in range(2)]
    places = [save(m, tokenizer, tmp_path / str(n)) for n, m in enumerate([start, *donors])]
    data = {"config": "lm", "set": {**SMALL, "backbone": "embedded/gpt2"}, "rows": 6}
    spec = make_spec({"start": places[0], "from": places[1:], "method": "regmean", "data": data})
    inputs = open_inputs(survey(spec), tmp_path / "scratch")
    statistics = gather(spec, inputs, MERGE_METHODS.get("regmean"), tmp_path / "statistics")
    write_merge(spec, tmp_path / "out")
    model = type(start).from_pretrained(tmp_path / "out")
    name = "transformer.h.0.attn.c_attn.weight"
    gram = statistics.arguments(name, None)["statistic"].double()
    expected = reference.regmean(torch.empty(0), doubles(donors, name).mT, [1, 1], gram).mT
    torch.testing.assert_close(model.get_parameter(name).detach().double(), expected, **CLOSE)


def test_rows_for_another_head_are_refused() -> None:
    with pytest.raises(UserError, match="the task glue/sst2 has the head sequence-classification"):
        read_task("glue", SMALL, "causal-lm")


def test_donors_that_are_no_runs_need_a_configuration(tmp_path: Path) -> None:
    start, tokenizer, donors = llamas(1)
    places = [save(m, tokenizer, tmp_path / str(n)) for n, m in enumerate([start, *donors])]
    spec = make_spec({"start": places[0], "from": places[1:], "method": "fisher", "data": {}})
    with pytest.raises(UserError, match="is no run of camex_ft"):
        write_merge(spec, tmp_path / "out")
