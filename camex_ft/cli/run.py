"""The commands ``camex-ft run``, ``validate``, ``plan`` and ``doctor``: a run, and the checks before it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camex_ft.launching import rank
from camex_ft.utils.errors import INTERRUPTED
from camex_ft.utils.escaping import one_line

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or the name of a configuration that `camex-ft ls configs` lists."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as task.name=rte merging.protocol=smear."),
]
Count = int | None


def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Run again even if the run is done.")] = False,
    gpus: Annotated[Count, typer.Option(min=1, help="Processes on each node, one a GPU.")] = None,
    cpus: Annotated[Count, typer.Option(min=1, help="Processes on each node, on the CPU.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine of several processes: ddp (the default), fsdp, zero2 or zero3.")
    ] = None,
    nodes: Annotated[
        Count, typer.Option(min=1, help="Number of machines; under srun, those of the step.")
    ] = None,
    node_rank: Annotated[Count, typer.Option(min=0, help="Rank of this machine: 0, 1, ...")] = None,
    main_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of the machine of rank 0.")
    ] = None,
) -> None:
    """Fine-tune, evaluate and write the record. An interrupted run resumes; a done one is shown, not repeated.

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
        from camex_ft.results.run_folder import full_disk
        from camex_ft.run import pipeline  # after the checks, which need less

        with full_disk(written.output.dir), listening(rank.signals()):
            pipeline.run(written, force=force)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Stopped as stopped:
        if rank.inside():  # the launching process prints the message
            rank.tell_step(stopped.step)
            raise typer.Exit(stopped.code) from None
        where = "the last checkpoint" if stopped.step is None else f"step {stopped.step}, which is saved"
        typer.echo(f"\nEnded by {stopped}. The same command goes on from {where}.", err=True)
        raise typer.Exit(stopped.code) from None


def validate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a configuration without running it, and print it with every default filled in.

    Files of a local backbone and of local data are checked as far as that is quick: no weights, no rows.
    """
    from camex_ft.config import changes_of, load_config, notes, resolve, to_yaml

    written = load_config(config, overrides or [])
    resolved, reason = resolve(written)
    from camex_ft.run.fitting import check_files

    check_files(resolved)
    changed = changes_of(resolved)
    for line in (reason, *changed, *notes(written)):
        typer.echo(f"# {one_line(line)}")
    typer.echo(to_yaml(resolved), nl=False)


def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        Count, typer.Option("--gpus", help="Plan for N GPUs; by default for one process on this machine.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Engine of several GPUs: ddp, fsdp, zero2 or zero3.")
    ] = "ddp",
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="Memory of each device, such as 24GiB: does a step fit, and with which settings?"
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also take some steps here, and compare their peak memory and time."),
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            min=0.001,
            help="10^12 operations a second of a device; by default measured (CPU) or assumed (GPU).",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every number to a file.")
    ] = None,
) -> None:
    """Count parameters and multiply-adds, estimate memory and time, for several protocols; reads no weights."""
    from camex_ft.config import load_config

    written = load_config(config, overrides or [])
    from camex_ft.estimate.show import PlanOptions, show_plan  # after the check, which needs less

    options = PlanOptions(gpus=gpus, engine=engine, memory=memory, measure=measure, tflops=tflops, json=json)
    show_plan(written, options)


def doctor() -> None:
    """Report versions, devices, the hub, its cache and disk space, and the profile that `auto` picks here."""
    from camex_ft.cli.doctor import diagnose, print_diagnosis

    print_diagnosis(diagnose())
