"""How many entries of a tensor changed, and by how much: for what is no matrix, not finite, or too large to be held."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .patterns import Patterns
from .results import Entrywise
from .tiles import ENTRIES

_MINUS_ZERO = -(1 << 15)  # the bits of -0.0


class Counts:
    """The counts and norms of one tensor pair as its blocks come.

    ``common``: the coarser dtype of the two checkpoints, to which stored values are rounded before they are compared.
    """

    def __init__(self, common: torch.dtype) -> None:
        self.common = common
        self.changed = self.stored_changed = 0
        self.squares = self.largest = 0.0
        self.nonfinite = [0, 0]

    def add(
        self,
        base: Tensor,  # any shape
        tuned: Tensor,  # the same shape
        *,
        patterns: Patterns | None = None,
        index: int = 0,
        start: int = 0,
    ) -> None:
        """Count a block; its changed entries become those of ``index`` in ``patterns``, from entry ``start`` on."""
        check_alike(base, tuned)
        first, second = base.detach().reshape(-1), tuned.detach().reshape(-1)
        for offset in range(0, first.numel(), ENTRIES):
            flags = self._add(first[offset : offset + ENTRIES], second[offset : offset + ENTRIES])
            if patterns is not None:
                patterns.mark(index, start + offset, flags)

    def result(self) -> Entrywise:
        """What the blocks so far add up to."""
        nonfinite = (self.nonfinite[0], self.nonfinite[1])
        return Entrywise(self.changed, self.stored_changed, math.sqrt(self.squares), self.largest, nonfinite)

    def _add(self, before: Tensor, after: Tensor) -> Tensor:
        delta = difference(before, after)
        largest = largest_of(delta)
        if math.isfinite(largest):
            flags = visible_flags(before, after, self.common)
            stored = flags if self.common == torch.bfloat16 else stored_flags(before, after, self.common)
        else:
            for side, tensor in enumerate((before, after)):
                self.nonfinite[side] += int(tensor.isfinite().logical_not_().sum())
            usable = before.float().isfinite() & after.float().isfinite()
            wide = torch.where(usable, after.double() - before.double(), 0.0)  # where fp32 cannot hold a difference
            delta = torch.where(delta.isfinite(), delta.double(), wide)
            largest = largest_of(delta)
            stored = _differ(before.to(self.common), after.to(self.common))
            flags = _differ(*(as_bf16(side, self.common) for side in (before, after)))
        self.changed += int(flags.sum())
        self.stored_changed += int(stored.sum())
        self.squares += float(delta.double().square_().sum())
        self.largest = max(self.largest, largest)
        return flags


def squared_norm(block: Tensor) -> float:  # any shape
    """||block||_F^2 of its finite entries, in fp64."""
    total = 0.0
    for part in block.detach().reshape(-1).split(ENTRIES):
        squares = part.to(torch.float64, copy=True).square_()
        found = float(squares.sum())
        total += found if math.isfinite(found) else float(squares.nan_to_num_(0.0, 0.0).sum())
    return total


def difference(before: Tensor, after: Tensor) -> Tensor:  # the same shape -> fp32, a copy
    """The stored values' difference in fp32."""
    delta = after.to(torch.float32, copy=True)
    return delta.sub_(before.float() if before.dtype == torch.float64 else before)


def largest_of(delta: Tensor) -> float:  # not empty
    """max |delta|; NaN or infinite where an entry is."""
    low, high = (float(edge) for edge in torch.aminmax(delta))
    return max(-low, high) if low == low else low  # a NaN is both edges


def visible_flags(before: Tensor, after: Tensor, common: torch.dtype) -> Tensor:  # no NaN, not empty -> fp32, 0 or 1
    """1 where an entry is another bf16 number, both rounded to ``common`` first: the zeros are one number."""
    return flags_of(torch.ne, *bits_of(as_bf16(before, common), as_bf16(after, common)))


def stored_flags(before: Tensor, after: Tensor, common: torch.dtype) -> Tensor:  # no NaN -> fp32, 0 or 1
    """1 where an entry differs once both are rounded to ``common``."""
    return flags_of(torch.ne, before.to(common), after.to(common))


def as_bf16(tensor: Tensor, common: torch.dtype) -> Tensor:
    """Rounded to ``common``, then to bf16; fp16 through fp32, which is exact and ten times faster."""
    tensor = tensor if tensor.dtype == torch.bfloat16 else tensor.to(common)
    return tensor.float().bfloat16() if tensor.dtype == torch.float16 else tensor.to(torch.bfloat16)


def bits_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # bf16, not empty -> int16, the same shapes
    """The bits of both, -0.0 written as 0.0: without NaN they are equal where the numbers are. May share memory."""
    pair = first.view(torch.int16), second.view(torch.int16)
    if any(int(bits.amin()) == _MINUS_ZERO for bits in pair):
        return pair[0].masked_fill(pair[0] == _MINUS_ZERO, 0), pair[1].masked_fill(pair[1] == _MINUS_ZERO, 0)
    return pair


def flags_of(
    compare: Callable[..., Tensor],  # torch.ne and its like
    first: Tensor,
    second: Tensor | int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The comparison as 0 and 1 of ``dtype``: written as bool first it takes three times as long."""
    return compare(first, second, out=torch.empty(first.shape, dtype=dtype, device=first.device))


def check_alike(base: Tensor, tuned: Tensor) -> None:
    """Raises ``ValueError`` unless both have one shape and device."""
    if base.shape != tuned.shape or base.device != tuned.device:
        raise ValueError(
            f"the base has shape {tuple(base.shape)} on {base.device} and the tuned tensor {tuple(tuned.shape)} on "
            f"{tuned.device}: one weight has one shape, and is compared on one device"
        )


def _differ(before: Tensor, after: Tensor) -> Tensor:  # one dtype -> fp32, 0 or 1; NaN is equal to NaN
    return ((before != after) & ~(before.isnan() & after.isnan())).float()
