"""Singular values and bases of a weight: top-k, bottom-r, the null space, all values.

Trade-off: the fast route computes only the directions that were asked for, and every answer carries a measured
residual. An answer that misses its tolerance is thrown away and computed again by the exact fp64 SVD, which is
recorded in `reports`; speed is never bought with an unchecked basis.

The stored values of a weight are taken as exact and all final steps run in fp64, so "numerically zero" means
sigma <= max(shape) * 2.2e-16 * sigma_1 for every dtype: a low-rank product that was rounded to bf16 has full
rank. (max(shape) times the weight's own eps would call part of every large Gaussian matrix null.)
A fast null vector is accepted when ||A^T x|| <= 1e-6 sigma_1; `method="exact"` reaches fp64 rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import krylov, solvers
from .basis_cache import BasisCache, Layout
from .numerics import full_precision
from .tall_matrix import TallMatrix

Side = Literal["output", "input"]
Method = Literal["auto", "exact", "fast"]

ACCEPTED_RESIDUAL = 1e-6  # relative to sigma_1
ACCEPTED_ORTHOGONALITY = 1e-8  # max |Q^T Q - I| in fp64
EXACT_SIZE = 128  # min(shape) up to which the exact SVD is as fast as anything else
GRAM_SIZE = 1024  # min(shape) up to which one eigh of the Gram matrix beats a Krylov iteration


class Triplets(NamedTuple):
    """Singular triplets: W is close to U @ diag(S) @ V.T on their span."""

    U: Tensor  # (d_out, k)
    S: Tensor  # (k,), descending
    V: Tensor  # (d_in, k)


@dataclasses.dataclass(frozen=True)
class Report:
    """How one request was answered."""

    what: str  # for instance "top(112)"
    route: str  # "exact", "lu-krylov", "gram-krylov", "qr-krylov", "krylov", "gram-eigh", "projection", "cache"
    residual: float  # relative to sigma_1; of the route that was used; 0.0 for "exact" and "cache"
    fell_back: bool  # an earlier route was tried and its result refused


class WeightSpectrum:
    """The singular structure of one weight (d_out, d_in); factorisations are shared between requests.

    Results are fp32 (fp64 for an fp64 weight) on the weight's device, the same for the same input and sequence of
    requests whatever the global random state (work that an earlier request paid for is reused, which may change
    the last digits of a later one), with the largest-magnitude entry of each u (of each vector, where only one side is
    asked for) positive. Raises ValueError for a weight that is not a 2-D floating-point matrix with values, and
    for NaN or infinite entries.
    """

    def __init__(
        self,
        weight: Tensor,  # (d_out, d_in), fp64, fp32, bf16 or fp16
        *,
        method: Method = "auto",
        cache_dir: str | Path | None = None,
        seed: int = 0,
        name: str = "weight",
    ) -> None:
        if method not in ("auto", "exact", "fast"):
            raise ValueError(f"method must be 'auto', 'exact' or 'fast', got {method!r}")
        self.weight = _checked(weight.detach(), name)
        self.method, self.seed, self.name = method, seed, name
        self.reports: list[Report] = []
        directory = BasisCache.directory_from(cache_dir)
        self._cache = BasisCache(directory, self.weight) if directory is not None else None
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._tall: TallMatrix | None = None
        self._exact: tuple[Tensor, Tensor, Tensor] | None = None
        self._bottoms: dict[int, solvers.Solution] = {}

    # ---- requests

    def values(self) -> Tensor:
        """All min(shape) singular values, descending, fp64 (min(shape),)."""
        layout = {"S": ((min(self.weight.shape),), torch.float64)}
        return self._cached("values", {}, layout, lambda: {"S": self._values()})["S"]

    def top(self, k: int) -> Triplets:
        """The k largest singular triplets, 1 <= k <= min(shape)."""
        self._check_count("top", "k", k, min(self.weight.shape))
        return Triplets(**self._cached("top", {"k": k}, self._triplet_layout(k), lambda: self._top(k)))

    def bottom(self, r: int) -> Triplets:
        """The last r of the min(shape) triplets of the thin SVD, paired, S descending."""
        self._check_count("bottom", "r", r, min(self.weight.shape))
        return Triplets(**self._cached("bottom", {"r": r}, self._triplet_layout(r), lambda: self._bottom(r)))

    def minor(self, r: int, side: Side) -> Tensor:
        """The r smallest singular directions of one side of the full SVD, orthonormal (d_side, r).

        The null space comes first (a draw that is uniform in it where it is larger than r), then the smallest
        nonzero directions. "output" means left vectors (d_out), "input" right vectors (d_in); 1 <= r <= d_side.
        """
        d = self._side_size(side)
        self._check_count("minor", "r", r, d)
        layout = {"Q": ((d, r), self._dtype)}
        return self._cached("minor", {"r": r, "side": side}, layout, lambda: self._minor(r, side))["Q"]

    def null(self, r: int, side: Side) -> Tensor:
        """r orthonormal vectors of one side's null space (d_side, r); ValueError where it is smaller than r."""
        d = self._side_size(side)
        self._check_count("null", "r", r, d)
        layout = {"Q": ((d, r), self._dtype)}
        return self._cached("null", {"r": r, "side": side}, layout, lambda: self._null(r, side))["Q"]

    def null_dimension(self, side: Side) -> int:
        """d_side - min(shape), plus the number of sigma <= max(shape) * 2.2e-16 * sigma_1."""
        structural = self._side_size(side) - min(self.weight.shape)
        values = self.values()
        return structural + int((values <= self._threshold(values[0])).sum())

    # ---- how they are answered: everything below is in the tall orientation, fp64

    def _values(self) -> Tensor:
        self._report("values", "exact", 0.0, False)
        return self._exact[1] if self._exact is not None else solvers.singular_values(self._matrix)

    def _top(self, k: int) -> dict[str, Tensor]:
        n = self._matrix.columns
        attempts: list[Callable[[], solvers.Solution]] = []
        if self._is_fast(k):
            if n <= GRAM_SIZE or k > n // 8:
                attempts.append(lambda: solvers.gram_solution(self._matrix, k, bottom=False))
            else:
                attempts.append(lambda: solvers.fast_top(self._matrix, k, self.seed))
        return self._oriented(self._solve(f"top({k})", attempts, slice(0, k)))

    def _bottom(self, r: int) -> dict[str, Tensor]:
        return self._oriented(self._bottom_solution(r, f"bottom({r})"))

    def _bottom_solution(self, r: int, what: str) -> solvers.Solution:
        if r not in self._bottoms:
            A, n = self._matrix, self._matrix.columns
            attempts: list[Callable[[], solvers.Solution]] = []
            if self._is_fast(r):
                small = n <= GRAM_SIZE and A.rows >= solvers.FACTOR_LIMIT * n
                if r > n // 8 or small or (A.rows > n and A.has_gram_eigenvectors):
                    attempts.append(lambda: solvers.gram_solution(A, r, bottom=True))
                if r <= n // 8:
                    route = solvers.bottom_route(A)
                    attempts.append(lambda: solvers.fast_bottom(A, r, self.seed, route))
                if A.rows >= solvers.FACTOR_LIMIT * n and r <= n // 8:
                    attempts.append(lambda: solvers.fast_bottom(A, r, self.seed, "qr-krylov"))
            self._bottoms[r] = self._solve(what, attempts, slice(n - r, n))
        else:
            self._report(what, self._bottoms[r].route, self._bottoms[r].residual, False)
        return self._bottoms[r]

    def _minor(self, r: int, side: Side) -> dict[str, Tensor]:
        what, is_long = f"minor({r}, {side})", self._is_long(side)
        A = self._matrix
        if is_long and A.rows - A.columns >= r:
            return self._one_sided(self._null_vectors(r, what))
        if r <= A.columns and not (is_long and A.rows > A.columns):
            found = self._bottom_solution(r, what)
            if self._exact is None and found.S[0] > self._threshold_of(found):
                return self._one_sided((found.U if is_long else found.V).flip(1))
        return self._one_sided(self._exact_minor(r, is_long, what))

    def _null(self, r: int, side: Side) -> dict[str, Tensor]:
        what, is_long, A = f"null({r}, {side})", self._is_long(side), self._matrix
        if is_long and A.rows - A.columns >= r:
            return self._one_sided(self._null_vectors(r, what))
        dimension = self.null_dimension(side)
        if dimension < r:
            raise ValueError(
                f"{self.name} of shape {tuple(self.weight.shape)} has a null space of dimension {dimension} on "
                f"its {side} side, {r} were asked for"
            )
        return self._one_sided(self._exact_minor(r, is_long, what))

    def _null_vectors(self, r: int, what: str) -> Tensor:
        """r vectors (m, r) off the range of A, which leaves m - n >= r dimensions."""
        A = self._matrix
        if self._is_fast(r):
            X, residual = solvers.fast_null(A, r, self.seed)
            if residual <= ACCEPTED_RESIDUAL and solvers.orthogonality_error(X) <= ACCEPTED_ORTHOGONALITY:
                self._report(what, "projection", residual, False)
                return X
            return self._exact_minor(r, True, what, fell_back=True)
        return self._exact_minor(r, True, what)

    def _exact_minor(self, r: int, is_long: bool, what: str, fell_back: bool = False) -> Tensor:
        """Null space first, then the smallest nonzero directions, from the exact SVD."""
        U, S, V = self._exact_svd
        rank = self._matrix.columns - int((self._threshold(S[0]) >= S).sum())
        basis = U if is_long else V
        null_size = basis.shape[0] - rank
        draw = krylov.gaussian(basis.shape[0], min(r, null_size), self.seed, basis)
        for _ in range(2):
            draw = torch.linalg.qr(draw - basis[:, :rank] @ (basis[:, :rank].T @ draw))[0]
        if not self.reports or (self.reports[-1].what, self.reports[-1].route) != (what, "exact"):
            self._report(what, "exact", 0.0, fell_back)
        smallest = basis[:, rank - (r - draw.shape[1]) : rank].flip(1)
        return torch.cat([draw, smallest], dim=1)

    def _solve(self, what: str, attempts: list[Callable[[], solvers.Solution]], exact_slice: slice) -> solvers.Solution:
        """The first attempt that passes its own check, else the exact SVD."""
        for index, attempt in enumerate(attempts):
            found = attempt()
            if self._is_accepted(found, bottom=exact_slice.start > 0):
                self._report(what, found.route, found.residual, index > 0)
                return found
        U, S, V = self._exact_svd
        self._report(what, "exact", 0.0, bool(attempts))
        return solvers.Solution(U[:, exact_slice], S[exact_slice], V[:, exact_slice], 0.0, "exact")

    def _is_accepted(self, found: solvers.Solution, bottom: bool) -> bool:
        """Residual, orthonormality, and values that can be the extreme ones at all (trace bound)."""
        if not found.residual <= ACCEPTED_RESIDUAL:
            return False
        if max(solvers.orthogonality_error(found.U), solvers.orthogonality_error(found.V)) > ACCEPTED_ORTHOGONALITY:
            return False
        squares = (found.S * self._matrix.scale) ** 2
        total, n, k = self._matrix.squared_norm, self._matrix.columns, squares.shape[0]
        if bottom:  # the r smallest: none exceeds the mean of itself and the n - r above it
            return float(squares[0]) * (n - k + 1) <= total * (1 + 1e-6)
        rest = total - float(squares[:-1].sum())
        return float(squares[-1]) * (n - k + 1) >= rest * (1 - 1e-6) - 1e-6 * total

    # ---- small helpers

    @property
    def _matrix(self) -> TallMatrix:
        if self._tall is None:
            self._tall = TallMatrix(self.weight)
        return self._tall

    @property
    def _exact_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._exact is None:
            self._exact = solvers.exact(self._matrix)
        return self._exact

    def _is_fast(self, count: int) -> bool:
        """Whether a fast route is worth trying for `count` vectors."""
        if self.method == "exact" or self._exact is not None or self._matrix.is_zero:
            return False
        n = self._matrix.columns
        return n > EXACT_SIZE or (self.method == "fast" and n >= 2 * solvers.BLOCK and 4 * count <= n)

    def _threshold(self, largest: Tensor) -> float:
        return max(self.weight.shape) * torch.finfo(torch.float64).eps * float(largest)

    def _threshold_of(self, found: solvers.Solution) -> float:
        largest = self._matrix.largest / self._matrix.scale
        return 10 * max(self.weight.shape) * torch.finfo(torch.float64).eps * largest

    def _is_long(self, side: Side) -> bool:
        """Whether `side` is the side of the tall orientation's left vectors; the output side of a square."""
        return (side == "output") != self._matrix.transposed

    def _side_size(self, side: Side) -> int:
        if side not in ("output", "input"):
            raise ValueError(f"side must be 'output' or 'input', got {side!r}")
        return self.weight.shape[0 if side == "output" else 1]

    def _check_count(self, what: str, letter: str, count: int, allowed: int) -> None:
        if not 1 <= count <= allowed:
            raise ValueError(
                f"{what}({letter}={count}) of {self.name} with shape {tuple(self.weight.shape)}: "
                f"{letter} must be between 1 and {allowed}"
            )

    def _triplet_layout(self, k: int) -> Layout:
        d_out, d_in = self.weight.shape
        return {"U": ((d_out, k), self._dtype), "S": ((k,), self._dtype), "V": ((d_in, k), self._dtype)}

    def _oriented(self, found: solvers.Solution) -> dict[str, Tensor]:
        """Back from the tall orientation, signs fixed by the output side, in the result's dtype."""
        U, V = (found.V, found.U) if self._matrix.transposed else (found.U, found.V)
        signs = _signs(U)
        result = {"U": U * signs, "S": found.S, "V": V * signs}
        return {name: tensor.to(self._dtype).contiguous() for name, tensor in result.items()}

    def _one_sided(self, Q: Tensor) -> dict[str, Tensor]:
        return {"Q": (Q * _signs(Q)).to(self._dtype).contiguous()}

    def _report(self, what: str, route: str, residual: float, fell_back: bool) -> None:
        self.reports.append(Report(what, route, residual, fell_back))

    def _cached(
        self,
        what: str,
        request: Mapping[str, str | int],
        layout: Layout,
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        key = {"what": what, "method": self.method, "seed": self.seed, **request}
        if self._cache is not None:
            stored = self._cache.load(key, layout)
            if stored is not None:
                described = ", ".join(str(value) for value in request.values())
                self._report(f"{what}({described})" if request else what, "cache", 0.0, False)
                return stored
        with full_precision():
            result = compute()
        if self._cache is not None:
            self._cache.store(key, result)
        return result


def _checked(weight: Tensor, name: str) -> Tensor:
    shape = tuple(weight.shape)
    if weight.ndim != 2 or 0 in shape:
        raise ValueError(f"{name} must be a non-empty 2-D matrix, got shape {shape}")
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} of shape {shape} must be fp64, fp32, bf16 or fp16, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name} of shape {shape} is on the meta device and has no values")
    if not bool(weight.abs().max().isfinite()):  # NaN and infinity both reach the maximum, in one pass
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{name} of shape {shape} holds {bad} NaN or infinite entries")
    return weight


def _signs(Q: Tensor) -> Tensor:
    """(k,) signs that make the largest-magnitude entry of each column positive."""
    picked = Q.gather(0, Q.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(picked < 0, -1.0, 1.0).to(Q)


# ---- one request, one call


def singular_values(W: Tensor) -> Tensor:  # (d_out, d_in) -> (min,)
    """All singular values in fp64, descending, in the units of W. Errors as `WeightSpectrum`."""
    return WeightSpectrum(W).values()


def top_basis(W: Tensor, k: int, *, method: Method = "auto", seed: int = 0, name: str = "weight") -> Triplets:
    """The k largest singular triplets of W (d_out, d_in). Errors as `WeightSpectrum`.

    Source: Musco and Musco (2015), randomised block Krylov, with an fp64 Rayleigh-Ritz step.
    """
    return WeightSpectrum(W, method=method, seed=seed, name=name).top(k)


def bottom_basis(
    W: Tensor, r: int, side: Side, *, method: Method = "auto", seed: int = 0, name: str = "weight"
) -> Tensor:
    """The r smallest directions of one side of W's full SVD, orthonormal (d_side, r), null space first.

    Errors as `WeightSpectrum`. For the paired triplets of the thin SVD use `WeightSpectrum.bottom`.
    """
    return WeightSpectrum(W, method=method, seed=seed, name=name).minor(r, side)


def null_basis(
    W: Tensor, r: int, side: Side, *, method: Method = "auto", seed: int = 0, name: str = "weight"
) -> Tensor:
    """r orthonormal vectors of one side's null space (d_side, r); ValueError where there are fewer."""
    return WeightSpectrum(W, method=method, seed=seed, name=name).null(r, side)
