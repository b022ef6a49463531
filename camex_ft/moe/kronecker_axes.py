"""Products of domain vectors with Kronecker factors, one axis at a time, and their way back: `kronecker`'s inner loops.

Every product is a batch of small matrix products whose operands stay in cache. Rows are put in the order [a2, a1] once,
while tau is made, so that no product has to turn its result:

    v0 = E_i - E_m        [a2, a1, c1 c2]
    v1 = v0 C2^T          v2 = C1 v1          v3 = A1 v2          T_i += A2 v3        T: [a1, a2, c1 c2], as E is stored

All but the last product leave a2 alone, so that a block of rows goes through them while it is in cache; experts go
one by one. A GPU takes all rows of all experts at once. The backward pass makes v1, v2 and v3 again block by block,
takes every factor's gradient on the way back, and writes dtau over dT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.factors import block_elements
from camex_ft.moe.scratch import scratch

if TYPE_CHECKING:
    from camex_ft.moe.kronecker import Factors


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
        height = max(1, min(q, block_elements(chunk) // (c * p * width)))
        whole, block = (c, q, p, width), (c, height, p, width)
        v0, v1, v2, v3 = (
            scratch(f"{name}{i}", shape, chunk) for i, shape in enumerate((whole, block, block, whole))
        )
        return Work(v0, v1, v2, v3, [slice(start, min(start + height, q)) for start in range(0, q, height)])

    def block(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v0 to v3 of one block; each [c, b, a1, in], contiguous."""
        height = rows.stop - rows.start
        return self.v0[:, rows], self.v1[:, :height], self.v2[:, :height], self.v3[:, rows]


class Turn:
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
        along_rows(self.term.a1.mT, g3, g2)
        along_rows(self.term.c1.mT, g2.view(c, -1, u, v), g1.view(c, -1, u, v))
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


def forward(term: Factors, work: Work, rows: slice) -> None:
    """Make a block of v1, v2 and v3 from v0."""
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
