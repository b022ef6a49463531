"""Text of other people is shown as it is, and neither runs nor counts as markup, wherever it is shown."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from camex_ft.utils import escaping

HOSTILE = [
    '=HYPERLINK("http://evil.example";"open")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    " =1",
    "a`b``c",
    "a|b\\|c\\",
    "one\ntwo\r\nthree\u2028four",
    "<script>alert(1)</script>",
    "</td></table>",
    "![x](javascript:alert(1)) [y]: z",
    "*bold* _under_ ~~gone~~ $x$ &lt;b&gt;",
    "# heading",
    "- item",
    "1. item",
    "> said",
    "\x1b[31mred\x1b[0m\x07",
    "[red]markup[/red] [/]",
    "abc\u202etxt.exe",
    "\\input{/etc/passwd} 50% & $",
    "_hidden",
]
TEXTS = st.text(
    alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("`|\\<>&*_[]()#-=+@$~!\n\r\t\x1b "),
    max_size=30,
)


def rendered(markdown: str) -> tuple[str, list[str]]:
    """Return the text that a renderer of Markdown shows, line breaks as spaces, and the kinds of what it found."""
    words: list[str] = []
    kinds: list[str] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown):
        kinds.append(token.type)
        for child in token.children or []:
            kinds.append(child.type)
            words.append(" " if child.type == "softbreak" else child.content)
    return "".join(words), kinds


def code_of(markdown: str) -> str:
    """Return the text of inline code, in backticks or in the element, as a browser shows it."""

    class Seen(HTMLParser):
        def __init__(self) -> None:
            super().__init__(convert_charrefs=True)
            self.words, self.tags = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, attributes))

        def handle_data(self, data):
            self.words.append(data)

    seen = Seen()
    seen.feed(MarkdownIt("commonmark").enable("table").render(markdown))
    seen.close()
    assert [tag for tag, _ in seen.tags if tag not in ("p", "table", "thead", "tbody", "tr", "th", "td")] == [
        "code"
    ]
    return "".join(seen.words)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("begins", [False, True])
def test_markdown_shows_the_text_and_nothing_else(text, begins):
    made = escaping.markdown(text, begins=begins)
    found, kinds = rendered(made if begins else f"x {made}")
    assert found.removeprefix("" if begins else "x ") == escaping.one_line(text)
    assert set(kinds) <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}


@given(TEXTS)
def test_no_text_is_markup_in_markdown(text):
    _, kinds = rendered(f"x {escaping.markdown(text)} y")
    assert set(kinds) <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_a_table_shows_the_text(text):
    made = f"| a | b |\n|---|---|\n| {escaping.markdown_code(text)} | end |\n"
    found = code_of(made).split()
    assert found == ["a", "b", *escaping.one_line(text).split(), "end"]


@given(TEXTS.filter(lambda text: escaping.one_line(text)))
def test_no_text_leaves_its_cell(text):
    cell = escaping.markdown_code(text)
    html = MarkdownIt("commonmark").enable("table").render(f"| a | b |\n|---|---|\n| {cell} | end |\n")
    assert html.count("<td>") == 2 and html.count("<tr>") == 2 and "<td>end</td>" in html


def test_code_stays_in_backticks_where_it_can():
    assert escaping.markdown_code("ties-ca, alpha 0.5") == "`ties-ca, alpha 0.5`"
    assert escaping.markdown_code("") == ""


def test_a_name_in_backticks_keeps_to_its_own():
    line = f"left out: {escaping.quoted('a`<b>`')} 0, <i>"
    assert escaping.markdown_notes(line) == "left out: `a'<b>'` 0, \\<i>"
    assert escaping.html_notes(line) == "left out: <code>a&#x27;&lt;b&gt;&#x27;</code> 0, &lt;i&gt;"
    assert escaping.latex_notes(line) == "left out: a'$<$b$>$' 0, $<$i$>$"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_of_a_csv_file_is_a_formula(text):
    file = io.StringIO()
    csv.writer(file).writerow([escaping.csv_text(text), 1])
    [[cell, _]] = csv.reader(io.StringIO(file.getvalue()))
    assert not cell.lstrip().startswith(("=", "+", "-", "@"))
    if text[0] in "=+-@\t\r":
        assert cell.startswith("'") and cell[1:] == escaping.printable(text)
    assert "\x1b" not in cell


@pytest.mark.parametrize("value", [-0.5, -3, None, True, "ties-ca", "a=b", "0 1 2"])
def test_numbers_and_plain_texts_stay_as_they_are_in_csv(value):
    assert escaping.csv_text(value) is value or escaping.csv_text(value) == value


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_control_characters_and_markup_written_out(text, terminal):
    file = io.StringIO()
    escaping.say(Console(file=file, force_terminal=terminal, width=40), text)
    shown = file.getvalue()
    assert not set(shown) & {*map(chr, range(9)), "\x0b", "\r", "\x1b", "\x07", "\u2028", "\u202e"}
    assert shown.replace("\n", "") == escaping.printable(text).replace("\n", "").expandtabs(8)


def test_one_line_is_one_line():
    assert escaping.one_line(" a\n\tb\r\nc\u2028d\x0be\x1b[1m ") == "a b c d e\\x1b[1m"


@given(TEXTS)
def test_html_is_text(text):
    class Seen(HTMLParser):
        tags, words = 0, ""

        def handle_starttag(self, tag, attributes):
            self.tags += 1

        def handle_data(self, data):
            self.words += data

    seen = Seen()
    seen.feed(f"{escaping.html(text)}")
    seen.close()
    assert seen.tags == 0 and seen.words == escaping.printable(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_has_no_command_of_the_text(text):
    made = escaping.latex(text)
    for sign in escaping.LATEX.values():
        made = made.replace(sign, "")
    assert not set(made) & set("\\%&#_{}~^$`\n")


def test_markdown_of_the_package_stays_in_its_cell():
    assert escaping.markdown_cell("`a|b` or\n *c*, \\| too") == "`a\\|b` or *c*, \\| too"


def test_an_error_is_told_without_control_characters(capsys):
    from camex_ft.utils.errors import UserError, guard

    def command():
        raise UserError("row '\x1b[2J\x07evil' occurs twice\nand a second line")

    assert guard(command) == 2
    assert capsys.readouterr().err == "error: row '\\x1b[2J\\x07evil' occurs twice\nand a second line\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_listings_and_summaries_show_names_as_they_are(terminal):
    from camex_ft.results.record import print_summary
    from camex_ft.utils.escaping import print_rows
    from tests.helpers.synthetic_results import result

    name = "[red]x[/red] \x1b[2J"
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system=None)
    print_rows(("a",), [(name,)], console=console)
    record = result(task=name, protocol=name, seed=0, scores=[0.5]).record
    print_summary(record, ".", console=console)
    assert file.getvalue().count("[red]x[/red] \\x1b[2J") >= 3 and "\x1b[2J" not in file.getvalue()
