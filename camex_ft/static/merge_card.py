"""Record and model card of a merge: ``merge.json`` and README.md. Neither has absolute paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from camex_ft.results.card import HEADS, NAME, citation
from camex_ft.results.provenance import source_state, strip_paths, versions
from camex_ft.results.record import dumps
from camex_ft.static.coefficient_search import SearchPoint
from camex_ft.static.merge_inputs import Checkpoint, MergeInputs
from camex_ft.static.merge_spec import MergeSpec
from camex_ft.static.methods import Method
from camex_ft.static.tensor_files import TensorInfo
from camex_ft.utils.escaping import markdown, markdown_code, one_line
from camex_ft.utils.registry import MERGE_METHODS

RECORD, CARD = "merge.json", NAME
FORMAT = 1


@dataclass(frozen=True)
class MergeRecord:
    """Content of ``merge.json``."""

    content: dict[str, Any]

    def text(self) -> str:
        """Return the file's text."""
        return dumps(self.content, indent=2) + "\n"


def merge_record(
    spec: MergeSpec,
    inputs: MergeInputs,
    candidates: Sequence[SearchPoint],
    counts: Mapping[str, int],
    infos: Mapping[str, TensorInfo],
) -> MergeRecord:
    """Return the record of a merge.

    Args:
        spec: as it was merged: after a search, with the best values.
        inputs: start and donors.
        candidates: of the search.
        counts: tensors that were merged, equal in all, and new.
        infos: of the written tensors.
    """
    entry: Method = MERGE_METHODS.get(spec.method)
    layout = inputs.layout
    commit, dirty = source_state()
    donors = [
        {**_named(checkpoint, sha256), "cosine": round(cosine, 6)}
        for checkpoint, sha256, cosine in zip(layout.donors, inputs.sha256[1:], inputs.cosines, strict=True)
    ]
    content = {
        "format": FORMAT,
        "start": _named(layout.start, inputs.sha256[0]),
        "donors": donors,
        "method": spec.method,
        "source": entry.source,
        "options": entry.settled(spec.options),
        "weights": (spec.weights or [1.0] * len(spec.donors)) if entry.takes("weights") else None,
        "head": layout.head,
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}),
        "seed": layout.seed,
        "parameters": sum(info.entries for info in infos.values()),
        "tensors": dict(counts),
        "data": strip_paths(spec.data.model_dump()) if spec.data else None,
        "search": None
        if spec.search is None
        else {
            **strip_paths(spec.search.model_dump()),
            "candidates": [{"values": c.values, c.metric: c.value} for c in candidates],
        },
        "notes": list(inputs.notes),
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
    }
    return MergeRecord(content)


def _named(checkpoint: Checkpoint, sha256: str | None) -> dict[str, Any]:
    prefix, colon, rest = checkpoint.name.partition(":")
    name = f"{prefix}:{strip_paths(rest)}" if colon else strip_paths(checkpoint.name)
    return {"name": name, "hub": checkpoint.hub_id, "sha256": sha256}


def merge_card(title: str, record: MergeRecord) -> str:
    """Return the model card: Markdown with the front matter of the hub."""
    content = record.content
    pipeline, loader = HEADS.get(content["head"], ("", "AutoModel"))
    checkpoints = [content["start"], *content["donors"]]
    data = ModelCardData(
        base_model=[c["hub"] for c in checkpoints if c["hub"]] or None,
        library_name="transformers",
        pipeline_tag=pipeline or None,
        tags=["camex_ft", "merge"],
    )
    rows = {
        "method": f"{content['method']}: {content['source']}",
        "options": ", ".join(f"{k} {v}" for k, v in content["options"].items()),
        "weights": content["weights"],
        "parameters": f"{content['parameters']:,}",
        "dtype": ", ".join(content["dtypes"]),
        "seed": content["seed"],
        "versions": ", ".join(
            f"{k} {v}" for k, v in content["versions"].items() if k in ("camex_ft", "torch")
        ),
    }
    table = [
        f"| {name} | {markdown_code(str(value))} |" for name, value in rows.items() if value not in ("", None)
    ]
    merged = ["| | checkpoint | SHA-256 |", "|---|---|---|"]
    for number, each in enumerate(checkpoints):
        role = f"donor {number}" if number else "start"
        merged.append(f"| {role} | {markdown_code(each['name'])} | {(each['sha256'] or '')[:16]} |")
    parts = [
        f"A static merge of {len(content['donors'])} checkpoints that were fine-tuned from one start, written by "
        "camex_ft: an ordinary dense model of transformers.",
        "\n".join(merged),
        "## How it was made",
        "\n".join(["| | |", "|---|---|", *table]),
        f"All of it, with versions, is in `{RECORD}`.",
        "## How to load it",
        f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
        f'model = {loader}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
        "## Licence",
        "That of the weights is that of the start and of every donor: look there. camex_ft: Apache-2.0.",
        "## Citation",
        citation(one_line(content["versions"].get("camex_ft", "unknown"))),
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n# {markdown(title)}\n\n" + "\n\n".join(parts) + "\n"
