"""Numbers of 16 and 32 bits: an fp32 value as a bf16 weight plus a low half, and unbiased rounding to bf16.

The *split master* stores the fp32 value in the bf16 weight that the model computes with anyway and 16 further bits.
The weight is the value rounded with ties away from zero, not to even: the low half is the signed distance in units of
2^-16 of a bf16 step, which at a tie that rounds down to even would be +32768, one more than int16 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
