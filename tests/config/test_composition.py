"""`extends` and overrides: what wins, where it was written, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.config.composition import compose, merge, read_override
from camex_ft.config.reading import Document, read_text

NUMBER = st.integers() | st.lists(st.integers(), max_size=2)
# What is a mapping in one tree is one in all, as in the schema: a value that replaces a mapping forgets what was below.
TREES = st.fixed_dictionaries(
    {},
    optional={
        "a": NUMBER,
        "b": st.fixed_dictionaries(
            {}, optional={"x": NUMBER, "y": st.dictionaries(st.sampled_from("pq"), NUMBER)}
        ),
    },
)


def said(document: Document) -> list[str]:
    return [str(problem) for problem in document.problems]


@given(TREES, TREES, TREES)
def test_merging_is_associative_and_the_empty_document_changes_nothing(a, b, c):
    a, b, c = Document(a), Document(b), Document(c)
    assert merge(merge(a, b), c).values == merge(a, merge(b, c)).values
    assert merge(a, Document()).values == merge(Document(), a).values == a.values


def test_mappings_are_merged_and_the_rest_is_replaced():
    lower = read_text("a: {x: 1, y: [1, 2]}\nb: {z: 1}\n", "low")
    upper = read_text("a: {y: [3]}\nb: 7\nc: 1\n", "up")
    merged = merge(lower, upper)
    assert merged.values == {"a": {"x": 1, "y": [3]}, "b": 7, "c": 1}
    assert str(merged.origins[("a", "x")]) == "low:1"
    assert str(merged.origins[("a", "y")]) == "up:1"
    assert ("b", "z") not in merged.origins


def test_a_section_whose_lines_are_all_comments_changes_nothing():
    assert merge(read_text("a: {x: 1}", "low"), read_text("a:\n  # x: 2\n", "up")).values == {"a": {"x": 1}}


def test_extends_is_relative_to_its_file_and_later_ones_win(write):
    write("task: {name: rte, max_length: 1}\noutput: {dir: a}\n", "base/one.yaml")
    write("task: {max_length: 2}\n", "base/two.yaml")
    write("extends: [one.yaml, two.yaml]\noutput: {dir: b}\n", "base/both.yaml")
    path = write("extends: ../base/both.yaml\nprofile: embedded\n", "mine/run.yaml")
    document = compose(path)
    assert document.problems == []
    assert document.values == {
        "task": {"name": "rte", "max_length": 2},
        "output": {"dir": "b"},
        "profile": "embedded",
    }
    assert str(document.origins[("task", "max_length")]) == "base/two.yaml:1"


def test_a_file_that_is_extended_twice_is_no_circle(write):
    write("profile: paper\n", "top.yaml")
    write("extends: top.yaml\n", "left.yaml")
    write("extends: top.yaml\n", "right.yaml")
    assert compose(write("extends: [left.yaml, right.yaml]\n")).values == {"profile": "paper"}


@pytest.mark.parametrize("spelling", ["run.yaml", "./run.yaml", "sub/../run.yaml"])
def test_a_circle_is_shown(write, spelling):
    write("x: 1\n", "sub/x.yaml")
    write(f"profile: paper\nextends: {spelling}\n", "other.yaml")
    document = compose(write("extends: other.yaml\n"))
    assert said(document) == ["other.yaml:2: extends: circular: run.yaml -> other.yaml -> run.yaml"]


def test_a_file_that_extends_itself(write):
    assert said(compose(write("extends: run.yaml\n"))) == [
        "run.yaml:1: extends: circular: run.yaml -> run.yaml"
    ]


@pytest.mark.parametrize("value", ["3", "[]", "[a.yaml, 3]", "{a: b}", "''", "null"])
def test_extends_takes_paths(write, value):
    write("profile: paper\n", "a.yaml")
    document = compose(write(f"profile: embedded\nextends: {value}\n"))
    assert [line.split(",")[0] for line in said(document)] == [
        "run.yaml:2: extends: expected a path or a list of paths"
    ]


def test_a_missing_file_is_reported_at_the_line_that_names_it_with_the_nearest(write):
    write("profile: paper\n", "common.yaml")
    document = compose(write("profile: embedded\nextends: comon.yaml\n"))
    assert said(document) == [
        "run.yaml:2: extends: comon.yaml: there is no such file. Did you mean 'common.yaml'?"
    ]


def test_problems_of_all_files_are_reported(write):
    write("a: 1\na: 2\n", "one.yaml")
    write("b: [\n", "two.yaml")
    document = compose(write("extends: [one.yaml, two.yaml]\nc: 1\nc: 2\n"))
    assert sorted(line.split(":")[0] for line in said(document)) == ["one.yaml", "run.yaml", "two.yaml"]


def test_shipped_configurations_are_known_by_name(write):
    document = compose(write("extends: protocols/smear\n"))
    assert document.values["merging"]["protocol"] == "smear"
    assert document.values["task"]["suite"] == "glue"


def test_a_file_of_the_user_comes_before_a_shipped_one(write):
    write("profile: paper\n", "glue")
    assert compose(write("extends: glue\n")).values == {"profile": "paper"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("task.name=rte", {"task": {"name": "rte"}}),
        ("training.learning_rate=2e-4", {"training": {"learning_rate": 2e-4}}),
        ("upcycle.layers=[0, 2]", {"upcycle": {"layers": [0, 2]}}),
        (
            "merging={protocol: ties, options: {density: 0.5}}",
            {"merging": {"protocol": "ties", "options": {"density": 0.5}}},
        ),
        ("data.dir=a=b", {"data": {"dir": "a=b"}}),
        ("merging.top_k=", {"merging": {"top_k": None}}),
        ("merging.top_k=null", {"merging": {"top_k": None}}),
        (" task.name = rte ", {"task": {"name": "rte"}}),
    ],
)
def test_an_override_is_a_dotted_key_and_a_value_in_yaml(text, values):
    document = read_override(text)
    assert document.problems == []
    assert document.values == values
    assert {str(origin) for origin in document.origins.values()} == {f"override '{text}'"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task.name", "there is no '='"),
        ("", "there is no '='"),
        ("=rte", "expected a key such as task.name before '='"),
        ("task..name=rte", "expected a key such as task.name before '='"),
        (".=1", "expected a key such as task.name before '='"),
        ("upcycle.layers=[0", "not valid YAML"),
        ("merging={a: 1, a: 2}", "written twice"),
        ("extends=glue", "`extends` is written in files only"),
    ],
)
def test_an_override_that_can_not_be(text, expected):
    (problem,) = read_override(text).problems
    assert str(problem).startswith(f"override '{text}': ")
    assert expected in str(problem)


def test_later_overrides_win(write):
    document = compose(write("task: {name: rte}\n"), ["task.name=sst2", "task.name=mnli"])
    assert document.values == {"task": {"name": "mnli"}}
    assert str(document.origins[("task", "name")]) == "override 'task.name=mnli'"
