"""A low-rank product in as few columns as it needs."""

from __future__ import annotations

import torch
from torch import Tensor

# The discarded part of a product, relative to the whole, in the Frobenius norm: what one rounding to fp32 costs.
TOLERANCE = torch.finfo(torch.float32).eps


def recompress(
    left: Tensor,  # (d_out, R)
    right: Tensor,  # (R, d_in)
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Factors (d_out, r), (r, d_in) of the same product, r the least for which what is cut off stays below tolerance.

    ``tolerance`` is ‖cut off‖ / ‖left @ right‖ (Frobenius). Computed in fp64 by QR of both factors and an SVD of the
    (R, R) core, returned in the input's dtype, each factor carrying the square roots of the singular values. r is at
    least 1; a zero product gives zero factors.
    """
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double().T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[i]: the norm of what rank i leaves out
    r = max(1, int((tails > tolerance * tails[0]).sum()))
    root = S[:r].sqrt()
    return (Q_left @ (U[:, :r] * root)).to(left.dtype), ((root[:, None] * Vh[:r]) @ Q_right.T).to(right.dtype)


def product_error(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> float:
    """‖left @ right − other_left @ other_right‖ / ‖left @ right‖ (Frobenius), without forming a product.

    0 where both are zero. Computed in fp64 on the QR factors, so that two nearly equal products do not cancel.
    """
    whole = _norm(left.double(), right.double())
    difference = _norm(
        torch.cat([left.double(), -other_left.double()], dim=1), torch.cat([right.double(), other_right.double()])
    )
    return difference / whole if whole else difference


def _norm(left: Tensor, right: Tensor) -> float:
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())
