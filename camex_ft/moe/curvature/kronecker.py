"""Kronecker-factored curvature: one small factor for each of four axes.

    M_i tau = sum_r (A1_ri (x) A2_ri) tau (C1_ri (x) C2_ri)^T            tau [out, in] viewed as [a1, a2, c1, c2]

A1 and A2 factor out = a1 * a2, C1 and C2 factor in = c1 * c2. tau is multiplied by one factor along each of its axes
in turn, so the map costs 2 R N out in (a1 + a2 + c1 + c2) operations and never makes an [out, out] matrix. A bias b of
[out] is viewed as [a1, a2] and mapped to sum_r B1_ri b B2_ri^T.

The first term starts as the identity and each further term as 0 times a random orthogonal map, so that the sum is the
identity for every R and the terms come to differ.

Every product is a batch of small matrix products whose operands stay in cache. Rows are put in the order [a2, a1] once,
while tau is computed, so that no product has to transpose its result:

    v0 = E_i - E_m        [a2, a1, c1 c2]
    v1 = v0 C2^T          v2 = C1 v1          v3 = A1 v2          T_i += A2 v3        T: [a1, a2, c1 c2], as E is stored

All but the last product leave a2 alone, so that a block of rows goes through them while it is in cache; experts go
one by one. A GPU takes all rows of all experts at once. The backward pass recomputes v1, v2 and v3 block by block,
accumulates the gradient of every factor, and writes dtau over dT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from camex_ft.moe.curvature.base import Curvature, Shapes
from camex_ft.moe.workspace import workspaces

# elements that are worked on together: experts of small maps, rows of a large one
BLOCK_ELEMENTS = {"cpu": 9 << 15, "cuda": 1 << 28}


def nearest_factors(n: int) -> tuple[int, int]:
    """Return (p, q) with p * q = n, p <= q and p as large as can be: 768 -> (24, 32); a prime gives (1, n)."""
    p = int(n**0.5)
    while n % p:
        p -= 1
    return p, n // p


class KroneckerFactors(NamedTuple):
    """The factors of one matrix's curvature, for all R terms and N experts (`base.Factors`).

    Attributes:
        a1, a2: factors along `out`; [R, N, a1, a1], [R, N, a2, a2].
        c1, c2: factors along `in`; [R, N, c1, c1], [R, N, c2, c2].
    """

    a1: Tensor
    a2: Tensor
    c1: Tensor
    c2: Tensor

    @classmethod
    def shapes(cls, *, out: int, width: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor."""
        sizes = (*nearest_factors(out), *nearest_factors(width))
        return {name: (rank, experts, k, k) for name, k in zip(cls._fields, sizes, strict=True)}

    @property
    def rank(self) -> int:
        """R."""
        return self.a1.shape[0]

    @property
    def cost(self) -> int:
        """a1 + a2 + c1 + c2."""
        return sum(f.shape[-1] for f in self)

    def reset(self) -> None:
        """First term: the identity. Further terms: 0 in A1, random orthogonal in the others."""
        for name, factor in self._asdict().items():
            _start(factor, leads=name == "a1")

    def term(self, r: int, chunk: slice) -> KroneckerFactors:
        """Return the factors of term r for a chunk of experts, each [c, k, k]."""
        return KroneckerFactors(*(f[r, chunk] for f in self))

    def transform(
        self,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return M_i (E_i - E_m); [N, out, in]."""
        total = torch.empty_like(experts) if out is None else out
        for chunk in chunks(experts, active):
            work = Work.of("v", experts[chunk], self)
            for r in range(self.rank):
                term = self.term(r, chunk)
                for rows in work.blocks:
                    if r == 0:
                        arrange(experts[chunk], base, work.v0, rows)
                    forward(term, work, rows)
                along_rows(term.a2, work.v3.transpose(1, 2), natural(total[chunk], work), add=r > 0)
        return total

    def transform_backward(
        self,
        grad: Tensor,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        learn: bool,
        domain: bool = True,
        out: Tensor | None = None,
    ) -> KroneckerFactors | None:
        """Turn dT into dtau = M_i^T dT, in place, and return the gradients of the factors."""
        dfactors = KroneckerFactors(*(torch.zeros_like(f) for f in self)) if learn else None
        for chunk in chunks(experts, active):
            work, back = Work.of("v", experts[chunk], self), Work.of("g", experts[chunk], self)
            dvectors = natural(grad[chunk], work)
            for r in range(self.rank):
                term = self.term(r, chunk)
                backward = TermBackward(term, work, back, learn=learn, domain=domain, add=r > 0)
                along_rows(term.a2.mT, dvectors, backward.g3)
                for rows in work.blocks:
                    if learn or out is not None:
                        if r == 0:
                            arrange(experts[chunk], base, work.v0, rows)
                        forward(term, work, rows)
                    backward.block(rows)
                if out is not None:
                    along_rows(term.a2, work.v3.transpose(1, 2), natural(out[chunk], work), add=r > 0)
                if dfactors is not None:
                    backward.factors(dvectors, dfactors.term(r, chunk))
            if domain:
                dvectors.copy_(back.v0.transpose(1, 2))
        return dfactors

    def transform_pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return (A1_r (x) A2_r) B and A (C1_r (x) C2_r)^T for all R terms, side by side: of rank R r."""
        sides = [f.shape[-1] for f in self]
        high = left.unflatten(1, sides[:2])  # [N, a1, a2, r]
        high = torch.einsum("tncd,nbdk->tnbck", self.a2, high)
        high = torch.einsum("tnab,tnbck->nactk", self.a1, high)
        wide = right.unflatten(2, sides[2:])  # [N, r, c1, c2]
        wide = torch.einsum("tncd,nkbd->tnkbc", self.c2, wide)
        wide = torch.einsum("tnab,tnkbc->ntkac", self.c1, wide)
        return high.flatten(3).flatten(1, 2), wide.flatten(3).flatten(1, 2)

    def distance(self) -> Tensor:
        """Return ||M_i - I||_F / ||I||_F per expert; [N], float64.

        Uses <M, M> = sum_{r,t} prod_F tr(F_r^T F_t) and <M, I> = sum_r prod_F tr(F_r).
        """
        experts = self.a1.shape[1]
        gram = self.a1.new_ones(1, 1, experts, dtype=torch.float64)
        trace = self.a1.new_ones(1, experts, dtype=torch.float64)
        size = 1.0
        for factor in self:
            f = factor.double()
            gram = gram * torch.einsum("rnij,tnij->rtn", f, f)
            trace = trace * torch.einsum("rnii->rn", f)
            size *= f.shape[-1]
        squared = gram.sum((0, 1)) - 2 * trace.sum(0) + size
        return (squared.clamp_min(0) / size).sqrt()

    def condition(self) -> Tensor | None:
        """Return the product of the factors' condition numbers; None for R > 1, where it does not follow from them."""
        if self.rank > 1:
            return None
        condition = self.a1.new_ones(self.a1.shape[1], dtype=torch.float64)
        for factor in self:
            condition = condition * torch.linalg.cond(factor[0].double())
        return condition


class KroneckerBiasFactors(NamedTuple):
    """The factors of one bias's curvature (`base.BiasFactors`); [R, N, a1, a1], [R, N, a2, a2]."""

    b1: Tensor
    b2: Tensor

    @classmethod
    def shapes(cls, *, out: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor."""
        return {
            name: (rank, experts, k, k) for name, k in zip(cls._fields, nearest_factors(out), strict=True)
        }

    def reset(self) -> None:
        """First term: the identity. Further terms: 0 in B1, random orthogonal in B2."""
        _start(self.b1, leads=True)
        _start(self.b2, leads=False)

    def transform(self, tau: Tensor) -> Tensor:
        """Return sum_r B1_ri tau_i B2_ri^T with tau_i viewed as [a1, a2]; [N, out]."""
        viewed = tau.reshape(tau.shape[0], self.b1.shape[-1], self.b2.shape[-1])  # [N, a1, a2]
        return (self.b1 @ viewed @ self.b2.mT).sum(0).reshape(tau.shape)


class KroneckerCurvature(Curvature):
    """Kronecker-factored curvature of one linear map's experts."""

    kind, weight_type, bias_type = "kronecker", KroneckerFactors, KroneckerBiasFactors
    a1: Tensor
    a2: Tensor
    c1: Tensor
    c2: Tensor
    b1: Tensor
    b2: Tensor

    @property
    def factors(self) -> KroneckerFactors:
        """The weight's factors."""
        return KroneckerFactors(self.a1, self.a2, self.c1, self.c2)

    def transform_bias(self, tau: Tensor) -> Tensor:
        """Return the transformed domain vectors of the bias; [N, out]."""
        return KroneckerBiasFactors(self.b1, self.b2).transform(tau)


def _start(factor: Tensor, *, leads: bool) -> None:
    factor[0].copy_(torch.eye(factor.shape[-1]).expand_as(factor[0]))
    for block in factor[1:].flatten(0, 1):
        nn.init.zeros_(block) if leads else nn.init.orthogonal_(block)


def chunks(experts: Tensor, active: Sequence[int] | None) -> list[slice]:
    """Return chunks of neighbouring experts that fit in a block, of all experts or of the active ones."""
    if active is not None:
        return [slice(i, i + 1) for i in active]
    count = experts.shape[0]
    most = BLOCK_ELEMENTS.get(experts.device.type, BLOCK_ELEMENTS["cuda"])
    size = max(1, min(count, most // experts[0].numel()))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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
    def of(name: str, chunk: Tensor, factors: KroneckerFactors) -> Work:
        """Return buffers for a chunk of experts; [c, out, in]."""
        p, q = factors.a1.shape[-1], factors.a2.shape[-1]
        c, width = chunk.shape[0], chunk.shape[-1]
        most = BLOCK_ELEMENTS.get(chunk.device.type, BLOCK_ELEMENTS["cuda"])
        height = max(1, min(q, most // (c * p * width)))
        whole, block = (c, q, p, width), (c, height, p, width)
        v0, v1, v2, v3 = workspaces(name, (whole, block, block, whole), chunk)
        return Work(v0, v1, v2, v3, [slice(start, min(start + height, q)) for start in range(0, q, height)])

    def block(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v0 to v3 of one block; each [c, b, a1, in], contiguous."""
        height = rows.stop - rows.start
        return self.v0[:, rows], self.v1[:, :height], self.v2[:, :height], self.v3[:, rows]


class TermBackward:
    """Backward pass of one term for one chunk of experts.

    Attributes:
        g3: A2^T dT; [c, a1, a2, in].
        a1, a2, c1, c2: products whose sums are the gradients of factors; [c, b, k, k].
    """

    def __init__(
        self, term: KroneckerFactors, work: Work, back: Work, *, learn: bool, domain: bool, add: bool
    ) -> None:
        c, q, p, width = work.v0.shape
        self.term, self.work, self.back = term, work, back
        self.learn, self.domain, self.add = learn, domain, add
        self.g3 = back.v3.view(c, p, q, width)
        if learn:
            u, v = term.c1.shape[-1], term.c2.shape[-1]
            shapes = (c, q, p, p), (c, p, q, q), (c, q * p, u, u), (c, len(work.blocks), v, v)
            self.a1, self.a2, self.c1, self.c2 = workspaces("d", shapes, work.v0)

    def block(self, rows: slice) -> None:
        """Compute dtau of one block, set or added to ``back.v0``, and the products for the factors' gradients."""
        c, _, p, _ = self.work.v0.shape
        u, v = self.term.c1.shape[-1], self.term.c2.shape[-1]
        v0, v1, v2, _ = self.work.block(rows)
        dtau, g1, g2, _ = self.back.block(rows)
        g3 = self.g3[:, :, rows].transpose(1, 2)  # [c, b, a1, in]
        along_rows(self.term.a1.mT, g3, g2)
        along_rows(self.term.c1.mT, g2.view(c, -1, u, v), g1.view(c, -1, u, v))
        if self.domain:
            _last(g1, self.term.c2, dtau, add=self.add)
        if self.learn:
            _outer(g3, v2, self.a1[:, rows])
            _outer(g2.view(c, -1, u, v), v1.view(c, -1, u, v), self.c1[:, rows.start * p : rows.stop * p])
            index = self.work.blocks.index(rows)
            _outer(g1.view(c, 1, -1, v).mT, v0.view(c, 1, -1, v).mT, self.c2[:, index : index + 1])

    def factors(self, grad: Tensor, out: KroneckerFactors) -> None:
        """Write the gradients of the factors, each [c, k, k], from dT [c, a1, a2, in] and the blocks' products."""
        _outer(grad, self.work.v3.transpose(1, 2), self.a2)
        for products, total in zip((self.a1, self.a2, self.c1, self.c2), out, strict=True):
            torch.sum(products, dim=1, out=total)


def arrange(experts: Tensor, base: Tensor | None, out: Tensor, rows: slice) -> None:
    """Write a block of tau with its rows in the order [a2, a1]: [c, out, in] -> [c, a2, a1, in]."""
    c, q, p, width = out.shape
    view = experts.view(c, p, q, width)[:, :, rows].transpose(1, 2)  # [c, b, a1, in]
    if base is None:
        out[:, rows].copy_(view)
    else:
        torch.sub(view, base.view(p, q, width)[:, rows].transpose(0, 1), out=out[:, rows])


def natural(matrix: Tensor, work: Work) -> Tensor:
    """View [c, out, in] as [c, a1, a2, in]."""
    c, q, p, width = work.v0.shape
    return matrix.view(c, p, q, width)


def forward(term: KroneckerFactors, work: Work, rows: slice) -> None:
    """Compute a block of v1, v2 and v3 from v0."""
    v0, v1, v2, v3 = work.block(rows)
    c, u, v = v0.shape[0], term.c1.shape[-1], term.c2.shape[-1]
    _last(v0, term.c2.mT, v1)
    along_rows(term.c1, v1.view(c, -1, u, v), v2.view(c, -1, u, v))
    along_rows(term.a1, v2, v3)


def along_rows(factor: Tensor, v: Tensor, out: Tensor, *, add: bool = False) -> None:
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
