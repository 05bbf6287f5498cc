"""Which picture it is, in words: a verdict on one tuned checkpoint, from all its weights together.

The thresholds are round numbers between what the paper and its follow-ups report (2511.08567: 2.8 % to 18.8 % of bf16
entries unchanged by supervised fine-tuning, 36 % to 92 % by reinforcement learning). Directions are not judged against
chance but against what the sizes of the changed entries alone give, and the overlap with the principal mask against
entries of equal magnitude: reinforcement learning in bf16 changes small weights more often, whatever their direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..geometry.masks import LEAST_COVERAGE
from .pooling import Pooled, ratio, total
from .results import AuditReport, Stripes, Verdict, WeightAudit

DENSE, SPARSE = 0.2, 0.35  # shares of unchanged entries: at most, at least
VISIBLE, INVISIBLE = 0.95, 0.05  # shares of the stored changes that bf16 shows
PREFERS, AVOIDS = 1.5, 1 / 1.5  # the share in the principal subspaces over that of the same sizes with random signs
SIGMAS = 3.0  # standard errors that a share or a rate must lie from its control
MATCHED = 0.10  # relative difference of the matched rates from which magnitude does not explain an overlap
DEPARTS = 0.10  # relative difference of an overlap from chance from which there is something to explain
_ONE_SIDED = {"output": "left", "input": "right"}
FEW = 1e-3  # share of changed entries below which their places are not judged
STRIPED = 0.3  # spread of the rows' (columns') update ratios beyond chance, relative to their mean


def judge(report: AuditReport, tuned: int) -> Verdict:
    """The verdict on the ``tuned``-th tuned checkpoint (from 0)."""
    matrices = [weight for weight in report.weights if len(weight.shape) == 2 and not _is_streamed(weight)]
    row = total(report, tuned)
    if not row.stored_changed and not row.relative_norm:
        sentence = "No entry of any compared weight changed."
        return Verdict("none", "none", "unknown", "unknown", "unknown", [sentence])
    direction, more = _direction(row, _freedom(report.weights, tuned))
    if not row.stored_changed:
        sentence = (
            f"No stored entry changed: the weights differ by {row.relative_norm:.1e} of their norm, which is below "
            "half a unit in the last place everywhere, and a bf16 copy of the model has none of it."
        )
        return Verdict("none", "none", direction, "unknown", "unknown", [sentence, *more, *_spectrum(row)])
    density, said = _density(row)
    visible, also = _visible(row)
    sentences = [said, *also]
    magnitude, control = _magnitude(row)
    stripes, lines = _stripes(matrices, tuned, row)
    return Verdict(
        density, visible, direction, magnitude, stripes, [*sentences, *more, *control, *lines, *_spectrum(row)]
    )


def _is_streamed(weight: WeightAudit) -> bool:
    return all(change.rows is None and change.output is None for change in weight.changes)


def _density(row: Pooled) -> tuple[str, str]:
    sparsity = row.sparsity or 0.0
    word = "sparse" if sparsity >= SPARSE else "dense" if sparsity <= DENSE else "between"
    label = {"sparse": "Sparse in bf16", "dense": "Dense in bf16", "between": "Neither sparse nor dense in bf16"}[word]
    return word, f"{label}: {_percent(sparsity)} of {row.entries:,} entries are unchanged."


def _visible(row: Pooled) -> tuple[str, list[str]]:
    if row.stored_changed <= row.changed:
        return "all", []
    share = row.changed / row.stored_changed
    word = "all" if share >= VISIBLE else "none" if share <= INVISIBLE else "part"
    text = (
        f"Of the entries that changed as they are stored, {_percent(share)} changed in bf16: "
        + {
            "all": "nearly all of the update is visible there.",
            "part": "the rest moved by less than half a unit in the last place.",
            "none": "the update is below half a unit in the last place, and a bf16 copy of the model hardly has it.",
        }[word]
    )
    return word, [text]


def _freedom(weights: Sequence[WeightAudit], tuned: int) -> float:
    """About how many independent numbers the parts of all updates inside both subspaces are made of."""
    found = 0.0
    for weight in weights:
        change = weight.changes[tuned]
        if change.output is not None:
            k = change.output.random * weight.shape[0]
            rank = change.spectrum.stable_rank if change.spectrum is not None else k
            found += k * min(k, max(rank, 1.0))
    return found


def _direction(row: Pooled, freedom: float) -> tuple[str, list[str]]:
    ratios = {
        side: share.value / share.sizes
        for side, share in row.shares.items()
        if share.sizes > 0 and math.isfinite(share.value)
    }
    if not ratios:
        return "unknown", []
    side = "both" if "both" in ratios else next(iter(ratios))
    share, found = row.shares[side], ratios[side]
    # An update off either side alone has nothing left on both: one-sided shares decide what is avoided.
    low = min(ratios.values())
    chance = math.exp(SIGMAS * math.sqrt(2 / max(freedom, 1e-9)))  # a share of few numbers varies by itself
    prefers, avoids = max(PREFERS, chance), min(AVOIDS, 1 / chance)
    word = "principal" if found >= prefers else "off-principal" if low <= avoids else "no preference"
    texts = {
        "principal": "Principal: the update prefers the principal subspaces, where",
        "off-principal": "Off-principal: the update avoids the principal subspaces, where",
        "no preference": "No preference of direction: inside the principal subspaces",
    }
    random = f" and {share.value / share.random:.2f} times a structureless one's" if share.random > 0 else ""
    one_sided = [f"{ratios[name]:.2f} times on the {side} side" for name, side in _ONE_SIDED.items() if name in ratios]
    return word, [
        f"{texts[word]} {_percent(share.value)} of its energy lies, {found:.2f} times what the sizes of its entries "
        f"alone give{random} ({', '.join(one_sided)})."
    ]


def _magnitude(row: Pooled) -> tuple[str, list[str]]:
    if row.principal is None or row.matched is None or row.matched.ratio is None or row.principal.baseline <= 0:
        return "unknown", []
    if row.changed < FEW * row.entries or row.matched.coverage < LEAST_COVERAGE:
        return "unknown", []
    raw, matched = row.principal.value / row.principal.baseline, row.matched.ratio
    low = ratio(row.low)
    small = (
        f"Changes fall on the smallest weights {low:.2f} times as often as chance has it. " if low is not None else ""
    )
    certain = 0.0 if row.matched.error is None else SIGMAS * row.matched.error
    said = (
        f"{small}Entries of the principal mask carry {raw:.2f} times their share of the changes; among entries of "
        f"equal magnitude they changed {matched:.2f} times as often as others"
    )
    if abs(math.log(max(matched, 1e-9))) > max(MATCHED, certain):
        return "not explained", [f"{said}: magnitude alone does not explain it."]
    if abs(raw - 1) > DEPARTS:
        return "explained", [f"{said}: what is seen on the principal mask is only magnitude."]
    return "no overlap", [f"{said}: the principal mask plays no part."]


def _stripes(weights: Sequence[WeightAudit], tuned: int, row: Pooled) -> tuple[str, list[str]]:
    """By update ratios. (Energies by row vary in every low-rank update, so they say nothing about stripes.)"""
    spreads = {}
    for axis in ("rows", "columns"):
        stripes = [(getattr(weight.changes[tuned], axis), weight.entries) for weight in weights]
        found = [(stripe, entries) for stripe, entries in stripes if stripe is not None and stripe.mean > 0]
        if found:
            spreads[axis] = _excess(found)
    if not spreads or row.changed < FEW * row.entries:
        return "unknown", []
    striped = [axis for axis, excess in spreads.items() if excess >= STRIPED]
    word = "both" if len(striped) == 2 else striped[0] if striped else "no"
    values = " and ".join(f"{excess:.2f} by {axis}" for axis, excess in spreads.items())
    lead = "Striped by " + " and ".join(striped) if striped else "No stripes"
    return word, [f"{lead}: update ratios vary beyond chance by {values}, relative to their mean."]


def _excess(found: Sequence[tuple[Stripes, int]]) -> float:
    """The spread of update ratios beyond chance, relative to their mean; weights by size."""
    beyond = [(math.sqrt(max(s.std**2 - s.random_std**2, 0.0)) / s.mean, entries) for s, entries in found]
    return sum(value * entries for value, entries in beyond) / sum(entries for _, entries in beyond)


def _spectrum(row: Pooled) -> list[str]:
    said = []
    if row.shift is not None:
        angles = [angle for angle in (row.angle_output, row.angle_input) if angle is not None]
        turned = (
            f"; the principal subspaces turned by at most {math.degrees(max(angles)):.2g} degrees" if angles else ""
        )
        said.append(f"The spectrum moved by {row.shift:.1e} of its norm{turned}.")
    return said


def fast_error(weights: Sequence[WeightAudit], mode: str) -> str:
    """How far fast mode's figures may be from exact ones, in words."""
    changes = [change for weight in weights for change in weight.changes]
    shifts = [change.spectrum for change in changes if change.spectrum is not None]
    angles = [change.angles for change in changes if change.angles is not None]
    if mode == "exact":
        return "Exact mode: fp64 SVDs of both sides."
    if not shifts and not angles:
        return "No figure of this audit is approximate."
    again = [change.route for change in changes if change.route.startswith("exact")]
    parts = []
    if shifts:
        parts.append(f"NSS by at most {max(s.error for s in shifts):.0e}")
    if angles:
        parts.append(f"angles by at most {math.degrees(max(a.error for a in angles)):.0e} degrees")
    count = f"{len(again)} of {len(changes)} weights"
    more = f" {count} met neither limit and were decomposed exactly instead." if again else ""
    return (
        f"Fast mode: against exact SVDs it may be off in {', '.join(parts)}; each figure's own error is within 1 % of "
        f"it, or within 1e-6 absolute.{more}"
    )


def _percent(share: float) -> str:
    if 0.0 < share < 1e-5:
        return "less than 0.001 %"
    digits = 1 if 0.001 <= share <= 0.999 or share in (0.0, 1.0) else 3
    return f"{100 * share:.{digits}f} %"
