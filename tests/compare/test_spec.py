"""What a specification may say: every mistake is reported at its line, with the nearest name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.compare.spec import Spec, is_spec, of_config, read_spec
from camex_ft.config import ConfigErrors
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

ROWS = "rows: [{merging.protocol: [dense, ties]}]"
SEEDS = "expected how many, from 1 to 1000, or a list of whole numbers from 0, got"
TASKS = "expected names of tasks, a list, or a mapping of each to changes by key, got"
OF_ROWS = "expected a list of mappings, such as - merging.protocol: [dense, ties], got"

MISTAKES = {
    # unknown keys
    "row: 3": "spec.yaml:2: row: unknown key. Did you mean 'rows'?",
    "colour: 3": "colour: unknown key. Expected one of set, tasks, rows, seeds, title, about, config",
    "embedded: {seed: 3}": "spec.yaml:2: embedded.seed: unknown key. Did you mean 'seeds'?",
    "embedded: {title: x}": "embedded.title: unknown key. Expected one of set, tasks, rows, seeds",
    # types
    "title: 3": "spec.yaml:2: title: expected text, got 3",
    "set: [1]": "spec.yaml:2: set: expected a mapping, got [1] (a list)",
    'seeds: "3"': f'spec.yaml:2: seeds: {SEEDS} "3" (text)',
    "seeds: 0": f"seeds: {SEEDS} 0",
    "seeds: []": f"seeds: {SEEDS} [] (a list)",
    "seeds: [1, -1]": f"seeds: {SEEDS} [1, -1] (a list)",
    "seeds: 1000000": f"seeds: {SEEDS} 1000000",
    "tasks: 4": f"spec.yaml:2: tasks: {TASKS} 4",
    "tasks: []": f"tasks: {TASKS} [] (a list)",
    "tasks: {}": f"tasks: {TASKS} an empty mapping",
    "tasks: {rte: 3}": f"tasks: {TASKS} a mapping with 1 keys",
    "rows: {dense: 1}": f"spec.yaml:2: rows: {OF_ROWS} a mapping with 1 keys",
    "rows: []": f"rows: {OF_ROWS} [] (a list)",
    "embedded:\n  seeds: 0": f"spec.yaml:3: embedded.seeds: {SEEDS} 0",
    # rows
    "rows:\n  - merging.protocol: dense\n  - {}": "rows.1: a row without values",
    "rows:\n  - merging.protocol: dense\n  - {name: x}": "spec.yaml:4: rows.1: a row without values",
    "rows:\n  - merging.protocol: []": "spec.yaml:3: rows.0: merging.protocol: expected a value, or several in a list",
    "rows:\n  - merging.protocol: dense\n  - {name: x, merging.protocol: [ties, dare]}": (
        "spec.yaml:4: rows.1: the name 'x' would be that of several rows: name only rows with one value for each key"
    ),
    "rows: [{name: [x], merging.protocol: dense}]": 'rows.0: expected a text, got ["x"] (a list)',
    "rows: [{merging.protocol: [dense, dense]}]": "spec.yaml:2: rows: dense occurs twice",
    "rows: [{merging.protocol: dense, merging.alpha: ["
    + "1, " * 1001
    + "]}]": "1,001 rows: expected at most 1,000",
    "tasks: [rte, rte]": "spec.yaml:2: tasks: rte occurs twice",
    "seeds: [1, 1]": "spec.yaml:2: seeds: 1 occurs twice",
    "embedded: {seeds: [1, 1]}": "spec.yaml:2: embedded.seeds: 1 occurs twice",
    # the baseline
    f"{ROWS}\nbaseline: tiez": "spec.yaml:3: baseline: there is no row 'tiez'. Did you mean 'ties'? Rows: dense, ties",
    "rows: [{merging.protocol: ties}]": "spec.yaml: baseline: there is no row 'dense'. Rows: ties",
    f"{ROWS}\nembedded: {{rows: [{{merging.protocol: ties}}]}}": "there is no row 'dense' under embedded. Rows: ties",
    "published: glue-t5": "spec.yaml:2: published: no published experiment is called 'glue-t5'. Did you mean",
    # keys that belong elsewhere
    "set: {task.name: rte}": "spec.yaml:2: set: task.name cannot be set here: it is set by `tasks`",
    "set: {task: {name: rte}}": "set: task.name cannot be set here: it is set by `tasks`",
    "set: {training.seed: 1}": "training.seed cannot be set here: it is set by `seeds`",
    "set: {output.dir: x}": "output.dir cannot be set here: it is set by `camex-ft compare`",
    "rows: [{merging.protocol: dense, task.suite: qa}]": "task.suite cannot be set here: it is set by `tasks`",
    "tasks: {rte: {task.name: sst2}}": "spec.yaml:2: tasks.rte: task.name cannot be set here",
    "rows: [{merging.protocol: dense, profile: paper}]": "profile cannot be set here",
    # YAML
    "rows:\n  - merging.protocol: dense\n    merging.protocol: ties": (
        "spec.yaml:4: rows.0.merging.protocol: written twice in one mapping, here and on line 3"
    ),
    "rows: [": "spec.yaml:3: not valid YAML",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text.partition("\n")[0][:40])
def test_a_mistake_is_reported_with_its_line(write, text):
    with pytest.raises(ConfigErrors) as raised:
        read_spec(write(f"config: glue\n{text}\n"))
    assert MISTAKES[text] in str(raised.value)


def test_all_mistakes_are_reported_at_once(write):
    with pytest.raises(ConfigErrors) as raised:
        read_spec(write("config: 3\nseeds: 0\ntasks: 4\nrow: 1\n"))
    assert [p.key for p in raised.value.problems] == [("config",), ("seeds",), ("tasks",), ("row",)]


def test_what_is_no_specification_at_all(write, folder):
    (folder / "folder.yaml").mkdir()
    (folder / "binary.yaml").write_bytes(bytes(range(128, 256)))
    write("config: glue\n#" + "x" * 100_000, "huge.yaml")
    write("", "empty.yaml")
    expected = {
        "folder.yaml": "this is a folder",
        "binary.yaml": "not UTF-8 text",
        "huge.yaml": "larger than 100,000 bytes",
        "empty.yaml": "the file is empty",
        "nowhere.yaml": "there is no such file",
        "tables/gleu": "there is no such file. Did you mean 'tables/glue'?",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigErrors, match=message.replace("?", r"\?").replace(".", r"\.")):
            read_spec(name)
        assert not is_spec(name)
    with pytest.raises(
        ConfigErrors, match="config: is missing: expected the configuration that every cell starts from"
    ):
        read_spec(write("seeds: 3"))


def test_a_specification_says_which_configuration_it_is_of(write):
    assert is_spec("tables/glue")
    assert not is_spec("glue")
    assert not is_spec(write("merging: {protocol: ties}"))


def test_its_configuration_is_looked_for_beside_it(write):
    write("task: {name: rte}", "mine/base.yaml")
    assert read_spec(write("config: base.yaml", "mine/spec.yaml")).config == "mine/base.yaml"
    assert read_spec(write("config: glue", "mine/spec.yaml")).config == "glue"


def test_defaults():
    spec = Spec(config="glue")
    assert spec.seed_list() == [0, 1, 2]
    others = [name for name in PROTOCOLS.names() if name != "dense"]
    assert [label for label, _ in spec.row_list()] == ["dense", *others]
    assert (spec.baseline, spec.task_list()) == ("dense", {})


def test_rows_are_every_combination_of_values_in_order():
    rows = [{"merging.protocol": "dense"}, {"merging.protocol": ["a", "b"], "merging.alpha": [0.5, 1.0]}]
    named = {"name": "κ, wide", "merging.protocol": "a", "merging.experts": 8}
    assert Spec(config="glue", rows=[*rows, named]).row_list() == [
        ("dense", {"merging.protocol": "dense"}),
        ("a, alpha 0.5", {"merging.protocol": "a", "merging.alpha": 0.5}),
        ("a, alpha 1", {"merging.protocol": "a", "merging.alpha": 1.0}),
        ("b, alpha 0.5", {"merging.protocol": "b", "merging.alpha": 0.5}),
        ("b, alpha 1", {"merging.protocol": "b", "merging.alpha": 1.0}),
        ("κ, wide", {"merging.protocol": "a", "merging.experts": 8}),
    ]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["merging.protocol", "merging.alpha", "merging.experts"]),
            st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
            min_size=1,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_there_are_as_many_rows_as_combinations(rows):
    found = Spec(config="glue", rows=rows).row_list()
    sizes = []
    for row in rows:
        sizes.append(1)
        for values in row.values():
            sizes[-1] *= len(values)
    assert len(found) == sum(sizes)
    start = 0
    for row, size in zip(rows, sizes, strict=True):
        own = [keys for _, keys in found[start : start + size]]
        assert all(list(keys) == list(row) for keys in own)
        assert len({tuple(keys.values()) for keys in own}) == size
        start += size


def test_embedded_adds_to_set_and_replaces_the_rest():
    spec = Spec(
        config="glue",
        set={"a": 1, "b": 2},
        seeds=5,
        rows=[{"merging.protocol": "dense"}],
        embedded={"set": {"b": 3}, "seeds": [7]},
    )
    assert spec.under("paper") is spec
    embedded = spec.under("embedded")
    assert (embedded.set, embedded.seed_list(), embedded.rows) == ({"a": 1, "b": 3}, [7], spec.rows)


def test_a_configuration_is_a_comparison_of_its_protocols():
    every = of_config("glue")
    assert next(label for label, _ in every.row_list()) == every.baseline == "dense"
    assert {label for label, _ in every.row_list()} == set(PROTOCOLS.names())
    some = of_config("glue", protocols=["ties", "ties-ca"])
    assert ([label for label, _ in some.row_list()], some.baseline) == (["ties", "ties-ca"], "ties")
    with pytest.raises(UserError, match=r"there is no 'tise'\. Did you mean 'ties'\?"):
        of_config("glue", protocols=["dense", "tise"])
    with pytest.raises(UserError, match="'ties' occurs twice"):
        of_config("glue", protocols=["ties", "dense", "ties"])
