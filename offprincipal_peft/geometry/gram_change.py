"""Two weights multiplied out together, chunk by chunk in fp32: Gram matrices, their difference, norms of the change.

"Tall" is the orientation with m >= n; a wide weight (``wide``) is read by columns, so that nothing is transposed in
memory. A chunk of an fp32 weight is that weight's own memory: nothing here works in place on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .krylov import gaussian, leading_eigenpairs

CHUNK = 1 << 18  # entries that are converted at a time, or a sixteenth of the weight
NORM = 3e-2  # relative residual at which the largest singular value of a change counts as found
STRIPES = 4  # a Gram matrix' lower triangle is formed in so many column stripes: 5/8 of the products


def chunk_entries(entries: int) -> int:
    """How many of a weight's entries are held in another dtype at once."""
    return max(CHUNK, entries // 16)


def row_chunks(*weights: Tensor, wide: bool) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row chunks of the tall orientation in fp32."""
    m, n = max(weights[0].shape), min(weights[0].shape)
    step = max(1, chunk_entries(m * n) // n)
    for start in range(0, m, step):
        part = slice(start, min(m, start + step))
        yield part, [(w[:, part].T if wide else w[part]).to(torch.float32) for w in weights]


def gram_matrix(weight: Tensor, wide: bool) -> Tensor:
    """(n, n) fp32: A.T A of the tall orientation; only its lower triangle is multiplied out."""
    n = min(weight.shape)
    gram = torch.zeros(n, n, device=weight.device)
    width = -(-n // STRIPES)
    for _, (rows,) in row_chunks(weight, wide=wide):
        for left in range(0, n, width):
            right = min(n, left + width)
            gram[left:, left:right].addmm_(rows[:, left:].T, rows[:, left:right])
    lower = gram.tril_()
    return lower.add_(lower.tril(-1).T)


def multiply(weight: Tensor, X: Tensor, wide: bool) -> Tensor:  # (n, c) -> (m, c) fp32
    result = torch.empty(max(weight.shape), X.shape[1], device=weight.device)
    for part, (rows,) in row_chunks(weight, wide=wide):
        torch.mm(rows, X, out=result[part])
    return result


def change_norm(base: Tensor, tuned: Tensor, wide: bool, seed: int) -> float:
    """||W+ - W0||_2 by block Lanczos on the difference, which is held in fp32.

    From below, within 0.5 %: a spectrum that is flat at its top, as that of noise, settles slowly (0.3 % seen there).
    """
    n, block = min(base.shape), 8
    change = torch.empty(max(base.shape), n, device=base.device)
    for part, (before, after) in row_chunks(base, tuned, wide=wide):
        torch.sub(after, before, out=change[part])

    def operator(X: Tensor) -> Tensor:
        return ((change @ X).T @ change).T  # change.T @ is several times slower

    if n <= 4 * block:
        dense = operator(torch.eye(n, device=base.device))
        return math.sqrt(max(float(torch.linalg.eigvalsh(dense)[-1]), 0.0))
    start = gaussian(n, block, seed, base, torch.float32)
    found = leading_eigenpairs(operator, start, 1, extra=0, tolerance=NORM, max_dim=min(n, 160))
    return math.sqrt(max(float(found.values[0]), 0.0))


def relative_size(weight: Tensor, tuned: Tensor, wide: bool) -> float:
    """||W+ - W0||_F / ||W0||_F; infinite where an entry is not finite."""
    change = size = 0.0
    for _, (before, after) in row_chunks(weight, tuned, wide=wide):
        change += float((after - before).norm()) ** 2
        size += float(before.norm()) ** 2
    found = math.sqrt(change / size)
    return found if math.isfinite(found) else math.inf


def gram_change(weight: Tensor, tuned: Tensor, wide: bool) -> Tensor:
    """A+.T A+ - A.T A as the symmetric part of (A+ + A).T (A+ - A): its rounding is relative to the change."""
    n = min(weight.shape)
    gram = torch.zeros(n, n, device=weight.device)
    width = -(-n // STRIPES)
    for _, (before, after) in row_chunks(weight, tuned, wide=wide):
        change, total = after - before, after + before
        for left in range(0, n, width):
            right = min(n, left + width)
            gram[left:, left:right].addmm_(total[:, left:].T, change[:, left:right], alpha=0.5)
            gram[left:, left:right].addmm_(change[:, left:].T, total[:, left:right], alpha=0.5)
    lower = gram.tril_()
    return lower.add_(lower.tril(-1).T)
