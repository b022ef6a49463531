"""The command line ``camex-ft``: one module a group of commands. A command imports what it needs when it runs.

Exit codes: 0 done; 2 the user's input is wrong, with one message and no traceback; 1 a fault of ours, with a traceback;
130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from camex_ft.cli import branch, compare, inference, listing, merge, run
from camex_ft.cli.bench import app as benchmarks
from camex_ft.launching import rank
from camex_ft.utils.errors import guard

app = typer.Typer(
    name="camex-ft",
    help="Fine-tune with experts that are merged per input. Start: camex-ft run configs/glue.yaml task.name=sst2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options before a command."""
    if show_version:
        typer.echo(f"camex_ft {version('camex_ft')}")
        raise typer.Exit


for command in (
    *(run.run, run.validate, run.plan, listing.ls, listing.cp, run.doctor),
    *(inference.evaluate, inference.predict, inference.generate, inference.inspect, inference.fit_router),
    *(inference.export, inference.push, merge.merge, compare.compare, compare.table, branch.branch),
):
    app.command()(command)
app.add_typer(benchmarks)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(rank.run(app) if rank.inside() else guard(app))
