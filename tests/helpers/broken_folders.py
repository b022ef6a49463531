"""Folders of data and of models that something is wrong with, in a hundred ways."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Change = Callable[[Path, random.Random], object]
ROWS = [{"sentence": f"the film is good {n}", "label": n % 2, "idx": n} for n in range(6)]
SPLITS = ("train", "validation")
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")


class Payload:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("loot"),)


def write_data(folder: Path, form: str, rows: list[dict[str, Any]] = ROWS) -> None:
    """Write SST-2's splits in a format."""
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        path = folder / f"{split}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif form == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif form == "json":
            path.write_text(json.dumps(rows))
        else:
            mark = "\t" if form == "tsv" else ","
            lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
            path.write_text("".join(mark.join(line) + "\n" for line in lines))


def bytes_changed(change: Callable[[bytes, int], bytes], name: str = "") -> Change:
    """Change the bytes of one of the folder's files, or of the one of that name, at a random place."""

    def apply(folder: Path, rng: random.Random) -> None:
        path = folder / name if name else rng.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        path.write_bytes(change(content, rng.randrange(len(content) + 1)))

    return apply


BYTES: dict[str, Callable[[bytes, int], bytes]] = {
    "cut": lambda text, at: text[:at],
    "empty": lambda text, at: b"",
    "NUL": lambda text, at: text[:at] + b"\0" * 9 + text[at:],
    "not UTF-8": lambda text, at: text[:at] + b"\xff\xfe\x80" + text[at:],
    "quote": lambda text, at: text[:at] + b'"' + text[at:],
    "huge field": lambda text, at: text[:at] + b"word " * 2**17 + text[at:],
    "huge number": lambda text, at: text[:at] + b"9" * 5000 + text[at:],
    "brackets": lambda text, at: text[:at] + b"[" * 10**5 + text[at:],
    "objects": lambda text, at: b'{"a":' * 10**5 + text,
    "ragged": lambda text, at: text[:at] + b",\t,\n" + text[at:],
    "carriage return": lambda text, at: text.replace(b"\n", b"\r"),
    "UTF-16": lambda text, at: text.decode("latin-1").encode("utf-16"),
    "BOM": lambda text, at: b"\xef\xbb\xbf" + text,
    "line separator": lambda text, at: text[:at] + "\u2028\x85".encode() + text[at:],
    "twice": lambda text, at: text + text,
    "reversed": lambda text, at: text[::-1],
    "null": lambda text, at: text + b"null\n",
    "NaN": lambda text, at: text.replace(b"1", b"NaN", 1),
    "surrogate": lambda text, at: text.replace(b"film", b"\\ud800", 1),
    "header only": lambda text, at: text.split(b"\n")[0] + b"\n",
    "bit": lambda text, at: bytes([*text[:at], text[at] ^ 64, *text[at + 1 :]]) if at < len(text) else text,
}
VALUES: list[Any] = [
    *(
        None,
        "",
        "=cmd|' /C calc'!A0",
        "+1+1",
        "@x",
        -(10**30),
        10**12,
        2**63,
        1.5,
        float("nan"),
        float("inf"),
        True,
    ),
    *([], {}, ["a"], {"a": 1}, "\x00", "\u202e", "1e999", "2", "positive", "NEGATIVE", " 1", b"bytes"),
]


def value_changed(folder: Path, rng: random.Random) -> None:
    """Another value in a cell, in a format that can hold it."""
    form = next(iter(folder.iterdir())).suffix[1:]
    rows = [dict(row) for row in ROWS]
    value = rng.choice([v for v in VALUES if form == "parquet" or not isinstance(v, bytes)])
    name = rng.choice(["sentence", "label", "idx"])
    for row in rows if form == "parquet" else rows[2:3]:  # a column of parquet has one type
        row[name] = value
    try:
        write_data(folder, form, rows)
    except (pa.ArrowException, OverflowError, TypeError):
        write_data(folder, form, [{"sentence": "x"}])


def column_changed(folder: Path, rng: random.Random) -> None:
    form = next(iter(folder.iterdir())).suffix[1:]
    old, new = (
        rng.choice(["sentence", "label", "idx"]),
        rng.choice(["sentences", "", "é", "label", "__class__", "a\tb"]),
    )
    write_data(folder, form, [{new if k == old else k: v for k, v in row.items()} for row in ROWS])


def no_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["gone", "pipe", "folder", "link to itself", "device", "two"])
    if kind == "two":
        path.with_suffix(".csv" if path.suffix != ".csv" else ".tsv").write_text("x")
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")


def bomb(folder: Path, rng: random.Random) -> None:
    """A parquet file of some kilobytes that says a million times the same."""
    for path in folder.iterdir():
        path.unlink()
    table = pa.table({"sentence": pa.array(["a" * 1000] * 20_000).dictionary_encode(), "label": [5] * 20_000})
    for split in SPLITS:
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd")


DATA: list[Change] = [
    *(bytes_changed(change) for change in BYTES.values()),
    *[value_changed] * 12,
    *[column_changed] * 4,
    *[no_file] * 5,
    bomb,
]


def json_changed(name: str, *path: str, value: Any = None) -> Change:
    """Another value somewhere in a JSON file; of None, a random one."""

    def apply(folder: Path, rng: random.Random) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for part in path[:-1]:
            inner = inner[part]
        odd = [None, -1, 0, 10**9, "x", "../x", [], {}, True, 1e300]
        inner[path[-1]] = value if value is not None else rng.choice(odd)
        (folder / name).write_text(json.dumps(content))

    return apply


def pickles(folder: Path, rng: random.Random) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload()}))


def pickles_too(folder: Path, rng: random.Random) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload()))


def linked(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    path.symlink_to(
        rng.choice(["/etc/hostname", "../../../../etc/hostname", "nowhere", path.name, "/dev/zero", "/etc"])
    )


def indexed(folder: Path, rng: random.Random) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shard = rng.choice(
        ["../x", "/etc/hostname", "model-00002-of-00001.safetensors", 3, None, "", "x.bin", "a\0"]
    )
    content: Any = {"weight_map": {"embeddings.word_embeddings.weight": shard}, "metadata": {}}
    content = rng.choice([content, [], {"weight_map": []}, {"weight_map": {}}, {}])
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def adapted(folder: Path, rng: random.Random) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


def header(folder: Path, rng: random.Random) -> None:
    """A safetensors header of an impossible size."""
    size = rng.choice([2**63, 2**40, 0, 10**8])
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")


def coded(folder: Path, rng: random.Random) -> None:
    (folder / "evil.py").write_text("open('loot', 'w').close()\nclass Model: pass\n")
    names = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
    json_changed(rng.choice(["config.json", "tokenizer_config.json"]), "auto_map", value=names)(folder, rng)


FIELDS = (
    *(
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
    ),
    *("hidden_act", "max_position_embeddings", "pad_token_id", "architectures", "dtype", "layer_norm_eps"),
    *(
        "attn_implementation",
        "transformers_weights",
        "quantization_config",
        "id2label",
        "problem_type",
        "camex",
    ),
)
MODELS: list[Change] = [
    *(json_changed("config.json", name) for name in FIELDS),
    *(
        bytes_changed(BYTES[name])
        for name in ("cut", "empty", "NUL", "not UTF-8", "objects", "bit", "bit", "reversed")
    ),
    *(
        json_changed("tokenizer.json", name)
        for name in ("model", "normalizer", "added_tokens", "post_processor")
    ),
    *(
        json_changed("tokenizer_config.json", name)
        for name in ("tokenizer_class", "pad_token", "model_max_length")
    ),
    *(pickles, pickles_too, linked, linked, indexed, indexed, adapted, header, coded, coded),
    *(bytes_changed(change, "model.safetensors") for change in (BYTES["cut"], BYTES["bit"], BYTES["NUL"])),
]
