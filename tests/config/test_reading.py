"""YAML to values and lines: what people mean, what is refused, and that every message has its place."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.config.reading import (
    MAX_BYTES,
    MAX_NODES,
    Document,
    Dumper,
    compose,
    merge,
    read_file,
    read_override,
    read_text,
)

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
    | st.sampled_from(
        [
            "no",
            "on",
            "2e-4",
            "1_000",
            "010",
            "1:30",
            ".inf",
            "null",
            "~",
            "<<",
            "=",
            "2020-01-01",
            "0x1f",
            "\x85",
            "a\u2028b",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdef", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


def problems(text: str) -> list[str]:
    return [str(problem) for problem in read_text(text, "f.yaml").problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("0x1f", "0x1f"),
        ("", None),
        ("~", None),
        ("'2e-4'", "2e-4"),
        ("!!str 5", "5"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_what_people_mean(text, value):
    document = read_text(f"key: {text}", "f.yaml")
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


@pytest.mark.parametrize(("text", "value"), [(".inf", math.inf), ("-.INF", -math.inf)])
def test_infinity_is_read_and_left_to_the_schema(text, value):
    assert read_text(f"key: {text}", "f.yaml").values == {"key": value}


@given(PLAIN)
def test_what_the_dumper_writes_is_read_back(value):
    text = yaml.dump({"key": value}, Dumper=Dumper, allow_unicode=True)
    document = read_text(text, "f.yaml")
    assert document.problems == []
    assert document.values == {"key": value}


@given(st.lists(st.sampled_from(["", "# comment", "a:", "b:", "c:"]), max_size=8))
def test_lines_are_those_of_the_text(lines):
    text = "\n".join(f"{line} {n}" if line.endswith(":") else line for n, line in enumerate(lines))
    document = read_text(text, "f.yaml")
    for key, origin in document.origins.items():
        assert lines.index(f"{key[0]}:") == origin.line - 1


def test_a_nested_key_has_its_own_line():
    document = read_text("a:\n  b:\n    - x\n    - c: 1\n", "f.yaml")
    assert {key: origin.line for key, origin in document.origins.items()} == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "b", "1", "c"): 4,
    }
    assert str(document.origin(("a", "b", "missing"))) == "f.yaml:2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: written twice in one mapping, here and on line 1"),
        ("a:\n  b: 1\n  b: 1\n", "f.yaml:3: a.b: written twice"),
        ("a: 1\nb: [1\nc: 2\n", "f.yaml:3: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: *x\n", "f.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: expected a single document"),
        ("a: 1\nb: \x00\n", "f.yaml:2: not valid YAML: special characters are not allowed"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "f.yaml:1: the tag !!python/object/apply:os.system is not",
        ),
        ("a: !mine 3\n", "f.yaml:1: the tag !mine is not allowed"),
        ("a: !!binary aGk=\n", "f.yaml:1: the tag !!binary is not allowed"),
        ("a: !!int x\n", "f.yaml:1: 'x' is not what its tag !!int says"),
        ("x: &x {b: 1}\na:\n  <<: *x\n", "f.yaml:3: a.<<: merge keys are not read: use `extends`"),
        ("? [a, b]\n: 1\n", "f.yaml:1: a key must be a name"),
        ("a: &a [*a]\n", "f.yaml:1: nested deeper than 20 levels"),
        ("a: " + "[" * 700, "f.yaml: nested deeper than 20 levels"),
        ("a: " + "9" * 5000, "f.yaml:1: '9999"),
    ],
)
def test_what_is_refused_has_its_line(text, said):
    assert len(problems(text)) == 1
    assert problems(text)[0].startswith(said)


def test_aliases_that_expand_without_bound_are_refused():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert f"more than {MAX_NODES:,} values" in problems("\n".join(rows))[0]


def test_aliases_in_measure_are_read():
    assert read_text("a: &a [1, 2]\nb: *a\n", "f.yaml").values == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected keys and values such as 'task: {name: sst2}', and the file is empty"),
        (b"# nothing\n", "the file is empty"),
        (b"- a\n- b\n", "the file is a list"),
        (b"word\n", "the file is a str"),
        (b"a: \xff\xfe\n", "not UTF-8 text (byte 3)"),
        (b"a: 1 # " + b"x" * MAX_BYTES, "larger than 100,000 bytes"),
    ],
)
def test_a_file_that_is_no_configuration(folder, content, said):
    path = folder / "f.yaml"
    path.write_bytes(content)
    found = read_file(path).problems
    assert len(found) == 1
    assert said in str(found[0])
    assert str(found[0]).startswith(str(path))


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder):
    (folder / "f.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_file(folder / "f.yaml").values == {"a": 1}


def test_no_file_and_a_folder(folder):
    assert "there is no such file" in str(read_file(folder / "none.yaml").problems[0])
    assert "this is a folder" in str(read_file(folder).problems[0])


# -- several files and overrides

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
