"""Bases of a tall matrix: one exact route and the fast ones, each with the residual that it reached.

Trade-off: a fast route finds the subspace with cheap arithmetic (fp32 Krylov, a Gram preconditioner, one LU)
and then earns its result: an fp64 Rayleigh-Ritz step on a slightly larger subspace, and a residual measured
against the matrix itself. A `Solution` carries that residual, and the caller decides whether it is enough.
Everything is in the tall orientation A (m, n), m >= n; the spectrum module turns it back.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import krylov
from .tall_matrix import TallMatrix

TOP_BLOCK = 16  # Krylov block: a narrower one needs a smaller basis, a wider one makes better use of a GEMM
BOTTOM_BLOCK = 32  # an inverse converges in a few steps, whose triangular solves cost the same up to this width
FACTOR_LIMIT = 1.5  # m / n below which a tall matrix is factored by QR rather than through its Gram matrix
TOP_GOAL = 2e-8  # relative residual that `fast_top` works towards; acceptance is the caller's, and looser
BOTTOM_GOAL = 5e-7


class Solution(NamedTuple):
    """Singular triplets (or one side of them) and how well they satisfy A v = s u, A.T u = s v."""

    U: Tensor  # (m, k) fp64
    S: Tensor  # (k,) fp64, descending
    V: Tensor  # (n, k) fp64
    residual: float  # relative to sigma_1; inf where the solver did not finish
    route: str


def exact(A: TallMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in fp64 (U (m, n), S (n,), V (n, n)): QR first where A is tall."""
    dense = A.double
    if A.rows > A.columns:
        Q, R = torch.linalg.qr(dense)
        U, S, Vh = torch.linalg.svd(R)
        return Q @ U, S / A.scale, Vh.T
    U, S, Vh = torch.linalg.svd(dense)
    return U, S / A.scale, Vh.T


def singular_values(A: TallMatrix) -> Tensor:
    """All n singular values in fp64, descending."""
    dense = A.double
    if A.rows > A.columns:
        dense = torch.linalg.qr(dense, mode="r")[1]
    return torch.linalg.svdvals(dense) / A.scale


def orthogonality_error(Q: Tensor) -> float:
    """max |Q.T Q - I|; inf where Q holds a non-finite value."""
    gram = Q.T @ Q
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max().nan_to_num(float("inf"))) if gram.numel() else 0.0


def rayleigh_ritz(A: TallMatrix, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximate triplets whose right vectors lie in span(X), X (n, p) orthonormal fp64."""
    Q, R = torch.linalg.qr(A.apply(X))
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, X @ Vh.T


def _extend(X: Tensor, Y: Tensor) -> Tensor:
    """Orthonormal basis of span(X, Y), X (n, p) orthonormal first, all in X's dtype."""
    return torch.cat([X, krylov.orthonormal_block(Y.to(X.dtype), X.T)[0]], dim=1)


def fast_top(A: TallMatrix, k: int, seed: int) -> Solution:
    """Top-k triplets: fp32 block Krylov, then fp64 Rayleigh-Ritz enriched with its own residuals."""
    if A.rows >= FACTOR_LIMIT * A.columns:
        gram = A.gram
        operator: Callable[[Tensor], Tensor] = gram.__matmul__
    else:
        single = A.single

        def operator(X: Tensor) -> Tensor:
            return single.T @ (single @ X)

    extra = min(max(16, k // 4), A.columns - k)
    start = krylov.gaussian(A.columns, TOP_BLOCK, seed, A.single)
    found = krylov.leading_eigenpairs(operator, start, k, extra=extra, tolerance=1e-8)
    X, _ = torch.linalg.qr(found.vectors)
    residual = float("inf")
    for _ in range(3):
        U, S, V = rayleigh_ritz(A, X)
        keep = min(k + extra, S.shape[0])
        U, S, V = U[:, :keep], S[:keep], V[:, :keep]
        R = A.apply(U, transpose=True) - V * S
        residual = float(R[:, :k].norm(dim=0).max() / S[0])
        if residual <= TOP_GOAL or 2 * keep > A.columns:
            break
        X = _extend(V, R)
    return Solution(U[:, :k], S[:k] / A.scale, V[:, :k], residual, "krylov")


def gram_solution(A: TallMatrix, wanted: slice) -> Solution:
    """The `wanted` triplets from the fp64 Gram matrix's eigenvectors, each refined to its own singular value.

    For matrices small enough for one eigendecomposition, or a k that is a large share of n. An ill-conditioned
    bottom loses its accuracy here (relative error eps * kappa^2) and fails the residual check.
    """
    V = A.gram_eigenvectors[:, wanted]
    U, S, V = rayleigh_ritz(A, V)
    residual = float((A.apply(U, transpose=True) - V * S).norm(dim=0).max() / A.gram_largest)
    return Solution(U, S / A.scale, V, residual, "gram-eigh")


def bottom_route(A: TallMatrix) -> str:
    """Which factorisation serves the bottom of this matrix."""
    if A.rows == A.columns:
        return "lu-krylov"
    return "gram-krylov" if A.rows >= FACTOR_LIMIT * A.columns else "qr-krylov"


def fast_bottom(A: TallMatrix, r: int, seed: int, route: str) -> Solution:
    """Bottom-r triplets by block Krylov on an inverse, then Rayleigh-Ritz on A itself.

    `route` names the inverse: "lu-krylov" (square, fp64), "qr-krylov" (fp64 R), "gram-krylov" (an fp32
    Cholesky factor that is only a preconditioner: block Davidson steps with A correct it). The residual is
    ||A.T u - s v|| / sigma_1 per pair, with u = A v / s.
    """
    if route == "gram-krylov" and A.gram_factor is None:
        return _failed(A, r, route)
    solve = {
        "lu-krylov": A.inverse_gram_lu,
        "qr-krylov": A.inverse_gram_qr,
        "gram-krylov": A.inverse_gram_single,
    }[route]
    dtype = torch.float32 if route == "gram-krylov" else torch.float64
    extra = max(16, r // 2)
    start = krylov.gaussian(A.columns, BOTTOM_BLOCK, seed, A.weight, dtype)
    found = krylov.leading_eigenpairs(
        solve, start, r, extra=extra, tolerance=1e-5, relative_to_own=True, max_dim=A.columns
    )
    if not bool(found.vectors.isfinite().all()):
        return _failed(A, r, route)
    X, _ = torch.linalg.qr(found.vectors)
    largest = largest_singular_value(A, seed)
    for attempt in range(4):
        U, S, V = rayleigh_ritz(A, X)
        U, S, V = U[:, -(r + extra) :], S[-(r + extra) :], V[:, -(r + extra) :]
        R = A.apply(U, transpose=True) - V * S
        residual = float(R[:, -r:].norm(dim=0).max() / largest)
        if residual <= BOTTOM_GOAL or attempt == 3:
            break
        X = _extend(V, solve((R * S).to(dtype)))
    return Solution(U[:, -r:], S[-r:] / A.scale, V[:, -r:], residual, route)


def fast_null(A: TallMatrix, r: int, seed: int) -> tuple[Tensor, float]:
    """r orthonormal vectors of the left null space (m, r) and max ||A.T x|| / sigma_1; needs m - n >= r.

    A Gaussian block minus its projection onto range(A): the least-squares problem is solved by block Krylov on
    the normal equation (or through a Gram factor that is there already), twice, so that the second solve works
    on the first one's error.
    """
    single = A.single
    X = krylov.gaussian(A.rows, r, seed, single, torch.float64)
    largest = largest_singular_value(A, seed)
    residual = float("inf")
    for _ in range(4):
        X, _ = torch.linalg.qr(X)
        image = A.apply(X, transpose=True)  # (n, r)
        residual = float(image.norm(dim=0).max() / largest)
        if residual <= 1e-7:
            break
        if "gram_factor" in A.__dict__ and A.gram_factor is not None:
            Y = A.inverse_gram_single(image.float())
        else:
            Y, _ = krylov.solve_spd(
                lambda Z: single.T @ (single @ Z), image.float(), tolerance=0.03 * 1e-7 / residual, max_dim=40 * r
            )
        X = X - A.apply(Y).double()
    return X, residual


def largest_singular_value(A: TallMatrix, seed: int) -> float:
    """sigma_1 of the scaled A to a few per cent (from below), enough to make a residual relative."""
    cached = A.__dict__.get("largest")
    if cached is None:
        X = krylov.gaussian(A.columns, 4, seed, A.single)
        for _ in range(4):
            X, _ = torch.linalg.qr(A.apply(A.apply(X), transpose=True))
        cached = A.__dict__["largest"] = float(torch.linalg.matrix_norm(A.apply(X), ord=2))
    return float(cached)


def _failed(A: TallMatrix, r: int, route: str) -> Solution:
    nothing = A.weight.new_zeros(0, dtype=torch.float64)
    return Solution(nothing, nothing, nothing, float("inf"), route)
