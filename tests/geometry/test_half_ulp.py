"""Which entries an update changes once stored: thresholds of every 16-bit number, ties, counts in chunks."""

import math

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from offprincipal_peft.geometry import bounds
from offprincipal_peft.geometry.bounds import half_ulp, realisation_threshold
from offprincipal_peft.geometry.precision import ulp, visible


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stored(dtype: torch.dtype) -> Tensor:
    """Every finite number of 16 bits, in fp64."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].double()


class TestHalfUlp:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_thresholds_of_every_number_are_half_the_way_to_its_neighbour(
        self, dtype: torch.dtype, sign: float
    ) -> None:
        weight = _stored(dtype)
        found = realisation_threshold(weight, torch.full_like(weight, sign), dtype)
        table = weight.unique()  # -0 and 0 are one
        last = 2 * table[-1:] - table[-2:-1]  # what would follow the largest
        table = torch.cat([-last, table, last])
        here = torch.searchsorted(table, weight)
        assert torch.equal(found, (table[here + int(sign)] - weight).abs() / 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_iff_with_ties_to_the_even_number(self, dtype: torch.dtype) -> None:
        """Just below, at and just above the threshold of every number, on both sides; the oracle is the cast itself."""
        weight = _stored(dtype)
        for sign in (1.0, -1.0):
            at = sign * realisation_threshold(weight, torch.full_like(weight, sign), dtype)
            odd = (weight.to(dtype).view(torch.int16) & 1).bool()
            for factor, expected in ((1 - 2.0**-20, odd & False), (1.0, odd), (1 + 2.0**-20, odd | True)):
                assert torch.equal(visible(weight, at * factor, dtype), expected)
                total = weight + at * factor  # exact in fp64, and so in fp32 at the tie
                if factor == 1.0:
                    assert torch.equal(total.float().double(), total)
                    assert torch.equal(total.to(dtype).double() != weight, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(), (0, 3), (50, 61), (3, 4, 5)], ids=str)
    def test_counts_in_chunks(
        self, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = _normal(shape, 0)
        size = ulp(weight, dtype)
        update = (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)) / 8) * size
        weight = weight.to(dtype)
        found = half_ulp(weight, update, dtype)
        after = (weight.double() + update).to(dtype)  # 24 bits or fewer: rounded once
        changed = after != weight
        predicted = update.abs() >= ulp(weight, dtype) / 2
        assert found.entries == weight.numel() and found.changed == int(changed.sum())
        assert found.predicted == int(predicted.sum())
        assert (found.missed, found.spurious) == (int((changed & ~predicted).sum()), int((predicted & ~changed).sum()))
        assert found.sufficient.holds and found.necessary.holds
        assert found.predicted + found.missed - found.spurious == found.changed
        monkeypatch.setattr(bounds, "_CHUNK", 7)
        assert half_ulp(weight, update, dtype) == found
        if weight.ndim == 2:
            assert half_ulp(weight.T, update.T, dtype) == found  # not contiguous

    def test_where_the_criterion_errs(self) -> None:
        step = 2.0**-7  # a ULP of 1 in bf16
        #                        tie, even | tie, odd | quarter of a ULP down from 1: tie, above | zero update
        weight = torch.tensor([1.0, 1.0 + step, 1.0, 1.0, 3.0], dtype=torch.float64)
        update = torch.tensor([step / 2, step / 2, -step / 4, -step / 3, 0.0], dtype=torch.float64)
        found = half_ulp(weight, update)
        assert found == (5, 2, 2, 1, 1, 1, 3)
        assert (found.sufficient.left, found.sufficient.right) == (1.0, 2.0)
        assert (found.necessary.left, found.necessary.right) == (2.0, 4.0)
        assert realisation_threshold(weight, update).tolist() == [step / 2, step / 2, step / 4, step / 4, step]
        assert not found._replace(above=3).sufficient.holds and not found._replace(ties=0).necessary.holds

    def test_without_ties_both_counts_are_attained(self) -> None:
        found = half_ulp(_normal((40, 50), 0).bfloat16(), 3e-3 * _normal((40, 50), 1))
        assert found.ties == 0 and found.sufficient.tightness == found.necessary.tightness == 1.0
        assert 0 < found.changed < found.entries

    def test_bad_input(self) -> None:
        w = torch.ones(2, 3)
        for f in (half_ulp, realisation_threshold):
            with pytest.raises(ValueError, match=r"same shape.*, got \(2, 3\).* \(3, 2\)"):
                f(w, w.T)
            with pytest.raises(TypeError, match=r"update must be floating point, got torch\.int64"):
                f(w, w.long())
            with pytest.raises(TypeError, match="stored dtype must be"):
                f(w, w, torch.float64)
            for bad in (math.nan, math.inf):
                with pytest.raises(ValueError, match="the update holds 6 NaN or infinite entries"):
                    f(w, w * bad)
            with pytest.raises(ValueError, match=r"the weight as torch\.float16 holds 6 NaN or infinite entries"):
                f(w * 1e6, w, torch.float16)
            with pytest.raises(ValueError, match="on meta"):
                f(w, w.to("meta"))

    @pytest.mark.parametrize("device", DEVICES)
    def test_every_device(self, device: str) -> None:
        weight, update = _normal((6, 5), 0), 0.01 * _normal((6, 5), 1)
        assert half_ulp(weight.to(device).requires_grad_(), update.to(device)) == half_ulp(weight, update)
