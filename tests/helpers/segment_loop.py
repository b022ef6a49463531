"""Segments in a plain loop over tokens: who is served by what."""

from __future__ import annotations

import torch
from torch import Tensor

from camex_ft.moe.routing.router import Grouping, Router
from tests.helpers.expert_layers import EXPERTS, HIDDEN

EXACT = 1e-12  # float64, means of a dozen tokens


def router(top_k: int = EXPERTS) -> Router:
    torch.manual_seed(0)
    made = Router(in_features=HIDDEN, experts=EXPERTS, top_k=top_k, noise=False, prior=True).double()
    torch.nn.init.normal_(made.prior)
    return made


def by_loop(x: Tensor, mask: list[int], route: Router, grouping: Grouping) -> list[Tensor | None]:
    """Routing weights of each real token of one row x [L, in]: segments are counted over the real tokens."""
    served: list[Tensor | None] = [None] * len(mask)
    real, size = [t for t, m in enumerate(mask) if m], grouping.segment
    prior = route.route_prior(1).weights[0]

    def own(j: int) -> Tensor:
        return route(torch.stack([x[t] for t in real[j * size : (j + 1) * size]]).mean(0)).weights

    for place, t in enumerate(real):
        j = place // size
        if j > 0:
            served[t] = own(j - 1)
        else:
            served[t] = prior if grouping.first_segment == "prior" else own(0)
    return served
