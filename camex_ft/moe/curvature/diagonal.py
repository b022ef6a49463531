"""Diagonal curvature: every entry of a domain vector has a factor of its own, from R outer products.

    M_i tau = D_i * tau      D_i = sum_r u_ri v_ri^T      u_ri of [out], v_ri of [in]

R (out + in) numbers an expert instead of out in; every diagonal map for R = min(out, in). A bias is multiplied by one
vector w_i of [out], whatever R is: a sum of vectors is a vector.

D_1 starts as ones, from u_1 = v_1 = 1; each further term as 0 times a random vector whose entries are of size 1.
Backward, with G = dT * tau: du_r = G v_r, dv_r = G^T u_r, dtau = D * dT, for blocks of rows that stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from camex_ft.moe.curvature.base import Curvature, Shapes
from camex_ft.moe.curvature.kronecker import BLOCK_ELEMENTS, chunks
from camex_ft.moe.workspace import workspace


class DiagonalFactors(NamedTuple):
    """The factors of one matrix's diagonal curvature (`base.Factors`).

    Attributes:
        u: along `out`; [R, N, out].
        v: along `in`; [R, N, in].
    """

    u: Tensor
    v: Tensor

    @classmethod
    def shapes(cls, *, out: int, width: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor."""
        return {"u": (rank, experts, out), "v": (rank, experts, width)}

    @property
    def rank(self) -> int:
        """R."""
        return self.u.shape[0]

    @property
    def cost(self) -> int:
        """One multiply-add to compute D."""
        return 1

    def reset(self) -> None:
        """First term: ones. Further terms: 0 in u, random in v with the norm of ones."""
        self.u.zero_()
        self.u[0].fill_(1)
        nn.init.normal_(self.v)
        self.v.mul_(self.v.shape[-1] ** 0.5 / self.v.norm(dim=-1, keepdim=True))
        self.v[0].fill_(1)

    def transform(
        self,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return D_i * (E_i - E_m); [N, out, in]."""
        total = torch.empty_like(experts) if out is None else out
        for chunk, rows in _blocks(experts, active):
            diagonal = self._diagonal(chunk, rows)
            tau = _tau(experts, base, chunk, rows)
            torch.mul(tau, diagonal, out=total[chunk, rows])
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
    ) -> DiagonalFactors | None:
        """Turn dT into dtau, in place, and return the gradients of the factors."""
        dfactors = DiagonalFactors(torch.zeros_like(self.u), torch.zeros_like(self.v)) if learn else None
        for chunk, rows in _blocks(experts, active):
            dvectors = grad[chunk, rows]
            tau = _tau(experts, base, chunk, rows) if learn or out is not None else None
            diagonal = self._diagonal(chunk, rows) if domain or out is not None else None
            if out is not None and tau is not None and diagonal is not None:
                torch.mul(tau, diagonal, out=out[chunk, rows])
            if dfactors is not None and tau is not None:
                product = torch.mul(tau, dvectors, out=tau if base is not None else None)  # G [c, rows, in]
                dfactors.u[:, chunk, rows] = (product @ self.v[:, chunk].permute(1, 2, 0)).permute(2, 0, 1)
                dfactors.v[:, chunk] += (self.u[:, chunk, rows].transpose(0, 1) @ product).transpose(0, 1)
            if domain and diagonal is not None:
                dvectors.mul_(diagonal)
        return dfactors

    def transform_pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return diag(u_r) B and A diag(v_r) for all R terms, side by side: of rank R r."""
        high = torch.einsum("tno,nok->notk", self.u, left).flatten(2)  # [N, out, R r]
        return high, torch.einsum("tni,nki->ntki", self.v, right).flatten(1, 2)  # [N, R r, in]

    def distance(self) -> Tensor:
        """Return ||D - 1||_F / ||1||_F per expert; [N], float64.

        D - 1 is (u_1 - 1) v_1^T + 1 (v_1 - 1)^T + sum_{r>1} u_r v_r^T, whose terms vanish where D is near 1.
        """
        u, v = self.u.double(), self.v.double()
        left = torch.cat([u[:1] - 1, torch.ones_like(u[:1]), u[1:]])  # [R + 1, N, out]
        right = torch.cat([v[:1], v[:1] - 1, v[1:]])
        products = torch.einsum("rno,tno->rtn", left, left) * torch.einsum("rni,tni->rtn", right, right)
        return (products.sum((0, 1)).clamp_min(0) / (u.shape[-1] * v.shape[-1])).sqrt()

    def condition(self) -> Tensor | None:
        """Return max |D| / min |D|, of u and v apart; None for R > 1, where it needs D itself."""
        if self.rank > 1:
            return None
        u, v = self.u[0].double().abs(), self.v[0].double().abs()
        return u.amax(-1) * v.amax(-1) / (u.amin(-1) * v.amin(-1))

    def _diagonal(self, chunk: slice, rows: slice) -> Tensor:
        """Return rows of D for a chunk of experts; [c, rows, in]."""
        left, right = self.u[:, chunk, rows].permute(1, 2, 0), self.v[:, chunk].transpose(0, 1)
        diagonal = workspace("diagonal", (left.shape[0], left.shape[1], right.shape[-1]), self.u)
        if self.rank == 1:
            return torch.mul(left, right, out=diagonal)
        return torch.bmm(left, right, out=diagonal)


class DiagonalBiasFactors(NamedTuple):
    """The factor of one bias's diagonal curvature (`base.BiasFactors`); w [1, N, out]."""

    w: Tensor

    @classmethod
    def shapes(cls, *, out: int, experts: int, rank: int) -> Shapes:
        """Return the shape of the factor: the same for every R."""
        return {"w": (1, experts, out)}

    def reset(self) -> None:
        """Make it ones."""
        self.w.fill_(1)

    def transform(self, tau: Tensor) -> Tensor:
        """Return w_i * tau_i; [N, out]."""
        return self.w[0] * tau


class DiagonalCurvature(Curvature):
    """Diagonal curvature of one linear map's experts."""

    kind, weight_type, bias_type = "diagonal", DiagonalFactors, DiagonalBiasFactors
    u: Tensor
    v: Tensor
    w: Tensor

    @property
    def factors(self) -> DiagonalFactors:
        """The weight's factors."""
        return DiagonalFactors(self.u, self.v)

    def transform_bias(self, tau: Tensor) -> Tensor:
        """Return the transformed domain vectors of the bias; [N, out]."""
        return DiagonalBiasFactors(self.w).transform(tau)


def _blocks(experts: Tensor, active: Sequence[int] | None) -> Iterator[tuple[slice, slice]]:
    """Yield (experts, rows) such that a block of both stays in cache."""
    _, out, width = experts.shape
    most = BLOCK_ELEMENTS.get(experts.device.type, BLOCK_ELEMENTS["cuda"])
    for chunk in chunks(experts, active):
        height = max(1, most // (width * (chunk.stop - chunk.start)))
        for start in range(0, out, height):
            yield chunk, slice(start, min(start + height, out))


def _tau(experts: Tensor, base: Tensor | None, chunk: slice, rows: slice) -> Tensor:
    """Return rows of a chunk's domain vectors, in working memory where there is a base; [c, rows, in]."""
    part = experts[chunk, rows]
    return (
        part if base is None else torch.sub(part, base[rows], out=workspace("tau", tuple(part.shape), part))
    )
