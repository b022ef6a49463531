"""The commands on a finished run: ``camex-ft evaluate``, ``predict``, ``generate`` and ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camex_ft.utils.escaping import printable

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: results/runs/...")]


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
