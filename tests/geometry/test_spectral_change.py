"""Fast spectral changes against exact fp64 SVDs: within 1 % or 1e-6, and within the error that they state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry import SpectralBase, SpectralChange, normalized_spectral_shift, principal_angles
from offprincipal_peft.geometry import spectral_change as module

SHAPES = {"tall": (420, 192), "wide": (192, 420), "square": (224, 224)}
SIZES = (1e-5, 1e-3, 1e-2, 0.2)  # ||dW||_F / ||W||_F


def weight(shape: tuple[int, int], decay: float, seed: int = 0) -> Tensor:  # fp32, on the bf16 grid
    """Gaussian noise under a decaying spectrum of n / 8 directions; 0: noise alone."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) * 0.02
    if decay:
        r = min(shape) // 8
        left = torch.linalg.qr(torch.randn(shape[0], r, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(shape[1], r, generator=generator)).Q
        noise += left * (decay * 0.02 * math.sqrt(shape[0]) * torch.arange(1, r + 1) ** -0.7) @ right.T
    return noise.bfloat16().float()


def moved(base: Tensor, size: float, seed: int = 1) -> Tensor:
    step = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return base + step * (size * base.norm() / step.norm())


def twin(base: Tensor, tuned: Tensor, k: int) -> SpectralChange:
    """Three fp64 SVDs and nothing else."""
    (U, s, Vh), (X, t, Yh) = (torch.linalg.svd(side.double(), full_matrices=False) for side in (base, tuned))
    norm = float(torch.linalg.matrix_norm(tuned.double() - base.double(), 2))
    output, into = principal_angles(U[:, :k], X[:, :k]), principal_angles(Vh[:k].T, Yh[:k].T)
    return SpectralChange(s, t, norm, output, into, "twin", 0.0, 0.0)


def unchecked(base: Tensor, tuned: Tensor, k: int) -> SpectralChange:
    """The fast answer whatever it states of itself."""
    spectrum = SpectralBase(base, k)
    assert spectrum._fast is not None
    return module._fast_change(spectrum._fast, base, tuned, k, 0)


def angle_errors(found: SpectralChange, exact: SpectralChange) -> tuple[Tensor, Tensor]:
    pairs = ((found.output_angles, exact.output_angles), (found.input_angles, exact.input_angles))
    return torch.cat([(a - b).abs() for a, b in pairs]), torch.cat([b for _, b in pairs])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay", [0.0, 5.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fast_figures_are_within_one_per_cent(shape: tuple[int, int], decay: float, size: float) -> None:
    base = weight(shape, decay)
    tuned, k = moved(base, size), min(shape) // 16
    found, exact = unchecked(base, tuned, k), twin(base, tuned, k)
    error = abs(found.shift - exact.shift)
    assert error <= max(0.01 * exact.shift, 1e-6)  # worst seen: see the assertion on stated errors
    assert error <= found.shift_error
    errors, angles = angle_errors(found, exact)
    assert bool((errors <= (0.01 * angles).clamp_min(1e-6)).all())
    assert float(errors.max()) <= found.angle_error
    assert 0.995 * exact.norm <= found.norm <= exact.norm * (1 + 2e-4)  # seen: 0.9994 and 1 + 8.6e-5
    assert found.largest <= found.norm * (1 + 5e-3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_routes_follow_the_size_of_the_change(shape: tuple[int, int]) -> None:
    base = weight(shape, 5.0)
    routes = [SpectralBase(base, 12).change(moved(base, size)).route for size in (1e-5, 0.2)]
    assert routes == ["perturbation", "rotated"]


def test_bases_are_those_of_the_exact_decomposition() -> None:
    for shape in SHAPES.values():
        base = weight(shape, 5.0)
        fast, exact = SpectralBase(base, 12).top, SpectralBase(base, 12, method="exact").top
        for a, b in ((fast.U, exact.U), (fast.V, exact.V)):
            assert float(principal_angles(a, b)[-1]) < 1e-4  # seen 1.5e-5: fp32's rounding over a gap
        torch.testing.assert_close(
            (fast.U * fast.S) @ fast.V.T, ((exact.U * exact.S) @ exact.V.T).float(), rtol=0, atol=1e-5
        )


def test_no_change_is_exactly_none() -> None:
    base = weight((192, 420), 5.0)
    for tuned in (base.clone(), base.bfloat16(), base.double()):
        found = SpectralBase(base, 12).change(tuned)
        assert (found.shift, found.largest, found.norm, float(found.output_angles.max())) == (0.0, 0.0, 0.0, 0.0)


def test_nothing_is_written_into_the_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = weight((420, 192), 5.0).to(dtype)
        tuned = moved(base.float(), 1e-2).to(dtype)
        copies = base.clone(), tuned.clone()
        SpectralBase(base, 12).change(tuned)
        assert torch.equal(base, copies[0]) and torch.equal(tuned, copies[1])


def test_a_rank_deficient_base_is_done_exactly() -> None:
    """Half its values are zero: their shifts are lost in fp32's squares, and the route says so."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(224, 112, generator=generator) @ torch.randn(112, 224, generator=generator) * 0.01
    tuned = moved(base, 1e-3)
    found, exact = SpectralBase(base, 12).change(tuned), twin(base, tuned, 12)
    assert found.route == "exact" and "fast shift" in found.reason
    assert found.shift == pytest.approx(exact.shift, rel=1e-9)


def test_a_base_without_k_directions_is_done_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(224, 6, generator=generator) @ torch.randn(6, 224, generator=generator)
    spectrum = SpectralBase(base, 12)
    assert "too small" in spectrum.reason
    found = spectrum.change(moved(base, 1e-3))
    assert found.route == "exact" and found.reason == spectrum.reason


def test_a_swap_of_directions_at_the_edge_turns_them_by_a_right_angle() -> None:
    """sigma_k and sigma_(k+1) change places: one angle is 90 degrees on both sides, whatever the size of the change."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(300, 160, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(200, 160, generator=generator, dtype=torch.float64)).Q
    s = torch.linspace(2.0, 1.0, 160, dtype=torch.float64)
    t = s.clone()
    t[9], t[10] = s[10], s[9]
    base, tuned = ((U * values @ V.T).float() for values in (s, t))
    for method in ("fast", "exact"):
        found = SpectralBase(base, 10, method=method).change(tuned)
        assert math.degrees(float(found.output_angles[-1])) == pytest.approx(90.0, abs=0.1)
        assert math.degrees(float(found.input_angles[-1])) == pytest.approx(90.0, abs=0.1)
        assert float(found.output_angles[-2]) < 1e-3


def test_exact_mode_is_the_twin() -> None:
    base = weight((420, 192), 5.0)
    tuned = moved(base, 1e-3)
    found, exact = SpectralBase(base, 12, method="exact").change(tuned), twin(base, tuned, 12)
    assert found.route == "exact" and found.reason == ""
    assert found.shift == pytest.approx(exact.shift, rel=1e-9) and found.norm == pytest.approx(exact.norm, rel=1e-9)
    assert found.shift == normalized_spectral_shift(exact.before, exact.after)
    torch.testing.assert_close(found.output_angles, exact.output_angles, rtol=1e-6, atol=1e-12)


def test_perturbation_of_a_large_change_leaves_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar has teeth, and the change of route is what keeps to it."""
    base = weight((224, 224), 0.0)
    tuned = moved(base, 0.2)
    exact = twin(base, tuned, 14)
    right = unchecked(base, tuned, 14)
    squares = module.perturbed
    monkeypatch.setattr(module, "leading", lambda squares, rotated, k: None)
    monkeypatch.setattr(module, "_decomposed", lambda base, rotated, k: _perturbed_only(squares, base, rotated, k))
    wrong = unchecked(base, tuned, 14)
    errors = [abs(found.shift - exact.shift) / exact.shift for found in (right, wrong)]
    assert errors[0] < 0.01 < errors[1]  # seen 2e-6 and 1.0


def _perturbed_only(perturbed, base, rotated: Tensor, k: int):
    n = len(base.squares)
    eye = torch.eye(n, dtype=torch.float64)
    return perturbed(base.squares, rotated)[1], eye[:, :k], eye[:, -64:].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:, :-1], "differ"),
        (lambda w: torch.where(torch.arange(w.numel()).view(w.shape) == 5, torch.nan, w), "NaN"),
        (lambda w: torch.where(torch.arange(w.numel()).view(w.shape) == 5, torch.inf, w), "infinite"),
    ],
)
def test_bad_tuned_weights(change, message: str) -> None:
    base = weight((420, 192), 5.0)
    for method in ("fast", "exact"):
        with pytest.raises(ValueError, match=message):
            SpectralBase(base, 12, method=method).change(change(base))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 1), "matrix"),
        ((torch.zeros(3, 3, dtype=torch.int8), 1), "floating"),
        ((torch.ones(3, 4), 0), "between 1 and 3"),
        ((torch.ones(3, 4), 4), "between 1 and 3"),
        ((torch.full((40, 40), torch.nan), 4), "NaN"),
    ],
)
def test_bad_bases(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralBase(*arguments)


def test_faint_and_strongly_mixed_values_need_no_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    base = weight((256, 256), 5.0)
    tuned = moved(base, 1e-2)
    slow = []
    monkeypatch.setattr(module, "_decomposed", lambda *arguments: slow.append(arguments))
    spectrum = SpectralBase(base, 16)
    assert spectrum._fast is not None and spectrum._fast.is_faint
    found = unchecked(base, tuned, 16)
    assert found.route == "rotated" and not slow
    exact = twin(base, tuned, 16)
    last = slice(256 - 32, None)
    assert float((found.after[last] - exact.after[last]).abs().max()) < 1e-7  # seen: 1.3e-8
