"""Numbers of 16 and 32 bits: split master, unbiased rounding to bf16, and what a stored weight shows of an update.

The *split master* stores the fp32 value in the bf16 weight that the model computes with anyway and 16 further bits.
The weight is the value rounded with ties away from zero, not to even: the low half is the signed distance in units of
2^-16 of a bf16 step, which at a tie that rounds down to even would be +32768, one more than int16 holds.

*Visibility and update sparsity* compare what is stored, exactly: half steps and neighbours come from the bits, counts
are integers. They work through a weight in chunks, so that their fp64 copies never reach a multiple of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries compared at a time
_STORED = (torch.bfloat16, torch.float16, torch.float32)  # whose half steps are normal fp64 numbers
_VALUES = (*_STORED, torch.float64)


def split_master(value: Tensor, *, consume: bool = False) -> tuple[Tensor, Tensor]:
    # fp32, any shape -> bf16 and int16, same shape
    """The nearest bf16 (ties away from zero) and the int16 low half that :func:`join_master` restores ``value`` from.

    Exact for every finite value whose rounding is finite, for zeros of either sign and for infinities. A value that
    rounds past the largest bf16 becomes an infinite weight, as in any rounding, and still joins back exactly.
    ``consume`` uses the value's memory for the work: it holds nothing of use afterwards.

    Raises ``TypeError`` for another dtype.
    """
    if value.dtype != torch.float32:
        raise TypeError(f"a split master is made of a float32 value, got {value.dtype}")
    bits = value.view(torch.int32)
    low = bits.to(torch.int16)  # the low 16 bits, as a signed number: bits - (high << 16)
    high = (bits.add_(0x8000) if consume else bits.add(0x8000)).bitwise_right_shift_(16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join_master(high: Tensor, low: Tensor, *, out: Tensor | None = None) -> Tensor:  # bf16, int16, same shape -> fp32
    """The fp32 value that :func:`split_master` took apart, bit for bit; in ``out`` (fp32, same shape) where given."""
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise TypeError(f"a split master is a bfloat16 weight and an int16 low half, got {high.dtype} and {low.dtype}")
    bits = torch.empty(high.shape, dtype=torch.int32, device=high.device) if out is None else out.view(torch.int32)
    bits.copy_(high.view(torch.int16)).bitwise_left_shift_(16)
    return bits.add_(low.to(torch.int32)).view(torch.float32)  # converted first: a mixed sum is three times slower


def round_stochastically(value: Tensor, generator: torch.Generator | None = None) -> Tensor:  # fp32 -> bf16
    """Round to one of the two neighbouring bf16 values with probabilities that make the mean exact.

    A uniform 16-bit number is added to the magnitude's bits before they are cut. Values that are bf16 already stay;
    infinities and NaN are returned as they are. Source: unbiased rounding as in 2010.06192 (revisiting bf16 training).

    Args:
        value: fp32, any shape.
        generator: on the value's device; torch's default generator of that device otherwise.
    """
    if value.dtype != torch.float32:
        raise TypeError(f"stochastic rounding takes a float32 value, got {value.dtype}")
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    cut = ((value.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isfinite(), cut, value.to(torch.bfloat16))


# ---- what a stored weight shows of an update


def unchanged(
    before: Tensor,  # any shape
    after: Tensor,  # the same shape
    eta: float = 1e-3,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Which entries |after - before| <= eta * max(|before|, |after|) leaves unchanged; bool, same shape.

    Both tensors are first rounded to ``dtype``, in which the weights are *stored*. Three questions, three calls:

    - Does a bf16 model see the update, whatever the checkpoints' precision? The default; two bf16 values differ by
      2^-8 relative or more, so for every eta below that it is equality of the bits, a zero's sign aside. Changes of
      fp16 and fp32 values that vanish in bf16 count as unchanged, small ones that cross a rounding edge as changed.
    - Is the relative change larger than eta? ``dtype=None``: the values as given, which must share a dtype. Where
      eta is not smaller than half the dtype's eps, as 1e-3 for fp16, changes of one ULP can count as unchanged.
    - Did the stored number change at all? ``dtype=None, eta=0``.

    What was infinite stays unchanged as the same infinity, NaN as NaN; between a finite value, either infinity and NaN
    every step is a change. fp64 is rounded through fp32, as torch does.

    Raises:
        TypeError: a tensor that is not bf16, fp16, fp32 or fp64; with ``dtype=None`` two different dtypes.
        ValueError: different shapes or devices; eta outside [0, 1).

    Source: 2511.08567, Definition 2.1.
    """
    _check_pair(before, after, eta, dtype)
    return _by_chunks(lambda w, v: _same(w, v, eta, dtype), before, after)


def count_changed(
    before: Tensor,  # any shape
    after: Tensor,  # the same shape
    eta: float = 1e-3,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> int:
    """The number of entries that :func:`unchanged` denies: sums over layers are exact. Its options and its errors."""
    _check_pair(before, after, eta, dtype)
    count = torch.zeros((), dtype=torch.int64, device=before.device)
    for w, v in _chunks(before, after):
        count += w.numel() - torch.count_nonzero(_same(w, v, eta, dtype))
    return int(count)


def update_sparsity(
    before: Tensor,  # any shape, not empty
    after: Tensor,  # the same shape
    eta: float = 1e-3,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> float:
    """The share of unchanged entries, 1 - #changed / n, in [0, 1]: by default the bf16-aware update sparsity.

    Options and errors as :func:`unchanged`, and ``ValueError`` for an empty tensor. The count is exact. Memory beyond
    the two tensors is that of a few million entries, and a copy of a tensor that is not contiguous. Of several layers
    take the sum of :func:`count_changed` over the sum of sizes. Source: 2511.08567, Definition 2.2.
    """
    if not before.numel():
        raise ValueError(f"update sparsity needs a weight with entries, got shape {tuple(before.shape)}")
    return 1.0 - count_changed(before, after, eta, dtype=dtype) / before.numel()


def ulp(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:  # any shape -> fp64, same shape
    """The spacing of ``dtype``'s values in the binade of |x| (bf16, fp16 or fp32), exact, in the units of x.

    At a power of two that is the spacing away from zero, twice the one towards zero. Zero and the subnormals have the
    smallest subnormal; NaN where x is NaN, infinite or so large that ``dtype`` stores it as infinite. fp64, because
    half a ULP of the smallest values is zero in fp32.

    Raises ``TypeError`` for another dtype, of x or asked for.
    """
    _check_kind(x, "x")
    _check_stored(dtype)
    spacing = _spacing(x.detach().double().abs(), dtype)
    return spacing.masked_fill(~x.detach().to(dtype).isfinite(), torch.nan)


def visible(
    weight: Tensor,  # any shape
    delta: Tensor,  # the same shape
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Where adding ``delta`` changes the weight that ``dtype`` (bf16, fp16 or fp32) stores: Gate III; bool, same shape.

    The exact sum, rounded to nearest with ties to even, against the stored value; the weight is rounded to ``dtype``
    first. A sum that is formed in fp32, as optimisers form it, is rounded twice, and can differ where delta is
    within 2^-16 of the deciding half step. An infinite weight changes only by becoming NaN, a NaN never; a NaN delta
    changes what is not NaN.

    Raises ``TypeError`` for another dtype and ``ValueError`` for different shapes or devices.

    Source: 2511.08567, Corollary 3.6, whose criterion is :func:`exceeds_half_ulp`.
    """
    _check_update(weight, delta, dtype)
    return _by_chunks(lambda w, d: _moves(w, d, dtype), weight, delta)


def exceeds_half_ulp(
    weight: Tensor,  # any shape
    delta: Tensor,  # the same shape
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """|delta| >= ULP(weight) / 2, the paper's criterion for a visible update; bool, same shape.

    It differs from :func:`visible` in two places. Towards zero from a power of two the spacing halves: a quarter of a
    ULP is seen. And exactly half a ULP goes to the even neighbour, which may be the weight itself. False where the
    weight has no ULP. Rounding, errors and source as :func:`visible`.
    """
    _check_update(weight, delta, dtype)
    return _by_chunks(lambda w, d: d.double().abs() >= ulp(w.to(dtype), dtype) / 2, weight, delta)


def _same(before: Tensor, after: Tensor, eta: float, dtype: torch.dtype | None) -> Tensor:
    """`unchanged` of one chunk."""
    if dtype is not None:
        before, after = before.to(dtype), after.to(dtype)
    same = (before == after) | (before.isnan() & after.isnan())
    if eta < torch.finfo(before.dtype).eps / 2:  # the smallest relative step between two normal values
        return same
    before, after = before.double(), after.double()
    largest = torch.maximum(before.abs(), after.abs())
    return same | (((after - before).abs() <= eta * largest) & largest.isfinite())


def _moves(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """`visible` of one chunk: delta against half the gap to the neighbour on its side. No sum, so no rounding."""
    weight, delta = weight.to(dtype).double(), delta.double()
    size = weight.abs()
    away = _spacing(size, dtype)
    exponent_edge = (torch.frexp(size).mantissa == 0.5) & (size > torch.finfo(dtype).smallest_normal)
    toward = torch.where(exponent_edge, away / 2, away)
    half = torch.where((delta < 0) == weight.signbit(), away, toward) / 2
    odd = torch.remainder(size / away, 2) == 1  # the last bit of the mantissa
    moves = (delta.abs() > half) | ((delta.abs() == half) & odd) | delta.isnan()
    return torch.where(weight.isfinite(), moves, weight.isinf() & (weight + delta).isnan())


def _spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(exponent - mantissa bits) of fp64 magnitudes, from the bits: a power function need not be exact."""
    info = torch.finfo(dtype)
    lowest, highest = (math.frexp(edge)[1] - 1 for edge in (info.smallest_normal, info.max))
    exponent = (torch.frexp(size).exponent.to(torch.int64) - 1).clamp(lowest, highest)
    exponent = torch.where(size == 0, lowest, exponent)
    return ((exponent + math.frexp(info.eps)[1] - 1 + 1023) << 52).view(torch.float64)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' entries in flat order, a bounded number at a time. One that is not contiguous is copied once."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK):
        yield tuple(tensor[start : start + _CHUNK] for tensor in flat)


def _by_chunks(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    result = torch.empty(first.shape, dtype=torch.bool, device=first.device)
    for part, chunk in zip(result.view(-1).split(_CHUNK), _chunks(first, second), strict=False):
        part.copy_(function(*chunk))
    return result


def _check_kind(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in _VALUES:
        raise TypeError(f"{what} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")


def _check_stored(dtype: torch.dtype) -> None:
    if dtype not in _STORED:
        raise TypeError(f"the stored dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")


def _check_alike(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    for tensor, name in zip((first, second), names, strict=True):
        _check_kind(tensor, name)
    for what, a, b in (
        ("shape", tuple(first.shape), tuple(second.shape)),
        ("device", first.device, second.device),
    ):
        if a != b:
            raise ValueError(f"{names[0]} and {names[1]} must have the same {what}, got {a} and {b}")


def _check_pair(before: Tensor, after: Tensor, eta: float, dtype: torch.dtype | None) -> None:
    _check_alike(before, after, ("before", "after"))
    if not 0.0 <= eta < 1.0:
        raise ValueError(f"eta is a relative change in [0, 1), got {eta}")
    if dtype is not None:
        _check_stored(dtype)
    elif before.dtype != after.dtype:
        raise TypeError(
            f"before is {before.dtype} and after {after.dtype}: what rounding changed would be counted as training; "
            "name the dtype that both are stored in, for instance dtype=torch.bfloat16"
        )


def _check_update(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> None:
    _check_alike(weight, delta, ("weight", "delta"))
    _check_stored(dtype)
