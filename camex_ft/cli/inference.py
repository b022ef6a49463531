"""The commands on a finished run: ``evaluate``, ``predict``, ``generate``, ``inspect``, ``fit-router``, ``export`` and
``push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camex_ft.utils.escaping import printable

ROWS = 512  # as `camex_ft.exporting.export.ROWS`, which would import torch
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: results/runs/...")]
License = Annotated[
    str | None,
    typer.Option(
        "--license", help="License of the weights, for the card: an identifier of the hub, such as mit."
    ),
]


def evaluate(run: RunArgument) -> None:
    """Evaluate the best checkpoint of a run on its validation data again, and print the metrics."""
    from camex_ft.run import inference

    for name, value in inference.evaluate(run).items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def predict(
    run: RunArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows with the task's columns: jsonl, csv, tsv, parquet.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="File of the predictions.")] = None,
) -> None:
    """Predict the rows of a file with the best checkpoint of a run."""
    from camex_ft.run import inference

    typer.echo(f"wrote {inference.predict(run, file, out)}")


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 50,
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 takes the likeliest token each time.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random instead.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with the best checkpoint of a run, and print the continuation."""
    from camex_ft.run import inference

    text = inference.generate(run, prompt, tokens=tokens, beams=beams, sample=sample, seed=seed)
    typer.echo(printable(text))


def inspect(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the pictures.")] = None,
) -> None:
    """Draw a run's curves, routing, load, curvature and its spectrum, and the similarity of its domain vectors."""
    from camex_ft.analysis import inspect as inspect_run

    typer.echo(f"wrote {inspect_run(run, out)}")


def fit_router(
    source: Annotated[str, typer.Argument(metavar="RUN|CONFIG", help="A run's folder, or a configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Changes, such as routing.fit.rows=500 or routing.fit.from=[...]."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the fitted model.")] = None,
) -> None:
    """Fit the routers of a model to texts of each donor, without training, and print how well they tell them apart."""
    from camex_ft.run import inference

    inference.fit_router(source, overrides or [], out)


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="dense: the original architecture, merged once with the mean routing weights; folded: curvature and "
            "mask folded into the experts; experts: the sparse mixture that the run started from, as trained.",
        ),
    ] = "dense",
    split: Annotated[
        str, typer.Option("--split", help="Split whose routing weights are averaged: train or validation.")
    ] = "train",
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Number of its first rows to average over.")
    ] = ROWS,
    license: License = None,
) -> None:
    """Write a run's model as a dense checkpoint, or with curvature folded in, and measure the difference."""
    from camex_ft.exporting.export import export as export_run
    from camex_ft.exporting.export import lines

    exported = export_run(run, out, as_=as_, split=split, rows=rows, license=license)
    for line in lines(exported):
        typer.echo(line)
    typer.echo(f"wrote {exported.folder}")


def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|DIR", help="A run, or the folder of a model or an export.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the hub: NAME/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes; send nothing.")
    ] = False,
    license: License = None,
) -> None:
    """Upload a model to the Hugging Face hub, with its tokenizer and card, and nothing else."""
    from camex_ft.exporting.pushing import push, upload_of

    upload = upload_of(source, repo_id, license=license)
    for line in upload.lines():
        typer.echo(line)
    if dry_run:
        typer.echo("dry run: nothing was sent")
        return
    typer.echo(f"wrote {push(upload, private=private)}")
