"""Router fitting: routers that tell the donors of the experts apart, from a few hundred texts of each, without labels.

Layer by layer, in the order of the model, a logistic regression from the router's inputs to the donor that a text
belongs to:

    p(donor | x) = softmax(pooled(x) W_g + b)        W_g [in, N], b [N]

A layer is fitted on the inputs that it gets once the layers before it are fitted. Inputs are standardised for the
solver, and the weights scaled back. With several experts from each donor, these share the donor's column.
Source: scikit-learn's `LogisticRegression` (L2 penalty, L-BFGS).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.moe.routing.router import Router
from camex_ft.upcycling.freezing import cached, expert_layers
from camex_ft.upcycling.plan import KEY
from camex_ft.utils.errors import UserError

Batch = Mapping[str, Tensor]
HELD_OUT = 5  # every fifth text measures the fit
MOST = 20_000  # inputs that a router is fitted to; of more, as of tokens, evenly spread ones
STEPS = 1000  # of the solver


@dataclass(frozen=True, kw_only=True)
class FitQuality:
    """Quality of one layer's fitted router, on texts that it was not fitted to.

    Attributes:
        accuracy: share of each donor's inputs that go to its experts, by donor.
        nmi: normalised mutual information of donors and experts; 0 where routing knows nothing, 1 where all.
    """

    accuracy: tuple[float, ...]
    nmi: float

    def __str__(self) -> str:
        """Return both in a few words."""
        shares = ", ".join(f"{share:.0%}" for share in self.accuracy)
        return f"{shares} of the donors' texts go to their experts, NMI {self.nmi:.2f}"


@dataclass(frozen=True)
class _Inputs:
    """Router inputs: x [n, in], float32; the donor and the number of the text of each, [n]."""

    x: np.ndarray
    donor: np.ndarray
    text: np.ndarray


def fit_routers(
    model: PreTrainedModel, texts: Sequence[Sequence[Batch]], *, each: int = 1
) -> dict[str, FitQuality]:
    """Fit the routers of an upcycled model, in place, and return the quality of each layer's.

    Args:
        model: with routers that have an intercept (``routing.init: fit``). Its mode stays as it is.
        texts: of each donor, batches of model inputs without labels (but for what a decoder needs).
        each: experts from each donor, one after the other.

    Raises:
        UserError: a donor has fewer than two texts, or its texts reach no router.
        ValueError: the experts are not `each` from each donor, or a router has no intercept.
    """
    training = model.training
    model.eval()
    try:
        return {name: _fit_layer(model, layer, texts, each) for name, layer in expert_layers(model).items()}
    finally:
        model.train(training)


def add_intercepts(model: PreTrainedModel) -> None:
    """Give routers without an intercept one, at 0, in place, and note it in the model's plan.

    Raises:
        UserError: a router is not linear.
    """
    for name, layer in expert_layers(model).items():
        router = layer.router
        if router.settings.kind == "cosine":
            raise UserError(f"{name}: a cosine router cannot be fitted: expected routing.router: linear")
        if router.intercept is None:
            router.intercept = nn.Parameter(router.gate.new_zeros(layer.settings.experts))
            router.settings = replace(router.settings, intercept=True)
    saved = getattr(model.config, KEY)
    setattr(model.config, KEY, {**saved, "routing": {**saved["routing"], "init": "fit"}})


def _fit_layer(
    model: PreTrainedModel, layer: ExpertFFN, texts: Sequence[Sequence[Batch]], each: int
) -> FitQuality:
    router = layer.router
    if router.intercept is None:
        raise ValueError(f"{layer.name}: its router has no intercept: expected routing.init: fit")
    if len(texts) * each != layer.settings.experts:
        raise ValueError(
            f"{len(texts)} donors with {each} experts each, and {layer.settings.experts} experts"
        )
    inputs = _inputs(model, router, texts, layer.name)
    held_out = inputs.text % HELD_OUT == HELD_OUT - 1
    weight, bias = _regression(inputs.x[~held_out], inputs.donor[~held_out])
    quality = _quality(inputs.x[held_out] @ weight + bias, inputs.donor[held_out], len(texts))
    weight, bias = _regression(inputs.x, inputs.donor)
    with torch.no_grad():
        router.gate.copy_(torch.from_numpy(np.repeat(weight, each, axis=1)))
        router.intercept.copy_(torch.from_numpy(np.repeat(bias, each)))
    return quality


def _inputs(model: PreTrainedModel, router: Router, texts: Sequence[Sequence[Batch]], name: str) -> _Inputs:
    """Return what the router gets to route, of the texts of all donors."""
    parts: list[_Inputs] = []
    for donor, batches in enumerate(texts):
        count = 0
        for x, row in _routed(model, router, batches):
            parts.append(_Inputs(x, np.full(len(x), donor), row + count))
            count += int(row.max(initial=-1)) + 1
        if count <= HELD_OUT:
            raise UserError(
                f"routing.fit: {count} texts of donor {donor + 1} reach the router of {name}: expected more than "
                f"{HELD_OUT} (routing.fit.rows), and in causal models texts longer than routing.segment"
            )
    x, donors, text = (np.concatenate([getattr(p, key) for p in parts]) for key in ("x", "donor", "text"))
    every = -(-len(x) // MOST)
    return _Inputs(x[::every], donors[::every], text[::every])


def _routed(model: PreTrainedModel, router: Router, batches: Sequence[Batch]) -> Iterator[tuple[Any, Any]]:
    """Yield, batch by batch, the router's inputs [n, in] and the row of each [n]; padding is left out."""
    seen: list[tuple[Tensor, Tensor | None]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        pooled, mask = arguments[0], arguments[1] if len(arguments) > 1 else None
        seen.append((pooled.detach().float(), mask))

    hook = router.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), cached(model):
            for batch in batches:
                seen.clear()
                model(**{key: tensor.to(model.device) for key, tensor in batch.items()})
                for pooled, mask in seen:
                    # a group without any token is pooled to 0
                    real = (pooled != 0).any(-1) if mask is None else mask != 0  # [B], [B, S] or [B, L]
                    row = torch.arange(len(pooled), device=pooled.device)
                    row = row.view(-1, *[1] * (real.dim() - 1)).expand_as(real)
                    yield pooled[real].cpu().numpy(), row[real].cpu().numpy()
    finally:
        hook.remove()


def _regression(x: np.ndarray, donor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return W [in, donors] and b [donors] of the regression, for inputs as they are."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std[std < 1e-6] = 1.0  # a constant says nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable texts: the quality is measured
        solved = LogisticRegression(max_iter=STEPS).fit((x - mean) / std, donor)
    weight, bias = solved.coef_.T, solved.intercept_  # [in, donors]; of two donors the second alone
    if weight.shape[1] == 1:
        weight, bias = weight * [[-0.5, 0.5]], bias * [-0.5, 0.5]
    weight = weight / std[:, None]
    return weight, bias - mean @ weight


def _quality(logits: np.ndarray, donor: np.ndarray, donors: int) -> FitQuality:
    from sklearn.metrics import normalized_mutual_info_score

    chosen = logits.argmax(1)
    accuracy = tuple(float((chosen[donor == i] == i).mean()) for i in range(donors))
    return FitQuality(accuracy=accuracy, nmi=float(normalized_mutual_info_score(donor, chosen)))
