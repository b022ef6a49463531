"""The peak of what is live in a training step, against torch's own account of its allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from camex_ft.estimate.memory import Engine, Memory, Stored, Where, memory
from camex_ft.estimate.survey import Precision, survey
from camex_ft.moe import workspace as scratch
from camex_ft.upcycling import expert_layers, freeze, upcycle
from tests.helpers.estimate_sizes import CLASSIFIER, SEGMENT, batch, inputs, small


def built(dense: Any, protocol: str, mode: str = "full") -> Any:
    merging = {"protocol": protocol, "experts": 4, "top_k": 2, "curvature": {"rank": 1}}
    routing = {"segment": SEGMENT, "noise": False}
    model = upcycle(dense, merging=merging, routing=routing, tuning={"mode": mode}).train()
    if mode == "experts":
        freeze(model, mode)
    return model


def planned(dense: Any, model: Any, where: Where | None = None, **precision: Any) -> Memory:
    return memory(model, survey(dense, batch(dense)), expert_layers(model), Precision(**precision), where)


def live(model: Any, head: str) -> int:
    """Most bytes that torch holds in the second optimizer step, weights, buffers and moments among them."""
    data = inputs(head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers(), *scratch._local.buffers.values()]
    held += [t for state in optimizer.state.values() for t in state.values()]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    kineto: Any = profile.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in held}.values())


@pytest.mark.parametrize(
    ("model_type", "head", "protocol", "mode"),
    [
        *(
            (*case, "dense", "full")
            for case in [("t5", CLASSIFIER), ("llama", "causal-lm"), ("bert", CLASSIFIER)]
        ),
        *((*case, "domain-ca", "full") for case in [("t5", CLASSIFIER), ("llama", "causal-lm")]),
        ("llama", "causal-lm", "ep-camex", "full"),
        ("llama", "causal-lm", "domain-ca", "experts"),
        ("t5", CLASSIFIER, "domain-ca", "lora"),
        ("llama", "causal-lm", "domain-ca", "lora"),
    ],
)
def test_what_is_live(model_type: str, head: str, protocol: str, mode: str) -> None:
    """Below by routing and the smallest temporaries, which weigh more here than in the models of docs/plan.md."""
    scratch._local.buffers.clear()
    dense = small(model_type, head, wide=True)
    model = built(dense, protocol, mode)
    memory_ = planned(dense, model)
    assert 0.94 < (memory_.total - memory_.heap) / live(model, head) < 1.03


def test_micro_batches_keep_their_gradients() -> None:
    """All of them are there beside all activations, while those of one batch take the activations' place."""
    dense = small("bert", CLASSIFIER, wide=True)
    several = memory(dense, survey(dense, batch(dense, steps=2)), {}, Precision())
    once = planned(dense, dense)
    assert several.apart == 0 > once.apart
    assert several.gradients == once.gradients


def test_the_heap_holds_freed_memory_on_a_cpu_alone() -> None:
    dense = small("bert", CLASSIFIER)
    cpu, gpu = planned(dense, dense), planned(dense, dense, gpu=True)
    assert cpu.heap > 0 == gpu.heap
    assert cpu.total == cpu.heap + cpu.working + cpu.apart + sum(
        (cpu.weights, cpu.gradients, cpu.optimizer, cpu.vectors, cpu.activations)
    )


def test_parts_add_up() -> None:
    dense = small("gpt2", "causal-lm")
    made = planned(dense, built(dense, "ties-ca"), Where(framework=1000))
    parts = (made.weights, made.gradients, made.optimizer, made.vectors, made.activations, made.working)
    assert sum(parts) + made.heap + made.framework + made.apart == made.total
    assert made.apart <= 0


def test_what_engines_share_out() -> None:
    """Of equal blocks: everything a process stores, and what it gathers or sends beside."""
    dense = small("bert", CLASSIFIER, layers=4)
    stored = Stored.of(dense)
    block, outside = stored.weights["bert.encoder.layer.0"], stored.weights[""]
    weights, buffers = sum(stored.weights.values()), stored.buffers
    assert stored.gradients == stored.weights
    assert weights == 4 * block + outside == sum(p.nbytes for p in dense.parameters())

    def of(name: str, processes: int) -> tuple[float, float, float]:
        return stored.per_process(Engine(name=name, processes=processes))

    for name in ("ddp", "fsdp", "zero2", "zero3"):
        assert of(name, 1) == (weights + buffers, weights, 0)
    assert of("ddp", 4) == (weights + buffers, weights, weights)
    assert of("zero2", 4) == (weights + buffers, weights / 4, block + outside)
    assert of("fsdp", 4) == of("zero3", 4) == (weights / 4 + buffers, weights / 4, 3 * block + 2 * outside)


def test_more_processes_need_less_each_but_with_ddp() -> None:
    dense = small("llama", "causal-lm", layers=4, wide=True)
    model = built(dense, "domain-ca")

    def peak(name: str, processes: int) -> int:
        return planned(dense, model, Where(engine=Engine(name=name, processes=processes)), gpu=True).total

    assert peak("ddp", 2) == peak("ddp", 8) > peak("ddp", 1)
    for name in ("fsdp", "zero2"):
        assert peak(name, 8) < peak(name, 4) < peak(name, 2) < peak("ddp", 2)
    assert peak("fsdp", 8) < peak("zero2", 8)
