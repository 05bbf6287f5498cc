"""Weight pairs, and the figures of an audit from dense masks and plain loops: slow, and to be read at a glance."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from offprincipal_peft.audit.entrywise import compare
from offprincipal_peft.audit.reference import Reference
from offprincipal_peft.audit.results import Entrywise, Matched, Overlap
from offprincipal_peft.geometry import Triplets, WeightSpectrum, count_changed, unchanged
from offprincipal_peft.geometry.masks import MaskOptions, build_mask

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PAIRS = ((BF16, BF16), (F16, F16), (F32, F32), (F64, F64), (F32, BF16), (BF16, F32), (F16, F32), (F64, F16))
SHAPES = ((48, 80), (80, 48), (37, 61), (1, 90), (90, 1), (5, 3))


def pair(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16), share: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight with a decaying spectrum, and the same with ``share`` of its entries moved by up to 5 %."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(shape, generator=generator, dtype=F64)
    U, S, Vh = torch.linalg.svd(draw, full_matrices=False)
    base = (0.1 * (U * (1 + torch.arange(len(S))) ** -0.7) @ Vh).to(dtypes[0])
    steps = 0.05 * torch.randn(shape, generator=generator, dtype=F64)
    moved = base.double() * (1 + steps * (torch.rand(shape, generator=generator) < share))
    return base, moved.to(dtypes[1])


def common_of(*tensors: Tensor) -> torch.dtype:
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)


def top_of(base: Tensor) -> Triplets:
    return WeightSpectrum(base).top(max(1, min(base.shape) // 8))


def entrywise(
    base: Tensor, tuned: Tensor, *, common: torch.dtype, top: Triplets | None = None, **options: object
) -> Entrywise:
    """One comparison with a reference of its own."""
    return compare(Reference(base, top, **options), tuned, common=common)  # type: ignore[arg-type]


def find(base: Tensor, tuned: Tensor, **options: object) -> Entrywise:
    return entrywise(base, tuned, common=common_of(base, tuned), top=top_of(base), **options)


def changed_mask(base: Tensor, tuned: Tensor) -> Tensor:
    common = common_of(base, tuned)
    return ~unchanged(base.to(common), tuned.to(common))


# ---- the slow twins


def slow_counts(base: Tensor, tuned: Tensor) -> tuple[int, int, float, float]:
    common = common_of(base, tuned)
    first, second = base.to(common), tuned.to(common)
    delta = (tuned.float() - base.float()).double()
    stored = count_changed(first, second, 0.0, dtype=None)
    return count_changed(first, second), stored, float(delta.norm()), float(delta.abs().max())


def slow_low(base: Tensor, changed: Tensor, fraction: float) -> Overlap:
    """Bottom_alpha of the bf16 magnitudes, the last value's entries taken in equal parts."""
    sizes = base.float().bfloat16().abs().double()
    wanted = round(fraction * base.numel())
    last = sizes.view(-1).sort().values[wanted - 1]
    part = (wanted - int((sizes < last).sum())) / int((sizes == last).sum())
    hits = int((changed & (sizes < last)).sum()) + part * int((changed & (sizes == last)).sum())
    return Overlap(hits / int(changed.sum()), wanted / base.numel())


def slow_bins(base: Tensor) -> Tensor:
    sizes = base.float().bfloat16().abs().double().view(-1)
    ordered, n = sizes.sort().values.tolist(), base.numel()
    edges = torch.tensor([ordered[i * n // 64] for i in range(1, 64)], dtype=F64)
    return (sizes[:, None] >= edges).sum(dim=1).view(base.shape)


def slow_matched(base: Tensor, tuned: Tensor, principal: Tensor) -> Matched | None:
    bins, changed = slow_bins(base), changed_mask(base, tuned)
    squares = (tuned.float() - base.float()).double().square()
    sums, spread, drawn = [0.0] * 4, [0.0] * 2, 0
    for b in bins.unique():
        sides = [principal & (bins == b), ~principal & (bins == b)]
        weight = min(int(side.sum()) for side in sides)
        drawn += weight
        for i, side in enumerate(sides):
            if weight:
                rate, n = float(changed[side].double().mean()), int(side.sum())
                sums[i] += weight * rate
                sums[2 + i] += weight * float(squares[side].mean())
                spread[i] += weight**2 * rate * (1 - rate) / n
    if not drawn:
        return None
    error = math.sqrt(spread[0] / sums[0] ** 2 + spread[1] / sums[1] ** 2) if sums[0] and sums[1] else None
    rates = [value / drawn for value in sums]
    return Matched(rates[0], rates[1], rates[2], rates[3], drawn / int(principal.sum()), error)


def principal_of(base: Tensor, density: float = 0.5) -> Tensor:
    options = MaskOptions(principal_rank=max(1, min(base.shape) // 8), principal_density=density)
    return build_mask(base, "principal", options).entries


def variation(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean())


def close(found: object, expected: object, rel: float = 1e-9, floor: float = 1e-12) -> None:
    assert type(found) is type(expected)
    if found is not None:
        for name, value in dataclasses.asdict(expected).items():  # type: ignore[call-overload]
            seen = getattr(found, name)
            assert seen == (value if value is None else pytest.approx(value, rel=rel, abs=floor)), name


def numbers(found: Entrywise) -> list[float]:
    """Every number of it, in order."""

    def flat(value: object) -> list[float]:
        if isinstance(value, Tensor):
            return [float(x) for x in value.view(-1)]
        if isinstance(value, dict):
            return [x for inner in value.values() for x in flat(inner)]
        if isinstance(value, list | tuple):
            return [x for inner in value for x in flat(inner)]
        return [] if value is None else [float(value)]  # type: ignore[arg-type]

    return flat(dataclasses.asdict(found))
