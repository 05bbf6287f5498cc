"""Write packed values into a dense weight: ``W = round(W0 + delta)`` on the layout's entries, in chunks.

Chunks keep the int64 indices, which ``index_copy_`` insists on, and the fp32 sums small enough for the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout


@torch.no_grad()
def write_sum_(matrix: Tensor, layout: Layout, original: Tensor, delta: Tensor) -> None:
    """In place ``matrix[entries] = round(original + delta)``, the sum in ``delta``'s dtype.

    Args:
        matrix: (rows, columns), contiguous, any floating dtype.
        layout: the entries.
        original: (count,) in the matrix's dtype, the entries' values without the update.
        delta: (count,) fp32 (or wider).

    Raises ``ValueError`` where sizes or dtypes do not belong together; nothing is written then.
    """
    if tuple(matrix.shape) != layout.shape:
        raise ValueError(f"the layout is of a {layout.shape} matrix, the weight is {tuple(matrix.shape)}")
    if original.shape != (layout.count,) or delta.shape != (layout.count,):
        raise ValueError(
            f"the layout has {layout.count} entries, but {tuple(original.shape)} originals and {tuple(delta.shape)} "
            "updates were given"
        )
    if original.dtype != matrix.dtype:
        raise ValueError(f"the originals are {original.dtype}, the weight is {matrix.dtype}")
    for part, where in layout.chunks():
        layout.scatter_chunk_(matrix, where, (original[part].to(delta.dtype) + delta[part]).to(matrix.dtype))
