"""What goes up to the hub, and what does not; the hub's own answers come from a server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from camex_ft.exporting import pushing
from camex_ft.exporting.pushing import push, upload_of
from camex_ft.results.run_folder import RunFolder
from camex_ft.utils.errors import UserError
from tests.helpers.synthetic_results import result

MODEL = {"config.json": "{}", "model.safetensors": "x" * 1500, "tokenizer.json": "{}"}


def folder(path: Path, **more: str) -> Path:
    """A folder that looks like a model's."""
    path.mkdir(parents=True)
    for name, text in {**MODEL, **more}.items():
        (path / name).write_text(text)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, with more in it than its model."""
    record = result(task="glue/sst2", protocol="ties-ca", seed=0, scores=[0.5]).record
    path = tmp_path / "run"
    folder(path / "model")
    (path / "checkpoints").mkdir()
    (path / ".env").write_text("HF_TOKEN=secret")
    RunFolder(path).write_record(record)
    return path


class Hub:
    """Stands for `HfApi`: keeps what it is given."""

    def __init__(self, *, private: bool = False) -> None:
        self.private, self.made, self.sent = private, [], {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.made.append((repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> Any:
        for each in operations:
            with each.as_file() as file:
                self.sent[each.path_in_repo] = file.read()
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


def test_of_a_run_the_model_and_a_card_go_up_and_nothing_else(run, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    upload = upload_of(run, "me/model", license="mit")
    listed = dict(upload.files)
    assert push(upload) == "https://hub/me/model"
    assert {name: len(content) for name, content in hub.sent.items()} == listed
    assert listed.keys() == {*MODEL, "README.md"}
    assert ModelCard(hub.sent["README.md"].decode()).data.license == "mit"
    assert not (run / "model" / "README.md").exists(), "the run is left as it was"
    assert "secret" not in b"".join(hub.sent.values()).decode()


def test_the_list_has_sizes_and_the_sum(tmp_path):
    upload = upload_of(folder(tmp_path / "m", **{"README.md": "card"}), "me/model")
    text = "\n".join(upload.lines())
    assert upload.card is None
    assert "model.safetensors     1.5 kB" in text
    assert "total                 1.5 kB" in text
    assert [pushing.decimal(n) for n in (999, 1000, 2_500_000)] == ["999 bytes", "1.0 kB", "2.5 MB"]


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "optimizer.safetensors",
        "training_args.bin",
        "notes.txt",
        "model.py",
        "checkpoint-8/",
        ".git/",
        "a b",
    ],
)
def test_what_is_no_part_of_a_model_is_refused(tmp_path, name):
    path = folder(tmp_path / "m")
    if name.endswith("/"):
        (path / name).mkdir()
    else:
        (path / name).write_text("x")
    with pytest.raises(UserError, match="is not sent: ") as error:
        upload_of(path, "me/model")
    assert name in str(error.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = folder(tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    (path / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="link out of the folder"):
        upload_of(path, "me/model")


def test_what_is_no_model(tmp_path, run):
    with pytest.raises(UserError, match="is not a folder"):
        upload_of(tmp_path / "nowhere", "me/model")
    with pytest.raises(UserError, match="neither a finished run nor the folder of a model"):
        upload_of(tmp_path, "me/model")
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        upload_of(run, "me/model")
    path = folder(tmp_path / "m")
    for wrong in ("a/b/c", "", "me/my model", "../up"):
        with pytest.raises(UserError, match="not a valid name on the hub"):
            upload_of(path, wrong)


def test_private_is_not_sent_where_everybody_reads(tmp_path, monkeypatch):
    upload = upload_of(folder(tmp_path / "m"), "me/model")
    hub = Hub(private=False)
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    with pytest.raises(UserError, match="exists already and is public: nothing was sent"):
        push(upload, private=True)
    assert hub.sent == {}
    hub.private = True
    push(upload, private=True)
    assert hub.made[-1][1]["private"] is True
    assert hub.sent.keys() == MODEL.keys()


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Answers every request with `server.answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"error": "no"}).encode()
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(self.server.answer)  # type: ignore[attr-defined]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("answer", "said"), [(401, "hf auth login"), (403, "write permission"), (400, "the hub refused")]
)
def test_what_the_hub_answers(tmp_path, monkeypatch, server, answer, said):
    server.answer = answer
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=address, token="hf_x"))
    with pytest.raises(UserError, match=said):
        push(upload_of(folder(tmp_path / "m"), "me/model"))


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(UserError, match="cannot be reached"):
        push(upload_of(folder(tmp_path / "m"), "me/model"))


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("google-bert/bert-base-uncased", True),
        ("embedded/t5", True),
        ("/data/me/bert", False),
        ("./bert", False),
        ("new:~/bert", False),
        ("bert.gguf", False),
        ("my/bert", False),
    ],
)
def test_an_adapter_names_its_backbone_by_what_others_find(name, sent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "bert").mkdir(parents=True)
    backbone = {"name": name, "head": "causal-lm", "seed": 0, "dtype": "float32", "sha256": ""}
    about = json.dumps({"format": 1, "backbone": backbone, "plan": {}})
    made = folder(tmp_path / "m", **{"adapter.json": about})
    (made / "model.safetensors").rename(made / "adapter.safetensors")
    if sent:
        assert upload_of(made, "me/model").files
    else:
        with pytest.raises(
            UserError, match=r"is not sent: .*a path on this machine.*id on the hub as `name`"
        ):
            upload_of(made, "me/model")
