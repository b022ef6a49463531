"""The contents of a hub of our own, made up under real ids and in their real layouts, and a client of it.

The client is a process of its own, since the hub's libraries read `HF_ENDPOINT` when they are imported; one process
serves all tests, each with an empty cache, because importing takes seconds.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from camex_ft import synthetic
from camex_ft.synthetic import corpus
from camex_ft.utils import registry
from tests.helpers.hub_server import Hub

OTHER_FORMATS = (
    *(
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.onnx",
        "onnx/model.onnx",
    ),
    *("model.fp16.safetensors", "coreml/model.mlpackage/weights.bin", "README.md", ".gitattributes"),
)


def dataset_files(name: str, layout: str, rows: int = 12) -> dict[str, bytes]:
    """Parquet files of an embedded corpus as the hub holds the task's: `layout` has {split}."""
    task, made = registry.TASKS.get(name), {}
    splits = corpus(name, seed=0)
    for split in task.all_splits():
        if split in splits and split not in task.unpublished:
            stream = io.BytesIO()
            data = splits[split].select(range(min(rows, len(splits[split]))))
            data = data.remove_columns([c for c in data.column_names if c not in task.features])
            data.to_parquet(stream)
            made[layout.format(split=split)] = stream.getvalue()
    return made


def card(**configurations: str) -> bytes:
    """A data set's README.md, whose head says which files are a configuration's splits."""
    lines = ["---", "license: other", "configs:"]
    for name, files in configurations.items():
        lines += [f"- config_name: {name.replace('__', '-')}", "  data_files:"]
        for split in ("train", "validation", "test"):
            lines += [f"  - split: {split}", f"    path: {files.format(split=split)}"]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def model_files(family: str, folder: Path, **options: Any) -> dict[str, bytes]:
    """Files of a checkpoint as `save_pretrained` writes them, and the other formats that real repositories have."""
    model, tokenizer = synthetic.backbone(family, head="base", seed=1)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    own = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**own, **dict.fromkeys(OTHER_FORMATS, b"not to be fetched")}


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Everything that the hub has."""
    glue = {
        **dataset_files("glue/sst2", "sst2/{split}-00000-of-00001.parquet"),
        **dataset_files("glue/rte", "rte/{split}-00000-of-00001.parquet"),
    }
    return {
        "datasets/nyu-mll/glue": {**glue, "README.md": card(sst2="sst2/{split}-*", rte="rte/{split}-*")},
        "datasets/aps/super_glue": {
            **dataset_files("superglue/boolq", "boolq/{split}-00000-of-00001.parquet"),
            "README.md": card(boolq="boolq/{split}-*"),
        },
        "datasets/Salesforce/wikitext": {
            **dataset_files("lm/wikitext-2", "wikitext-2-raw-v1/{split}-00000-of-00001.parquet"),
            "README.md": card(wikitext__2__raw__v1="wikitext-2-raw-v1/{split}-*"),
        },
        "datasets/rajpurkar/squad": {
            **dataset_files("qa/squad", "plain_text/{split}-00000-of-00001.parquet"),
            "README.md": card(plain_text="plain_text/{split}-*").replace(
                b"  - split: test\n    path: plain_text/test-*\n", b""
            ),
        },
        "datasets/microsoft/wiki_qa": {
            **dataset_files("qa/wikiqa", "data/{split}-00000-of-00001.parquet"),
            "README.md": card(default="data/{split}-*"),
        },
        "models/google-bert/bert-base-uncased": model_files("bert", tmp_path_factory.mktemp("bert")),
        "models/google-t5/t5-base": model_files("t5", tmp_path_factory.mktemp("t5"), max_shard_size="100KB"),
    }


@dataclass
class Client:
    """The process that loads from the hub. `ask` has it do something, with whatever caches the test says."""

    process: subprocess.Popen[str]

    def ask(self, home: Path, what: str, *words: str, seconds: float = 60) -> dict[str, Any]:
        """Return its answer: ``code`` as of the command line, ``said`` on both streams, ``value``, ``seconds``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"home": str(home), "what": what, "words": words}) + "\n")
        self.process.stdin.flush()
        watch = threading.Timer(seconds, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        assert line, f"no answer within {seconds} s"
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture(scope="session")
def serving() -> Iterator[Hub]:
    hub = Hub()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(serving: Hub, contents: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """The server with all its contents, asked nothing yet, and nothing wrong with it."""
    serving.repositories = {name: dict(files) for name, files in contents.items()}
    serving.asked, serving.fault = [], None
    if serving.server is None:
        serving.start()
    yield serving
    serving.fault = None


@pytest.fixture(scope="session")
def client(serving: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    empty = tmp_path_factory.mktemp("home")
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and "PROXY" not in name.upper()
    }
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{serving.port}",
        "HF_HOME": str(empty),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**own, **settings},
        cwd=empty,
    )
    yield Client(process)
    process.kill()
    process.wait()
