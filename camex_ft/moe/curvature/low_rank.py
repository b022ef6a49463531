"""Low-rank curvature: the identity and a map of rank R on either side of a domain vector.

    M_i tau = (I + U_i V_i^T) tau (I + P_i Q_i^T)^T      U_i, V_i of [out, R], P_i, Q_i of [in, R]

2 R (out + in) numbers an expert, and 4 R multiply-adds an entry of tau. A bias is mapped to (I + S_i T_i^T) b by
factors of its own. U, P and S start as 0, the others with orthonormal columns, so that M_i is the identity for every R
and columns come to differ.

    w = tau Q      z = V^T tau + (V^T w) P^T      T = tau + w P^T + U z

Backward, without a large matrix beside tau and dT, over which dtau is written:

    dz = U^T dT      dU = dT z^T      dV = tau dz^T + w (P^T dz^T)      dP = dT^T w + dz^T (V^T w)
    dw = dT P + V (dz P)              dQ = tau^T dw                     dtau = dT + V dz + dw Q^T

For chunks of experts; the code holds U^T, V^T, P^T and Q^T, as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from camex_ft.moe.curvature.base import Curvature, Shapes
from camex_ft.moe.curvature.kronecker import chunks
from camex_ft.moe.workspace import workspace


class LowRankFactors(NamedTuple):
    """The factors of one matrix's low-rank curvature (`base.Factors`).

    Attributes:
        u, v: along `out`; [R, N, out].
        p, q: along `in`; [R, N, in].
    """

    u: Tensor
    v: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def shapes(cls, *, out: int, width: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor."""
        high, wide = (rank, experts, out), (rank, experts, width)
        return {"u": high, "v": high, "p": wide, "q": wide}

    @property
    def rank(self) -> int:
        """R."""
        return self.u.shape[0]

    @property
    def cost(self) -> int:
        """One multiply-add for each factor."""
        return 4

    def reset(self) -> None:
        """U and P: 0. V and Q: orthonormal columns, or rows where there are more than R."""
        _start(self.u, self.v)
        _start(self.p, self.q)

    def transform(
        self,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return (I + U V^T) (E_i - E_m) (I + P Q^T)^T; [N, out, in]."""
        total = torch.empty_like(experts) if out is None else out
        for chunk in chunks(experts, active):
            vectors = total[chunk]
            if base is None:
                vectors.copy_(experts[chunk])
            else:
                torch.sub(experts[chunk], base, out=vectors)
            u, v, p, q = self._of(chunk)
            _, w, z = _inner(vectors, v, p, q)
            vectors.baddbmm_(w, p).baddbmm_(u.mT, z)
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
    ) -> LowRankFactors | None:
        """Turn dT into dtau, in place, and return the gradients of the factors."""
        dfactors = LowRankFactors(*(torch.zeros_like(f) for f in self)) if learn else None
        for chunk in chunks(experts, active):
            u, v, p, q = self._of(chunk)
            dvectors = grad[chunk]
            dz = u @ dvectors  # [c, R, in]
            inner = dz @ p.mT  # [c, R, R]
            dw = torch.baddbmm(v.mT @ inner, dvectors, p.mT)  # [c, out, R]
            if dfactors is not None or out is not None:
                tau = _tau(experts[chunk], base)
                mapped, w, z = _inner(tau, v, p, q)
                if dfactors is not None:
                    du, dv, dp, dq = dfactors._of(chunk)
                    du.copy_(z @ dvectors.mT)
                    dv.copy_(torch.baddbmm(inner @ w.mT, dz, tau.mT))
                    dp.copy_(torch.baddbmm(mapped.mT @ dz, w.mT, dvectors))
                    dq.copy_(dw.mT @ tau)
                if out is not None:
                    out[chunk] = tau
                    out[chunk].baddbmm_(w, p).baddbmm_(u.mT, z)
            if domain:
                dvectors.baddbmm_(v.mT, dz).baddbmm_(dw, q)
        return dfactors

    def transform_pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return B + U (V^T B) and A + (A Q) P^T, of the rank that B and A have."""
        inner = torch.einsum("tno,nok->ntk", self.v, left)
        outer = torch.einsum("nki,tni->nkt", right, self.q)
        high = left + torch.einsum("tno,ntk->nok", self.u, inner)
        return high, right + torch.einsum("nkt,tni->nki", outer, self.p)

    def distance(self) -> Tensor:
        """Return ||M_i - I||_F / ||I||_F per expert; [N], float64.

        With X = U V^T and Y = P Q^T, M - I is X (x) I + I (x) Y + X (x) Y; the norms and traces of X and Y follow from
        [R, R] products.
        """
        (x, trace_x), (y, trace_y) = _norm_and_trace(self.u, self.v), _norm_and_trace(self.p, self.q)
        out, width = self.u.shape[-1], self.p.shape[-1]
        squared = width * x + out * y + x * y + 2 * (trace_x * trace_y + x * trace_y + trace_x * y)
        return (squared.clamp_min(0) / (out * width)).sqrt()

    def condition(self) -> Tensor | None:
        """Return the product of the condition numbers of I + U V^T and I + P Q^T."""
        return _condition(self.u, self.v) * _condition(self.p, self.q)

    def _of(self, chunk: slice) -> LowRankFactors:
        """Return the factors of a chunk of experts, each [c, R, out or in]."""
        return LowRankFactors(*(f[:, chunk].transpose(0, 1) for f in self))


class LowRankBiasFactors(NamedTuple):
    """The factors of one bias's low-rank curvature (`base.BiasFactors`); [R, N, out]."""

    s: Tensor
    t: Tensor

    @classmethod
    def shapes(cls, *, out: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor."""
        return {"s": (rank, experts, out), "t": (rank, experts, out)}

    def reset(self) -> None:
        """S: 0. T: orthonormal columns."""
        _start(self.s, self.t)

    def transform(self, tau: Tensor) -> Tensor:
        """Return (I + S_i T_i^T) tau_i; [N, out]."""
        return tau + ((self.t * tau).sum(-1, keepdim=True) * self.s).sum(0)


class LowRankCurvature(Curvature):
    """Low-rank curvature of one linear map's experts."""

    kind, weight_type, bias_type = "low-rank", LowRankFactors, LowRankBiasFactors
    u: Tensor
    v: Tensor
    p: Tensor
    q: Tensor
    s: Tensor
    t: Tensor

    @property
    def factors(self) -> LowRankFactors:
        """The weight's factors."""
        return LowRankFactors(self.u, self.v, self.p, self.q)

    def transform_bias(self, tau: Tensor) -> Tensor:
        """Return the transformed domain vectors of the bias; [N, out]."""
        return LowRankBiasFactors(self.s, self.t).transform(tau)


def _start(left: Tensor, right: Tensor) -> None:
    left.zero_()
    for i in range(right.shape[1]):
        right[:, i] = nn.init.orthogonal_(torch.empty_like(right[:, i]))


def _tau(experts: Tensor, base: Tensor | None) -> Tensor:
    """Return a chunk's domain vectors, in working memory where there is a base; [c, out, in]."""
    if base is None:
        return experts
    return torch.sub(experts, base, out=workspace("tau", tuple(experts.shape), experts))


def _inner(tau: Tensor, v: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V^T w [c, R, R], w [c, out, R] and z [c, R, in]."""
    w = tau @ q.mT
    mapped = v @ w
    return mapped, w, torch.baddbmm(mapped @ p, v, tau)


def _norm_and_trace(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||X_i||_F^2 and tr X_i of X_i = left_i right_i^T; [N], float64."""
    a, b = left.double(), right.double()  # [R, N, k]
    squared = torch.einsum("rnk,tnk->rtn", a, a) * torch.einsum("rnk,tnk->rtn", b, b)
    return squared.sum((0, 1)), (a * b).sum((0, 2))


def _condition(left: Tensor, right: Tensor) -> Tensor:
    """Return the condition number of I + left_i right_i^T; [N], float64.

    Outside the space of the 2 R columns the map is the identity: within it, it is a small matrix.
    """
    a, b = (f.double().permute(1, 2, 0) for f in (left, right))  # [N, k, R]
    basis = torch.linalg.qr(torch.cat([a, b], dim=-1)).Q  # [N, k, min(k, 2 R)]
    size = basis.shape[-1]
    small = torch.eye(size, dtype=a.dtype, device=a.device) + (basis.mT @ a) @ (b.mT @ basis)
    singular = torch.linalg.svdvals(small)
    if size < left.shape[-1]:
        singular = torch.cat([singular, torch.ones_like(singular[:, :1])], dim=-1)
    return singular.amax(-1) / singular.amin(-1)
