"""Masks over the entries of a weight: principal, low-magnitude, random and magnitude-matched, at an exact density.

Every mask is made of *units*: single entries, or whole rows, columns or square blocks, which are scored by the mean
of their entries' scores. The density asked for is the density got, to one unit, and ties go to the lowest index: a
threshold alone would keep too many or too few wherever values repeat, as they do in bf16.

Source: 2511.08567, section 4 (principal mask M_princ = Top_alpha(|W_(k)|), M_low = Bottom_alpha(|W|), the safe mask
M_low | ~M_princ). ``matched`` and ``thinned`` are this package's control for magnitude.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .mask_expression import Node, atoms, fold, parse
from .numerics import full_precision
from .selection import select
from .spectrum import WeightSpectrum

Structure = Literal["element", "row", "column", "block"]

BLOCK = 64  # side of a block unit
MAGNITUDE_BINS = 64
LEAST_COVERAGE = 0.2
_SUBSPACE_ITERATIONS = 6


@dataclass(frozen=True)
class MaskOptions:
    """What the names of an expression mean. Densities are fractions of the units, in (0, 1)."""

    principal_rank: int | float = 1 / 16  # k, or a fraction of min(shape)
    principal_density: float = 0.5
    low_density: float = 0.5859
    random_density: float = 0.01
    structure: Structure = "element"
    seed: int = 0
    principal_method: Literal["exact", "randomized"] = "exact"
    compare_with_exact: bool = True  # with a randomised score: compute the exact one too and report the overlap


@dataclass
class MatchReport:
    """How well a magnitude-matched pair could be drawn."""

    expression: str
    coverage: float  # drawn units per unit of x
    ks_distance: float  # Kolmogorov-Smirnov distance of |W| between the matched and the thinned units


@dataclass
class OverlapReport:
    """How much of the exact principal mask a randomised score found."""

    k: int
    jaccard: float  # |exact & found| / |exact | found|, in units


@dataclass
class Mask:
    """A boolean mask (d_out, d_in) and its units (bool, fewer entries where structured)."""

    entries: Tensor
    units: Tensor
    reports: list[MatchReport | OverlapReport] = field(default_factory=list)

    @property
    def density(self) -> float:
        return float(self.entries.sum()) / self.entries.numel()


def lowest_mask(score: Tensor, fraction: float) -> Tensor:  # score: any shape, >= 0 -> bool, same shape
    """Exactly round(fraction * numel) entries with the smallest score; ties go to the lowest flat index.

    Raises ``ValueError`` for a fraction outside (0, 1) and for a score that holds negative or NaN entries.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    return select(score, round(fraction * score.numel()), largest=False)


def principal_score(weight: Tensor, k: int, *, name: str = "weight") -> Tensor:
    """|W_(k)|, the magnitudes of the rank-k SVD reconstruction, fp32 (d_out, d_in)."""
    top = WeightSpectrum(weight, name=name).top(k)
    return ((top.U * top.S) @ top.V.T).abs().float()


@full_precision()
def randomized_principal_score(weight: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """|W_(k)| by subspace iteration on 2k Gaussian probes, fp32 (d_out, d_in).

    Several times faster than the exact score, and close to it only where the spectrum decays: at 1024 x 1024, k = 64,
    the mask's Jaccard overlap with the exact mask was 1.00 (sigma_i = i^-0.7), 0.99 (two decades, log-spaced) and 0.77
    (a Gaussian matrix). Source: Halko, Martinsson and Tropp (0909.4061), Algorithms 4.4 and 5.1.
    """
    matrix = weight.detach().to(torch.float32)
    if not 1 <= k <= min(matrix.shape):
        raise ValueError(f"k must lie in 1 to {min(matrix.shape)} for a {tuple(matrix.shape)} weight, got {k}")
    probes = min(2 * k, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(matrix.shape[1], probes, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ omega).Q
    for _ in range(_SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q  # (d_out, 2k)
    U, S, Vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return ((basis @ (U[:, :k] * S[:k])) @ Vh[:k]).abs()


def unit_means(values: Tensor, structure: Structure) -> Tensor:
    """Mean of ``values`` (d_out, d_in) over each unit, fp32: (d_out, d_in), (d_out,), (d_in,) or (blocks, blocks)."""
    values = values.float()
    if structure == "element":
        return values
    if structure in ("row", "column"):
        return values.mean(dim=1 if structure == "row" else 0)
    if structure != "block":
        raise ValueError(f"structure must be 'element', 'row', 'column' or 'block', got {structure!r}")
    rows, columns = (-(-d // BLOCK) for d in values.shape)
    sums = _block_sums(values, rows, columns)
    return sums / _block_sums(torch.ones_like(values), rows, columns)


def _block_sums(values: Tensor, rows: int, columns: int) -> Tensor:
    padded = values.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.view(rows, BLOCK, columns, BLOCK).sum(dim=(1, 3))


def expand_units(units: Tensor, shape: tuple[int, int], structure: Structure) -> Tensor:
    """The entries (d_out, d_in) that the chosen units cover."""
    d_out, d_in = shape
    if structure == "element":
        return units
    if structure == "row":
        return units[:, None].expand(d_out, d_in).contiguous()
    if structure == "column":
        return units[None, :].expand(d_out, d_in).contiguous()
    entries = units.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return entries[:d_out, :d_in].contiguous()


def build_mask(weight: Tensor, expression: str, options: MaskOptions | None = None, *, name: str = "weight") -> Mask:
    """Evaluate a mask expression on one weight.

    Args:
        weight: (d_out, d_in), floating, finite.
        expression: see :mod:`mask_expression`.
        options: ranks, densities, structure and seed.
        name: the layer's name, for messages; random draws differ between names.

    Raises:
        ValueError: a malformed expression (with its position), a density outside (0, 1), an empty or full result,
            a matched pair that covers under 20 % of x, or a weight that cannot be decomposed; each names the layer.
    """
    return _Evaluation(weight, parse(expression), options or MaskOptions(), name).run()


class _Evaluation:
    def __init__(self, weight: Tensor, tree: Node, options: MaskOptions, name: str) -> None:
        if weight.dim() != 2:
            raise ValueError(f"{name}: a mask needs a 2-D weight, got shape {tuple(weight.shape)}")
        self.weight, self.tree, self.options, self.name = weight.detach(), tree, options, name
        self.shape = (weight.shape[0], weight.shape[1])
        self.where = f"{name} (weight {self.shape[0]} x {self.shape[1]})"
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{self.where}: the weight holds NaN or infinite entries")
        for option in ("principal_density", "low_density", "random_density"):
            value = getattr(options, option)
            if not 0.0 < value < 1.0:
                raise ValueError(f"{option} must lie in (0, 1), got {value!r}")
        if options.principal_method not in ("exact", "randomized"):
            raise ValueError(f"principal_method must be 'exact' or 'randomized', got {options.principal_method!r}")
        self.magnitude = unit_means(self.weight.abs(), options.structure)
        self.reports: list[MatchReport | OverlapReport] = []

    def run(self) -> Mask:
        units, _ = fold(
            self.tree,
            atom=lambda name: (self.atom(name), name),
            negate=lambda x: (~x[0], f"~({x[1]})"),
            combine=lambda op, x, y: (x[0] & y[0] if op == "&" else x[0] | y[0], f"({x[1]}{op}{y[1]})"),
            call=lambda function, x: (self.call(function, *x), f"{function}({x[1]})"),
        )
        chosen, total = int(units.sum()), units.numel()
        if chosen in (0, total):
            what, change = ("no", "raise") if chosen == 0 else ("every", "lower")
            raise ValueError(
                f"{self.where}: mask {self.tree} selects {what} {self.options.structure} of {total}; {change} the "
                "density of what it names (principal_density, low_density, random_density) or leave the layer out"
            )
        return Mask(expand_units(units, self.shape, self.options.structure), units, self.reports)

    def atom(self, name: str) -> Tensor:
        if name == "safe":
            return self.atom("low") | ~self.atom("principal")
        if name == "low":
            return select(self.magnitude, self.count("low_density"), largest=False)
        if name == "random":
            return self.draw(self.count("random_density"), "random")
        return self.principal()

    def principal(self) -> Tensor:
        k, count, structure = self.principal_rank(), self.count("principal_density"), self.options.structure
        randomized = self.options.principal_method == "randomized"

        def top(score: Tensor) -> Tensor:
            return select(unit_means(score, structure), count, largest=True)

        if not randomized:
            return top(principal_score(self.weight, k, name=self.where))
        seed = int(self.generator("principal").initial_seed()) % (1 << 62)
        found = top(randomized_principal_score(self.weight, k, seed=seed))
        if self.options.compare_with_exact:
            exact = top(principal_score(self.weight, k, name=self.where))
            jaccard = int((found & exact).sum()) / max(1, int((found | exact).sum()))
            self.reports.append(OverlapReport(k, jaccard))
        return found

    def count(self, density: str) -> int:
        return round(getattr(self.options, density) * self.magnitude.numel())

    def principal_rank(self) -> int:
        k, smaller = self.options.principal_rank, min(self.shape)
        k = max(1, int(k * smaller)) if isinstance(k, float) else k
        if not 1 <= k <= smaller:
            raise ValueError(f"{self.where}: principal_rank gives k = {k}, which must lie in 1 to {smaller}")
        return k

    def call(self, function: str, x: Tensor, text: str) -> Tensor:
        if function == "random":
            return self.draw(int(x.sum()), f"random({text})")
        pair = self.matched_pair(x, text)
        return pair[0 if function == "matched" else 1]

    def generator(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.options.seed}/{self.name}/{what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def keys(self, what: str) -> Tensor:
        """A random key per unit, the same on every device."""
        keys = torch.rand(self.magnitude.shape, generator=self.generator(what), dtype=torch.float32)
        return keys.to(self.weight.device)

    def draw(self, count: int, what: str) -> Tensor:
        return select(self.keys(what), count, largest=False)

    def matched_pair(self, x: Tensor, text: str) -> tuple[Tensor, Tensor]:
        """Per quantile bin b of |W|, n_b = min(|x & b|, |~x & b|) units outside x and as many inside it."""
        magnitude, inside = self.magnitude.flatten(), x.flatten()
        ordered = magnitude.sort().values
        edges = torch.arange(1, MAGNITUDE_BINS, device=x.device) * magnitude.numel() // MAGNITUDE_BINS
        bins = torch.searchsorted(ordered[edges], magnitude, right=True)
        in_x = torch.bincount(bins[inside], minlength=MAGNITUDE_BINS)
        outside = torch.bincount(bins[~inside], minlength=MAGNITUDE_BINS)
        wanted = torch.minimum(in_x, outside)
        coverage = int(wanted.sum()) / max(1, int(inside.sum()))
        if coverage < LEAST_COVERAGE:
            raise ValueError(
                f"{self.where}: the magnitude-matched pair of {text} covers {coverage:.1%} of it, under "
                f"{LEAST_COVERAGE:.0%}: too few units outside it have the magnitudes of those inside"
            )
        matched = _draw_per_bin(bins, ~inside, wanted, self.keys(f"matched({text})").flatten())
        thinned = _draw_per_bin(bins, inside, wanted, self.keys(f"thinned({text})").flatten())
        distance = ks_distance(magnitude[matched], magnitude[thinned])
        self.reports.append(MatchReport(text, coverage, distance))
        return matched.view(x.shape), thinned.view(x.shape)


def _draw_per_bin(bins: Tensor, allowed: Tensor, wanted: Tensor, keys: Tensor) -> Tensor:
    """A random choice of wanted[b] of the allowed positions of every bin b; all arguments flat."""
    positions = allowed.nonzero().squeeze(1)
    positions = positions[keys[positions].argsort(stable=True)]
    positions = positions[bins[positions].argsort(stable=True)]  # by bin, random within
    counts = torch.bincount(bins[positions], minlength=wanted.numel())
    first = counts.cumsum(0) - counts
    rank = torch.arange(positions.numel(), device=bins.device) - first.repeat_interleave(counts)
    chosen = positions[rank < wanted.repeat_interleave(counts)]
    mask = torch.zeros(bins.numel(), dtype=torch.bool, device=bins.device)
    mask[chosen] = True
    return mask


def ks_distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov distance sup |F_a - F_b| of two samples (n,), (m,)."""
    if not a.numel() or not b.numel():
        raise ValueError(f"samples must not be empty, got {a.numel()} and {b.numel()}")
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    below_a = torch.searchsorted(a, points, right=True).double() / a.numel()
    below_b = torch.searchsorted(b, points, right=True).double() / b.numel()
    return float((below_a - below_b).abs().max())


def needs_spectrum(expression: str) -> bool:
    """Whether evaluating the expression decomposes the weight."""
    return "principal" in atoms(parse(expression))
