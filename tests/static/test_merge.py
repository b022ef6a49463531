"""Merges of three donors end to end: equal to the formulas, whole or absent, tensor by tensor."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import camex_ft
from camex_ft import synthetic
from camex_ft.cli import app
from camex_ft.static import merge as module
from camex_ft.static import merge_inputs
from camex_ft.static.merge import write_merge
from camex_ft.static.merge_needs import needs_of, working_bytes
from camex_ft.static.merge_spec import make_spec
from camex_ft.static.tensor_files import FolderReader, ModelReader, TensorInfo
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import MERGE_METHODS
from tests.helpers import merge_reference as reference
from tests.helpers.merge_reference import doubles, llamas, perturbed, save

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # float32 against float64
WEIGHTS = [1.0, 1.0, 0.5]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start, tokenizer, donors of 30 training steps each, and the folders of all of them."""
    start, tokenizer, donors = llamas(3)
    root = tmp_path_factory.mktemp("trio")
    places = [save(m, tokenizer, root / str(n)) for n, m in enumerate([start, *donors])]
    return start, tokenizer, donors, places


def assert_merged(
    model: Any, start: Any, donors: list[Any], method: str, weights: list[float], **options: Any
) -> None:
    for name, parameter in model.named_parameters():
        base = doubles([start], name)[0]
        if method == "ties":  # trimmed on the float32 task vectors, whose rounding decides ties of magnitudes
            base32 = dict(start.named_parameters())[name].detach()
            tau = torch.stack([dict(d.named_parameters())[name].detach() - base32 for d in donors]).double()
            expected = reference.ties(torch.zeros_like(base), tau, weights, **options) + base
        else:
            expected = reference.FORMULAS[method](base, doubles(donors, name), weights, **options)
        torch.testing.assert_close(parameter.detach().double(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {}),
        ("arithmetic", {"scale": 0.4}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "elect": "unweighted", "divide": "count", "scale": 1.2}),
    ],
)
def test_three_donors_in_folders_are_merged_by_the_formula(
    trio: Any, tmp_path: Path, method: str, options: Any
) -> None:
    start, _, donors, places = trio
    spec = make_spec(
        {"start": places[0], "from": places[1:], "method": method, "options": options, "weights": WEIGHTS}
    )
    write_merge(spec, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_merged(model, start, donors, method, WEIGHTS, **options)


def test_slerp_merges_two_donors_by_the_formula(trio: Any, tmp_path: Path) -> None:
    start, _, donors, places = trio
    options = {"t": 0.3}
    spec = make_spec({"start": places[0], "from": places[1:3], "method": "slerp", "options": options})
    write_merge(spec, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_merged(model, start, donors[:2], "slerp", [], **options)


def test_models_in_memory_are_merged_as_their_folders(trio: Any) -> None:
    start, _, donors, places = trio
    before = copy.deepcopy([start.state_dict(), donors[0].state_dict()])
    inside = camex_ft.merge(start, donors, method="ties", weights=WEIGHTS)
    outside = camex_ft.merge(places[0], places[1:], method="ties", weights=WEIGHTS)
    mixed = camex_ft.merge(start, [donors[0], *places[2:]], method="ties", weights=WEIGHTS)
    assert type(inside) is type(start)
    assert not inside.training
    for name, parameter in inside.named_parameters():
        for other in (outside, mixed):
            assert torch.equal(parameter, other.get_parameter(name)), name
    for state, model in zip(before, (start, donors[0]), strict=True):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_folder_is_a_checkpoint_with_record_and_card(trio: Any, tmp_path: Path) -> None:
    start, tokenizer, _, places = trio
    model = camex_ft.merge(places[0], places[1:], weights=WEIGHTS, output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "merge.json", "README.md", "tokenizer.json"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert model.config.architectures == [type(start).__name__]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "ties"
    assert record["weights"] == WEIGHTS
    assert record["options"] == {"density": 0.2, "scale": 1.0, "elect": "weighted", "divide": "weights"}
    assert record["tensors"] == {"merged": len(list(model.parameters()))}
    assert [len(each["sha256"]) for each in (record["start"], *record["donors"])] == [64] * 4
    assert all(0.5 < donor["cosine"] < 1 for donor in record["donors"])
    assert str(tmp_path) not in json.dumps(record)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "TIES-Merging" in card
    assert str(tmp_path) not in card
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_merge_repeats_bit_for_bit_and_the_seed_changes_the_draw(trio: Any) -> None:
    start, _, donors, _ = trio
    first, again, other = (
        camex_ft.merge(start, donors, method="dare", options={"density": 0.3}, seed=seed)
        for seed in (0, 0, 1)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_weights_by_name_choose_the_donors_of_each_tensor(trio: Any) -> None:
    start, _, donors, _ = trio
    weights = {"*.mlp.*": [1, 0, 0], "*.self_attn.*": [0, 1, 0], "*": [0, 0, 1]}
    merged = camex_ft.merge(
        start, donors, method="arithmetic", weights={k: [float(w) for w in v] for k, v in weights.items()}
    )
    for name, parameter in merged.named_parameters():
        donor = donors[0 if ".mlp." in name else 1 if ".self_attn." in name else 2]
        torch.testing.assert_close(parameter, donor.get_parameter(name), rtol=0, atol=1e-6)


def test_a_pattern_without_a_tensor_is_refused(trio: Any) -> None:
    start, _, donors, _ = trio
    with pytest.raises(UserError, match=r"no tensor has a name like \*\.mpl\.\*"):
        camex_ft.merge(start, donors, weights={"*.mpl.*": [1.0, 1.0, 1.0]})


def test_tensors_equal_in_all_stay_bit_for_bit(trio: Any, tmp_path: Path) -> None:
    start = trio[0]
    donors = [copy.deepcopy(start) for _ in range(3)]
    for n, donor in enumerate(donors):
        with torch.no_grad():
            donor.lm_head.weight += 0.01 * n
    spec = {"start": "s", "from": ["a", "b", "c"], "method": "average"}
    models = dict(zip(["s", "a", "b", "c"], [start, *donors], strict=True))
    merged = write_merge(make_spec(spec), tmp_path / "out", models=models)
    assert merged.record["tensors"] == {"equal": len(list(start.parameters())) - 1, "merged": 1}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in start.named_parameters():
        assert torch.equal(tensors[name], parameter) is (name != "lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_starts_unless_another_is_asked_for(
    trio: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    start, tokenizer, donors, places = trio
    place = save(copy.deepcopy(start).to(dtype), tokenizer, tmp_path / "start")
    merged = camex_ft.merge(place, places[1:], method="average")
    assert merged.dtype is dtype
    expected = reference.average(torch.empty(0), doubles(donors, "lm_head.weight"), [1, 1, 1])
    step = torch.finfo(dtype).eps  # float32 sums may round to the neighbour
    torch.testing.assert_close(merged.lm_head.weight.detach().double(), expected, rtol=step, atol=1e-6)
    assert camex_ft.merge(place, places[1:], method="average", dtype="float32").dtype is torch.float32


# -- other forms of start and donors ----------------------------------------------------------------------------------


def test_an_embedded_start_an_adapter_and_a_run_are_merged(trio: Any, tmp_path: Path) -> None:
    start, tokenizer, donors, places = trio
    adapted = get_peft_model(copy.deepcopy(start), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    save(donors[0], tokenizer, tmp_path / "run" / "model")
    (tmp_path / "run" / "record.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("training: {seed: 0}\n")
    merged = camex_ft.merge(
        "embedded/llama", [f"adapter:{tmp_path / 'adapter'}", tmp_path / "run", places[2]], method="average"
    )
    assert_merged(merged, start, [adapted.merge_and_unload(), donors[0], donors[1]], "average", [1, 1, 1])


def test_a_start_in_a_gguf_file_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.helpers import gguf_files

    model, tokenizer = gguf_files.tiny_model()
    path = tmp_path / "start.gguf"
    gguf_files.write_gguf(path, model, tokenizer)
    donors = [perturbed(model, seed) for seed in range(2)]
    places = [save(d, tokenizer, tmp_path / str(n)) for n, d in enumerate(donors)]
    merged = camex_ft.merge(str(path), places, method="arithmetic", options={"scale": 0.5})
    assert_merged(merged, model, donors, "arithmetic", [1, 1], scale=0.5)


def test_a_head_that_the_start_lacks_is_the_mean_of_the_donors(tmp_path: Path) -> None:
    start, tokenizer = synthetic.backbone("bert", head="base")
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    place = save(start, tokenizer, tmp_path / "start")
    donors = []
    for seed in range(2):
        model = AutoModelForSequenceClassification.from_pretrained(place, **names)
        donors.append(perturbed(model, seed).eval())
    places = [save(d, tokenizer, tmp_path / str(n)) for n, d in enumerate(donors)]
    spec = make_spec({"start": place, "from": places, "method": "arithmetic", "options": {"scale": 0.5}})
    merged = write_merge(spec, tmp_path / "out")
    assert merged.record["tensors"]["new"] == 2
    assert "the weighted mean of the donors' is taken" in merged.record["notes"][0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == names["id2label"]
    mean = reference.average(torch.empty(0), doubles(donors, "classifier.weight"), [1, 1])
    torch.testing.assert_close(model.classifier.weight.detach().double(), mean, **CLOSE)
    name = "encoder.layer.0.output.dense.weight"
    base = doubles([start], name)[0]
    expected = reference.arithmetic(base, doubles([d.bert for d in donors], name), [1, 1], 0.5)
    torch.testing.assert_close(model.bert.get_parameter(name).detach().double(), expected, **CLOSE)


def test_donors_with_other_labels_are_refused(tmp_path: Path) -> None:
    place = save(*synthetic.backbone("bert", head="base"), tmp_path / "start")
    places = []
    for n, names in enumerate((["no", "yes"], ["yes", "no"])):
        model = AutoModelForSequenceClassification.from_pretrained(place, id2label=dict(enumerate(names)))
        places.append(save(model, AutoTokenizer.from_pretrained(place), tmp_path / str(n)))
    with pytest.raises(UserError, match=r"its labels are \['yes', 'no'\], those of .* are \['no', 'yes'\]"):
        camex_ft.merge(place, places)


@pytest.mark.parametrize("other", ["seed", "family", "experts"])
def test_what_is_no_donor_is_refused_and_nothing_is_written(trio: Any, tmp_path: Path, other: str) -> None:
    start, tokenizer, _, places = trio
    model = {
        "seed": lambda: synthetic.backbone("llama", head="causal-lm", seed=1)[0],
        "family": lambda: synthetic.backbone("mistral", head="causal-lm")[0],
        "experts": lambda: camex_ft.upcycle(start, merging={"protocol": "smear", "experts": 2}),
    }[other]()
    place = save(model, tokenizer, tmp_path / "other")
    with pytest.raises(
        UserError, match={"seed": "cosine", "family": "model_type", "experts": "has experts"}[other]
    ):
        camex_ft.merge(places[0], [*places[1:], place], output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_folder_in_use_is_refused(trio: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is there already"):
        camex_ft.merge(trio[0], trio[2], output=tmp_path)


def test_a_merge_that_fails_leaves_nothing(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "merge_record", fails)
    with pytest.raises(UserError, match="no room left"):
        camex_ft.merge(trio[0], trio[2], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- memory -----------------------------------------------------------------------------------------------------------


MEASURED = """
import sys
from pathlib import Path
from camex_ft.static.merge import write_merge
from camex_ft.static.merge_spec import make_spec

def megabytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

small, start, out, *donors = sys.argv[1:]
options = {"density": 0.2} if out.startswith("ties") else {}
write_merge(make_spec({"start": small, "from": [small] * 3, "method": out}), f"small-{out}")  # imports, caches
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = megabytes("VmRSS")
write_merge(make_spec({"start": start, "from": donors, "method": out, "options": options}), out)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from /proc")
@pytest.mark.parametrize("method", ["ties", "dare-ties"])
def test_memory_stays_below_the_size_of_one_model(trio: Any, tmp_path: Path, method: str) -> None:
    """Resident memory, pages of the files that are read among it, of a model of 85 MB in three shards."""
    _, tokenizer, _, places = trio
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 20, "vocab_size": 512}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=8, num_key_value_heads=8)
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(config)
    folders = []
    for n in range(4):
        folder = tmp_path / f"donor{n}"
        model = start if n == 0 else perturbed(start, n)
        model.save_pretrained(folder, max_shard_size="30MB")
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    size = sum(p.numel() for p in start.parameters()) * 4 / 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, places[0], folders[0], method, *folders[1:]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5 * size, f"{done.stdout} MB for a model of {size:.0f} MB"


def test_large_tensors_are_read_in_blocks_of_rows(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = trio[3]
    whole = camex_ft.merge(places[0], places[1:], method="dare-ties", options={"density": 1.0})
    largest = 0
    read = FolderReader.read

    def counted(self: FolderReader, name: str, rows: slice | None = None) -> Tensor:
        nonlocal largest
        tensor = read(self, name, rows)
        largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(FolderReader, "read", counted)
    monkeypatch.setattr(merge_inputs, "BLOCK", 1000)
    blocked = camex_ft.merge(places[0], places[1:], method="dare-ties", options={"density": 1.0})
    assert largest <= 1000
    for name, parameter in blocked.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_merge_of_7b_needs_less_than_one_model() -> None:
    """By the estimate of --dry-run, in bfloat16, three donors."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=32, num_key_value_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    infos: dict[str, TensorInfo] = dict(ModelReader(model).infos)
    size = sum(info.nbytes for info in infos.values())
    assert size == pytest.approx(13.5e9, rel=0.01)
    for name in ("average", "arithmetic", "ties", "dare", "dare-ties", "slerp"):
        entry = MERGE_METHODS.get(name)
        assert working_bytes(infos, entry, donors=entry.count or 3) < 0.6 * size, name


def test_the_estimate_names_memory_disk_and_what_is_loaded_whole(trio: Any) -> None:
    places = trio[3]
    needs = needs_of(make_spec({"start": "embedded/llama", "from": places[1:], "seed": 0}))
    assert needs.parameters == sum(p.numel() for p in trio[0].parameters())
    assert needs.model == 4 * needs.parameters
    assert needs.loaded == ("embedded/llama",)
    assert needs.scratch == needs.model
    assert "beside it while merging" in "\n".join(needs.lines())
    assert needs_of(make_spec({"start": places[0], "from": places[1:]})).scratch == 0


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def spec_file(trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps({"start": trio[3][0], "from": trio[3][1:], "method": "ties"}))
    return file


def test_the_command_writes_the_folder_and_says_what_was_merged(trio: Any, spec_file: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(spec_file), "options.density=0.3", "-o", "out"])
    assert done.exit_code == 0, done.output
    assert "method: ties (density 0.3" in done.output
    assert "wrote" in done.output
    assert_merged(
        AutoModelForCausalLM.from_pretrained("out"), trio[0], trio[2], "ties", [1, 1, 1], density=0.3
    )


def test_a_dry_run_writes_nothing(spec_file: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(spec_file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "memory" in done.output
    assert list(spec_file.parent.iterdir()) == [spec_file]


def test_without_an_output_the_command_is_refused(spec_file: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(spec_file)])
    assert isinstance(done.exception, UserError)
    assert "--output DIR" in str(done.exception)
