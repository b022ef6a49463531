"""``camex-ft bench step`` and ``decode``: a whole backbone, dense and with experts in every layer.

Backbones have their published sizes and random weights: nothing is downloaded. A training step is the Trainer's work
on one batch: forward pass, the model's loss and the balance losses, backward pass, SGD, and gradients freed. In
decoding, a prompt is read into each model's key-value cache; then some tokens are fed one by one, all within one
segment, and removed from the cache, so that every repeat begins at the same place. The merged experts of a segment
are computed at its first token, which is timed separately.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from camex_ft import synthetic
from camex_ft.backbones.base import plain_type
from camex_ft.backbones.heads import HEADS, has_head
from camex_ft.bench.measurement import Side, alternate, medians, timed
from camex_ft.bench.settings import PUBLISHED, BackboneBench, DecodeBench, StepBench, check_backbone
from camex_ft.config.backbones import EMBEDDED
from camex_ft.estimate import measured
from camex_ft.estimate.columns import known_backbone
from camex_ft.estimate.measured import in_child
from camex_ft.upcycling import cached, routing_context, upcycle
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import positions

GIB = 2**30
LABELS = 2
RATE = 1e-3
NOISE = 0.1  # of experts around the base, relative to the weights' standard deviation
STEPS = 2  # whose memory is measured: the second meets memory that the first has freed


def build(name: str, *, head: str = "sequence-classification", seed: int = 0) -> PreTrainedModel:
    """Return a dense model with random weights under a head of `camex_ft.backbones.heads.HEADS`, in training mode.

    Raises:
        UserError: no backbone of that name, or one that has no such head.
    """
    check_backbone(name)
    if name.startswith(EMBEDDED):
        tiny, _ = synthetic.backbone(name.removeprefix(EMBEDDED), head=head, num_labels=LABELS, seed=seed)
        return tiny.train()
    config = AutoConfig.for_model(num_labels=LABELS, **(known_backbone(PUBLISHED[name]) or {}))
    # transformers gives BERT a causal head too, which is causal only as half of an encoder-decoder
    if not has_head(type(config), head) or (head == "causal-lm" and config.model_type == "bert"):
        raise UserError(f"backbone '{name}' has no head '{head}'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = HEADS[head].from_config(config)
    return model.train()


def inputs(model: PreTrainedModel, *, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens without padding, and labels, on the model's device.

    Raises:
        UserError: the model has no positions for sequences of this length.
    """
    config: Any = model.config
    limit = positions(config)
    if limit is not None and length > limit:
        raise UserError(f"--length is {length}: {plain_type(config.model_type)} has {limit} positions here")
    special = {getattr(config, f"{role}_token_id", None) for role in ("pad", "bos", "eos", "decoder_start")}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = words[torch.randint(len(words), (batch, length), generator=generator)]
    if plain_type(config.model_type) == "t5":
        ids[:, -1] = config.eos_token_id  # its classifier reads the end token
    labels = torch.randint(LABELS, (batch,), generator=generator)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


def dense_model(settings: BackboneBench) -> PreTrainedModel:
    """Return the dense backbone in the number format and on the device of the settings."""
    decoding = isinstance(settings, DecodeBench)
    model = build(settings.backbone, head="causal-lm" if decoding else "sequence-classification")
    model.to(device=settings.device, dtype=getattr(torch, settings.dtype))  # type: ignore[call-arg]
    return model.train(not decoding)


def upcycled(dense: PreTrainedModel, settings: BackboneBench) -> PreTrainedModel:
    """Return a copy of `dense` with experts in every layer, which differ from the base."""
    merging = {
        "protocol": settings.protocol,
        "experts": settings.experts,
        "top_k": settings.top_k,
        "curvature": {"kind": settings.curvature, "rank": settings.rank},
    }
    routing = {"segment": settings.segment} if isinstance(settings, DecodeBench) else {}
    init = {"layers": "all", "init": "noise", "noise": NOISE}
    return upcycle(dense, merging=merging, routing=routing, upcycle=init).train(dense.training)


def _steps(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of both sides and their ratio."""
    median = medians(times)
    ratio = median["upcycled"] / median["dense"]
    return {"dense_step_s": median["dense"], "step_s": median["upcycled"], "ratio_dense": ratio}


# -- a training step --------------------------------------------------------------------------------------------------


class TrainingStep:
    """A training step of one model, on the same batch at every call."""

    def __init__(self, model: PreTrainedModel, settings: StepBench) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.batch = inputs(model, batch=settings.batch, length=settings.length)

    def __call__(self) -> None:
        """Take the step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> torch.Tensor:
        """Return the training loss, as `CamexTrainer.compute_loss` has it."""
        loss: torch.Tensor = self.model(**self.batch).loss
        context = routing_context(self.model)
        balance = context.last.balance_loss() if context is not None and context.last is not None else None
        return loss if balance is None else loss + balance.to(loss.device)


def peaks(settings: StepBench) -> dict[str, float | None]:
    """Return the peak memory of a process that makes the upcycled model and takes two steps; GiB.

    ``peak_rss_gb`` is that of the steps, ``building_peak_rss_gb`` that of everything before, None where the system
    cannot tell them apart; on a GPU ``peak_gpu_gb`` is the memory that torch allocated there in the steps.
    """
    step = TrainingStep(upcycled(dense_model(settings), settings), settings)
    building = measured.peak_resident()
    apart = measured.reset_peak()
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    figures: dict[str, float | None] = {
        "peak_rss_gb": measured.peak_resident() / GIB,
        "building_peak_rss_gb": building / GIB if apart else None,
    }
    return {**figures, "peak_gpu_gb": torch.cuda.max_memory_allocated() / GIB} if on_gpu else figures


def bench_step(settings: StepBench) -> dict[str, Any]:
    """Return the figures: median seconds a step, dense and upcycled, their ratio, peak memory in GiB, parameters."""
    peak = in_child(peaks, settings)
    dense = dense_model(settings)
    model = upcycled(dense, settings)
    gc.collect()
    sides = {"dense": Side(TrainingStep(dense, settings)), "upcycled": Side(TrainingStep(model, settings))}
    times = alternate(sides, repeats=settings.repeats, device=settings.device)
    return {
        **_steps(times),
        **peak,
        "parameters": {"dense": dense.num_parameters(), "upcycled": model.num_parameters()},
        "times": times,
    }


# -- decoding ---------------------------------------------------------------------------------------------------------


class Decoding:
    """One model with the prompts in its key-value cache."""

    def __init__(self, model: PreTrainedModel, settings: DecodeBench) -> None:
        self.model, self.settings = model, settings
        ids = inputs(model, batch=settings.batch, length=settings.length + settings.tokens)["input_ids"]
        if settings.same_prompt:
            ids = ids[:1].repeat(settings.batch, 1)
        self.next = ids[:, settings.length :]
        self.cache = DynamicCache(config=model.config)
        self._feed(ids[:, : settings.length])

    @torch.inference_mode()
    def _feed(self, ids: torch.Tensor) -> None:
        self.model(ids, past_key_values=self.cache, use_cache=True)

    def token(self) -> None:
        """Feed one token."""
        self._feed(self.next[:, :1])

    def __call__(self) -> None:
        """Feed the tokens one by one."""
        for t in range(self.settings.tokens):
            self._feed(self.next[:, t : t + 1])

    def back(self) -> None:
        """Return to the end of the prompt."""
        self.cache.crop(self.settings.length - self.cache.get_seq_length())


def bench_decode(settings: DecodeBench) -> dict[str, Any]:
    """Return the figures: median seconds a token, dense and upcycled, their ratio, seconds that merging takes once."""
    dense = dense_model(settings)
    sides = {"dense": Decoding(dense, settings), "upcycled": Decoding(upcycled(dense, settings), settings)}
    gc.collect()
    with cached(sides["upcycled"].model):  # as in `generate`
        first = timed(Side(sides["upcycled"].token), settings.device)
        runs = {name: Side(side, side.back) for name, side in sides.items()}
        times = alternate(runs, repeats=settings.repeats, device=settings.device)
    times = {name: [seconds / settings.tokens for seconds in side] for name, side in times.items()}
    steps = _steps(times)
    return {
        **steps,
        "first_token_s": first,
        "merging_a_token_s": max(0.0, first - steps["step_s"]) / settings.segment,
        "times": times,
    }
