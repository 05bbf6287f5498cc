"""Which of several tuned checkpoints changed an entry: one bit for each of them, and what the bits say of all pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry.drift import independent_counts, jaccard_baseline
from .results import Agreement
from .tiles import ENTRIES, Grid, tiles

MOST = 30  # checkpoints; the sign bit of int32 stays free
_HISTOGRAM = 16  # checkpoints up to which every pattern has a bin


class Patterns:
    """A bit-field for every entry of one weight: 1 byte for up to 8 tuned checkpoints, 2 for 15, 4 for 30.

    Raises ``ValueError`` for fewer than two checkpoints or more than 30.
    """

    def __init__(self, shape: Sequence[int], count: int, device: torch.device | None = None) -> None:
        if not 2 <= count <= MOST:
            raise ValueError(f"agreement is between 2 to {MOST} tuned checkpoints, got {count}")
        self.shape, self.count = tuple(shape), count
        dtype = torch.uint8 if count <= 8 else torch.int16 if count <= 15 else torch.int32
        self.codes = torch.zeros(math.prod(shape), dtype=dtype, device=device)

    def mark(
        self,
        index: int,
        start: int,
        flags: Tensor,  # fp32, 0 or 1, any shape: entries in flat order
    ) -> None:
        """Set the bit of checkpoint ``index`` where ``flags`` is 1, from entry ``start`` on."""
        bits = (flags.reshape(-1) * float(1 << index)).to(self.codes.dtype)  # exact: one bit
        self.codes[start : start + bits.numel()].bitwise_or_(bits)

    def agreement(self, heads: tuple[list[int], list[int]] = ([], []), map_cells: int = 64) -> Agreement | None:
        """Jaccard indices and frequencies as :func:`geometry.consensus` of the masks, without the masks.

        A pair of checkpoints that both left the weight as it was has no index and is left out; None where no pair has
        one. The map, of entries that every checkpoint changed, is that of a matrix: None for another shape.
        """
        together, frequencies = self._histogram() if self.count <= _HISTOGRAM else self._products()
        n = self.codes.numel()
        pairs = []
        for i, j in itertools.combinations(range(self.count), 2):
            either = together[i][i] + together[j][j] - together[i][j]
            if either:
                baseline = jaccard_baseline(together[i][i] / n, together[j][j] / n)
                pairs.append((i, j, together[i][j] / either, baseline))
        if not pairs:
            return None
        return Agreement(
            jaccard=math.fsum(pair[2] for pair in pairs) / len(pairs),
            baseline=math.fsum(pair[3] for pair in pairs) / len(pairs),
            pairs=pairs,
            frequencies=frequencies,
            expected=[n * share for share in independent_counts([together[i][i] / n for i in range(self.count)])],
            map=self._map(map_cells).map(heads) if len(self.shape) == 2 else None,
        )

    def _histogram(self) -> tuple[list[list[int]], list[int]]:
        """Entries changed by both of each pair (n, n), and by exactly 0, 1, … n."""
        counts = torch.zeros(1 << self.count, dtype=torch.int64, device=self.codes.device)
        for part in self.codes.split(ENTRIES):
            counts += torch.bincount(part, minlength=counts.numel())
        bits = _bits(torch.arange(counts.numel(), device=counts.device), self.count)
        times = torch.bincount(bits.sum(dim=0).long(), weights=counts.double(), minlength=self.count + 1)
        return _integers((bits * counts) @ bits.T), _integers(times)

    def _products(self) -> tuple[list[list[int]], list[int]]:
        """As :meth:`_histogram`, for so many checkpoints that their patterns cannot all have a bin."""
        together = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.codes.device)
        times = torch.zeros(self.count + 1, dtype=torch.int64, device=self.codes.device)
        for part in self.codes.split(ENTRIES // 16):
            bits = _bits(part, self.count)
            together += bits @ bits.T
            times += torch.bincount(bits.sum(dim=0).long(), minlength=self.count + 1)
        return _integers(together), _integers(times)

    def _map(self, cells: int) -> Grid:
        shape = (self.shape[0], self.shape[1])
        grid, codes = Grid(shape, cells, self.codes.device), self.codes.view(shape)
        for tile in tiles(shape):
            grid.add(tile, (tile.of(codes) == (1 << self.count) - 1).float())
        return grid


def _bits(codes: Tensor, count: int) -> Tensor:  # (n,) integers -> (count, n) fp64, 0 or 1: counts in fp64 are exact
    return torch.stack([(codes >> i) & 1 for i in range(count)]).double()


def _integers(values: Tensor) -> list[Any]:
    return list(values.round().long().tolist())
