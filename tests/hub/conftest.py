"""A hub of our own on loopback, with made-up contents under real ids and in their real layouts, and a client of it.

The client is a process of its own, since the hub's libraries read `HF_ENDPOINT` when they are imported; one process
serves all tests, each with an empty cache, because importing takes seconds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from camex_ft import embedded, registry
from camex_ft.embedded import corpus

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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
Fault = Callable[["Handler", str], bool]  # answers a request by itself, or returns False


@dataclass
class Hub:
    """The server's contents, what it was asked, and what goes wrong.

    Attributes:
        repositories: ``models/<id>`` or ``datasets/<id>`` to its files.
        asked: (method, path) of every request, in order.
        fault: looks at each request before it is answered.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    fault: Fault | None = None
    server: ThreadingHTTPServer | None = None
    port: int = 0

    @property
    def files(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for how, path in self.asked
            if how == "GET" and "/resolve/" in path
        ]

    def start(self) -> None:
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def hold(self, match: str = "") -> threading.Event:
        """Say nothing to requests whose path has `match` in it, until the event that is returned is set."""
        released = threading.Event()

        def silent(handler: Handler, path: str) -> bool:
            if match not in path:
                return False
            released.wait(300)
            handler.close_connection = True
            return True

        self.fault = silent
        return released

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's API as its libraries use to read a repository."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        return

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        self.hub.asked.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.hub.fault is not None and self.hub.fault(self, path):
            return
        if path.startswith("api/"):
            self.api(path.removeprefix("api/"), body)
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.send(200, b"")

    def api(self, path: str, body: bytes) -> None:
        name = next((n for n in self.hub.repositories if f"{path}/".startswith(f"{n}/")), None)
        if name is None:
            self.refuse(
                401, "RepoNotFound", "Invalid username or password."
            )  # as the hub says it to a stranger
            return
        files, rest = self.hub.repositories[name], path.removeprefix(name).strip("/").split("/")
        if rest[0] == "tree":
            below = "/".join(rest[2:])
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            self.json(list(self.tree(files, below, deep)))
        elif rest[0] == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            self.json([entry for entry in self.tree(files, "", True) if entry["path"] in asked])
        elif rest[0] in ("", "revision"):
            about = {"_id": "0", "id": name.split("/", 1)[1], "sha": COMMIT, "private": False, "gated": False}
            siblings = [{"rfilename": file} for file in files]
            self.json(
                {
                    **about,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                }
            )
        else:
            self.refuse(404, "EntryNotFound", f"no {path}")

    def tree(self, files: dict[str, bytes], below: str, deep: bool) -> Iterator[dict[str, Any]]:
        folders = set()
        for name, content in files.items():
            if below and not name.startswith(f"{below}/"):
                continue
            inner = name.removeprefix(below).strip("/").split("/")
            for depth in range(1, len(inner)):
                folders.add("/".join([*([below] if below else []), *inner[:depth]]))
            if deep or len(inner) == 1:
                yield {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
        yield from (
            {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            for name in sorted(folders)
            if deep or name.count("/") == below.count("/") + bool(below)
        )

    def resolve(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        kind = repository if repository.startswith("datasets/") else f"models/{repository}"
        files, name = self.hub.repositories.get(kind), rest.partition("/")[2]
        if files is None:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif name not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            self.content(files[name])

    def content(self, content: bytes, *, send: int | None = None) -> None:
        """Send a file, from where its client asks for it; `send`: break off after so many bytes."""
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        part = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[:send])
            if send is not None:
                self.wfile.flush()
                self.close_connection = True

    def json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), "application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(
            status,
            json.dumps({"error": message}).encode(),
            "application/json",
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    def send(
        self, status: int, body: bytes, kind: str = "text/plain", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(content: bytes) -> str:
    """A name of a file's content; the hub's is a hash too."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


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
    model, tokenizer = embedded.backbone(family, head="base", seed=1)
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
