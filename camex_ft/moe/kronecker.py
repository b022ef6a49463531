"""Products with Kronecker-factored maps, forward and backward: what curvature costs is spent here.

    T_i = sum_r (A1_ri (x) A2_ri) tau_i (C1_ri (x) C2_ri)^T            tau viewed as [a1, a2, c1, c2]

One factor multiplies one axis at a time, and every product is a batch of small matrix products whose operands stay in
cache. Rows are put in the order [a2, a1] once, while tau is made, so that no product has to turn its result:

    v0 = E_i - E_m        [a2, a1, c1 c2]
    v1 = v0 C2^T          v2 = C1 v1          v3 = A1 v2          T_i += A2 v3        T: [a1, a2, c1 c2], as E is stored

All but the last product leave a2 alone, so that a block of rows goes through them while it is in cache; experts go
one by one. A GPU takes all rows of all experts at once. The backward pass makes v1, v2 and v3 again block by block,
takes every factor's gradient on the way back, and writes dtau over dT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.scratch import scratch

# elements that go through all products but the last together: experts of small maps, rows of a large one
BLOCK_ELEMENTS = {"cpu": 9 << 15, "cuda": 1 << 28}


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
    """Buffers for one chunk of c experts, of which a block of rows [c, b, a1, in] is in use at a time.

    Attributes:
        v0, v3: of all rows; [c, a2, a1, in].
        v1, v2: of one block; [c, b, a1, in].
        blocks: slices of a2; one where there are several experts.
    """

    v0: Tensor
    v1: Tensor
    v2: Tensor
    v3: Tensor
    blocks: list[slice]

    @staticmethod
    def of(name: str, chunk: Tensor, factors: Factors) -> Work:
        """Return buffers for a chunk of experts; [c, out, in]."""
        p, q = factors.a1.shape[-1], factors.a2.shape[-1]
        c, width = chunk.shape[0], chunk.shape[-1]
        height = max(1, min(q, _budget(chunk) // (c * p * width)))
        whole, block = (c, q, p, width), (c, height, p, width)
        v0, v1, v2, v3 = (
            scratch(f"{name}{i}", shape, chunk) for i, shape in enumerate((whole, block, block, whole))
        )
        return Work(v0, v1, v2, v3, [slice(start, min(start + height, q)) for start in range(0, q, height)])

    def block(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v0 to v3 of one block; each [c, b, a1, in], contiguous."""
        height = rows.stop - rows.start
        return self.v0[:, rows], self.v1[:, :height], self.v2[:, :height], self.v3[:, rows]


def _budget(tensor: Tensor) -> int:
    return BLOCK_ELEMENTS.get(tensor.device.type, BLOCK_ELEMENTS["cuda"])


def chunks(experts: Tensor, active: Sequence[int] | None) -> Iterator[slice]:
    """Yield chunks of neighbouring experts, of all or of the active ones."""
    count = experts.shape[0]
    size = max(1, min(count, _budget(experts) // experts[0].numel()))
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
        work = Work.of("v", experts[chunk], factors)
        for r, term in factors.terms(chunk):
            for rows in work.blocks:
                if r == 0:
                    _arrange(experts[chunk], base, work.v0, rows)
                _forward(term, work, rows)
            _rows(term.a2, work.v3.transpose(1, 2), _natural(total[chunk], work), add=r > 0)
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
        work, back = Work.of("v", experts[chunk], factors), Work.of("g", experts[chunk], factors)
        given = _natural(grad[chunk], work)
        for r, term in factors.terms(chunk):
            turn = _Turn(term, work, back, learn=learn, domain=domain, add=r > 0)
            _rows(term.a2.mT, given, turn.g3)
            for rows in work.blocks:
                if learn or out is not None:
                    if r == 0:
                        _arrange(experts[chunk], base, work.v0, rows)
                    _forward(term, work, rows)
                turn.block(rows)
            if out is not None:
                _rows(term.a2, work.v3.transpose(1, 2), _natural(out[chunk], work), add=r > 0)
            if made is not None:
                turn.factors(given, Factors(*(f[r, chunk] for f in made)))
        if domain:
            given.copy_(back.v0.transpose(1, 2))
    return made


class _Turn:
    """The way back through one term for one chunk of experts.

    Attributes:
        g3: A2^T dT; [c, a1, a2, in].
        a1, c1, c2: products whose sums are the gradients of factors; [c, b, k, k].
    """

    def __init__(
        self, term: Factors, work: Work, back: Work, *, learn: bool, domain: bool, add: bool
    ) -> None:
        c, q, p, width = work.v0.shape
        self.term, self.work, self.back = term, work, back
        self.learn, self.domain, self.add = learn, domain, add
        self.g3 = back.v3.view(c, p, q, width)
        if learn:
            u, v = term.c1.shape[-1], term.c2.shape[-1]
            self.a1 = scratch("da1", (c, q, p, p), work.v0)
            self.c1 = scratch("dc1", (c, q * p, u, u), work.v0)
            self.c2 = scratch("dc2", (c, len(work.blocks), v, v), work.v0)

    def block(self, rows: slice) -> None:
        """Take one block back to v0: set or add to dtau in ``back.v0``, and keep the factors' products."""
        c, _, p, _ = self.work.v0.shape
        u, v = self.term.c1.shape[-1], self.term.c2.shape[-1]
        v0, v1, v2, _ = self.work.block(rows)
        dtau, g1, g2, _ = self.back.block(rows)
        g3 = self.g3[:, :, rows].transpose(1, 2)  # [c, b, a1, in]
        _rows(self.term.a1.mT, g3, g2)
        _rows(self.term.c1.mT, g2.view(c, -1, u, v), g1.view(c, -1, u, v))
        if self.domain:
            _last(g1, self.term.c2, dtau, add=self.add)
        if self.learn:
            _outer(g3, v2, self.a1[:, rows])
            _outer(g2.view(c, -1, u, v), v1.view(c, -1, u, v), self.c1[:, rows.start * p : rows.stop * p])
            index = self.work.blocks.index(rows)
            _outer(g1.view(c, 1, -1, v).mT, v0.view(c, 1, -1, v).mT, self.c2[:, index : index + 1])

    def factors(self, grad: Tensor, out: Factors) -> None:
        """Write the gradients of the factors, each [c, k, k], from dT [c, a1, a2, in] and what the blocks kept."""
        c, q, p, _ = self.work.v0.shape
        a2 = scratch("da2", (c, p, q, q), grad)
        _outer(grad, self.work.v3.transpose(1, 2), a2)
        for products, total in zip((self.a1, a2, self.c1, self.c2), out, strict=True):
            torch.sum(products, dim=1, out=total)


def _arrange(experts: Tensor, base: Tensor | None, out: Tensor, rows: slice) -> None:
    """Write a block of tau with its rows in the order [a2, a1]: [c, out, in] -> [c, a2, a1, in]."""
    c, q, p, width = out.shape
    view = experts.view(c, p, q, width)[:, :, rows].transpose(1, 2)  # [c, b, a1, in]
    if base is None:
        out[:, rows].copy_(view)
    else:
        torch.sub(view, base.view(p, q, width)[:, rows].transpose(0, 1), out=out[:, rows])


def _natural(matrix: Tensor, work: Work) -> Tensor:
    """View [c, out, in] as [c, a1, a2, in]."""
    c, q, p, width = work.v0.shape
    return matrix.view(c, p, q, width)


def _forward(term: Factors, work: Work, rows: slice) -> None:
    """Make a block of v1, v2 and v3 from v0."""
    v0, v1, v2, v3 = work.block(rows)
    c, u, v = v0.shape[0], term.c1.shape[-1], term.c2.shape[-1]
    _last(v0, term.c2.mT, v1)
    _rows(term.c1, v1.view(c, -1, u, v), v2.view(c, -1, u, v))
    _rows(term.a1, v2, v3)


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
    """out_ib = left_ib right_ib^T for left, right [c, b, k, m]; out [c, b, k, k], contiguous."""
    c, b, k, m = left.shape
    torch.bmm(left.reshape(c * b, k, m), right.reshape(c * b, k, m).mT, out=out.view(c * b, k, k))
