"""Several weights' figures as one: by kind of module, by layer, and in all.

Counts are summed and shares weighted by what they are shares of, so that a pooled figure is the one that the weights
would have if they were one matrix side by side: overlaps by changed entries, energies by ||dW||_F^2, NSS and relative
norms through sums of squares. Angles are no shares: the largest stands. Figures that are missing or not finite are
left out of a pool; where none is left the pooled one is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .results import AuditReport, Change, Overlap, Share, WeightAudit

SIDES = ("output", "input", "both")
# As a layer computes them; files hold them by name.
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Rates:
    """Shares of changed entries on and off the principal mask at equal magnitude; ``error``: of log(on / off)."""

    rate: float
    other_rate: float
    coverage: float
    error: float | None

    @property
    def ratio(self) -> float | None:
        return self.rate / self.other_rate if self.other_rate > 0 else None


@dataclass(frozen=True)
class Pooled:
    """One row: what ``weights`` weights have together. Angles (radians) are the largest; None: not measured."""

    name: str
    weights: int
    entries: int
    changed: int
    stored_changed: int
    relative_norm: float | None
    shift: float | None
    angle_output: float | None = None
    angle_input: float | None = None
    principal: Overlap | None = None
    low: Overlap | None = None
    matched: Rates | None = None
    shares: dict[str, Share] = field(default_factory=dict)  # of SIDES, those that were measured

    @property
    def sparsity(self) -> float | None:
        """The share of entries that bf16 stores unchanged."""
        return 1 - self.changed / self.entries if self.entries else None

    @property
    def energy(self) -> float | None:
        """The share inside both subspaces over what the sizes of the entries alone give."""
        share = self.shares.get("both")
        return share.value / share.sizes if share is not None and share.sizes > 0 else None


def ratio(overlap: Overlap | None) -> float | None:
    """An overlap over what chance gives."""
    return overlap.value / overlap.baseline if overlap is not None and overlap.baseline > 0 else None


def pool(name: str, weights: Sequence[WeightAudit], tuned: int) -> Pooled:
    """What ``weights`` have together under the ``tuned``-th tuned checkpoint (from 0)."""
    changes = [weight.changes[tuned] for weight in weights]
    pairs = list(zip(weights, changes, strict=True))
    shifts = [(c.spectrum.shift * w.norm, w.norm) for w, c in pairs if c.spectrum is not None]
    angles = [c.angles for c in changes if c.angles is not None]
    shares = {side: _share([(getattr(c, side), c.norm**2) for c in changes]) for side in SIDES}
    return Pooled(
        name,
        len(weights),
        sum(weight.entries for weight in weights),
        sum(change.changed for change in changes),
        sum(change.stored_changed for change in changes),
        _quotient_of_norms([(c.norm, w.norm) for w, c in pairs]),
        _quotient_of_norms(shifts),
        _largest(a.output[-1] for a in angles if a.output),
        _largest(a.input[-1] for a in angles if a.input),
        _overlap([(c.principal, c.changed) for c in changes]),
        _overlap([(c.low, c.changed) for c in changes]),
        _rates(pairs),
        {side: share for side, share in shares.items() if share is not None},
    )


def kinds(report: AuditReport) -> list[str]:
    """The known projections as a layer computes them, others as they come, vectors, and what is outside the layers."""

    def place(weight: WeightAudit) -> tuple[bool, bool, int]:
        known = _ORDER.index(weight.kind) if weight.kind in _ORDER else len(_ORDER)
        return weight.layer is None, len(weight.shape) < 2, known

    return list(dict.fromkeys(weight.kind for weight in sorted(report.weights, key=place)))


def layers(report: AuditReport) -> list[int]:
    """The indices that some weight has, ascending."""
    return sorted({weight.layer for weight in report.weights if weight.layer is not None})


def by_kind(report: AuditReport, tuned: int) -> list[Pooled]:
    return [pool(kind, [w for w in report.weights if w.kind == kind], tuned) for kind in kinds(report)]


def by_layer(report: AuditReport, tuned: int) -> list[Pooled]:
    """One row for each layer and, where there are such weights, one for those outside the layers."""
    rows = [pool(f"layer {i}", [w for w in report.weights if w.layer == i], tuned) for i in layers(report)]
    outside = [weight for weight in report.weights if weight.layer is None]
    return [*rows, pool("outside", outside, tuned)] if outside else rows


def by_place(report: AuditReport, tuned: int) -> dict[tuple[str, int], Pooled]:
    """(kind, layer) → its weights together: one as a rule, several where a layer has experts."""
    found: dict[tuple[str, int], list[WeightAudit]] = {}
    for weight in report.weights:
        if weight.layer is not None:
            found.setdefault((weight.kind, weight.layer), []).append(weight)
    return {place: pool(place[0], weights, tuned) for place, weights in found.items()}


def total(report: AuditReport, tuned: int) -> Pooled:
    return pool("all", report.weights, tuned)


def by_reason(skipped: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(reason, names), the most frequent first."""
    found: dict[str, list[str]] = {}
    for name, reason in skipped:
        found.setdefault(reason, []).append(name)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def labels(report: AuditReport) -> list[str]:
    """The tuned checkpoints' labels, each different from the others."""
    names = [source.label for source in report.sources[1:]]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _largest(found: Iterable[float]) -> float | None:
    return max((value for value in found if math.isfinite(value)), default=None)


def _quotient_of_norms(pairs: Sequence[tuple[float, float]]) -> float | None:
    """sqrt(sum a^2) / sqrt(sum b^2) over the pairs (a, b) that are finite."""
    known = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    below = math.hypot(*(b for _, b in known))
    return math.hypot(*(a for a, _ in known)) / below if below > 0 else None


def _mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The mean of the values (first) by their weights (second), of those that are finite."""
    known = [(value, weight) for value, weight in pairs if math.isfinite(value) and math.isfinite(weight)]
    heaviest = max((weight for _, weight in known), default=0.0)
    if heaviest <= 0:
        return None
    scaled = [(value, weight / heaviest) for value, weight in known]
    return sum(value * weight for value, weight in scaled) / sum(weight for _, weight in scaled)


def _overlap(found: Sequence[tuple[Overlap | None, int]]) -> Overlap | None:
    known = [(overlap, changed) for overlap, changed in found if overlap is not None]
    value = _mean([(overlap.value, changed) for overlap, changed in known])
    baseline = _mean([(overlap.baseline, changed) for overlap, changed in known])
    return None if value is None or baseline is None else Overlap(value, baseline)


def _share(found: Sequence[tuple[Share | None, float]]) -> Share | None:
    known = [(share, energy) for share, energy in found if share is not None and math.isfinite(share.value)]
    value, random, sizes = (
        _mean([(getattr(share, name), energy) for share, energy in known]) for name in ("value", "random", "sizes")
    )
    return None if value is None or random is None or sizes is None else Share(value, random, sizes)


def _rates(pairs: Sequence[tuple[WeightAudit, Change]]) -> Rates | None:
    """Weighted by the principal entries that have partners; the mask has one density in every weight."""
    known = [(c.matched, c.matched.coverage * w.entries, w.entries) for w, c in pairs if c.matched is not None]
    rate = _mean([(m.rate, n) for m, n, _ in known])
    other = _mean([(m.other_rate, n) for m, n, _ in known])
    if rate is None or other is None:
        return None
    errors = [(m.error, m.rate * n) for m, n, _ in known]
    sum_of = sum(n for _, n in errors)
    error = None
    if sum_of > 0 and all(e is not None and math.isfinite(e) for e, n in errors if n > 0):
        error = math.hypot(*(e * n / sum_of for e, n in errors if e is not None))
    return Rates(rate, other, sum(n for _, n, _ in known) / sum(entries for _, _, entries in known), error)
