"""The commands ``camex-ft compare`` and ``camex-ft table``. Other libraries are imported when they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camex_ft.compare import slurm as cluster
from camex_ft.utils.durable import write_named
from camex_ft.utils.errors import INTERRUPTED, UserError
from camex_ft.utils.folders import writing

if TYPE_CHECKING:
    from camex_ft.compare.cells import Comparison
    from camex_ft.config import Environment

MOST = 1000  # seeds

Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC... [KEY=VALUE]...",
        help="Specifications (configs/tables/) or a configuration, and changes to every cell.",
    ),
]
Protocols = Annotated[
    str, typer.Option(help='Protocols of a configuration, such as "dense smear ties-ca"; by default all.')
]
Seeds = Annotated[
    str, typer.Option(help='Number of seeds, "3", or the seeds, "0 7 42", in place of the specification\'s.')
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        help="here; slurm: an array of jobs, one a cell; local-jobs: such jobs on this machine, to try them.",
    ),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="Parameters of each job: partition, time (minutes), mem_gb, account, ...",
    ),
]


def compare(
    specs: Specs,
    protocols: Protocols = "",
    seeds: Seeds = "",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cells at a time; by default one a GPU, on a CPU one, or one a core for tiny models."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run done cells again.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate the cost of missing cells, a line a table; run nothing."),
    ] = False,
    cells: Annotated[bool, typer.Option("--cells", help="With --dry-run: a line for each cell.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --dry-run: 10^12 operations a second of a device; 10 for a GPU, else measured here.",
        ),
    ] = None,
    on: On = cluster.HERE,
    slurm: Slurm = None,
) -> None:
    """Run the missing cells of a grid of protocols, tasks and seeds; write its table, pictures and report.

    Interrupted at any point, the same command goes on. A failed cell does not stop the others, but sets exit code 1.
    """
    parameters = cluster.read(on, slurm or [])
    comparisons = _comparisons(specs, protocols, seeds, cluster.environment(on, parameters))
    for reason in dict.fromkeys(comparison.reason for comparison in comparisons):
        typer.echo(reason)
    if dry_run:
        from camex_ft.compare.estimate import print_estimate

        print_estimate(comparisons, tflops=tflops, cells=cells)
        return
    try:
        failed = cluster.run(on, comparisons, parameters=parameters, jobs=jobs, force=force)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command runs the missing cells.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        raise typer.Exit(1)


def table(
    specs: Specs,
    format: Annotated[str, typer.Option("--format", help="md, tex, csv, html or text.")] = "text",
    records: Annotated[
        Path | None, typer.Option(help="Folder of the records; by default the output folder.")
    ] = None,
    protocols: Protocols = "",
    seeds: Seeds = "",
    out: Annotated[Path | None, typer.Option(help="Write the table to a file.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Also copy the records and histories into a folder, to be committed.")
    ] = None,
) -> None:
    """Print the table of a comparison, or of a folder of records, from the runs so far."""
    from camex_ft.results.entries import keep_entries, read_results
    from camex_ft.results.render import render, table_of

    if all(Path(spec).is_dir() for spec in specs):
        if records or protocols or seeds or keep:
            raise UserError(
                "--records, --protocols, --seeds and --keep are for specifications, not for folders of records"
            )
        tables = [table_of([folder]) for folder in specs]
    else:
        from camex_ft.compare.outcome import outcome

        results = read_results(records) if records else None
        outcomes = [outcome(c, results) for c in _comparisons(specs, protocols, seeds)]
        tables = [comparison.table for comparison in outcomes]
        if keep is not None:
            with writing(keep):
                count = keep_entries([entry for comparison in outcomes for entry in comparison.entries], keep)
            typer.echo(f"wrote {count} records to {keep}", err=True)
    text = render(tables, format)
    if out is None:
        typer.echo(text, nl=False)
        return
    with writing(out):
        write_named(out, text)
    typer.echo(f"wrote {out}")


def _comparisons(
    arguments: Sequence[str], protocols: str, seeds: str, environment: Environment | None = None
) -> list[Comparison]:
    from camex_ft.compare.cells import make_comparison
    from camex_ft.compare.spec import is_spec, of_config, read_spec

    paths = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    if not paths:
        raise UserError(
            "no comparison is named: expected a specification such as tables/glue, or a configuration"
        )
    task = next((o.partition("=")[2].strip() for o in reversed(overrides) if o.startswith("task.name=")), "")
    comparisons: dict[str, Comparison] = {}
    for path in paths:
        named = is_spec(path)
        if named and protocols:
            raise UserError(
                f"--protocols is for configurations, and {path} is a specification: change the rows in the file"
            )
        spec = read_spec(path) if named else of_config(path, protocols=protocols.replace(",", " ").split())
        name = "-".join(part for part in (Path(path).stem, task) if part) if named else ""
        comparison = make_comparison(
            spec, name=name, overrides=overrides, seeds=read_seeds(seeds), environment=environment
        )
        if comparison.name in comparisons:
            raise UserError(
                f"{path}: another comparison before it is called '{comparison.name}' too, and would write to the same "
                "folder: call them one after the other, or rename one"
            )
        comparisons[comparison.name] = comparison
    return list(comparisons.values())


def read_seeds(text: str) -> int | list[int] | None:
    """Return a number of seeds, or the seeds themselves, from the text of ``--seeds``; None for an empty one."""
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal():
            raise UserError(
                f"--seeds: expected a number of seeds, such as 3, or the seeds, such as '0 1 2', got '{word}'"
            )
    numbers = [int(word) for word in words]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(f"--seeds: {number} occurs twice")
    if len(numbers) != 1 or text.strip().endswith(","):
        return numbers or None
    if not 0 < numbers[0] <= MOST:
        raise UserError(
            f"--seeds: expected a number from 1 to {MOST:,}; a single seed is written '{numbers[0]},'"
        )
    return numbers[0]
