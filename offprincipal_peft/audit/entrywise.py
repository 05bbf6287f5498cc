"""Everything about one weight's change that is a sum over its entries: counts, masks, shares of energy, stripes, a map.

One pass in tiles over the base and a tuned tensor. How often each of the base's codes changed gives all that depends on
magnitudes and on the principal mask, exactly; two products give the shares. Squares are fp64 within a tile already, so
that a change of any size keeps its digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry.magnitude import (
    FINITE_KEYS,
    KEYS,
    key_magnitudes,
    lowest_keys,
    matched_rates,
    quantile_bins,
    random_places_variation,
)
from ..geometry.numerics import full_precision
from .counts import Counts, check_alike, difference, largest_of, stored_flags, visible_flags
from .patterns import Patterns
from .reference import Reference, add_histogram, unsigned
from .results import Entrywise, Magnitudes, Matched, Overlap, Share, Stripes
from .tiles import Grid, Tile, run_means, tiles

BINS = 64  # of |W0|
PROFILE = 128  # means of a profile


@full_precision()
def compare(
    reference: Reference,
    tuned: Tensor,  # (d_out, d_in)
    *,
    common: torch.dtype,
    patterns: Patterns | None = None,
    index: int = 0,
) -> Entrywise:
    """What the reference wants to know of one tuned tensor; ``patterns`` get its changed entries as those of ``index``.

    ``common``: the coarser dtype of the two checkpoints, to which stored values are rounded before they are compared.
    A pair that is not finite, or a base that is not so in bf16, has counts only.
    Raises ``ValueError`` for another shape or device.
    """
    base, shape = reference.base, reference.shape
    check_alike(base, tuned)
    if base.numel() and reference.finite:
        sums = _Sums(reference, common)
        if all(sums.add(tile, tuned, patterns, index) for tile in tiles(shape)):
            return sums.result()
    counts = Counts(common)
    for tile in tiles(shape):
        counts.add(tile.of(base), tile.of(tuned), patterns=patterns, index=index, start=tile.start)
    return counts.result()


class _Sums:
    """What the tiles of one comparison add up to."""

    def __init__(self, reference: Reference, common: torch.dtype) -> None:
        self.reference, self.common, self.shape = reference, common, reference.shape
        device = reference.base.device
        self.changed = self.stored_changed = 0
        self.largest = self.fourth = 0.0  # max |D|, sum of D^4
        self.rows, self.columns = (torch.zeros(d, dtype=torch.float64, device=device) for d in self.shape)  # of D^2
        self.codes = torch.zeros(4 * KEYS, dtype=torch.int64, device=device)  # entries of each code * 2 + changed
        self.energies = torch.zeros(2 * KEYS, dtype=torch.float64, device=device)  # D^2 of each code
        self.grid = Grid(self.shape, reference.map_cells, device) if self._wants("map", "stripes") else None
        bases = reference.bases
        self.shares = _ShareSums(*bases) if bases is not None and self._wants("shares") else None

    def _wants(self, *probes: str) -> bool:
        return not self.reference.wanted.isdisjoint(probes)

    def add(self, tile: Tile, tuned: Tensor, patterns: Patterns | None, index: int) -> bool:
        """Whether the tile is finite; where it is not, these sums are of no use."""
        before, after = tile.of(self.reference.base), tile.of(tuned)
        delta = difference(before, after)
        largest = largest_of(delta)
        if not math.isfinite(largest):
            return False
        if not largest and not before.dtype == after.dtype == torch.float64:
            return True  # equal in fp32, so equal however they are rounded; only two fp64 values can still differ
        flags = visible_flags(before, after, self.common)
        changed = int(flags.sum())
        stored = changed
        if self.common != torch.bfloat16:
            stored = int(stored_flags(before, after, self.common).sum())
        self.changed, self.stored_changed = self.changed + changed, self.stored_changed + stored
        self.largest = max(self.largest, largest)
        if patterns is not None:
            patterns.mark(index, tile.start, flags)
        if self.grid is not None and changed:
            self.grid.add(tile, flags)
        self._add_squares(tile, delta, flags)
        return True

    def _add_squares(self, tile: Tile, delta: Tensor, flags: Tensor) -> None:
        squares = delta.double().square_()
        self.rows[tile.rows] += squares.sum(dim=1)
        if self._wants("stripes", "shares"):
            self.columns[tile.columns] += squares.sum(dim=0)
        if self._wants("stripes"):
            self.fourth += float(squares.view(-1).dot(squares.view(-1)))
        if self.reference.codes is not None:
            codes = unsigned(tile.of(self.reference.codes))
            if self._wants("matched"):
                add_histogram(self.energies, torch.bincount(codes, weights=squares.view(-1)))
            add_histogram(self.codes, torch.bincount(codes.mul_(2).add_(flags.view(-1).int())))
        if self.shares is not None:
            self.shares.add(tile, delta, squares)

    def result(self) -> Entrywise:
        energy, reference = float(self.rows.sum()), self.reference
        low, principal, matched, magnitudes = self._by_magnitude()
        output = inward = both = rows = columns = None
        if self.shares is not None and energy:
            output, inward, both = self.shares.result(energy, self.columns)
        if self.grid is not None and self._wants("stripes"):
            rows = self._stripes(self.grid.rows, self.rows, energy)
            columns = self._stripes(self.grid.columns, self.columns, energy)
        return Entrywise(
            changed=self.changed,
            stored_changed=self.stored_changed,
            norm=math.sqrt(energy),
            largest=self.largest,
            low=low,
            principal=principal,
            matched=matched,
            magnitudes=magnitudes,
            output=output,
            input=inward,
            both=both,
            rows=rows,
            columns=columns,
            map=self.grid.map(reference.heads) if self.grid is not None and self._wants("map") else None,
        )

    def _by_magnitude(self) -> tuple[Overlap | None, Overlap | None, Matched | None, Magnitudes | None]:
        low = principal = matched = magnitudes = None
        reference = self.reference
        if reference.codes is None:
            return low, principal, matched, magnitudes
        # (keys, 2), columns: off and on the principal mask
        entries, changed = reference.counts.view(KEYS, 2), self.codes.view(KEYS, 2, 2)[:, :, 1]
        total = reference.base.numel()
        if self._wants("low") and self.changed:
            lowest = lowest_keys(entries.sum(dim=1), reference.low_density)
            low = Overlap(float(lowest.shares @ changed.sum(dim=1).double()) / self.changed, lowest.entries / total)
        if self._wants("principal") and reference.has_principal and self.changed:
            principal = Overlap(int(changed[:, 1].sum()) / self.changed, int(entries[:, 1].sum()) / total)
        bins = quantile_bins(entries.sum(dim=1), BINS)
        entries_b, changed_b = (_by_bin(values, bins) for values in (entries, changed))
        if self._wants("matched") and reference.has_principal:
            energies_b = _by_bin(self.energies.view(KEYS, 2), bins)
            rates = matched_rates(entries_b.flip(1), changed_b.flip(1), energies_b.flip(1))
            matched = None if rates is None else Matched(*rates)
        if self._wants("magnitudes"):
            magnitudes = _magnitudes(entries, bins, entries_b, changed_b, reference.has_principal)
        return low, principal, matched, magnitudes

    def _stripes(self, counts: Tensor, energies: Tensor, energy: float) -> Stripes:  # (n,), (n,)
        """Of rows or columns, by their changed entries and their squared change."""
        total = self.reference.base.numel()
        length, density = total // counts.numel(), self.changed / total
        ratios = counts / length
        return Stripes(
            mean=float(ratios.mean()),
            std=float(ratios.std(correction=0)),
            random_std=math.sqrt(density * (1 - density) / length),
            least=float(ratios.min()),
            most=float(ratios.max()),
            energy=float(energies.std(correction=0) / energies.mean()) if energy else 0.0,
            random_energy=random_places_variation(energy, self.fourth, total, length),
            profile=run_means(ratios, PROFILE),
        )


class _ShareSums:
    """||U^T D||^2, ||D V||^2, ||U^T D V||^2, and what the sizes of D's entries alone give of each."""

    def __init__(self, U: Tensor, V: Tensor) -> None:  # (d_out, k), (d_in, k), fp32
        self.U, self.V = U, V
        self.inside = torch.zeros(U.shape[1], V.shape[0], device=U.device)  # U^T D
        self.along = torch.zeros(U.shape[0], V.shape[1], device=U.device)  # D V
        self.row_weights, self.column_weights = (side.double().square().sum(dim=1) for side in (U, V))
        self.weighted = torch.zeros(V.shape[0], dtype=torch.float64, device=U.device)  # columns, rows by their weights

    def add(self, tile: Tile, delta: Tensor, squares: Tensor) -> None:
        self.inside[:, tile.columns].addmm_(self.U[tile.rows].T, delta)
        self.along[tile.rows].addmm_(delta, self.V[tile.columns])
        self.weighted[tile.columns] += self.row_weights[tile.rows] @ squares

    def result(self, energy: float, columns: Tensor) -> tuple[Share, Share, Share]:  # columns: sums of D^2, (d_in,)
        k, (d_out, d_in) = self.U.shape[1], (self.U.shape[0], self.V.shape[0])
        found = self.inside, self.along, self.inside @ self.V
        values = [min(float(part.double().square_().sum()) / energy, 1.0) for part in found]
        sizes = self.weighted.sum(), columns @ self.column_weights, self.weighted @ self.column_weights
        random = k / d_out, k / d_in, k * k / (d_out * d_in)
        first, second, third = (
            Share(value, by_chance, float(size) / energy)
            for value, by_chance, size in zip(values, random, sizes, strict=True)
        )
        return first, second, third


def _magnitudes(
    entries: Tensor,  # (keys, 2), columns: off and on the principal mask
    bins: Tensor,  # (keys,)
    entries_b: Tensor,  # (bins, 2) fp64
    changed_b: Tensor,  # (bins, 2) fp64
    has_principal: bool,
) -> Magnitudes:
    used = entries_b.sum(dim=1) > 0
    counts = entries[:FINITE_KEYS].sum(dim=1).double()
    sums = _by_bin((counts * key_magnitudes(counts.device))[:, None], bins[:FINITE_KEYS]).squeeze(1)
    means = sums / entries_b.sum(dim=1)
    rates = changed_b.sum(dim=1) / entries_b.sum(dim=1)
    on_mask = zip(changed_b[used, 1].tolist(), entries_b[used, 1].tolist(), strict=True)
    return Magnitudes(
        size=means[used].tolist(),
        entries=entries_b.sum(dim=1)[used].long().tolist(),
        rate=rates[used].tolist(),
        principal_rate=[count / of if of else None for count, of in on_mask] if has_principal else None,
    )


def _by_bin(values: Tensor, bins: Tensor) -> Tensor:  # (keys, n), (keys,) -> (BINS, n) fp64
    sums = torch.zeros(BINS, values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, bins, values.double())
