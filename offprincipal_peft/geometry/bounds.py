"""The paper's inequalities about a weight with both sides: Gate II (spectra, subspaces) and Gate III (half a ULP).

None of them says *where* an update goes: they bound distances, and an update on the principals obeys them as well.
What is exact and what is not: Weyl, Mirsky, Ky Fan, the half step and two of the three forms of Wedin hold for every
update, up to rounding. The paper's form of Wedin, like the leashes of Gate I (`leash`), holds to first order only;
those carry ``asymptotic=True``, and a finite update may break them.

Decompositions run in fp64. An audit that asks several questions of one weight pays once, with :func:`pair_spectra`.

Source: 2511.08567, Section 3; the numbers of its statements stand at each function.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import full_precision
from .precision import exceeds_half_ulp, ulp, visible
from .spectrum import Triplets, WeightSpectrum
from .subspace import principal_angles

_CHUNK = 1 << 20  # entries whose half steps are held in fp64 at a time
_EPS = torch.finfo(torch.float64).eps
_FOREIGN = 1e-5  # residual relative to sigma_1 from which given triplets are not those of the weight


@dataclasses.dataclass(frozen=True)
class Bound:
    """``left <= right`` as it came out, both sides in the same units. NaN in either side raises ``ValueError``."""

    left: float
    right: float  # infinite where the inequality says nothing, as for a zero gap
    tolerance: float = 0.0  # absolute: what rounding (or sampling) can have added to left - right
    ceiling: float = math.inf  # what the left side cannot exceed anyway: 1 for a sine
    asymptotic: bool = False  # true to first order only: a finite update may break it

    def __post_init__(self) -> None:
        if math.isnan(self.left) or math.isnan(self.right) or not self.tolerance >= 0:
            raise ValueError(f"a bound needs two numbers and a tolerance of 0 or more, got {self}")

    @property
    def slack(self) -> float:
        """right - left; negative where the inequality is broken, if only by rounding; infinite where right is."""
        return math.inf if math.isinf(self.right) else self.right - self.left

    @property
    def holds(self) -> bool:
        """left <= right + tolerance, the tolerance absolute and stated by the function that made the bound."""
        return self.left <= self.right + self.tolerance

    @property
    def tightness(self) -> float:
        """left / right: 1 where equality is attained (0 = 0 too), above 1 where broken, 0 where right is infinite."""
        if self.left == self.right:
            return 0.0 if math.isinf(self.right) else 1.0
        return self.left / self.right if self.right > 0 else math.inf

    @property
    def vacuous(self) -> bool:
        """right + tolerance >= ceiling: nothing could break it, so that it holds says nothing."""
        return self.right + self.tolerance >= self.ceiling


# ---- Gate II: spectra and subspaces


@dataclasses.dataclass(frozen=True)
class PairSpectra:
    """What the bounds of Gate II need of base W0, tuned W+ and update W+ - W0, so that it is computed once."""

    base: Tensor  # (min(shape),) singular values
    tuned: Tensor  # (min(shape),)
    update: Tensor  # (min(shape),)
    base_top: Triplets | None = None  # k or more leading triplets; only `wedin` asks for them
    tuned_top: Triplets | None = None


def pair_spectra(base: Tensor, tuned: Tensor, k: int = 0) -> PairSpectra:  # (d_out, d_in) both
    """Exact fp64 spectra of both weights and of their difference, and k top triplets of the weights where k > 0.

    O(max(d) min(d)^2), three times. Raises ``ValueError`` for weights of different shape or device, NaN or infinite
    entries, and k outside 0 .. min(shape); ``TypeError`` for weights that are not floating point.
    """
    _check_pair(base, tuned)
    before, after = base.detach().double(), tuned.detach().double()
    first, second = (WeightSpectrum(w, method="exact", name=n) for w, n in ((before, "base"), (after, "tuned")))
    third = WeightSpectrum(after - before, method="exact", name="the update")
    tops = (first.top(k), second.top(k)) if k else (None, None)
    return PairSpectra(first.values(), second.values(), third.values(), *tops)


def weyl(base: Tensor, tuned: Tensor, *, spectra: PairSpectra | None = None) -> Bound:  # (d_out, d_in) both
    """max_i |sigma_i(W+) - sigma_i(W0)| <= ||dW||_2, in the units of the weight. Holds for every update.

    ``tolerance`` (here, in :func:`mirsky` and :func:`ky_fan`): max(shape) * eps * (||W0|| + ||W+||) in the norm of the
    bound, eps that of the coarsest spectrum given; fp64 without ``spectra``. Spectra in fp32 can hide small updates.

    Raises as :func:`pair_spectra`, and ``ValueError`` for spectra that are not those of two weights of this shape.
    Source: Weyl's inequality for singular values; Corollary 3.4.
    """
    s = _resolve(base, tuned, spectra)
    return Bound(float((s.tuned - s.base).abs().max()), s.norm, s.rounding * (float(s.base[0]) + float(s.tuned[0])))


def mirsky(base: Tensor, tuned: Tensor, *, spectra: PairSpectra | None = None) -> Bound:  # (d_out, d_in) both
    """sqrt(sum_i (sigma_i(W+) - sigma_i(W0))^2) <= ||dW||_F, in the units of the weight. Holds for every update.

    The roots of the paper's two sides, whose squares leave fp64 for very small updates. Tolerance and errors as
    :func:`weyl`. Source: Mirsky (1960); Corollary 3.4.
    """
    s = _resolve(base, tuned, spectra)
    return Bound(_norm(s.tuned - s.base), _norm(s.update), s.rounding * (_norm(s.base) + _norm(s.tuned)))


class KyFanBounds(NamedTuple):
    """Two right sides for |sum of the k largest sigma of W+ - that of W0|; both hold for every update."""

    paper: Bound  # k ||dW||_2
    sharper: Bound  # ||dW||_(k), the sum of the k largest singular values of dW


def ky_fan(base: Tensor, tuned: Tensor, k: int, *, spectra: PairSpectra | None = None) -> KyFanBounds:
    """| ||W+||_(k) - ||W0||_(k) | <= ||dW||_(k) <= k ||dW||_2, in the units of the weight; (d_out, d_in) both.

    Tolerance (its norms are Ky Fan's k-norms) and errors as :func:`weyl`, and ``ValueError`` for k outside
    1 .. min(shape). Source: the triangle inequality of the Ky Fan k-norm; Corollary 3.5.
    """
    _check_pair(base, tuned, k)
    s = _resolve(base, tuned, spectra)
    before, after, update = (float(values[:k].sum()) for values in (s.base, s.tuned, s.update))
    left, tolerance = abs(float((s.tuned - s.base)[:k].sum())), s.rounding * (before + after)
    return KyFanBounds(Bound(left, k * s.norm, tolerance), Bound(left, update, tolerance))


class WedinBounds(NamedTuple):
    """Right sides for max(||sin Theta(U_k)||_2, ||sin Theta(V_k)||_2), the same left side in each; no unit."""

    sine: float
    gap: float  # sigma_k - sigma_(k+1) of the base, sigma_(min(shape)+1) = 0; in the units of the weight
    paper: Bound  # ||dW||_2 / gap: first order; a finite update may exceed it, by a factor of up to 2
    double_angle: Bound  # sin(arcsin(2 ||dW||_2 / gap) / 2), and 1 from ||dW||_2 = gap / 2 on: always true
    two_spectra: Bound  # ||dW||_2 / max(sigma_k - sigma+_(k+1), sigma+_k - sigma_(k+1)): always true (Wedin)


def wedin(base: Tensor, tuned: Tensor, k: int, *, spectra: PairSpectra | None = None) -> WedinBounds:
    """How far the top-k singular subspaces may turn: max(||sin Theta(U_k)||_2, ||sin Theta(V_k)||_2), (d_out, d_in).

    Write e = ||dW||_2, gamma = sigma_k - sigma_(k+1) of the base, sigma+ for the tuned weight.

    - ``two_spectra`` is Wedin's theorem: its gap lies between the spectra of both weights. With a = ||sin Theta(U_k)||
      and b = ||sin Theta(V_k)||, the block U+_rest^T dW V_k gives a sigma_k <= e + b sigma+_(k+1), its mirror image
      b sigma_k <= e + a sigma+_(k+1); add them at the larger of a and b. Then exchange the weights.
    - ``double_angle`` needs the base's gap only. Reflect W0 at the tuned subspaces on both sides: W+ stays as it is, so
      the reflected W0, with W0's own spectrum, is within 2 e of W0, its top-k subspaces at twice the angle. Wedin's
      theorem for these two gives sin 2 Theta <= 2 e / gamma, whatever e. Below e = gamma / 2 no angle can pass
      45 degrees on the way from W0 to W+; from there on the subspaces may swap, so the sine may be 1. Sharp for each e.
    - ``paper`` is e / gamma, their common limit for small e. It is no theorem: some dW of *every* size e < gamma / 2
      break it (slightly where e is small, by sqrt(2) at the end), and from there to e = gamma by up to 2. Twice the
      paper's side always holds, and says less than ``double_angle``.

    ``tolerance``: both weights are moved by what the measured residuals of their triplets and max(shape) * eps of their
    sigma_1 allow, and the right side computed again; so a gap that is mere rounding makes a bound vacuous.

    Raises as :func:`ky_fan`, and ``ValueError`` for ``spectra`` without k triplets or with another weight's.
    Source: Wedin (1972); Davis and Kahan (1970) for the double angle; Theorem 3.3.
    """
    _check_pair(base, tuned, k)
    s = _resolve(base, tuned, spectra, k)
    (U, first), (X, second) = _top(base, s.base, s.base_top, k, "base"), _top(tuned, s.tuned, s.tuned_top, k, "tuned")
    with full_precision():
        sine = max(float(principal_angles(p, q)[-1].sin()) for p, q in ((U.U, X.U), (U.V, X.V)))
    (here, after_here), (there, after_there) = (
        (float(values[k - 1]), float(values[k]) if k < len(values) else 0.0) for values in (s.base, s.tuned)
    )
    gap, crossed = here - after_here, max(here - after_there, there - after_here)
    wobble = first + second + s.rounding * (float(s.base[0]) + float(s.tuned[0]))

    def bound(distance: float, asymptotic: bool = False, double: bool = False) -> Bound:
        def side(change: float, apart: float) -> float:
            if double:
                return math.sin(math.asin(2 * change / apart) / 2) if 2 * change < apart else 1.0
            return change / apart if apart > 0 else math.inf

        right, worst = side(s.norm, distance), side(s.norm + wobble, distance - 2 * wobble)
        tolerance = max(0.0, min(worst, 1.0) - min(right, 1.0)) + max(base.shape) * _EPS
        return Bound(sine, right, tolerance, ceiling=1.0, asymptotic=asymptotic)

    return WedinBounds(sine, gap, bound(gap, asymptotic=True), bound(gap, double=True), bound(crossed))


class _Spectra(NamedTuple):
    """Checked fp64 values, descending, and the rounding of the coarsest relative to sigma_1."""

    base: Tensor
    tuned: Tensor
    update: Tensor
    norm: float  # ||dW||_2
    rounding: float
    base_top: Triplets | None
    tuned_top: Triplets | None


def _check_pair(base: Tensor, tuned: Tensor, k: int | None = None) -> None:
    for weight, name in ((base, "base"), (tuned, "tuned")):
        if not weight.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {weight.dtype}")
    if base.shape != tuned.shape or base.ndim != 2 or base.device != tuned.device:
        raise ValueError(
            f"base and tuned must be two matrices of one shape and device, got {tuple(base.shape)} on {base.device} "
            f"and {tuple(tuned.shape)} on {tuned.device}"
        )
    if k is not None and not 1 <= k <= min(base.shape):
        raise ValueError(f"k must be between 1 and {min(base.shape)} for weights of {tuple(base.shape)}, got {k}")


def _resolve(base: Tensor, tuned: Tensor, spectra: PairSpectra | None, k: int = 0) -> _Spectra:
    _check_pair(base, tuned)
    given = pair_spectra(base, tuned, k) if spectra is None else spectra
    checked: list[Tensor] = []
    for name in ("base", "tuned", "update"):
        values = getattr(given, name)
        if values.shape != (min(base.shape),) or not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(
                f"spectra.{name} must be the {min(base.shape)} singular values of a weight of {tuple(base.shape)}, "
                f"finite and not negative, got shape {tuple(values.shape)}"
            )
        checked.append(values.detach().double().to(base.device).sort(descending=True).values)
    eps = max(torch.finfo(values.dtype).eps for values in (given.base, given.tuned, given.update))
    before, after, update = checked
    rounding = max(base.shape) * eps
    return _Spectra(before, after, update, float(update[0]), rounding, given.base_top, given.tuned_top)


def _top(weight: Tensor, values: Tensor, top: Triplets | None, k: int, name: str) -> tuple[Triplets, float]:
    """The first k triplets in fp64 and how far the weight is from one whose triplets they are, in its units.

    That distance is the larger of the residuals ||W V - U S||, ||W^T U - V S|| (Kahan, Parlett and Jiang 1982); here in
    the Frobenius norm, with the rounding of the basis' own dtype on top.
    """
    if top is None or min(top.U.shape[-1], top.V.shape[-1], len(top.S)) < k:
        raise ValueError(f"spectra.{name}_top must hold {k} triplets or more: pair_spectra(base, tuned, k={k}) does")
    U, S, V = (tensor.detach().double().to(weight.device)[..., :k] for tensor in top)
    if (len(U), len(V)) != tuple(weight.shape):
        raise ValueError(f"spectra.{name}_top is of a weight ({len(U)}, {len(V)}), not {tuple(weight.shape)}")
    scale = float(values[0])
    if scale == 0.0:
        return Triplets(U, S, V), 0.0
    with full_precision():
        W, S = weight.detach().double() / scale, S / scale
        residual = max(float((W @ V - U * S).norm()), float((W.T @ U - V * S).norm()))
    residual = max(residual, float((S - values[:k] / scale).abs().max()))
    if not residual <= _FOREIGN:
        raise ValueError(f"spectra.{name}_top are not the top {k} triplets of {name}: off by {residual:.1e} of sigma_1")
    own = math.sqrt(k) * torch.finfo(top.U.dtype).eps
    return Triplets(U, S * scale, V), scale * (residual + own)


def _norm(values: Tensor) -> float:
    """The 2-norm without squaring the extremes away."""
    largest = float(values.abs().max())
    return largest * float((values / largest).norm()) if largest > 0 else 0.0


# ---- Gate III: what bf16 stores of an update


class HalfUlp(NamedTuple):
    """Counts of one weight's entries: what half a step predicts, and what happens. All exact."""

    entries: int
    predicted: int  # |update| >= ULP / 2: the paper's criterion
    changed: int  # the stored number becomes another
    missed: int  # changed, not predicted: from a power of two towards zero, where the step is half a ULP
    spurious: int  # predicted, unchanged: exactly half a ULP away from an even number
    above: int  # |update| > threshold of the entry: these change
    ties: int  # |update| = threshold: these change where the stored mantissa is odd, and go to the even neighbour

    @property
    def sufficient(self) -> Bound:
        """#{|update| > threshold} <= #changed: an equality where there are no ties. In entries."""
        return Bound(self.above, self.changed, ceiling=self.entries)

    @property
    def necessary(self) -> Bound:
        """#changed <= #{|update| >= threshold}. In entries."""
        return Bound(self.changed, self.above + self.ties, ceiling=self.entries)


def realisation_threshold(
    weight: Tensor,  # any shape
    update: Tensor,  # the same shape: only its signs matter
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fp64, same shape
    """Half the distance from the stored weight to its neighbour on the update's side, in the weight's units; exact.

    ULP / 2, but ULP / 4 towards zero from a power of two above the smallest normal number. An entry changes if |update|
    is larger, does not if it is smaller; at equality it changes if and only if the stored mantissa is odd. That is the
    paper's "iff |dW| >= ULP / 2" made exact. A zero update, which changes nothing, gets the threshold away from zero.

    Raises as :func:`half_ulp`. Source: Corollary 3.6.
    """
    _check_finite(weight, update, dtype)
    stored, update = weight.detach().to(dtype).double(), update.detach()
    toward = stored.sign() * update.sign() < 0
    return ulp(torch.where(toward, torch.nextafter(stored, torch.zeros_like(stored)), stored), dtype) / 2


def half_ulp(weight: Tensor, update: Tensor, dtype: torch.dtype = torch.bfloat16) -> HalfUlp:  # any shape, the same
    """How many entries an update changes once stored in ``dtype`` (bf16, fp16 or fp32), and how many ULP / 2 predicts.

    The exact sum rounded to nearest, ties to even; the weight is rounded to ``dtype`` first. Which entries:
    :func:`visible` and :func:`exceeds_half_ulp`; from which size on: :func:`realisation_threshold`. In chunks: the
    memory beyond the two tensors is that of some million entries.

    Raises ``TypeError`` for other dtypes, and ``ValueError`` for different shapes or devices, NaN and infinite entries
    and weights that ``dtype`` stores as infinite. Source: Corollary 3.6.
    """
    if weight.shape != update.shape:
        raise ValueError(
            f"weight and update must have the same shape, got {tuple(weight.shape)}, {tuple(update.shape)}"
        )
    counts = torch.zeros(6, dtype=torch.int64, device=weight.device)
    flat = (tensor.detach().reshape(-1).split(_CHUNK) for tensor in (weight, update))
    for w, d in zip(*flat, strict=True):
        size, threshold = d.double().abs(), realisation_threshold(w, d, dtype)
        predicted, changed = exceeds_half_ulp(w, d, dtype), visible(w, d, dtype)
        found = (predicted, changed, changed & ~predicted, predicted & ~changed, size > threshold, size == threshold)
        counts += torch.stack([torch.count_nonzero(mask) for mask in found])
    return HalfUlp(weight.numel(), *counts.tolist())


def _check_finite(weight: Tensor, update: Tensor, dtype: torch.dtype) -> None:
    for tensor, name in ((weight, "weight"), (update, "update")):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if weight.shape != update.shape or weight.device != update.device:
        raise ValueError(
            f"weight and update must have the same shape and device, got {tuple(weight.shape)} on {weight.device} and "
            f"{tuple(update.shape)} on {update.device}"
        )
    for tensor, name in ((weight.to(dtype), f"the weight as {dtype}"), (update, "the update")):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds {int((~tensor.isfinite()).sum())} NaN or infinite entries")
