"""Ties, zeros, what is not finite, extreme sizes, empty matrices, partial requests and refusals."""

import dataclasses
import itertools

import pytest
import torch

from audit.dense import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    changed_mask,
    common_of,
    entrywise,
    find,
    numbers,
    pair,
    slow_counts,
    top_of,
)
from offprincipal_peft.audit import tiles as tiles_module
from offprincipal_peft.audit.counts import Counts, squared_norm
from offprincipal_peft.audit.entrywise import compare
from offprincipal_peft.audit.patterns import Patterns
from offprincipal_peft.audit.reference import PROBES, Reference
from offprincipal_peft.audit.results import Entrywise, Overlap
from offprincipal_peft.geometry import Triplets, WeightSpectrum, count_changed, lowest_mask, overlap
from offprincipal_peft.geometry.masks import MaskOptions, build_mask


def test_low_is_the_exact_mask_where_magnitudes_are_distinct() -> None:
    keys = torch.randperm(2000)[:1200].to(torch.int16) + 0x3800
    base = keys.view(BF16).view(30, 40) * (1 - 2 * torch.randint(0, 2, (30, 40)))
    tuned = torch.where(torch.rand(30, 40) < 0.3, base * 1.1, base)
    found = entrywise(base, tuned, common=BF16, wanted={"low"}).low
    assert found == Overlap(*overlap(lowest_mask(base.abs().float(), 0.5859), changed_mask(base, tuned)))


def test_principal_ties_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank one with few different scores and zero rows, in small tiles, against the mask that training takes."""
    column, row = torch.tensor([0, 1, 0, 2, 1, 0, 4, 0, 0.0]), torch.tensor([1, 0, 2, 2, 0, 1, 1, 0.0])
    base = torch.outer(column, row).bfloat16()
    tuned = torch.where(torch.rand(base.shape) < 0.5, base + 1, base)
    monkeypatch.setattr(tiles_module, "ENTRIES", 20)
    for density in (0.05, 0.2, 0.4, 0.5, 0.9):
        mask = build_mask(base, "principal", MaskOptions(principal_rank=1, principal_density=density)).entries
        reference = Reference(base, WeightSpectrum(base).top(1), principal_density=density)
        assert reference.codes is not None and torch.equal((reference.codes & 1).bool(), mask)
        found = compare(reference, tuned, common=BF16)
        assert found.principal == Overlap(*overlap(mask, changed_mask(base, tuned)))


@pytest.mark.parametrize(("density", "on_mask"), [(0.1, 0), (0.9, 4)])
def test_a_mask_of_no_entry_or_of_every_one(density: float, on_mask: int) -> None:
    """A matrix of four entries: a tenth of it is none, nine tenths are all, and neither leaves pairs to match."""
    base, tuned = pair((2, 2), share=1.0)
    found = find(base, tuned, principal_density=density)
    assert found.principal == Overlap(on_mask / 4, on_mask / 4) and found.matched is None
    assert found.magnitudes is not None and found.magnitudes.principal_rate is not None
    assert sum(rate is not None for rate in found.magnitudes.principal_rate) == on_mask


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_nothing_changed(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base = pair((24, 40), (BF16, BF16))[0].to(F16).to(dtypes[0])
    tuned = base.to(dtypes[1])
    found = find(base, tuned.to(dtypes[1]))
    assert (found.changed, found.stored_changed) == slow_counts(base, tuned)[:2] == (0, 0)
    assert (found.norm, found.largest) == (0.0, 0.0)
    assert found.low is found.principal is found.output is found.input is found.both is None
    assert found.matched is not None and (found.matched.rate, found.matched.error) == (0.0, None)
    assert found.rows is not None and found.columns is not None and found.map is not None
    for stripes in (found.rows, found.columns):
        assert (stripes.mean, stripes.std, stripes.random_std, stripes.energy, stripes.random_energy) == (0,) * 5
    assert not bool(found.map.density.any()) and found.magnitudes is not None and not any(found.magnitudes.rate)


def test_everything_changed() -> None:
    base, _ = pair((24, 40))
    found = find(base, -base)
    assert found.changed == found.stored_changed == base.numel()
    assert found.low is not None and found.low.value == pytest.approx(found.low.baseline, rel=1e-12)
    assert found.principal is not None and found.principal.value == found.principal.baseline
    assert found.matched is not None and found.matched.error == 0.0
    assert found.matched.rate == pytest.approx(1) and found.matched.other_rate == pytest.approx(1)
    assert found.map is not None and bool((found.map.density == 255).all())
    assert found.rows is not None and found.rows.random_std == 0.0


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_the_zeros_are_one_number(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base, tuned = torch.zeros(6, 8, dtype=dtypes[0]), torch.zeros(6, 8, dtype=dtypes[1])
    base[0], tuned[1], base[2], tuned[3, 0] = -0.0, -0.0, 1.0, 2.0
    tuned[2] = 1.0
    found = entrywise(base, tuned, common=common_of(base, tuned))
    assert (found.changed, found.stored_changed, found.largest) == (1, 1, 2.0)
    plain, signed = torch.zeros(6, 8, dtype=dtypes[0]), -torch.zeros(6, 8, dtype=dtypes[1])
    plain[0], signed[0], signed[1] = 1.0, 1.0, 2.0
    for sides in ((plain, signed), (signed, plain)):  # of either sign on one side alone
        found = entrywise(*sides, common=common_of(*sides))
        assert (found.changed, found.stored_changed, found.largest) == (8, 8, 2.0)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_changes_that_only_the_files_hold(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """One step of the stored dtype, too small for bf16 unless it is bf16."""
    base = torch.ones(8, 8, dtype=dtypes[0])
    tuned = torch.ones(8, 8, dtype=dtypes[1])
    tuned[0] = torch.nextafter(tuned[0], tuned[0] + 1)
    common, found = common_of(base, tuned), find(base, tuned)
    stored = 8 if common == dtypes[1] else 0
    assert found.stored_changed == stored == slow_counts(base, tuned)[1]
    assert found.changed == (8 if dtypes[1] == BF16 else 0)
    assert (found.norm > 0) == (dtypes[1] != F64)  # in fp32 the last digits of two fp64 values are equal


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("bad", ["base", "tuned", "both"])
def test_what_is_not_finite_has_counts_alone(dtypes: tuple[torch.dtype, torch.dtype], bad: str) -> None:
    base, tuned = pair((30, 20), dtypes)
    for name, side in (("base", base), ("tuned", tuned)):
        if bad in (name, "both"):
            side[3, 4], side[5, 6], side[7, :3] = torch.nan, torch.inf, -torch.inf
    common = common_of(base, tuned)
    top = Triplets(torch.ones(30, 1), torch.ones(1), torch.ones(20, 1))
    found = entrywise(base, tuned, common=common, top=top)
    usable = base.isfinite() & tuned.isfinite()
    changed = count_changed(base.to(common), tuned.to(common))
    stored = count_changed(base.to(common), tuned.to(common), 0.0, dtype=None)
    delta = (tuned.float() - base.float()).double()[usable]
    expected = Entrywise(
        changed, stored, found.norm, float(delta.abs().max()), (5 * (bad != "tuned"), 5 * (bad != "base"))
    )
    assert found == expected and found.norm == pytest.approx(float(delta.norm()), rel=1e-12)


def test_extreme_values_keep_their_digits() -> None:
    """Squares beyond fp32 on both sides, fp32 values that are infinite in bf16, and a difference beyond fp32."""
    base, tuned = pair((20, 30), (F32, F32))
    usual = find(base, tuned)
    for scale in (2.0**-90, 2.0**100):
        found = find(base * scale, tuned * scale)
        assert found.norm == pytest.approx(usual.norm * scale, rel=1e-12)
        assert found.rows is not None and usual.rows is not None
        assert found.rows.energy == pytest.approx(usual.rows.energy, rel=1e-9)
        assert found.matched is not None and usual.matched is not None
        assert found.matched.energy == pytest.approx(usual.matched.energy * scale**2, rel=1e-9)
    base[0, 0], tuned[0, 0] = 3.402e38, 3.402e38
    found = entrywise(base, tuned, common=F32)
    assert (found.changed, found.nonfinite, found.magnitudes) == (usual.changed, (0, 0), None)
    tuned[0, 0] = -3.402e38
    found = entrywise(base, tuned, common=F32)
    assert found.nonfinite == (0, 0) and found.map is None and found.norm == pytest.approx(6.804e38, rel=1e-6)


def test_an_empty_matrix() -> None:
    for shape in ((0, 4), (4, 0)):
        assert entrywise(torch.zeros(shape), torch.zeros(shape), common=F32) == Entrywise(0, 0, 0.0, 0.0)


# ---- what is asked for


FIELDS = {
    "low": {"low"},
    "principal": {"principal"},
    "matched": {"matched"},
    "magnitudes": {"magnitudes"},
    "shares": {"output", "input", "both"},
    "stripes": {"rows", "columns"},
    "map": {"map"},
}


@pytest.mark.parametrize("probe", PROBES)
def test_only_what_is_wanted_is_there_and_it_is_the_same(probe: str) -> None:
    base, tuned = pair((40, 30))
    everything, found = find(base, tuned), find(base, tuned, wanted={probe})
    fields = {field for names in FIELDS.values() for field in names}
    assert {field for field in fields if getattr(found, field) is not None} == FIELDS[probe]
    assert numbers(found) == numbers(
        dataclasses.replace(everything, **dict.fromkeys(fields - FIELDS[probe], None))  # type: ignore[arg-type]
    )


def test_without_bases_what_needs_them_is_none() -> None:
    base, tuned = pair((40, 30))
    everything, found = find(base, tuned), entrywise(base, tuned, common=BF16)
    none = dict.fromkeys(("principal", "matched", "output", "input", "both"))
    assert everything.magnitudes is not None
    sizes = dataclasses.replace(everything.magnitudes, principal_rate=None)
    assert numbers(found) == numbers(dataclasses.replace(everything, magnitudes=sizes, **none))  # type: ignore[arg-type]
    assert all(getattr(found, name) is None for name in none)


@pytest.mark.parametrize("entries", [100, 1 << 18])
def test_one_reference_serves_several_tuned_and_none_is_written(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "ENTRIES", entries)
    base, first = pair((40, 30))
    second = pair((40, 30), seed=1)[1]
    copies = base.clone(), first.clone(), second.clone()
    reference, patterns = Reference(base, top_of(base)), Patterns(base.shape, 2)
    for index, tuned in enumerate((first, second)):
        found = compare(reference, tuned, common=BF16, patterns=patterns, index=index)
        assert numbers(found) == numbers(find(base, tuned))
        assert torch.equal((patterns.codes >> index & 1).bool().view(40, 30), changed_mask(base, tuned))
    assert all(torch.equal(*sides) for sides in zip(copies, (base, first, second), strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_full_precision_tensors_are_not_written(dtype: torch.dtype) -> None:
    base, tuned = pair((40, 30), (dtype, dtype))
    copies = base.clone(), tuned.clone()
    find(base, tuned)
    Counts(dtype).add(base, tuned)
    squared_norm(base)
    assert torch.equal(base, copies[0]) and torch.equal(tuned, copies[1])


def test_a_transposed_view_is_read_as_it_is() -> None:
    base, tuned = pair((40, 30))
    assert numbers(find(base.T.contiguous().T, tuned.T.contiguous().T)) == numbers(find(base, tuned))


class TestRefusals:
    def test_arguments(self) -> None:
        base, tuned = pair((12, 10))
        top = top_of(base)
        with pytest.raises(ValueError, match=r"must be a matrix, got shape \(12,\)"):
            Reference(base[:, 0])
        with pytest.raises(TypeError, match=r"got torch.int8"):
            Reference(base.to(torch.int8))
        with pytest.raises(ValueError, match="unknown probes mapp: there are low, principal"):
            Reference(base, wanted={"mapp", "low"})
        for name in ("principal_density", "low_density"):
            with pytest.raises(ValueError, match=f"{name} must lie strictly between 0 and 1, got 1.0"):
                Reference(base, **{name: 1.0})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\(10, 1\), \(1,\), \(12, 1\) are not those of a \(12, 10\) weight"):
            Reference(base, Triplets(top.V, top.S, top.U))
        with pytest.raises(ValueError, match=r"shape \(12, 10\) on cpu and the tuned tensor \(10, 12\)"):
            compare(Reference(base), tuned.T, common=BF16)


@pytest.mark.parametrize("shape", [(7, 5), (1, 30), (30, 1), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("entries", [1, 4, 12, 100])
def test_tiles_cover_a_matrix_once_in_flat_order(shape: tuple[int, int], entries: int) -> None:
    matrix, done = torch.arange(shape[0] * shape[1]).view(shape), 0
    for tile in tiles_module.tiles(shape, entries):
        part = tile.of(matrix)
        assert tile.start == done and part.view(-1).tolist() == list(range(tile.start, tile.stop))
        assert part.numel() <= max(entries, 1)
        done = tile.stop
    assert done == matrix.numel()


@pytest.mark.parametrize(("length", "runs"), [(1, 128), (128, 128), (129, 128), (300, 128), (1000, 7)])
def test_runs_of_neighbours_cover_all_and_differ_by_one(length: int, runs: int) -> None:
    bounds, values = tiles_module.edges(length, runs), torch.rand(length, dtype=F64)
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, length, min(runs, length)) and max(sizes) - min(sizes) <= 1
    means = [float(values[start:stop].mean()) for start, stop in itertools.pairwise(bounds)]
    assert tiles_module.run_means(values, runs) == pytest.approx(means, rel=1e-14)  # 4.4e-16 seen


@pytest.mark.parametrize("entries", [100, 200, 500])
def test_tiles_without_a_change_are_passed_over(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair((61, 37))
    tuned[:40], tuned[50:55] = base[:40], base[50:55]
    whole = find(base, tuned, map_cells=5)
    monkeypatch.setattr(tiles_module, "ENTRIES", entries)
    assert numbers(find(base, tuned, map_cells=5)) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-9)  # 1.5e-7 seen
    changed = changed_mask(base, tuned)
    assert whole.map is not None and not bool(whole.map.density[:3].any()) and bool(whole.map.density[3:].all())
    assert whole.rows is not None and whole.rows.mean == pytest.approx(float(changed.double().mean()), rel=1e-12)
