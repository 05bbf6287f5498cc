"""Single entries of a matrix, most of which are trained: one slot for every entry, and a mask.

Above about 60 % density, naming entries costs more than carrying the others along: a position is 4 bytes, gathers and
scatters move one entry at a time. Here packed vectors have a slot for every entry of the matrix, frozen slots included,
and everything is done in order with bit masks. That takes 16 bytes for every entry of the matrix (update 4, moments 8,
original 2, mask 2) where packing takes 18 for every trained one. Frozen entries receive a zero gradient, and whatever
an optimiser makes of it, they are never written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import Layout, row_block

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DenseLayout(Layout):
    """A mask over all entries; packed vectors are the matrix in row-major order."""

    def __init__(self, shape: tuple[int, int], units: Tensor) -> None:  # units (rows, columns) bool
        super().__init__(shape, int(units.sum()), units.numel())
        self.bits = units.view(shape).to(torch.int16).neg_()  # 0 or -1: all bits unset or set, in any width
        self.rows = row_block(shape)

    def units(self) -> Tensor:
        return self.bits.bool()

    def mask(self, device: torch.device | None = None) -> Tensor:
        return self.bits.to(device or self.bits.device).bool()

    def compress(self, values: Tensor) -> Tensor:
        return values.view(-1).index_select(0, self._positions())

    def expand(self, values: Tensor) -> Tensor:
        out = torch.zeros(self.slots, dtype=values.dtype, device=self.bits.device)
        return out.index_copy_(0, self._positions(), values.to(self.bits.device))

    def _positions(self) -> Tensor:
        return self.bits.view(-1).nonzero().squeeze(1)

    def gather(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1).clone()

    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        columns = self.shape[1]
        for first in range(0, self.shape[0], self.rows):
            rows = self.bits[first : first + self.rows]
            yield slice(first * columns, first * columns + rows.numel()), (first, rows)

    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        return matrix[where[0] : where[0] + len(where[1])].reshape(-1).clone()

    def scatter_(self, matrix: Tensor, values: Tensor) -> None:
        for part, where in self.chunks():
            self.scatter_chunk_(matrix, where, values[part].clone())

    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        """Exchange the masked entries' bits: old ^ ((old ^ new) & mask). The others' bits are written back as read."""
        integer = _INTEGERS[matrix.element_size()]
        old = matrix[where[0] : where[0] + len(where[1])].view(integer)
        change = values.view(integer).view(old.shape).bitwise_xor_(old)
        old.bitwise_xor_(change.bitwise_and_(where[1].to(integer)))

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        out = self.memory.empty(self.slots, left.device)
        for part, (first, bits) in self.chunks():
            product = left[:, first : first + len(bits)].T @ right
            integer = _INTEGERS[product.element_size()]
            product.view(integer).bitwise_and_(bits.to(integer))
            out[part] = product.view(-1)
        return out

    def index_bytes(self) -> int:
        return self.bits.numel() * self.bits.element_size()

    def to(self, device: torch.device) -> DenseLayout:
        if self.bits.device == device:
            return self
        moved = copy.copy(self)
        moved.bits = self.bits.to(device)
        return moved
