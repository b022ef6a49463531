"""A sparse mixture as the start: its numbers in the resolved configuration, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camex_ft.config import ConfigErrors, changes_of, config_hash, load_config, resolve

OWN = "upcycle.init=own-experts"


@pytest.fixture
def mixture(tmp_path):
    """`mixture(**fields)` -> the override that names a folder with the config.json of an OLMoE."""

    def write(**fields):
        values = {"model_type": "olmoe", "num_experts": 16, "num_experts_per_tok": 4, **fields}
        folder = tmp_path / "backbone"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        return f"backbone={folder}"

    return write


def settled(file: Path, *overrides: str):
    return resolve(load_config(file, ["task.suite=lm", "task.name=wikitext-2", *overrides]), needs=False)[0]


def problem(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigErrors) as caught:
        load_config(file, ["task.suite=lm", "task.name=wikitext-2", *overrides])
    assert len(caught.value.problems) == 1, caught.value.problems
    return str(caught.value.problems[0])


@pytest.fixture
def file(write):
    return write("profile: embedded\n")


def test_numbers_are_those_of_the_mixture(file, mixture):
    config = settled(file, mixture(), OWN, "merging.protocol=smoe")
    assert (config.merging.experts, config.merging.top_k, config.routing.normalise) == (16, 4, "before")
    assert changes_of(config) == []
    assert resolve(config, needs=False)[0] == config
    assert (
        settled(file, mixture(norm_topk_prob=True), OWN, "merging.protocol=smoe").routing.normalise == "after"
    )


def test_other_experts_are_another_experiment(file, mixture):
    hashes = [config_hash(settled(file, mixture(num_experts=n), OWN), backbone="same") for n in (8, 16)]
    assert len(set(hashes)) == 2


def test_merging_weights_is_said_to_change_the_function(file, mixture):
    config = settled(file, mixture(), OWN)
    assert config.routing.normalise == "after"
    assert [reason.partition(" experts")[0] for reason in changes_of(config)] == [
        "merging.protocol: ties-ca merges the weights of"
    ]
    other = settled(file, mixture(), OWN, "merging.protocol=smoe", "routing.normalise=after")
    assert "the backbone's mixtures normalise before the choice of experts" in changes_of(other)[0]


@pytest.mark.parametrize("number", ["experts", "top_k"])
def test_other_numbers_are_refused(file, mixture, number):
    message = problem(file, mixture(), OWN, f"merging.{number}=6")
    assert f"merging.{number}: got 6, and the backbone's mixtures have" in message


def test_other_starts_are_refused(file, mixture):
    assert "olmoe is a sparse mixture, which has experts already: expected own-experts" in problem(
        file, mixture()
    )
    dense = problem(file, mixture(model_type="llama"), OWN)
    assert "own-experts takes the experts of a sparse mixture, and the layers of llama are dense" in dense
    assert "the layers of embedded/gpt2 are dense" in problem(file, "backbone=embedded/gpt2", OWN)


def test_experts_of_low_rank_are_refused(file, mixture):
    message = problem(file, mixture(), OWN, "tuning.mode=lora", "merging.protocol=domain")
    assert "lora makes experts of low rank, and those of own-experts are whole matrices" in message


def test_the_dense_protocol_trains_a_mixture_as_it_is(file, mixture):
    assert settled(file, mixture(), "merging.protocol=dense").upcycle.init == "copy"
