"""Spectra and subspaces: sides against a brute-force fp64 SVD, equality where it is attained, and each seen to fail."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from offprincipal_peft.geometry import Triplets, WeightSpectrum
from offprincipal_peft.geometry.bounds import (
    Bound,
    PairSpectra,
    ky_fan,
    mirsky,
    pair_spectra,
    wedin,
    weyl,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SHAPES = ((7, 7), (12, 5), (5, 12), (1, 6), (6, 1), (2, 2))
SIZES = (0.0, 1e-12, 1e-4, 0.1, 1.0, 1e3)  # ||update|| in units of the weight's


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_spectrum(shape: tuple[int, int], values: list[float], seed: int) -> Tensor:
    n = len(values)
    U, V = (torch.linalg.qr(_normal((d, n), seed + i))[0] for i, d in enumerate(shape))
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


def _bases(shape: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    n = min(shape)
    yield "gaussian", _normal(shape, 0)
    yield "rank deficient", _with_spectrum(shape, [3.0] + [0.0] * (n - 1), 1)
    yield "repeated", _with_spectrum(shape, [2.0] * n, 2)
    yield "near tie", _with_spectrum(shape, [1 + 1e-9 * i for i in range(n)], 3)
    yield "zero", torch.zeros(shape, dtype=torch.float64)


def _pairs(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, base in _bases(shape):
        for i, size in enumerate(SIZES):
            step = _normal((shape[0], 1), i) @ _normal((1, shape[1]), i + 9) if i % 2 else _normal(shape, i + 5)
            before = base.to(dtype)
            yield f"{name}, {size}", before, (before.double() + size * step).to(dtype)


def _sine(base: Tensor, tuned: Tensor, k: int) -> float:
    """From the complements of a full SVD: ||U_rest^T U+_k||_2, the larger of the two sides."""
    (U, _, Vh), (X, _, Yh) = (torch.linalg.svd(w.double(), full_matrices=True) for w in (base, tuned))
    blocks = U[:, k:].T @ X[:, :k], Vh[k:] @ Yh[:k].T
    return max(float(torch.linalg.matrix_norm(block, 2)) if block.numel() else 0.0 for block in blocks)


def _turning(first: float, second: float, size: float) -> tuple[Tensor, Tensor]:
    """diag(first, second) and the update of spectral norm `size` that turns its first direction furthest."""
    t = 2 * size / (first - second)
    base = torch.diag(torch.tensor([first, second], dtype=torch.float64))
    c = math.sqrt(1 - t * t)
    return base, base + size * torch.tensor([[-t, c], [c, t]], dtype=torch.float64)


class TestBound:
    def test_the_properties(self) -> None:
        loose, tight, broken = Bound(1.0, 4.0), Bound(2.0, 2.0), Bound(3.0, 2.0)
        assert [b.slack for b in (loose, tight, broken)] == [3.0, 0.0, -1.0]
        assert [b.tightness for b in (loose, tight, broken)] == [0.25, 1.0, 1.5]
        assert [b.holds for b in (loose, tight, broken)] == [True, True, False]
        assert not any(b.vacuous for b in (loose, tight, broken))
        assert Bound(3.0, 2.0, tolerance=1.0).holds and not Bound(3.0, 2.0, tolerance=0.99).holds

    def test_the_edges(self) -> None:
        assert Bound(0.0, 0.0).tightness == 1.0 and Bound(1.0, 0.0).tightness == math.inf
        for left in (1.0, math.inf):
            nothing = Bound(left, math.inf)
            assert nothing.vacuous and nothing.holds and nothing.tightness == 0.0 and nothing.slack == math.inf
        assert not Bound(math.inf, 1.0).holds
        assert Bound(0.2, 1.0, ceiling=1.0).vacuous and Bound(0.2, 0.9, 0.1, ceiling=1.0).vacuous
        assert not Bound(0.2, 0.9, ceiling=1.0).vacuous
        for bad in ((math.nan, 1.0, 0.0), (1.0, math.nan, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, math.nan)):
            with pytest.raises(ValueError, match="two numbers and a tolerance"):
                Bound(*bad)
        with pytest.raises(dataclasses.FrozenInstanceError):
            Bound(1.0, 2.0).left = 0.0  # type: ignore[misc]


class TestSpectra:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_sides_by_brute_force_and_never_broken(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        for name, base, tuned in _pairs(shape, dtype):
            s, v, d = (torch.linalg.svd(w).S for w in (base.double(), tuned.double(), tuned.double() - base.double()))
            total = float(s[0] + v[0]) or 1.0
            shared = pair_spectra(base, tuned)
            k = (min(shape) + 1) // 2
            found = [weyl(base, tuned), mirsky(base, tuned), *ky_fan(base, tuned, k)]
            expected = [
                ((v - s).abs().max(), d[0]),
                ((v - s).norm(), (tuned.double() - base.double()).norm()),
                ((v[:k].sum() - s[:k].sum()).abs(), k * d[0]),
                ((v[:k].sum() - s[:k].sum()).abs(), d[:k].sum()),
            ]
            for bound, (left, right) in zip(found, expected, strict=True):
                assert bound.left / total == pytest.approx(float(left) / total, abs=1e-13), name  # seen 1.3e-15
                assert bound.right / total == pytest.approx(float(right) / total, abs=1e-13), name  # seen 2.7e-15
                assert bound.holds and not bound.asymptotic and not bound.vacuous, name
                assert bound.tolerance <= 1e-14 * min(shape) * total, name
            again = [f(base, tuned, spectra=shared) for f in (weyl, mirsky)]
            assert [*again, *ky_fan(base, tuned, k, spectra=shared)] == found

    def test_equality_is_attained(self) -> None:
        """Diagonal weights whose order stays: every value moves by its own entry."""
        base = torch.diag(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64))
        step = torch.diag(torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64))
        for sign in (1, -1):
            tuned = base + sign * step
            found = [weyl(base, tuned), mirsky(base, tuned), *ky_fan(base, tuned, 2)]
            assert [b.tightness for b in found] == pytest.approx([1.0] * 4, rel=1e-14)  # seen 0
        uneven = ky_fan(base, base + torch.diag(torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)), 2)
        assert uneven.sharper.tightness == pytest.approx(1, rel=1e-14)  # seen 0
        assert uneven.paper.tightness == pytest.approx(0.6, rel=1e-14)  # seen 1.9e-16

    @pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
    def test_extreme_scales(self, scale: float) -> None:
        base, step = _normal((6, 4), 0), _normal((6, 4), 1)
        for f in (weyl, mirsky):
            plain, scaled = f(base, base + step), f(base * scale, (base + step) * scale)
            assert scaled.holds
            assert (scaled.left / scale, scaled.right / scale) == pytest.approx(
                (plain.left, plain.right), rel=1e-12
            )  # seen 5.9e-16

    def test_a_wrong_side_is_caught(self) -> None:
        """The update's spectrum a little too small: on diagonal weights, where there is no slack to hide in."""
        base = torch.diag(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64))
        tuned = base + 0.5 * torch.eye(3, dtype=torch.float64)
        right = pair_spectra(base, tuned)
        for factor, holds in ((1.0, True), (1 - 1e-12, False)):
            wrong = dataclasses.replace(right, update=right.update * factor)
            found = [weyl(base, tuned, spectra=wrong), mirsky(base, tuned, spectra=wrong)]
            assert [b.holds for b in (*found, *ky_fan(base, tuned, 2, spectra=wrong))] == [holds] * 4
        swapped = dataclasses.replace(right, update=right.update * 0.9)
        assert weyl(base, tuned, spectra=swapped).slack == pytest.approx(-0.05, rel=1e-12)  # seen 2.8e-16

    def test_fp32_spectra_widen_the_tolerance(self) -> None:
        base, tuned = _normal((8, 5), 0), _normal((8, 5), 1)
        fine = pair_spectra(base, tuned)
        coarse = PairSpectra(fine.base.float(), fine.tuned.float(), fine.update.float())
        assert weyl(base, tuned, spectra=coarse).tolerance == pytest.approx(
            weyl(base, tuned, spectra=fine).tolerance * 2.0**29, rel=1e-6
        )
        shuffled = PairSpectra(fine.base.flip(0), fine.tuned, fine.update)  # in any order
        assert weyl(base, tuned, spectra=shuffled) == weyl(base, tuned, spectra=fine)


class TestWedin:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_sides_by_brute_force_and_never_broken(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        checked = 0
        for name, base, tuned in _pairs(shape, dtype):
            s, v, d = (torch.linalg.svd(w).S for w in (base.double(), tuned.double(), tuned.double() - base.double()))
            s, v = torch.cat([s, s.new_zeros(1)]), torch.cat([v, v.new_zeros(1)])
            for k in range(1, min(shape) + 1):
                found = wedin(base, tuned, k)
                assert found.double_angle.holds and found.two_spectra.holds, (name, k)
                gap, crossed = float(s[k - 1] - s[k]), float(torch.maximum(s[k - 1] - v[k], v[k - 1] - s[k]))
                total = float(s[0]) or 1.0
                assert found.gap / total == pytest.approx(gap / total, abs=1e-13), (name, k)  # seen 1.8e-15
                if min(gap, float(v[k - 1] - v[k])) > 1e-6 * float(s[0] + v[0]) and d[0] > 1e-9 * s[0]:
                    checked += 1
                    assert found.sine == pytest.approx(_sine(base, tuned, k), abs=1e-11)  # seen 5.3e-13
                    assert found.paper.right == pytest.approx(float(d[0]) / gap, rel=1e-10)  # seen 3.1e-12
                    assert found.two_spectra.right == pytest.approx(float(d[0]) / crossed, rel=1e-10)  # 9.3e-12
                    assert found.double_angle.left == found.two_spectra.left == found.paper.left == found.sine
        assert checked >= 4 * min(shape)

    @pytest.mark.parametrize("size", [1e-6, 0.01, 0.3, 0.9, 0.999])
    def test_the_double_angle_is_sharp_and_the_paper_form_broken(self, size: float) -> None:
        """For every size up to half the gap some update turns further than the paper's right side."""
        base, tuned = _turning(3.0, 1.0, size)
        found = wedin(base, tuned, 1)
        assert found.gap == 2.0 and found.paper.right == pytest.approx(size / 2, rel=1e-9)  # seen 1.1e-14
        assert found.double_angle.tightness == pytest.approx(1, rel=1e-12)  # seen 1.1e-14
        assert found.two_spectra.holds and found.double_angle.holds
        assert found.sine == pytest.approx(_sine(base, tuned, 1), rel=1e-12)  # seen 2.1e-16
        exceeds = math.sin(math.asin(size) / 2) / (size / 2)
        assert found.paper.tightness == pytest.approx(exceeds, rel=1e-12)  # seen 1.2e-14
        if size >= 0.01:  # at 1e-6 the excess of size^2 / 8 is rounding
            assert not found.paper.holds and found.paper.asymptotic

    def test_the_factor_of_two(self) -> None:
        """Two values change places just past half a gap: the subspaces are orthogonal, the paper's side is 0.51."""
        base, step = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([-0.51, 0.51]))
        found = wedin(base.double(), base.double() + step.double(), 1)
        assert found.sine == pytest.approx(1, rel=1e-14)  # seen 0
        assert found.paper.right == pytest.approx(0.51, rel=1e-6) and not found.paper.holds  # seen 1.9e-8
        assert found.double_angle.right == 1.0 and found.double_angle.vacuous
        assert found.two_spectra.holds and found.two_spectra.tightness == pytest.approx(1, rel=1e-14)  # seen 0

    def test_a_search_for_counterexamples(self) -> None:
        """2 x 2: a few per cent of random updates break the paper's form, none the other two, none by more than 2."""
        generator, broken = torch.Generator().manual_seed(0), 0
        worst = torch.zeros(3, dtype=torch.float64)
        for _ in range(400):
            draw = torch.rand(4, generator=generator, dtype=torch.float64)
            base = torch.diag(torch.stack([1 + draw[0], draw[1]]))
            step = _turning(1.0, 0.0, 0.49 * float(draw[2]))[1] - torch.diag(torch.tensor([1.0, 0.0]))
            step = step + 0.1 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
            size = float(draw[3] * (base[0, 0] - base[1, 1]))
            found = wedin(base, base + step * (size / torch.linalg.matrix_norm(step, 2)), 1)
            broken += not found.paper.holds
            assert found.double_angle.holds and found.two_spectra.holds
            sides = (found.paper, found.double_angle, found.two_spectra)
            worst = torch.maximum(worst, torch.tensor([side.tightness for side in sides], dtype=torch.float64))
        assert 20 < broken < 200  # seen 37 of 400
        assert 1.2 < worst[0] <= 2 and worst[1:].max() <= 1 + 1e-9  # seen 1.45, 0.994, 0.998

    def test_to_first_order_the_paper_form_is_attained(self) -> None:
        base = torch.diag(torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64))
        step = torch.zeros(3, 3, dtype=torch.float64)
        step[1, 2] = step[2, 1] = 1e-4
        found = wedin(base, base + step, 2)
        assert found.paper.tightness == pytest.approx(1, abs=1e-7)  # seen 3.7e-9
        assert found.two_spectra.tightness == pytest.approx(1, abs=1e-7)  # seen 1.2e-9
        alone = wedin(base, base + step, 1).sine
        print("S1", alone)
        assert alone < 1e-14  # the first direction is left alone

    def test_a_gap_of_rounding_is_vacuous(self) -> None:
        for name, base in _bases((7, 7)):
            for k in (1, 3):
                found = wedin(base, base, k)
                vacuous = name != "gaussian" and (name, k) not in (
                    ("rank deficient", 1),
                    ("near tie", 1),
                    ("near tie", 3),
                )
                assert found.paper.vacuous == found.double_angle.vacuous == vacuous, (name, k)
                assert found.paper.holds and found.double_angle.holds and found.two_spectra.holds
                print("S3", name, k, found.sine, found.paper.vacuous)
                assert vacuous or (found.sine < 1e-13 and found.paper.right == 0.0)  # seen 7.6e-16

    def test_all_directions(self) -> None:
        """k = min(shape): the side that is spanned whole cannot turn, the other has sigma_min as its gap."""
        base, tuned = _normal((4, 4), 0), _normal((4, 4), 1)
        print("S2", wedin(base, tuned, 4).sine)
        assert wedin(base, tuned, 4).sine < 1e-12  # seen 1.6e-15
        base = _normal((6, 3), 0)
        found = wedin(base, base + 1e-3 * _normal((6, 3), 1), 3)
        assert found.gap == pytest.approx(float(torch.linalg.svdvals(base)[-1]), rel=1e-14)  # seen 2.8e-16
        assert 0 < found.sine <= found.double_angle.right

    def test_a_wrong_side_is_caught(self) -> None:
        base, tuned = _turning(3.0, 1.0, 0.5)
        right = pair_spectra(base, tuned, 1)
        for factor, holds in ((1.0, True), (1 - 1e-9, False)):
            wrong = dataclasses.replace(right, update=right.update * factor)
            assert wedin(base, tuned, 1, spectra=wrong).double_angle.holds == holds
        assert not wedin(base, tuned, 1, spectra=dataclasses.replace(right, update=right.update / 2)).two_spectra.holds

    def test_an_inexact_basis_is_paid_for(self) -> None:
        """Turned by 1e-6 towards the next direction: no update, a sine of 1e-6, and a residual that says so."""
        base = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        exact = pair_spectra(base, base, 1)
        turned = torch.tensor([[math.cos(1e-6)], [math.sin(1e-6)]], dtype=torch.float64)
        assert exact.base_top is not None
        top = exact.base_top._replace(U=turned, V=turned)
        found = wedin(base, base, 1, spectra=dataclasses.replace(exact, base_top=top))
        assert found.sine == pytest.approx(1e-6, rel=1e-9) and found.double_angle.right == 0.0  # seen 1.7e-13
        assert found.double_angle.holds and found.paper.holds and found.two_spectra.holds
        assert 1e-6 < found.double_angle.tolerance < 2e-6  # the residual, 2e-6, over the gap

    def test_bases_of_another_precision_and_of_another_weight(self) -> None:
        base = _normal((40, 30), 0)
        tuned = base + 1e-3 * _normal((40, 30), 1)
        exact = wedin(base, tuned, 3, spectra=pair_spectra(base, tuned, 5))  # more triplets than are used
        assert exact.sine == pytest.approx(wedin(base, tuned, 3).sine, rel=1e-12)  # seen 0
        rough = PairSpectra(
            *(torch.linalg.svdvals(w) for w in (base, tuned, tuned - base)),
            *(WeightSpectrum(w.float()).top(3) for w in (base, tuned)),
        )
        found = wedin(base, tuned, 3, spectra=rough)
        assert found.sine == pytest.approx(exact.sine, abs=1e-5)  # seen 3.7e-8
        assert 1e-7 < found.double_angle.tolerance < 1e-3  # seen 8.9e-6: measured, not assumed
        assert exact.double_angle.tolerance < 1e-10  # seen 4.7e-13
        assert rough.base_top is not None and rough.tuned_top is not None
        U, S, V = rough.base_top
        minor = WeightSpectrum(base).bottom(3)
        for wrong in (rough.tuned_top._replace(S=S), Triplets(U.flip(1), S, V), minor, Triplets(U, 1.1 * S, V)):
            with pytest.raises(ValueError, match="base_top are not the top 3 triplets of base: off by"):
                wedin(base, tuned, 3, spectra=dataclasses.replace(rough, base_top=wrong))


class TestBadPairs:
    def test_weights(self) -> None:
        w = torch.ones(3, 4)
        for f in (weyl, mirsky, pair_spectra, lambda a, b: ky_fan(a, b, 1), lambda a, b: wedin(a, b, 1)):
            with pytest.raises(ValueError, match=r"one shape and device, got \(3, 4\) on cpu and \(4, 3\) on cpu"):
                f(w, w.T)
            with pytest.raises(ValueError, match="two matrices"):
                f(w[0], w[0])
            with pytest.raises(ValueError, match="on meta"):
                f(w, w.to("meta"))
            with pytest.raises(TypeError, match=r"tuned must be floating point, got torch\.int64"):
                f(w, w.long())
            for bad in (math.nan, math.inf):
                with pytest.raises(ValueError, match=r"tuned of shape \(3, 4\) holds 12 NaN or infinite entries"):
                    f(w, w * bad)
        with pytest.raises(ValueError, match=r"the update of shape \(1, 1\) holds 1 NaN or infinite"):
            weyl(torch.full((1, 1), 1.5e308, dtype=torch.float64), torch.full((1, 1), -1.5e308, dtype=torch.float64))

    def test_k_and_spectra(self) -> None:
        w, v = _normal((3, 4), 0), _normal((3, 4), 1)
        for k in (0, -1, 4):
            for f in (ky_fan, wedin):
                with pytest.raises(ValueError, match=rf"k must be between 1 and 3 for weights of \(3, 4\), got {k}"):
                    f(w, v, k)
        with pytest.raises(ValueError, match="k must be between 1 and 3"):
            pair_spectra(w, v, 4)
        s = pair_spectra(w, v)
        with pytest.raises(
            ValueError, match=r"base_top must hold 2 triplets or more: pair_spectra\(base, tuned, k=2\)"
        ):
            wedin(w, v, 2, spectra=s)
        with pytest.raises(ValueError, match="tuned_top must hold 2 triplets"):
            wedin(
                w, v, 2, spectra=dataclasses.replace(pair_spectra(w, v, 2), tuned_top=pair_spectra(w, v, 1).tuned_top)
            )
        with pytest.raises(ValueError, match=r"base_top is of a weight \(4, 3\), not \(3, 4\)"):
            wedin(w, v, 1, spectra=dataclasses.replace(s, base_top=pair_spectra(w.T, v.T, 1).base_top))
        for bad in (s.update[:2], -s.update, s.update * math.nan, s.update[:, None]):
            with pytest.raises(
                ValueError, match=r"spectra.update must be the 3 singular values of a weight of \(3, 4\)"
            ):
                weyl(w, v, spectra=dataclasses.replace(s, update=bad))

    @pytest.mark.parametrize("device", DEVICES)
    def test_every_device(self, device: str) -> None:
        base = _normal((6, 5), 0)
        tuned = base + 0.01 * _normal((6, 5), 1)
        here, there = wedin(base, tuned, 2), wedin(base.to(device).requires_grad_(), tuned.to(device), 2)
        assert there.sine == pytest.approx(here.sine, rel=1e-9) and there.two_spectra.holds
        assert weyl(base.to(device), tuned.to(device)).right == pytest.approx(weyl(base, tuned).right, rel=1e-12)
