"""Every route against an fp64 full SVD, and the guard that throws a wrong fast result away."""

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from offprincipal_peft.geometry import (
    WeightSpectrum,
    bottom_basis,
    krylov,
    null_basis,
    singular_values,
    solvers,
    top_basis,
)
from offprincipal_peft.geometry.numerics import full_precision
from offprincipal_peft.geometry.tall_matrix import TallMatrix

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "tall": (420, 290),
    "wide": (290, 420),
    "square": (300, 300),
    "near-square": (310, 300),
    "large-tall": (2400, 1040),
    "large-square": (1040, 1040),
}
ORTHONORMAL = 2e-6  # observed 3e-7: the rounding of an fp64 result to fp32


def draw(shape: tuple[int, int], dtype: torch.dtype = torch.float32, decaying: bool = False, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    if decaying:
        k = min(shape) // 4
        U = torch.linalg.qr(torch.randn(shape[0], k, generator=generator, dtype=torch.float64))[0]
        V = torch.linalg.qr(torch.randn(shape[1], k, generator=generator, dtype=torch.float64))[0]
        strength = 4 * (shape[0] ** 0.5 + shape[1] ** 0.5) * torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
        W = W + (U * strength) @ V.T
    return (0.02 * W).to(dtype)


def full_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W.double().cpu(), full_matrices=True)
    return U, S, Vh.T


def sine(Q: Tensor, truth: Tensor) -> float:
    """Largest sine between span(Q) and span(truth)."""
    Q, truth = Q.double().cpu(), truth.double().cpu()
    Q = torch.linalg.qr(Q)[0]
    return float(torch.linalg.matrix_norm(Q - truth @ (truth.T @ Q), ord=2))


def assert_orthonormal(Q: Tensor) -> None:
    Q = Q.double().cpu()
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), rtol=0, atol=ORTHONORMAL)


def tail_size(W: Tensor, Q: Tensor, side: str) -> float:
    """||W^T Q||_F or ||W Q||_F, in fp64."""
    W, Q = W.double().cpu(), Q.double().cpu()
    return float(((W.T if side == "output" else W) @ Q).norm())


@pytest.mark.parametrize("decaying", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fast_route_matches_the_full_svd(shape: tuple[int, int], decaying: bool) -> None:
    W, r = draw(shape, torch.bfloat16, decaying), 16
    k = 24 if min(shape) > 1000 else 48
    U, S, V = full_svd(W)
    n, spectrum = min(shape), WeightSpectrum(W, method="fast")
    top, bottom = spectrum.top(k), spectrum.bottom(r)
    assert_orthonormal(top.U), assert_orthonormal(top.V), assert_orthonormal(bottom.U), assert_orthonormal(bottom.V)
    torch.testing.assert_close(top.S.double(), S[:k], rtol=1e-6, atol=0)  # observed 6e-8
    torch.testing.assert_close(bottom.S.double(), S[n - r :], rtol=1e-4, atol=1e-6 * float(S[0]))  # observed 4e-6
    # The subspace itself, wherever the gap at its edge is wide enough to define it in fp32.
    for edge in range(1, k + 1):
        if (S[edge - 1] - S[edge]) / S[0] >= 1e-3:
            assert sine(top.U[:, :edge], U[:, :edge]) <= 5e-6  # observed 2.1e-6
            assert sine(top.V[:, :edge], V[:, :edge]) <= 5e-6
    for triplets in (top, bottom):  # paired: the same rotation on both sides
        image = W.double() @ triplets.V.double() - triplets.U.double() * triplets.S.double()
        assert float(image.norm(dim=0).max()) <= 1e-6 * float(S[0])
    for side, d in (("output", shape[0]), ("input", shape[1])):
        Q = spectrum.minor(r, side)  # type: ignore[arg-type]
        assert Q.shape == (d, r)
        assert_orthonormal(Q)
        exact = float(S[n - r + max(0, d - n) :].norm()) if d - n < r else 0.0
        assert tail_size(W, Q, side) <= 1.01 * exact + 1e-6 * float(S[0]), side
        basis = U if side == "output" else V
        assert float((basis[:, : n // 8].T @ Q.double()).norm() / r**0.5) <= 1e-5  # leak, observed 3e-7
    assert not any(report.fell_back for report in spectrum.reports), spectrum.reports


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(330, 280), (280, 330), (280, 280)])
def test_dtypes(shape: tuple[int, int], method: str, dtype: torch.dtype, device: str) -> None:
    W = draw(shape, dtype, decaying=True).to(device)
    U, S, _ = full_svd(W)
    spectrum = WeightSpectrum(W, method=method)  # type: ignore[arg-type]
    top, Q = spectrum.top(8), spectrum.minor(8, "output")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {top.U.dtype, top.S.dtype, top.V.dtype, Q.dtype} == {expected}
    assert top.U.device == W.device
    assert spectrum.values().dtype == torch.float64
    torch.testing.assert_close(spectrum.values().cpu(), S, rtol=1e-12, atol=1e-13 * float(S[0]))
    assert sine(top.U, U[:, :8]) <= 2e-6
    exact = float(S[-8 + max(0, shape[0] - shape[1]) :].norm()) if shape[0] <= shape[1] else 0.0
    assert tail_size(W, Q, "output") <= 1.001 * exact + 1e-6 * float(S[0])


def degenerate_cases() -> dict[str, Tensor]:
    W = draw((340, 300))
    repeated_rows, repeated_columns, zero_rows = W.clone(), W.clone(), W.clone()
    repeated_rows[20:40] = W[:20]
    repeated_columns[:, 20:40] = W[:, :20]
    zero_rows[5:9] = 0
    zero_columns = W.clone()
    zero_columns[:, 7:9] = 0
    return {
        "zero": torch.zeros(340, 300),
        "rank 3": draw((340, 3), torch.float64) @ draw((3, 300), torch.float64),
        "square rank 290": draw((300, 290), torch.float64) @ draw((290, 300), torch.float64),
        "repeated rows": repeated_rows,
        "repeated columns": repeated_columns,
        "zero rows": zero_rows,
        "two zero columns": zero_columns,
        "square with zero rows": zero_rows[:300],
        "tiny entries": (W.double() * 1e-30).float(),
        "huge entries": (W.double() * 1e30).float(),
        "one row": W[:1],
        "one column": W[:, :1],
        "one entry": W[:1, :1],
        "identity": torch.eye(300),
        "one direction above the rest": torch.eye(300) + 100 * torch.ones(300, 300),
        "fifteen decades": torch.diag(torch.logspace(0, -15, 300, dtype=torch.float64)),
    }


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("case", degenerate_cases())
def test_degenerate_weights(case: str, method: str) -> None:
    W = degenerate_cases()[case]
    n, (_, S, _) = min(W.shape), full_svd(W)
    spectrum = WeightSpectrum(W, method=method, name=case)  # type: ignore[arg-type]
    scale = max(float(S[0]), 1e-300)
    for r in sorted({1, min(5, n), min(16, n)}):
        for triplets, expected in ((spectrum.top(r), S[:r]), (spectrum.bottom(r), S[n - r :])):
            assert_orthonormal(triplets.U), assert_orthonormal(triplets.V)
            torch.testing.assert_close(triplets.S.double() / scale, expected / scale, rtol=1e-5, atol=1e-6)
            image = W.double() @ triplets.V.double() - triplets.U.double() * triplets.S.double()
            assert float(image.norm()) <= 4e-6 * scale  # observed 4e-7
        for side, d in (("output", W.shape[0]), ("input", W.shape[1])):
            Q = spectrum.minor(min(r, d), side)  # type: ignore[arg-type]
            assert_orthonormal(Q)
            full = torch.cat([S, S.new_zeros(d - n)])
            exact = float(full[d - Q.shape[1] :].norm())
            assert tail_size(W, Q, side) <= 1.01 * exact + 1e-6 * scale


@pytest.mark.parametrize("shape", [(340, 300), (300, 340), (300, 300)])
def test_null_space_of_a_rank_deficient_weight(shape: tuple[int, int]) -> None:
    W = draw((shape[0], 290), torch.float64) @ draw((290, shape[1]), torch.float64)
    spectrum = WeightSpectrum(W, name="layer.7")
    for side, d in (("output", shape[0]), ("input", shape[1])):
        dimension = d - 290
        assert spectrum.null_dimension(side) == dimension  # type: ignore[arg-type]
        Q = spectrum.null(dimension, side)  # type: ignore[arg-type]
        assert_orthonormal(Q)
        assert tail_size(W, Q, side) <= 1e-6 * float(spectrum.values()[0])
        with pytest.raises(ValueError, match=rf"layer\.7 of shape .*dimension {dimension} .*{dimension + 1} were"):
            spectrum.null(dimension + 1, side)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_the_null_draw_is_uniform_and_seeded(method: str) -> None:
    W = draw((640, 80))
    U, _, _ = full_svd(W)
    first, again, other = (null_basis(W, 8, "output", method=method, seed=s) for s in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert sine(first, other.double()) > 0.9
    inside = (U[:, 80:].T @ first.double()).square().sum(dim=1)  # 560 shares, mean 8 / 560
    assert float(inside.max()) < 8 * 8 / 560  # observed 3.1 times the mean: no coordinate is preferred
    # A null space that is larger than r on the short side is drawn from, not cut off in LAPACK's order.
    low_rank = (draw((300, 20), torch.float64) @ draw((20, 280), torch.float64)).double()
    _, _, V = full_svd(low_rank)
    share = (V[:, 20:].T @ bottom_basis(low_rank, 8, "input", method=method)).square().sum(dim=1)  # type: ignore[arg-type]
    assert float(share.max()) < 8 * 8 / 260


def test_minor_takes_the_null_space_first_then_the_smallest() -> None:
    W = draw((310, 300))
    U, S, _ = full_svd(W)
    Q = WeightSpectrum(W).minor(16, "output")
    assert sine(Q[:, :10], U[:, 300:]) <= 1e-6
    assert tail_size(W, Q[:, 10:11], "output") == pytest.approx(float(S[-1]), rel=1e-4)


def test_signs_are_canonical() -> None:
    spectrum = WeightSpectrum(draw((300, 420)))
    for triplets in (spectrum.top(6), spectrum.bottom(6)):
        assert bool((triplets.U.gather(0, triplets.U.abs().argmax(0, keepdim=True)) > 0).all())
    Q = spectrum.minor(6, "input")
    assert bool((Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all())
    flipped = WeightSpectrum(-spectrum.weight).top(6)
    torch.testing.assert_close(flipped.U, spectrum.top(6).U, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1200, 1040), (1040, 1040), (1040, 2400)])
def test_determinism_and_the_global_generator(shape: tuple[int, int]) -> None:
    def everything() -> list[Tensor]:
        spectrum = WeightSpectrum(draw(shape))
        return [*spectrum.top(8), *spectrum.bottom(8), spectrum.minor(8, "output"), spectrum.minor(8, "input")]

    torch.manual_seed(1)
    first = everything()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = everything()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def garbage_pairs(apply: object, start: Tensor, wanted: int, *, extra: int, **_: object) -> krylov.KrylovResult:
    p = wanted + extra
    Q = torch.linalg.qr(krylov.gaussian(start.shape[0], p, 3, start, torch.float64))[0]
    return krylov.KrylovResult(Q, torch.ones(p, dtype=torch.float64), 0.0, p, True)


def test_null_projection_without_a_gram_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Krylov route, which serves where the Gram matrix is numerically indefinite."""
    W = draw((1300, 400), decaying=True)
    monkeypatch.setattr(TallMatrix, "gram_factor", None)
    spectrum = WeightSpectrum(W)
    Q = spectrum.null(16, "output")
    assert_orthonormal(Q)
    assert tail_size(W, Q, "output") <= 1e-6 * float(spectrum.values()[0])
    assert spectrum.reports[0].route == "projection" and not spectrum.reports[0].fell_back


def test_a_broken_solver_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    square, tall = draw((1040, 1040)), draw((1700, 1040))
    monkeypatch.setattr(krylov, "leading_eigenpairs", garbage_pairs)
    monkeypatch.setattr(krylov, "solve_spd", lambda apply, B, **_: (torch.zeros_like(B), 0.0))
    monkeypatch.setattr(TallMatrix, "inverse_gram_single", lambda A, X: torch.zeros_like(X))
    for W in (square, tall):
        U, S, _ = full_svd(W)
        spectrum = WeightSpectrum(W)
        assert sine(spectrum.top(4).U, U[:, :4]) <= 1e-5
        assert tail_size(W, spectrum.minor(4, "input"), "input") <= 1.001 * float(S[-4:].norm())
        reports = {report.what: report for report in spectrum.reports}
        assert reports["top(4)"].route == "exact" and reports["top(4)"].fell_back
    spectrum = WeightSpectrum(tall)
    assert tail_size(tall, spectrum.minor(4, "output"), "output") <= 1e-6 * float(spectrum.values()[0])
    assert spectrum.reports[0].fell_back and spectrum.reports[0].route == "exact"


def test_the_wrong_end_of_the_spectrum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """True triplets with tiny residuals, but not the extreme ones."""
    W = draw((1040, 1040), decaying=True)
    _, S, _ = full_svd(W)

    def wrong_end(A: TallMatrix, count: int, seed: int, route: str = "krylov") -> solvers.Solution:
        U, S, V = solvers.exact(A)
        chosen = slice(0, count) if route != "krylov" else slice(-count, None)
        return solvers.Solution(U[:, chosen], S[chosen], V[:, chosen], 1e-12, route)

    monkeypatch.setattr(solvers, "fast_top", wrong_end)
    monkeypatch.setattr(solvers, "fast_bottom", wrong_end)
    top, bottom = WeightSpectrum(W), WeightSpectrum(W)
    torch.testing.assert_close(top.top(4).S.double(), S[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(bottom.bottom(4).S.double(), S[-4:], rtol=1e-4, atol=0)
    assert top.reports[0].fell_back and bottom.reports[0].fell_back


def test_bad_weights_are_refused() -> None:
    broken = torch.ones(4, 6)
    broken[1, 2], broken[3, 3] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"q_proj of shape \(4, 6\) holds 2 NaN"):
        WeightSpectrum(broken, name="q_proj")
    for weight, message in (
        (torch.ones(3), r"2-D matrix, got shape \(3,\)"),
        (torch.ones(0, 3), r"non-empty"),
        (torch.ones(3, 3, dtype=torch.int8), r"torch\.int8"),
        (torch.ones(3, 3, device="meta"), r"meta device"),
    ):
        with pytest.raises(ValueError, match=f"q_proj.*{message}"):
            WeightSpectrum(weight, name="q_proj")
    with pytest.raises(ValueError, match="method"):
        WeightSpectrum(torch.ones(3, 3), method="quick")  # type: ignore[arg-type]


def test_bad_counts_are_refused() -> None:
    spectrum = WeightSpectrum(torch.ones(4, 6), name="q_proj")
    for request, allowed in (
        (lambda count: spectrum.top(count), 4),
        (lambda count: spectrum.bottom(count), 4),
        (lambda count: spectrum.minor(count, "output"), 4),
        (lambda count: spectrum.minor(count, "input"), 6),
        (lambda count: spectrum.null(count, "input"), 6),
    ):
        for count in (0, -1, allowed + 1):
            with pytest.raises(ValueError, match=rf"q_proj with shape \(4, 6\).*between 1 and {allowed}"):
                request(count)
        request(allowed if allowed == 4 else 2)
    with pytest.raises(ValueError, match="side"):
        spectrum.minor(1, "left")  # type: ignore[arg-type]


def test_free_functions_agree_with_the_class() -> None:
    W = draw((40, 60))
    spectrum = WeightSpectrum(W)
    assert torch.equal(singular_values(W), spectrum.values())
    assert torch.equal(top_basis(W, 3).U, spectrum.top(3).U)
    assert torch.equal(bottom_basis(W, 3, "output"), spectrum.minor(3, "output"))
    assert torch.equal(null_basis(W, 3, "input"), spectrum.null(3, "input"))


def test_reduced_precision_is_switched_off_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        with pytest.raises(RuntimeError, match="inside"), full_precision():
            assert (cuda.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")
            raise RuntimeError("inside")
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def test_autocast_does_not_reach_the_solvers() -> None:
    W = draw((1040, 1040))
    plain = WeightSpectrum(W).top(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = WeightSpectrum(W).top(8)
    assert torch.equal(plain.U, inside.U)


def test_a_parameter_that_requires_grad() -> None:
    W = draw((300, 280)).requires_grad_()
    assert not WeightSpectrum(W).minor(4, "output").requires_grad
