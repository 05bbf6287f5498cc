"""An update dW of one weight in the form that is cheapest to measure: two thin factors or one dense matrix.

Trade-off: a factored update is never multiplied out. Its squared norm and its shares inside subspaces come from r x r
Gram matrices in fp64, so that an observation costs O((d_out + d_in) r (r + k)) for each layer instead of
O(d_out d_in k); a dense update is summed in its own precision (fp32 at least) and accumulated in fp64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..geometry.spectrum import singular_values


class Update(ABC):
    """dW (d_out, d_in) of one weight."""

    @abstractmethod
    def energies(self, U: Tensor, V: Tensor) -> Tensor:
        """||dW||^2, ||U^T dW||^2, ||dW V||^2 and ||U^T dW V||^2: (4,), fp64, on the update's device.

        For orthonormal ``U`` (d_out, k) and ``V`` (d_in, k) in fp32 at least. A tensor, so that a GPU is waited for
        once and not in each layer.
        """

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Some rows of dW, (len(index), d_in), fp32 at least."""

    @abstractmethod
    def dense(self) -> Tensor:
        """dW (d_out, d_in), fp32 at least, as exact as its parts."""

    @abstractmethod
    def values(self) -> Tensor:
        """The singular values of dW that can differ from zero, descending, fp64."""


class FactoredUpdate(Update):
    """dW = left @ right for ``left`` (d_out, R) and ``right`` (R, d_in); R = 0 is the zero update."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} do not multiply")
        self.left, self.right = left.detach(), right.detach()

    def energies(self, U: Tensor, V: Tensor) -> Tensor:
        left, right = self.left.double(), self.right.double()
        inside_left, inside_right = U.double().T @ left, right @ V.double()  # (k, R), (R, k)
        gram_left, gram_right = left.T @ left, right @ right.T  # (R, R): ||L M||^2 = <L^T L, M M^T>
        parts = (
            (gram_left * gram_right).sum(),
            ((inside_left.T @ inside_left) * gram_right).sum(),
            (gram_left * (inside_right @ inside_right.T)).sum(),
            (inside_left @ inside_right).square().sum(),
        )
        return torch.stack(parts).clamp_min(0)  # a Gram of an update that cancels rounds to either side of zero

    def rows(self, index: Tensor) -> Tensor:
        return self.left[index] @ self.right

    def dense(self) -> Tensor:
        return self.left.double() @ self.right.double()

    def values(self) -> Tensor:
        if self.left.shape[1] == 0:
            return torch.zeros(1, dtype=torch.float64)
        core_left = torch.linalg.qr(self.left.double(), mode="r")[1]
        core_right = torch.linalg.qr(self.right.double().T, mode="r")[1]
        return torch.linalg.svdvals(core_left @ core_right.T)


class DenseUpdate(Update):
    """dW as a matrix (d_out, d_in), fp32 at least."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))

    def energies(self, U: Tensor, V: Tensor) -> Tensor:
        matrix = self.matrix.to(U.dtype)  # products no finer than the bases: in fp64 they take twice as long
        inside = U.T @ matrix  # (k, d_in)
        parts = (self.matrix, inside, matrix @ V, inside @ V)
        return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts])

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index]

    def dense(self) -> Tensor:
        return self.matrix

    def values(self) -> Tensor:
        return singular_values(self.matrix)


def factored_difference(now: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor] | None) -> FactoredUpdate:
    """L R - L0 R0 of factors (d_out, R) and (R, d_in) without cancellation where the shapes agree.

    [L - L0, L0] [R; R - R0]: a small update of large factors keeps its digits, which the difference of the two
    products would lose. Where the ranks differ (other adapters are active now) there is no such form.
    """
    if start is None:
        return FactoredUpdate(*now)
    (left, right), (left0, right0) = now, start
    if left.shape == left0.shape:
        return FactoredUpdate(torch.cat([left - left0, left0], 1), torch.cat([right, right - right0], 0))
    return FactoredUpdate(torch.cat([left, -left0], 1), torch.cat([right, right0], 0))
