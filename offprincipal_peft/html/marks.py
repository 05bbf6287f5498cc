"""Charts with one row or column for each name: values side by side with what they are held against, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .charts import WIDTH, Scale, escape, number, style, svg, tick_texts


@dataclass
class Mark:
    """A value in a row; ``kind``: "full", "hollow" or "tick"."""

    what: str
    value: float
    colour: int = 0
    kind: str = "full"


def marks(
    title: str,
    label: str,
    rows: Sequence[tuple[str, Sequence[Mark]]],
    line: float | None = None,
    percent: bool = False,
    zero: bool = True,
    reach: Sequence[float] = (),
) -> str:
    """One row for each name with its marks on one axis named ``label``; ``line``: where a dashed line stands.

    ``zero``: the axis begins there where no value is below; ``percent``: values are shares; ``reach``: what else the
    axis must hold, so that charts side by side have one scale. Raises ``ValueError`` without a mark.
    """
    found = [mark.value for _, row in rows for mark in row]
    if not found:
        raise ValueError(f"the chart '{title}' has no marks")
    found += [*reach, *([line] if line is not None else []), *([0.0] if zero else [])]
    low, high = min(found), max(found)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    named = min(175.0, 16 + 7.8 * max(len(name) for name, _ in rows))
    high_row, top = 22.0, 6.0
    bottom = top + high_row * len(rows)
    x = Scale(low if zero and low == 0 else low - air, high + air, named, WIDTH - 14.0)
    parts = [
        f'<rect class="stripe" x="0" y="{top + high_row * i:.1f}" width="{WIDTH:g}" height="{high_row:g}"/>'
        for i in range(0, len(rows), 2)
    ]
    values = x.ticks(5)
    for value, text in zip(values, tick_texts(values, percent), strict=True):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{text}</text>')
    if line is not None:
        parts.append(f'<line class="base" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    for i, (name, row) in enumerate(rows):
        at = top + high_row * (i + 0.5)
        shown = name if len(name) <= 20 else name[:19] + "…"
        parts.append(
            f'<text class="name" x="{named - 9:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(shown)}</text>'
        )
        parts += [_mark(name, mark, x(mark.value), at, percent) for mark in row]
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 32:.1f}" text-anchor="middle">{escape(label)}</text>')
    return svg(WIDTH, bottom + 40, title, "", parts)


def _mark(name: str, mark: Mark, x: float, y: float, percent: bool) -> str:
    value = f"{number(100 * mark.value)} %" if percent else number(mark.value)
    title = f"<title>{escape(name)}, {escape(mark.what)}: {value}</title>"
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>'
    if mark.kind == "tick":
        shape = f'<path d="M{x:.1f} {y - 7:.1f}v14"/>'
    return f'<g class="mark {"hollow " if mark.kind == "hollow" else ""}{style(mark.colour)}">{title}{shape}</g>'


def bars(
    title: str,
    x_label: str,
    y_label: str,
    columns: Sequence[tuple[str, float, float | None]],
    percent: bool = False,
) -> str:
    """A bar for each (name, value, what to hold it against, drawn as a tick), from zero up."""
    if not columns:
        raise ValueError(f"the chart '{title}' has no columns")
    height, left = 240.0, 50.0
    top = max(max(value, other or 0.0) for _, value, other in columns) or 1.0
    y = Scale(0.0, 1.08 * top, height - 40.0, 12.0)
    step = (WIDTH - 12.0 - left) / len(columns)
    parts = []
    values = y.ticks(5)
    for value, text in zip(values, tick_texts(values, percent), strict=True):
        parts.append(f'<line class="grid" x1="{left:g}" x2="{WIDTH - 12:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 6:g}" y="{y(value) + 3.5:.1f}" text-anchor="end">{text}</text>')
    wide = min(60.0, 0.7 * step)
    for i, (name, value, other) in enumerate(columns):
        at = left + step * (i + 0.5)
        note = number(100 * value if percent else value)
        parts.append(
            f'<rect class="bar c0" x="{at - wide / 2:.1f}" width="{wide:.1f}" y="{y(value):.1f}" '
            f'height="{y.start - y(value):.1f}"><title>{escape(name)}: {note}</title></rect>'
        )
        if other is not None:
            parts.append(f'<g class="mark c1"><path d="M{at - wide / 2 - 4:.1f} {y(other):.1f}h{wide + 8:.1f}"/></g>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 16:.1f}" text-anchor="middle">{escape(name)}</text>')
    middle = (left + WIDTH - 12) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(11 {(y.start + y.end) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    return svg(WIDTH, height, title, "", parts)
