"""The update of an adapter as one product: factors from which every form of it (forward, merge, export) is made."""

from __future__ import annotations

import torch
from torch import Tensor


def folded_factors(
    B: Tensor,  # (d_out, r)
    A: Tensor,  # (r, d_in)
    *,
    B0: Tensor | None = None,  # (d_out, r)
    A0: Tensor | None = None,  # (r, d_in)
    U: Tensor | None = None,  # (d_out, k) orthonormal columns
    V: Tensor | None = None,  # (d_in, k) orthonormal columns
    train_factors: str = "both",
) -> tuple[Tensor, Tensor]:
    """``left`` (d_out, R) and ``right`` (R, d_in) with ``left @ right = (I - U U^T)(B A - B0 A0)(I - V V^T)``.

    Without the scaling, in fp32 (fp64 for fp64 factors), differentiable. Starts are given where the update subtracts
    their product, bases where that side is projected. R is r, or 2r where starts are subtracted and both factors
    train. The result is exactly zero where ``B == B0`` and ``A == A0``.

    Source: 2511.08567 for the projection; the difference form avoids the cancellation in ``B A - B0 A0``.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    with torch.autocast(device_type=A.device.type, enabled=False):
        left, right = B.to(wide), A.to(wide)
        if B0 is not None and A0 is not None:
            left, right = _differences(left, right, B0.to(wide), A0.to(wide), train_factors)
        if U is not None:
            left = _off_columns(left, U.to(wide))
        if V is not None:
            right = _off_columns(right.T, V.to(wide)).T
    return left, right


def _differences(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, train: str) -> tuple[Tensor, Tensor]:
    """Factors of BA - B0 A0 that vanish exactly at the start.

    [B - B0, B0] [A; A - A0] where both train; where only one does, the other equals its start and rank r is enough.
    """
    if train == "A":
        return B0, A - A0
    if train == "B":
        return B - B0, A0
    return torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0)


def _off_columns(X: Tensor, Q: Tensor) -> Tensor:
    """(I - Q Q^T) X for orthonormal Q (d, k) and X (d, n)."""
    return torch.addmm(X, Q, Q.T @ X, alpha=-1)
