"""Tables in each format: all that is in them is there, and nothing in them breaks the format."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from camex_ft.results.render import FORMATS, p_value, render, spread
from camex_ft.results.statistics import McNemar, PairedComparison, compare, holm
from camex_ft.results.tables import Panel, Published, Row, Scores, Table
from camex_ft.utils import escaping
from camex_ft.utils.errors import UserError

NASTY = "a|b_c & <d> 100% $x$ \\ #~^{}"
NUMBER = Published(value=94.61, source="camex", cite="CAMEx & Co", read="Table <1>", setting="alpha_1")


def row(label: str, scores: dict[int, float], base: dict[int, float] | None = None, **parts: object) -> Row:
    best = Scores(by_seed=scores)
    against = None if base is None else compare(scores, base)
    made = Row(label=label, keys={}, best=best, last=best, seeds=tuple(scores), missing=(), against=against)
    return replace(made, **parts)  # type: ignore[arg-type]


def table(
    *labels: str, tasks: tuple[str, ...] = ("glue/sst2",), title: str = "", notes: tuple[str, ...] = ()
) -> Table:
    base = {0: 80.0, 1: 81.0, 2: 82.5}
    rows = [row("dense", base, parameters=22_713_986, seconds=125.0, timed=3, memory=1500.0)]
    for i, label in enumerate(labels):
        found = row(label, {0: 81.0 + i, 1: 82.5 + i, 2: 83.0 + i}, base, mark="best" if i == 0 else "level")
        mcnemar = McNemar(seeds=3, gained=12, lost=5, p=0.14)
        assert found.against is not None
        rows.append(replace(found, against=replace(found.against, mcnemar=mcnemar), published=(NUMBER,)))
    for found, p in zip(rows[1:], holm([r.against.p_t for r in rows[1:] if r.against]), strict=True):
        rows[rows.index(found)] = replace(found, p_holm=p)
    panels = tuple(
        Panel(
            task=task,
            metric="accuracy",
            greater_is_better=True,
            scale=100,
            profile="paper",
            backbone="google-t5/t5-base",
            rows=tuple(rows),
            notes=notes,
        )
        for task in tasks
    )
    return Table(title=title, baseline="dense", level=0.05, panels=panels, comparisons=len(labels))


def test_markdown() -> None:
    text = render([table("ties")])
    assert "| `ties` | 0, 1, 2 | **82.17 ± 1.04** | 82.17 ± 1.04 |" in text
    assert "| `dense` | 0, 1, 2 | 81.17 ± 1.26 | 81.17 ± 1.26 | 22.7 M | 2 min 05 s | 1,500 MB |" in text
    assert "94.61 (−12.44)" in text  # ours minus the published number
    assert re.search(r"\| `ties` \| 3 \| \+1\.00 \| −0\.24 to \+2\.24 \| .* \| 12 : 5, p 0\.14 \|", text)
    assert "glue/sst2 against dense:" in text and "Best epoch:" not in text
    assert "camex: CAMEx & Co; Table \\<1>; alpha\\_1. In brackets: our score minus it." in text


def test_several_tasks_have_an_overview() -> None:
    text = render([table("ties", tasks=("glue/sst2", "glue/rte"))])
    assert text.startswith("Best epoch:\n\n| row | glue/sst2 (accuracy) | glue/rte (accuracy) |\n")
    assert text.count(" against dense:") == 2


def test_scores_are_of_evaluations_where_runs_are_not_evaluated_by_epochs() -> None:
    by_epoch = table("ties", tasks=("glue/sst2", "glue/rte"))
    panels = (by_epoch.panels[0], replace(by_epoch.panels[1], moment="evaluation"))
    text = render([replace(by_epoch, panels=panels)])
    assert text.startswith("Best evaluation:\n")
    assert "| best epoch | last epoch |" in text and "| best evaluation | last evaluation |" in text
    assert "Differences are of best evaluations" in text


def test_level_is_marked_and_explained_where_it_is_used() -> None:
    assert "83.17 ± 1.04 =" in render([table("ties", "dare")])
    assert "=: not significantly worse" in render([table("ties", "dare")])
    assert "McNemar" not in render([Table(title="", baseline="dense", level=0.05, panels=(), comparisons=0)])


def test_without_tests_there_is_no_second_table() -> None:
    assert "against" not in render([table()]) and "p:" not in render([table()])
    assert render([table("ties")], explained=False).rstrip().endswith("|")


@pytest.mark.parametrize("format", ["md", "tex", "html"])
def test_every_line_of_a_table_has_as_many_cells(format: str) -> None:
    text = render([table(NASTY, "ties", tasks=("a/b", "c/d"))], format)
    if format == "md":
        blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
        counts = [[len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()] for block in blocks]
    elif format == "tex":
        blocks = re.findall(r"\\toprule(.*?)\\bottomrule", text, flags=re.DOTALL)
        lines = [re.findall(r"^.*\\\\$", block, flags=re.MULTILINE) for block in blocks]
        counts = [[len(re.findall(r"(?<!\\)&", line)) for line in block] for block in lines]
    else:
        counts = [
            [block.count("<th ") + block.count("<td>") for block in re.findall("<tr>.*?</tr>", part)]
            for part in text.split("<table>")[1:]
        ]
    assert len(counts) == 5
    assert all(len(set(block)) == 1 and len(block) > 1 for block in counts)


def test_latex_is_escaped() -> None:
    text = render([table(NASTY, title="50% & more", notes=("`a_b` 0",))], "tex")
    assert (
        r"\texttt{a|b\_c \& $<$d$>$ 100\% \$x\$ \textbackslash{} \#\textasciitilde{}\textasciicircum{}\{\}}"
        in text
    )
    assert r"\paragraph{50\% \& more}" in text and r"a\_b 0\par" in text
    assert r"\textbf{82.17 $\pm$ 1.04}" in text and "$-$0.24 to +2.24" in text
    assert text.isascii()


class Seen(HTMLParser):
    """The tags that are open, the text, and what headings head."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.scopes: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "th":
            self.scopes.append(dict(attrs).get("scope"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_a_whole_fragment_in_which_all_text_is_text() -> None:
    seen = Seen(render([table(NASTY, title="<b>", notes=("`<i>` 0",))], "html"))
    assert seen.open == []
    assert NASTY in seen.words and "<b>" in seen.words and "<i>" in seen.words
    assert set(seen.scopes) == {"row", "col"}


def test_csv_has_all_numbers_in_full() -> None:
    made = table(NASTY, "ties", tasks=("a/b", "c/d"), title="t")
    lines = list(csv.DictReader(io.StringIO(render([made], "csv"))))
    assert [(line["task"], line["row"]) for line in lines[:3]] == [
        ("a/b", "dense"),
        ("a/b", NASTY),
        ("a/b", "ties"),
    ]
    assert len(lines) == 6
    against = made.panels[0].rows[2].against
    assert against is not None
    assert float(lines[2]["p_t"]) == against.p_t and float(lines[2]["effect_low"]) == against.effect.low
    assert float(lines[2]["p_holm"]) == made.panels[0].rows[2].p_holm
    assert lines[0]["p_t"] == "" and lines[0]["published_camex"] == ""
    assert float(lines[2]["difference_from_camex"]) == pytest.approx(83.1666666666 - 94.61)
    assert lines[2]["mcnemar_gained"] == "12"


def test_text_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    text = render([table("ties", notes=("said",))], "text")
    assert "*82.17 ± 1.04" in text and "- said" in text
    assert "*: best mean" in text and "Bold" not in text and "\x1b" not in text
    assert max(map(len, text.split("\n- ")[0].splitlines())) <= 140


def test_every_format_copes_with_what_has_not_been_run() -> None:
    nothing = Row(
        label="ties",
        keys={},
        best=Scores(),
        last=Scores(),
        seeds=(),
        missing=(0,),
        against=PairedComparison(seeds=()),
    )
    made = table()
    panel = replace(made.panels[0], rows=(nothing,), metric="", backbone="", profile="")
    for format in FORMATS:
        assert "ties" in render([replace(made, panels=(panel,))], format)


def test_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"'htm'\. Did you mean 'html'\? Expected md, "):
        render([table()], "htm")


@pytest.mark.parametrize(
    ("p", "text"), [(None, ""), (0.00041, "<0.001"), (0.0351, "0.035"), (0.4449, "0.44"), (1.0, "1.00")]
)
def test_p_values(p: float | None, text: str) -> None:
    assert p_value(p) == text


def test_spread() -> None:
    assert [spread(Scores(by_seed=of)) for of in ({}, {0: 1.0}, {0: 1.0, 1: 3.0})] == [
        "",
        "1.00",
        "2.00 ± 1.41",
    ]


HOSTILE = [
    '=HYPERLINK("http://evil.example")',
    "@SUM(1)",
    "a`b|c",
    "<script>alert(1)</script>",
    "two\nlines | x |\r\n# head",
    "[red]x[/red] \x1b[2J",
]


def hostile(text: str) -> Table:
    """A table whose every text is this one."""
    made = table(text, tasks=(text,), title=text, notes=(f"missing: {escaping.quoted(text)}",))
    panel = replace(made.panels[0], metric=text, profile=text, backbone=text)
    return replace(made, baseline=text, panels=(panel,))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_text_in_markdown(text: str) -> None:
    page = MarkdownIt("commonmark").enable("table").render(render([hostile(text)], "md"))
    seen = Seen(page)
    assert seen.open == [] and "<script" not in page and "<h1" not in page
    assert page.count("<tr>") == 3 + 2  # head, dense, the row; head and the row's test
    assert escaping.one_line(text) in "".join(seen.words).replace("\\|", "|")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_no_formulas_in_csv(text: str) -> None:
    lines = list(csv.DictReader(io.StringIO(render([hostile(text)], "csv"))))
    assert len(lines) == 2
    for line in lines:
        for name, cell in line.items():
            if cell and cell[0] in "=+-@\t\r":
                float(cell)  # a number
                assert name not in ("table", "task", "row", "metric", "profile", "backbone", "baseline")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("format", FORMATS)
def test_no_format_has_control_characters(text: str, format: str) -> None:
    made = render([hostile(text)], format)
    assert not set(made) & {"\x1b", "\x07", "\r"}
    if format == "text":
        assert text.partition("\n")[0].partition(" ")[0] in made  # rich's markup is shown


def test_the_legend_explains_what_is_there_and_no_more() -> None:
    made = render([table("ties")])
    assert "Bold: best mean of the task." in made and "=: not significantly" not in made
    assert "where less is better" not in made
    one = table()
    rows = tuple(
        replace(r, seeds=(0,), best=Scores(by_seed={0: 80.0}), mark="best") for r in one.panels[0].rows
    )
    single = render([replace(one, panels=(replace(one.panels[0], rows=rows),))])
    assert "Bold: best score of the task." in single and "standard deviation" not in single
