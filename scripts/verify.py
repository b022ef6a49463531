"""Claims checked on this machine: invariants, published numbers, resuming, every command. Writes one page.

    make verify                        # everything; writes results/verify.md
    make verify ARGS="--only commands" # one part of it

The claims are tests of the repository, run here and now; the commands are called as a user calls them, in a folder of
their own. The page has one line a claim. Exit code 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer
from typer.core import TyperGroup

from camex_ft.cli import app
from camex_ft.cli.doctor import diagnose
from camex_ft.utils.escaping import markdown_notes

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "commands"
MINUTES = 20  # that a command may take: it then counts as hanging


@dataclass(frozen=True)
class Claim:
    """Claim, and the tests that show it."""

    says: str
    tests: Sequence[str]


CLAIMS: Mapping[str, Claim] = {
    "golden": Claim(
        "The published formulas' numbers come out: float64 to 1e-9, the mixture in float32 to 1e-5",
        ["tests/invariants/test_golden.py"],
    ),
    "invariants": Claim(
        "Upcycling keeps the function; padding and later tokens change nothing; cached generation is the full pass; "
        "gradients are those of the plain formula; saved and loaded is the same bit for bit",
        ["tests/invariants", "--ignore=tests/invariants/test_golden.py"],
    ),
    "resume": Claim(
        "A run that was stopped at any step and goes on has the weights, metrics and history of one never stopped",
        ["tests/training/test_resume.py", "tests/durability"],
    ),
    "processes": Claim(
        "Several processes compute what one computes",
        ["tests/distributed/test_engines.py"],
    ),
    "models": Claim(
        "Upcycled models are models of transformers; small ones that were stored load and give the stored outputs",
        ["tests/hf", "tests/stored"],
    ),
    "export": Claim(
        "Exports compute what they say they compute, and load without camex_ft where they should",
        ["tests/exporting"],
    ),
    "security": Claim(
        "Hostile files are refused, faulty input is told, and the hub's faults are survived",
        ["tests/security", "tests/hub"],
    ),
}

TINY = "training.max_steps=4 data.train_rows=64 data.eval_rows=32 output.dir=results"
STUDY = """
config: glue
set: {profile: embedded, backbone: embedded/bert, data.train_rows: 64, data.eval_rows: 32, training.save_strategy: "no",
  training.eval_strategy: "no", training.load_best_model_at_end: false}
start: {training.max_steps: 2}
branches: [{data.domain: 0}, {data.domain: 1}]
branch: {training.max_steps: 2}
merged: {fitted: {merging.protocol: smear, routing.init: fit, routing.fit.rows: 20, training.max_steps: 2}}
seeds: 1
"""
# {run}: folder of a classification's run, {writer}: of a language model's. In this order.
SMOKES: Mapping[str, str] = {
    "run": f"run glue profile=embedded {TINY}",
    "run (a language model)": f"run lm profile=embedded merging.protocol=ep-camex {TINY}",
    "validate": "validate glue task.name=rte",
    "plan": "plan glue profile=embedded",
    "ls": "ls",
    "cp": "cp glue mine.yaml",
    "doctor": "doctor",
    "evaluate": "evaluate {run}",
    "predict": "predict {run} rows.jsonl --out predicted.tsv",
    "generate": "generate {writer} 'The cook went to' --tokens 8",
    "inspect": "inspect {run}",
    "export": "export {run} dense --as dense",
    "export (folded)": "export {run} folded --as folded",
    "fit-router": "fit-router {run} routing.fit.from=[rows.jsonl,rows.jsonl,rows.jsonl,rows.jsonl] --out fitted",
    "merge": "merge merge/ties start=embedded/llama from=[embedded/llama,embedded/llama,embedded/llama] "
    "head=causal-lm -o merged",
    "branch": "branch study.yaml",
    "push": "push {run} someone/something --dry-run",
    "compare": f"compare glue profile=embedded {TINY} --protocols 'dense smear' --seeds 2",
    "table": f"table glue profile=embedded {TINY} --protocols 'dense smear' --seeds 2 --format md",
    "bench layer": "bench layer --batch 2 --length 16 --in 32 --out 64 --experts 2 --repeats 1 --no-save",
    "bench step": "bench step --backbone embedded/bert --batch 2 --length 16 --experts 2 --repeats 1 --no-save",
    "bench decode": "bench decode --backbone embedded/gpt2 --length 16 --tokens 4 --segment 8 --experts 2 --repeats 1 "
    "--no-save",
    "bench cost": "bench cost --in 32 --out 64 --repeats 1 --no-save",
}


@dataclass(frozen=True)
class Outcome:
    """Outcome of one claim or command."""

    name: str
    says: str
    passed: int
    failed: Sequence[str] = field(default_factory=list)
    skipped: Sequence[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Return whether something was looked at, and all of it was right."""
        return self.passed > 0 and not self.failed

    @property
    def word(self) -> str:
        """One word for it."""
        return "holds" if self.holds else "**does not hold**" if self.failed else "not looked at"


def check(name: str, claim: Claim) -> Outcome:
    """Run a claim's tests, slow ones left out, on all cores."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-n",
            "logical",
            f"--junitxml={report}",
        ]
        done = subprocess.run(
            [*command, *claim.tests],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    passed, failed, skipped = read(cases)
    if not cases or (done.returncode not in (0, 5) and not failed):
        failed = [_last_line(done.stderr or done.stdout)]
    return Outcome(name, claim.says, passed, failed, skipped, time.monotonic() - started)


def read(cases: Sequence[ElementTree.Element]) -> tuple[int, list[str], list[str]]:
    """Return how many of a JUnit report's cases passed, the failed ones with their errors, why others were left out."""
    failed, skipped, passed = [], [], 0
    for case in cases:
        fault = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        left_out = case.find("skipped")
        if fault is not None:
            said = (fault.get("message") or "").strip().partition("\n")[0]
            failed.append(f"{case.get('classname')}::{case.get('name')}: {said}")
        elif left_out is not None:
            skipped.append((left_out.get("message") or "no reason given").partition("\n")[0])
        else:
            passed += 1
    return passed, failed, skipped


def smoke() -> Iterator[Outcome]:
    """Call every command in an empty folder; one that no line of `SMOKES` calls does not hold."""
    for name in sorted(commands(typer.main.get_command(app)) - {re.sub(r" \(.*", "", key) for key in SMOKES}):
        yield Outcome(f"camex-ft {name}", "it is called", 0, ["scripts/verify.py does not call it"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = (f'{{"sentence": "the broth {n} felt very hot", "idx": {n}}}\n' for n in range(12))
        (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
        (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
        for name, line in SMOKES.items():
            yield _call(name, line, folder)


def commands(found: object, before: str = "") -> set[str]:
    """Return the names of all commands, those of a group after its own."""
    if not isinstance(found, TyperGroup):
        return {before.strip()}
    return {name for key, command in found.commands.items() for name in commands(command, f"{before} {key}")}


def _call(name: str, line: str, folder: Path) -> Outcome:
    runs = {
        key: next((str(p.relative_to(folder)) for p in folder.glob(f"results/runs/{key}--*")), "none")
        for key in ("glue", "lm")
    }
    line = line.format(run=runs["glue"], writer=runs["lm"])
    started, said = time.monotonic(), f"`camex-ft {line}` ends with exit code 0"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "camex_ft", *shlex.split(line)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
        )
        fault = [] if done.returncode == 0 else [f"exit code {done.returncode}: {_last_line(done.stderr)}"]
    except subprocess.TimeoutExpired:
        fault = [f"it takes more than {MINUTES} minutes"]
    return Outcome(f"camex-ft {name}", said, int(not fault), fault, [], time.monotonic() - started)


def _last_line(text: str) -> str:
    """Return the last line of what a command says; of a traceback its error, and not the request to report it."""
    lines = [line for line in text.partition("\nThis is a fault of camex_ft")[0].splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it says nothing"


def page(outcomes: Sequence[Outcome], machine: Sequence[tuple[str, str]], day: str) -> str:
    """Return the page, in Markdown."""
    wrong = sum(not outcome.holds for outcome in outcomes)
    verdict = f"**{wrong} of {len(outcomes)} do not hold.**" if wrong else f"All {len(outcomes)} hold."
    lines = ["# What holds on this machine", "", f"{verdict} `make verify`, {day}.", ""]
    lines += ["| | claim | | checks | not run | seconds |", "|---|---|---|---|---|---|"]
    for each in outcomes:
        lines.append(
            f"| {each.name} | {markdown_notes(each.says)} | {each.word} | {each.passed + len(each.failed)} | "
            f"{len(each.skipped) or ''} | {each.seconds:.0f} |"
        )
    for title, part in (("What does not hold", "failed"), ("What was not run, and why", "skipped")):
        found = {each.name: getattr(each, part) for each in outcomes if getattr(each, part)}
        if found:
            lines += ["", f"## {title}", ""]
            lines += [
                f"- {name}: {markdown_notes(text)}"
                for name, texts in found.items()
                for text in _counted(texts)
            ]
    lines += [
        "",
        "## The machine",
        "",
        *(f"- {subject}: {markdown_notes(detail)}" for subject, detail in machine),
    ]
    return "\n".join(lines) + "\n"


def _counted(texts: Sequence[str]) -> list[str]:
    return [
        text + (f" ({texts.count(text)} times)" if texts.count(text) > 1 else "")
        for text in dict.fromkeys(texts)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what is asked for, print it line by line, write the page; return the exit code."""
    parser = argparse.ArgumentParser(description="What holds on this machine, on one page.")
    parser.add_argument("--only", nargs="+", choices=[*CLAIMS, COMMANDS], default=[*CLAIMS, COMMANDS])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "verify.md")
    asked = parser.parse_args(arguments)
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(
            f"{outcome.name}: {outcome.word.strip('*')} ({outcome.passed} checks, {outcome.seconds:.0f} s)",
            flush=True,
        )
        for fault in outcome.failed:
            print(f"  {fault}", flush=True)

    for name, claim in CLAIMS.items():
        if name in asked.only:
            tell(check(name, claim))
    if COMMANDS in asked.only:
        for outcome in smoke():
            tell(outcome)
    machine = [(finding.subject, finding.detail) for finding in diagnose()]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(page(outcomes, machine, datetime.date.today().isoformat()), encoding="utf-8")
    print(f"wrote {asked.out}")
    return int(not all(outcome.holds for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
