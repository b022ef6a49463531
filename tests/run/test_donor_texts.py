"""Runs whose experts are other runs' models: what is read of the donors, and what the record says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camex_ft.config import Config, load_config
from camex_ft.results import Record
from camex_ft.run import donor_texts, inference, pipeline
from camex_ft.run.steps import load_model
from camex_ft.upcycling import expert_layers, load
from camex_ft.upcycling.plan import KEY
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

SHARED = [
    "profile=embedded",
    "task={suite: glue, name: sst2, max_length: 32}",
    "data={source: embedded, train_rows: 64, eval_rows: 16}",
    "training={max_steps: 2, eval_strategy: 'no', save_strategy: 'no', load_best_model_at_end: false, "
    "disable_tqdm: true, warmup_steps: 0}",
]
DENSE = [*SHARED, "backbone=embedded/bert", "merging.protocol=dense"]
FIT = ["routing.init=fit", "routing.fit.rows=24"]


def run_in(folder: Path, *overrides: str) -> tuple[Record, Path]:
    """Return a run's record and its folder."""
    record = pipeline.run(load_config("glue", [*overrides, f"output.dir={folder}"]))
    return record, folder / "runs" / record.run.name


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two donors of one start, each trained on one domain."""
    root = tmp_path_factory.mktemp("donors")
    return [run_in(root, *DENSE, f"data.domain={domain}")[1] for domain in (0, 1)]


def merged(donors: list[Path], *overrides: str) -> list[str]:
    names = f"upcycle={{init: checkpoints, from: [{', '.join(map(str, donors))}]}}"
    return [*SHARED, "backbone=embedded/bert", "merging.protocol=smear", names, *overrides]


def test_a_run_from_donors_says_so(
    donors: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, folder = run_in(tmp_path, *merged(donors, *FIT))
    said = capsys.readouterr().out
    assert "routers fitted to 24 texts of each of 2 donors" in said and "NMI" in said
    assert record.config["merging"]["experts"] == 2
    assert [len(donor.sha256 or "") for donor in record.model.donors] == [64, 64]
    assert record.model.backbone_sha256 is not None  # of the donors, beside an embedded start
    for layer in record.routing.values():
        assert layer.fit is not None and len(layer.fit.accuracy) == 2 and 0 <= (layer.fit.nmi or 0) <= 1
    assert str(donors[0].parent) not in (folder / "record.json").read_text()
    assert str(donors[0].parent) not in (folder / "model" / "config.json").read_text()
    assert len(getattr(load(folder / "model").config, KEY)["donors"]) == 2
    assert "donors" in (folder / "model" / "README.md").read_text()


def test_the_donors_content_counts(donors: list[Path], tmp_path: Path) -> None:
    names = {run_in(tmp_path, *merged(order))[0].run.name for order in (donors, donors[::-1])}
    assert len(names) == 2


def test_each_donors_texts_are_of_its_own_data(donors: list[Path]) -> None:
    settled = pipeline.resolve(load_config("glue", merged(donors, *FIT)))[0]
    _, tokenizer = load_model(settled, TASKS.get("glue/sst2"))
    texts = donor_texts.donor_texts(settled, tokenizer)
    assert [sum(len(batch["input_ids"]) for batch in batches) for batches in texts] == [24, 24]
    assert all("labels" not in batch for batches in texts for batch in batches)
    own = [donor_texts._training_rows(donor_texts.run_of(str(donor)), 24)["domain"][:] for donor in donors]
    assert own == [[0] * 24, [1] * 24]


def test_texts_may_come_from_files_and_folders(donors: list[Path], tmp_path: Path) -> None:
    rows = "sentence\tlabel\n" + "".join(f"the saw number {i} is sharp .\t{i % 2}\n" for i in range(30))
    (tmp_path / "one.tsv").write_text(rows)
    (tmp_path / "two").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "two" / f"{split}.tsv").write_text(rows.replace("saw", "soup"))
    sources = f"routing.fit={{rows: 20, from: [{tmp_path}/one.tsv, {tmp_path}/two]}}"
    settled: Config = pipeline.resolve(load_config("glue", merged(donors, "routing.init=fit", sources)))[0]
    _, tokenizer = load_model(settled, TASKS.get("glue/sst2"))
    texts = donor_texts.donor_texts(settled, tokenizer)
    assert [sum(len(batch["input_ids"]) for batch in batches) for batches in texts] == [20, 20]


def test_a_donor_that_is_no_run_needs_a_source(donors: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run of camex_ft .* expected a list with a folder or file"):
        donor_texts.run_of(str(tmp_path))


def test_a_domain_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.domain: no row is of domain 9: the embedded corpora have the domains 0 to 3"
    ):
        run_in(tmp_path, *DENSE, "data.domain=9")


# -- fitting alone


def test_routers_of_a_finished_run_are_fitted_and_written(donors: list[Path], tmp_path: Path) -> None:
    _, folder = run_in(tmp_path, *merged(donors))
    inference.fit_router(str(folder), ["routing.fit.rows=24"], tmp_path / "fitted")
    before, after = load(folder / "model"), load(tmp_path / "fitted")
    for name, layer in expert_layers(after).items():
        old = expert_layers(before)[name]
        assert layer.router.intercept is not None and old.router.intercept is None
        assert not torch.equal(layer.router.gate, old.router.gate)
        assert torch.equal(layer.up.experts, old.up.experts)
    with pytest.raises(UserError, match="exists: expected a new folder"):
        inference.fit_router(str(folder), [], tmp_path / "fitted")


def test_routers_of_a_configuration_are_fitted_and_nothing_is_written(
    donors: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("extends: glue\n")
    inference.fit_router(str(file), [*merged(donors), "routing.fit.rows=24"])
    assert "routers fitted to 24 texts" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["merged.yaml"]


def test_donors_that_cannot_be_told_apart_are_said_to_be(
    donors: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inference.fit_router("glue", [*merged([donors[0], donors[0]]), "routing.fit.rows=64"])
    assert "warning: no layer can tell the donors' texts apart" in capsys.readouterr().out


def test_a_model_without_experts_has_no_routers(donors: list[Path]) -> None:
    with pytest.raises(UserError, match="has no experts, and so no routers"):
        inference.fit_router(str(donors[0]))
