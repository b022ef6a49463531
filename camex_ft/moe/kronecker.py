"""Products with Kronecker-factored maps, forward and backward: what curvature costs is spent here.

    T_i = sum_r (A1_ri (x) A2_ri) tau_i (C1_ri (x) C2_ri)^T            tau viewed as [a1, a2, c1, c2]

One factor multiplies one axis at a time, and every product is a batch of small matrix products whose operands stay in
cache. Rows are put in the order [a2, a1] once, while tau is made, so that no product has to turn its result:

    v0 = E_i - E_m        [a2, a1, c1 c2]
    v1 = v0 C2^T          v2 = C1 v1          v3 = A1 v2          T_i += A2 v3        T: [a1, a2, c1 c2], as E is stored

Experts go through all of it a chunk at a time: one expert where its matrix fills a core's cache, all at once on a GPU.
The backward pass makes v1, v2 and v3 again, takes every factor's gradient on the way back, and writes dtau over dT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.scratch import scratch

# elements of the domain vectors that go through all products together
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 28}


class Factors(NamedTuple):
    """The factors of one matrix's curvature, for all R terms and N experts.

    Attributes:
        a1, a2: factors along `out`; [R, N, a1, a1], [R, N, a2, a2].
        c1, c2: factors along `in`; [R, N, c1, c1], [R, N, c2, c2].
    """

    a1: Tensor
    a2: Tensor
    c1: Tensor
    c2: Tensor

    def terms(self, chunk: slice) -> Iterator[tuple[int, Factors]]:
        """Yield (r, factors of term r for a chunk of experts, each [c, k, k])."""
        for r in range(self.a1.shape[0]):
            yield r, Factors(*(f[r, chunk] for f in self))


class Work(NamedTuple):
    """Buffers for one chunk; each [c, a2, a1, in]."""

    v0: Tensor
    v1: Tensor
    v2: Tensor
    v3: Tensor

    @staticmethod
    def of(name: str, chunk: Tensor, factors: Factors) -> Work:
        """Return buffers for a chunk of experts; [c, out, in]."""
        p, q = factors.a1.shape[-1], factors.a2.shape[-1]
        shape = (chunk.shape[0], q, p, chunk.shape[-1])
        return Work(*(scratch(f"{name}{i}", shape, chunk) for i in range(4)))


def chunks(experts: Tensor, active: Sequence[int] | None) -> Iterator[slice]:
    """Yield chunks of neighbouring experts, of all or of the active ones."""
    count = experts.shape[0]
    limit = CHUNK_ELEMENTS.get(experts.device.type, CHUNK_ELEMENTS["cpu"])
    size = max(1, min(count, limit // experts[0].numel()))
    if active is None:
        yield from (slice(start, min(start + size, count)) for start in range(0, count, size))
    else:
        yield from (slice(i, i + 1) for i in active)


def curve(
    experts: Tensor,
    base: Tensor | None,
    factors: Factors,
    active: Sequence[int] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return M_i (E_i - E_m), or M_i E_i without a base; [N, out, in]. No gradient.

    Args:
        experts: [N, out, in].
        base: [out, in] or None.
        factors: of the curvature.
        active: experts to take; the result of the others is not set. None takes all.
        out: memory for the result.
    """
    total = torch.empty_like(experts) if out is None else out
    for chunk in chunks(experts, active):
        now = Work.of("v", experts[chunk], factors)
        _arrange(experts[chunk], base, now.v0)
        for r, term in factors.terms(chunk):
            _forward(term, now)
            _rows(term.a2, now.v3.transpose(1, 2), _natural(total[chunk], now), add=r > 0)
    return total


def curve_backward(
    grad: Tensor,
    experts: Tensor,
    base: Tensor | None,
    factors: Factors,
    active: Sequence[int] | None = None,
    *,
    learn: bool,
    domain: bool = True,
    out: Tensor | None = None,
) -> Factors | None:
    """Turn dT into dtau = M_i^T dT, in place, and return the gradients of the factors if they `learn`.

    Args:
        grad: dT, contiguous; [N, out, in]. Experts that are not active are left as they are.
        experts, base, factors, active: as `curve` had them.
        learn: whether the factors' gradients are wanted.
        domain: whether dtau is wanted; dT stays otherwise.
        out: memory for T, which is then made on the way, with one more product; [N, out, in].
    """
    made = Factors(*(torch.zeros_like(f) for f in factors)) if learn else None
    for chunk in chunks(experts, active):
        now, turn = Work.of("v", experts[chunk], factors), Work.of("g", experts[chunk], factors)
        if made is not None or out is not None:
            _arrange(experts[chunk], base, now.v0)
        given = _natural(grad[chunk], now)
        for r, term in factors.terms(chunk):
            if made is not None or out is not None:
                _forward(term, now)
            if out is not None:
                _rows(term.a2, now.v3.transpose(1, 2), _natural(out[chunk], now), add=r > 0)
            dterm = None if made is None else Factors(*(f[r, chunk] for f in made))
            _backward(given, term, now, turn, dterm, domain=domain, add=r > 0)
        if domain:
            given.copy_(turn.v0.transpose(1, 2))
    return made


def _arrange(experts: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Write tau with its rows in the order [a2, a1]: [c, out, in] -> [c, a2, a1, in]."""
    c, q, p, width = out.shape
    view = experts.reshape(c, p, q, width).transpose(1, 2)  # [c, a2, a1, in]
    if base is None:
        out.copy_(view)
    else:
        torch.sub(view, base.reshape(p, q, width).transpose(0, 1), out=out)


def _natural(matrix: Tensor, work: Work) -> Tensor:
    """View [c, out, in] as [c, a1, a2, in]."""
    c, q, p, width = work.v0.shape
    return matrix.view(c, p, q, width)


def _forward(term: Factors, work: Work) -> None:
    """Make v1, v2 and v3 from v0."""
    c, q, p, _ = work.v0.shape
    u, v = term.c1.shape[-1], term.c2.shape[-1]
    _last(work.v0, term.c2.mT, work.v1)
    _rows(term.c1, work.v1.view(c, q * p, u, v), work.v2.view(c, q * p, u, v))
    _rows(term.a1, work.v2, work.v3)


def _backward(
    grad: Tensor, term: Factors, work: Work, back: Work, out: Factors | None, *, domain: bool, add: bool
) -> None:
    """Go back through one term: write the factors' gradients into `out`, set or add to dtau in ``back.v0``."""
    c, q, p, width = work.v0.shape
    u, v = term.c1.shape[-1], term.c2.shape[-1]
    g3, g2, g1 = back.v3.view(c, p, q, width), back.v2, back.v1
    _rows(term.a2.mT, grad, g3)
    _rows(term.a1.mT, g3.transpose(1, 2), g2)
    _rows(term.c1.mT, g2.view(c, q * p, u, v), g1.view(c, q * p, u, v))
    if domain:
        _last(g1, term.c2, back.v0, add=add)
    if out is not None:
        _outer(grad, work.v3.transpose(1, 2), out.a2)
        _outer(g3.transpose(1, 2), work.v2, out.a1)
        _outer(g2.view(c, q * p, u, v), work.v1.view(c, q * p, u, v), out.c1)
        _outer(g1.view(c, 1, -1, v).mT, work.v0.view(c, 1, -1, v).mT, out.c2)


def _rows(factor: Tensor, v: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out_ib = F_i v_ib (+ out_ib) for a factor [c, k, k] and v, out [c, b, k, m]; out contiguous."""
    c, b, k, m = v.shape
    batch = factor.unsqueeze(1).expand(c, b, k, k).reshape(c * b, k, k)  # one expert: a view
    out.view(c * b, k, m).baddbmm_(batch, v.reshape(c * b, k, m), beta=float(add))


def _last(v: Tensor, factor: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out_i = v_i F_i (+ out_i) along the last axis, of c1 * c2 = in, for a factor [c, k, k]; out contiguous."""
    c, k = factor.shape[:2]
    out.view(c, -1, k).baddbmm_(v.view(c, -1, k), factor, beta=float(add))


def _outer(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out_i = sum_b left_ib right_ib^T for left, right [c, b, k, m]; out [c, k, k]."""
    c, b, k, m = left.shape
    products = scratch("outer", (c * b, k, k), left)
    torch.bmm(left.reshape(c * b, k, m), right.reshape(c * b, k, m).mT, out=products)
    torch.sum(products.view(c, b, k, k), dim=1, out=out)
