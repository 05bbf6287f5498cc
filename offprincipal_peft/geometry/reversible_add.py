"""Add a low-rank update to a weight in its own dtype so that it can be taken out again, bit for bit.

``W' = round(W + LR)`` loses bits of ``W``. Subtracting the update again and rounding recovers most entries, because
the rounding error of ``W'`` is at most half an ULP unless the sum crossed into a coarser binade. The record kept
while merged is therefore the update's factors and only those entries of ``W`` that the subtraction does not recover
*with a margin*: the margin covers what another thread count, memory alignment or device would change in the product
``LR``. Where that list would be larger than the weight itself, the weight is kept instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import full_precision

_CHUNK = 1 << 22  # entries of the product held at once
_BLOCK = 1 << 16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Start(NamedTuple):
    """A frozen pair that a record refers to without a copy: adds ``scale * left @ (right_rows - right)``."""

    rows: slice  # which rows of the record's `right`
    left: Tensor  # (d_out, r)
    right: Tensor  # (r, d_in)
    scale: float


@dataclass
class MergeRecord:
    """What is needed to restore a (d_out, d_in) weight after :func:`add_low_rank_`.

    Either the entries that subtraction does not recover (row-major flat positions, as 16-bit offsets in blocks of
    65536 with a count per block, and their original values) or the whole ``original`` weight.
    """

    shape: tuple[int, int]
    left: Tensor  # (d_out, R)
    right: Tensor  # (R, d_in)
    starts: tuple[Start, ...]
    offsets: Tensor  # (n,) int16: position mod 65536, less 32768
    block_counts: Tensor  # (ceil(d_out d_in / 65536),) int32
    values: Tensor  # (n,) in the weight's dtype
    original: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held while merged, on top of the starts that the caller keeps anyway."""
        held = (self.left, self.right, self.offsets, self.block_counts, self.values, self.original)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The whole update's factors in ``dtype``, starts included."""
        left, right = [self.left.to(dtype)], [self.right.to(dtype)]
        for start in self.starts:
            left.append(start.left.to(dtype))
            right.append((right[0][start.rows] - start.right.to(dtype)) * start.scale)
        return torch.cat(left, dim=1), torch.cat(right, dim=0)

    def set_entries(self, positions: Tensor, values: Tensor) -> None:
        """Store sorted int64 ``positions`` (n,) and their ``values`` (n,)."""
        blocks = -(-self.shape[0] * self.shape[1] // _BLOCK)
        self.block_counts = torch.bincount(positions // _BLOCK, minlength=blocks).to(torch.int32)
        self.offsets = (positions % _BLOCK - _BLOCK // 2).to(torch.int16)
        self.values = values

    def positions(self) -> Tensor:
        """The flat positions (n,) int64 of the entries kept."""
        block = torch.arange(self.block_counts.numel(), device=self.offsets.device)
        block = block.repeat_interleave(self.block_counts)
        return block * _BLOCK + self.offsets.to(torch.int64) + _BLOCK // 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and products for a weight of ``dtype``: one that makes its own rounding negligible."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


@full_precision()
def add_low_rank_(weight: Tensor, left: Tensor, right: Tensor, starts: tuple[Start, ...] = ()) -> MergeRecord:
    """In place ``weight <- round(weight + left @ right + starts)``, once rounded from a wider sum.

    The record is complete before the weight is written, so that an error leaves the weight as it was.

    Args:
        weight: (d_out, d_in), fp16, bf16, fp32 or fp64; may be a transposed view.
        left: (d_out, R); right: (R, d_in). Copies are kept in the record.
        starts: further terms whose tensors do not change while merged; the record refers to them.

    Returns:
        the record that :func:`restore_` takes.
    """
    wide = compute_dtype(weight.dtype)
    kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
    nothing = torch.empty(0, dtype=torch.int64, device=weight.device)
    record = MergeRecord(
        shape=(weight.shape[0], weight.shape[1]),
        left=left.to(kept, copy=True),
        right=right.to(kept, copy=True),
        starts=starts,
        offsets=nothing,
        block_counts=nothing,
        values=weight.new_empty(0),
        original=weight.clone() if weight.dtype == torch.float64 else None,  # no wider dtype to round from
    )
    if record.original is None:
        positions, values = [nothing], []
        for rows, delta, noise in _products(record, wide):
            chunk = weight[rows]
            merged = (chunk.to(wide) + delta).to(weight.dtype)
            lost = (~_recovered(chunk, merged, delta, noise)).flatten().nonzero().squeeze(1)
            positions.append(lost + rows.start * weight.shape[1])
            values.append(chunk.flatten()[lost])
        record.set_entries(torch.cat(positions), torch.cat(values))
        if record.nbytes > weight.numel() * weight.element_size():
            record.original = weight.clone()
    for rows, delta, _ in _products(record, wide):
        chunk = weight[rows]
        chunk.copy_((chunk.to(wide) + delta).to(weight.dtype))
    if record.original is not None:  # neither factors nor entries are needed beside it
        record.left, record.right, record.starts = record.left[:, :0].clone(), record.right[:0].clone(), ()
        record.set_entries(nothing, record.values[:0].clone())
    return record


@full_precision()
def restore_(weight: Tensor, record: MergeRecord) -> None:
    """Undo :func:`add_low_rank_` in place: afterwards the weight's bytes are the original ones.

    Raises ``ValueError`` where the weight's dtype or shape is no longer the one that was merged.
    """
    if tuple(weight.shape) != record.shape or weight.dtype != record.values.dtype:
        raise ValueError(
            f"the merged weight was {record.shape[0]} x {record.shape[1]} {record.values.dtype}, now it is "
            f"{' x '.join(map(str, weight.shape))} {weight.dtype}: its original bytes cannot be restored. Unmerge "
            "before casting or reshaping a model."
        )
    if record.original is not None:
        weight.copy_(record.original)
        return
    for rows, delta, _ in _products(record, compute_dtype(weight.dtype)):
        chunk = weight[rows]
        chunk.copy_((chunk.to(delta.dtype) - delta.to(chunk.device)).to(weight.dtype))
    where = record.positions().to(weight.device)
    columns = record.shape[1]
    weight[where // columns, where % columns] = record.values.to(weight.device)


def _products(record: MergeRecord, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row blocks of left @ right in ``wide`` with a bound on what another summation order would change.

    Any two orders of R products and sums differ by at most 2 R eps |left| @ |right| (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1).
    """
    left, right = record.factors(wide)
    step = max(1, _CHUNK // max(1, right.shape[1]))
    unit, magnitudes = 2 * (left.shape[1] + 4) * torch.finfo(wide).eps, right.abs()
    for start in range(0, left.shape[0], step):
        rows = slice(start, min(start + step, left.shape[0]))
        yield rows, left[rows] @ right, (left[rows].abs() @ magnitudes).mul_(unit)


def _recovered(original: Tensor, merged: Tensor, delta: Tensor, noise: Tensor) -> Tensor:
    """Entries for which subtraction gives the original's bits wherever within ``noise`` the product lies."""
    back = merged.to(delta.dtype) - delta
    margin = noise + 4 * torch.finfo(delta.dtype).eps * (merged.to(delta.dtype).abs() + delta.abs())
    bits = _BITS[original.element_size()]
    wanted = original.view(bits)
    above, below = (back + margin).to(original.dtype), (back - margin).to(original.dtype)
    return (above.view(bits) == wanted) & (below.view(bits) == wanted)
