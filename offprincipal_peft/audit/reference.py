"""What a base weight alone decides of a comparison: the histogram of its magnitudes and the principal mask, in codes.

A code is two bytes an entry: fifteen bits of |W0| rounded to bf16, and in the lowest bit whether the entry is on the
principal mask. Found once, it serves any number of tuned checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..geometry.magnitude import FINITE_KEYS, KEYS, crossing, magnitude_keys
from ..geometry.numerics import full_precision
from ..geometry.spectrum import Triplets
from .counts import flags_of
from .tiles import Tile, tiles

PROBES = ("low", "principal", "matched", "magnitudes", "shares", "stripes", "map")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BY_MAGNITUDE = {"low", "principal", "matched", "magnitudes"}
_ON_PRINCIPAL = {"principal", "matched", "magnitudes"}
_HALF = 1 << 16


class Reference:
    """A base weight, for comparison with any number of tuned ones.

    Memory beside ``base``: 2 bytes an entry where a mask or a magnitude is wanted (6 while the principal mask is
    found), and a few tiles.

    Args:
        base: (d_out, d_in), bf16, fp16, fp32 or fp64; NaN and infinities are allowed and leave only counts.
        top: the k leading singular triplets of ``base``; None leaves out what needs them.
        wanted: names of :data:`PROBES`; "shares" are output, input and both, "stripes" rows and columns.
        principal_density, low_density: of M_princ = Top_alpha(|W0_(k)|) and M_low = Bottom_alpha(|W0|), in (0, 1).
        heads: where attention heads begin and end among the rows and the columns, for the map.
        map_cells: the map has at most so many rows and columns.

    Raises:
        ValueError: a tensor that is no matrix, a ``top`` of another shape, an unknown probe, a density outside (0, 1).
        TypeError: a dtype that holds no weights.
    """

    @full_precision()
    def __init__(
        self,
        base: Tensor,
        top: Triplets | None = None,
        *,
        wanted: Collection[str] = PROBES,
        principal_density: float = 0.5,
        low_density: float = 0.5859,
        heads: tuple[list[int], list[int]] = ([], []),
        map_cells: int = 64,
    ) -> None:
        _check_reference(base, top, wanted, principal_density, low_density)
        self.base, self.shape = base.detach(), (base.shape[0], base.shape[1])
        self.wanted, self.low_density = frozenset(wanted), low_density
        self.heads, self.map_cells = heads, map_cells
        self.bases = None if top is None else (top.U.float(), top.V.float())  # (d_out, k), (d_in, k)
        self.codes: Tensor | None = None  # (d_out, d_in) int16: |W0|'s key, and in the lowest bit the principal mask
        self.counts = torch.zeros(2 * KEYS, dtype=torch.int64, device=base.device)  # entries of each code
        self.has_principal = top is not None and bool(self.wanted & _ON_PRINCIPAL)
        if self.wanted & _BY_MAGNITUDE and base.numel():
            bits = _score_bits(self.shape, top) if top is not None and self.has_principal else None
            self._encode(bits, round(principal_density * base.numel()))

    def _encode(self, bits: Tensor | None, count: int) -> None:
        """``codes`` and ``counts``; the principal entries are the ``count`` with the highest score bits."""
        on_mask = None if bits is None else _highest(bits, count)
        self.codes = torch.empty(self.shape, dtype=torch.int16, device=self.base.device)
        for tile in tiles(self.shape):
            codes = magnitude_keys(tile.of(self.base)).bitwise_left_shift_(1)
            if on_mask is not None:
                codes.bitwise_or_(on_mask(tile))
            self.codes[tile.rows, tile.columns] = codes
            add_histogram(self.counts, torch.bincount(unsigned(codes)))

    @property
    def finite(self) -> bool:
        """Whether every magnitude is finite in bf16; True where they were not asked for."""
        return not bool(self.counts[2 * FINITE_KEYS :].any())


def unsigned(codes: Tensor) -> Tensor:  # int16, whose sign is the highest bit of a code -> (n,) int32, 0 to 65535
    return codes.int().bitwise_and_(_HALF - 1).view(-1)


def add_histogram(sums: Tensor, part: Tensor) -> None:
    """Add a histogram that ends at its last bin in use."""
    sums[: part.numel()] += part


# ---- the principal mask


def _score_bits(shape: tuple[int, int], top: Triplets) -> Tensor:  # -> (d_out, d_in) int32, ordered as |W0_(k)|
    scores = torch.empty(shape, device=top.U.device)
    left, right = (top.U * top.S).float(), top.V.float().T
    for tile in tiles(shape):
        scores[tile.rows, tile.columns] = (left[tile.rows] @ right[:, tile.columns]).abs_()
    return scores.view(torch.int32)


def _highest(bits: Tensor, count: int) -> Callable[[Tile], Tensor]:
    """A function that says of each tile, in flat order, which entries are among the ``count`` highest: int16, 0 or 1.

    Ties go to the lowest flat index, as in :mod:`offprincipal_peft.geometry.selection`. Two histograms, of the high
    and the low 16 bits, find the value at which the count is reached.
    """
    parts = [tile.of(bits) for tile in tiles((bits.shape[0], bits.shape[1]))]  # views: tiles are runs of rows
    threshold, ties, taken = torch.iinfo(torch.int32).max, 0, 0
    if count:
        counts = torch.zeros(_HALF, dtype=torch.int64, device=bits.device)
        for part in parts:
            add_histogram(counts, torch.bincount((part >> 16).view(-1)))
        high = crossing(counts, count)
        counts = torch.zeros(_HALF + 2, dtype=torch.int64, device=bits.device)
        for part in parts:
            add_histogram(counts, torch.bincount((part - (high.bin << 16)).clamp_(-1, _HALF).add_(1).view(-1)))
        low = crossing(counts[1 : _HALF + 1], count - high.above)
        threshold, ties, taken = (high.bin << 16) + low.bin, low.inside, count - high.above - low.above
    left = taken

    def on_mask(tile: Tile) -> Tensor:
        nonlocal left
        part = tile.of(bits)
        if taken == ties:
            return flags_of(torch.ge, part, threshold, torch.int16)
        tied = (part == threshold).view(-1)
        chosen = tied & (tied.cumsum(0) <= left)
        left -= int(chosen.sum())
        return flags_of(torch.gt, part, threshold, torch.int16).bitwise_or_(chosen.view(part.shape))

    return on_mask


def _check_reference(
    base: Tensor, top: Triplets | None, wanted: Collection[str], principal_density: float, low_density: float
) -> None:
    if base.ndim != 2:
        raise ValueError(f"the base must be a matrix, got shape {tuple(base.shape)}: count other tensors by `Counts`")
    if base.dtype not in DTYPES:
        raise TypeError(f"the base must be bfloat16, float16, float32 or float64, got {base.dtype}")
    if unknown := sorted(set(wanted) - set(PROBES)):
        raise ValueError(f"unknown probes {', '.join(unknown)}: there are {', '.join(PROBES)}")
    for name, density in (("principal_density", principal_density), ("low_density", low_density)):
        if not 0.0 < density < 1.0:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {density}")
    if top is not None:
        k = top.S.numel()
        wanted_shapes = (base.shape[0], k), (k,), (base.shape[1], k)
        if tuple(tuple(side.shape) for side in top) != wanted_shapes:
            shapes = ", ".join(str(tuple(side.shape)) for side in top)
            raise ValueError(f"triplets of shapes {shapes} are not those of a {tuple(base.shape)} weight")
