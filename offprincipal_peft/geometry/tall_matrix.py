"""A weight seen as a tall matrix, with the factorisations that the fast solvers share.

Trade-off: a weight is kept in its own dtype and every fp64 product widens it in row chunks, so that a wide MLP
layer never needs a full fp64 copy; only matrices small enough for that to be cheap keep one. The fp32 Gram
matrix squares the condition number and is therefore used for large singular values and as a preconditioner,
never as the source of a small singular direction.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

WIDE_COPY_LIMIT = 2**25  # entries; above it fp64 products widen the weight chunk by chunk
ROUGH_SIZE = 1024  # columns from which a rough Gram factor is worth its further iterations
CHUNK = 2**23  # entries widened at a time


class TallMatrix:
    """A = W, or W.T where W is wide, times a power of two where W's entries are extremely small or large."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (d_out, d_in)
        self.transposed = weight.shape[0] < weight.shape[1]
        self.rows, self.columns = max(weight.shape), min(weight.shape)
        peak = float(weight.abs().max())
        self.is_zero, self.scale = peak == 0.0, _safe_scale(peak)

    @property
    def has_gram(self) -> bool:
        """Whether the fp32 Gram matrix has been paid for already."""
        return "gram" in self.__dict__

    @cached_property
    def single(self) -> Tensor:
        """A in fp32, (m, n)."""
        # a scale other than one may not itself fit into fp32
        copy = self.weight.float() if self.scale == 1.0 else (self.weight.double() * self.scale).float()
        return copy.T if self.transposed else copy

    @cached_property
    def double(self) -> Tensor:
        """A in fp64, (m, n)."""
        copy = self.weight.double()
        copy = copy if self.scale == 1.0 else copy * self.scale
        return copy.T if self.transposed else copy

    def apply(self, X: Tensor, transpose: bool = False) -> Tensor:
        """A @ X, or A.T @ X, in X's precision."""
        if X.dtype == torch.float32:
            return (self.single.T if transpose else self.single) @ X
        if self.weight.numel() <= WIDE_COPY_LIMIT or "double" in self.__dict__:
            stored = self.double.T if self.transposed else self.double  # W, contiguous
            return stored @ X if transpose == self.transposed else (X.T @ stored).T  # three times W.T @ X
        chunks = self.weight.split(max(1, CHUNK // self.weight.shape[1]))  # of (rows of W, d_in)
        if transpose == self.transposed:  # W @ X
            return torch.cat([(chunk.double() @ X).mul_(self.scale) for chunk in chunks])
        out = X.new_zeros(self.weight.shape[1], X.shape[1])  # W.T @ X
        for chunk, part in zip(chunks, X.split(chunks[0].shape[0]), strict=True):
            out.addmm_(chunk.double().T, part, alpha=self.scale)
        return out

    @cached_property
    def gram(self) -> Tensor:
        """A.T @ A in fp32, (n, n): the lower block triangle is computed and mirrored."""
        A, n = self.single, self.columns
        out = A.new_empty(n, n)
        step = max(256, -(-n // 12))
        for low in range(0, n, step):
            high = min(low + step, n)
            out[low:, low:high] = A[:, low:].T @ A[:, low:high]
            out[low:high, high:] = out[high:, low:high].T
        return out

    @cached_property
    def gram_factor(self) -> Tensor | None:
        """Cholesky factor of the fp32 Gram matrix, None where it is numerically indefinite."""
        L, info = torch.linalg.cholesky_ex(self.gram)
        return None if int(info) else L

    @cached_property
    def rough_gram_factor(self) -> Tensor | None:
        """Cholesky factor of a bf16-rounded Gram matrix, half the cost of the fp32 one: a preconditioner, no more.

        Only for bf16 weights, whose products bf16 arithmetic forms exactly; each entry is then rounded by up to
        2^-9, which the shift of the diagonal keeps from making the matrix indefinite.
        """
        if self.weight.dtype != torch.bfloat16 or self.scale != 1.0 or self.columns < ROUGH_SIZE:
            return None
        A, n = self.weight.T if self.transposed else self.weight, self.columns
        out = self.weight.new_empty(n, n, dtype=torch.float32)
        step = max(256, -(-n // 12))
        for low in range(0, n, step):
            out[low:, low : low + step] = A[:, low:].T @ A[:, low : low + step]
        out.diagonal().mul_(1 + 2.0**-7)
        L, info = torch.linalg.cholesky_ex(out)  # reads the lower triangle
        return None if int(info) else L

    @cached_property
    def gram_eigenvectors(self) -> Tensor:
        """All eigenvectors of the fp64 Gram matrix (n, n), largest eigenvalue first."""
        return torch.linalg.eigh(self.double.T @ self.double)[1].flip(1)

    @cached_property
    def rough_gram_eigenvectors(self) -> Tensor:
        """All eigenvectors of the fp32 Gram matrix (n, n), fp32, largest eigenvalue first."""
        return torch.linalg.eigh(self.gram)[1].flip(1)

    @property
    def has_gram_eigenvectors(self) -> bool:
        """Whether they have been paid for already."""
        return "gram_eigenvectors" in self.__dict__

    @cached_property
    def squared_norm(self) -> float:
        """||A||_F^2."""
        return float(torch.linalg.vector_norm(self.weight, dtype=torch.float64)) ** 2 * self.scale**2

    @cached_property
    def largest(self) -> float:
        """sigma_1 of A within some per cent, from below: it only makes residuals relative."""
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(self.columns, 4, generator=generator).to(self.single)
        rough = self.rough_gram_factor if "rough_gram_factor" in self.__dict__ else None
        for _ in range(2 if rough is None and not self.has_gram else 6):
            if self.has_gram:
                image = self.gram @ X
            else:
                image = self.apply(self.apply(X), transpose=True) if rough is None else rough @ (rough.T @ X)
            X, _ = torch.linalg.qr(image)
        image = self.apply(X) if rough is None else rough.T @ X
        return float(torch.linalg.matrix_norm(image, ord=2))

    @cached_property
    def triangle(self) -> Tensor:
        """R of A = QR in fp64, (n, n), its diagonal kept away from zero."""
        R = torch.linalg.qr(self.double, mode="r")[1]
        if self.weight.numel() > WIDE_COPY_LIMIT:
            del self.__dict__["double"]
        return _floored(R)

    @cached_property
    def lu(self) -> tuple[Tensor, Tensor]:
        """(LU, row order) of a square A in fp64: A[order] = L @ U, U's diagonal kept away from zero."""
        LU, pivots, _ = torch.linalg.lu_factor_ex(self.double)  # singular is fine: floored below
        order = list(range(self.rows))
        for row, pivot in enumerate(pivots.tolist()):  # LAPACK's one-based row exchanges, in sequence
            order[row], order[pivot - 1] = order[pivot - 1], order[row]
        return _floored(LU), torch.tensor(order, device=LU.device)

    def inverse_gram_single(self, X: Tensor) -> Tensor:
        """(A.T A)^-1 X through the fp32 Cholesky factor, (n, b) fp32."""
        L = self.gram_factor
        assert L is not None
        Y = torch.linalg.solve_triangular(L, X, upper=False)
        return torch.linalg.solve_triangular(L.T, Y, upper=True)

    def inverse_gram_qr(self, X: Tensor) -> Tensor:
        """(A.T A)^-1 X through R, (n, b) fp64."""
        R = self.triangle
        return torch.linalg.solve_triangular(R, torch.linalg.solve_triangular(R.T, X, upper=False), upper=True)

    def inverse_gram_lu(self, X: Tensor) -> Tensor:
        """(A.T A)^-1 X through A[order] = L U, (n, b) fp64."""
        LU, _ = self.lu  # the permutation cancels in A^-1 A^-T = U^-1 L^-1 L^-T U^-T
        Y = torch.linalg.solve_triangular(LU.T, X, upper=False)
        Y = torch.linalg.solve_triangular(LU.T, Y, upper=True, unitriangular=True)
        Y = torch.linalg.solve_triangular(LU, Y, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(LU, Y, upper=True)

    def inverse_outer_lu(self, X: Tensor) -> Tensor:
        """(A A.T)^-1 X of a square A, (n, b) fp64."""
        LU, order = self.lu
        Y = torch.linalg.solve_triangular(LU, X[order], upper=False, unitriangular=True)
        Y = torch.linalg.solve_triangular(LU, Y, upper=True)
        Y = torch.linalg.solve_triangular(LU.T, Y, upper=False)
        Y = torch.linalg.solve_triangular(LU.T, Y, upper=True, unitriangular=True)
        out = torch.empty_like(Y)
        out[order] = Y
        return out


def _safe_scale(largest: float) -> float:
    """1, or the power of two that keeps squares of very small or very large entries inside fp32's range."""
    if largest == 0.0 or 2.0**-20 <= largest <= 2.0**20:
        return 1.0
    return 2.0 ** min(1000, max(-1000, -math.frexp(largest)[1]))


def _floored(factor: Tensor) -> Tensor:
    """`factor` with its diagonal at least 1e-12 of its scale, so that singular matrices do not give NaN."""
    diagonal = factor.diagonal()
    floor = max(1e-12 * float(factor.norm()) / factor.shape[0] ** 0.5, torch.finfo(factor.dtype).tiny)
    diagonal.copy_(torch.where(diagonal.abs() < floor, torch.full_like(diagonal, floor), diagonal))
    return factor
