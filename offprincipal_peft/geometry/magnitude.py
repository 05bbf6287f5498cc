"""What the magnitudes of a weight alone explain of where it changed: figures from a histogram over bf16 magnitudes.

|W0| rounded to bf16 has 2^15 values. One count of entries and one of changed entries for each of them give every figure
that depends on magnitudes and counts alone, exactly, without a sort, a mask or a draw. The price is that entries which
bf16 cannot tell apart are taken as equal: where a mask ends among them, a share of each is on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KEYS = 1 << 15  # bf16 magnitudes, in ascending order: the values' bits without the sign
FINITE_KEYS = 0x7F80  # the key of infinity: the finite ones are below it


def magnitude_keys(weight: Tensor) -> Tensor:  # floating, any shape -> int16, same shape
    """The bits of |weight| rounded to bf16, 0 to 2^15 - 1: they order as the magnitudes do; NaN comes last."""
    return weight.float().bfloat16().view(torch.int16).bitwise_and(KEYS - 1)


def key_magnitudes(device: torch.device | None = None) -> Tensor:  # (FINITE_KEYS,) fp64, ascending
    """The magnitude that each finite key stands for."""
    return torch.arange(FINITE_KEYS, dtype=torch.int16, device=device).view(torch.bfloat16).double()


def quantile_bins(
    counts: Tensor,  # (n,) int64: entries of each key, ascending
    bins: int = 64,
) -> Tensor:  # (n,) int64
    """The bin of every key: quantiles of the entries, equal keys together, so that some bins can stay empty.

    Edge i of 1 to ``bins`` - 1 is the value at position i * entries // ``bins`` of the sorted entries; a key's bin is
    the number of edges that it reaches, as in :func:`offprincipal_peft.geometry.masks.build_mask`.
    """
    entries = int(counts.sum())
    positions = torch.arange(1, bins, device=counts.device) * entries // bins
    edges = torch.searchsorted(counts.cumsum(0), positions, right=True)
    return torch.searchsorted(edges, torch.arange(counts.numel(), device=counts.device), right=True)


class Lowest(NamedTuple):
    """The ``entries`` with the smallest keys, as the share of each key's entries that belong to them."""

    shares: Tensor  # (n,) fp64: 1 below the last key, 0 above it; at it what is left, as ties are broken at random
    entries: int


def lowest_keys(
    counts: Tensor,  # (n,) int64: entries of each key, ascending
    fraction: float,
) -> Lowest:
    """Bottom_alpha in expectation over the order of equal keys: exactly round(fraction * entries) entries.

    Raises ``ValueError`` for a fraction outside (0, 1). Source: 2511.08567, M_low.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    wanted = round(fraction * int(counts.sum()))
    below = counts.cumsum(0) - counts
    return Lowest((wanted - below).clamp_(min=0).minimum(counts).double() / counts.clamp(min=1), wanted)


class MatchedRates(NamedTuple):
    """A set of entries against others of the same magnitudes."""

    rate: float  # share of changed entries in the set
    other_rate: float
    energy: float  # mean squared change in the set
    other_energy: float
    coverage: float  # share of the set's entries that have a partner
    error: float | None  # standard error of log(rate / other_rate); None where a rate is 0


def matched_rates(
    entries: Tensor,  # (bins, 2), columns: in the set, outside it
    changed: Tensor,  # (bins, 2)
    energies: Tensor,  # (bins, 2), sums of squared changes
) -> MatchedRates | None:
    """Rates of a pair with n_b = min(inside, outside) entries from each side of every bin b, averaged over the draw.

    The expectation over every such pair: sum n_b * (rate in b) / sum n_b on either side. ``error`` takes the changes
    as independent, with one probability for each side of a bin (delta method). None where no bin has both sides.
    """
    counts = entries.double()
    weights = counts.amin(dim=1)
    drawn = float(weights.sum())
    if not drawn:
        return None
    shares = changed.double() / counts.clamp(min=1)
    rates = (weights @ shares) / drawn
    mean_energies = (weights @ (energies.double() / counts.clamp(min=1))) / drawn
    variances = (weights.square() @ (shares * (1 - shares) / counts.clamp(min=1))) / drawn**2
    rate, other_rate = rates.tolist()
    energy, other_energy = mean_energies.tolist()
    error = math.sqrt(float((variances / rates.square()).sum())) if rate and other_rate else None
    return MatchedRates(rate, other_rate, energy, other_energy, drawn / float(counts[:, 0].sum()), error)


def random_places_variation(
    total: float,  # sum of all values
    squares: float,  # sum of their squares
    entries: int,  # how many values there are
    taken: int,  # how many of them each sum takes
) -> float:
    """The coefficient of variation of sums of ``taken`` values drawn without replacement: of rows in random order.

    Exact in mean square: sqrt((n - m) / (n - 1) * variance / m) / mean, the variance of a finite population. 0.0 for
    values that sum to zero.
    """
    if entries <= 1 or not total:
        return 0.0
    mean = total / entries
    variance = max(squares / entries - mean**2, 0.0)
    return math.sqrt((entries - taken) / (entries - 1) * variance / taken) / mean


class Crossing(NamedTuple):
    """Where a count is reached in a histogram, from the top."""

    bin: int
    above: int  # entries in higher bins
    inside: int  # entries in this bin


def crossing(
    histogram: Tensor,  # (n,) int64
    count: int,  # 1 to the sum
) -> Crossing:
    """The highest bin from which on upwards there are ``count`` entries or more."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(count, device=histogram.device)))
    found = histogram.numel() - 1 - position
    inside = int(histogram[found])
    return Crossing(found, int(from_top[position]) - inside, inside)
