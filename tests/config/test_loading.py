"""A file and overrides to a `Config`: every key at every depth, and everything that is wrong reported at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from camex_ft.config import Config, ConfigErrors, load_config, notes, resolve
from camex_ft.config.validation import section_keys
from camex_ft.utils.errors import UserError
from tests.helpers.config_trees import leaves, one_line, tree

ALL_KEYS = [key for key, _ in section_keys()]
files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def errors(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def only(path: str | Path, *overrides: str) -> str:
    found = errors(path, *overrides)
    assert len(found) == 1, found
    return found[0]


@files
@given(leaves())
def test_what_was_written_is_there_and_the_rest_is_default(write, values):
    config = load_config(write(yaml.safe_dump(tree(values), allow_unicode=True, sort_keys=False)))
    assert config == Config.model_validate(tree(values))
    expected = Config.model_validate(tree(values)).model_dump(exclude_unset=True)
    assert config.model_dump(exclude_unset=True) == expected


@files
@given(leaves())
def test_overrides_equal_editing_the_file(write, values):
    edited = load_config(write(yaml.safe_dump(tree(values), allow_unicode=True)))
    assume(all("\n" not in one_line(value) for value in values.values()))
    overrides = [f"{'.'.join(key)}={one_line(value)}" for key, value in values.items()]
    assert load_config(write("profile: auto\n"), overrides) == edited


@files
@given(leaves(min_size=2), st.data())
def test_a_key_is_read_wherever_it_stands(write, values, data):
    """Split over a chain of files and overrides, in any order, the same keys make the same configuration."""
    whole = load_config(write(yaml.safe_dump(tree(values), allow_unicode=True)))
    places = {key: data.draw(st.sampled_from(["base", "file", "override"])) for key in values}
    parts = {
        place: {key: value for key, value in values.items() if places[key] == place}
        for place in ("base", "file", "override")
    }
    write(yaml.safe_dump({**tree(parts["base"]), "profile": values.get(("profile",), "auto")}), "base.yaml")
    path = write(yaml.safe_dump({"extends": "base.yaml", **tree(parts["file"])}))
    overrides = [f"{'.'.join(key)}={one_line(value)}" for key, value in parts["override"].items()]
    assert load_config(path, overrides) == whole


@files
@given(st.sampled_from(ALL_KEYS), st.data())
def test_any_misspelt_key_is_reported_with_its_line_and_the_nearest_name(write, key, data):
    leaf = key[-1]
    n = data.draw(st.integers(0, len(leaf) - 1))
    misspelt = data.draw(
        st.sampled_from([leaf[:n] + leaf[n + 1 :], leaf[: n + 1] + leaf[n:], leaf[:n] + "_" + leaf[n:]])
    )
    assume(misspelt and not any(known[-1] == misspelt for known in ALL_KEYS) and misspelt != "extends")
    above = data.draw(st.integers(0, 3))
    text = "# comment\n" * above + "profile: auto\n"
    for depth, part in enumerate((*key[:-1], misspelt)):
        text += "  " * depth + part + ":" + ("\n" if depth < len(key) - 1 else " 1\n")
    said = only(write(text))
    assert said.startswith(
        f"run.yaml:{above + 1 + len(key)}: {'.'.join((*key[:-1], misspelt))}: unknown key."
    )
    siblings = [".".join(known) for known in ALL_KEYS if known[:-1] == key[:-1]]
    assert any(f"Did you mean '{name}'?" in said for name in siblings)
    if len(leaf) > 3:  # of shorter names another may be as near
        assert f"Did you mean '{'.'.join(key)}'?" in said


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("experts=4", "merging.experts"),
        ("merging.rank=4", "merging.curvature.rank"),
        ("lr=1", "training.learning_rate"),
        ("training.lr=1", "training.learning_rate"),
        ("training.evaluation_strategy=epoch", "training.eval_strategy"),
        ("training.warmup_ratio=0.1", "training.warmup_steps"),
        ("training.lr_schedular_type=linear", "training.lr_scheduler_type"),
        ("training.max_lenght=3", "task.max_length"),
        ("Task.name=rte", "task"),
        ("task.max-length=3", "task.max_length"),
        ("learning_rate=1", "training.learning_rate"),
    ],
)
def test_the_nearest_name_may_be_in_another_section(write, written, meant):
    path = write("profile: auto\n")
    if written.startswith("lr="):
        assert "unknown key" in only(path, written)
    else:
        assert f"Did you mean '{meant}'?" in only(path, written)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("merging.experts=many", 'expected a whole number, got "many" (text)'),
        ("merging.experts=4.0", "expected a whole number, got 4.0"),
        ("merging.experts='4'", 'expected a whole number, got "4" (text)'),
        ("merging.experts=true", "expected a whole number, got true"),
        ("merging.experts=null", "expected a whole number, got nothing (null)"),
        ("merging.experts=[4]", "expected a whole number, got [4] (a list)"),
        ("merging.experts=0", "expected at least 1, got 0"),
        ("merging.alpha=-0.5", "expected at least 0, got -0.5"),
        ("merging.alpha=.nan", "expected a finite number"),
        ("merging.alpha=.inf", "expected a finite number"),
        ("merging.alpha=1e999", "expected a finite number"),
        ("merging.curvature.rank=0", "expected at least 1, got 0"),
        ("merging.curvature.kind=diag", "expected one of kronecker, diagonal, low-rank"),
        ("merging.curvature.kind=diag", "Did you mean 'diagonal'?"),
        ("merging.curvature=3", "expected keys below it (kind, rank), got 3"),
        (
            "merging=ties",
            "expected keys below it (protocol, experts, top_k, alpha, curvature, options, keep_vectors)",
        ),
        ("merging.options=3", "expected a mapping, got 3"),
        ("task.name=3", "expected text, got 3; put it in quotes"),
        ("task.name=", "expected text, got nothing (null)"),
        ("task.name=''", 'expected text, got ""'),
        ("task.name.first=3", "expected text, got a mapping with 1 keys"),
        ("routing.noise=maybe", 'expected true or false, got "maybe" (text)'),
        ("routing.noise=1", "expected true or false, got 1"),
        ("routing.granularity=sequnce", "Did you mean 'sequence'?"),
        ("upcycle.layers=some", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("upcycle.layers=[]", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("upcycle.layers=[1,1]", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("upcycle.layers=[-1]", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("upcycle.layers=[true]", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("upcycle.layers=3", "expected 'all', 'every_other' or a list of different layer numbers"),
        ("training.lr_scheduler_kwargs=x", 'got "x" (text), expected a mapping'),
        ("training.gradient_checkpointing_kwargs={use_rentrant: true}", "Did you mean 'use_reentrant'?"),
        ("training.gradient_checkpointing_kwargs={debug: 1}", "debug: expected true or false"),
        ("training.learning_rate=0", "expected more than 0, got 0"),
        ("training.learning_rate=fast", 'expected a number, got "fast" (text)'),
        ("training.seed=-1", "expected at least 0, got -1"),
        ("training.warmup_steps=abc", 'got "abc" (text), expected a number'),
        ("training.bf16=maybe", 'got "maybe" (text), expected true or false'),
        ("training.lr_scheduler_type=consine", "Did you mean 'cosine'?"),
        ("training.log_level=loud", "expected one of detail, debug"),
        ("training.output_dir=x", "the toolkit sets this itself: checkpoints go to the run's folder"),
        ("profile=papr", "Did you mean 'paper'?"),
        ("data.source=disc", "Did you mean 'disk'?"),
    ],
)
def test_wrong_types_and_values(write, override, expected):
    said = only(write("profile: auto\n"), override)
    assert said.startswith(f"override '{override}': {override.partition('=')[0].removesuffix('.first')}: ")
    assert expected in said


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["routing.noise=no"], "routing.noise", False),
        (["routing.noise=ON"], "routing.noise", True),
        (["training.fp16=off"], "training.fp16", False),
        (["training.include_num_input_tokens_seen=no"], "training.include_num_input_tokens_seen", "no"),
        (["training.save_strategy=no", "training.load_best_model_at_end=no"], "training.save_strategy", "no"),
        (["training.warmup_steps=10"], "training.warmup_steps", 10.0),
        (["training.report_to=[tensorboard]"], "training.report_to", ["tensorboard"]),
        (["training.max_grad_norm=5e-1"], "training.max_grad_norm", 0.5),
        (["training.lr_scheduler_kwargs={num_cycles: 2}"], "training.lr_scheduler_kwargs", {"num_cycles": 2}),
        (["training.lr_scheduler_kwargs='{\"power\": 2}'"], "training.lr_scheduler_kwargs", {"power": 2}),
        (["merging.alpha=1"], "merging.alpha", 1.0),
        (["merging.top_k="], "merging.top_k", None),
    ],
)
def test_values_become_what_their_key_takes(write, overrides, key, value):
    found = load_config(write("profile: auto\n"), overrides).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


DONORS = ["upcycle.init=checkpoints", "upcycle.from=[./law, ./code]"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["merging.experts=4", "merging.top_k=5"],
            "merging.top_k: expected at most merging.experts, which is 4, got 5",
        ),
        (["merging.experts=1"], "merging.experts: expected at least 2, got 1"),
        (["merging.protocol=tie-ca"], "merging.protocol: unknown protocol 'tie-ca'. Did you mean 'ties-ca'?"),
        (
            ["merging.protocol=smoe", "routing.granularity=sequence"],
            "routing.granularity: protocol 'smoe' does not allow",
        ),
        (
            ["merging.protocol=dense", "tuning.mode=experts"],
            "tuning.mode: protocol 'dense' has no experts to train",
        ),
        (
            ["merging.options.densty=1"],
            "unknown option of protocol 'ties-ca'. Did you mean 'density'? It has: density",
        ),
        (["merging.options.density=2"], "merging.options.density: expected at most 1, got 2"),
        (["merging.options.density=half"], 'merging.options.density: expected a number, got "half" (text)'),
        (
            ["merging.protocol=smear", "merging.options.density=1"],
            "unknown option of protocol 'smear'. It has none",
        ),
        (
            ["routing.router=expert-choice", "merging.protocol=ep-camex"],
            "routing.router: expert-choice lets experts take tokens, and protocol 'ep-camex' merges weights: expected",
        ),
        (
            ["routing.router=expert-choice"],
            "routing.router: expert-choice lets experts take tokens, and protocol 'ties-ca' merges weights: expected",
        ),
        (
            [
                "routing.router=expert-choice",
                "merging.protocol=smoe",
                "task.suite=lm",
                "task.name=wikitext-2",
            ],
            "routing.router: expert-choice sees a sequence's future, and the model of lm/wikitext-2 generates",
        ),
        (
            ["routing.router=expert-choice", "merging.protocol=smoe", "task.suite=qa", "task.name=squad"],
            "generates: expected linear or cosine, or upcycle.layers: a list of the encoder's",
        ),
        (
            ["routing.router=expert-choice", "merging.protocol=smoe", "routing.granularity=sequence"],
            "routing.granularity: protocol 'smoe' does not allow 'sequence'",
        ),
        (["upcycle.init=checkpoints"], "upcycle.init: checkpoints needs donors for at least 2 experts"),
        (
            ["upcycle.from=[./law, ./code]"],
            "upcycle.from: no donor is read with upcycle.init: copy: expected init",
        ),
        ([*DONORS, "merging.experts=3"], "merging.experts: 2 donors give 2 experts, got 3"),
        ([*DONORS, "upcycle.each=2", "merging.experts=2"], "2 donors give 4 experts, got 2"),
        ([*DONORS, "upcycle.form=[a, b]"], "Did you mean 'upcycle.from'?"),
        (
            ["routing.init=fit"],
            "routing.init: fit tells donors apart by their own texts, and there are no donors",
        ),
        (
            [*DONORS, "routing={init: fit, fit: {from: [a.csv]}}"],
            "routing.fit.from: expected one source of texts for each donor, 2, got 1",
        ),
        (
            [*DONORS, "routing={init: fit, router: cosine}"],
            "routing.init: the router that is fitted is linear",
        ),
        (["merging.protocol=dense", "tuning.mode=router"], "tuning.mode: protocol 'dense' has no experts"),
        (
            ["merging.protocol=smear", "tuning.mode=router+curvature"],
            "tuning.mode: protocol 'smear' has no curvature: expected mode: router",
        ),
        (
            ["data={source: disk, dir: rows, domain: 1}"],
            "data.domain: the data of source disk do not know their domains",
        ),
        (["routing.temperature=0"], "routing.temperature: expected more than 0, got 0"),
        (["upcycle.drop=1.5"], "upcycle.drop: expected at most 1, got 1.5"),
        (["routing.router=cosin"], "routing.router"),
        (["task.suite=gleu"], "task.suite: unknown suite 'gleu'. Did you mean 'glue'?"),
        (["task.name=SST-2"], "task.name: unknown task 'SST-2' of suite glue. Did you mean 'sst2'?"),
        (["task.name=boolq"], "It belongs to suite superglue."),
        (
            ["backbone=embedded/gpt3"],
            "unknown embedded backbone 'embedded/gpt3'. Did you mean 'embedded/gpt2'?",
        ),
        (["data.source=disk"], "data.source: disk needs data.dir"),
        (["profile=paper", "backbone=embedded/t5"], "backbone: profile paper takes no embedded backbone"),
        (["profile=paper", "data.source=embedded"], "data.source: profile paper takes no embedded data"),
        (
            ["training.eval_strategy=no"],
            "training.eval_strategy: the best epoch can't be kept without evaluation",
        ),
        (["training.eval_strategy=steps"], "training.save_strategy: 'epoch' can't keep the best epoch"),
        (
            ["training.eval_strategy=steps", "training.save_strategy=steps", "training.eval_steps=30"],
            "training.save_steps: saving every 500 steps can't keep the best of evaluations every 30 steps",
        ),
    ],
)
def test_impossible_combinations(write, overrides, expected):
    said = only(write("profile: auto\n"), *overrides)
    assert said.startswith("override '")
    assert expected in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["merging.protocol=dense", "merging.experts=1"],
        ["merging.experts=4", "merging.top_k=4"],
        ["training.eval_strategy=no", "training.save_strategy=no", "training.load_best_model_at_end=false"],
        ["training.eval_strategy=steps", "training.save_strategy=best"],
        [
            "training.eval_strategy=steps",
            "training.save_strategy=steps",
            "training.eval_steps=0.1",
            "training.save_steps=0.2",
        ],
        ["merging.alpha=0"],
        [*DONORS, "merging.experts=2"],
        [*DONORS, "upcycle.each=2", "merging.experts=4"],
        [*DONORS, "routing={init: fit, fit: {from: [a.csv, b.csv]}}"],
        ["merging.experts=2", "routing={init: fit, fit: {from: [a.csv, b.csv]}}"],
        ["merging.protocol=dense", "routing.init=fit"],
        ["routing.router=expert-choice", "merging.protocol=dense"],
        ["routing.router=expert-choice", "merging.protocol=smoe", "backbone=embedded/gpt2"],
        [
            "routing.router=expert-choice",
            "merging.protocol=smoe",
            "task.suite=qa",
            "task.name=squad",
            "upcycle.layers=[0]",
        ],
    ],
)
def test_possible_combinations(write, overrides):
    load_config(write("profile: auto\n"), overrides)


def test_everything_is_reported_together_in_the_order_of_lines(write):
    write("merging: {expert: 3}\n", "base.yaml")
    path = write(
        "extends: base.yaml\ntask:\n  name: sst9\nmerging:\n"
        "  experts: many\n  alpha: -1\n  alpha: 2\n  top_k: 9\nextra: 1\n"
    )
    found = errors(path, "routing.noise=maybe", "nonsense")
    assert [line.split(": ")[:2] for line in found] == [
        ["base.yaml:1", "merging.expert"],
        ["override 'nonsense'", "expected key=value, and there is no '='"],
        ["override 'routing.noise=maybe'", "routing.noise"],
        ["run.yaml:3", "task.name"],
        ["run.yaml:5", "merging.experts"],
        ["run.yaml:6", "merging.alpha"],
        ["run.yaml:7", "merging.alpha"],
        ["run.yaml:9", "extra"],
    ]


def test_a_value_that_is_refused_breaks_no_other_rule(write):
    """`experts: many` leaves top_k: 9 unjudged rather than measured against a default."""
    assert "merging.experts" in only(write("merging: {experts: many, top_k: 9}\n"))


def test_the_message_of_all_problems(write):
    with pytest.raises(UserError) as caught:
        load_config(write("task: {nam: rte}\nprofil: auto\n"))
    assert str(caught.value).splitlines() == [
        "The configuration has 2 problems:",
        "  run.yaml:1: task.nam: unknown key. Did you mean 'task.name'?",
        "  run.yaml:2: profil: unknown key. Did you mean 'profile'?",
    ]


@pytest.mark.parametrize(
    "section", ["merging:", "merging:\n  curvature:", "training:\n  # learning_rate: 1\n"]
)
def test_a_section_without_keys_is_as_if_not_written(write, section):
    assert load_config(write(f"profile: auto\n{section}\n")) == Config()


def test_an_unreadable_file_is_the_only_problem(write):
    said = only(write("task: [\n"), "merging.top_k=99")
    assert said.startswith("run.yaml:2: not valid YAML")


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "configs/nowhere.yaml"])
def test_no_file(folder, name):
    assert only(name).startswith(f"{name}: ")


def test_a_shipped_configuration_is_found_by_name_and_the_nearest_is_named(folder):
    assert load_config("protocols/smear").merging.protocol == "smear"
    assert load_config("configs/protocols/smear.yaml").merging.protocol == "smear"
    assert "Did you mean 'protocols/smear'?" in only("protocols/smaer")
    Path("glue").mkdir()  # as a folder of data may be called
    assert load_config("glue").task.suite == "glue"


def test_a_missing_file_is_not_replaced_by_a_shipped_one_of_its_name(write):
    assert only("glue.yaml") == "glue.yaml: there is no such file. Did you mean 'glue'?"
    assert "glue.yaml: there is no such file." in only(write("extends: glue.yaml\n"))


def test_what_has_no_effect_is_noted(write):
    path = write(
        "merging: {alpha: 0.5, curvature: {rank: 3}}\nupcycle: {noise: 0.3}\ndata: {dir: x, source: hub}\n"
    )
    assert notes(load_config(path, ["merging.protocol=smear"])) == [
        "merging.curvature has no effect: protocol 'smear' has no curvature",
        "merging.alpha has no effect: protocol 'smear' has no base expert",
        "upcycle.noise has no effect with upcycle.init: copy",
        "data.dir has no effect with data.source: hub",
    ]
    assert notes(load_config(write("profile: auto\n"))) == []
    kind = write("merging: {protocol: ties, curvature: {kind: diagonal}}\n")
    assert notes(load_config(kind)) == ["merging.curvature has no effect: protocol 'ties' has no curvature"]
    assert notes(load_config(kind, ["merging.protocol=ties-ca"])) == []


@pytest.mark.parametrize(
    ("task", "key", "message"),
    [
        (
            "{name: rte, block_size: 64}",
            "task.block_size",
            "an option of language modelling; glue/rte is a task of classification, with the options max_length",
        ),
        (
            "{suite: lm, name: text, max_length: 9}",
            "task.max_length",
            "an option of classification or question answering; lm/text is a task of language modelling, with the "
            "options block_size, stride",
        ),
        (
            "{suite: qa, name: wikiqa, stride: 9}",
            "task.stride",
            "an option of language modelling; qa/wikiqa is a task of question answering, with the options max_length, "
            "doc_stride, answer_length, beams",
        ),
    ],
)
def test_an_option_of_another_kind_of_task_is_refused(write, task, key, message):
    path = write(f"profile: embedded\ntask: {task}\n")
    assert only(path) == f"{path}:2: {key}: {message}"


def test_a_configuration_of_before_with_the_options_of_every_kind_is_read(write):
    """It holds those of other kinds at their defaults."""
    every = "block_size: 1024, stride: null, doc_stride: 128, answer_length: 32, beams: 1"
    before = load_config(write(f"profile: embedded\ntask: {{name: rte, max_length: 9, {every}}}\n"))
    assert before == load_config(write("profile: embedded\ntask: {name: rte, max_length: 9}\n"))
    modelling = "{suite: lm, name: text, max_length: 128, block_size: 64}"
    assert load_config(write(f"profile: embedded\ntask: {modelling}\n")).task.length == 64


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["routing.normalise=before"], "routing.normalise has no effect: all experts are chosen"),
        (["routing.temperature=2", "merging.top_k=1"], "routing.temperature has no effect: one expert"),
        (["upcycle.drop=0.1", "upcycle.init=noise"], "upcycle.drop has no effect with upcycle.init: noise"),
        (
            ["routing.router=expert-choice", "merging.protocol=smoe"],
            "routing.router: expert-choice chooses nothing, since every expert takes every token",
        ),
        (
            ["routing.router=expert-choice", "merging={protocol: smoe, top_k: 2}", "routing.balance=0.3"],
            "routing.balance has no effect: experts that choose",
        ),
        (["upcycle.base=mean"], "upcycle.base has no effect with upcycle.init: copy"),
        (
            [*DONORS, "upcycle.others_scale=1"],
            "upcycle.others_scale has no effect with upcycle.others: average",
        ),
        (
            [*DONORS, "upcycle.base=mean", "merging.protocol=smear"],
            "upcycle.base has no effect: protocol 'smear' has no base expert",
        ),
        (["routing.fit.rows=9"], "routing.fit has no effect with routing.init: random"),
    ],
)
def test_routing_and_upcycling_without_effect_are_noted(write, overrides, said):
    (found,) = notes(load_config(write("profile: auto\n"), overrides))
    assert found.startswith(said)


@pytest.mark.parametrize(
    "overrides",
    [
        ["routing={normalise: before, temperature: 2}", "merging.top_k=1"],
        ["routing.router=cosine", "routing.temperature=2"],
        ["upcycle={init: drop, drop: 0.1}"],
        [*DONORS, "upcycle={base: mean, others: ties, others_scale: 1.0}"],
        ["merging.protocol=dense", "routing.normalise=before"],
        ["routing={router: expert-choice, temperature: 2}", "merging={protocol: smoe, top_k: 1}"],
    ],
)
def test_and_not_where_they_have_one(write, overrides):
    assert not any("no effect" in note for note in notes(load_config(write("profile: auto\n"), overrides)))


def test_donors_are_as_many_experts_as_they_give(write):
    settled, _ = resolve(load_config(write("profile: embedded\n"), [*DONORS, "upcycle.each=3"]), needs=False)
    assert settled.merging.experts == 6


def test_a_donor_that_is_not_there_is_reported_with_its_key(write, tmp_path):
    (tmp_path / "law").mkdir()
    donors = f"upcycle.from=[{tmp_path}/law, {tmp_path}/laws]"
    with pytest.raises(ConfigErrors, match=r"upcycle.from: there is no folder .*laws'. Did you mean 'law'"):
        resolve(load_config(write("profile: embedded\n"), ["upcycle.init=checkpoints", donors]))


def test_reading_a_plain_configuration_needs_no_training_arguments(write):
    """Importing them takes seconds; only keys that the schema does not name ask for them."""
    path = write("training: {learning_rate: 1e-3, seed: 3}\n")
    code = (
        "import sys, camex_ft_cli; from camex_ft.config import reading, validation, training_arguments as t; "
    )
    code += f"from camex_ft.config.reading import compose; d = compose({str(path)!r}); "
    code += "values = dict(d.values); list(validation._check_training(values, d)); "
    code += "assert not d.problems; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
