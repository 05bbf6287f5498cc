"""Charts as inline SVG: no scripts, no requests, colours from the page's CSS so that light and dark both work.

A chart is drawn in its own units, about one per pixel at its natural width, and scales with the column it stands in.
Every method has one colour on the whole page (class ``c0`` … ``c9``) and from the eleventh on a dash as well.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 440.0
COLOURS = 10
_CHAR = 6.1  # mean width of a character at 11 units


@dataclass
class Series:
    """One line. ``low`` and ``high`` are the band around ``y``; ``ring`` the index of a point to mark as chosen."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    faint: bool = False  # grey, behind the others
    dots: bool = False
    ring: int | None = None
    pale: bool = False  # thin, in its own colour, behind the others
    path: bool = True  # points are joined
    hollow: bool = False  # rings for points


@dataclass
class Scale:
    """Data to units: ``low`` → ``start``, ``high`` → ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # only whole numbers are marked

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside, at most about ``count``; powers of ten (and 2, 5 where few) on a logarithmic scale.

        A range of a logarithmic scale that holds none or one of them gets the linear scale's.
        """
        if self.log and (found := self._powers(count)):
            return found
        rough = (self.high - self.low) / (count + 2)
        exponent = math.floor(math.log10(rough))
        power = 10.0**exponent
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
        step = max(1.0, math.ceil(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 2 - exponent) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _powers(self, count: int) -> list[float]:
        """What :meth:`ticks` says of logarithmic scales; none for less than two."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**p for p in range(first, last + 1) for step in steps]
            found = [v for v in found if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(found) <= count + 1:
                return found if len(found) > 1 else []
        return found[:: math.ceil(len(found) / count)]


@dataclass
class Frame:
    """What the lines are drawn in."""

    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    whole_x: bool = False
    percent: bool = False  # y is a share, shown in per cent
    y_from_zero: bool = False
    base: float | None = None  # a horizontal reference line
    base_label: str = ""
    height: float = 270.0
    width: float = WIDTH
    limits: tuple[float, float, float, float] | None = None  # x low, x high, y low, y high; from the data otherwise
    x_ticks: Sequence[float] = field(default_factory=tuple)
    log_y: bool = False  # every y must be positive
    shade: float | None = None  # from this x on the ground is tinted
    shade_label: str = ""


def escape(text: object) -> str:
    """For HTML text and attribute values."""
    return html.escape(str(text), quote=True)


def number(value: float, more: int = 0) -> str:
    """A tick or value in few characters: 0.0002 → 2e-4. Three or four digits, and ``more``."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.{2 + more}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    whole = abs(value) >= 9999.5  # from here on four digits would be written as a power
    return (f"{value:.{more}f}" if whole else f"{value:.{4 + more}g}").replace("-", "−")


def tick_texts(values: Sequence[float], percent: bool = False) -> list[str]:
    """The numbers of an axis, with the digits that tell each from its neighbours."""
    shown = [100 * value if percent else value for value in values]
    for more in range(12):
        texts = [number(value, more) for value in shown]
        if len(set(texts)) == len(texts):
            break
    return texts


def style(colour: int) -> str:
    """The classes of a colour: its hue, and its dash from the eleventh method on."""
    return f"c{colour % COLOURS} d{min(colour // COLOURS, 2)}"


def lines(frame: Frame, series: Sequence[Series], describe: str = "") -> str:
    """A chart of lines with bands, as an ``<svg>`` element; ``describe`` is its text for who cannot see it."""
    x_low, x_high, y_low, y_high = frame.limits or limits(frame, series)
    y = Scale(y_low, y_high, frame.height - 40.0, 12.0, frame.log_y)
    longest = max(map(len, tick_texts(_y_ticks(frame, y), frame.percent)), default=0)
    # Room for what a phone enlarges; the label of the axis stands left of it.
    left = max(50.0, 24 + 7.4 * longest) if frame.width >= WIDTH else max(40.0, 10 + 7.0 * longest)
    x = Scale(x_low, x_high, left, frame.width - 12.0, frame.log_x, frame.whole_x)
    parts = [_shade(frame, x, y), _axes(frame, x, y)]
    if frame.base is not None and y_low <= frame.base <= y_high:
        level = y(frame.base)
        parts.append(f'<line class="base" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{level:.1f}" y2="{level:.1f}"/>')
        if frame.base_label:
            parts.append(
                f'<text class="note" x="{x.end:.1f}" y="{level - 4:.1f}" text-anchor="end">'
                f"{escape(frame.base_label)}</text>"
            )
    parts += [_band(s, x, y) for s in series if s.low is not None and s.high is not None]
    parts += [_line(s, x, y) for s in sorted(series, key=lambda s: not (s.faint or s.pale))]
    return svg(frame.width, frame.height, frame.title, describe, parts)


def limits(frame: Frame, series: Sequence[Series]) -> tuple[float, float, float, float]:
    """x and y ranges that hold every point and band, with some air."""
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for values in (s.y, s.low or (), s.high or ()) for v in values]
    ys += [frame.base] if frame.base is not None else []
    if frame.y_from_zero:
        ys.append(0.0)
    if not xs or not ys:
        raise ValueError(f"the chart '{frame.title}' has no points")
    y_low, y_high = min(ys), max(ys)
    air = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 0.05
    low = y_low if frame.y_from_zero and y_low >= 0 else y_low - air
    high = min(y_high + air, 1.0) if frame.percent and y_high <= 1.0 else y_high + air  # no share is larger
    span = (y_low / 1.3, y_high * 1.3) if frame.log_y else (low, high)
    x_low, x_high = min(xs), max(xs)
    if frame.log_x:
        return x_low / 1.15, x_high * 1.15, *span
    return (x_low, x_high, *span) if x_high > x_low else (x_low - 0.5, x_high + 0.5, *span)


def svg(width: float, height: float, title: str, describe: str, parts: Sequence[str]) -> str:
    """The element around the parts, named for screen readers."""
    size = "big" if width >= WIDTH else "small"  # big ones shrink on a phone: their text is enlarged there
    name = escape(f"{title}. {describe}" if describe else title)
    return (
        f'<svg class="{size}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _axes(frame: Frame, x: Scale, y: Scale) -> str:
    parts = []
    values = _y_ticks(frame, y)
    for value, text in zip(values, tick_texts(values, frame.percent), strict=True):
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        place = f'x="{x.start - 6:.1f}" y="{at + 3.5:.1f}"'
        parts.append(f'<text {place} text-anchor="end">{text}</text>')
    values = list(frame.x_ticks or x.ticks(2 if frame.width < 300 else 6))
    for value, text in zip(values, tick_texts(values), strict=True):
        at = x(value)
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 16:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y.start:.1f}" y2="{y.start:.1f}"/>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{frame.height - 6:.1f}" text-anchor="middle">{escape(frame.x_label)}</text>'
    )
    if frame.y_label:
        turned = f'transform="translate(11 {(y.start + y.end) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(frame.y_label)}</text>')
    return "".join(parts)


def _y_ticks(frame: Frame, y: Scale) -> list[float]:
    return y.ticks(2 if frame.width < 300 else 5)


def _shade(frame: Frame, x: Scale, y: Scale) -> str:
    if frame.shade is None or frame.shade >= x.high:
        return ""
    left, top = x(max(frame.shade, x.low)), y.end
    at = f'x="{x.end - 4:.1f}" y="{y.start - 7:.1f}" text-anchor="end"'
    size = f'width="{x.end - left:.1f}" height="{y.start - top:.1f}"'
    ground = f'<rect class="stripe" x="{left:.1f}" y="{top:.1f}" {size}/>'
    fits = x.end - left > 7.4 * len(frame.shade_label) > 0
    return ground + (f'<text class="note" {at}>{escape(frame.shade_label)}</text>' if fits else "")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _band(series: Series, x: Scale, y: Scale) -> str:
    assert series.low is not None and series.high is not None
    there = [(x(at), y(min(v, y.high))) for at, v in zip(series.x, series.high, strict=True)]
    back = [(x(at), y(max(v, y.low))) for at, v in zip(series.x, series.low, strict=True)]
    return f'<path class="band {style(series.colour)}" d="{_path(there + back[::-1])}Z"/>'


def _line(series: Series, x: Scale, y: Scale) -> str:
    points = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    kind = "line faint" if series.faint else "line pale" if series.pale else "line"
    kind += " hollow" if series.hollow else ""
    parts = [f'<g class="{kind} {style(series.colour)}"><title>{escape(series.name)}</title>']
    if len(points) > 1 and series.path:
        parts.append(f'<path d="{_path(points)}"/>')
    if series.dots or not series.path or len(points) == 1:
        size = 3.6 if series.hollow else 2 if series.pale or not series.path else 3
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size}"><title>{escape(series.name)}: '
            f"{number(a)}, {number(b)}</title></circle>"
            for (px, py), a, b in zip(points, series.x, series.y, strict=True)
        ]
    if series.ring is not None:
        px, py = points[series.ring]
        parts.append(f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="6.5"/>')
    return "".join(parts) + "</g>"


@dataclass
class Bar:
    """One row of a :func:`forest`: a value with its interval, where there is one."""

    name: str
    colour: int
    value: float
    low: float | None = None
    high: float | None = None


def forest(title: str, label: str, bars: Sequence[Bar], line: float | None = None, describe: str = "") -> str:
    """Points with intervals, one row a method, over an axis named ``label``; ``line``: where a dashed line stands."""
    row, top = 25.0, 8.0
    named = min(175.0, 16 + 7.0 * max(len(bar.name) for bar in bars))
    bottom = top + row * len(bars)
    values = [v for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None]
    values += [line] if line is not None else []
    air = 0.05 * (max(values) - min(values)) or 0.5
    x = Scale(min(values) - air, max(values) + air, named, WIDTH - 14.0)
    parts = []
    for i in range(0, len(bars), 2):
        parts.append(f'<rect class="stripe" x="0" y="{top + row * i:.1f}" width="{WIDTH:g}" height="{row:g}"/>')
    values = x.ticks(5)
    for value, text in zip(values, tick_texts(values), strict=True):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{text}</text>')
    if line is not None:
        parts.append(f'<line class="base" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    for i, bar in enumerate(bars):
        at = top + row * (i + 0.5)
        text = escape(_short(bar.name, 21))
        parts.append(f'<text class="name" x="{named - 10:.1f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(_whisker(bar, x, at))
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 34:.1f}" text-anchor="middle">{escape(label)}</text>')
    return svg(WIDTH, bottom + 42, title, describe, parts)


def _whisker(bar: Bar, x: Scale, at: float) -> str:
    ends = f" [{number(bar.low)}, {number(bar.high)}]" if bar.low is not None and bar.high is not None else ""
    parts = [f'<g class="mark {style(bar.colour)}"><title>{escape(bar.name)}: {number(bar.value)}{ends}</title>']
    if bar.low is not None and bar.high is not None:
        caps = "".join(f"M{x(end):.1f} {at - 4:.1f}v8" for end in (bar.low, bar.high))
        parts.append(f'<path d="M{x(bar.low):.1f} {at:.1f}H{x(bar.high):.1f}{caps}"/>')
    parts.append(f'<circle cx="{x(bar.value):.1f}" cy="{at:.1f}" r="4.5"/>')
    return "".join(parts) + "</g>"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def heatmap(
    title: str, cells: dict[tuple[str, int], float], modules: Sequence[str], depth: int, classes: tuple[str, str]
) -> str:
    """Modules by depth, each cell in [−1, 1]: the stronger, the further from 0, in the class for its sign (−, +).

    Sixteen shades, one path each, to keep the page small; None-valued places stay empty.
    """
    size = max(3.0, min(14.0, 190.0 / depth))
    high = 13.0
    left = 10 + _CHAR * max(len(module) for module in modules)
    shades: dict[int, list[str]] = {}
    for (module, block), value in cells.items():
        corner = f"M{left + size * block:.1f} {2 + high * modules.index(module):.1f}"
        shade = round(16 * min(1.0, max(-1.0, value)))
        shades.setdefault(shade, []).append(f"{corner}h{size - 0.6:.1f}v{high - 1:.0f}h{0.6 - size:.1f}z")
    bottom = 2 + high * len(modules)
    parts = []
    for i, module in enumerate(modules):
        parts.append(f'<text x="{left - 5:.1f}" y="{11.5 + high * i:.1f}" text-anchor="end">{escape(module)}</text>')
    for shade, found in sorted(shades.items()):
        hue = classes[shade > 0]
        paths = "".join(found)
        parts.append(f'<path class="cell" d="{paths}"/>')
        parts.append(f'<path class="cell {hue}" fill-opacity="{abs(shade) / 16:.3g}" d="{paths}"/>' if shade else "")
    parts.append(f'<text x="{left:.1f}" y="{bottom + 12:.1f}">0</text>')
    if depth > 1:
        end = left + size * depth
        parts.append(f'<text x="{end:.1f}" y="{bottom + 12:.1f}" text-anchor="end">{depth - 1}</text>')
    # One width for all, so that panels of a grid are drawn at one scale.
    return svg(left + 196, bottom + 17, title, "Rows: kinds of layer; columns: depth.", parts)


def layer_place(name: str) -> tuple[str, int] | None:
    """(kind of module, depth) of a layer: "model.layers.3.mlp.up_proj" → ("up_proj", 3); None without a depth."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    words = [part for part in name.split(".") if re.fullmatch(r"[A-Za-z_]\w*", part)]
    return (words[-1], int(numbers[0])) if numbers and words else None
