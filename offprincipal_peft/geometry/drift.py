"""What training did to a weight: spectral shift, ranks of the update, overlap of update masks, stripes by row and head.

Every figure comes with the value that chance alone would give, where there is one, since a sparse update overlaps any
mask a little. Sums run in fp64 and counts in int64: the shifts of reinforcement learning are 1e-5 of the spectrum.

Source: 2511.08567, unless a function names another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from .spectrum import singular_values

# ---- spectra


class SpectralShift(NamedTuple):
    """How far the singular values of one weight moved."""

    normalized: float  # ||s_after - s_before||_2 / ||s_before||_2
    largest: float  # max_i |s_after,i - s_before,i|, in the units of the weight


def normalized_spectral_shift(
    before_values: Tensor,  # (n,), in any order
    after_values: Tensor,  # (n,)
) -> float:
    """NSS = ||s_after - s_before||_2 / ||s_before||_2, both spectra descending; no unit.

    0.0 where both spectra are zero and infinity where only the first is. At most ||delta W||_F / ||W||_F.
    Take values in fp64 (:func:`singular_values`) or fp32: in bf16 their own rounding is larger than the shift.

    Raises:
        ValueError: spectra that are empty, not 1-D, of different length, or hold negative or non-finite values.
        TypeError: values that are not floating point.

    Source: 2511.08567; the bound (Mirsky) is its Corollary 3.4.
    """
    before, after = _spectrum_pair(before_values, after_values)
    shift, scale = _norm(after - before), _norm(before)
    if scale == 0.0:
        return 0.0 if shift == 0.0 else math.inf
    return shift / scale


def max_spectral_shift(
    before_values: Tensor,  # (n,), in any order
    after_values: Tensor,  # (n,)
) -> float:
    """max_i |s_after,i - s_before,i|, both spectra descending, in the units of the weight.

    At most ||delta W||_2 (2511.08567, Corollary 3.4: Weyl). Errors as :func:`normalized_spectral_shift`.
    """
    before, after = _spectrum_pair(before_values, after_values)
    return float((after - before).abs().max())


def spectral_shift(
    before: Tensor,  # (d_out, d_in)
    after: Tensor,  # (d_out, d_in)
) -> SpectralShift:
    """Both shifts of a weight, from two exact fp64 spectra: O(max(d) min(d)^2) each.

    Raises ``ValueError`` for weights of different shapes, and as :class:`WeightSpectrum`.
    """
    if before.shape != after.shape:
        raise ValueError(f"before and after must have the same shape, got {tuple(before.shape)}, {tuple(after.shape)}")
    values = singular_values(before), singular_values(after)
    return SpectralShift(normalized_spectral_shift(*values), max_spectral_shift(*values))


def effective_rank(values: Tensor) -> float:  # singular values (n,)
    """exp(-sum p_i ln p_i) with p_i = s_i / sum(s): 1 for one direction, n for n equal ones, 0.0 for a zero spectrum.

    It counts the tail: a thousand values of 1e-7 of the largest, an fp32 spectrum's zeros, add 0.2 %.
    Errors as :func:`normalized_spectral_shift`. Source: Roy and Vetterli (EUSIPCO 2007).
    """
    s = _spectrum(values, "values")
    if s[0] == 0:
        return 0.0
    s = s / s[0]
    p = s / s.sum()
    return math.exp(float(-torch.xlogy(p, p).sum()))


def stable_rank(values: Tensor) -> float:  # singular values (n,)
    """||W||_F^2 / ||W||_2^2 = sum s_i^2 / s_1^2, between 1 and the rank; 0.0 for a zero spectrum.

    Errors as :func:`normalized_spectral_shift`.
    """
    s = _spectrum(values, "values")
    return float((s / s[0]).square().sum()) if s[0] > 0 else 0.0


def cumulative_energy(values: Tensor) -> Tensor:  # singular values (n,) -> (n,) fp64, ascending
    """Entry k - 1 is the share of the k largest values in sum s_i^2; the last is 1. All 0.0 for a zero spectrum.

    The share of an *update* inside a weight's principal subspaces is :func:`energy_shares`. Errors as
    :func:`normalized_spectral_shift`.
    """
    s = _spectrum(values, "values")
    if s[0] == 0:
        return torch.zeros_like(s)
    sums = (s / s[0]).square().cumsum(0)
    return sums / sums[-1]


def _spectrum(values: Tensor, name: str) -> Tensor:
    """Checked, fp64, descending."""
    if values.ndim != 1 or not values.numel():
        raise ValueError(f"{name} must be the singular values of one weight, 1-D, got shape {tuple(values.shape)}")
    if not values.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    values = values.detach().double()
    if not bool(((values >= 0) & values.isfinite()).all()):
        bad = int((~((values >= 0) & values.isfinite())).sum())
        raise ValueError(f"{name} must be finite and not negative; {bad} of {values.numel()} are not")
    return values.sort(descending=True).values


def _spectrum_pair(before_values: Tensor, after_values: Tensor) -> tuple[Tensor, Tensor]:
    before, after = _spectrum(before_values, "before_values"), _spectrum(after_values, "after_values")
    if before.shape != after.shape:
        raise ValueError(f"the spectra have {before.numel()} and {after.numel()} values; they belong to one shape")
    return before, after.to(before.device)


def _norm(values: Tensor) -> float:
    """The 2-norm without squaring the extremes away."""
    largest = float(values.abs().max())
    return largest * float((values / largest).norm()) if largest > 0 else 0.0


# ---- masks against a reference


class Overlap(NamedTuple):
    """How much of an update falls on a reference mask."""

    value: float  # |reference & update| / |update|
    baseline: float  # |reference| / n: what an update that ignores the reference gives


def overlap(
    reference_mask: Tensor,  # bool, any shape
    update_mask: Tensor,  # bool, the same shape
) -> Overlap:
    """The share of an update's entries that lie on the reference, M_princ or M_low for instance, with its baseline.

    Raises:
        ValueError: different shapes or devices, or an update mask without an entry: it has no share to give.
        TypeError: a mask that is not boolean.

    Source: 2511.08567 (its Figure 5).
    """
    reference, update = _checked_masks([reference_mask, update_mask], ("reference_mask", "update_mask"))
    changed = _count(update)
    if not changed:
        raise ValueError(
            f"the update mask of shape {tuple(update.shape)} is empty: no entry changed, so no share of it overlaps"
        )
    return Overlap(_count(reference & update) / changed, _count(reference) / reference.numel())


# ---- masks against each other


class Agreement(NamedTuple):
    """Two of the runs."""

    first: int  # positions in the sequence of masks
    second: int
    jaccard: float
    baseline: float  # of independent masks of these two densities


class Consensus(NamedTuple):
    """How far n >= 2 runs changed the same entries of one weight."""

    jaccard: float  # mean over the pairs
    baseline: float  # mean over the pairs
    pairs: tuple[Agreement, ...]
    intersection: Tensor  # bool: changed by every run
    frequencies: tuple[int, ...]  # entries changed by exactly 0, 1, … n runs
    baseline_frequencies: tuple[float, ...]  # the expected numbers for independent masks of these densities


def jaccard(a: Tensor, b: Tensor) -> float:  # bool, any shape and the same
    """|a & b| / |a | b|, in [0, 1]. Raises as :func:`overlap`, and ``ValueError`` where both masks are empty."""
    a, b = _checked_masks([a, b], ("a", "b"))
    return _jaccard(a, b, ("a", "b"))


def jaccard_baseline(p: float, q: float) -> float:
    """pq / (p + q - pq): the Jaccard index of two large independent masks with densities p and q.

    The ratio of the expected sizes. Raises ``ValueError`` for densities outside [0, 1] or both zero.
    Source: 2511.08567, the random column of its table of Jaccard overlaps.
    """
    if not (0.0 <= p <= 1.0 and 0.0 <= q <= 1.0) or p == q == 0.0:
        raise ValueError(f"densities must lie in [0, 1] and not both be 0, got {p} and {q}")
    return p * q / (p + q - p * q)


def consensus(masks: Sequence[Tensor]) -> Consensus:  # n of bool, any shape and the same
    """Agreement of n >= 2 runs' update masks, with what independent masks of the same densities would give.

    Memory: one int32 count per entry beside the masks. Raises as :func:`overlap`, and ``ValueError`` for fewer than
    two masks or a pair of empty ones (whose agreement is 0 / 0), named by position.
    """
    if len(masks) < 2:
        raise ValueError(f"consensus needs the update masks of two runs or more, got {len(masks)}")
    names = [f"masks[{i}]" for i in range(len(masks))]
    masks = _checked_masks(masks, names)
    n = masks[0].numel()
    densities = [_count(mask) / n for mask in masks]
    pairs = []
    for i, j in itertools.combinations(range(len(masks)), 2):
        found = _jaccard(masks[i], masks[j], (names[i], names[j]))
        pairs.append(Agreement(i, j, found, jaccard_baseline(densities[i], densities[j])))
    times = torch.zeros(masks[0].shape, dtype=torch.int32, device=masks[0].device)
    for mask in masks:
        times += mask
    return Consensus(
        jaccard=math.fsum(pair.jaccard for pair in pairs) / len(pairs),
        baseline=math.fsum(pair.baseline for pair in pairs) / len(pairs),
        pairs=tuple(pairs),
        intersection=times == len(masks),
        frequencies=tuple(_count(times == count) for count in range(len(masks) + 1)),
        baseline_frequencies=tuple(n * share for share in independent_counts(densities)),
    )


def independent_counts(densities: Sequence[float]) -> list[float]:
    """P(0), P(1), … P(n) of a sum of independent 0/1 draws with these probabilities."""
    shares = [1.0]
    for p in densities:
        shares = [a * (1.0 - p) + b * p for a, b in zip([*shares, 0.0], [0.0, *shares], strict=True)]
    return shares


def _jaccard(a: Tensor, b: Tensor, names: tuple[str, str]) -> float:
    together = _count(a | b)
    if not together:
        raise ValueError(f"{names[0]} and {names[1]} are both empty: neither run changed an entry, nothing to compare")
    return _count(a & b) / together


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _checked_masks(masks: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    for mask, name in zip(masks, names, strict=True):
        _check_bool(mask, name)
        if mask.shape != masks[0].shape or mask.device != masks[0].device:
            raise ValueError(
                f"{names[0]} is {tuple(masks[0].shape)} on {masks[0].device}, {name} is {tuple(mask.shape)} on "
                f"{mask.device}: masks of one weight have one shape and device"
            )
    if not masks[0].numel():
        raise ValueError(f"{names[0]} of shape {tuple(masks[0].shape)} has no entries")
    return [mask.detach() for mask in masks]


def _check_bool(mask: Tensor, name: str) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean mask, got {mask.dtype}; compare first, for instance mask != 0")


# ---- stripes


def row_update_ratios(changed: Tensor) -> Tensor:  # bool (d_out, d_in) -> (d_out,) fp64
    """The share of changed entries in each row (output channel): ``~unchanged(before, after)``, averaged over d_in.

    Raises ``TypeError`` for a mask that is not boolean and ``ValueError`` for one that is not 2-D with entries.
    """
    return _ratios(changed, dim=1)


def column_update_ratios(changed: Tensor) -> Tensor:  # bool (d_out, d_in) -> (d_in,) fp64
    """The share of changed entries in each column (input channel). Errors as :func:`row_update_ratios`."""
    return _ratios(changed, dim=0)


def _ratios(changed: Tensor, dim: int) -> Tensor:
    _check_bool(changed, "changed")
    if changed.ndim != 2 or not changed.numel():
        raise ValueError(f"changed must be a 2-D mask with entries, got shape {tuple(changed.shape)}")
    return changed.sum(dim=dim, dtype=torch.int64).double() / changed.shape[dim]


def smooth(values: Tensor, window: int = 3) -> Tensor:  # (n,) -> (n,) fp64
    """Centred moving average over ``window`` neighbours; at the edges over those that exist, so the ends are not drawn
    towards zero and a constant stays constant.

    Raises ``ValueError`` for values that are not 1-D with entries, and for a window that is not odd and positive: an
    even one has no centre. Source: 2511.08567, whose ratios are smoothed over 3 steps.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd positive integer, got {window!r}")
    if values.ndim != 1 or not values.numel():
        raise ValueError(f"values must be 1-D with entries, got shape {tuple(values.shape)}")
    window = min(window, 2 * values.numel() - 1)  # a wider one sees no more neighbours
    series = values.detach().double()[None, None, :]
    return avg_pool1d(series, window, stride=1, padding=window // 2, count_include_pad=False)[0, 0]


def head_boundaries(rows: int, *, num_heads: int | None = None, head_dim: int | None = None) -> list[int]:
    """[0, head_dim, 2 head_dim, … rows]: where heads begin and end among the rows of Q, K, V or the columns of O.

    For K and V of grouped attention give the number of key and value heads. One of the two arguments is enough.
    Raises ``ValueError`` for sizes that do not divide the rows or each other, or none given.
    """
    given = {"rows": rows, "num_heads": num_heads, "head_dim": head_dim}
    wrong = [f"{name} = {value!r}" for name, value in given.items() if value is not None and value < 1]
    if wrong:
        raise ValueError(f"sizes must be positive, got {', '.join(wrong)}")
    if num_heads is None and head_dim is None:
        raise ValueError("give num_heads or head_dim")
    size = head_dim if head_dim is not None else rows // (num_heads or 1)
    heads = num_heads if num_heads is not None else rows // size if size else 0
    if not size or heads * size != rows:
        asked = ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None and name != "rows")
        raise ValueError(f"{rows} rows do not divide into heads with {asked}")
    return list(range(0, rows + 1, size))
