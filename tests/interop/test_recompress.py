"""Recompressed products against the SVD of the dense matrix."""

import pytest
import torch
from torch import Tensor

from interop.exporting import distance
from offprincipal_peft.interop.recompress import TOLERANCE, product_error, recompress


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d_out", "R", "d_in"), [(20, 6, 30), (8, 12, 30), (20, 12, 5), (7, 7, 7)])
def test_the_rank_is_the_dense_matrix_rank_and_the_product_the_same(d_out, R, d_in):
    left, right = drawn(d_out, R), drawn(R, d_in, seed=1)
    new_left, new_right = recompress(left, right)
    dense = left.double() @ right.double()
    assert new_left.shape == (d_out, min(d_out, R, d_in)) and new_right.shape == (min(d_out, R, d_in), d_in)
    assert new_left.dtype == torch.float32
    error = (dense - new_left.double() @ new_right.double()).norm() / dense.norm()
    assert error < 2 * TOLERANCE  # 4.0e-8 observed: the rounding of both factors
    assert product_error(left, right, new_left, new_right) == pytest.approx(error.item(), rel=1e-6)


def test_a_product_of_lower_rank_is_found_out():
    """[B - B0, B0] [A; A - A0] with only three directions moved in B and none in A has rank 3, not 8."""
    moved = drawn(20, 3) @ drawn(3, 4, seed=1)
    left, right = torch.cat([moved, drawn(20, 4, seed=2)], 1), torch.cat([drawn(4, 30, seed=3), torch.zeros(4, 30)])
    new_left, new_right = recompress(left, right)
    assert new_left.shape[1] == 3
    assert product_error(left, right, new_left, new_right) < 2 * TOLERANCE


def test_factors_share_the_singular_values():
    new_left, new_right = recompress(drawn(20, 6), drawn(6, 30, seed=1))
    S = torch.linalg.svdvals(drawn(20, 6).double() @ drawn(6, 30, seed=1).double())[:6]
    for gram in (new_left.T @ new_left, new_right @ new_right.T):
        assert distance(gram, torch.diag(S)) < 1e-6  # 8.3e-8 observed


def test_the_tolerance_cuts_the_tail_and_no_more():
    scales = torch.tensor([1.0, 1e-2, 1e-5])
    left, right = torch.linalg.qr(drawn(20, 3)).Q * scales, torch.linalg.qr(drawn(30, 3, seed=1)).Q.T
    for tolerance, rank in ((1e-1, 1), (1e-4, 2), (1e-6, 3)):
        new = recompress(left, right, tolerance)
        assert new[0].shape[1] == rank
        assert product_error(left, right, *new) < tolerance


def test_a_zero_product_has_rank_one_and_is_zero():
    left, right = recompress(torch.zeros(5, 4), drawn(4, 6))
    assert left.shape == (5, 1) and not left.any() and torch.isfinite(right).all()
    assert product_error(torch.zeros(5, 4), drawn(4, 6), left, right) == 0.0


def test_product_error_sees_a_small_difference():
    """A perturbation near fp32's rounding, which the subtraction of squared norms would lose."""
    left, right = drawn(20, 4), drawn(4, 30, seed=1)
    other = left.double() * (1 + 1e-9)
    assert product_error(left.double(), right.double(), other, right.double()) == pytest.approx(1e-9, rel=1e-4)
