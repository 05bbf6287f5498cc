"""Scatter to sorted, unique positions on all CPU threads.

torch runs a one-dimensional ``scatter_`` on one thread, because positions might repeat, and ``index_copy_`` at half its
speed. Ours never repeat, so the list is cut in as many rows as there are threads and scattered along the second
dimension of a view whose row r is the vector from its r-th entry on; rows are what torch distributes. Row r's positions
are counted from r. Two of the view's rows overlap in memory but never in the entries that they write.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32}
_PER_ROW = 16_384  # entries that are worth a thread


def scatter_unique_(flat: Tensor, positions: Tensor, values: Tensor) -> None:
    """In place ``flat[positions] = values``.

    Args:
        flat: (n,) contiguous, of 16 or 32 bits where on a CPU.
        positions: (count,) int64, strictly increasing, contiguous; changed while this runs, the same afterwards.
        values: (count,) of the vector's dtype. Bits are copied: NaN payloads survive.
    """
    integer = _INTEGERS.get(flat.element_size())
    if flat.device.type != "cpu" or integer is None:
        flat.index_copy_(0, positions, values)
        return
    flat, values = flat.view(integer), values.view(integer)
    rows = min(torch.get_num_threads(), positions.numel() // _PER_ROW)
    done = 0
    if rows > 1:
        width = positions.numel() // rows
        done = rows * width
        from_row = positions[:done].view(rows, width)
        for row in range(1, rows):
            from_row[row] -= row
        shifted = flat.as_strided((rows, flat.numel() - rows + 1), (1, 1), flat.storage_offset())
        shifted.scatter_(1, from_row, values[:done].view(rows, width))
        for row in range(1, rows):
            from_row[row] += row
    if done < positions.numel():
        flat.scatter_(0, positions[done:], values[done:])
