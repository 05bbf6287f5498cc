"""Where the trained entries of a matrix lie, and the four things that are done there.

A layout maps packed values (count,) to entries of a dense (rows, columns) matrix: gather, scatter, the entries of a
gradient ``left.T @ right``, and which columns of ``left`` and ``right`` that gradient needs. Only structure avoids
work in the gradient: rows, columns and blocks compute their part of the product alone, single entries compute 256-row
blocks of it and keep what the mask names. ``index_select``, ``index_copy_`` and, for single entries, a ``scatter_``
on all threads are what is fast; boolean indexing and ``masked_select`` cost 3 to 300 times as much on CPU.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .gradient_memory import GradientMemory
from .scatter import scatter_unique_

ROW_BLOCK = 256  # least rows of the product held at once; fewer slow down ten times under contention
BLOCK_ENTRIES = 1 << 21  # most entries of it, and an eighth of the matrix at most
CHUNK = 524_288  # entries converted to int64 at a time: ``index_copy_`` and ``scatter_`` refuse int32


class Layout(ABC):
    """Packed entries of a (rows, columns) matrix."""

    shape: tuple[int, int]
    count: int  # trained entries
    slots: int  # length of a packed vector; more than the entries in a dense layout alone
    memory: GradientMemory

    def __init__(self, shape: tuple[int, int], count: int, slots: int | None = None) -> None:
        self.shape, self.count, self.memory = shape, count, GradientMemory()
        self.slots = count if slots is None else slots

    def compress(self, values: Tensor) -> Tensor:  # (slots,) -> (count,)
        """The trained entries' values in row-major order of their positions, or of their stripes or blocks."""
        return values

    def expand(self, values: Tensor) -> Tensor:  # (count,) -> (slots,)
        """The inverse of :meth:`compress`, with zeros in what is not trained."""
        return values

    @abstractmethod
    def units(self) -> Tensor:
        """The chosen units, bool: (rows, columns), (rows,), (columns,) or a grid of blocks."""

    @abstractmethod
    def gather(self, matrix: Tensor) -> Tensor:
        """(rows, columns) contiguous -> packed (count,), same dtype."""

    @abstractmethod
    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        """The ``count`` packed values of one chunk."""

    @abstractmethod
    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        """Slices of the packed values with what :meth:`gather_chunk` and :meth:`scatter_chunk_` take.

        The index lives in one buffer that the next chunk overwrites: use a chunk before asking for the next.
        """

    @abstractmethod
    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        """Write one chunk of packed values into the matrix. The values' memory may be used for the work."""

    @abstractmethod
    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Packed entries (count,), fp32, of ``left.T @ right`` for what :meth:`needed` left of the two."""

    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes that the layout itself holds."""

    def needed_left(self, left: Tensor) -> Tensor:  # (tokens, rows) -> (tokens, used rows)
        return left

    def needed_right(self, right: Tensor) -> Tensor:  # (tokens, columns) -> (tokens, used columns)
        return right

    def scatter_(self, matrix: Tensor, values: Tensor) -> None:
        """Write packed values (count,) in the matrix's dtype into a contiguous (rows, columns) matrix."""
        for part, where in self.chunks():
            self.scatter_chunk_(matrix, where, values[part])

    def mask(self, device: torch.device | None = None) -> Tensor:
        """The entries as a boolean (rows, columns) matrix."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=device)
        self.scatter_(mask, torch.ones(self.slots, dtype=torch.bool, device=device))
        return mask

    @abstractmethod
    def to(self, device: torch.device) -> Layout:
        """The same layout with its index on ``device``."""


def row_block(shape: tuple[int, int]) -> int:
    """How many rows of the weight gradient are computed at once: larger products are faster, and held in memory."""
    rows, columns = shape
    return max(ROW_BLOCK, min(BLOCK_ENTRIES // columns, rows // 8))


class ElementLayout(Layout):
    """Single entries, by sorted row-major positions."""

    def __init__(self, shape: tuple[int, int], indices: Tensor) -> None:  # indices (count,) int32
        super().__init__(shape, indices.numel())
        self.indices, self.rows = indices, row_block(shape)
        edges = torch.arange(0, shape[0] + self.rows, self.rows).clamp_max(shape[0]) * shape[1]
        self.bounds: list[int] = torch.searchsorted(indices, edges.to(indices.device)).tolist()

    def units(self) -> Tensor:
        return self.mask(self.indices.device)

    def gather(self, matrix: Tensor) -> Tensor:
        return matrix.view(-1).index_select(0, self.indices)

    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        positions = torch.empty(min(CHUNK, self.count), dtype=torch.int64, device=self.indices.device)
        for start in range(0, self.count, CHUNK):
            part = slice(start, min(start + CHUNK, self.count))
            yield part, (0, positions[: part.stop - start].copy_(self.indices[part]))

    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        return matrix.view(-1).index_select(0, where[1])

    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        scatter_unique_(matrix.view(-1), where[1], values)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        out = self.memory.empty(self.count, left.device)
        most = max(high - low for low, high in itertools.pairwise(self.bounds))
        inside = torch.empty(most, dtype=torch.int32, device=left.device)
        for block, (low, high) in enumerate(itertools.pairwise(self.bounds)):
            if low == high:
                continue
            first = block * self.rows
            product = left[:, first : first + self.rows].T @ right  # (rows, columns)
            positions = torch.sub(self.indices[low:high], first * self.shape[1], out=inside[: high - low])
            out[low:high] = product.view(-1).index_select(0, positions)
        return out

    def index_bytes(self) -> int:
        return self.indices.numel() * self.indices.element_size()

    def to(self, device: torch.device) -> ElementLayout:
        if self.indices.device == device:
            return self
        moved = copy.copy(self)
        moved.indices = self.indices.to(device)
        return moved


class _StripeLayout(Layout):
    """Whole rows or whole columns; packed row-major within the chosen stripes."""

    dimension: int  # along which stripes are chosen

    def __init__(self, shape: tuple[int, int], stripes: Tensor) -> None:  # stripes (n,) int64, sorted
        super().__init__(shape, len(stripes) * shape[1 - self.dimension])
        self.stripes = stripes.to(torch.int64)

    def units(self) -> Tensor:
        units = torch.zeros(self.shape[self.dimension], dtype=torch.bool, device=self.stripes.device)
        units[self.stripes] = True
        return units

    def gather(self, matrix: Tensor) -> Tensor:
        return matrix.index_select(self.dimension, self.stripes).view(-1)

    def index_bytes(self) -> int:
        return self.stripes.numel() * self.stripes.element_size()

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        product = left.T @ right
        if product.dtype == torch.float32:
            return product.view(-1)
        out = self.memory.empty(self.count, left.device)
        return out.copy_(product.view(-1))

    def to(self, device: torch.device) -> _StripeLayout:
        return self if self.stripes.device == device else type(self)(self.shape, self.stripes.to(device))


class RowLayout(_StripeLayout):
    dimension = 0

    def needed_left(self, left: Tensor) -> Tensor:
        return left.index_select(1, self.stripes)

    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        step = max(1, CHUNK // self.shape[1])
        for start in range(0, len(self.stripes), step):
            rows = self.stripes[start : start + step]
            yield slice(start * self.shape[1], (start + len(rows)) * self.shape[1]), (0, rows)

    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        return matrix.index_select(0, where[1]).view(-1)

    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        matrix.index_copy_(0, where[1], values.view(-1, self.shape[1]))


class ColumnLayout(_StripeLayout):
    dimension = 1

    def needed_right(self, right: Tensor) -> Tensor:
        return right.index_select(1, self.stripes)

    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        width = len(self.stripes)
        step = max(1, CHUNK // width)
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            yield slice(first * width, last * width), (first, self.stripes)

    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        first, columns = where
        return matrix[first : first + count // len(columns)].index_select(1, columns).view(-1)

    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        first, columns = where
        values = values.view(-1, len(columns))
        matrix[first : first + len(values)].index_copy_(1, columns, values)


class BlockLayout(Layout):
    """Square blocks of a (block-row, block-column) grid; packed block-row by block-row, each row-major."""

    def __init__(self, shape: tuple[int, int], blocks: Tensor, side: int) -> None:  # blocks (grid) bool
        self.blocks, self.side = blocks, side
        self.groups: list[tuple[slice, Tensor | None, list[tuple[int, int, int, Tensor]]]] | None = None
        expanded = blocks.repeat_interleave(side, 1)[:, : shape[1]]
        self.columns = [row.nonzero().squeeze(1) for row in expanded]  # int64 per block row
        self.heights = [min(side, shape[0] - i * side) for i in range(blocks.shape[0])]
        self.sizes = [h * len(c) for h, c in zip(self.heights, self.columns, strict=True)]
        super().__init__(shape, sum(self.sizes))

    def units(self) -> Tensor:
        return self.blocks

    def _rows(self) -> Iterator[tuple[int, int, int, Tensor]]:
        offset = 0
        for i, (height, columns, size) in enumerate(zip(self.heights, self.columns, self.sizes, strict=True)):
            if size:
                yield offset, i * self.side, height, columns
            offset += size

    def gather(self, matrix: Tensor) -> Tensor:
        return torch.cat([matrix[r : r + h].index_select(1, c).view(-1) for _, r, h, c in self._rows()])

    def chunks(self) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
        for offset, row, height, columns in self._rows():
            yield slice(offset, offset + height * len(columns)), (row, columns)

    def gather_chunk(self, matrix: Tensor, where: tuple[int, Tensor], count: int) -> Tensor:
        row, columns = where
        return matrix[row : row + count // len(columns)].index_select(1, columns).view(-1)

    def scatter_chunk_(self, matrix: Tensor, where: tuple[int, Tensor], values: Tensor) -> None:
        row, columns = where
        values = values.view(-1, len(columns))
        matrix[row : row + len(values)].index_copy_(1, columns, values)

    def _groups(self) -> Iterator[tuple[slice, Tensor | None, list[tuple[int, int, int, Tensor]]]]:
        """Block rows that are multiplied together: rows, the columns any of them uses (None: most), the members.

        A member is (offset, first row in the group, height, columns among the group's).
        """
        together = max(1, ROW_BLOCK // self.side)
        members = list(self._rows())
        for first in range(0, self.shape[0], together * self.side):
            inside = [m for m in members if first <= m[1] < first + together * self.side]
            if not inside:
                continue
            used = torch.zeros(self.shape[1], dtype=torch.bool, device=self.blocks.device)
            for *_, columns in inside:
                used[columns] = True
            rows = slice(first, min(first + together * self.side, self.shape[0]))
            if float(used.float().mean()) > 0.75:
                yield rows, None, [(o, r - first, h, c) for o, r, h, c in inside]
            else:
                place = used.cumsum(0) - 1
                union = used.nonzero().squeeze(1)
                yield rows, union, [(o, r - first, h, place[c]) for o, r, h, c in inside]

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        if self.groups is None:
            self.groups = list(self._groups())
        out = self.memory.empty(self.count, left.device)
        for rows, union, members in self.groups:
            product = left[:, rows].T @ (right if union is None else right.index_select(1, union))
            for offset, first, height, columns in members:
                part = product[first : first + height].index_select(1, columns)
                out[offset : offset + part.numel()] = part.view(-1)
        return out

    def index_bytes(self) -> int:
        return sum(c.numel() * c.element_size() for c in self.columns)

    def to(self, device: torch.device) -> BlockLayout:
        return self if self.blocks.device == device else BlockLayout(self.shape, self.blocks.to(device), self.side)


def layout_of(units: Tensor, shape: tuple[int, int], structure: str, *, side: int = 64, dense: bool = False) -> Layout:
    """The layout of the chosen units (see :mod:`offprincipal_peft.geometry.masks`) in a (rows, columns) matrix.

    ``dense`` asks for :class:`~.dense_layout.DenseLayout` where the units are single elements.

    Raises ``ValueError`` for an empty choice and for a matrix past 2^31 entries, whose positions int32 cannot hold.
    """
    if not bool(units.any()):
        raise ValueError(f"no {structure} of the {shape[0]} x {shape[1]} matrix is chosen: there is nothing to train")
    if structure == "element":
        if shape[0] * shape[1] > torch.iinfo(torch.int32).max:
            raise ValueError(f"a {shape[0]} x {shape[1]} matrix has more entries than int32 positions can name")
        if dense:
            from .dense_layout import DenseLayout

            return DenseLayout(shape, units)
        return ElementLayout(shape, units.reshape(-1).nonzero().squeeze(1).to(torch.int32))
    if structure == "block":
        return BlockLayout(shape, units, side)
    stripes = units.nonzero().squeeze(1)
    return RowLayout(shape, stripes) if structure == "row" else ColumnLayout(shape, stripes)
