"""The command line ``camex-ft``. A command imports what it needs when it runs.

Exit codes: 0 done; 2 the user's input is wrong, with one message and no traceback; 1 a fault of ours, with a traceback.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import typer

from camex_ft.cli import compare as comparison
from camex_ft.cli import export as exporting
from camex_ft.cli.bench import app as benchmarks
from camex_ft.launching import rank
from camex_ft.utils.errors import guard
from camex_ft.utils.escaping import one_line, printable

app = typer.Typer(
    name="camex-ft",
    help="Fine-tune with experts that are merged per input. Start: camex-ft run configs/glue.yaml task.name=sst2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or the name of one that `camex-ft ls configs` lists."
    ),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as task.name=rte merging.protocol=smear."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: results/runs/...")]


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Options that stand before a command."""
    if show_version:
        typer.echo(f"camex_ft {version('camex_ft')}")
        raise typer.Exit


Count = Optional[int]  # noqa: UP045


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what has been run already.")] = False,
    gpus: Annotated[Count, typer.Option(min=1, help="Processes on each node, one a GPU.")] = None,
    cpus: Annotated[Count, typer.Option(min=1, help="Processes on each node, on the CPU.")] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What joins the processes: ddp, fsdp, zero2 or zero3. ddp if left out."),
    ] = None,
    nodes: Annotated[Count, typer.Option(min=1, help="Machines; under srun, those of the step.")] = None,
    node_rank: Annotated[Count, typer.Option(min=0, help="Which of them this is: 0, 1, ...")] = None,
    main_address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST:PORT", help="Where the others find the machine of rank 0."),
    ] = None,
) -> None:
    """Fine-tune, evaluate and write the record. An interrupted run goes on; one that is done is shown, not repeated.

    With --gpus, --cpus, --engine or --nodes it runs in several processes, started by accelerate.
    """
    from camex_ft.config import load_config

    written = load_config(config, overrides or [])
    from camex_ft.launching.placement import place
    from camex_ft.launching.processes import launch
    from camex_ft.training.signals import Stopped, listening

    placed = place(gpus=gpus, cpus=cpus, engine=engine, nodes=nodes, node=node_rank, address=main_address)
    try:
        if placed is not None and placed.all > 1:
            again = ["run", config, *(overrides or []), *(["--force"] if force else [])]
            raise typer.Exit(launch(placed, again, written))
        from camex_ft.results.disk import full_disk
        from camex_ft.run import pipeline  # after the checks, which need less

        with full_disk(written.output.dir), listening(rank.signals()):
            pipeline.run(written, force=force)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Stopped as stopped:
        if rank.inside():  # the process that launched says it
            rank.tell_step(stopped.step)
            raise typer.Exit(stopped.code) from None
        where = "the last checkpoint" if stopped.step is None else f"step {stopped.step}, which is saved"
        typer.echo(f"\nEnded by {stopped}. The same command goes on from {where}.", err=True)
        raise typer.Exit(stopped.code) from None


@app.command()
def validate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a configuration without running it, and print it with every default filled in.

    The files of a local backbone and of local data are looked at as far as that is quick: no weights, no rows.
    """
    from camex_ft.config import changes, load_config, notes, resolve, to_yaml

    written = load_config(config, overrides or [])
    resolved, reason = resolve(written)
    from camex_ft.backbones.fitting import check_files

    check_files(resolved)
    changed = changes(resolved.merging, resolved.routing, resolved.upcycle)
    for line in (reason, *changed, *notes(written)):
        typer.echo(f"# {one_line(line)}")
    typer.echo(to_yaml(resolved), nl=False)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--gpus", help="Plan for N GPUs; left out: one process on what this machine has."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Of several GPUs: ddp, fsdp, zero2 or zero3.")
    ] = "ddp",
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--memory", help="Of each device, such as 24GiB: does it fit, and what would make it?"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also take some steps here, and compare their peak memory and time."),
    ] = False,
    tflops: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--tflops", min=0.001, help="What a device sustains; else measured (CPU) or assumed (GPU)."
        ),
    ] = None,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Also write every number to a file."),
    ] = None,
) -> None:
    """Count parameters and multiply-adds, predict memory and time, for several protocols; reads no weights."""
    from camex_ft.config import load_config

    written = load_config(config, overrides or [])
    from camex_ft.estimate.show import PlanOptions, show_plan  # after the check, which needs less

    options = PlanOptions(gpus=gpus, engine=engine, memory=memory, measure=measure, tflops=tflops, json=json)
    show_plan(written, options)


@app.command("ls")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="backbones, comparisons, configs, embedded, protocols or tasks; all if left out."
        ),
    ] = "",
) -> None:
    """List what can be named in a configuration, with a line on each."""
    from camex_ft.cli.listing import KINDS, print_listing

    for each in [kind] if kind else KINDS:
        print_listing(each)


@app.command()
def cp(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name that `camex-ft ls configs` lists.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new file, or a folder.")],
) -> None:
    """Copy a configuration that comes with the package, to be changed."""
    from camex_ft.config import copy_config

    typer.echo(f"wrote {copy_config(config, destination)}")


@app.command()
def doctor() -> None:
    """Report versions, devices, the hub, its cache and disk space, and which profile `auto` picks here and why."""
    from camex_ft.cli.doctor import diagnose, print_diagnosis

    print_diagnosis(diagnose())


@app.command()
def evaluate(run: RunArgument) -> None:
    """Evaluate the best checkpoint of a run on its validation data again, and print the metrics."""
    from camex_ft.run import inference

    for name, value in inference.evaluate(run).items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


@app.command()
def predict(
    run: RunArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows with the task's columns: jsonl, csv, tsv, parquet.")
    ],
    out: Annotated[Optional[Path], typer.Option("--out", help="Where predictions go.")] = None,  # noqa: UP045
) -> None:
    """Predict the rows of a file with the best checkpoint of a run."""
    from camex_ft.run import inference

    typer.echo(f"wrote {inference.predict(run, file, out)}")


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens that are generated.")] = 50,
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 takes the likeliest token each time.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random instead.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Go on from a text with the best checkpoint of a run, and print what comes."""
    from camex_ft.run import inference

    typer.echo(
        printable(inference.generate(run, prompt, tokens=tokens, beams=beams, sample=sample, seed=seed))
    )


@app.command()
def inspect(
    run: RunArgument,
    out: Annotated[Optional[Path], typer.Option("--out", help="Where the pictures go.")] = None,  # noqa: UP045
) -> None:
    """Draw what a run has learned: curves, routing, load, curvature and its spectrum, similarity of domain vectors."""
    from camex_ft.analysis import inspect

    typer.echo(f"wrote {inspect(run, out)}")


app.command()(exporting.export)
app.command()(exporting.push)
app.command()(comparison.compare)
app.command()(comparison.table)
app.add_typer(benchmarks)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(rank.run(app) if rank.inside() else guard(app))
