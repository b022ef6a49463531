"""Fitted routers: they tell apart what can be told apart, layer after layer, and padding counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from camex_ft.upcycling import expert_layers, fit_routers, routing_context, upcycle
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import dense

TEXTS, LENGTH, DONORS = 40, 7, 3


def model(head: str = "sequence-classification", kind: str = "bert", each: int = 1, **routing: Any) -> Any:
    return upcycle(
        dense(kind, head),
        merging={"protocol": "domain", "experts": DONORS * each},
        routing={"init": "fit", "segment": 3, **routing},
        upcycle={"init": "noise", "noise": 0.3},
    )


def texts(seed: int = 0, padding: int = 0) -> list[list[dict[str, torch.Tensor]]]:
    """Return, for each donor, two batches of rows of its own tokens, of several lengths, and more padding."""
    generator = torch.Generator().manual_seed(seed)
    of_donors = []
    for donor in range(DONORS):
        ids = torch.randint(5 + 10 * donor, 7 + 10 * donor, (TEXTS, LENGTH), generator=generator)
        lengths = torch.randint(4, LENGTH + 1, (TEXTS, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        ids, mask = (torch.nn.functional.pad(t, (0, padding)) for t in (ids * mask, mask))
        of_donors.append(
            [
                {"input_ids": i, "attention_mask": m}
                for i, m in zip(ids.split(25), mask.split(25), strict=True)
            ]
        )
    return of_donors


def routed(fitted: Any, batches: list[list[dict[str, torch.Tensor]]]) -> dict[str, float]:
    """Return the mutual information of donors and chosen experts, by layer."""
    fitted.eval()
    context, chosen, donors = routing_context(fitted), {name: [] for name in expert_layers(fitted)}, []
    with torch.no_grad():
        for donor, of_donor in enumerate(batches):
            for batch in of_donor:
                fitted(**batch)
                for name, layer in context.last.layers.items():
                    chosen[name] += layer.weights.argmax(-1).tolist()
                donors += [donor] * len(batch["input_ids"])
    return {name: normalized_mutual_info_score(donors, experts) for name, experts in chosen.items()}


def test_every_layer_routes_new_texts_to_their_donor() -> None:
    fitted = model()
    before = {n: p.clone() for n, p in fitted.named_parameters()}
    quality = fit_routers(fitted, texts())
    assert list(quality) == list(expert_layers(fitted))
    # tokens of the donors do not overlap: anything much below 1 is a mistake
    assert all(q.nmi > 0.9 and min(q.accuracy) > 0.9 for q in quality.values())
    assert all(nmi > 0.9 for nmi in routed(fitted, texts(seed=1)).values())
    moved = {name for name, p in fitted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.router.{part}" for name in quality for part in ("gate", "intercept")}


def test_without_the_fit_routing_knows_nothing_of_the_donors() -> None:
    assert all(nmi < 0.6 for nmi in routed(model(), texts(seed=1)).values())


def test_quality_is_that_of_texts_that_were_not_fitted() -> None:
    """Labels without a relation to the texts can be learned by heart, and the quality must not say so."""
    batches = texts()
    mixed = [[batches[(donor + k) % DONORS][k] for k in range(2)] for donor in range(DONORS)]
    same = [[batches[0][0], batches[0][1]] for _ in range(DONORS)]
    assert all(q.nmi < 0.2 for q in fit_routers(model(), same).values())
    assert all(q.nmi < 0.6 for q in fit_routers(model(), mixed).values())


def test_padding_changes_no_fit() -> None:
    plain, padded = model(), model()
    fit_routers(plain, texts())
    fit_routers(padded, texts(padding=3))
    for name, layer in expert_layers(plain).items():
        other = expert_layers(padded)[name].router
        # the solver stops at a gradient of 1e-4, and rounding of the inputs is carried on from layer to layer
        torch.testing.assert_close(
            other.gate, layer.router.gate, rtol=0, atol=1e-3 * float(layer.router.gate.detach().abs().max())
        )


def test_experts_of_one_donor_share_its_texts() -> None:
    fitted = model(each=2)
    fit_routers(fitted, texts(), each=2)
    for layer in expert_layers(fitted).values():
        gate = layer.router.gate.unflatten(1, (DONORS, 2))  # [in, donors, each]
        assert torch.equal(gate[:, :, 0], gate[:, :, 1])


@pytest.mark.parametrize("granularity", ["segment", "token"])
def test_causal_models_are_fitted_by_segment_and_by_token(granularity: str) -> None:
    fitted = model("causal-lm", "gpt2", granularity=granularity)
    quality = fit_routers(fitted, texts())
    assert all(q.nmi > 0.3 for q in quality.values())  # tokens and segments say less than a text


def test_two_donors_have_two_columns() -> None:
    fitted = upcycle(
        dense("bert", "sequence-classification"),
        merging={"protocol": "smear", "experts": 2},
        routing={"init": "fit"},
    )
    quality = fit_routers(fitted, texts()[:2])
    assert all(q.nmi > 0.9 for q in quality.values())


def test_too_few_texts_are_refused() -> None:
    few = [[{name: tensor[:2] for name, tensor in batches[0].items()}] for batches in texts()]
    with pytest.raises(UserError, match=r"2 texts of donor 1 reach the router of .*: expected more than 5"):
        fit_routers(model(), few)


def test_the_mode_stays() -> None:
    fitted = model().train()
    fit_routers(fitted, texts())
    assert fitted.training
