"""A hub of our own on loopback: as much of the hub's API as its libraries use to read a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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
