"""Which process is told of as the cause, and how."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from camex_ft.launching.placement import Placement
from camex_ft.launching.processes import Failure, describe, find_failures

TWO = Placement(device="cpu", processes=2)


def said(rank: int, **what: object) -> dict[str, object]:
    return {"rank": rank, "local": rank, "text": "ValueError: no", "time": 5.0, **what}


def report(**codes: int) -> str:
    """What torch's launcher prints of processes with these exit codes, by torch itself."""
    failures = {
        int(name[1:]): ProcessFailure(local_rank=int(name[1:]), pid=99, exitcode=code, error_file="")
        for name, code in codes.items()
    }
    return f"noise\n{ChildFailedError('camex_ft', failures)}\n"


def test_exit_codes_are_read_of_torchs_own_report():
    found = find_failures([], report(r0=-15, r1=-9, r3=5))
    assert [(f.rank, f.local, f.code) for f in found] == [(1, 1, -9), (3, 3, 5), (0, 0, -15)]
    assert str(found[0]) == "ended by SIGKILL, perhaps because memory ran out"
    assert [str(f) for f in found[1:]] == ["exit code 5", "ended by SIGTERM"]


def test_a_report_and_an_exit_code_are_one_failure():
    (found,) = find_failures([said(1)], report(r1=1))
    assert (found.text, found.code) == ("ValueError: no", 1)


CAUSES = [
    Failure(rank=5, local=5, code=-9),
    Failure(rank=4, local=4, text="ValueError: no", time=1.0),
    Failure(rank=3, local=3, text="UserError", user_error=True, time=2.0),
    Failure(rank=2, local=2, code=5),
    Failure(rank=1, local=1, text="gone", lost=True, time=0.5),
    Failure(rank=0, local=0, code=-6),
]


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CAUSES, 2)))
def test_causes_come_before_what_follows_of_them(first: Failure, second: Failure):
    """A process that lost another says so before the launcher has seen the other one's end."""
    assert first.order < second.order


def test_what_is_told_names_rank_cause_log_and_what_to_do(tmp_path: Path):
    log = tmp_path / "none_x" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.touch()
    second = Placement(device="gpu", processes=2, nodes=2, node=1, address=("a", 1))
    told = describe(
        [Failure(rank=3, local=1, code=-9)], placed=second, logs=tmp_path, code=1, printed="x"
    ).splitlines()
    assert told[0] == "rank 3 of 4 failed: ended by SIGKILL, perhaps because memory ran out"
    assert told[1] == f"Its log: {log}"
    assert "goes on from the last checkpoint" in told[2]
    lost = [Failure(rank=2, local=0, text="RuntimeError: gloo/", lost=True)]
    assert "on another node" in describe(lost, placed=second, logs=tmp_path, code=1, printed="")
    assert "on another node" not in describe(lost, placed=TWO, logs=tmp_path, code=1, printed="")


def test_a_users_error_comes_first_and_as_it_is(tmp_path: Path):
    told = describe(
        find_failures([said(0, text="task.name: no\n  such", user_error=True)], ""),
        placed=TWO,
        logs=tmp_path,
        code=1,
        printed="",
    )
    assert told.startswith("task.name: no\n  such\n(rank 0 of 2; its log: ")


def test_a_launcher_that_fails_itself_is_quoted(tmp_path: Path):
    told = describe(
        [], placed=TWO, logs=tmp_path, code=1, printed="Traceback\nConnectionError: port 1 in use\n"
    )
    assert "exit code 1" in told
    assert "  ConnectionError: port 1 in use" in told
    assert "SIGKILL" in describe([], placed=TWO, logs=tmp_path, code=-9, printed="")
