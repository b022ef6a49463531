"""The cells of a specification: what wins over what, and the commands that run them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from camex_ft.compare.cells import make_comparison
from camex_ft.compare.spec import key_of, of_config, override
from camex_ft.config import ConfigErrors, config_hash, load_config, resolve
from tests.helpers.machines import machine

TWO = "rows: [{merging.protocol: [dense, ties]}]"


def cell(comparison, *, row="ties", task=None, seed=0):
    """The one cell of a row, task and seed."""
    [found] = [
        c for c in comparison.cells if (c.row, c.seed) == (row, seed) and task in (None, c.settled.task.name)
    ]
    return found


def test_cells_are_ordered_by_task_row_and_seed(compared):
    made = compared(f"config: glue\ntasks: [rte, cola]\n{TWO}\nseeds: [3, 1]")
    assert [str(c) for c in made.cells] == [
        f"glue/{task} {row} seed {seed}"
        for task in ("rte", "cola")
        for row in ("dense", "ties")
        for seed in (3, 1)
    ]
    assert {c.settled.training.seed for c in made.cells} == {1, 3}
    assert made.title == "glue/rte, glue/cola"
    assert made.folder == Path("results/comparisons/spec")
    assert (made.profile, made.reason) == ("embedded", "profile embedded: there is no CUDA device")


def test_set_then_tasks_then_overrides_then_rows(compared):
    text = """
        config: glue
        set: {data.train_rows: 1, data.eval_rows: 11, training.num_train_epochs: 1, merging.experts: 3}
        tasks:
          rte: {data.train_rows: 2, data.eval_rows: 12}
          cola:
        rows:
          - merging.protocol: dense
          - {merging.protocol: ties, merging.experts: 5}
        embedded: {set: {merging.alpha: 0.5}}
    """
    made = compared(text, overrides=["data.eval_rows=13", "merging.experts=4", "merging.top_k=2"])
    rte, cola = (cell(made, task=task, row="ties, experts 5").settled for task in ("rte", "cola"))
    dense = cell(made, task="rte", row="dense").settled
    assert (rte.data.train_rows, cola.data.train_rows) == (2, 1)  # tasks over set
    assert (rte.data.eval_rows, cola.data.eval_rows) == (13, 13)  # overrides over both
    assert (rte.merging.experts, dense.merging.experts) == (5, 4)  # rows over all
    assert (rte.merging.alpha, rte.training.num_train_epochs, rte.merging.top_k) == (0.5, 1, 2)


def test_a_task_in_a_text_is_its_name(compared):
    made = compared(
        f"config: glue\nset: {{data.dir: 'my data/{{task}}'}}\ntasks: [rte, superglue/boolq]\n{TWO}",
        overrides=["data.splits={validation: '{task}'}"],
    )
    found = {c.task: (str(c.settled.data.dir), c.settled.data.splits) for c in made.cells}
    assert found == {
        "glue/rte": ("my data/rte", {"validation": "rte"}),
        "superglue/boolq": ("my data/boolq", {"validation": "boolq"}),
    }


def test_another_task_by_an_override_takes_the_changes_that_it_has(compared):
    """So that its cells are those of the whole comparison."""
    text = (
        f"config: glue\ntasks: {{rte: {{data.train_rows: 2}}, cola: {{data.train_rows: 3}}}}\n{TWO}\nseeds: 1"
    )
    whole = {c.command for c in compared(text).cells}
    some = compared(text, overrides=["task.name=cola"])
    assert {c.task for c in some.cells} == {"glue/cola"}
    assert {config_hash(c.settled) for c in some.cells} < {
        config_hash(c.settled) for c in compared(text).cells
    }
    assert len(whole) == 4
    other = compared(text, overrides=["task.name=mrpc"])
    assert {(c.task, c.settled.data.train_rows) for c in other.cells} == {("glue/mrpc", None)}


def test_seeds_can_be_others(compared):
    text = f"config: glue\n{TWO}\nseeds: 5"
    assert {c.seed for c in compared(text, seeds=2).cells} == {0, 1}
    assert {c.seed for c in compared(text, seeds=[42]).cells} == {42}


def test_the_profile_is_asked_for_once_and_given_to_every_cell(compared):
    text = f"config: glue\n{TWO}\nseeds: 3\nembedded: {{seeds: 1}}"
    paper = machine(cuda=True, hub=True)
    for made, profile, seeds in (
        (compared(text), "embedded", 1),
        (compared(text, environment=paper), "paper", 3),
    ):
        assert made.profile == profile
        assert len(made.cells) == 2 * seeds
        assert all(c.settled.profile == profile and f"profile={profile}" in c.overrides for c in made.cells)
    asked = compared(text, environment=paper, overrides=["profile=embedded"])
    assert (asked.profile, len(asked.cells)) == ("embedded", 2)


AWKWARD = [
    "it's",
    'a "b"',
    "a, b",
    "a = b",
    "{x}",
    "# no",
    " ",
    "null",
    "3",
    "é\u2028",
    "-",
    "a: b",
    "$HOME `x`",
]


@pytest.mark.parametrize("value", AWKWARD)
def test_a_value_comes_back_from_its_override(value):
    text = override("data.dir", value)
    assert key_of(text) == "data.dir"
    assert load_config("glue", [text]).data.dir == value


def test_a_command_can_be_copied(compared):
    """Run alone, it is the same experiment: the shell's words make the settled configuration."""
    awkward = "set: {data.dir: \"it's 'my' = {task}, $x\"}"
    made = compared(f"config: glue\n{awkward}\ntasks: [rte, superglue/boolq]\n{TWO}\nseeds: [4]")
    for each in made.cells:
        program, run, config, *overrides = shlex.split(each.command)
        assert (program, run) == ("camex-ft", "run")
        for how in ((config, overrides), (each.config, each.overrides)):
            settled, _ = resolve(load_config(*how), machine(), needs=False)
            assert settled == each.settled


def test_a_configuration_of_the_users_goes_by_its_path_and_a_shipped_one_by_its_name(write, compared):
    write("task: {name: rte}", "mine.yaml")
    assert {c.config for c in compared(f"config: mine.yaml\n{TWO}").cells} == {"mine.yaml"}
    assert {c.config for c in compared(f"config: configs/glue.yaml\n{TWO}").cells} <= {
        "glue",
        "configs/glue.yaml",
    }


def test_what_is_wrong_with_cells_is_placed_in_the_specification(compared):
    text = "config: glue\nset: {training.epochs: 3}\n" + TWO
    with pytest.raises(ConfigErrors, match=r"spec\.yaml:2: training\.epochs: unknown key\. Did you mean"):
        compared(text)
    rows = "rows:\n  - merging.protocol: [dense,\n      tise]\n  - {merging.protocol: ties, merging.alfa: 1}"
    text = f"config: glue\ntasks: [rte, mrpcc]\n{rows}"
    with pytest.raises(ConfigErrors) as raised:
        compared(text)
    assert [(p.origin.line, p.key) for p in raised.value.problems] == [
        (2, ("task", "name")),
        (4, ("merging", "protocol")),
        (6, ("merging", "alfa")),
    ]
    with pytest.raises(ConfigErrors, match=r"override 'merging\.alfa=2': merging\.alfa: unknown key"):
        compared(f"config: glue\n{TWO}", overrides=["merging.alfa=2"])


def test_two_rows_of_one_experiment_are_refused(compared):
    rows = "rows: [{merging.protocol: [dense, ties], merging.alpha: [0.5, 1.0]}]"
    text = f"config: glue\n{rows}\nbaseline: dense, alpha 0.5"
    with pytest.raises(
        ConfigErrors, match=r"'dense, alpha 0\.5' and 'dense, alpha 1' are the same experiment"
    ):
        compared(text)


def test_an_override_that_no_cell_would_heed_is_refused(compared):
    for override_, instead in (("training.seed=3", "--seeds"), ("merging.protocol=ties", "--protocols")):
        with pytest.raises(ConfigErrors, match=f"has no effect here: it is set by .*{instead}"):
            compared(f"config: glue\n{TWO}", overrides=[override_])


def test_a_comparison_of_a_configuration_is_named_by_its_task():
    made = make_comparison(of_config("glue"), overrides=["task.name=rte"], environment=machine())
    assert (made.name, made.title) == ("glue-rte", "glue/rte")
