"""Bad configurations, data and checkpoints through the command line: a message and exit code 2, or a whole run."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from camex_ft import synthetic
from camex_ft.cli import app
from camex_ft.results.record import load_record
from camex_ft.utils.errors import guard
from tests.helpers.broken_folders import DATA, FORMATS, MODELS, write_data
from tests.helpers.hostile import Hanging, within
from tests.helpers.mutations import Bad, bad

SECONDS = 60  # a tiny run takes one or two
SEED = int(os.environ.get("BAD_INPUT_SEED", "0"))  # of the long tests
MADE: Counter[str] = Counter()


def command(*words: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it said."""
    said, value = io.StringIO(), []
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        within(SECONDS),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        code = guard(lambda: value.append(app([*words], standalone_mode=False)))
    return code or next((v for v in value if isinstance(v, int)), 0), said.getvalue()


@contextlib.contextmanager
def working() -> Iterator[Path]:
    """An empty working folder, gone afterwards."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(here)


def check(code: int, said: str, folder: Path, shown: str) -> None:
    """Assert that a command ended as it should: see the file's first line."""
    runs = [path for path in folder.rglob("runs/*") if path.is_dir()]
    records = list(folder.rglob("record.json"))
    about = f"\n{shown}\n--- exit code {code} ---\n{said[-3000:]}"
    assert code in (0, 2), about
    assert "Traceback" not in said, about
    assert not (folder / "loot").exists(), about
    if code == 2:
        line = next((line for line in said.splitlines() if line.startswith("error: ")), "")
        assert len(line) > len("error: ") + 10, about
        assert not records, about
    else:
        assert len(runs) == 1 and [load_record(run).run.status for run in runs] == ["done"], about
    MADE[f"exit code {code}"] += 1


def run_bad(made: Bad) -> None:
    with working() as folder:
        Path("config.yaml").write_bytes(made.text)
        code, said = command("run", "config.yaml", "output.dir=results", *made.overrides)
        check(code, said, folder, made.text.decode("utf-8", "replace") + " ".join(made.overrides))


QUICK = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(bad())
def test_bad_configurations(made: Bad) -> None:
    run_bad(made)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_500_bad_configurations() -> None:
    """All of them are tried before the first fault is reported."""
    faults: list[str] = []

    @seed(SEED)
    @settings(QUICK, max_examples=500, derandomize=False)
    @given(bad())
    def each(made: Bad) -> None:
        try:
            run_bad(made)
        except (AssertionError, Hanging) as error:
            faults.append(f"{type(error).__name__}: {str(error)[:6000]}")
            print(faults[-1], flush=True)
        if sum(MADE.values()) % 50 == 0:
            print(dict(MADE), flush=True)

    each()
    assert not faults, f"{len(faults)} faults, the first of them:\n{faults[0]}"


SMALL = (
    *(
        "profile=embedded",
        "merging.experts=2",
        "merging.curvature.rank=1",
        "task.max_length=16",
        "output.dir=results",
    ),
    *(
        "training.max_steps=1",
        "training.per_device_train_batch_size=2",
        "data.train_rows=6",
        "data.eval_rows=4",
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole backbone."""
    made = tmp_path_factory.mktemp("bert")
    dense, tokenizer = synthetic.backbone("bert", num_labels=2, seed=0)
    dense.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def run_broken(number: int, model: Path) -> None:
    """Break data (of two of three numbers) or a model, each in its way, and run on it."""
    rng = random.Random(number)
    with working() as folder:
        if number % 3:
            form = FORMATS[number % len(FORMATS)]
            write_data(folder / "data", form)
            change = DATA[number % len(DATA)]
            change(folder / "data", rng)
            words = ("data.dir=data", "backbone=embedded/bert")
        else:
            shutil.copytree(model, folder / "model")
            form, change = "model", MODELS[(number // 3) % len(MODELS)]
            change(folder / "model", rng)
            words = ("data.source=embedded", "backbone=./model")
        code, said = command("run", "glue", *words, *SMALL)
        check(code, said, folder, f"{number}: {form}, {getattr(change, '__qualname__', change)}")


@pytest.mark.parametrize("number", [10, 90])
def test_broken_folders(number: int, model: Path) -> None:
    run_broken(number, model)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_broken_folders(model: Path) -> None:
    """All of them are tried before the first fault is reported."""
    faults: list[str] = []
    MADE.clear()
    for number in range(200 * SEED, 200 * SEED + 200):
        try:
            run_broken(number, model)
        except (AssertionError, Hanging) as error:
            faults.append(f"{number} {type(error).__name__}: {str(error)[:6000]}")
            print(faults[-1], flush=True)
    print(dict(MADE))
    assert not faults, f"{len(faults)} faults, the first of them:\n{faults[0]}"
