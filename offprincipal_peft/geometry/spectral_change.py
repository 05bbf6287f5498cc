"""How a weight's spectrum and principal subspaces moved, from one eigendecomposition of the weight before.

Trade-off. Two full SVDs answer everything and cost the most. Where the update is small, as reinforcement learning's
are, the tuned weight is the base in its own singular basis plus a small matrix, so this route

1. forms both Gram matrices on the smaller side and takes eigenvectors of the base's alone, in fp32;
2. rotates the *difference* of the Gram matrices into that basis. Rounding there is relative to the update and not to
   the weight: what fp32 lost of the base is the same before and after, and cancels to first order;
3. gets shifts of all values from second-order perturbation theory, exactly 2 x 2 for near neighbours, and the tuned
   top-k subspace from the leading block solved exactly with the rest folded in (Loewdin partitioning);
4. where the measured mixing of directions is too strong for that, takes the rotated matrix' eigenvalues in fp64, and
   its eigenvectors too where the leading block does not settle or the smallest values need their directions.

The left subspaces' angles come from differences as well: U+ is W+ V+, taken apart as U0 plus a small part. Each figure
carries an error that the route states; where it is more than the caller accepts, the weight is done by exact SVDs.

Source: 2511.08567 for the figures; Stewart and Sun, Matrix Perturbation Theory (1990), ch. V; Loewdin (1951).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from .drift import max_spectral_shift, normalized_spectral_shift
from .gram_change import change_norm, difference, frobenius, gram_change, gram_matrix, multiply, rotate, row_chunks
from .numerics import full_precision
from .perturbation import leading, perturbed, trailing
from .spectrum import Triplets, WeightSpectrum
from .subspace import principal_angles

Method = Literal["fast", "exact"]

MIXED = 0.02  # mean squared mixing of directions from which perturbation theory is given up
SMALL = 1e-3  # ||dW|| / ||W|| up to which the Gram matrices' difference is multiplied out, and not subtracted
FAINT = 1e4  # squares below so many times the rounding of the Gram matrix are measured on the weights themselves,
BOTTOM = 64  # on so many directions, of which the lower half counts
RELATIVE, ABSOLUTE = 0.01, 1e-6  # the accepted errors of shifts and angles


@dataclasses.dataclass(frozen=True)
class SpectralChange:
    """What :meth:`SpectralBase.change` found. Values descending, fp64; angles ascending, radians, fp64."""

    before: Tensor  # (min(shape),)
    after: Tensor  # (min(shape),)
    norm: float  # ||W+ - W0||_2
    output_angles: Tensor  # (k,), between the top-k left subspaces
    input_angles: Tensor  # (k,), between the top-k right subspaces
    route: str  # "perturbation", "rotated", "exact"
    shift_error: float  # of the normalised spectral shift, absolute
    angle_error: float  # of each angle, radians
    reason: str = ""  # why a faster route was not taken or not believed

    @property
    def shift(self) -> float:
        """The normalised spectral shift."""
        return normalized_spectral_shift(self.before, self.after)

    @property
    def largest(self) -> float:
        """max_i |sigma+_i - sigma_i|, in the units of the weight."""
        return max_spectral_shift(self.before, self.after)


class SpectralBase:
    """A weight (d_out, d_in) whose changes are asked for; what is computed of it serves every tuned weight.

    Args:
        weight: floating point, finite, kept as it is stored and converted in chunks.
        k: directions of the principal subspaces, 1 <= k <= min(shape).
        method: "fast" as above, or "exact": fp64 SVDs of both sides.

    Raises ``ValueError`` for a weight that is not 2-D, not finite, or k out of range.
    """

    def __init__(self, weight: Tensor, k: int, *, method: Method = "fast", name: str = "weight", seed: int = 0) -> None:
        if weight.ndim != 2 or not weight.dtype.is_floating_point or not min(weight.shape):
            raise ValueError(f"{name} must be a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} of shape {tuple(weight.shape)} holds NaN or infinite entries")
        if not 1 <= k <= min(weight.shape):
            raise ValueError(f"k must be between 1 and {min(weight.shape)} for {name} {tuple(weight.shape)}, got {k}")
        if method not in ("fast", "exact"):
            raise ValueError(f"method must be 'fast' or 'exact', got {method!r}")
        self.weight, self.k, self.name, self.seed = weight.detach(), k, name, seed
        self._exact: tuple[Tensor, Triplets] | None = None
        self._fast: _Eigen | None = None
        self.reason = ""
        if method == "fast":
            with full_precision():
                self._fast = _Eigen.of(self.weight, k)
            if self._fast is None:
                self.reason = "the base's principal values are too small beside its largest for fp32"

    @property
    def values(self) -> Tensor:
        """Singular values of the base, descending, fp64 (min(shape),)."""
        return self._fast.values if self._fast is not None else self._exactly()[0]

    @property
    def top(self) -> Triplets:
        """The base's top-k triplets, fp32 (fp64 in exact mode)."""
        return self._fast.top if self._fast is not None else self._exactly()[1]

    def change(self, tuned: Tensor) -> SpectralChange:  # (d_out, d_in), any floating dtype
        """Raises ``ValueError`` for a tuned weight of another shape or with NaN or infinite entries."""
        if tuned.shape != self.weight.shape:
            raise ValueError(f"{self.name}: base {tuple(self.weight.shape)} and tuned {tuple(tuned.shape)} differ")
        reason = self.reason
        if self._fast is not None:
            with full_precision():
                found = _fast_change(self._fast, self.weight, tuned.detach(), self.k, self.seed)
            reason = _doubt(found)
            if not reason:
                return found
        return self._exact_change(tuned.detach(), reason)

    def _exactly(self) -> tuple[Tensor, Triplets]:
        if self._exact is None:
            self._exact = _exact_side(self.weight, self.k, self.name)
        return self._exact

    def _exact_change(self, tuned: Tensor, reason: str) -> SpectralChange:
        values, top = self._exactly()
        after, moved = _exact_side(tuned, self.k, f"{self.name} (tuned)")
        difference = torch.empty(tuned.shape, dtype=torch.float64, device=tuned.device)
        difference.copy_(tuned).sub_(self.weight)
        norm = float(WeightSpectrum(difference, method="exact").values()[0]) if bool(difference.any()) else 0.0
        del difference
        output, into = principal_angles(top.U, moved.U), principal_angles(top.V, moved.V)
        return SpectralChange(values, after, norm, output, into, "exact", 0.0, 0.0, reason)


def _exact_side(weight: Tensor, k: int, name: str) -> tuple[Tensor, Triplets]:
    spectrum = WeightSpectrum(weight.double(), method="exact", name=name)
    top = spectrum.top(k)  # first: the values come from the same decomposition then
    return spectrum.values(), top


def _doubt(found: SpectralChange) -> str:
    """Why the stated errors are not accepted; empty where they are."""
    shift = found.shift
    if not found.shift_error <= max(RELATIVE * shift, ABSOLUTE):
        return f"the fast shift {shift:.1e} may be off by {found.shift_error:.1e}"
    largest = max(float(found.output_angles[-1]), float(found.input_angles[-1]))
    if not found.angle_error <= max(RELATIVE * largest, ABSOLUTE):
        return f"the fast angles, {largest:.1e} at most, may be off by {found.angle_error:.1e}"
    return ""


# ---- the base in its own basis


@dataclasses.dataclass
class _Eigen:
    """The Gram matrix of the smaller side and its eigenvectors; "tall" is m >= n, a wide weight transposed."""

    gram: Tensor  # (n, n) fp32
    vectors: Tensor  # (n, n) fp32, columns by descending value
    squares: Tensor  # (n,) fp64, descending, not negative
    wide: bool
    long: Tensor  # (m, k) fp32: the top-k vectors of the longer side
    noise: float  # what rounding moved the Gram matrix by: common to before and after
    fresh: float  # what rounding adds to one entry of the difference of two Gram matrices

    @staticmethod
    def of(weight: Tensor, k: int) -> _Eigen | None:
        wide = weight.shape[0] < weight.shape[1]
        gram = gram_matrix(weight, wide)
        squares, vectors = torch.linalg.eigh(gram)
        squares, vectors = squares.double().flip(0).clamp_min_(0.0), vectors.flip(1)
        n = len(squares)
        noise = torch.finfo(torch.float32).eps * float(squares[0])
        if not float(squares[k - 1]) > 100 * noise * math.sqrt(n):
            return None
        image = multiply(weight, vectors[:, :k], wide)
        long, _ = torch.linalg.qr(image.double())
        signs = (long.float() * image).sum(0).sign()  # the triangular factor's diagonal may be negative
        fresh = 0.25 * torch.finfo(torch.float32).eps * float(squares.mean())
        return _Eigen(gram, vectors, squares, wide, long.float() * signs, noise, fresh)

    @property
    def values(self) -> Tensor:
        return self.squares.sqrt()

    @property
    def norm(self) -> float:
        """||W||_F."""
        return math.sqrt(float(self.squares.sum()))

    @property
    def is_faint(self) -> bool:
        """Whether the smallest values are lost in the Gram matrix."""
        return float(self.squares[-1]) <= FAINT * self.noise

    @property
    def top(self) -> Triplets:
        k = self.long.shape[1]
        short, S = self.vectors[:, :k].contiguous(), self.values[:k].float()
        return Triplets(short, S, self.long) if self.wide else Triplets(self.long, S, short)


# ---- the change in the base's basis


def _fast_change(base: _Eigen, weight: Tensor, tuned: Tensor, k: int, seed: int) -> SpectralChange:
    change = difference(weight, tuned)
    size = frobenius(change) / base.norm
    if size == 0.0:
        zeros = torch.zeros(k, dtype=torch.float64, device=weight.device)
        return SpectralChange(base.values, base.values, 0.0, zeros, zeros, "perturbation", 0.0, 0.0)
    if not math.isfinite(size):
        raise ValueError(f"the tuned weight {tuple(tuned.shape)} holds NaN or infinite entries, or overflows fp32")
    norm = change_norm(change, base.wide, seed)
    del change
    small = size <= SMALL
    update = gram_change(weight, tuned, base.wide) if small else gram_matrix(tuned, base.wide).sub_(base.gram)
    fresh = base.fresh * (2 * size if small else 1.0)
    rotated = rotate(update, base.vectors)
    del update
    mixing, squares = perturbed(base.squares, rotated)
    route, last = "perturbation", None
    if mixing > MIXED:
        route, mixing = "rotated", 0.0
    found = leading(base.squares, rotated, k)
    if found is not None and route == "rotated" and base.is_faint:
        last = trailing(_tuned_gram(base, rotated), min(len(squares), BOTTOM), base.noise)
        found = found if last is not None else None
    if found is None:
        route, mixing = "rotated", 0.0
        squares, top, last = _decomposed(base, rotated, k)
        step = 0.0
    else:
        top, step = found
        if route == "rotated":
            squares = torch.linalg.eigvalsh(_tuned_gram(base, rotated)).flip(0)
    before, after, measured = _measured_bottom(base, weight, tuned, rotated, squares, last)
    del rotated, last
    output, into, lost = _angles(base, weight, tuned, top[:k], top[k:], fresh)
    lost += 0.3 * step
    if base.wide:
        output, into = into, output
    if not float(after[k - 1]) ** 2 > 100 * base.noise:
        lost = math.inf  # the tuned weight has no k directions to speak of
    shift_error = _shift_error(base, before, after, mixing, measured, norm, fresh)
    return SpectralChange(before, after, norm, output, into, route, shift_error, lost)


def _tuned_gram(base: _Eigen, rotated: Tensor) -> Tensor:
    """The tuned Gram matrix in the base's basis, fp64."""
    matrix = rotated.double()
    matrix.diagonal().add_(base.squares)
    return matrix


def _decomposed(base: _Eigen, rotated: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All eigenvalues (n,), a basis (n, k) of the top-k space, and the last directions (n, <= BOTTOM)."""
    squares, vectors = torch.linalg.eigh(_tuned_gram(base, rotated))
    X = vectors.flip(1)[:, :k].clone()
    return squares.flip(0), X, vectors[:, : min(len(squares), BOTTOM)].flip(1).float()


def _angles(
    base: _Eigen, weight: Tensor, tuned: Tensor, head: Tensor, rest: Tensor, fresh: float
) -> tuple[Tensor, Tensor, float]:
    """Angles of the longer and of the shorter side, and their error. ``head`` (k, k), ``rest`` (n - k, k) fp64."""
    k, wide = base.long.shape[1], base.wide
    tangents = torch.linalg.solve(head, rest, left=False) if rest.numel() else rest  # (n - k, k)
    sizes = torch.linalg.svdvals(tangents) if rest.numel() else tangents.new_zeros(0)
    short = _ascending(sizes, k)
    turn = base.vectors[:, k:] @ tangents.float()  # (n, k): V+ spans V_k + turn
    moved = torch.empty(max(weight.shape), k, device=weight.device)
    for part, (before, after) in row_chunks(weight, tuned, wide=wide):
        torch.mm(after, turn, out=moved[part])
        moved[part].addmm_(after - before, base.vectors[:, :k])
    U = base.long.double()
    inside = U.T @ moved.double()
    outside = moved.double() - U @ inside
    stretched = inside + torch.diag(base.values[:k])  # U+ spans U_k stretched + outside
    gram = outside.T @ outside
    back = torch.linalg.solve(stretched, torch.eye(k, dtype=gram.dtype, device=gram.device))
    squares = torch.linalg.eigvalsh(back.T @ gram @ back).clamp_min_(0.0)
    long = _ascending(squares.sqrt(), k)
    n = len(base.squares)
    gap = float(base.squares[k - 1] - base.squares[k]) if k < n else math.inf
    # The base's own vectors turn by noise / gap against their neighbours; of that, what the update changes again.
    # The rounding is spread over all directions, so that one pair sees its share: 1 / sqrt(n), here with a factor.
    share = min(1.0, 8 / math.sqrt(n))
    wobble = 4 * share * base.noise / gap if gap > 0 else math.inf
    largest = max(float(long[-1]), float(short[-1]))
    rounding = fresh / gap if gap > 0 else math.inf
    floor = 2e-7 if fresh < base.fresh else 6e-7
    return long, short, largest * min(1.0, 2 * wobble) + min(rounding, 1.0) + floor


def _ascending(tangents: Tensor, k: int) -> Tensor:
    """Angles of k directions, zeros for those without a tangent."""
    angles = torch.zeros(k, dtype=torch.float64, device=tangents.device)
    found = tangents.double().atan().sort().values
    if len(found):
        angles[k - len(found) :] = found
    return angles


def _measured_bottom(
    base: _Eigen, weight: Tensor, tuned: Tensor, rotated: Tensor, squares: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Both spectra, and how many of the smallest values were measured on the weights themselves.

    A value below the root of fp32's eps is lost in the Gram matrix, its direction is not: the weights' images of the
    last directions have these values to eps of the largest. ``last``: the tuned weight's last directions in the
    base's basis; None: to first order from ``rotated``.
    """
    before, after = base.values, squares.clamp_min(0.0).sqrt().sort(descending=True).values
    n = len(before)
    if not base.is_faint:
        return before, after, 0
    size = min(n, BOTTOM)
    count = size // 2 if size < n else n
    X = base.vectors[:, n - size :]
    if last is None:
        coupling = rotated[: n - size, n - size :].double()
        gaps = base.squares[: n - size, None] - base.squares[None, n - size :]
        tilt = coupling * gaps / (gaps.square() + coupling.square()).clamp_min_(1e-300)
        moved = torch.linalg.qr((X - base.vectors[:, : n - size] @ tilt.float()).double())[0].float()
    else:
        moved = base.vectors @ last
    for values, matrix, basis in ((before, weight, X), (after, tuned, moved)):
        image = multiply(matrix, basis, base.wide).double()
        found = torch.linalg.eigvalsh(image.T @ image).clamp_min_(0.0).sqrt()  # ascending
        values[n - count :] = found[:count].flip(0)
    return before, after.sort(descending=True).values, count


def _shift_error(
    base: _Eigen, before: Tensor, after: Tensor, mixing: float, measured: int, norm: float, fresh: float
) -> float:
    """What may be wrong with the shift: third orders of the perturbation, rounding, and values that it hides.

    The factors are chosen, not derived: what exact decompositions showed stayed below, in places by a fifth only
    (tests/geometry/test_spectral_change.py).
    """
    scale, shifts = float(before.norm()), after - before
    known = len(before) - measured
    squares = before[:known].square().clamp_min(base.noise)
    common = float((shifts[:known] * (base.noise / squares)).norm())
    rounding = float((fresh / squares.sqrt()).norm())
    hidden = norm * math.sqrt(float((base.squares[:known] < 10 * base.noise).sum()))
    direct = torch.finfo(torch.float32).eps * float(before[0]) * math.sqrt(measured)
    return (
        ((0.25 * mixing + 5e-4) * float(shifts.norm()) + common + rounding + hidden + direct) / scale if scale else 0.0
    )
