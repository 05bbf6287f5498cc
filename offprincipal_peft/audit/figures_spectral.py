"""The page's figures of subspaces and spectra: angle curves, Wedin's bound, and how each singular value moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from ..html.charts import Frame, Series, escape, lines, number
from ..html.page import figure_html, legend
from .figures import Drawn, View, across
from .pooling import kinds
from .results import Angles, WeightAudit
from .tables import inequality

_POINTS = 48  # of a curve
_FAR = 10.0  # bounds beyond are drawn here: from 1 on they say nothing


def angle_curves(found: Sequence[View]) -> str:
    """Principal angles by index on both sides."""
    sides = [_angle_side(found, "output"), _angle_side(found, "input")]
    return f'<div class="pair">{"".join(sides)}</div>' if any(sides) and len(found) == 1 else "".join(sides)


def _angle_side(found: Sequence[View], side: str) -> str:
    values = [v for view in found for weight in view.report.weights for v in _degrees(weight, view.tuned, side)]
    top = max(values, default=0.0)
    if top == 0:  # no curves; or nothing turned, which the figure of the bounds says
        return ""
    floor = max(1e-4 * top, min(v for v in values if v > 0))
    log = top > 20 * floor

    def draw(view: View) -> Drawn | None:
        frame = Frame("Principal angles", "index i", "angle, degrees", whole_x=True, log_y=log)
        frame.y_from_zero = not log
        by_layer: dict[int | None, list[list[float]]] = {}
        for weight in view.report.weights:
            if degrees := _degrees(weight, view.tuned, side):
                by_layer.setdefault(weight.layer, []).append([max(v, floor) if log else v for v in degrees])
        if not by_layer:
            return None
        series = [
            _curve(f"layer {layer}" if layer is not None else "outside the layers", curves, faint=True)
            for layer, curves in by_layer.items()
        ]
        strong = _curve("median of all weights", [curve for curves in by_layer.values() for curve in curves])
        return frame, [line for line in (*series, strong) if line.x]

    name = "left singular vectors, U (output side)" if side == "output" else "right singular vectors, V (input side)"
    text = (
        f"How far the top-k {name} turned, angle by angle. Grey: the median of a layer's weights; blue: of all weights."
    )
    if log and min(values) < floor:
        text += f" Below {number(floor)} degrees drawn there."
    return across(f"Principal angles, {'U' if side == 'output' else 'V'}.", text, found, draw)


def _degrees(weight: WeightAudit, tuned: int, side: str) -> list[float]:
    """All k angles of a weight; empty where they were not measured, or only the largest was kept."""
    angles = weight.changes[tuned].angles
    found: list[float] = [] if angles is None else getattr(angles, side)
    whole = angles is not None and len(found) == angles.k and all(map(math.isfinite, found))
    return [math.degrees(angle) for angle in found] if whole else []


def _curve(name: str, curves: Sequence[Sequence[float]], faint: bool = False) -> Series:
    """The median at every index that at least half of the curves have, thinned."""
    length = sorted(map(len, curves))[len(curves) // 2]
    at = _thinned(length)
    middle = [median(curve[i] for curve in curves if len(curve) > i) for i in at]
    return Series(name, 0, [i + 1 for i in at], middle, faint=faint)


def _thinned(length: int) -> list[int]:
    """At most ``_POINTS`` indices of ``length``, both ends among them."""
    if length <= _POINTS:
        return list(range(length))
    return sorted({round(i * (length - 1) / (_POINTS - 1)) for i in range(_POINTS)})


def wedin(found: Sequence[View]) -> str:
    """The sine of every weight's largest angle against the bounds on it."""
    names = {"wedin": "the paper's ‖ΔW‖₂/γ (first order)", "wedin_always": "double angle (always true)"}

    def draw(view: View) -> Drawn | None:
        frame = Frame("Wedin's bound", "bound on the sine", "sine of the largest angle", log_x=True, log_y=True)
        frame.shade, frame.shade_label = 1.0, "says nothing"
        series = []
        for colour, (key, name) in enumerate(names.items()):
            points = []
            for weight in view.report.weights:
                bound = inequality(weight, view.tuned, key)
                if bound is not None and bound.left > 0 and bound.right > 0:
                    points.append((min(bound.right, _FAR), bound.left))
            if points:
                x, y = [x for x, _ in points], [y for _, y in points]
                series.append(Series(name, colour, x, y, path=False, hollow=key == "wedin"))
        if not series:
            return None
        low, high = (end(v for s in series for v in (*s.x, *s.y)) for end in (min, max))
        high = min(1.0, 1.2 * high)
        return frame, [*series, Series("equality", 18, [low, high], [low, high])]

    text = (
        "One dot for each weight: the larger of sin θ(U) and sin θ(V) against what ‖ΔW‖₂ and the gap γ = σ_k − σ_(k+1) "
        "allow. Below the dashed line the bound holds; one of 1 or more (tinted; beyond 10 drawn at 10) says nothing. "
        "The paper's form holds to first order only."
    )
    key = [(f"{name}{', rings' if i == 0 else ''}", i) for i, name in enumerate(names.values())]
    figure = across("Largest angle and its bound.", text, found, draw, key)
    if figure or not any(_angles(view) for view in found):
        return figure
    return figure_html("Largest angle and its bound.", "No principal subspace turned at all: every sine is 0.", " ")


def _angles(view: View) -> list[Angles]:
    return [a for weight in view.report.weights if (a := weight.changes[view.tuned].angles) is not None]


def singular_values(found: Sequence[View]) -> str:
    """σ⁺ − σ by index for the first, the middle and the last layer of every kind."""
    parts = []
    for view in found:
        panels = []
        for kind in kinds(view.report):
            chosen = _chosen([w for w in view.report.weights if w.kind == kind and _has_shifts(w, view.tuned)])
            series = [line for colour, w in enumerate(chosen) if (line := _shift_line(w, view.tuned, colour))]
            if series:
                frame = Frame(f"Shift of singular values, {kind}", "index", "", whole_x=True, base=0.0)
                frame.width, frame.height = 230.0, 165.0
                key = legend([(line.name, line.colour) for line in series])
                panels.append(f'<div><p class="panel">{escape(kind)}</p>{lines(frame, series)}{key}</div>')
        if panels:
            head = f'<p class="panel">{escape(view.label)}</p>' if len(found) > 1 else ""
            parts.append(f'{head}<div class="panels">{"".join(panels)}</div>')
    if not parts:
        return ""
    text = (
        f"σ⁺ − σ by index (at most {_POINTS} of them), each over the weight's own largest σ: the first, the middle and "
        "the last layer."
    )
    return figure_html("Shifts of singular values.", text, "".join(parts), "wide")


def _has_shifts(weight: WeightAudit, tuned: int) -> bool:
    spectrum = weight.changes[tuned].spectrum
    return spectrum is not None and any(spectrum.shifts) and spectrum.before[0] > 0


def _chosen(weights: Sequence[WeightAudit]) -> list[WeightAudit]:
    """The first, the middle and the last by layer."""
    ordered = sorted(weights, key=lambda weight: -1 if weight.layer is None else weight.layer)
    found = [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []
    return list({weight.name: weight for weight in found}.values())


def _shift_line(weight: WeightAudit, tuned: int, colour: int) -> Series | None:
    spectrum = weight.changes[tuned].spectrum
    assert spectrum is not None
    rows = list(zip(spectrum.positions, spectrum.shifts, strict=False))
    rows = [rows[i] for i in _thinned(len(rows))]
    points = [(i + 1, value / spectrum.before[0]) for i, value in rows if math.isfinite(value)]
    name = f"layer {weight.layer}" if weight.layer is not None else "–"
    return Series(name, colour, [x for x, _ in points], [y for _, y in points]) if points else None
