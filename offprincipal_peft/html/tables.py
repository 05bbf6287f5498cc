"""Tables, each made once and rendered as HTML, Markdown or plain text, and numbers in few characters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .charts import escape, number, style

NONE = "–"


@dataclass
class Table:
    """Text in cells. ``colours`` holds each row's colour, or is empty where rows are no methods."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    colours: list[int] = field(default_factory=list)
    note: str = ""
    kind: str = ""  # "dense": narrow columns; "text": cells that wrap, to the left

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in self.header)
        body = []
        for i, (first, *rest) in enumerate(self.rows):
            swatch = f'<i class="swatch {style(self.colours[i])}"></i>' if self.colours else ""
            cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
            name = f"<span>{swatch}<span>{escape(first)}</span></span>"
            kind = ' class="long"' if len(first) > 24 else ""
            body.append(f'<tr><th scope="row"{kind}>{name}</th>{cells}</tr>')
        note = f'<p class="small">{escape(self.note)}</p>' if self.note else ""
        kind = f' class="{self.kind}"' if self.kind else ""
        # Focusable, so that a keyboard can scroll what is wider than the page.
        return (
            f'<p class="caption" aria-hidden="true">{escape(self.caption)}</p>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}"><table{kind}>'
            f"<caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>{note}"
        )

    def markdown(self) -> str:
        lines = [f"**{plain(self.caption)}**", "", f"| {' | '.join(map(plain, self.header))} |"]
        lines.append("|---" * len(self.header) + "|")
        lines += [f"| {' | '.join(map(plain, row))} |" for row in self.rows]
        return "\n".join([*lines, "", plain(self.note)] if self.note else lines)


def aligned(table: Table, width: int) -> str:
    """The table in columns as wide as their widest cell; its rule is at most ``width`` characters."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * min(width, len(lines[0])), *lines[1:], ""])


def plain(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    return re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(str(text).split()))


def per_cent(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "−")


def digits(value: float, count: int = 2) -> str:
    """``count`` significant digits: 0.0123 → 0.012."""
    return number(float(f"{value:.{count - 1}e}"))


def bytes_text(value: float) -> str:
    """In MB or GB (powers of ten)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def count_text(value: float) -> str:
    """4884480 → 4.88 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # three digits of less are 1000 of the unit below
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
