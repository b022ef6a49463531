"""The commands ``camex-ft bench layer``, ``step``, ``decode`` and ``cost``, without torch until they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from camex_ft.bench.settings import Bench

FOLDER = Path("results/measurements")  # which git ignores; records that are committed lie in results/bench

app = typer.Typer(
    name="bench",
    help="Time a layer, a training step or decoding with experts beside the dense model, and measure memory.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Length = Annotated[int, typer.Option("--length", help="Tokens in a sequence.")]
Experts = Annotated[int, typer.Option("--experts", help="Experts N.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Experts for each sequence; by default all.")]
Rank = Annotated[int, typer.Option("--rank", help="Rank of the curvature, where the protocol has one.")]
CurvatureKind = Annotated[
    str, typer.Option("--curvature", help="Kind of the curvature: kronecker, diagonal or low-rank.")
]
ProtocolName = Annotated[str, typer.Option("--protocol", help="A name that `camex-ft ls protocols` lists.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Number format of parameters and inputs: float32, bfloat16 or float64.")
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Repeats = Annotated[
    int, typer.Option("--repeats", help="Timed calls of each side, whose median is reported.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")]
Save = Annotated[
    Path,
    typer.Option(
        "--save", metavar="DIR", help="Folder of the record; results/bench for one to be committed."
    ),
]
NoSave = Annotated[bool, typer.Option("--no-save", help="Write no record.")]


@app.command()
def layer(
    batch: Annotated[int, typer.Option("--batch", help="Sequences.")] = 16,
    length: Length = 128,
    in_features: Annotated[int, typer.Option("--in", help="Width of the input.")] = 768,
    out_features: Annotated[int, typer.Option("--out", help="Width of the output.")] = 3072,
    experts: Experts = 8,
    top_k: TopK = None,
    rank: Rank = 1,
    curvature: CurvatureKind = "kronecker",
    protocol: ProtocolName = "ties-ca",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Repeats = 5,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Forward pass alone, in evaluation mode, without gradients.")
    ] = False,
    skip_plain: Annotated[
        bool,
        typer.Option(
            "--skip-plain", help="Leave out the plain formula, which is slow and takes much memory."
        ),
    ] = False,
    json: Json = False,
    save: Save = FOLDER,
    no_save: NoSave = False,
) -> None:
    """Time one linear map, forward and backward, in turns: dense, merged, and by the plain formula."""
    options = dict(locals())
    from camex_ft.bench.layer import bench_layer
    from camex_ft.bench.settings import LayerBench

    _report(LayerBench, bench_layer, options)


@app.command()
def step(
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone", help="t5-base, gpt2 or bert-base-uncased, with random weights; or embedded/FAMILY."
        ),
    ] = "t5-base",
    batch: Annotated[int, typer.Option("--batch", help="Sequences.")] = 8,
    length: Length = 128,
    experts: Experts = 8,
    top_k: TopK = None,
    rank: Rank = 1,
    curvature: CurvatureKind = "kronecker",
    protocol: ProtocolName = "ties-ca",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Repeats = 5,
    json: Json = False,
    save: Save = FOLDER,
    no_save: NoSave = False,
) -> None:
    """Time a training step of a backbone with a classification head, dense and with experts in turns."""
    options = dict(locals())
    from camex_ft.bench.settings import StepBench
    from camex_ft.bench.whole_models import bench_step

    _report(StepBench, bench_step, options)


@app.command()
def decode(
    backbone: Annotated[
        str,
        typer.Option("--backbone", help="gpt2, with random weights; or embedded/gpt2, embedded/llama, ..."),
    ] = "gpt2",
    batch: Annotated[int, typer.Option("--batch", help="Rows that generate.")] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens of the prompts.")] = 300,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens fed after the prompt, one by one.")] = 16,
    segment: Annotated[int, typer.Option("--segment", help="Tokens of a routing segment.")] = 256,
    same_prompt: Annotated[bool, typer.Option("--same-prompt", help="One prompt for all rows.")] = False,
    experts: Experts = 8,
    top_k: TopK = None,
    rank: Rank = 1,
    curvature: CurvatureKind = "kronecker",
    protocol: ProtocolName = "ties-ca",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Repeats = 5,
    json: Json = False,
    save: Save = FOLDER,
    no_save: NoSave = False,
) -> None:
    """Time the generation of tokens with a key-value cache, dense and with experts in turns."""
    options = dict(locals())
    from camex_ft.bench.settings import DecodeBench
    from camex_ft.bench.whole_models import bench_decode

    _report(DecodeBench, bench_decode, options)


@app.command()
def cost(
    in_features: Annotated[int, typer.Option("--in", help="Width of the input.")] = 768,
    out_features: Annotated[int, typer.Option("--out", help="Width of the output.")] = 3072,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Repeats = 5,
    json: Json = False,
    save: Save = FOLDER,
    no_save: NoSave = False,
) -> None:
    """Time both forms of the merged map over many shapes and fit the cost model that chooses between them (minutes)."""
    options = dict(locals())
    from camex_ft.bench.layer import bench_cost, table
    from camex_ft.bench.settings import CostBench

    _report(CostBench, bench_cost, options, table=table)


def _report(
    settings_type: type[Bench],
    measure: Callable[[Any], Mapping[str, Any]],
    options: dict[str, Any],
    *,
    table: Callable[[Mapping[str, Any]], str] | None = None,
) -> None:
    """Measure with the options of a command, write the record and print it."""
    from camex_ft.bench import measurement

    json, save, no_save = (options.pop(name) for name in ("json", "save", "no_save"))
    settings = settings_type(**options)
    if not no_save:
        measurement.make_folder(save)  # before minutes of measuring
    figures = measurement.make_record(settings, measure(settings))
    typer.echo(measurement.to_json(figures) if json else (table or measurement.table)(figures), nl=not json)
    if not no_save:
        path = measurement.save(figures, settings.name(), save)
        if not json:
            typer.echo(f"wrote {path}")
