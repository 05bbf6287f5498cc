"""Projectors, angles between subspaces, and the share of an update inside the principal subspaces.

Trade-off: a few fp64 copies of thin factors, in exchange for angles and shares that are right at the 1e-6
level where these comparisons are made. The shares are invariant to the signs and to any rotation of a basis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ORTHONORMAL_TOLERANCE = 1e-4  # max |Q.T Q - I| that still counts as an orthonormal basis


class EnergyShares(NamedTuple):
    """Shares of ||delta||_F^2, each in [0, 1]."""

    output: float  # ||U_k.T delta||^2 / ||delta||^2
    input: float  # ||delta V_k||^2 / ||delta||^2
    both: float  # ||U_k.T delta V_k||^2 / ||delta||^2


class Leak(NamedTuple):
    """Shares of ||delta||_F (a norm, not an energy), each in [0, 1]; None where no basis was given."""

    output: float | None  # ||U_k.T delta||_F / ||delta||_F
    input: float | None  # ||delta V_k||_F / ||delta||_F


def projector(basis: Tensor) -> Tensor:  # basis (d, k) -> (d, d)
    """Q Q^T of an orthonormal basis, in its dtype. Meant for small d: `project_off` never forms it."""
    return basis @ basis.T


def project_off(
    X: Tensor,  # (d, n)
    basis: Tensor,  # (d, k), orthonormal columns
    *,
    twice: bool = False,
) -> Tensor:
    """(I - Q Q^T) X, in fp32 at least and in fp64 where either argument is fp64; returned in that precision.

    `twice` repeats the projection, which removes the part that rounding left behind when X lies almost
    entirely inside the basis.
    """
    if X.shape[0] != basis.shape[0]:
        raise ValueError(f"X has {X.shape[0]} rows but the basis has {basis.shape[0]}")
    dtype = torch.promote_types(torch.promote_types(X.dtype, basis.dtype), torch.float32)
    X, Q = X.to(dtype), basis.to(dtype)
    with torch.autocast(X.device.type, enabled=False):
        for _ in range(2 if twice else 1):
            X = X - Q @ (Q.T @ X)
    return X


def principal_angles(
    Q1: Tensor,  # (d, k1), orthonormal columns
    Q2: Tensor,  # (d, k2), orthonormal columns
) -> Tensor:
    """The min(k1, k2) principal angles in radians, ascending, fp64.

    arccos of a cosine near one loses half the digits (nothing below 1e-8 in fp64, 3e-4 in fp32), arcsin near
    pi/2 likewise; each angle therefore comes from whichever of sine and cosine is the smaller.
    Raises ValueError for bases of different height or not orthonormal within 1e-4.
    Source: Bjorck and Golub (1973); Knyazev and Argentati (2002), algorithm 3.1.
    """
    if Q1.shape[0] != Q2.shape[0]:
        raise ValueError(f"the bases have {Q1.shape[0]} and {Q2.shape[0]} rows")
    Q1, Q2 = _orthonormal(Q1, "the first basis"), _orthonormal(Q2, "the second basis")
    if Q1.shape[1] < Q2.shape[1]:
        Q1, Q2 = Q2, Q1
    overlap = Q1.T @ Q2  # (k1, k2), k2 the smaller
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)  # descending: angles ascending
    sines = torch.linalg.svdvals(Q2 - Q1 @ overlap).clamp(max=1.0).flip(0)  # ascending
    return torch.where(cosines**2 >= 0.5, torch.arcsin(sines), torch.arccos(cosines))


def _orthonormal(Q: Tensor, what: str) -> Tensor:
    """Q in fp64, its fp32 rounding removed by one QR; refused where it is not orthonormal."""
    if Q.ndim != 2 or Q.shape[1] > Q.shape[0]:
        raise ValueError(f"{what} must be a tall matrix of columns, got shape {tuple(Q.shape)}")
    Q = Q.double()
    error = (Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)).abs().max()
    if not bool(error <= ORTHONORMAL_TOLERANCE):
        raise ValueError(f"{what} of shape {tuple(Q.shape)} is not orthonormal: max |Q^T Q - I| = {error:.2e}")
    return torch.linalg.qr(Q)[0]


def leak(
    delta: Tensor,  # (d_out, d_in)
    U_k: Tensor | None = None,  # (d_out, k), orthonormal
    V_k: Tensor | None = None,  # (d_in, k), orthonormal
) -> Leak:
    """||U_k^T delta||_F / ||delta||_F and ||delta V_k||_F / ||delta||_F; 0.0 for a zero update."""
    delta = delta.double()
    total = float(delta.norm())
    return Leak(
        None if U_k is None else _ratio(float((U_k.double().T @ delta).norm()), total),
        None if V_k is None else _ratio(float((delta @ V_k.double()).norm()), total),
    )


def factored_leak(
    B: Tensor,  # (d_out, r)
    A: Tensor,  # (r, d_in)
    U_k: Tensor | None = None,  # (d_out, k), orthonormal
    V_k: Tensor | None = None,  # (d_in, k), orthonormal
    *,
    scale: float = 1.0,
) -> Leak:
    """`leak` of delta = scale * B @ A without forming it: O((d_out + d_in) r k)."""
    left, right = _factors(B, A, scale)
    total = float((left.R @ right.R.T).norm())
    return Leak(
        None if U_k is None else _ratio(float((U_k.double().T @ left.Q @ left.R @ right.R.T).norm()), total),
        None if V_k is None else _ratio(float((left.R @ right.R.T @ (right.Q.T @ V_k.double())).norm()), total),
    )


def energy_shares(
    delta: Tensor,  # (d_out, d_in)
    U_k: Tensor,  # (d_out, k), orthonormal
    V_k: Tensor,  # (d_in, k), orthonormal
) -> EnergyShares:
    """How much of an update's squared Frobenius norm lies inside the principal subspaces.

    A uniformly random update has shares k / d_out, k / d_in and their product. A zero update has no direction;
    by convention its shares are 0.0, so that a table over layers needs no special case.
    """
    delta, U, V = delta.double(), U_k.double(), V_k.double()
    total = float(delta.norm())
    inside = U.T @ delta  # (k, d_in)
    return EnergyShares(
        _ratio(float(inside.norm()), total) ** 2,
        _ratio(float((delta @ V).norm()), total) ** 2,
        _ratio(float((inside @ V).norm()), total) ** 2,
    )


def factored_energy_shares(
    B: Tensor,  # (d_out, r)
    A: Tensor,  # (r, d_in)
    U_k: Tensor,  # (d_out, k), orthonormal
    V_k: Tensor,  # (d_in, k), orthonormal
    *,
    scale: float = 1.0,
) -> EnergyShares:
    """`energy_shares` of delta = scale * B @ A without forming it; the same conventions."""
    left, right = _factors(B, A, scale)
    core = left.R @ right.R.T  # (r, r): delta = left.Q @ core @ right.Q.T
    output = U_k.double().T @ left.Q @ core  # (k, r)
    inward = right.Q.T @ V_k.double()  # (r, k)
    total = float(core.norm())
    return EnergyShares(
        _ratio(float(output.norm()), total) ** 2,
        _ratio(float((core @ inward).norm()), total) ** 2,
        _ratio(float((output @ inward).norm()), total) ** 2,
    )


class _QR(NamedTuple):
    Q: Tensor
    R: Tensor


def _factors(B: Tensor, A: Tensor, scale: float) -> tuple[_QR, _QR]:
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply")
    return _QR(*torch.linalg.qr(scale * B.double())), _QR(*torch.linalg.qr(A.double().T))


def _ratio(part: float, total: float) -> float:
    return min(part / total, 1.0) if total > 0 else 0.0
