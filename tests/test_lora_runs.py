"""Runs with `tuning.mode: lora`: micro-batches, two processes, T5-large in a step."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config

from camex_ft import synthetic
from camex_ft.config import load_config
from camex_ft.run import pipeline
from camex_ft.run.inference import evaluate
from tests.helpers import training_runs as runs
from tests.helpers.lora_models import CLASSIFIER, lora
from tests.helpers.tiny import inputs_of


def moved(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("protocol", ["domain-ca", "dense"])
def test_micro_batches_make_the_same_step(protocol: str, tmp_path: Path) -> None:
    """Noise, dropout and balance loss off; what is frozen stays."""
    found = []
    for micro in (runs.BATCH, runs.BATCH // 2):
        made = lora(protocol=protocol, routing={"noise": False, "balance": 0.0})
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        frozen = {n: p.clone() for n, p in made.named_parameters() if not p.requires_grad}
        trainer = runs.trainer(
            tmp_path / str(micro),
            made,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=runs.BATCH // micro,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            train_sampling_strategy="sequential",
        )
        before = moved(made)
        trainer.train()
        after = dict(made.named_parameters())
        assert all(torch.equal(after[n], p) for n, p in frozen.items())
        assert any(not torch.equal(after[n], p) for n, p in before.items())
        found.append(moved(made))
    for name, value in found[0].items():
        # float32: the mean of two means against a mean, once through SGD with rate 0.01
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-6, msg=name)


def test_a_run_keeps_an_adapter_that_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = pipeline.run(
        load_config(
            "glue",
            [
                "profile=embedded",
                "backbone=embedded/bert",
                "merging={protocol: domain-ca, experts: 2, curvature: {rank: 1}}",
                "tuning={mode: lora, lora: {rank: 2}}",
                "data={train_rows: 16, eval_rows: 8}",
                "training.max_steps=2",
            ],
        )
    )
    folder = tmp_path / "results" / "runs" / record.run.name
    kept = json.loads((folder / "model" / "adapter.json").read_text())
    assert kept["backbone"]["name"] == "embedded/bert" and kept["plan"]["tuning"]["lora"]["rank"] == 2
    assert record.model.trainable < record.model.parameters / 2
    assert evaluate(folder)["validation_accuracy"] == pytest.approx(record.metrics.best)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """DDP over gloo, each process with one of two rows; the loss is the mean over rows."""
    code = textwrap.dedent(
        """
        import sys
        import torch
        import torch.distributed as dist
        from tests.helpers.lora_models import CLASSIFIER, lora
        from tests.helpers.tiny import inputs_of
        from torch.nn.parallel import DistributedDataParallel

        file, rank = sys.argv[1], int(sys.argv[2])
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
        model = lora(routing={"noise": False}, merging={"protocol": sys.argv[3], "experts": 3}).double()
        inputs = {k: v[rank : rank + 1] for k, v in inputs_of(model, CLASSIFIER).items()}
        wrapped = DistributedDataParallel(model)  # it must outlive the backward pass
        wrapped(**inputs).logits.square().sum().backward()
        if rank == 0:
            torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, file + ".pt")
        dist.destroy_process_group()
        """
    )
    for protocol in ("domain", "smoe"):
        file = tmp_path / protocol
        commands = [[sys.executable, "-c", code, str(file), str(rank), protocol] for rank in range(2)]
        path = ":".join(sys.path)
        children = [subprocess.Popen(c, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}) for c in commands]
        assert [child.wait(300) for child in children] == [0, 0]
        found = torch.load(f"{file}.pt")
        made = lora(routing={"noise": False}, merging={"protocol": protocol, "experts": 3}).double()
        (made(**inputs_of(made, CLASSIFIER)).logits.square().sum() / 2).backward()
        expected = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            # float64: the mean of two rows' gradients, summed in another order
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-9, msg=name)


STEP = """
import json, resource, sys
import torch
from camex_ft.run import pipeline
from camex_ft.config import load_config
from camex_ft.utils.registry import TASKS
from camex_ft.training.cost import count_parameters

settled, _ = pipeline.resolve(load_config("scale/t5-large-lora", [f"backbone=new:{sys.argv[1]}", *sys.argv[2:]]))
model, _ = pipeline.load_model(settled, TASKS.get(settled.task.id))
model.train().activation_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(3, 30000, (2, 64))
model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, :32].contiguous()).loss.backward()
optimizer.step()
counted, peak = count_parameters(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"total": counted.total, "trainable": counted.trainable, "peak": peak * 1024}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="the process's peak memory is told in other units")
def test_t5_large_takes_a_step_within_12_gib(tmp_path: Path) -> None:
    """T5-large's published sizes; 24 layers with 8 experts of rank 8 are at most 3% of the parameters."""
    T5Config(
        vocab_size=32128,
        d_model=1024,
        d_ff=4096,
        d_kv=64,
        num_heads=16,
        num_layers=24,
        num_decoder_layers=24,
        decoder_start_token_id=0,
    ).save_pretrained(tmp_path)
    synthetic.backbone("t5")[1].save_pretrained(tmp_path)
    overrides = ["profile=embedded", "data.source=embedded"]
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tmp_path), *overrides], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["total"] == 760_081_408 and found["trainable"] == 22_413_312
    assert found["trainable"] <= 0.03 * found["total"]
    assert found["peak"] < 12 * 2**30
