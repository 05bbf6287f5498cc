"""A matrix in tiles of bounded size, and where in it the changed entries are: by row, by column, by cell of a map."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .results import Map

ENTRIES = 1 << 18  # of a tile: its fp64 squares, 2 MB, stay in the processor's cache


@dataclass(frozen=True)
class Tile:
    """Whole rows of a matrix; of a row that is longer than a tile, a part. Either way a run in flat order."""

    rows: slice
    columns: slice
    start: int  # of its entries in flat order
    stop: int

    def of(self, matrix: Tensor) -> Tensor:  # (d_out, d_in) -> (rows, columns), contiguous
        return matrix[self.rows, self.columns].contiguous()


def tiles(shape: tuple[int, int], entries: int | None = None) -> Iterator[Tile]:
    """Tiles of at most ``entries`` entries that cover a (d_out, d_in) matrix in flat order; none where it is empty."""
    d_out, d_in = shape
    entries = entries or ENTRIES
    if not d_out or not d_in:
        return
    height, width = max(1, entries // d_in), min(d_in, entries)
    for top in range(0, d_out, height):
        bottom = min(top + height, d_out)
        for left in range(0, d_in, width):
            right = min(left + width, d_in)
            yield Tile(slice(top, bottom), slice(left, right), top * d_in + left, (bottom - 1) * d_in + right)


def edges(length: int, runs: int) -> list[int]:
    """[0, … length]: where min(runs, length) runs of neighbours begin and end, their lengths equal or one apart."""
    count = min(runs, length)
    return [i * length // count for i in range(count + 1)]


def run_means(values: Tensor, runs: int) -> list[float]:  # (n,) fp64, n > 0
    """Means over at most ``runs`` runs of neighbours, in order."""
    bounds = torch.tensor(edges(values.numel(), runs), device=values.device)
    lengths = bounds.diff()
    places = torch.arange(lengths.numel(), device=values.device).repeat_interleave(lengths)
    sums = values.new_zeros(lengths.numel()).index_add_(0, places, values)
    return list((sums / lengths).tolist())


class Grid:
    """Sums of flags over rows, columns and the cells of a grid, at most ``cells`` by ``cells`` of one size.

    Sizes differ by one row or column where the shape does not divide.
    """

    def __init__(self, shape: tuple[int, int], cells: int = 64, device: torch.device | None = None) -> None:
        self.shape = shape
        self.row_edges, self.column_edges = (edges(length, cells) for length in shape)
        self.rows, self.columns = (torch.zeros(length, dtype=torch.float64, device=device) for length in shape)
        self.cells = torch.zeros(
            len(self.row_edges) - 1, len(self.column_edges) - 1, dtype=torch.float64, device=device
        )
        widths = torch.tensor(self.column_edges, device=device).diff()
        self._column_cell = torch.arange(widths.numel(), device=device).repeat_interleave(widths)

    def add(self, tile: Tile, flags: Tensor) -> None:
        """``flags``: fp32 0 or 1, the tile's shape. Sums are exact: they stay below 2^24 in fp32."""
        self.rows[tile.rows] += flags.sum(dim=1)
        top, last = tile.rows.start, tile.rows.stop
        cell = bisect.bisect_right(self.row_edges, top) - 1
        while top < last:
            bottom = min(self.row_edges[cell + 1], last)
            sums = flags[top - tile.rows.start : bottom - tile.rows.start].sum(dim=0).double()
            self.columns[tile.columns] += sums
            self.cells[cell].index_add_(0, self._column_cell[tile.columns], sums)
            top, cell = bottom, cell + 1

    def map(self, heads: tuple[list[int], list[int]] = ([], [])) -> Map:
        """The share of flagged entries of each cell, 255 for all."""
        heights, widths = (
            torch.tensor(bounds, device=self.cells.device).diff() for bounds in (self.row_edges, self.column_edges)
        )
        shares = self.cells / (heights[:, None] * widths)
        return Map((shares * 255).round().to(torch.uint8).cpu(), *heads)
