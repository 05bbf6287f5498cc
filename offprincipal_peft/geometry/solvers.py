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

BLOCK = 16  # Krylov block: a narrower one needs a smaller basis, a wider one makes better use of a GEMM
FACTOR_LIMIT = 1.5  # m / n below which a tall matrix is factored by QR rather than through its Gram matrix
# Relative residuals that the fast solvers work towards; acceptance is the caller's, and looser. What one fp64
# Rayleigh-Ritz step leaves at the top is fp32 noise spread evenly over all directions: a residual of 8e-7 was
# seen with angles of 2e-6 to the true subspaces, and further rounds (two passes over A each) gained a factor of 2.
TOP_GOAL = 7e-7
BOTTOM_GOAL = 7e-7
NULL_GOAL = 1e-7
ROUNDS = 4


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


def rayleigh_ritz(
    X: Tensor,  # (n, p) fp64, orthonormal
    image: Tensor,  # (m, p) fp64, A @ X
) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximate triplets whose right vectors lie in span(X); S descending."""
    Q, R = torch.linalg.qr(image)
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, X @ Vh.T


def _improved(
    A: TallMatrix,
    X: Tensor,  # (n, p) fp64, orthonormal
    wanted: slice,
    kept: slice,
    goal: float,
    correct: Callable[[Tensor], Tensor],
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Rayleigh-Ritz triplets of A on span(X), widened by corrections of their residuals until below `goal`.

    The residual is max ||A.T u - s v|| / sigma_1 over the `wanted` pairs (A v = s u holds by construction);
    `kept` pairs are carried from round to round (block Davidson, Crouzeix, Philippe and Sadkane 1994).
    """
    image = A.apply(X)
    for attempt in range(rounds):
        U, S, V = rayleigh_ritz(X, image)
        U, S, V = U[:, kept], S[kept], V[:, kept]
        for precision in (torch.float32, torch.float64):  # fp64 where fp32's own rounding may be what is seen
            R = A.apply(U[:, wanted].to(precision), transpose=True) - V[:, wanted] * S[wanted]
            residual = float(R.norm(dim=0).max() / A.largest)
            if residual <= goal:
                break
        if residual <= goal or attempt == rounds - 1 or V.shape[1] + R.shape[1] > A.columns:
            break
        fresh = krylov.orthonormal_block(correct(R * S[wanted]).to(V.dtype), V.T)[0]
        X, image = torch.cat([V, fresh], dim=1), torch.cat([U * S, A.apply(fresh)], dim=1)
    return U[:, wanted], S[wanted], V[:, wanted], residual


def fast_top(A: TallMatrix, k: int, seed: int) -> Solution:
    """Top-k triplets: fp32 block Krylov, then fp64 Rayleigh-Ritz on a larger subspace than asked for.

    Source: Musco and Musco (2015), randomised block Krylov iteration.
    """
    if A.rows >= FACTOR_LIMIT * A.columns:
        gram = A.gram
        operator: Callable[[Tensor], Tensor] = gram.__matmul__
    else:
        single = A.single

        def operator(X: Tensor) -> Tensor:
            return single.T @ (single @ X)

    extra = min(max(16, k // 8), A.columns - k)
    start = krylov.gaussian(A.columns, BLOCK, seed, A.single)
    found = krylov.leading_eigenpairs(operator, start, k, extra=extra, tolerance=3e-7)
    X, _ = torch.linalg.qr(found.vectors)
    U, S, V, residual = _improved(A, X, slice(0, k), slice(0, k + extra), TOP_GOAL, lambda R: R)
    return Solution(U, S / A.scale, V, residual, "krylov")


def gram_solution(A: TallMatrix, count: int, bottom: bool) -> Solution:
    """Top or bottom triplets from all eigenvectors of the Gram matrix, then Rayleigh-Ritz as above.

    For matrices small enough for one eigendecomposition, or a count that is a large share of n. The top needs the
    fp64 Gram matrix to tell neighbours apart; the bottom starts from the fp32 one, at half the cost, and is corrected
    with its factor. The bottom of an ill-conditioned matrix is lost in its Gram matrix; its residual then stays large.
    """
    size = min(count + max(16, count // 8), A.columns)
    if bottom:
        wanted, kept, goal = slice(-count, None), slice(-size, None), BOTTOM_GOAL
    else:
        wanted, kept, goal = slice(0, count), slice(0, size), TOP_GOAL

    def correct(R: Tensor) -> Tensor:
        return A.inverse_gram_single(R.float()) if bottom and A.gram_factor is not None else R

    eigenvectors = A.gram_eigenvectors if A.has_gram_eigenvectors or not bottom else A.rough_gram_eigenvectors
    X, _ = torch.linalg.qr(eigenvectors[:, kept].double())
    U, S, V, residual = _improved(A, X, wanted, kept, goal, correct, rounds=2 * ROUNDS)
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
        return _failed(A, route)
    solve = {
        "lu-krylov": A.inverse_gram_lu,
        "qr-krylov": A.inverse_gram_qr,
        "gram-krylov": A.inverse_gram_single,
    }[route]
    dtype = torch.float32 if route == "gram-krylov" else torch.float64
    extra = max(8, r // 2)
    start = krylov.gaussian(A.columns, BLOCK, seed, A.weight, dtype)
    found = krylov.leading_eigenpairs(
        solve, start, r, extra=extra, tolerance=1e-6, relative_to_own=True, max_dim=A.columns
    )
    if not bool(found.vectors.isfinite().all()):
        return _failed(A, route)
    X, _ = torch.linalg.qr(found.vectors)
    wanted, kept = slice(-r, None), slice(-(r + extra), None)
    U, S, V, residual = _improved(A, X, wanted, kept, BOTTOM_GOAL, lambda R: solve(R.to(dtype)))
    return Solution(U, S / A.scale, V, residual, route)


def fast_null(A: TallMatrix, r: int, seed: int) -> tuple[Tensor, float]:
    """r orthonormal vectors of the left null space (m, r) and max ||A.T x|| / sigma_1; needs m - n >= r.

    A Gaussian block minus its projection onto range(A), a least-squares problem: solved with the Gram matrix's
    Cholesky factor where that is there, else by block Krylov on the normal equation, preconditioned by a rough
    factor where the weight allows one. A further round works on the error that the last one left.
    """
    X, _ = torch.linalg.qr(krylov.gaussian(A.rows, r, seed, A.single, torch.float64))
    residual = float("inf")
    rough = None if A.has_gram else A.rough_gram_factor
    for attempt in range(ROUNDS):
        image = A.apply(X.float(), transpose=True)  # (n, r); fp32 resolves 1e-8 sigma_1
        residual = float(image.norm(dim=0).max() / A.largest)
        if attempt == ROUNDS - 1 or (attempt > 0 and residual <= NULL_GOAL):
            break
        if rough is None and A.gram_factor is not None:
            Y = A.inverse_gram_single(image)
        else:
            Y = _normal_solution(A, image, rough, min(0.1, max(1e-4, 0.2 * NULL_GOAL / max(residual, 1e-30))))
        X, _ = torch.linalg.qr(X - A.apply(Y))
    return X, residual


def _normal_solution(A: TallMatrix, image: Tensor, rough: Tensor | None, tolerance: float) -> Tensor:
    """Y with A.T A Y = image (n, r) to ``tolerance`` in fp32; ``rough`` L preconditions with (L L.T)^-1."""
    single, limit = A.single, 40 * image.shape[1]
    if rough is None:
        return krylov.solve_spd(lambda Z: single.T @ (single @ Z), image, tolerance=tolerance, max_dim=limit)[0]

    def solved(Z: Tensor, *, transpose: bool) -> Tensor:
        return torch.linalg.solve_triangular(rough.T if transpose else rough, Z, upper=transpose)

    def operator(Z: Tensor) -> Tensor:
        return solved(single.T @ (single @ solved(Z, transpose=True)), transpose=False)

    right_side = solved(image, transpose=False)
    return solved(krylov.solve_spd(operator, right_side, tolerance=tolerance, max_dim=limit)[0], transpose=True)


def _failed(A: TallMatrix, route: str) -> Solution:
    nothing = A.weight.new_zeros(0, dtype=torch.float64)
    return Solution(nothing, nothing, nothing, float("inf"), route)
