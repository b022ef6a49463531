"""The commands ``camex-ft compare`` and ``camex-ft table``. What they do is imported when they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from camex_ft.compare import places
from camex_ft.utils.durable import write_named
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import writing

if TYPE_CHECKING:
    from camex_ft.compare.cells import Comparison
    from camex_ft.config import Environment

INTERRUPTED = 130
MOST = 1000  # seeds

Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC... [KEY=VALUE]...",
        help="Specifications (configs/tables/), or a configuration; and changes to every cell.",
    ),
]
Protocols = Annotated[
    str,
    typer.Option(help='Of a configuration: protocols, such as "dense smear ties-ca"; all if left out.'),
]
Seeds = Annotated[
    str, typer.Option(help='How many seeds, or which: "3" or "0 7 42". In place of the specification\'s.')
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        help="here; slurm: an array of jobs, one a cell; local-jobs: such jobs on this machine, as a trial.",
    ),
]
Slurm = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(
        "--slurm", metavar="KEY=VALUE", help="Of each job: partition, time (minutes), mem_gb, account, ..."
    ),
]


def compare(
    specs: Specs,
    protocols: Protocols = "",
    seeds: Seeds = "",
    jobs: Annotated[
        Optional[int],  # noqa: UP045 - typer reads annotations at run time
        typer.Option(
            min=1,
            help="How many run at a time; by default one a GPU, on a CPU one, or one a core for tiny models.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what has been run already.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate the cost of what is missing, a line a table; run nothing."),
    ] = False,
    cells: Annotated[bool, typer.Option("--cells", help="Of --dry-run: a line for each cell.")] = False,
    tflops: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0.001, help="Of --dry-run: what a device sustains; 10 for a GPU, else measured here."
        ),
    ] = None,
    on: On = places.HERE,
    slurm: Slurm = None,
) -> None:
    """Run what is missing of a grid of protocols, tasks and seeds; then its table, pictures and report.

    Interrupted at any point, the same command goes on. A cell that fails does not stop the others; exit code 1 then.
    """
    parameters = places.read(on, slurm or [])
    comparisons = _comparisons(specs, protocols, seeds, places.environment(on, parameters))
    for reason in dict.fromkeys(comparison.reason for comparison in comparisons):
        typer.echo(reason)
    if dry_run:
        from camex_ft.compare.estimate import print_estimate

        print_estimate(comparisons, tflops=tflops, cells=cells)
        return
    try:
        failed = places.run(on, comparisons, parameters=parameters, jobs=jobs, force=force)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command runs what is missing.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        raise typer.Exit(1)


def table(
    specs: Specs,
    format: Annotated[str, typer.Option("--format", help="md, tex, csv, html or text.")] = "text",
    records: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the records; the output folder if left out."),
    ] = None,
    protocols: Protocols = "",
    seeds: Seeds = "",
    out: Annotated[Optional[Path], typer.Option(help="Write it to a file.")] = None,  # noqa: UP045
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also copy the records and histories into a folder, to be committed."),
    ] = None,
) -> None:
    """Print the table of a comparison, or of a folder of records, from what has been run."""
    from camex_ft.results.entries import keep_entries, read_results
    from camex_ft.results.render import render, table_of

    if all(Path(spec).is_dir() for spec in specs):
        if records or protocols or seeds or keep:
            raise UserError(
                "--records, --protocols, --seeds and --keep are of specifications, not of folders"
            )
        tables = [table_of([folder]) for folder in specs]
    else:
        from camex_ft.compare.outcome import outcome

        results = read_results(records) if records else None
        made = [outcome(each, results) for each in _comparisons(specs, protocols, seeds)]
        tables = [each.table for each in made]
        if keep is not None:
            with writing(keep):
                count = keep_entries([entry for each in made for entry in each.entries], keep)
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
        raise UserError("which comparison? Expected a specification such as tables/glue, or a configuration")
    task = next((o.partition("=")[2].strip() for o in reversed(overrides) if o.startswith("task.name=")), "")
    made: dict[str, Comparison] = {}
    for path in paths:
        named = is_spec(path)
        if named and protocols:
            raise UserError(
                f"--protocols is for configurations: {path} is a specification, whose rows are in the file"
            )
        spec = read_spec(path) if named else of_config(path, protocols=protocols.replace(",", " ").split())
        name = "-".join(part for part in (Path(path).stem, task) if part) if named else ""
        comparison = make_comparison(
            spec, name=name, overrides=overrides, seeds=_seeds(seeds), environment=environment
        )
        if comparison.name in made:
            raise UserError(
                f"{path}: there is a comparison '{comparison.name}' before it, whose tables lie in the same folder: "
                "call them one after the other, or rename one"
            )
        made[comparison.name] = comparison
    return list(made.values())


def _seeds(text: str) -> int | list[int] | None:
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise UserError(f"--seeds: expected how many, such as 3, or which, such as '0 1 2', got '{wrong[0]}'")
    if not words:
        return None
    numbers = [int(word) for word in words]
    if len(numbers) > 1 or text.strip().endswith(","):
        twice = [n for n in numbers if numbers.count(n) > 1]
        if twice:
            raise UserError(f"--seeds: {twice[0]} occurs twice")
        return numbers
    if not 0 < numbers[0] <= MOST:
        raise UserError(
            f"--seeds: expected how many, from 1 to {MOST:,}; one seed alone is written '{numbers[0]},'"
        )
    return numbers[0]
