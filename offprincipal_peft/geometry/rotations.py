"""Random orthogonal matrices for the channels of a head, in fp64; for a seed the same everywhere, up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def haar_rotation(head_dim: int, seed: int, *, heads: int | None = None) -> Tensor:
    """A uniformly random orthogonal matrix (head_dim, head_dim), or `heads` of them (heads, head_dim, head_dim); fp64.

    Raises ``ValueError`` for sizes under 1. Source: Mezzadri (math-ph/0609050): QR of a Gaussian, signs fixed.
    """
    count = _count(head_dim, heads)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, head_dim, head_dim, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(drawn)
    found = Q * torch.where(R.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).double()[:, None]
    return found if heads is not None else found[0]


def hadamard_rotation(head_dim: int, seed: int, *, heads: int | None = None) -> Tensor:
    """A Hadamard matrix with random signs on its rows, over sqrt(head_dim): fp64, sizes as :func:`haar_rotation`.

    Every entry is +-1 / sqrt(head_dim), so one channel spreads evenly over all. Orders: 2^m, and a power of two times
    p + 1 (p a prime, 3 modulo 4) or 2 (p + 1) (p a prime, 1 modulo 4); 64, 72, 80, 96, 112, 128, 160, 256 among them.

    Raises ``ValueError`` for an order that no Hadamard matrix has, or that these constructions do not reach.
    Source: Paley (1933).
    """
    count = _count(head_dim, heads)
    matrix = _hadamard(head_dim)
    if matrix is None:
        why = (
            "there is none: an order is 1, 2 or a multiple of 4"
            if head_dim % 4
            else "neither doubling nor Paley has it"
        )
        raise ValueError(f"no Hadamard matrix of order {head_dim} ({why}); use haar_rotation")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, head_dim, 1), generator=generator).double() * 2 - 1
    found = signs * matrix / math.sqrt(head_dim)
    return found if heads is not None else found[0]


def _count(head_dim: int, heads: int | None) -> int:
    if head_dim < 1 or (heads is not None and heads < 1):
        raise ValueError(f"head_dim and heads must be at least 1, got {head_dim} and {heads}")
    return 1 if heads is None else heads


def _hadamard(order: int) -> Tensor | None:
    """Entries +-1, H^T H = order I; None where no construction here gives the order."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):  # then it is 3 modulo 4
        skew = _bordered(order - 1, -1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        symmetric, eye = _bordered(order // 2 - 1, 1.0), torch.eye(order // 2, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(eye, minus)
    half = _hadamard(order // 2) if order % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def _bordered(p: int, sign: float) -> Tensor:
    """Paley's conference matrix (p + 1, p + 1): quadratic residues of i - j, a first row of 1 and column of `sign`."""
    character = torch.full((p,), -1.0, dtype=torch.float64)
    character[[i * i % p for i in range(p)]] = 1.0
    character[0] = 0.0
    places = torch.arange(p)
    matrix = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(places[:, None] - places[None]) % p]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))
