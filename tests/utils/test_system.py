"""Probes of the machine: caches made by hand, a hub that answers, one that doesn't, and one that keeps silent."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from camex_ft.utils import system


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    system.hub_answers.cache_clear()
    yield
    system.hub_answers.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and one of `datasets`."""
    from datasets import config

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.fixture
def server(monkeypatch) -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """A hub on this machine; its `status` is what it answers."""

    class Hub(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self) -> None:
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield Hub
    httpd.shutdown()
    httpd.server_close()


def snapshot(cache, kind: str, name: str, *files: str) -> None:
    """Lay out a download as the hub's client does."""
    folder = cache / "hub" / f"{kind}--{name.replace('/', '--')}"
    commit = "0123456789012345678901234567890123456789"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for file in files:
        path = folder / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(("status", "answers"), [(200, True), (403, False), (503, False)])
def test_the_hub_answers_or_not(server, status, answers):
    server.status = status
    assert system.hub_answers() is answers


def test_the_hub_is_not_asked_when_told_not_to(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert system.hub_answers() is False


def test_a_hub_that_refuses_and_an_address_that_is_none(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert system.hub_answers() is False
    system.hub_answers.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    assert system.hub_answers() is False


def test_a_silent_hub_costs_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(system, "SECONDS", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert system.hub_answers() is False
    assert time.monotonic() - started < 1.5  # 0.2 s, and room for a busy machine


@pytest.mark.parametrize(
    ("files", "there"),
    [
        (("config.json", "model.safetensors"), True),
        (("config.json", "pytorch_model.bin"), True),
        (("config.json",), False),  # a download that did not get to the weights
        (("model.safetensors",), False),
    ],
)
def test_a_model_is_cached_with_its_weights(cache, files, there):
    snapshot(cache, "models", "google-t5/t5-base", *files)
    assert system.model_is_cached("google-t5/t5-base") is there
    assert system.model_is_cached("google-t5/t5-small") is False


@pytest.mark.parametrize("name", ["no such/id/at all", "", "a" * 200])
def test_what_is_no_hub_id_is_not_cached(cache, name):
    assert system.model_is_cached(name) is False


def test_data_are_cached_by_configuration(cache):
    snapshot(cache, "datasets", "nyu-mll/glue", "sst2/train-00000-of-00001.parquet", "README.md")
    assert system.data_are_cached("nyu-mll/glue", "sst2")
    assert not system.data_are_cached("nyu-mll/glue", "rte")
    assert not system.data_are_cached("aps/super_glue", "rte")


def test_data_that_were_prepared_before_are_cached(cache):
    prepared = cache / "datasets" / "nyu-mll___glue" / "rte" / "0.0.0" / "abc"
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").touch()
    assert system.data_are_cached("nyu-mll/glue", "rte")
    assert not system.data_are_cached("nyu-mll/glue", "sst2")


def test_cuda_is_what_torch_says():
    import torch

    assert system.cuda_is_there() is torch.cuda.is_available()


def test_cuda_is_what_torch_would_say_where_it_is_not_imported():
    code = (
        "from camex_ft.utils import system; there = system.cuda_is_there(); import torch; "
        "assert there is torch.cuda.is_available()"
    )
    subprocess.run([sys.executable, "-c", f"import camex_ft_cli; {code}"], check=True)
