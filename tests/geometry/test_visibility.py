"""Visibility and update sparsity over every number of 16 bits against a search among the numbers of the format."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import DEVICES
from offprincipal_peft.geometry import precision
from offprincipal_peft.geometry.precision import (
    count_changed,
    exceeds_half_ulp,
    ulp,
    unchanged,
    update_sparsity,
    visible,
)

SIXTEEN = (torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def _patterns(dtype: torch.dtype, shift: int = 0) -> Tensor:
    """All 2^16 numbers of a format by their bits, beginning at ``shift``."""
    return torch.arange(1 << 16, dtype=torch.int32).roll(-shift).to(torch.int16).view(dtype)


def _every_exponent() -> Tensor:
    """fp32 (2^16, 4): all signs, exponents and upper mantissas, with low halves next to the edges; NaN and inf too."""
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    return (high + torch.tensor([0, 1, 0x7FFF, 0xFFFF])).to(torch.int32).view(torch.float32)


def _magnitudes(dtype: torch.dtype) -> Tensor:
    """0 and the positive finite numbers in fp64, ascending: the index is the bits. Then what would follow the last."""
    values = _patterns(dtype)[: 1 << 15].double()
    values = values[values.isfinite()]
    return torch.cat([values, 2 * values[-1:] - values[-2:-1]])


def _definition(before: float, after: float, eta: float) -> bool:
    w, v = Fraction(before), Fraction(after)
    return abs(v - w) <= Fraction(eta) * max(abs(w), abs(v))


class TestUnchanged:
    @pytest.mark.parametrize("shift", [0, 1, -1, 2, 1 << 15, 12345])
    def test_bf16_is_equality_of_the_bits_up_to_signed_zeros(self, shift: int) -> None:
        """Every bit pattern against itself, its neighbours, its negative and another; NaN as one value."""
        before, after = _patterns(torch.bfloat16), _patterns(torch.bfloat16, shift)
        bits = before.view(torch.int16) == after.view(torch.int16)
        expected = bits | ((before == 0) & (after == 0)) | (before.isnan() & after.isnan())
        assert torch.equal(unchanged(before, after), expected)
        w, v = before.double(), after.double()
        finite = w.isfinite() & v.isfinite()
        definition = (v - w).abs() <= 1e-3 * torch.maximum(w.abs(), v.abs())
        assert torch.equal(expected[finite], definition[finite])

    def test_the_smallest_relative_step_of_bf16_is_two_to_the_minus_eight(self) -> None:
        before, after = _patterns(torch.bfloat16)[: 1 << 15], _patterns(torch.bfloat16, 1)[: 1 << 15]
        moved = ~before.isnan() & ~after.isnan()
        assert not unchanged(before, after, eta=2.0**-8 * (1 - 2.0**-40))[moved].any()
        at_the_edge = unchanged(before, after, eta=2.0**-8) & moved
        assert int(at_the_edge.sum()) == 253  # into each binade of normal numbers but the first
        assert not (after.view(torch.int16)[at_the_edge] & 0x7F).any()

    @pytest.mark.parametrize("eta", [0.0, 1e-3, 2.0**-11, 2.0**-8, 0.3125])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_as_given_is_the_definition(self, dtype: torch.dtype, eta: float) -> None:
        generator = torch.Generator().manual_seed(0)
        before = torch.randn(40, 50, generator=generator)
        step = torch.randn(40, 50, generator=generator) * max(eta, 1e-3) * before
        before, after = before.to(dtype), (before + step).to(dtype)
        after[:, ::7] = before[:, ::7]
        expected = [
            _definition(w, v, eta) for w, v in zip(before.view(-1).tolist(), after.view(-1).tolist(), strict=True)
        ]
        assert 0 < sum(expected) < len(expected)
        assert unchanged(before, after, eta, dtype=None).view(-1).tolist() == expected

    def test_what_bf16_does_not_store_is_unchanged_by_default_only(self) -> None:
        w = torch.tensor([1.0, 1.0, 1 + 2.0**-8 * 0.999, 1.0])
        v = torch.tensor([1 + 2.0**-10, 1 + 2.0**-7, 1 + 2.0**-8 * 1.001, 1 + 2.0**-20])
        # hidden, a step, a small change across a rounding edge, a tiny one
        assert unchanged(w, v).tolist() == [True, False, False, True]
        assert unchanged(w, v, dtype=None).tolist() == [True, False, True, True]
        assert unchanged(w, v, dtype=None, eta=0).tolist() == [False] * 4
        assert unchanged(w, v, dtype=torch.float16).tolist() == [True, False, True, True]  # 2^-10 is one ULP, under eta
        assert unchanged(w, v, dtype=torch.float16, eta=0).tolist() == [False, False, True, True]
        assert unchanged(w.bfloat16(), w).tolist() == [True] * 4  # a pair of two dtypes, as stored in bf16

    def test_infinities_and_nan(self) -> None:
        values = torch.tensor([INF, -INF, NAN, 1.0, 0.0, -0.0])
        grid = torch.meshgrid(values, values, indexing="ij")
        expected = torch.eye(6, dtype=torch.bool)
        expected[4, 5] = expected[5, 4] = True
        for dtype in (torch.bfloat16, torch.float16, torch.float32, None):
            for eta in (0.0, 1e-3, 0.5):
                assert torch.equal(unchanged(grid[0], grid[1], eta, dtype=dtype), expected)
        literal = (grid[1] - grid[0]).abs() <= 0.5 * torch.maximum(grid[0].abs(), grid[1].abs())
        assert bool(literal[0, 3]) and not bool(literal[0, 0])  # the bare formula has both the wrong way round

    def test_bad_input(self) -> None:
        w = torch.ones(2, 3)
        for function in (unchanged, count_changed, update_sparsity):
            call: Callable[..., Any] = function
            with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(3, 2\)"):
                call(w, w.T)
            with pytest.raises(TypeError, match=r"after must be bfloat16, .* got torch.int64"):
                call(w, w.long())
            with pytest.raises(TypeError, match=r"rounding .* dtype=torch.bfloat16"):
                call(w, w.half(), dtype=None)
            with pytest.raises(TypeError, match=r"stored dtype must be .* got torch.float64"):
                call(w, w, dtype=torch.float64)
            for eta in (-1e-3, 1.0, NAN):
                with pytest.raises(ValueError, match=r"eta is a relative change in \[0, 1\)"):
                    call(w, w, eta)
            with pytest.raises(ValueError, match="same device, got cpu and meta"):
                call(w, w.to("meta"))


class _LargestResult(TorchDispatchMode):
    """The largest number of entries that any operation allocated; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in old:
            self.entries = max(self.entries, result.numel())
        return result


class TestUpdateSparsity:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(), (1, 9), (30, 17), (3, 4, 5)])
    def test_counts_in_chunks(
        self, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "_CHUNK", 7)
        generator = torch.Generator().manual_seed(1)
        before = torch.randn(shape, generator=generator).to(dtype)
        after = before * (1 + 4e-3 * torch.randn(shape, generator=generator)).to(dtype)
        pairs = zip(before.bfloat16().view(-1).tolist(), after.bfloat16().view(-1).tolist(), strict=True)
        changed = sum(not _definition(w, v, 1e-3) for w, v in pairs)
        assert count_changed(before, after) == int((~unchanged(before, after)).sum()) == changed
        assert update_sparsity(before, after) == 1 - changed / before.numel()
        if before.dim() == 2:  # not contiguous
            assert count_changed(before.T, after.T) == changed
            assert torch.equal(unchanged(before.T, after.T), unchanged(before, after).T)

    def test_the_count_is_exact_past_what_fp32_can_count(self) -> None:
        changed = (1 << 24) + 1
        before, after = torch.zeros(changed + 1, dtype=torch.bfloat16), torch.ones(changed + 1, dtype=torch.bfloat16)
        after[0] = -0.0
        assert count_changed(before, after) == changed
        assert float(torch.tensor(changed, dtype=torch.float32)) != changed  # the broken variant
        assert update_sparsity(before, after) == 1 - changed / (changed + 1)

    @pytest.mark.parametrize("eta", [1e-3, 0.1])
    def test_no_copy_of_the_weight_is_made(self, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "_CHUNK", 50)
        weight = torch.nn.Parameter(torch.randn(40, 30))
        with _LargestResult() as seen:
            assert update_sparsity(weight, weight.detach(), eta) == 1.0
        assert 0 < seen.entries <= 50
        with _LargestResult() as broken:
            _ = (weight.bfloat16() == weight).float().mean()
        assert broken.entries == 1200

    def test_an_empty_weight_has_no_share(self) -> None:
        empty = torch.zeros(0, 4)
        assert count_changed(empty, empty) == 0 and unchanged(empty, empty).shape == (0, 4)
        with pytest.raises(ValueError, match=r"weight with entries, got shape \(0, 4\)"):
            update_sparsity(empty, empty)


def _numpy_spacing(x: Tensor) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.spacing(x.abs().numpy()))


class TestUlp:
    @pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
    def test_every_number_of_sixteen_bits(self, dtype: torch.dtype) -> None:
        table, x = _magnitudes(dtype), _patterns(dtype)
        assert torch.equal(ulp(x, dtype)[: len(table) - 1], table.diff())  # 0, subnormals, up to the largest finite
        assert torch.equal(ulp(-x, dtype)[: len(table) - 1], table.diff())
        assert bool(ulp(x, dtype)[~x.isfinite()].isnan().all())

    def test_numpy_agrees(self) -> None:
        x = _every_exponent()
        finite = x.isfinite() & (x.abs() < torch.finfo(torch.float32).max)  # numpy has no spacing at the largest
        assert torch.equal(ulp(x, torch.float32)[finite], _numpy_spacing(x)[finite].double())
        half = _patterns(torch.float16)
        finite = half.isfinite() & (half.abs() < torch.finfo(torch.float16).max)
        assert torch.equal(ulp(half, torch.float16)[finite], _numpy_spacing(half)[finite].double())
        assert float(ulp(torch.tensor(torch.finfo(torch.float32).max), torch.float32)) == 2.0**104

    def test_values_between_the_numbers_of_the_format(self) -> None:
        x = torch.tensor([1.999, -3.0001, 1e-45, 3.3e38, 3.4e38, 0.0], dtype=torch.float64)
        expected = [2.0**-7, 2.0**-6, 2.0**-133, 2.0**120, NAN, 2.0**-133]  # 3.4e38 is stored as infinite
        torch.testing.assert_close(ulp(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
        assert ulp(torch.tensor(65519.0), torch.float16) == 32 and ulp(torch.tensor(65520.0), torch.float16).isnan()

    def test_bad_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"x must be bfloat16, .* got torch.int64"):
            ulp(torch.ones(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"stored dtype must be .* got torch.float64"):
            ulp(torch.ones(2), torch.float64)


def _nudges(weight: Tensor, dtype: torch.dtype) -> Tensor:  # finite (n,) -> fp64 (24, n), both signs
    """Quarters of a ULP and what lies 2^-20 to either side of them: with the weight, exact sums in fp64."""
    quarters = torch.arange(1, 5)[:, None] / 4 * (1 + torch.tensor([-(2.0**-20), 0.0, 2.0**-20]))
    factors = torch.cat([quarters.view(-1), -quarters.view(-1)]).double()
    return factors[:, None] * ulp(weight, dtype)


def _rounds_elsewhere(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """The oracle: search the exact sum among the numbers of the format, ties to the even index."""
    table, total = _magnitudes(dtype), weight.double() + delta
    above = torch.searchsorted(table, total.abs()).clamp(1, len(table) - 1)
    to_above, to_below = table[above] - total.abs(), total.abs() - table[above - 1]
    nearest = torch.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, above - 1)
    return (nearest != torch.searchsorted(table, weight.double().abs())) | (total * weight < 0) & (nearest > 0)


class TestVisible:
    @pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
    def test_every_number_of_sixteen_bits_around_every_quarter_step(self, dtype: torch.dtype) -> None:
        weight = _patterns(dtype)
        weight = weight[weight.isfinite()]
        delta = _nudges(weight, dtype)
        weight = weight.expand(delta.shape)
        expected = _rounds_elsewhere(weight, delta, dtype)
        assert 0.3 < float(expected.double().mean()) < 0.8
        assert torch.equal(visible(weight, delta, dtype), expected)
        criterion = exceeds_half_ulp(weight, delta, dtype)
        assert torch.equal(criterion, delta.abs() >= ulp(weight, dtype) / 2)
        assert not torch.equal(criterion, expected)  # the oracle tells the two apart

    def test_fp32_storage(self) -> None:
        weight = _every_exponent().view(-1)
        weight = weight[weight.isfinite()]
        delta = _nudges(weight, torch.float32)
        weight = weight.expand(delta.shape)
        assert torch.equal(visible(weight, delta, torch.float32), (weight.double() + delta).float() != weight)

    def test_the_criterion_errs_at_ties_and_below_powers_of_two_only(self) -> None:
        weight = _patterns(torch.bfloat16)
        weight = weight[weight.isfinite()].repeat(64)
        generator = torch.Generator().manual_seed(0)
        size = ulp(weight)
        delta = (2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1) * size
        differs = visible(weight, delta) != exceeds_half_ulp(weight, delta)
        assert 9e-4 < float(differs.double().mean()) < 1.05e-3  # expected 254/255/1024 = 9.7e-4, seen 9.5e-4
        bits = weight.view(torch.int16)[differs]
        assert not (bits & 0x7F).any() and bool((weight[differs] * delta[differs] < 0).all())
        assert bool((delta.abs()[differs] / size[differs] > 0.25).all())
        half = torch.copysign(size, weight) / 2
        ties = visible(weight, half) != exceeds_half_ulp(weight, half)
        assert float(ties.double().mean()) == 0.5  # every even number stays

    def test_a_sum_in_fp32_is_rounded_twice(self) -> None:
        weight, delta = torch.ones(1, dtype=torch.bfloat16), torch.tensor([2.0**-8 * (1 + 2.0**-20)])
        assert bool(visible(weight, delta)) and (weight.float() + delta).bfloat16() == weight
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(1 << 16, generator=generator).bfloat16()
        delta = torch.randn(1 << 16, generator=generator) * weight.float() * 2.0**-8
        differs = visible(weight, delta) != ((weight.float() + delta).bfloat16() != weight)
        assert int(differs.sum()) <= 3  # seen 1

    def test_what_is_not_finite(self) -> None:
        cases = [(1.0, NAN, True), (1.0, INF, True), (INF, 1.0, False), (INF, INF, False), (INF, -INF, True)]
        cases += [(-INF, INF, True), (INF, NAN, True), (NAN, 1.0, False), (NAN, NAN, False), (0.0, -0.0, False)]
        weight, delta, expected = (torch.tensor(column) for column in zip(*cases, strict=True))
        assert torch.equal(visible(weight, delta), expected)
        finite = torch.finfo(torch.bfloat16).max
        assert visible(torch.tensor([finite, finite]), torch.tensor([2.0**119, 2.0**118])).tolist() == [True, False]

    def test_shapes_and_a_wider_weight(self) -> None:
        weight = torch.tensor([[1.999], [1.0]])  # stored as 2, where steps are twice as large as below 2
        for function in (visible, exceeds_half_ulp):
            assert function(weight, torch.full((2, 1), 1.5 * 2.0**-8)).tolist() == [[False], [True]]
        assert visible(weight.T, torch.full((1, 2), 1.5 * 2.0**-7)).tolist() == [[True, True]]
        for function in (visible, exceeds_half_ulp):
            with pytest.raises(ValueError, match=r"weight and delta must have the same shape"):
                function(weight, weight.T)
            with pytest.raises(TypeError, match="delta must be bfloat16"):
                function(weight, weight.int())
            with pytest.raises(TypeError, match="stored dtype must be"):
                function(weight, weight, torch.float64)

    @pytest.mark.parametrize("device", DEVICES)
    def test_every_device(self, device: str) -> None:
        weight = _patterns(torch.bfloat16)
        delta = _nudges(weight.nan_to_num(), torch.bfloat16)[6]
        for function in (visible, exceeds_half_ulp, unchanged):
            there = function(weight.to(device), delta.to(device))
            assert there.device.type == device and torch.equal(there.cpu(), function(weight, delta))
        there = ulp(weight.to(device)).cpu()
        torch.testing.assert_close(there, ulp(weight), rtol=0, atol=0, equal_nan=True)
        assert count_changed(weight.to(device), weight.roll(1).to(device)) == count_changed(weight, weight.roll(1))
