"""Angles with a planted truth, shares against the definition, projections, masks."""

import math

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry import (
    energy_shares,
    factored_energy_shares,
    factored_leak,
    leak,
    lowest_mask,
    principal_angles,
    project_off,
    projector,
)


def orthonormal(d: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0].to(dtype)


def planted(angles: list[float], d: int = 50) -> tuple[Tensor, Tensor]:
    """Two bases with exactly these principal angles, each in a rotated frame of its own."""
    k = len(angles)
    frame, theta = orthonormal(d, 2 * k, seed=1), torch.tensor(angles, dtype=torch.float64)
    Q1, Q2 = frame[:, :k], frame[:, :k] * theta.cos() + frame[:, k:] * theta.sin()
    return Q1 @ orthonormal(k, k, seed=2), Q2 @ orthonormal(k, k, seed=3)


def naive_angles(Q1: Tensor, Q2: Tensor) -> Tensor:
    return torch.arccos(torch.linalg.svdvals(Q1.T @ Q2).clamp(max=1.0))


def test_angles_over_the_whole_range() -> None:
    expected = [1e-10, 1e-6, 3e-4, 0.1, math.pi / 4, 1.2, math.pi / 2 - 1e-6, math.pi / 2]
    angles = principal_angles(*planted(expected))
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-14)


def test_small_angles_where_arccos_fails() -> None:
    expected = torch.full((4,), 1e-6, dtype=torch.float64)
    Q1, Q2 = planted([1e-6] * 4)
    torch.testing.assert_close(principal_angles(Q1, Q2), expected, rtol=1e-8, atol=0)  # observed 2e-10
    assert float((naive_angles(Q1, Q2) / expected - 1).abs().max()) > 1e-5  # fp64 arccos: five digits lost
    assert float((naive_angles(Q1.float(), Q2.float()) / expected - 1).abs().max()) > 0.5  # fp32: nothing left
    # Stored in fp32, the bases themselves are only good to 1e-7.
    assert float((principal_angles(Q1.float(), Q2.float()) / expected - 1).abs().max()) < 0.5


def test_angles_of_bases_with_different_widths() -> None:
    Q = orthonormal(30, 6)
    inside = Q @ orthonormal(6, 2, seed=5)
    for pair in ((Q, inside), (inside, Q)):
        angles = principal_angles(*pair)
        assert angles.shape == (2,)
        assert float(angles.max()) < 1e-14


def test_angles_refuse_what_is_not_a_basis() -> None:
    Q = orthonormal(30, 4)
    with pytest.raises(ValueError, match=r"second basis .* not orthonormal"):
        principal_angles(Q, 1.01 * Q)
    with pytest.raises(ValueError, match="not orthonormal"):
        principal_angles(Q * float("nan"), Q)
    with pytest.raises(ValueError, match="30 and 29 rows"):
        principal_angles(Q, Q[:29])
    with pytest.raises(ValueError, match="tall"):
        principal_angles(Q.T, Q.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_off(dtype: torch.dtype) -> None:
    Q = orthonormal(40, 5, dtype=dtype)
    X = torch.randn(40, 7, dtype=dtype)
    expected = X - projector(Q) @ X
    torch.testing.assert_close(project_off(X, Q), expected)
    almost_inside = Q @ torch.randn(5, 7, dtype=dtype) + 1e-4 * X
    once, twice = project_off(almost_inside, Q), project_off(almost_inside, Q, twice=True)
    assert float((Q.T @ twice).norm()) <= float((Q.T @ once).norm())
    assert project_off(X.bfloat16(), Q.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="40 rows but the basis has 39"):
        project_off(X, Q[:39])


def test_shares_against_the_definition() -> None:
    B, A = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    U, V, scale = orthonormal(30, 6, seed=1), orthonormal(20, 5, seed=2), 0.3
    delta = scale * B @ A
    expected = (
        float((projector(U) @ delta).norm() / delta.norm()) ** 2,
        float((delta @ projector(V)).norm() / delta.norm()) ** 2,
        float((projector(U) @ delta @ projector(V)).norm() / delta.norm()) ** 2,
    )
    assert energy_shares(delta, U, V) == pytest.approx(expected, rel=1e-12)
    assert factored_energy_shares(B, A, U, V, scale=scale) == pytest.approx(expected, rel=1e-12)
    norms = (expected[0] ** 0.5, expected[1] ** 0.5)
    assert leak(delta, U, V) == pytest.approx(norms, rel=1e-12)
    assert factored_leak(B, A, U, V, scale=scale) == pytest.approx(norms, rel=1e-12)
    assert leak(delta, U).input is None and factored_leak(B, A, V_k=V).output is None
    inside = U @ torch.randn(6, 5, dtype=torch.float64) @ V.T
    assert energy_shares(inside, U, V) == pytest.approx((1, 1, 1), rel=1e-12)


def test_a_tiny_leak_is_resolved() -> None:
    U = orthonormal(30, 6)
    B = project_off(torch.randn(30, 4, dtype=torch.float64), U, twice=True) + 1e-9 * U[:, :4]
    A = torch.randn(4, 20, dtype=torch.float64)
    assert leak(B @ A, U).output == pytest.approx(factored_leak(B, A, U).output, rel=1e-6)
    assert 1e-11 < (factored_leak(B, A, U).output or 0) < 1e-8


def test_a_zero_update_has_zero_shares() -> None:
    U, V = orthonormal(30, 6), orthonormal(20, 5)
    assert energy_shares(torch.zeros(30, 20), U, V) == (0.0, 0.0, 0.0)
    assert factored_energy_shares(torch.zeros(30, 4), torch.randn(4, 20), U, V) == (0.0, 0.0, 0.0)
    assert leak(torch.zeros(30, 20), U, V) == (0.0, 0.0)


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        factored_leak(torch.ones(5, 2), torch.ones(3, 4))


def test_lowest_mask() -> None:
    score = torch.tensor([[3.0, 1.0, 1.0], [1.0, 0.5, 2.0]])
    assert lowest_mask(score, 0.5).tolist() == [[False, True, True], [False, True, False]]  # ties: first wins
    for fraction in (0.1, 0.37, 0.5859, 0.99):
        score = torch.randint(0, 5, (37, 41)).to(torch.bfloat16)
        mask = lowest_mask(score, fraction)
        assert int(mask.sum()) == round(fraction * score.numel())
        assert float(score[mask].max()) <= float(score[~mask].min())
        assert torch.equal(mask, lowest_mask(score, fraction))
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            lowest_mask(score, fraction)
    with pytest.raises(ValueError, match="2 negative or NaN"):
        lowest_mask(torch.tensor([1.0, float("nan"), float("nan")]), 0.5)
