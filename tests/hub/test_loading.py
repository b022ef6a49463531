"""Data and backbones from a hub that behaves, and from one that does not: either they are there, or it is said why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BERT, T5 = "google-bert/bert-base-uncased", "google-t5/t5-base"
DATA = ("glue/sst2", "superglue/boolq", "lm/wikitext-2", "qa/squad", "qa/wikiqa")
WEIGHTS = "model.safetensors"
PARQUET = "train-00000-of-00001.parquet"


def whole(home: Path, hub: Any, name: str) -> bool:
    """Whether every file in the cache's snapshots of a repository is the hub's, to the byte."""
    kind, _, spec = name.partition("/")
    folder = home / "hub" / f"{kind}--{spec.replace('/', '--')}" / "snapshots"
    found = [path for path in folder.rglob("*") if path.is_file()]
    own = hub.repositories[name]
    return all(
        path.read_bytes() == own[path.relative_to(folder).as_posix().split("/", 1)[1]] for path in found
    )


def once(match: str, do: Callable[[Any], None], times: int = 1) -> Callable[[Any, str], bool]:
    """A fault of the first `times` requests for a file."""
    left = [times]

    def fault(handler: Any, path: str) -> bool:
        if handler.command != "GET" or match not in path or "/resolve/" not in path or not left[0]:
            return False
        left[0] -= 1
        do(handler)
        return True

    return fault


def every(do: Callable[[Any], None], match: str = "") -> Callable[[Any, str], bool]:
    """A fault of every request whose path has `match` in it."""

    def fault(handler: Any, path: str) -> bool:
        if match in path:
            do(handler)
            return True
        return False

    return fault


def broken(handler: Any) -> None:
    handler.refuse(500, "", "Internal Error")


def cut(handler: Any) -> None:
    """Promise a file and break off half way."""
    kind, _, rest = handler.path.removeprefix("/").partition("/resolve/")
    own = handler.hub.repositories[kind if kind.startswith("datasets/") else f"models/{kind}"]
    content = own[rest.partition("/")[2]]
    handler.content(content, send=len(content) // 2)


def gated(status: int) -> Callable[[Any], None]:
    return lambda handler: handler.refuse(status, "GatedRepo", "Access to it is restricted.")


@pytest.mark.parametrize(
    "names", [DATA[:1], pytest.param(DATA[1:], marks=pytest.mark.slow)], ids=["sst2", "others"]
)
def test_first_download_and_then_without_the_hub(
    names: tuple[str, ...], hub: Any, client: Any, tmp_path: Path
) -> None:
    """Data and weights are the same from the cache, and nothing was fetched that is not read."""
    asked = [("data", name) for name in names] + [("backbone", BERT), ("backbone", T5)]
    first = {words: client.ask(tmp_path, *words) for words in asked}
    assert {words: answer["code"] for words, answer in first.items()} == dict.fromkeys(asked, 0), first
    for name in names:  # of SQuAD there is no test split
        splits = {"train", "validation", *(() if name == "qa/squad" else ("test",))}
        assert set(first["data", name]["value"]) == splits
    assert not [name for name in hub.files if name.endswith((".bin", ".h5", ".msgpack", ".ot", ".onnx"))]
    assert (f"sst2/{PARQUET}" in hub.files) == ("glue/sst2" in names) and f"rte/{PARQUET}" not in hub.files
    hub.stop()
    for words in asked:
        again = client.ask(tmp_path, *words)
        assert (again["code"], again["value"]) == (0, first[words]["value"]), again["said"]
        assert again["seconds"] < 5  # nobody is asked again and again
    unknown = client.ask(tmp_path, "data", "glue/rte")
    assert unknown["code"] == 2
    assert "nyu-mll/glue (rte) is neither in the local cache" in unknown["said"]
    missing = client.ask(tmp_path, "backbone", "somebody/else")
    assert (
        missing["code"] == 2 and "'somebody/else' is not (or not whole) in the hub cache" in missing["said"]
    )


def test_files_in_the_hub_cache_serve_without_the_hub(hub: Any, client: Any, tmp_path: Path) -> None:
    """As `hf download` leaves them, which prepares nothing for `datasets`."""
    folder = tmp_path / "hub" / "datasets--nyu-mll--glue"
    for name, content in hub.repositories["datasets/nyu-mll/glue"].items():
        path = folder / "snapshots" / "0123" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    hub.stop()
    answer = client.ask(tmp_path, "data", "glue/sst2")
    assert answer["code"] == 0 and set(answer["value"]) == {"train", "validation", "test"}, answer["said"]


@pytest.mark.parametrize(
    "what", [("data", "glue/sst2", "datasets/nyu-mll/glue"), ("backbone", BERT, f"models/{BERT}")]
)
@pytest.mark.parametrize(
    "fault",
    [pytest.param(broken, marks=pytest.mark.slow), cut],
    ids=["500 in the middle", "cut short"],
)
def test_a_fault_that_passes(fault: Any, what: Any, hub: Any, client: Any, tmp_path: Path) -> None:
    """Either the same command gets over it, or it ends with a message and the next one does; no half file is left."""
    hub.fault = once(WEIGHTS if what[0] == "backbone" else PARQUET, fault)
    answer = client.ask(tmp_path, *what[:2])
    assert whole(tmp_path, hub, what[2])
    if answer["code"]:
        assert answer["code"] == 2 and "fetched" in answer["said"], answer["said"]
        answer = client.ask(tmp_path, *what[:2])
    assert answer["code"] == 0, answer["said"]
    assert whole(tmp_path, hub, what[2])


REFUSALS = {
    "gated, not logged in": (every(gated(401)), "is gated: ask for access at https://huggingface.co/"),
    "gated, no access": (every(gated(403)), "is gated: ask for access at https://huggingface.co/"),
    "bad token": (
        every(lambda h: h.refuse(401, "", "Invalid credentials in Authorization header")),
        "HF_TOKEN",
    ),
    "forbidden": (every(lambda h: h.refuse(403, "", "Forbidden")), "does not let you read"),
    "no API": (every(lambda h: h.send(200, b"<html>Welcome to the hotel</html>", "text/html")), "fetched"),
    "empty": (every(lambda h: h.send(200, b"")), "fetched"),
    "hangs up": (every(lambda h: h.connection.close()), "fetched"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_hub_that_refuses(name: str, hub: Any, client: Any, tmp_path: Path) -> None:
    fault, message = REFUSALS[name]
    hub.fault = fault
    for what in (("data", "glue/sst2"), ("backbone", BERT)):
        answer = client.ask(tmp_path, *what)
        assert answer["code"] == 2 and message in answer["said"], answer
        assert "Traceback" not in answer["said"]


def test_what_the_hub_does_not_have(hub: Any, client: Any, tmp_path: Path) -> None:
    """Unknown ids, a configuration and a split that are not there, a repository without weights that are read."""
    kept = hub.repositories.pop("datasets/nyu-mll/glue")
    unknown = client.ask(tmp_path, "data", "glue/sst2")
    assert unknown["code"] == 2 and "the hub has no data set 'nyu-mll/glue'" in unknown["said"]
    assert "'somebody/else'" in client.ask(tmp_path, "backbone", "somebody/else")["said"]
    hub.repositories["datasets/nyu-mll/glue"] = {n: c for n, c in kept.items() if not n.startswith("rte/")}
    other = client.ask(tmp_path, "data", "glue/mrpc")
    assert other["code"] == 2 and "nyu-mll/glue has no configuration 'mrpc'" in other["said"]
    assert "'sst2'" in other["said"]
    pickles = {n: c for n, c in hub.repositories[f"models/{BERT}"].items() if n != WEIGHTS}
    hub.repositories["models/somebody/old"] = pickles
    old = client.ask(tmp_path, "backbone", "somebody/old")
    assert old["code"] == 2 and "the folder has no weights" in old["said"]
    assert "pytorch_model.bin" not in hub.files


def test_a_split_that_is_not_there(hub: Any, client: Any, tmp_path: Path) -> None:
    """Test splits may be missing, as on disk; the others may not."""
    own = hub.repositories["datasets/nyu-mll/glue"]
    readme = own["README.md"].replace(b"  - split: test\n    path: sst2/test-*\n", b"")
    hub.repositories["datasets/nyu-mll/glue"] = {**own, "README.md": readme}
    answer = client.ask(tmp_path / "a", "data", "glue/sst2")
    assert answer["code"] == 0 and set(answer["value"]) == {"train", "validation"}, answer["said"]
    readme = readme.replace(b"  - split: validation\n    path: sst2/validation-*\n", b"")
    hub.repositories["datasets/nyu-mll/glue"]["README.md"] = readme
    answer = client.ask(tmp_path / "b", "data", "glue/sst2")
    assert answer["code"] == 2 and "nyu-mll/glue sst2 (validation): " in answer["said"]
    assert "validation" in answer["said"] and "Traceback" not in answer["said"]


def test_a_silent_hub(hub: Any, client: Any, tmp_path: Path) -> None:
    """It accepts connections and says nothing: what is in the cache is taken, and else it is said, within seconds."""
    assert client.ask(tmp_path, "backbone", BERT)["code"] == 0
    assert client.ask(tmp_path, "data", "glue/sst2")["code"] == 0
    released = hub.hold()
    try:
        for what, code in (
            (("backbone", BERT), 0),
            (("data", "glue/sst2"), 0),
            (("backbone", T5), 2),
            (("data", "qa/squad"), 2),
        ):
            answer = client.ask(tmp_path, *what)
            assert answer["code"] == code, answer["said"]
            assert answer["seconds"] < 4  # the client's patience is 1 s here
    finally:
        released.set()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/tree/", f"{WEIGHTS}", PARQUET], ids=["list", "weights", "data"])
def test_a_hub_that_falls_silent(where: str, hub: Any, client: Any, tmp_path: Path) -> None:
    """In the middle: its library tries several times, and then it is said."""
    released = hub.hold(where)
    try:
        what = ("data", "glue/sst2") if where != WEIGHTS else ("backbone", BERT)
        answer = client.ask(tmp_path, *what, seconds=250)
        assert answer["code"] == 2 and "fetched" in answer["said"], answer["said"]
        assert answer["seconds"] < 240
    finally:
        released.set()
    hub.fault = None
    assert client.ask(tmp_path, *what)["code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", [("data", "glue/sst2"), ("backbone", BERT)])
def test_a_hub_that_fails_for_good(what: Any, hub: Any, client: Any, tmp_path: Path) -> None:
    hub.fault = every(broken, "/resolve/")
    answer = client.ask(tmp_path, *what, seconds=250)
    assert answer["code"] == 2 and "500" in answer["said"] and "fetched" in answer["said"], answer["said"]
    assert "Traceback" not in answer["said"]


@pytest.mark.slow
def test_a_run_from_the_hub(hub: Any, client: Any, tmp_path: Path) -> None:
    """One step of a real run, and the whole record of it."""
    words = [
        *("run", "glue", "profile=paper", f"backbone={BERT}", "task.name=sst2", "merging.experts=2"),
        *("training.max_steps=1", "training.per_device_train_batch_size=2", "merging.curvature.rank=1"),
        *("training.bf16=false", f"output.dir={tmp_path / 'results'}"),
    ]
    answer = client.ask(tmp_path, "command", *words)
    assert answer["code"] == 0, answer["said"]
    assert len(list((tmp_path / "results").glob("runs/*/record.json"))) == 1
