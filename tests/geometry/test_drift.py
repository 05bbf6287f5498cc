"""Drift figures against plain Python: exact fractions for counts, lists of floats for spectra, simulated chance."""

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from offprincipal_peft import geometry
from offprincipal_peft.geometry import drift
from offprincipal_peft.geometry.drift import (
    column_update_ratios,
    consensus,
    cumulative_energy,
    effective_rank,
    head_boundaries,
    jaccard,
    jaccard_baseline,
    max_spectral_shift,
    normalized_spectral_shift,
    overlap,
    row_update_ratios,
    smooth,
    spectral_shift,
    stable_rank,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ANY = (normalized_spectral_shift, max_spectral_shift, effective_rank, stable_rank, cumulative_energy)


def _values(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _mask(density: float, shape: tuple[int, ...] = (23, 31), seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def _points(mask: Tensor) -> set[int]:
    return {i for i, marked in enumerate(mask.reshape(-1).tolist()) if marked}


class TestSpectralShift:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 2, 57])
    def test_plain_python(self, dtype: torch.dtype, n: int) -> None:
        before, after = _values(n, dtype), _values(n, dtype, seed=1)
        pairs = list(zip(sorted(before.tolist()), sorted(after.tolist()), strict=True))
        expected = math.sqrt(sum((v - s) ** 2 for s, v in pairs)) / math.sqrt(sum(s * s for s, _ in pairs))
        assert normalized_spectral_shift(before, after) == pytest.approx(expected, rel=1e-14)  # seen 2.7e-16
        assert max_spectral_shift(before, after) == max(abs(v - s) for s, v in pairs)

    def test_small_shifts_and_extreme_scales(self) -> None:
        """1e-9 of the spectrum, and magnitudes whose squares leave fp64."""
        before = _values(40) + 1
        after = before * (1 + 1e-9)
        assert normalized_spectral_shift(before, after) == pytest.approx(1e-9, rel=1e-6)  # seen 8.6e-8
        for scale in (1e-200, 1e200):
            assert normalized_spectral_shift(before * scale, 2 * before * scale) == pytest.approx(1, rel=1e-14)

    @pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 9), (9, 1), (16, 16)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_weights_with_both_bounds(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(2)
        before = torch.randn(shape, generator=generator).to(dtype)
        after = (before + 0.05 * torch.randn(shape, generator=generator)).to(dtype)
        s, v = (torch.linalg.svd(w.double()).S for w in (before, after))
        found = spectral_shift(before, after)
        assert found.normalized == pytest.approx(float((v - s).norm() / s.norm()), rel=1e-11)  # seen 5e-14
        assert found.largest == pytest.approx(float((v - s).abs().max()), rel=1e-11)  # seen 1.5e-13
        delta = after.double() - before.double()
        assert found.largest <= float(torch.linalg.matrix_norm(delta, 2)) * (1 + 1e-12)
        assert found.normalized <= float(delta.norm() / before.double().norm()) * (1 + 1e-12)

    def test_a_rotation_shifts_nothing(self) -> None:
        before = torch.randn(8, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
        assert spectral_shift(before, Q @ before).normalized < 1e-14  # seen 4e-16
        assert float((Q @ before - before).norm() / before.norm()) > 1

    def test_zero_weights(self) -> None:
        zero, one = torch.zeros(3), torch.ones(3)
        assert normalized_spectral_shift(zero, zero) == 0.0
        assert normalized_spectral_shift(zero, one) == math.inf
        assert normalized_spectral_shift(one, zero) == 1.0
        assert spectral_shift(torch.zeros(3, 4), torch.zeros(3, 4)) == (0.0, 0.0)

    def test_weights_of_two_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"same shape, got \(3, 4\), \(4, 3\)"):
            spectral_shift(torch.ones(3, 4), torch.ones(4, 3))
        with pytest.raises(ValueError, match="5 and 4 values"):
            normalized_spectral_shift(torch.ones(5), torch.ones(4))

    @pytest.mark.parametrize("function", ANY, ids=lambda function: function.__name__)
    def test_bad_spectra(self, function: Callable[..., Any]) -> None:
        arguments = 2 if function in (normalized_spectral_shift, max_spectral_shift) else 1
        for bad in ([1.0, -1e-9], [1.0, math.nan], [math.inf, 1.0]):
            with pytest.raises(ValueError, match="finite and not negative; 1 of 2 are not"):
                function(*[torch.tensor(bad)] * arguments)
        for shape in ((0,), (2, 2), ()):
            with pytest.raises(ValueError, match="1-D, got shape"):
                function(*[torch.ones(shape)] * arguments)
        with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
            function(*[torch.ones(2, dtype=torch.int64)] * arguments)


class TestRanks:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 3, 64])
    def test_plain_python(self, dtype: torch.dtype, n: int) -> None:
        values = _values(n, dtype)
        s = sorted(values.tolist(), reverse=True)
        entropy = -sum(x / math.fsum(s) * math.log(x / math.fsum(s)) for x in s if x > 0)
        assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-13)  # seen 9e-16
        assert stable_rank(values) == pytest.approx(math.fsum(x * x for x in s) / s[0] ** 2, rel=1e-13)  # seen 1.7e-16
        shares = [math.fsum(x * x for x in s[: k + 1]) / math.fsum(x * x for x in s) for k in range(n)]
        assert cumulative_energy(values).tolist() == pytest.approx(shares, rel=1e-13)  # seen 7e-16
        assert cumulative_energy(values)[-1] == 1.0

    @pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
    def test_planted_ranks(self, scale: float) -> None:
        for r in (1, 5):
            values = torch.cat([torch.full((r,), scale, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)])
            assert effective_rank(values) == pytest.approx(r, rel=1e-14)  # seen 1.8e-16
            assert stable_rank(values) == r
            assert cumulative_energy(values)[r - 1] == 1.0

    def test_zero_and_a_tail(self) -> None:
        zero = torch.zeros(4)
        assert (effective_rank(zero), stable_rank(zero), cumulative_energy(zero).tolist()) == (0.0, 0.0, [0.0] * 4)
        tail = torch.cat([torch.ones(1), torch.full((1000,), 1e-7)])
        assert effective_rank(tail) == pytest.approx(1.0017, abs=1e-4)  # seen 1.00171
        assert stable_rank(tail) == pytest.approx(1, abs=1e-10)  # seen 1e-11

    def test_of_a_weight(self) -> None:
        weight = torch.randn(10, 25, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        expected = float(weight.square().sum() / torch.linalg.matrix_norm(weight, 2) ** 2)
        assert stable_rank(geometry.singular_values(weight)) == pytest.approx(expected, rel=1e-12)  # seen 1.3e-16
        top = geometry.top_basis(weight, 4)
        share = geometry.energy_shares(weight, top.U, top.V).both
        assert float(cumulative_energy(geometry.singular_values(weight))[3]) == pytest.approx(
            share, rel=1e-12
        )  # seen 1.2e-15


class TestOverlap:
    @pytest.mark.parametrize("shape", [(23, 31), (1, 50), (4, 3, 5)])
    def test_fractions(self, shape: tuple[int, ...]) -> None:
        reference, update = _mask(0.5, shape), _mask(0.2, shape, seed=1)
        marked, changed = _points(reference), _points(update)
        found = overlap(reference, update)
        assert found.value == float(Fraction(len(marked & changed), len(changed)))
        assert found.baseline == float(Fraction(len(marked), reference.numel()))
        assert found != overlap(update, reference)  # a share of the update, not of the reference

    def test_extremes(self) -> None:
        full, empty, some = torch.ones(3, 4).bool(), torch.zeros(3, 4).bool(), _mask(0.5, (3, 4))
        assert overlap(full, some) == (1.0, 1.0)
        assert overlap(empty, some) == (0.0, 0.0)
        assert overlap(some, some).value == 1.0
        with pytest.raises(ValueError, match=r"update mask of shape \(3, 4\) is empty: no entry changed"):
            overlap(some, empty)

    @pytest.mark.parametrize("function", [overlap, jaccard, lambda a, b: consensus([a, b])])
    def test_bad_masks(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        mask = _mask(0.5)
        with pytest.raises(ValueError, match=r"is \(23, 31\) on cpu, .* is \(31, 23\) on cpu"):
            function(mask, mask.T)
        with pytest.raises(ValueError, match="on meta"):
            function(mask, mask.to("meta"))
        with pytest.raises(TypeError, match=r"boolean mask, got torch\.float32; compare first"):
            function(mask, mask.float())
        with pytest.raises(ValueError, match=r"shape \(0, 3\) has no entries"):
            function(mask[:0, :3], mask[:0, :3])


class TestConsensus:
    def test_jaccard_by_sets(self) -> None:
        a, b = _mask(0.4), _mask(0.3, seed=1)
        expected = Fraction(len(_points(a) & _points(b)), len(_points(a) | _points(b)))
        assert jaccard(a, b) == jaccard(b, a) == float(expected)
        assert jaccard(a, a) == 1.0 and jaccard(a, ~a) == 0.0 and jaccard(a, torch.zeros_like(a)) == 0.0
        with pytest.raises(ValueError, match="a and b are both empty"):
            jaccard(a & ~a, a & ~a)

    def test_the_baseline_is_what_independent_masks_give(self) -> None:
        for p, q in ((0.6, 0.55), (0.05, 0.9), (1.0, 0.3)):
            found = jaccard(_mask(p, (1000, 1000)), _mask(q, (1000, 1000), seed=1))
            assert found == pytest.approx(jaccard_baseline(p, q), abs=3e-3)  # seen 6.7e-4
            assert jaccard_baseline(p, q) == pytest.approx(float(Fraction(p) * Fraction(q) / _union(p, q)), rel=1e-15)
        assert jaccard_baseline(0.0, 0.5) == 0.0 and jaccard_baseline(1.0, 1.0) == 1.0
        for p, q in ((0.0, 0.0), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)):
            with pytest.raises(ValueError, match="densities must lie in"):
                jaccard_baseline(p, q)

    @pytest.mark.parametrize("n", [2, 3, 5])
    def test_by_sets(self, n: int) -> None:
        masks = [_mask(0.3 + 0.1 * i, seed=i) for i in range(n)]
        points, size = [_points(mask) for mask in masks], masks[0].numel()
        found = consensus(masks)
        pairs = list(itertools.combinations(range(n), 2))
        assert [(pair.first, pair.second) for pair in found.pairs] == pairs
        observed = [Fraction(len(points[i] & points[j]), len(points[i] | points[j])) for i, j in pairs]
        assert [pair.jaccard for pair in found.pairs] == [float(x) for x in observed]
        p = [Fraction(len(marked), size) for marked in points]
        chance = [p[i] * p[j] / (p[i] + p[j] - p[i] * p[j]) for i, j in pairs]
        assert [pair.baseline for pair in found.pairs] == pytest.approx([float(x) for x in chance], rel=1e-14)
        assert found.jaccard == pytest.approx(float(sum(observed) / len(pairs)), rel=1e-14)
        assert found.baseline == pytest.approx(float(sum(chance) / len(pairs)), rel=1e-14)
        assert _points(found.intersection) == set.intersection(*points)
        times = [sum(entry in marked for marked in points) for entry in range(size)]
        assert found.frequencies == tuple(times.count(count) for count in range(n + 1))
        expected = [Fraction(0)] * (n + 1)
        for changed in itertools.product((0, 1), repeat=n):
            expected[sum(changed)] += math.prod(q if c else 1 - q for q, c in zip(p, changed, strict=True))
        assert found.baseline_frequencies == pytest.approx([float(size * x) for x in expected], rel=1e-12)
        json.dumps([found.pairs, found.frequencies, found.baseline_frequencies])

    def test_many_runs_and_equal_ones(self) -> None:
        mask = _mask(0.5)
        found = consensus([mask] * 300)  # more than a byte counts
        assert found.jaccard == 1.0 and torch.equal(found.intersection, mask)
        assert found.frequencies[300] == int(mask.sum()) and found.frequencies[44] == 0

    def test_too_few_runs_and_idle_ones(self) -> None:
        mask = _mask(0.5)
        for masks in ([], [mask]):
            with pytest.raises(ValueError, match=f"two runs or more, got {len(masks)}"):
                consensus(masks)
        with pytest.raises(ValueError, match=r"masks\[1\] and masks\[2\] are both empty"):
            consensus([mask, mask & ~mask, mask & ~mask])
        assert consensus([mask, mask & ~mask]).jaccard == 0.0


def _union(p: float, q: float) -> Fraction:
    return Fraction(p) + Fraction(q) - Fraction(p) * Fraction(q)


class TestStripes:
    @pytest.mark.parametrize("shape", [(7, 12), (1, 5), (5, 1)])
    def test_ratios(self, shape: tuple[int, int]) -> None:
        changed = _mask(0.3, shape)
        rows = [float(Fraction(sum(row), shape[1])) for row in changed.tolist()]
        columns = [float(Fraction(sum(column), shape[0])) for column in changed.T.tolist()]
        assert (row_update_ratios(changed).tolist(), column_update_ratios(changed).tolist()) == (rows, columns)
        assert row_update_ratios(changed).dtype == torch.float64
        assert torch.equal(column_update_ratios(changed), row_update_ratios(changed.T))

    def test_bad_masks(self) -> None:
        for function in (row_update_ratios, column_update_ratios):
            for shape in ((3,), (2, 3, 4), (0, 4), (4, 0)):
                with pytest.raises(ValueError, match=r"2-D mask with entries, got shape \("):
                    function(torch.ones(shape).bool())
            with pytest.raises(TypeError, match=r"changed must be a boolean mask, got torch\.int64"):
                function(torch.ones(2, 2, dtype=torch.int64))

    @pytest.mark.parametrize("window", [1, 3, 5, 31, 10**12 + 1])
    @pytest.mark.parametrize("n", [1, 2, 17])
    def test_smoothing(self, n: int, window: int) -> None:
        values, reach = _values(n), window // 2
        near = [values.tolist()[max(0, i - reach) : i + reach + 1] for i in range(n)]
        expected = [math.fsum(part) / len(part) for part in near]
        assert smooth(values, window).tolist() == pytest.approx(expected, rel=1e-14)  # seen 2.5e-16
        assert torch.allclose(smooth(torch.ones(n), window), torch.ones(n).double(), rtol=1e-15, atol=0)

    def test_smoothing_takes_any_dtype_and_three_by_default(self) -> None:
        assert smooth(torch.tensor([0, 3, 6, 0])).tolist() == [1.5, 3.0, 3.0, 3.0]
        assert smooth(_values(9, torch.bfloat16)).dtype == torch.float64
        padded = torch.nn.functional.avg_pool1d(torch.ones(1, 1, 4), 3, stride=1, padding=1)[0, 0]
        assert padded[0] < 0.7 and smooth(torch.ones(4))[0] == 1  # the ends of the plain pooling fall

    @pytest.mark.parametrize("window", [0, 2, 4, -3, 3.0, True])
    def test_bad_windows(self, window: Any) -> None:
        with pytest.raises(ValueError, match="odd positive integer, got"):
            smooth(torch.ones(5), window)

    @pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
    def test_bad_series(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="values must be 1-D with entries"):
            smooth(torch.ones(shape))

    def test_head_boundaries(self) -> None:
        assert head_boundaries(12, num_heads=3) == head_boundaries(12, head_dim=4) == [0, 4, 8, 12]
        assert head_boundaries(12, num_heads=3, head_dim=4) == [0, 4, 8, 12]
        assert head_boundaries(5, num_heads=1) == [0, 5] and head_boundaries(2, num_heads=2) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_heads": 5}, "12 rows do not divide into heads with num_heads = 5"),
            ({"head_dim": 5}, "12 rows do not divide into heads with head_dim = 5"),
            ({"num_heads": 13}, "12 rows do not divide into heads with num_heads = 13"),
            ({"head_dim": 24}, "12 rows do not divide into heads with head_dim = 24"),
            ({"num_heads": 3, "head_dim": 3}, "12 rows do not divide into heads with num_heads = 3, head_dim = 3"),
            ({}, "give num_heads or head_dim"),
            ({"num_heads": 0}, "sizes must be positive, got num_heads = 0"),
            ({"head_dim": -4, "num_heads": 0}, "got num_heads = 0, head_dim = -4"),
        ],
    )
    def test_heads_that_do_not_fit(self, arguments: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            head_boundaries(12, **arguments)


def test_stripes_of_one_head_are_found() -> None:
    """The chain that a figure is made of: what changed, its rows, smoothed, by head."""
    before = torch.randn(32, 40, generator=torch.Generator().manual_seed(6))
    after = before.clone()
    after[8:16] *= 1.1  # the second of four heads
    ratios = smooth(row_update_ratios(~geometry.unchanged(before, after)))
    heads = head_boundaries(32, num_heads=4)
    means = [float(ratios[a:b].mean()) for a, b in itertools.pairwise(heads)]
    assert means[1] > 0.9 and means[3] == 0.0 and max(means[0], means[2]) < 0.05  # seen 0.92, 0, 0.04
    assert geometry.update_sparsity(before, after) == 0.75
    assert overlap(torch.ones_like(before).bool().tril(), before != after).baseline == pytest.approx(0.41, abs=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device(device: str) -> None:
    masks = [_mask(0.4), _mask(0.3, seed=1), _mask(0.5, seed=2)]
    here, there = consensus(masks), consensus([mask.to(device) for mask in masks])
    assert there.intersection.device.type == device
    assert there._replace(intersection=here.intersection) == here
    assert overlap(masks[0].to(device), masks[1].to(device)) == overlap(masks[0], masks[1])
    ratios = smooth(row_update_ratios(masks[0].to(device)))
    assert torch.allclose(ratios.cpu(), smooth(row_update_ratios(masks[0])), rtol=1e-14, atol=0)
    values, after = _values(40), _values(40, seed=1)
    for function in (normalized_spectral_shift, max_spectral_shift):
        assert function(values.to(device), after) == pytest.approx(function(values, after), rel=1e-14)
    assert effective_rank(values.to(device)) == pytest.approx(effective_rank(values), rel=1e-14)


def test_public_names_are_the_modules_own() -> None:
    for name in ("normalized_spectral_shift", "overlap", "consensus", "effective_rank", "smooth"):
        assert getattr(geometry, name) is getattr(drift, name) and name in geometry.__all__
