"""Block Krylov solvers with full reorthogonalisation, on plain callables.

Trade-off: the whole basis is kept and every new block is orthogonalised against it twice. That costs
O(n D^2) for a basis of D vectors, but it removes the ghosts and the loss of orthogonality that make short
Lanczos recurrences hard to trust, and D stays small beside n for the bases that this package asks for.
Nothing here judges the result: the callers measure the true residual and fall back where it is too large.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHECK_GROWTH = 1.3  # at most; a check costs an eigendecomposition of the projection, too dear for every step

Apply = Callable[[Tensor], Tensor]


class KrylovResult(NamedTuple):
    """Leading eigenpairs of a symmetric positive semi-definite operator."""

    vectors: Tensor  # (n, p) fp64, p >= wanted; orthonormal to the operator's own precision
    values: Tensor  # (p,) fp64, descending
    residual: float  # largest estimated ||M x - mu x|| of the wanted pairs, in the units of `tolerance`
    dimension: int  # size of the Krylov basis
    converged: bool


def gaussian(rows: int, columns: int, seed: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal (rows, columns), the same on every device, from a private generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return draw.to(device=like.device, dtype=dtype or like.dtype)


def orthonormal_block(
    block: Tensor,  # (n, b)
    basis_T: Tensor,  # (d, n), orthonormal rows
) -> tuple[Tensor, Tensor]:
    """Split `block` into its part inside the basis and an orthonormal rest.

    Returns (Q, R) with block = basis_T.T @ C + Q @ R. Householder QR keeps Q orthonormal even where `block`
    is rank-deficient, but then the arbitrary columns may lie inside the basis: a second pass moves them out,
    with a zero row in R, so that an invariant subspace continues from a fresh direction.
    """
    scale = float(block.norm())
    block = block - basis_T.T @ (basis_T @ block)
    Q, R = torch.linalg.qr(block)
    smallest = float(R.diagonal().abs().min())
    if smallest > 1e-2 * scale:  # cancellation lost no more than two digits: the columns are orthogonal already
        return Q, R
    for _ in range(2):
        Q, R_next = torch.linalg.qr(Q - basis_T.T @ (basis_T @ Q))
        R = R_next @ R
    return Q, R


class _Basis:
    """A growing Krylov basis (rows) and the operator's projection onto it."""

    def __init__(self, start: Tensor, max_dim: int) -> None:
        n, block = start.shape
        self.rows = start.new_empty(max_dim + block, n)  # (max_dim + b, n): contiguous slices while it grows
        self.projection = torch.zeros(max_dim + block, max_dim + block, dtype=torch.float64)
        self.rows[:block] = torch.linalg.qr(start)[0].T
        self.block, self.size = block, 0  # `size` counts the vectors that the operator has been applied to

    def step(self, apply: Apply) -> None:
        """Apply the operator to the newest block and append the orthonormal rest."""
        low, high = self.size, self.size + self.block
        image = apply(self.rows[low:high].T)  # (n, b)
        basis_T = self.rows[:high]
        inside = basis_T @ image  # (high, b)
        Q, R = orthonormal_block(image - basis_T.T @ inside, basis_T)
        self.rows[high : high + self.block] = Q.T
        self.projection[:high, low:high] = inside.double().cpu()
        self.projection[high : high + self.block, low:high] = R.double().cpu()
        self.size = high

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (descending), coefficients (size, size), residual estimate of each pair."""
        T = self.projection[: self.size, : self.size]
        values, coefficients = torch.linalg.eigh((T + T.T) / 2)
        values, coefficients = values.flip(0), coefficients.flip(1)
        last = slice(self.size - self.block, self.size)
        coupling = self.projection[self.size : self.size + self.block, last]
        return values, coefficients, (coupling @ coefficients[last]).norm(dim=0)


def leading_eigenpairs(
    apply: Apply,
    start: Tensor,  # (n, b)
    wanted: int,
    *,
    extra: int,
    tolerance: float,
    relative_to_own: bool = False,
    max_dim: int | None = None,
) -> KrylovResult:
    """Leading `wanted` (+ up to `extra`) eigenpairs of a symmetric PSD operator by block Lanczos.

    Converged when every wanted pair's estimated residual ||M x - mu x|| is at most `tolerance` times mu_1, or
    times its own mu where `relative_to_own` (for an inverse operator, whose values span many orders). Stops
    unconverged at `max_dim`; the caller decides what that is worth.
    Source: Golub and Underwood (1977), block Lanczos; Parlett, The Symmetric Eigenvalue Problem, ch. 13.
    """
    n, block = start.shape
    limit = min(max_dim or n, n) // block * block - block  # the appended block must still fit into n
    basis = _Basis(start, max(limit, block))
    next_check = min(limit, max(wanted + extra, 2 * wanted, 4 * block))
    residual, converged = float("inf"), False
    previous = 0, 1.0
    while True:
        basis.step(apply)
        if basis.size < next_check:
            continue
        values, coefficients, estimates = basis.ritz()
        scale = values[:wanted].clamp_min(torch.finfo(torch.float64).tiny) if relative_to_own else values[0]
        residual = float((estimates[:wanted] / scale).nan_to_num(0.0).max())
        converged = residual <= tolerance
        if converged or basis.size + block > limit:
            break
        next_check = min(limit, _next_check(previous, (basis.size, residual), tolerance, block))
        previous = basis.size, residual
    keep = min(wanted + extra, basis.size)
    rows = basis.rows[: basis.size].double()
    vectors = rows.T @ coefficients[:, :keep].to(rows.device)
    return KrylovResult(vectors, values[:keep].to(rows.device), residual, basis.size, converged)


def _next_check(previous: tuple[int, float], now: tuple[int, float], tolerance: float, block: int) -> int:
    """The basis size at which the residual, going on as between the last two checks, meets the tolerance."""
    size, residual = now
    furthest = int(CHECK_GROWTH * size)
    decades = math.log10(max(previous[1], 1e-300) / max(residual, 1e-300))
    if decades > 0.5:
        missing = math.log10(max(residual, 1e-300) / tolerance)
        furthest = min(furthest, size + int((size - previous[0]) * missing / decades))
    return max(size + block, size + size // 16, furthest)


def solve_spd(
    apply: Apply,
    right_side: Tensor,  # (n, b)
    *,
    tolerance: float,
    max_dim: int,
) -> tuple[Tensor, float]:
    """Galerkin solution Y of M Y = right_side on the block Krylov space of the right-hand side.

    M is symmetric PSD and the right-hand side lies in its range (a normal equation), so a singular M is no
    obstacle. Returns (Y (n, b), estimated ||M Y - B||_F / ||B||_F). The block sees a few outlying eigenvalues
    at once, which is what a pretrained weight has above its bulk.
    Source: O'Leary (1980), block conjugate gradients, in its reorthogonalised Lanczos form.
    """
    n, block = right_side.shape
    limit = min(max_dim, n) // block * block - block
    basis = _Basis(right_side, max(limit, block))
    norm = float(right_side.norm())
    if norm == 0.0:
        return torch.zeros_like(right_side), 0.0
    entry = (basis.rows[:block] @ right_side).double().cpu()  # (b, b): B = Q_1 @ entry
    while True:
        basis.step(apply)
        size = basis.size
        if size % (2 * block) and size + block <= limit:
            continue
        T = basis.projection[:size, :size]
        target = torch.zeros(size, block, dtype=torch.float64)
        target[:block] = entry
        floor = 1e-14 * float(T.diagonal().max())
        factor, _ = torch.linalg.cholesky_ex((T + T.T) / 2 + floor * torch.eye(size, dtype=torch.float64))
        coefficients = torch.cholesky_solve(target, factor)
        coupling = basis.projection[size : size + block, size - block : size]
        residual = float((coupling @ coefficients[-block:]).norm()) / norm
        if residual <= tolerance or size + block > limit:
            rows = basis.rows[:size]
            return rows.T @ coefficients.to(rows), residual
