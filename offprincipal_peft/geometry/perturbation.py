"""Eigenvalues and leading eigenvectors of a diagonal matrix plus a small symmetric one, without decomposing the whole.

Source: Stewart and Sun, Matrix Perturbation Theory (1990), ch. V; Loewdin (1951), partitioning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram_change import chunk_entries

ITERATIONS = 6  # of the part outside the leading block
ROUNDS = 4  # of inverse iteration: the 32 last of 64 gain a factor of 16 a round where values fall linearly
SETTLED = 1e-2  # the last Newton step on the leading block, as a fraction of the largest sine, at most


def perturbed(squares: Tensor, rotated: Tensor) -> tuple[float, Tensor]:
    """Mean squared mixing, and the eigenvalues of diag(squares) + rotated to second order, (n,) fp64.

    Each pair of directions is solved as its own 2 x 2 problem, so that near-degenerate values repel as they should.
    """
    first = squares + rotated.diagonal().double()
    shifts, mixing = torch.zeros_like(first), 0.0
    n = len(first)
    for rows in torch.arange(n, device=first.device).split(max(1, chunk_entries(n * n) // (4 * n))):
        gaps = first[rows, None] - first[None, :]
        couplings = rotated[rows].double()
        couplings[torch.arange(len(rows)), rows] = 0.0
        roots = torch.hypot(gaps, 2 * couplings)
        # half of the pair's widening, away from the partner; 2 E^2 / (root + gap) without cancellation
        shifts[rows] = (2 * couplings.square() / (roots + gaps.abs()).clamp_min_(1e-300) * gaps.sign()).sum(1)
        mixing += float((couplings.square() / roots.square().clamp_min_(1e-300)).sum())
    return mixing / n, first + shifts


def leading(squares: Tensor, rotated: Tensor, k: int) -> tuple[Tensor, float] | None:
    """A basis (n, k) fp64 of the top-k eigenspace of diag(squares) + rotated, and the last correction to its angles.

    The leading p directions are solved exactly with the others folded in to second order, and then the part outside
    is iterated to self-consistency, with one Newton step on the whole at the end. None where that does not settle, or
    where the step is more than a fraction of the largest sine.
    """
    n = len(squares)
    p = min(n, k + max(64, k))
    inner = rotated[:p, :p].double()
    inner.diagonal().add_(squares[:p])
    if p == n:
        return torch.linalg.eigh(inner)[1].flip(1)[:, :k], 0.0
    coupling = rotated[p:, :p].double()  # (n - p, p)
    outer = squares[p:] + rotated.diagonal()[p:].double()
    reference = float(squares[k - 1])
    inner += coupling.T @ (coupling / (reference - outer)[:, None])
    found, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    found, lower, C = found.flip(0)[:k], found.flip(0)[k:, None], vectors.flip(1)[:, :k]
    if not float(found[-1] - outer.max()) > 0:
        return None
    gaps = found[None, :] - outer[:, None]  # (n - p, k), positive
    pull = coupling @ C
    Z = pull / gaps
    rest = rotated[p:, p:]
    diagonal = rest.diagonal().double()[:, None]
    for _ in range(ITERATIONS):
        fresh = (pull + (rest @ Z.float()).double() - diagonal * Z) / gaps
        moved, Z = float((fresh - Z).norm()), fresh
        if moved <= 1e-4 * float(Z.norm()) + 1e-300:
            break
    else:
        return None
    X = torch.linalg.qr(torch.cat([C, Z]))[0]
    values, turn = torch.linalg.eigh(X.T @ (squares[:, None] * X + (rotated @ X.float()).double()))
    X = X @ turn
    residual = squares[:, None] * X + (rotated @ X.float()).double() - X * values
    other = vectors.flip(1)[:, k:]  # of the leading block
    inside = other @ ((other.T @ residual[:p]) / (values - lower))
    step = torch.cat([inside, residual[p:] / (values - outer[:, None])])
    size = float(torch.linalg.matrix_norm(step, 2))
    return (X + step, size) if size <= SETTLED * float(torch.linalg.matrix_norm(X[k:], 2)) else None


def trailing(matrix: Tensor, count: int, noise: float) -> Tensor | None:
    """A basis (n, count) fp32 of the last eigenspace of a positive semi-definite fp64 matrix, up to its noise.

    Inverse iteration from the last unit vectors, by one Cholesky factorisation. What rounding made negative is
    shifted by a multiple of the noise; None where that would be more than a thousand times it.
    """
    n = len(matrix)
    shift = 4 * noise
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix, shift))
    while int(info):
        if (shift := 4 * shift) > 1e3 * noise:
            return None
        factor, info = torch.linalg.cholesky_ex(_shifted(matrix, shift))
    X = torch.zeros(n, count, dtype=matrix.dtype, device=matrix.device)
    X[n - count :].fill_diagonal_(1.0)
    for _ in range(ROUNDS):
        X = torch.linalg.qr(torch.cholesky_solve(X, factor))[0]
    return X.float()


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted
