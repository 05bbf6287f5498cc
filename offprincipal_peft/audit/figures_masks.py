"""The page's figures of masks and magnitudes: which entries changed, and what their sizes alone explain of it."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

from ..html.charts import Frame, Series
from .figures import Drawn, View, across, by_kind_series, series_of
from .pooling import Pooled

_GRID = 64  # equal parts of a weight's entries: as many as it has bins


def overlaps(found: Sequence[View]) -> str:
    """The share of changed entries on the principal and the low-magnitude mask, by layer, and chance."""
    read: dict[str, Callable[[Pooled], float | None]] = {
        "on M_princ": lambda row: row.principal.value if row.principal else None,
        "on M_low": lambda row: row.low.value if row.low else None,
        "chance, M_princ": lambda row: row.principal.baseline if row.principal else None,
        "chance, M_low": lambda row: row.low.baseline if row.low else None,
    }
    colours = {"on M_princ": 0, "on M_low": 1, "chance, M_princ": 10, "chance, M_low": 11}

    def draw(view: View) -> Drawn | None:
        frame = Frame("Overlap with masks", "layer", "changed entries on the mask, %", whole_x=True, percent=True)
        strong = [series_of(name, colours[name], [(i, of(row)) for i, row in view.layers]) for name, of in read.items()]
        series = [line for line in strong if line is not None]
        for line in series:
            line.dots = line.dots and line.colour < 10
        for name in ("on M_princ", "on M_low"):
            for line in by_kind_series(view, read[name]) if len(view.colours) > 1 else ():
                line.colour, line.pale, line.dots = colours[name], True, len(line.x) == 1
                series.append(line)
        return frame, series

    text = (
        "Strong: all weights of a layer; thin: one kind of module. Dashed: the masks' own density, what chance gives. "
        "M_princ: the largest entries of the rank-k part of the base; M_low: its smallest weights."
    )
    return across("Which entries changed.", text, found, draw, list(colours.items()))


def matched(found: Sequence[View]) -> str:
    """Changed entries on the principal mask over those off it, at equal magnitude."""

    def draw(view: View) -> Drawn | None:
        frame = Frame("At equal magnitude", "layer", "rate on / rate off M_princ", whole_x=True, base=1.0)
        points = [(i, row.matched) for i, row in view.layers]
        known = [(i, m.ratio, m.error) for i, m in points if m is not None and m.ratio is not None]
        if not known:
            return None
        x, y = [i for i, _, _ in known], [value for _, value, _ in known]
        strong = Series("all kinds", 0, x, y, dots=len(x) < 12)
        if all(error is not None for _, _, error in known):
            strong.low = [value * math.exp(-2 * (error or 0.0)) for _, value, error in known]
            strong.high = [value * math.exp(2 * (error or 0.0)) for _, value, error in known]
        thin = by_kind_series(view, lambda row: row.matched.ratio if row.matched else None)
        for line in thin:
            line.pale, line.dots = True, len(line.x) == 1
        return frame, [strong, *(thin if len(thin) > 1 else [])]

    text = (
        "How often principal entries changed, over how often others of the same |W| did. At the dashed line the "
        "principal mask adds nothing to what magnitude explains. Band: two standard errors; thin: one kind of module."
    )
    return across("Controlled for magnitude.", text, found, draw)


def magnitudes(found: Sequence[View]) -> str:
    """The rate of changed entries by quantile of |W0|."""

    def draw(view: View) -> Drawn | None:
        frame = Frame("Changed entries by magnitude", "quantile of |W| in its weight, %", "changed entries, %")
        frame.percent, frame.y_from_zero = True, True
        series = _magnitude_series(view, None)
        for kind in view.colours if series and len(view.colours) > 1 else ():
            thin = _magnitude_series(view, kind)[:1]
            for line in thin:
                line.pale = True
            series += thin
        return frame, series

    text = (
        "bf16's steps grow with |W|, so a small update shows on small weights first. Strong: all weights, by their "
        "entries; thin: all entries of one kind of module."
    )
    return across("By magnitude.", text, found, draw, [("all entries", 0), ("on M_princ", 1)])


def _magnitude_series(view: View, kind: str | None) -> list[Series]:
    """All entries' rates and those of the principal ones, put together on one grid of quantiles."""
    sums = [[[0.0, 0.0] for _ in range(_GRID)] for _ in range(2)]
    for weight in view.report.weights:
        bins = weight.changes[view.tuned].magnitudes
        if bins is None or kind not in (None, weight.kind):
            continue
        for at, i in enumerate(_bins_at(bins.entries)):
            for which, rate in enumerate((bins.rate[i], bins.principal_rate[i] if bins.principal_rate else None)):
                if rate is not None:
                    sums[which][at][0] += rate * weight.entries
                    sums[which][at][1] += weight.entries
    series = []
    for which, (name, rows) in enumerate(zip((kind or "all entries", "on M_princ"), sums, strict=True)):
        points = [(100 * (at + 0.5) / _GRID, a / n) for at, (a, n) in enumerate(rows) if n > 0]
        if points:
            series.append(Series(name, which, [x for x, _ in points], [y for _, y in points]))
    return series


def _bins_at(entries: Sequence[int]) -> list[int]:
    """The bin in which the middle of each cell of the grid lies: one with half of the entries is half of the axis."""
    edges = list(itertools.accumulate(entries))
    return [bisect.bisect_right(edges, (at + 0.5) / _GRID * edges[-1]) for at in range(_GRID)] if edges else []
