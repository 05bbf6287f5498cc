"""The audit's tables: rows by kind, layer and weight, worst cases of the bounds, and what was skipped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..geometry.bounds import Bound
from ..html.charts import number
from ..html.tables import NONE, Table, bytes_text, count_text, digits
from .pooling import SIDES, Pooled, by_kind, by_layer, by_reason, kinds, labels, pool, total
from .results import AuditReport, Inequality, WeightAudit

HEADER = [
    "weights",
    "entries",
    "unchanged in bf16, %",
    "‖ΔW‖/‖W‖",
    "spectral shift (NSS)",
    "largest angle U / V, °",
    "energy in U / V / both, × sizes alone",
    "on M_princ, % (chance)",
    "on M_low, % (chance)",
    "changed on / off M_princ at equal size, %",
]
ROWS = (
    "Pooled over the weights of a row; angles are the largest. NSS: ‖σ⁺ − σ‖/‖σ‖. Energy: the share of ‖ΔW‖² in the "
    "top-k left and right singular subspaces and in both, over the share that the sizes of the update's entries alone "
    "would give with random signs. On M: the share of the changed entries that lie on the mask. Equal size: rates of "
    "principal entries and of others of the same |W|, and their quotient ± 2 standard errors."
)
BOUNDS = {
    "weyl": "Weyl: max |Δσ| ≤ ‖ΔW‖₂",
    "mirsky": "Mirsky: ‖Δσ‖₂ ≤ ‖ΔW‖_F",
    "ky_fan": "Ky Fan: |Δ‖W‖₍ₖ₎| ≤ k‖ΔW‖₂",
    "wedin": "Wedin, the paper's: sin θ ≤ ‖ΔW‖₂/γ",
    "wedin_always": "Wedin, double angle (always true)",
}


def share_text(value: float | None) -> str:
    """In per cent, with the digits that tell 99.98 from 100."""
    if value is None or not math.isfinite(value):
        return NONE
    per_cent = 100 * value
    near = min(abs(per_cent), abs(100 - per_cent))
    # One entry of 10^10 is told from none; what is nearer is rounding.
    decimals = 1 if near >= 0.95 or near < 5e-9 else 1 - math.floor(math.log10(near))
    return f"{per_cent:.{decimals}f}".replace("-", "−")


def figure_text(value: float | None, count: int = 2) -> str:
    return NONE if value is None or not math.isfinite(value) else digits(value, count)


def degrees_text(value: float | None) -> str:
    return figure_text(None if value is None else math.degrees(value))


def times_text(value: float | None) -> str:
    """A quotient: two decimals around 1."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.2f}" if 0.095 <= value < 99.5 else digits(value)


def checkpoint_table(report: AuditReport) -> Table:
    """One row for each tuned checkpoint."""
    rows = [dataclasses.replace(total(report, i), name=name) for i, name in enumerate(labels(report))]
    return _pooled_table("All checkpoints", "checkpoint", rows)


def kind_table(report: AuditReport, tuned: int, label: str) -> Table:
    """One row for each kind of module, and one for all."""
    rows = [*by_kind(report, tuned), total(report, tuned)]
    return _pooled_table(f"By kind of module{_of(label)}", "kind", rows, ROWS)


def layer_table(report: AuditReport, tuned: int, label: str) -> Table:
    """One row for each layer."""
    return _pooled_table(f"By layer{_of(label)}", "layer", by_layer(report, tuned))


def weight_table(report: AuditReport, tuned: int, label: str) -> Table:
    """One row for each weight, with what is to be said of it."""
    table = _pooled_table(
        f"By weight{_of(label)}", "weight", [pool(weight.name, [weight], tuned) for weight in report.weights]
    )
    rows = []
    for weight, row in zip(report.weights, table.rows, strict=True):
        shape = " × ".join(map(str, weight.shape)) or "scalar"
        rows.append([row[0], shape, ", ".join(dict.fromkeys(weight.stored)), *row[3:], _remarks(weight, tuned)])
    header = [table.header[0], "shape", "stored as", *table.header[3:], "remarks"]
    return Table(table.caption, header, rows, kind="dense")


def _remarks(weight: WeightAudit, tuned: int) -> str:
    change = weight.changes[tuned]
    parts = [*weight.notes, *change.notes]
    if any(change.nonfinite):
        base, after = change.nonfinite
        parts.append(f"NaN or infinite entries: {base} in the base, {after} tuned")
    spectrum, angles = change.spectrum, change.angles
    if spectrum is not None and spectrum.error > 0.1 * spectrum.shift:
        parts.append(f"NSS ± {digits(spectrum.error)}")
    if angles is not None and angles.output and angles.error > 0.1 * min(angles.output[-1], angles.input[-1]):
        parts.append(f"angles ± {degrees_text(angles.error)}°")
    return "; ".join([*parts, *([change.route] if change.route not in ("", "fast", "exact") else [])]) or NONE


def _of(label: str) -> str:
    return f": {label}" if label else ""


def _pooled_table(caption: str, what: str, rows: Sequence[Pooled], note: str = "") -> Table:
    return Table(caption, [what, *HEADER], [[row.name, *_cells(row)] for row in rows], note=note, kind="dense")


def _cells(row: Pooled) -> list[str]:
    angles = [degrees_text(row.angle_output), degrees_text(row.angle_input)]
    shares = [row.shares.get(side) for side in SIDES]
    energy = [times_text(s.value / s.sizes if s is not None and s.sizes > 0 else None) for s in shares]
    return [
        str(row.weights),
        count_text(row.entries),
        share_text(row.sparsity),
        figure_text(row.relative_norm),
        figure_text(row.shift),
        NONE if set(angles) == {NONE} else " / ".join(angles),
        NONE if set(energy) == {NONE} else " / ".join(energy),
        *(
            NONE if overlap is None else f"{share_text(overlap.value)} ({share_text(overlap.baseline)})"
            for overlap in (row.principal, row.low)
        ),
        matched_text(row),
    ]


def matched_text(row: Pooled) -> str:
    """ "41.2 / 43.0: 0.96 ± 0.02"."""
    if row.matched is None:
        return NONE
    text = f"{share_text(row.matched.rate)} / {share_text(row.matched.other_rate)}"
    if row.matched.ratio is None:
        return text
    error = row.matched.error
    return f"{text}: {times_text(row.matched.ratio)}" + (
        f" ± {digits(2 * error * row.matched.ratio, 1)}" if error is not None else ""
    )


def bounds_table(report: AuditReport, tuned: int, label: str, by_kind: bool = True) -> Table | None:
    """For each inequality (and kind) the weight that comes closest to breaking it; None without any."""
    groups = [(f"; {kind}", [w for w in report.weights if w.kind == kind]) for kind in kinds(report)]
    rows = []
    for key, name in BOUNDS.items():
        for suffix, weights in groups if by_kind else [("", report.weights)]:
            found = [
                (weight.name, _bound(i, key.startswith("wedin")))
                for weight in weights
                if (i := inequality(weight, tuned, key))
            ]
            if found:
                rows.append([name + suffix, *_worst(found, key.startswith("wedin"))])
    if not rows:
        return None
    first = "inequality; kind" if by_kind else "inequality"
    header = [first, "left", "right", "slack", "left/right", "holds", "broken by", "worst weight"]
    note = (
        "The weight that comes closest to equality, or breaks it. Weyl, Mirsky, Ky Fan and the double-angle form hold "
        "for every update, up to rounding. The paper's form of Wedin holds to first order only: a finite update may "
        "break it, and a right side of 1 or more says nothing, since no sine is larger."
    )
    caption = f"The inequalities, worst case{' by kind' if by_kind else ''}{_of(label)}"
    return Table(caption, header, rows, note=note, kind="dense")


def _worst(found: Sequence[tuple[str, Bound]], sine: bool) -> list[str]:
    """The cells of one row: sides, slack, whether it holds and how many weights break it."""

    def closeness(item: tuple[str, Bound]) -> tuple[bool, bool, float]:
        still = item[1].left == item[1].right == 0  # an equality, but of a weight that did not change
        return not item[1].holds, not still, item[1].tightness

    name, bound = max(found, key=closeness)
    broken = sum(not b.holds for _, b in found)
    empty = sum(b.vacuous for _, b in found) if sine else 0
    holds = "yes" if bound.holds else "no"
    if empty:
        holds += f" (says nothing for {empty} of {len(found)})"
    quotient = f"{100 * bound.tightness:.3g} %" if bound.right > 0 else NONE
    sides = [_side(bound.left), _side(bound.right), _side(bound.slack)]
    return [*sides, quotient, holds, f"{broken} of {len(found)}", name]


def inequality(weight: WeightAudit, tuned: int, key: str) -> Inequality | None:
    """The inequality ``key`` of :data:`BOUNDS`, where it was measured and both sides are numbers."""
    change = weight.changes[tuned]
    wedin = key.startswith("wedin")
    found: Inequality | None = getattr(change.angles, key, None) if wedin else change.bounds.get(key)
    return None if found is None or math.isnan(found.left) or math.isnan(found.right) else found


def _bound(found: Inequality, sine: bool) -> Bound:
    return Bound(found.left, found.right, found.tolerance, 1.0 if sine else math.inf, found.asymptotic)


def _side(value: float) -> str:
    return "∞" if math.isinf(value) else digits(value, 3)


def skipped_table(report: AuditReport) -> Table | None:
    """What was not compared, by reason; None where all was."""
    rows = [[reason, str(len(names)), ", ".join(names)] for reason, names in by_reason(report.skipped)]
    return Table("Not compared", ["reason", "tensors", "names"], rows, kind="text") if rows else None


def source_table(report: AuditReport) -> Table:
    """The checkpoints."""
    rows = [
        [source.label, source.path, str(source.tensors), bytes_text(source.nbytes), source.rename or NONE]
        for source in report.sources
    ]
    return Table("Checkpoints", ["checkpoint", "path", "tensors", "size", "names"], rows, kind="text")


def pairs_table(report: AuditReport, names: Sequence[str]) -> Table | None:
    """Jaccard index of every two tuned checkpoints, means over weights by their entries; None for one checkpoint."""
    found: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for weight in report.weights:
        for first, second, jaccard, chance in weight.agreement.pairs if weight.agreement else ():
            if math.isfinite(jaccard) and math.isfinite(chance):
                found.setdefault((first, second), []).append((jaccard, chance, weight.entries))
    if not found:
        return None

    def mean(rows: list[tuple[float, float, int]], read: Callable[[tuple[float, float, int]], float]) -> float:
        return sum(read(row) * row[2] for row in rows) / max(1, sum(row[2] for row in rows))

    rows = []
    for (first, second), values in sorted(found.items()):
        jaccard, chance = mean(values, lambda row: row[0]), mean(values, lambda row: row[1])
        quotient = times_text(jaccard / chance) if chance > 0 else NONE
        rows.append([f"{names[first]}, {names[second]}", number(round(jaccard, 3)), number(round(chance, 3)), quotient])
    note = "Changed entries that both share, over those that either changed; means over the weights by their entries."
    return Table(
        "Agreement of two checkpoints", ["checkpoints", "Jaccard", "independent masks", "quotient"], rows, note=note
    )
