"""Two weights multiplied out together, chunk by chunk in fp32: Gram matrices, their difference, norms of the change.

"Tall" is the orientation with m >= n; a wide weight (``wide``) is read by columns, so that nothing is transposed in
memory. A chunk of an fp32 weight is that weight's own memory: nothing here works in place on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle, in the same memory; what lies above it is overwritten."""
    n = len(lower)
    width = -(-n // STRIPES)
    for left in range(0, n, width):
        right = min(n, left + width)
        square = lower[left:right, left:right].tril()
        lower[left:right, left:right] = square.add_(square.tril(-1).T)
        lower[left:right, right:] = lower[right:, left:right].T
    return lower


def gram_matrix(weight: Tensor, wide: bool) -> Tensor:
    """(n, n) fp32: A.T A of the tall orientation; only its lower triangle is multiplied out."""
    n = min(weight.shape)
    gram = torch.zeros(n, n, device=weight.device)
    width = -(-n // STRIPES)
    for _, (rows,) in row_chunks(weight, wide=wide):
        for left in range(0, n, width):
            right = min(n, left + width)
            gram[left:, left:right].addmm_(rows[:, left:].T, rows[:, left:right])
    return mirrored(gram)


def rotate(symmetric: Tensor, basis: Tensor) -> Tensor:
    """(n, n) fp32: basis.T @ symmetric @ basis; of the second product only the lower triangle is multiplied out."""
    n = len(basis)
    image, rotated = symmetric @ basis, torch.zeros_like(symmetric)
    width = -(-n // STRIPES)
    for left in range(0, n, width):
        right = min(n, left + width)
        torch.mm(basis[:, left:].T, image[:, left:right], out=rotated[left:, left:right])
    return mirrored(rotated)


def multiply(weight: Tensor, X: Tensor, wide: bool) -> Tensor:  # (n, c) -> (m, c) fp32
    result = torch.empty(max(weight.shape), X.shape[1], device=weight.device)
    for part, (rows,) in row_chunks(weight, wide=wide):
        torch.mm(rows, X, out=result[part])
    return result


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """W+ - W0 in bf16.

    Good for norms: each entry is rounded once, and one that is not zero stays so (fp32's subnormals aside).
    """
    change = torch.empty(base.shape, dtype=torch.bfloat16, device=base.device)
    if base.dtype == tuned.dtype == change.dtype:
        return torch.sub(tuned, base, out=change)
    step = max(1, chunk_entries(base.numel()) // base.shape[1])
    for part, before, after in zip(change.split(step), base.split(step), tuned.split(step), strict=True):
        part.copy_(after.to(torch.float32) - before.to(torch.float32))
    return change


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 matrices are quick."""
    if device.type != "cpu":
        return True
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def change_norm(change: Tensor, wide: bool, seed: int) -> float:
    """The largest singular value of the change (as :func:`difference` has it) by block Lanczos.

    Within 0.5 % from below: a spectrum that is flat at its top, as that of noise, settles slowly (0.3 % seen there).
    Rounding to bf16 is unbiased; it may take the norm above the true one, in small matrices by 1e-3 (3.3e-4 seen).
    Where bf16 products are slow, chunks are multiplied in fp32.
    """
    n, block = min(change.shape), 8
    tall = change.T if wide else change
    native = multiplies_bf16(change.device)

    def operator(X: Tensor) -> Tensor:
        if native:  # tall.T @ is several times slower than the transposed product
            return ((tall @ X.to(tall.dtype)).T @ tall).T.to(torch.float32)
        result = torch.zeros_like(X)
        for _, (rows,) in row_chunks(change, wide=wide):
            result.addmm_(rows.T, rows @ X)
        return result

    if n <= 4 * block:
        dense = operator(torch.eye(n, device=change.device))
        return math.sqrt(max(float(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1]), 0.0))
    start = gaussian(n, block, seed, change, torch.float32)
    found = leading_eigenpairs(operator, start, 1, extra=0, tolerance=NORM, max_dim=min(n, 160))
    return math.sqrt(max(float(found.values[0]), 0.0))


def frobenius(matrix: Tensor) -> float:
    """||W||_F, chunk by chunk in fp32; infinite where an entry is not finite."""
    step = max(1, chunk_entries(matrix.numel()) // matrix.shape[1])
    found = math.sqrt(sum(float(part.to(torch.float32).norm()) ** 2 for part in matrix.split(step)))
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
    return mirrored(gram)
