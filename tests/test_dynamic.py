"""Dynamic merging and Fisher information in whole models: chains, parameters, training, resuming, two processes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, T5Config
from transformers.pytorch_utils import Conv1D

from camex_ft.estimate import chains_of
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.training.cost import describe
from camex_ft.upcycling import base_chains, expert_layers, load, upcycle
from camex_ft.utils.errors import FunctionChanged
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import MERGING, dense, shake
from tests.helpers.tiny import inputs_of
from tests.helpers.training_runs import model, trainer

CLASSIFIER = "sequence-classification"
DYNAMIC = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "dynamic"]
FISHER = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).statistic]


def upcycled(model_type: str, protocol: str, layers: Any = "all", **merging: Any) -> PreTrainedModel:
    return upcycle(
        dense(model_type, CLASSIFIER),
        merging={**MERGING, "protocol": protocol, **merging},
        upcycle={"layers": layers},
    )


def stores(made: PreTrainedModel) -> list[str]:
    """Return the names of the layers that store a base expert, all of whose maps do."""
    found = {
        n: {m.base is not None for m in layer.linears.values()} for n, layer in expert_layers(made).items()
    }
    assert all(len(stored) == 1 for stored in found.values())
    return [name for name, stored in found.items() if stored == {True}]


# -- chains and parameters


@pytest.mark.parametrize("protocol", DYNAMIC)
def test_the_first_layer_of_each_stack_stores_the_base(protocol: str) -> None:
    made = upcycled("t5", protocol)
    encoder = [n for n in expert_layers(made) if "encoder" in n]
    decoder = [n for n in expert_layers(made) if "decoder" in n]
    assert base_chains(made) == [encoder, decoder]
    assert stores(made) == [encoder[0], decoder[0]]


def test_a_chain_goes_on_over_layers_that_stay_dense() -> None:
    made = upcycled("bert", "ep-camex", layers=[0, 2])
    assert base_chains(made) == [list(expert_layers(made))] and len(expert_layers(made)) == 2


def test_static_merging_has_no_chain() -> None:
    assert base_chains(upcycled("bert", "domain-ca")) == [] == base_chains(upcycled("bert", "smoe"))


def test_a_layer_of_another_shape_starts_a_new_chain() -> None:
    given = copy.deepcopy(dense("gpt2", CLASSIFIER))
    block = given.transformer.h[1].mlp
    width, inner = given.config.n_embd, 20  # the others have 12
    block.c_fc, block.c_proj = Conv1D(inner, width), Conv1D(width, inner)
    made = upcycle(given, merging={**MERGING, "protocol": "ep-camex"}).eval()
    names = list(expert_layers(made))
    assert base_chains(made) == [[name] for name in names] and stores(made) == names
    first, *others = chains_of(expert_layers(made))
    assert "a new one" not in first and all("other shapes" in line for line in others)
    inputs = inputs_of(given, CLASSIFIER)
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, given.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_t5_base_by_hand() -> None:
    """12 + 12 layers of two maps, 768 x 3072, without biases: one base expert a stack and not one a layer."""
    experts, rank, layers, maps, one = 8, 8, 24, 2, 768 * 3072
    factors = 24**2 + 32**2 + 48**2 + 64**2  # 768 = 24 * 32, 3072 = 48 * 64
    with torch.device("meta"):
        given = AutoModelForSequenceClassification.from_config(
            T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12)
        )
    merging = {"experts": experts, "curvature": {"rank": rank}}
    plain = sum(p.numel() for p in given.parameters())
    counts = {}
    for protocol in ("domain-ca", "ep-camex"):
        made = upcycle(given, merging={**merging, "protocol": protocol})
        counts[protocol] = describe(made)
        linears = [m for m in made.modules() if isinstance(m, ExpertLinear)]
        bases = sum(m.base.numel() for m in linears if m.base is not None)
        assert len(linears) == layers * maps
        assert bases == one * maps * (layers if protocol == "domain-ca" else 2)
    added = layers * (maps * (experts - 1) * one + maps * experts * rank * factors + 2 * 768 * experts)
    assert counts["domain-ca"]["parameters"] == plain + added + layers * maps * one
    assert counts["ep-camex"]["parameters"] == plain + added + 2 * maps * one
    assert counts["ep-camex"]["active"] == counts["domain-ca"]["active"] == plain + layers * 2 * 768 * experts


@pytest.mark.parametrize("protocol", DYNAMIC)
def test_another_alpha_is_warned_of_with_the_reason(protocol: str) -> None:
    given = dense("bert", CLASSIFIER)
    with pytest.warns(FunctionChanged, match=r"alpha: .* from other layers"):
        made = upcycled("bert", protocol, alpha=0.5).eval()
    inputs = inputs_of(given, CLASSIFIER)
    with torch.no_grad():  # it says so because it is so
        assert not torch.allclose(made(**inputs).logits, given(**inputs).logits, rtol=1e-3, atol=1e-3)


# -- training


def gradients(made: PreTrainedModel, *, checkpointing: bool) -> dict[str, Tensor]:
    made = shake(copy.deepcopy(made), 0.05).train()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)  # of the dropout that is no module
    made(**inputs_of(made, CLASSIFIER)).logits.square().sum().backward()
    return {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("protocol", DYNAMIC)
@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_gradient_checkpointing(model_type: str, protocol: str) -> None:
    options = {"momentum": 0.9, "angle": 0.5} if "momentum" in PROTOCOLS.get(protocol).options else {}
    given = upcycle(
        dense(model_type, CLASSIFIER),
        merging={**MERGING, "protocol": protocol, "options": options},
        routing={"noise": False},
    )
    plain, again = (gradients(given, checkpointing=c) for c in (False, True))
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        # the same operations on the same numbers, but for the order of sums
        close = torch.allclose(again[name], grad, rtol=0, atol=1e-6 * max(1.0, float(grad.abs().max())))
        assert close, name
    first = next(n for n in plain if n.endswith("up.base"))
    assert float(plain[first].abs().max()) > 0


@pytest.mark.parametrize("protocol", DYNAMIC)
def test_autocast_and_narrow_weights(protocol: str) -> None:
    given = upcycle(
        dense("bert", CLASSIFIER), merging={**MERGING, "protocol": protocol}, routing={"noise": False}
    )
    made = shake(given, 0.05).train()
    inputs = inputs_of(made, CLASSIFIER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(**inputs).logits.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters() if p.grad is not None)
    narrow = copy.deepcopy(made).bfloat16().eval()
    with torch.no_grad():
        exact = made.eval()(**inputs).logits
        # bfloat16 has 8 bits: about 1e-2 relative, over three layers
        torch.testing.assert_close(
            narrow(**inputs).logits.float(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max())
        )


def test_the_bargain_starts_from_the_last_step_and_is_saved(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, model("namex-full"), save_strategy="no", eval_strategy="no", load_best_model_at_end=False
    )
    made.train()
    starts = {n: b for n, b in made.model.named_buffers() if n.endswith("bargain")}
    assert len(starts) == 3
    # the last layer of a chain passes nothing on, and solves for nothing
    assert [bool((b > 0).all()) for b in starts.values()] == [True, True, False]
    made.model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    inputs = inputs_of(loaded, CLASSIFIER)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, made.model.eval()(**inputs).logits)


def bases_of(angle: float, momentum: float) -> list[Tensor]:
    """Return the carried base expert of every layer of one map."""
    options = {"momentum": momentum, "angle": angle}
    made = shake(upcycled("bert", "namex-full", options=options), 0.1).eval()
    layers = list(expert_layers(made).values())
    with torch.no_grad():
        return [layer.propagated_bases()["up"].weight.base for layer in layers[1:]]


def test_the_angle_matters_from_the_third_layer_on_and_its_sign_never() -> None:
    straight, left, right = (bases_of(a, 0.9) for a in (0.0, -math.pi / 6, math.pi / 6))
    assert torch.equal(straight[0], right[0]) and not torch.equal(straight[1], right[1])
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


# -- fisher


@pytest.mark.parametrize("protocol", FISHER)
def test_the_trainer_keeps_a_running_mean_of_squared_gradients(protocol: str, tmp_path: Path) -> None:
    """By hand, from the gradients at each optimizer step, which two micro-batches make together."""
    options = {"decay": 0.5, "damping": 0.2}
    given = upcycle(
        dense("bert", CLASSIFIER), merging={**MERGING, "protocol": protocol, "options": options}, seed=1
    )
    made = trainer(
        tmp_path,
        given,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        gradient_accumulation_steps=2,
    )
    expected: dict[str, Tensor] = {}
    seen: list[float] = []
    step = made.create_optimizer().step

    def watched(*args: Any, **kwargs: Any) -> Any:
        for name, linear in linears(given).items():
            for suffix, parameter in (("", linear.experts), (".bias", linear.expert_bias)):
                known = expected.get(name + suffix, torch.zeros_like(parameter))
                mean = known.mean(0)
                keep = torch.where(mean > 0, (known + 0.2 * mean) / (1.2 * mean), 1)
                expected[name + suffix] = 0.5 * known + 0.5 * (parameter.grad / keep) ** 2
                seen.append(float(keep.std()))
        return step(*args, **kwargs)

    made.optimizer.step = watched
    made.train()
    for name, linear in linears(given).items():
        # float32; a gradient divided by what it was multiplied with
        torch.testing.assert_close(linear.statistic, expected[name], rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(linear.bias_statistic, expected[name + ".bias"], rtol=1e-4, atol=1e-12)
        assert float(linear.statistic.max()) > 0
    assert max(seen) > 0.1  # experts are weighted apart


def linears(made: PreTrainedModel) -> dict[str, ExpertLinear]:
    return {n: m for n, m in made.named_modules() if isinstance(m, ExpertLinear)}


@pytest.mark.parametrize("protocol", FISHER)
def test_statistics_weigh_domain_vectors(protocol: str, tmp_path: Path) -> None:
    made = shake(upcycled("bert", protocol), 0.1).eval()
    inputs = inputs_of(made, CLASSIFIER)
    with torch.no_grad():
        before = made(**inputs).logits
        generator = torch.Generator().manual_seed(3)
        for linear in linears(made).values():
            for statistic in (linear.statistic, linear.bias_statistic):
                statistic.copy_(torch.rand(statistic.shape, generator=generator))
        after = made(**inputs).logits  # what was kept for evaluation is made anew
        assert not torch.allclose(after, before, rtol=1e-3)
        first = next(iter(linears(made).values()))
        weight, _ = first.merged(torch.full((1, 3), 1 / 3))
        mean = first.statistic.mean(0)
        keep = (first.statistic + 0.1 * mean) / (1.1 * mean)
        expected = first.base + (keep * (first.experts - first.base)).mean(0)
        torch.testing.assert_close(weight[0], expected, rtol=1e-5, atol=1e-6)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**inputs).logits, after)


# -- processes

PROCESS = """
import sys, torch
from accelerate import PartialState
sys.path.insert(0, {root!r})
from tests.helpers.training_runs import model, trainer
from pathlib import Path
state = PartialState(cpu=True)
made = trainer(Path({folder!r}), model({protocol!r}, noise=False, balance=0.0), use_cpu=True, save_strategy="no",
    eval_strategy="no", load_best_model_at_end=False, train_sampling_strategy="sequential", optim="sgd",
    per_device_train_batch_size=4 // state.num_processes)
for module in made.model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
made.train()
if state.is_main_process:
    torch.save(made.model.state_dict(), {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [*DYNAMIC, *FISHER])
def test_two_processes_are_one(protocol: str, tmp_path: Path) -> None:
    """Eight steps of SGD on the same batches of four rows, by one process and by two with gloo."""
    found = []
    for count in (1, 2):
        script, out = tmp_path / f"run{count}.py", tmp_path / f"weights{count}"
        given = {
            "root": str(Path(__file__).parents[1]),
            "folder": str(tmp_path / str(count)),
        }
        script.write_text(PROCESS.format(protocol=protocol, out=str(out), **given))
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        subprocess.run([sys.executable, *start, str(script)], check=True, capture_output=True, timeout=300)
        found.append(torch.load(out, weights_only=True))
    for name, value in found[0].items():
        # float32: means of two means of two against means of four, over eight steps
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
