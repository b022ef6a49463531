"""`make verify`: every command is called, every claim has tests, and the page says what came of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from camex_ft.cli import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def verify():
    spec = importlib.util.spec_from_file_location("verify", ROOT / "scripts" / "verify.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["verify"]


def test_every_command_is_called(verify):
    called = {name.partition(" (")[0] for name in verify.SMOKES}
    assert called == verify.commands(typer.main.get_command(app))


def test_every_claim_names_tests_that_are_there(verify):
    for claim in verify.CLAIMS.values():
        for path in claim.tests:
            assert (ROOT / path.removeprefix("--ignore=")).exists(), path


REPORT = """<testsuite>
  <testcase classname="tests.a" name="right"/>
  <testcase classname="tests.a" name="wrong"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
  <testcase classname="tests.a" name="broken"><error message="no such fixture"/></testcase>
  <testcase classname="tests.a" name="elsewhere"><skipped message="needs a GPU"/></testcase>
</testsuite>"""


def test_a_report_is_read(verify):
    passed, failed, skipped = verify.read(list(ElementTree.fromstring(REPORT).iter("testcase")))
    assert passed == 1
    assert failed == ["tests.a::wrong: assert 1 == 2", "tests.a::broken: no such fixture"]
    assert skipped == ["needs a GPU"]


def test_tests_that_cannot_be_run_do_not_hold(verify, monkeypatch):
    said = "ERROR: file or directory not found: tests/no_such_file.py\n"
    ended = subprocess.CompletedProcess([], 4, stdout="no tests ran\n", stderr=said)
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: ended)
    outcome = verify.check("none", verify.Claim("nothing", ["tests/no_such_file.py"]))
    assert not outcome.holds
    assert outcome.failed == [said.strip()]


def test_the_page_says_what_holds_and_what_does_not(verify):
    outcomes = [
        verify.Outcome("good", "one | two", 3, skipped=["needs a GPU", "needs a GPU"]),
        verify.Outcome("bad", "three", 1, ["it broke"]),
        verify.Outcome("empty", "four", 0),
    ]
    page = verify.page(outcomes, [("device", "cpu-2")], "2026-11-22")
    assert "**2 of 3 do not hold.**" in page
    assert "| good | one \\| two | holds | 3 | 2 | 0 |" in page
    assert "| bad | three | **does not hold** | 2 |  | 0 |" in page
    assert "| empty | four | not looked at | 0 |" in page
    assert "- bad: it broke" in page
    assert "- good: needs a GPU (2 times)" in page
    assert "- device: cpu-2" in page
