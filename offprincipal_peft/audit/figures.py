"""The page's figures over layers and kinds: what each shows of a tuned checkpoint, and the words beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from ..html.charts import Frame, Series, escape, limits, lines
from ..html.marks import Mark, marks
from ..html.page import figure_html, legend
from .pooling import SIDES, Pooled, by_kind, by_layer, by_place, kinds, labels, layers, ratio
from .results import AuditReport
from .tables import figure_text, share_text, times_text

_NAMES = {"output": "left, U", "input": "right, V", "both": "both sides"}


@dataclass
class View:
    """One tuned checkpoint of a report, with what several figures read of it."""

    report: AuditReport
    tuned: int
    label: str
    colours: dict[str, int] = field(default_factory=dict)  # of the kinds that are drawn by layer

    @cached_property
    def places(self) -> dict[tuple[str, int], Pooled]:
        return by_place(self.report, self.tuned)

    @cached_property
    def layers(self) -> list[tuple[int, Pooled]]:
        rows = [row for row in by_layer(self.report, self.tuned) if row.name != "outside"]
        return list(zip(layers(self.report), rows, strict=True))

    @cached_property
    def kinds(self) -> list[Pooled]:
        return by_kind(self.report, self.tuned)


def views(report: AuditReport) -> list[View]:
    """One for each tuned checkpoint."""
    stack = [weight for weight in report.weights if weight.layer is not None]
    # Norms and biases have a scale of their own, which would flatten what the matrices show.
    inside = {weight.kind for weight in stack if len(weight.shape) > 1} or {weight.kind for weight in stack}
    colours = {kind: i for i, kind in enumerate(kind for kind in kinds(report) if kind in inside)}
    return [View(report, i, label, colours) for i, label in enumerate(labels(report))]


Drawn = tuple[Frame, list[Series]]


def across(
    title: str,
    text: str,
    found: Sequence[View],
    draw: Callable[[View], Drawn | None],
    key: Sequence[tuple[str, int]] = (),
    shared: bool = True,
) -> str:
    """The figure for each checkpoint, side by side and, with ``shared``, on one scale; empty where none has data.

    ``key``: (name, colour) of the legend, of which those are shown whose colour is drawn.
    """
    drawn = [(view.label, made) for view in found if (made := draw(view)) is not None and made[1]]
    if not drawn:
        return ""
    if shared and len(drawn) > 1:
        spans = [limits(frame, series) for _, (frame, series) in drawn]
        low_x, high_x, low_y, high_y = zip(*spans, strict=True)
        for _, (frame, _) in drawn:
            frame.limits = (min(low_x), max(high_x), min(low_y), max(high_y))
    charts = [(label, lines(frame, series, label)) for label, (frame, series) in drawn]
    colours = {line.colour for _, (_, series) in drawn for line in series}
    key = [(name, colour) for name, colour in key if colour in colours]
    return beside(title, text, charts, legend(key) if key else "", len(found) > 1)


def beside(title: str, text: str, charts: Sequence[tuple[str, str]], key: str = "", named: bool = True) -> str:
    """(label, chart) as one figure; several stand in columns under their labels."""
    if not charts:
        return ""
    if not named:
        return figure_html(title, text, charts[0][1] + key, "one")
    panels = "".join(f'<div><p class="panel">{escape(label)}</p>{chart}</div>' for label, chart in charts)
    return figure_html(title, text, f'<div class="pair">{panels}</div>{key}', "wide")


# ---- by layer


def by_kind_series(view: View, read: Callable[[Pooled], float | None], positive: bool = False) -> list[Series]:
    """A line for each kind over the layers, without what is missing or (``positive``) not above zero."""
    found = []
    for kind, colour in view.colours.items():
        points = [(layer, read(row)) for (name, layer), row in view.places.items() if name == kind]
        series = series_of(kind, colour, points, positive)
        found += [series] if series else []
    return found


def series_of(
    name: str, colour: int, points: Sequence[tuple[float, float | None]], positive: bool = False
) -> Series | None:
    known = [(x, y) for x, y in points if y is not None and (y > 0 or not positive)]
    if not known:
        return None
    known.sort()
    return Series(name, colour, [x for x, _ in known], [y for _, y in known], dots=len(known) < 12)


def sparsity(found: Sequence[View]) -> str:
    """bf16-aware update sparsity by layer and kind."""

    def draw(view: View) -> Drawn | None:
        frame = Frame("Unchanged in bf16", "layer", "unchanged entries, %", whole_x=True, percent=True)
        return frame, by_kind_series(view, lambda row: row.sparsity)

    text = "Entries whose bf16 value training left as it was, by layer and kind of module."
    outside = [f"{row.name} {share_text(row.sparsity)} %" for row in found[0].kinds if row.name not in found[0].colours]
    if outside and len(found) == 1:
        text += f" Not drawn: {', '.join(outside)}."
    return across("Update sparsity.", text, found, draw, list(found[0].colours.items()))


def shift(found: Sequence[View]) -> str:
    """NSS by layer and kind."""

    def draw(view: View) -> Drawn | None:
        frame = Frame("Normalised spectral shift", "layer", "‖σ⁺ − σ‖ / ‖σ‖", whole_x=True, log_y=True)
        return frame, by_kind_series(view, lambda row: row.shift, positive=True)

    text = "NSS = ‖σ⁺ − σ‖/‖σ‖ of every weight. The paper's orders: 1e−5 under reinforcement learning, 1e−3 under SFT."
    return across("Spectral shift.", text, found, draw, list(found[0].colours.items()))


def energy_by_layer(found: Sequence[View]) -> str:
    """Share of the update's energy in the principal subspaces over the control of sizes."""

    def draw(view: View) -> Drawn | None:
        frame = Frame("Energy against its control", "layer", "share / share of sizes alone", whole_x=True, base=1.0)
        frame.y_from_zero = True
        series = []
        for colour, side in enumerate(SIDES):
            points = [(i, _over_sizes(row, side)) for i, row in view.layers]
            series.append(series_of(_NAMES[side], colour, points))
        return frame, [line for line in series if line is not None]

    text = (
        "‖ΔW‖² inside the top-k singular subspaces, over what the same entry sizes with random signs have there, by "
        "layer. Below the dashed line the update avoids the principal directions."
    )
    return across("Energy by layer.", text, found, draw, [(_NAMES[side], i) for i, side in enumerate(SIDES)])


def _over_sizes(row: Pooled, side: str) -> float | None:
    share = row.shares.get(side)
    return share.value / share.sizes if share is not None and share.sizes > 0 else None


# ---- by kind


def energy_by_kind(found: Sequence[View], sides: Sequence[str] = SIDES) -> str:
    """The shares themselves beside both controls."""
    parts = []
    for side in sides:
        several = [_share_marks(view, side) for view in found]
        for view, rows in zip(found, several, strict=True):
            if rows:
                title = f"Energy, {_NAMES[side]}"
                label = f"{view.label}: {_NAMES[side]}" if len(found) > 1 else _NAMES[side]
                chart = marks(title, "share of ‖ΔW‖², %", rows, percent=True, reach=_values(several))
                parts.append((label, chart))
    text = (
        "Dot: the update's share in the subspaces. Circle: that of independent entries of one size. Tick: that of the "
        "update's own entry sizes with random signs."
    )
    where = "both" if tuple(sides) == ("both",) else "the"
    return beside(f"Energy in {where} principal subspaces.", text, parts, named=len(sides) > 1)


Rows = list[tuple[str, list[Mark]]]


def _share_marks(view: View, side: str) -> Rows:
    rows: Rows = []
    for row in view.kinds:
        if (share := row.shares.get(side)) is not None:
            controls = [Mark("random", share.random, 8, "hollow"), Mark("sizes alone", share.sizes, 1, "tick")]
            rows.append((row.name, [Mark("update", share.value), *controls]))
    return rows


def _values(several: Sequence[Rows]) -> list[float]:
    """Of all marks of several charts, which then have one scale."""
    return [mark.value for rows in several for _, row in rows for mark in row]


def stripes(found: Sequence[View]) -> str:
    """How unevenly rows and columns changed, over what chance gives."""
    several = [_stripe_marks(view) for view in found]
    charts = [
        (view.label, marks("Rows and columns", "spread / chance", rows, line=1.0, reach=_values(several)))
        for view, rows in zip(found, several, strict=True)
        if rows
    ]
    text = (
        "Standard deviation of the rows' (columns') shares of changed entries, over that of independent changes at the "
        "same density: median over the layers. Right of the dashed line the changes gather in some rows (columns). How "
        "strongly depends on their number too: the verdict goes by the spread relative to the mean share."
    )
    key = legend([("rows", 0), ("columns", 1)])
    return beside("Stripes.", text, charts, key, len(found) > 1)


def _stripe_marks(view: View) -> Rows:
    rows: Rows = []
    for kind in kinds(view.report):
        changes = [weight.changes[view.tuned] for weight in view.report.weights if weight.kind == kind]
        cells = []
        for colour, axis in enumerate(("rows", "columns")):
            known = [stripe for change in changes if (stripe := getattr(change, axis)) is not None]
            quotients = [s.std / s.random_std for s in known if s.random_std > 0 and math.isfinite(s.std)]
            cells += [Mark(axis, median(quotients), colour)] if quotients else []
        rows += [(kind, cells)] if cells else []
    return rows


def facts(row: Pooled) -> list[tuple[str, str]]:
    """(value, what it is) for the head of the page."""
    angles = [a for a in (row.angle_output, row.angle_input) if a is not None]
    energy, principal = row.energy, ratio(row.principal)
    found = [(f"{share_text(row.sparsity)} %", "unchanged in bf16") if row.sparsity is not None else None]
    found += [(figure_text(row.relative_norm), "‖ΔW‖ / ‖W‖") if row.relative_norm is not None else None]
    found += [(figure_text(row.shift), "spectral shift (NSS)") if row.shift is not None else None]
    found += [(f"{figure_text(math.degrees(max(angles)))}°", "largest principal angle") if angles else None]
    found += [(f"{times_text(energy)} ×", "energy in top-k, over sizes alone") if energy is not None else None]
    found += [(f"{times_text(principal)} ×", "on M_princ, over chance") if principal is not None else None]
    if row.matched is not None and row.matched.ratio is not None:
        found.append((f"{times_text(row.matched.ratio)} ×", "changed on / off M_princ, at equal size"))
    return [fact for fact in found if fact is not None]
