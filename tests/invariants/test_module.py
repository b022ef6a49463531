"""Invariant: an upcycled model is a module as any other, to pickle, copy.deepcopy, torch.func and torch.export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel

from camex_ft.upcycling import cached, routing_context, upcycle
from camex_ft.utils.registry import BACKBONES, PROTOCOLS
from tests.helpers.invariant_cases import FULL, Case, cases, causal_cases, dense, output, shake, upcycled
from tests.helpers.tiny import inputs_of

# float32: the same sums in another order, of logits that the tiny models' large random weights may make large
EXACT, CLOSE = 0.0, 1e-5
ALL = cases()


def covering(found: list[Case]) -> list[Any]:
    """Return the cases, slow but for the first of each protocol and of each family."""
    families = {t: name for name in BACKBONES.names() for t in BACKBONES.get(name).model_types}
    met: set[str] = set()
    made = []
    for case in sorted(found, key=lambda case: case.head not in FULL):
        new = {case.protocol, families[case.model_type]} - met
        met |= new
        made.append(pytest.param(case, id=str(case), marks=() if new else pytest.mark.slow))
    return made


def evaluated(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


def changed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other inputs of the same shape: other tokens, and padding elsewhere."""
    return {name: value.flip(0) for name, value in inputs.items()}


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # written above


@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", covering(ALL))
def test_a_copy_computes_the_same_and_trains_apart(
    case: Case, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    expected = evaluated(model, inputs)
    other = copied(model)
    assert type(other) is type(model) and type(other.config) is type(model.config)
    close(evaluated(other, inputs), expected, EXACT)
    context = routing_context(other)
    assert context is None or (context is not routing_context(model) and context.last is not None)
    output(other.train(), inputs).float().square().sum().backward()
    trained = [p for p in other.parameters() if p.grad is not None]
    torch.optim.SGD(trained, lr=0.1).step()
    assert trained and all(p.grad is None for p in model.parameters())
    close(evaluated(model, inputs), expected, EXACT)


@pytest.mark.parametrize("case", covering(ALL))
def test_functional_call_computes_with_the_tensors_that_it_is_given(case: Case) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    other = shake(copy.deepcopy(model), 0.1)
    for given in (model, other):
        tensors = {name: p.detach() * 1.0 for name, p in given.named_parameters()}
        with torch.no_grad():
            found = torch.func.functional_call(
                Output(model), {f"model.{n}": t for n, t in tensors.items()}, (), inputs
            )
        close(found, evaluated(given, inputs), EXACT)


@pytest.mark.parametrize("case", covering(cases(*FULL)))
def test_transforms_of_torch_func(case: Case) -> None:
    model = shake(upcycled(case), 0.05)
    inputs = inputs_of(model, case.head)
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Output(model), tensors, (), inputs).float().square().sum()

    output(model, inputs).float().square().sum().backward()
    for name, gradient in torch.func.grad(loss)(tensors).items():
        expected = model.get_parameter(name.removeprefix("model.")).grad
        # sums over experts and entries in another order
        close(gradient, torch.zeros_like(gradient) if expected is None else expected, 1e-4)
    both = {name: torch.stack([tensor, 0.9 * tensor]) for name, tensor in tensors.items()}
    apart = [loss(tensors), loss({name: 0.9 * tensor for name, tensor in tensors.items()})]
    close(torch.func.vmap(loss)(both), torch.stack(apart), CLOSE)


# seconds each: in the default suite one of each form, and of each kind of stack
EXPORTED = {("bert", "ties-ca"), ("gpt2", "domain-ca"), ("t5", "smoe"), ("llama", "ep-camex")}


def exported() -> list[Any]:
    """Return all cases, slow but for a few; bargains, which take many operations, under the heads of `FULL` alone."""
    made, met = [], set()
    for case in ALL:
        if PROTOCOLS.get(case.protocol).bargains and (case.head not in FULL or case.granularity != "auto"):
            continue
        key = case.model_type, case.protocol
        fast = key in EXPORTED - met and case.head in FULL
        met |= {key} if fast else set()
        made.append(pytest.param(case, id=str(case), marks=() if fast else pytest.mark.slow))
    return made


@pytest.mark.parametrize("case", exported())
def test_an_exported_program_computes_the_same_for_other_inputs(case: Case) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    with torch.no_grad():
        program = torch.export.export(Output(model), (), kwargs=inputs).module()
        for given in (inputs, changed(inputs)):
            close(program(**given), evaluated(model, given), CLOSE)


class Output(torch.nn.Module):
    """A model whose output is a tensor: its logits, or hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return output(self.model, inputs)


@pytest.mark.parametrize("case", covering([c for c in ALL if c.protocol != "dense"]))
def test_no_edit_through_data_is_missed(case: Case) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    before = evaluated(model, inputs)
    with cached(model):
        close(evaluated(model, inputs), before, CLOSE)
    for parameter in model.parameters():
        parameter.data.mul_(0.8)
    after = evaluated(model, inputs)
    assert not torch.equal(after, before)
    close(after, evaluated(copy.deepcopy(model), inputs), EXACT)
    with cached(model):
        close(evaluated(model, inputs), after, CLOSE)


@pytest.mark.parametrize("case", covering(causal_cases()))
def test_no_edit_between_two_generated_tokens_is_missed(case: Case) -> None:
    """Keys, values and routing weights of earlier tokens stay, as a dense model's keys and values do."""
    logits = []
    for scope in (True, False):
        model = shake(upcycled(case))
        ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
        given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with torch.no_grad(), cached(model) if scope else nullcontext():
            made = model(input_ids=ids, **given, use_cache=True)
            made = token(model, ids, made.past_key_values)
        for parameter in model.parameters():
            parameter.data.mul_(0.8)
        with torch.no_grad(), cached(model) if scope else nullcontext():
            logits.append(token(model, ids, made.past_key_values).logits)
    close(logits[0], logits[1], CLOSE)


def token(model: PreTrainedModel, ids: Tensor, past: Any) -> Any:
    """Return the output for one more token."""
    given = {"input_ids": ids[:, :1]}
    if model.config.is_encoder_decoder:
        given = {"input_ids": ids, "decoder_input_ids": ids[:, :1]}
    return model(**given, past_key_values=past, use_cache=True)


def _child(pipe: Connection) -> None:
    model, inputs = pickle.loads(pipe.recv_bytes())
    pipe.send_bytes(pickle.dumps(evaluated(model, inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["ties-ca", "ep-camex", "smoe"])
def test_a_spawned_process_gets_the_model(protocol: str) -> None:
    model = shake(upcycled(Case("t5", "seq2seq-lm", protocol, "auto")))
    inputs = inputs_of(model, "seq2seq-lm")
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_child, args=(theirs,))
    process.start()
    ours.send_bytes(pickle.dumps((model, inputs)))
    close(pickle.loads(ours.recv_bytes()), evaluated(model, inputs), EXACT)
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case("bert", FULL[0], "ties-ca", "auto"), Case("gpt2", FULL[1], "domain-ca", "auto")]
)
def test_an_exported_program_takes_more_rows_and_fewer_tokens(case: Case) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(
            model, (), kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, free)
        ).module()
        given = {name: torch.cat([value, value.flip(0)])[:, :5] for name, value in inputs.items()}
        close(program(**given).logits, evaluated(model, given), CLOSE)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_low_rank_experts_are_copied(model_type: str) -> None:
    merging = {"protocol": "domain-ca", "experts": 3}
    model = shake(upcycle(dense(model_type, FULL[0]), merging=merging, tuning={"mode": "lora"}).eval())
    inputs = inputs_of(model, FULL[0])
    for copied in (pickled, saved, copy.deepcopy):
        close(evaluated(copied(model), inputs), evaluated(model, inputs), EXACT)


def test_a_key_value_cache_is_pickled_with_its_model() -> None:
    model = shake(upcycled(Case("gpt2", "causal-lm", "ties-ca", "auto")))
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.no_grad(), cached(model):
        made = token(model, ids, model(ids, use_cache=True).past_key_values)
    other, past = pickle.loads(pickle.dumps((model, made.past_key_values)))
    with torch.no_grad():
        expected = token(model, ids, made.past_key_values).logits
        close(token(other, ids, past).logits, expected, EXACT)


def test_a_checkpointed_model_is_copied_with_a_context_of_its_own() -> None:
    model = shake(upcycled(Case("gpt2", "causal-lm", "ties-ca", "auto"))).train()
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()  # whose hook is local, in a dense model too
    inputs = inputs_of(model, "causal-lm")
    output(model, inputs).sum().backward()
    for copied in (pickled, copy.deepcopy):
        other = copied(model)
        assert other.transformer._gradient_checkpointing_func.func.__self__ is routing_context(other)
        output(other, inputs).sum().backward()
        close(evaluated(other.eval(), inputs), evaluated(model.eval(), inputs), EXACT)
        model.train()


class OwnHead(BertForSequenceClassification):
    """A class of models that transformers does not know."""


def test_a_class_that_is_not_transformers_is_made_again_from_the_plain_one() -> None:
    model = upcycle(OwnHead(dense("bert", FULL[0]).config), merging={"protocol": "ties", "experts": 2}).eval()
    assert model.__reduce_ex__(2)[1][1] is OwnHead  # which another process imports
    other = pickled(model)
    assert type(other) is type(model) and isinstance(other, OwnHead)
    inputs = inputs_of(model, FULL[0])
    close(evaluated(other, inputs), evaluated(model, inputs), EXACT)
