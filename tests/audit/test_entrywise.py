"""Entrywise figures against dense masks, drawn pairs, every choice of signs, and changes planted by size or by mask."""

import itertools
import math

import pytest
import torch

from audit.dense import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    SHAPES,
    changed_mask,
    close,
    entrywise,
    find,
    numbers,
    pair,
    principal_of,
    slow_bins,
    slow_counts,
    slow_low,
    slow_matched,
    top_of,
    variation,
)
from helpers import DEVICES
from offprincipal_peft.audit import tiles as tiles_module
from offprincipal_peft.audit.results import Entrywise, Overlap
from offprincipal_peft.geometry import (
    Triplets,
    WeightSpectrum,
    column_update_ratios,
    energy_shares,
    overlap,
    row_update_ratios,
)
from offprincipal_peft.geometry.masks import MaskOptions, build_mask


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstDense:
    def test_counts_and_norms(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        base, tuned = pair(shape, dtypes)
        found = find(base, tuned)
        changed, stored, norm, largest = slow_counts(base, tuned)
        assert (found.changed, found.stored_changed, found.nonfinite) == (changed, stored, (0, 0))
        assert changed and (found.largest, found.norm) == (largest, pytest.approx(norm, rel=1e-13))  # 2e-16 seen

    def test_masks_and_magnitudes(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        base, tuned = pair(shape, dtypes)
        found = find(base, tuned, principal_density=0.4, low_density=0.37)
        changed, principal = changed_mask(base, tuned), principal_of(base, 0.4)
        close(found.low, slow_low(base, changed, 0.37))
        assert found.principal == Overlap(*overlap(principal, changed))
        close(found.matched, slow_matched(base, tuned, principal))
        bins, sizes = slow_bins(base), base.float().bfloat16().abs().double()
        members = [bins == b for b in bins.unique()]
        assert found.magnitudes is not None
        assert found.magnitudes.size == pytest.approx([float(sizes[m].mean()) for m in members], rel=1e-12)
        assert found.magnitudes.rate == pytest.approx([float(changed[m].double().mean()) for m in members], rel=1e-12)
        assert found.magnitudes.entries == [int(m.sum()) for m in members]
        on_mask = [float(changed[m & principal].double().mean()) for m in members]  # NaN where a bin has none
        rates = found.magnitudes.principal_rate
        assert rates is not None and [rate is None for rate in rates] == [math.isnan(rate) for rate in on_mask]
        known = [rate for rate in rates if rate is not None]
        assert known == pytest.approx([rate for rate in on_mask if not math.isnan(rate)], rel=1e-12)

    def test_shares(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        base, tuned = pair(shape, dtypes)
        top, found = top_of(base), find(base, tuned)
        U, V = top.U.double(), top.V.double()
        delta = tuned.float() - base.float()
        squares, h, g = delta.double().square(), U.square().sum(dim=1), V.square().sum(dim=1)
        total, k = float(squares.sum()), top.S.numel()
        random = (k / shape[0], k / shape[1], k * k / (shape[0] * shape[1]))
        sizes = (h @ squares).sum(), (squares @ g).sum(), h @ squares @ g
        for share, value, by_chance, size in zip(
            (found.output, found.input, found.both), energy_shares(delta, U, V), random, sizes, strict=True
        ):
            assert share is not None and share.random == by_chance
            assert share.value == pytest.approx(value, rel=1e-5, abs=1e-7)  # 8.9e-7 seen
            assert share.sizes == pytest.approx(float(size) / total, rel=1e-6)  # 3.7e-8 seen

    def test_stripes(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        base, tuned = pair(shape, dtypes)
        found, changed = find(base, tuned), changed_mask(base, tuned)
        squares, density = (tuned.float() - base.float()).double().square(), float(changed.double().mean())
        for stripes, ratios, dim, length in (
            (found.rows, row_update_ratios(changed), 1, shape[1]),
            (found.columns, column_update_ratios(changed), 0, shape[0]),
        ):
            assert stripes is not None
            assert stripes.mean == pytest.approx(density, rel=1e-12)
            assert stripes.std == pytest.approx(float(ratios.std(correction=0)), abs=1e-15)
            assert (stripes.least, stripes.most) == (float(ratios.min()), float(ratios.max()))
            assert stripes.random_std == pytest.approx(math.sqrt(density * (1 - density) / length), rel=1e-12)
            assert stripes.energy == pytest.approx(variation(squares.sum(dim=dim)), rel=1e-10, abs=1e-12)
            assert stripes.profile == ratios.tolist()
            n, mean, spread = base.numel(), squares.mean(), squares.var(correction=0)
            places = math.sqrt((n - length) / (n - 1) * float(spread) / length) / float(mean)
            assert stripes.random_energy == pytest.approx(places, rel=1e-9)

    def test_map(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        base, tuned = pair(shape, dtypes)
        heads = ([0, shape[0]], [])
        found, changed = find(base, tuned, map_cells=7, heads=heads).map, changed_mask(base, tuned)
        assert found is not None and (found.row_heads, found.column_heads) == heads
        rows, columns = (min(7, d) for d in shape)
        assert found.density.dtype == torch.uint8 and found.density.shape == (rows, columns)
        for i, j in itertools.product(range(rows), range(columns)):
            cell = changed[i * shape[0] // rows : (i + 1) * shape[0] // rows]
            cell = cell[:, j * shape[1] // columns : (j + 1) * shape[1] // columns]
            assert int(found.density[i, j]) == round(255 * int(cell.sum()) / cell.numel())


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F64, F16)], ids=str)
@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (1, 300), (300, 1), (3, 150)], ids=str)
@pytest.mark.parametrize("entries", [7, 40, 128])
def test_tiles_of_any_size_give_the_same(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(shape, dtypes)
    whole = numbers(find(base, tuned, map_cells=5))
    monkeypatch.setattr(tiles_module, "ENTRIES", entries)
    assert len(list(tiles_module.tiles(shape))) > 1
    assert numbers(find(base, tuned, map_cells=5)) == pytest.approx(whole, rel=1e-6, abs=1e-9)  # 2.0e-7 seen


@pytest.mark.parametrize("device", DEVICES)
def test_on_every_device(device: str) -> None:
    base, tuned = pair((130, 70))
    expected, top = find(base, tuned), top_of(base)
    there = Triplets(*(side.to(device) for side in top))
    found = entrywise(base.to(device), tuned.to(device), common=BF16, top=there)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-8)


# ---- chance


def test_sizes_are_the_mean_over_every_choice_of_signs() -> None:
    base, tuned = pair((2, 3), (F64, F64), share=1.0)
    delta, top = tuned.float() - base.float(), WeightSpectrum(base).top(1)
    found = entrywise(base, tuned, common=F64, top=top)
    shares = [
        energy_shares(delta * torch.tensor(signs).view(2, 3), top.U, top.V)
        for signs in itertools.product((1.0, -1.0), repeat=6)
    ]
    for i, share in enumerate((found.output, found.input, found.both)):
        assert share is not None
        expected = sum(each[i] for each in shares) / len(shares)
        assert share.sizes == pytest.approx(expected, rel=1e-6)  # 1.0e-7 seen
        assert share.sizes != pytest.approx(share.random, rel=1e-2)


def test_random_energy_is_that_of_the_same_changes_in_random_places() -> None:
    base, tuned = pair((30, 20), (F64, F64), share=0.2)
    found = find(base, tuned)
    squares = (tuned.float() - base.float()).double().square()
    for stripes, dim in ((found.rows, 1), (found.columns, 0)):
        drawn = [variation(squares.view(-1)[torch.randperm(600)].view(30, 20).sum(dim=dim)) for _ in range(300)]
        expected = math.sqrt(sum(value**2 for value in drawn) / len(drawn))
        assert stripes is not None and stripes.random_energy == pytest.approx(expected, rel=0.05)  # 0.9 % seen


def test_matched_is_the_mean_over_drawn_pairs() -> None:
    """The masks that training draws: matched(principal) and thinned(principal), over seeds."""
    base, tuned = pair((64, 96), share=0.4)
    found, changed = find(base, tuned).matched, changed_mask(base, tuned).double()
    sums = {"thinned": 0.0, "matched": 0.0}
    for seed, name in itertools.product(range(20), sums):
        mask = build_mask(base, f"{name}(principal)", MaskOptions(principal_rank=8, seed=seed))
        sums[name] += float(changed[mask.entries].mean()) / 20
        report = mask.reports[-1]
        assert found is not None and found.coverage == pytest.approx(report.coverage, rel=1e-12)  # type: ignore[union-attr]
    assert found.rate == pytest.approx(sums["thinned"], rel=0.01)  # 0.2 % seen
    assert found.other_rate == pytest.approx(sums["matched"], rel=0.01)  # 0.5 % seen


# ---- what the figures are for


def planted(preference: float) -> Entrywise:
    """Entries change more often the smaller they are and, beside that, ``preference`` times as often on the mask."""
    base, _ = pair((256, 192), (F32, F32))
    base, generator = base.bfloat16(), torch.Generator().manual_seed(3)
    sizes = base.float().abs()
    odds = 0.4 / (1 + (sizes / sizes.median()).square())
    odds = torch.where(principal_of(base), odds * preference, odds)
    chosen = torch.rand(base.shape, generator=generator) < odds
    return find(base, torch.where(chosen, (base.float() * 1.02).bfloat16(), base))


def test_magnitude_alone_lowers_the_overlap_and_matched_says_so() -> None:
    found = planted(1.0)
    assert found.principal is not None and found.matched is not None and found.matched.error is not None
    assert found.principal.value < 0.8 * found.principal.baseline  # 0.313 against 0.5 seen
    assert found.low is not None and found.low.value > 1.2 * found.low.baseline
    assert abs(math.log(found.matched.rate / found.matched.other_rate)) < 2 * found.matched.error  # 0.76 seen
    assert found.matched.error < 0.03 and found.matched.coverage > 0.4  # 0.022 and 0.409 seen


def test_a_preference_beside_the_magnitude_is_found() -> None:
    found = planted(0.7)
    assert found.matched is not None and found.matched.error is not None
    seen = math.log(found.matched.rate / found.matched.other_rate)
    assert abs(seen - math.log(0.7)) < 2 * found.matched.error  # 0.5 seen
    assert seen < -8 * found.matched.error  # 13 seen
