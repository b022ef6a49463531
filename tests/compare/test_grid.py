"""What is shown while cells run: lines, states in numbers, the time left."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from camex_ft.compare.grid import cell, headline, line, picture, time_left, view
from camex_ft.compare.running import DONE, FAILED, RUNNING, CellState


@pytest.fixture
def states(compared):
    """Six cells: two done, one of them before; one running, one failed, two waiting."""
    rows = "rows: [{merging.protocol: dense}, {name: 'κ, [bold] ties', merging.protocol: ties}]"
    cells = compared(f"config: glue\ntasks: [rte]\n{rows}\nseeds: 3").cells
    made = [CellState(cell=c) for c in cells]
    made[0].status, made[0].before = DONE, True
    made[1].status, made[1].seconds = DONE, 30.0
    made[2].status, made[2].started, made[2].share = RUNNING, time.monotonic() - 10, 0.25
    made[3].status, made[3].reason, made[3].log = FAILED, "no [memory] left", Path("a.log")
    return made


def printed(made, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(made)
    return console.file.getvalue()


def test_a_line_for_every_change(states):
    assert line(states[1], states) == "[3/6] glue/rte dense seed 1: done in 30.0 s"
    assert line(states[2], states) == "[3/6] glue/rte dense seed 2: running"
    assert (
        line(states[3], states)
        == "[3/6] glue/rte κ, [bold] ties seed 0: failed: no [memory] left (see a.log)"
    )


def test_states_in_numbers(states):
    assert str(cell(states[:3])) == "2 done, 1 running 25%"
    assert str(cell(states[3:])) == "1 failed, 2 waiting"
    assert headline(states, 2).startswith("2 done, 1 running, 2 waiting, 1 failed; about ")


def test_time_left_by_hand(states):
    """The running one has 30 s left of 40. Of its row one took 30; of the others' row none has run: the mean, 35 s."""
    running, waiting = 30.0, 35.0
    assert states[2].left == pytest.approx(running, abs=0.5)  # the clock goes on
    assert time_left(states, 1) == pytest.approx(running + 2 * waiting, abs=0.5)
    assert time_left(states, 2) == pytest.approx((running + 2 * waiting) / 2, abs=0.5)
    assert time_left(states, 100) == pytest.approx(waiting, abs=0.5)  # no sooner than the longest


def test_time_left_is_not_known_before_anything_has_run(states):
    states[1].before = True
    states[2].share = 0.0
    assert time_left(states, 2) is None
    assert "left" not in headline(states, 2)
    for state in states:
        state.status, state.seconds, state.before = DONE, 10.0, False
    assert time_left(states, 2) == 0.0


@pytest.mark.parametrize("width", [30, 40, 100])
def test_the_picture_fits_and_says_everything(states, width):
    shown = printed(picture(states, 2), width)
    assert all(len(row.rstrip()) <= width for row in shown.splitlines())
    words = " ".join(shown.split())
    for part in ("dense", "glue/rte", "[bold]", "[memory]", "running: glue/rte dense seed 2, 25%"):
        assert part in words.replace("│ ", "")
    assert "│ κ, [bold] ties" in printed(picture(states, 2), 100)


def test_a_terminal_is_redrawn_and_a_file_gets_lines(states):
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=60, force_terminal=terminal)
        with view(states, 2, console=console) as shown:
            shown.tick()
            shown.changed(states[1])
        text = console.file.getvalue()
        assert ("\x1b[" in text) is terminal
        if not terminal:
            assert text == "[3/6] glue/rte dense seed 1: done in 30.0 s\n"
