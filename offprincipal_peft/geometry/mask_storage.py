"""How a mask travels: as bits or as int32 positions, whichever is smaller, with the identity of the weight it is for.

A mask that is read is never trusted: positions out of range, unsorted or repeated would train the wrong entries in
silence, and a mask that was made for other weights is another mask.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_WORDS = 1 << 17  # 64-bit words summed at a time


def pack_units(units: Tensor) -> Tensor:  # (...) bool -> uint8 (ceil(n / 8),) or int32 (count,)
    """A mask's units as bits (first unit in the lowest bit) or as sorted row-major positions, whichever is smaller.

    Raises ``ValueError`` for a mask of more units than int32 positions can name where positions would be smaller.
    """
    flat = units.reshape(-1)
    count, total = int(flat.sum()), flat.numel()
    if 4 * count < -(-total // 8):
        if total > torch.iinfo(torch.int32).max:
            raise ValueError(f"{total} units cannot be named by int32 positions")
        return flat.nonzero().squeeze(1).to(torch.int32)
    padded = torch.zeros(-(-total // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[:total] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_units(packed: Tensor, shape: tuple[int, ...]) -> Tensor:  # -> bool, ``shape``
    """The units that :func:`pack_units` stored.

    Raises ``ValueError`` for a wrong dtype or length, positions that are out of range, unsorted or duplicated, bits
    past the last unit, and a mask that holds no unit or all of them.
    """
    total = 1
    for d in shape:
        total *= d
    if packed.dim() != 1 or packed.dtype not in (torch.uint8, torch.int32):
        raise ValueError(
            f"a mask is stored as a vector of uint8 bits or int32 positions, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    units = _from_bits(packed, total) if packed.dtype == torch.uint8 else _from_positions(packed, total)
    count = int(units.sum())
    if count in (0, total):
        raise ValueError(f"the mask names {count} of {total} units; at least one must be trained and one frozen")
    return units.view(shape)


def _from_bits(packed: Tensor, total: int) -> Tensor:
    if packed.numel() != -(-total // 8):
        raise ValueError(f"a mask of {total} units takes {-(-total // 8)} bytes of bits, got {packed.numel()}")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, None] >> shifts) & 1).bool().view(-1)
    if bool(bits[total:].any()):
        raise ValueError(f"the mask has bits set past its {total} units")
    return bits[:total]


def _from_positions(packed: Tensor, total: int) -> Tensor:
    if packed.numel() and (int(packed.min()) < 0 or int(packed.max()) >= total):
        bad = packed[(packed < 0) | (packed >= total)]
        raise ValueError(f"{bad.numel()} mask positions lie outside 0 to {total - 1} (first: {int(bad[0])})")
    steps = packed.diff()
    if packed.numel() > 1 and int(steps.min()) <= 0:
        first = int((steps <= 0).nonzero()[0])
        what = "duplicated" if int(steps[first]) == 0 else "not sorted"
        raise ValueError(
            f"mask positions are {what}: entry {first + 1} is {int(packed[first + 1])} after {int(packed[first])}"
        )
    units = torch.zeros(total, dtype=torch.bool, device=packed.device)
    units[packed.to(torch.int64)] = True
    return units


def fingerprint(weight: Tensor) -> Tensor:  # (rows, columns), any dtype -> uint8 (16,)
    """Sixteen bytes that change with any entry of a matrix, its shape or its dtype; the same on every device.

    The matrix's 64-bit words are multiplied by an odd number of their place, their halves mixed, multiplied again and
    summed modulo 2^64, a part at a time, and BLAKE2b is taken of the sums: a few passes in the cache. (One product and
    a sum alone would not see two changed signs, since the highest bit times any odd number is the highest bit.) A
    change of one word always shows, others are missed with a chance of 2^-64. It tells weights apart; it is no
    protection against someone who builds a collision.
    """
    digest = hashlib.blake2b(f"{weight.dtype} {tuple(weight.shape)}".encode(), digest_size=16)
    raw = weight.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # words start at multiples of their size
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:]
    first, second = _odd_weights(weight.device)
    for part in words.split(_WORDS):
        mixed = part * first[: part.numel()]
        mixed ^= mixed >> 32
        mixed *= second[: part.numel()]
        digest.update(int(mixed.sum()).to_bytes(8, "little", signed=True))
    digest.update(bytes(rest.tolist()))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _odd_weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (2, _WORDS), generator=generator, dtype=torch.int64)
    return (2 * weights + 1).to(device)
