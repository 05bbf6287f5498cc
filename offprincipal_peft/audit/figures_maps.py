"""The page's pictures of matrices and figures of agreement: where entries changed, in one checkpoint and in several."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..html.charts import Frame, Series, escape, number, svg
from ..html.images import data_uri, png
from ..html.marks import Mark, bars, marks
from ..html.page import figure_html, legend
from .figures import View, across
from .pooling import kinds, layers
from .results import Agreement, AuditReport, Map, Stripes, WeightAudit
from .tables import pairs_table, share_text

_SIDE = 200.0  # the longer side of a picture
_LEAST = 56.0  # the shorter one
_MOST_HEADS = 72  # more boundaries than this would cover the picture


def update_maps(found: Sequence[View]) -> str:
    """Where entries changed, with heads and profiles, in one layer of every kind."""
    parts = []
    for view in found:
        rows = []
        for weight in _shown(view.report, [w.changes[view.tuned].map for w in view.report.weights]):
            change = weight.changes[view.tuned]
            if change.map is not None:
                rows.append(_panel(weight, change.map, change.rows, change.columns))
        if rows:
            head = f'<p class="panel">{escape(view.label)}</p>' if len(found) > 1 else ""
            parts.append(f'{head}<div class="panels maps">{"".join(rows)}</div>')
    text = (
        "Share of changed entries in each cell of the matrix, the stronger the more; rows are outputs, columns inputs. "
        "Lines: boundaries of attention heads. Beside and below: the same by row and by column, from their least to "
        "their most. One weight of each kind, from the middle of the layers; the JSON holds all."
    )
    return figure_html("Where entries changed.", text, "".join(parts), "wide")


def _shown(report: AuditReport, maps: Sequence[Map | None]) -> list[WeightAudit]:
    """Of every kind one weight whose map shows a change, the nearest to the middle layer."""
    there = [w for w, map in zip(report.weights, maps, strict=True) if map is not None and bool(map.density.any())]
    indices = layers(report)
    middle = indices[len(indices) // 2] if indices else 0
    found = []
    for kind in kinds(report):
        of_kind = [weight for weight in there if weight.kind == kind]
        if of_kind:
            found.append(min(of_kind, key=lambda w: abs((w.layer if w.layer is not None else 0) - middle)))
    return found


def _panel(weight: WeightAudit, map: Map, rows: Stripes | None = None, columns: Stripes | None = None) -> str:
    where = f", layer {weight.layer}" if weight.layer is not None else ""
    name = f"{weight.kind}{where}"
    top = int(map.density.max())
    note = f"{weight.shape[0]} × {weight.shape[-1]}; full colour: {share_text(top / 255)} %"
    return f'<div><p class="panel">{escape(name)}</p>{map_svg(name, weight.shape, map, rows, columns)}' + (
        f'<p class="small">{escape(note)}</p></div>'
    )


def map_svg(name: str, shape: Sequence[int], map: Map, rows: Stripes | None, columns: Stripes | None) -> str:
    """The picture of one weight with its heads, and its profiles at the right and below."""
    tall, wide = shape[0], shape[-1]
    scale = _SIDE / max(tall, wide)
    height, width = max(_LEAST, tall * scale), max(_LEAST, wide * scale)
    cells = map.density.contiguous()
    top = int(cells.max())
    parts = []
    if top:
        picture = png(bytes(cells.flatten().tolist()), cells.shape[1], cells.shape[0], top)
        size = f'width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none"'
        parts.append(f'<image x="1" y="1" {size} href="{data_uri(picture)}"/>')
    parts.append(f'<rect class="frame" x="1" y="1" width="{width:.1f}" height="{height:.1f}"/>')
    if 2 < len(map.row_heads) <= _MOST_HEADS:
        at = "".join(f"M1 {1 + height * edge / tall:.1f}h{width:.1f}" for edge in map.row_heads[1:-1])
        parts.append(f'<path class="head" d="{at}"/>')
    if 2 < len(map.column_heads) <= _MOST_HEADS:
        at = "".join(f"M{1 + width * edge / wide:.1f} 1v{height:.1f}" for edge in map.column_heads[1:-1])
        parts.append(f'<path class="head" d="{at}"/>')
    parts.append(_profile(rows, width + 8, height, True))
    parts.append(_profile(columns, height + 8, width, False))
    right = 52 if rows is not None and rows.profile else 4
    below = 46 if columns is not None and columns.profile else 4
    # One width for all, so that panels of a grid are drawn at one scale.
    return svg(_SIDE + 54, height + below, f"{name}: changed entries", f"Drawn {right + width:.0f} wide.", parts)


def _profile(stripes: Stripes | None, start: float, length: float, upright: bool) -> str:
    """The profile as a line of 40 units' depth from ``start`` on, along ``length``."""
    if stripes is None or not stripes.profile:
        return ""
    values = [value if math.isfinite(value) else 0.0 for value in stripes.profile]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = []
    for i, value in enumerate(values):
        depth = start + 38 * (value - low) / span if upright else start + 38 * (1 - (value - low) / span)
        along = 1 + length * (i + 0.5) / len(values)
        points.append((depth, along) if upright else (along, depth))
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    title = f"{share_text(low)} % to {share_text(high)} % of a {'row' if upright else 'column'}"
    return f'<path class="profile" d="{path}"><title>{title}</title></path>'


# ---- several checkpoints


def agreement(found: Sequence[View]) -> str:
    """Jaccard index by kind, layer and pair, how many checkpoints changed an entry, and where all did."""
    report = found[0].report
    agreed = [(weight, weight.agreement) for weight in report.weights if weight.agreement is not None]
    if not agreed:
        return ""
    still = len(agreed) < len(report.weights)
    figures = [_jaccard_by_layer(found[0]), _jaccard_by_kind(report), _frequencies([a for _, a in agreed], still)]
    pairs = pairs_table(report, [view.label for view in found])
    figures += [f"<div>{pairs.html()}</div>"] if pairs is not None else []
    maps = []
    for weight in _shown(report, [w.agreement.map if w.agreement is not None else None for w in report.weights]):
        if weight.agreement is not None and weight.agreement.map is not None:
            maps.append(_panel(weight, weight.agreement.map))
    text = "Entries that every checkpoint changed: their share in each cell, one weight of each kind."
    pictures = f'<div class="panels maps">{"".join(maps)}</div>' if maps else ""
    return f'<div class="pair">{"".join(figures)}</div>' + figure_html("Consensus.", text, pictures, "wide")


def _mean_jaccard(weights: Sequence[WeightAudit]) -> tuple[float, float] | None:
    """(observed, chance), means by entries; None where there is none."""
    known = [(a.jaccard, a.baseline, w.entries) for w in weights if (a := w.agreement) is not None]
    known = [row for row in known if math.isfinite(row[0]) and math.isfinite(row[1]) and row[2]]
    entries = sum(n for _, _, n in known)
    return (sum(j * n for j, _, n in known) / entries, sum(b * n for _, b, n in known) / entries) if entries else None


def _jaccard_by_layer(view: View) -> str:
    weights = [w for w in view.report.weights if w.layer is not None and w.agreement is not None]
    rows = [(i, _mean_jaccard([w for w in weights if w.layer == i])) for i in layers(view.report)]
    known = [(i, pair) for i, pair in rows if pair is not None]
    if not known:
        return ""
    x, dots = [i for i, _ in known], len(known) < 12
    series = [Series("observed", 0, x, [pair[0] for _, pair in known], dots=dots)]
    series.append(Series("independent masks", 10, x, [pair[1] for _, pair in known]))
    for kind in view.colours if len(view.colours) > 1 else ():
        of_kind = [(i, _mean_jaccard([w for w in weights if w.layer == i and w.kind == kind])) for i in x]
        there = [(i, pair[0]) for i, pair in of_kind if pair is not None]
        if there:
            series.append(Series(kind, 0, [i for i, _ in there], [v for _, v in there], pale=True))
    frame = Frame("Agreement by layer", "layer", "Jaccard index", whole_x=True)
    text = "Mean Jaccard index of the changed entries over the pairs of checkpoints. Thin: one kind of module."
    drawn = across("Agreement by layer.", text, [view], lambda _: (frame, series))
    return drawn.replace("</figure>", legend([("observed", 0), ("independent masks", 10)]) + "</figure>")


def _jaccard_by_kind(report: AuditReport) -> str:
    rows = []
    for kind in kinds(report):
        pair = _mean_jaccard([weight for weight in report.weights if weight.kind == kind])
        if pair is not None:
            rows.append((kind, [Mark("observed", pair[0]), Mark("independent masks", pair[1], 8, "hollow")]))
    if not rows:
        return ""
    text = "Dot: observed. Circle: independent masks of the same densities."
    return figure_html("Agreement by kind.", text, marks("Agreement by kind", "Jaccard index", rows))


def _frequencies(found: Sequence[Agreement], still: bool) -> str:
    """``still``: some weights have no agreement, as nothing of them changed."""
    most = max(len(agreement.frequencies) for agreement in found)
    counts, expected = [0.0] * most, [0.0] * most
    for agreement in found:
        for i, count in enumerate(agreement.frequencies):
            counts[i] += count
        for i, chance in enumerate(agreement.expected):
            expected[i] += chance if math.isfinite(chance) else 0.0
    entries, all_expected = sum(counts) or 1.0, sum(expected) or 1.0
    columns = [(number(i), counts[i] / entries, expected[i] / all_expected) for i in range(most)]
    text = "Entries that exactly so many checkpoints changed. Line: independent masks."
    text += " Without weights that no checkpoint changed." if still else ""
    chart = bars("How many changed an entry", "checkpoints that changed it", "entries, %", columns, percent=True)
    return figure_html("How many changed an entry.", text, chart)
