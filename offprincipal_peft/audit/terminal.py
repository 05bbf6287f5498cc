"""An audit as plain text: the verdict's sentences, a row for each kind of module (and layer), what was skipped."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..html.tables import NONE
from .pooling import Pooled, by_kind, by_layer, by_reason, labels, ratio, total
from .results import COUNTED, AuditReport
from .tables import degrees_text, figure_text, share_text, times_text

WIDTH = 100
_LEAST = 40


@dataclass(frozen=True)
class _Column:
    """Two lines of heading, what stands below, and what it means."""

    first: str
    second: str
    read: Callable[[Pooled], str]
    note: str = ""

    @property
    def name(self) -> str:
        return self.first + ("" if self.first.endswith("/") or not self.second else " ") + self.second


# In the order in which a narrow terminal keeps them.
_COLUMNS = (
    _Column("weights", "", lambda row: str(row.weights)),
    _Column("same in", "bf16, %", lambda row: share_text(row.sparsity), "entries that bf16 stores unchanged"),
    _Column("‖ΔW‖/", "‖W‖", lambda row: figure_text(row.relative_norm)),
    _Column("NSS", "", lambda row: figure_text(row.shift), "‖σ⁺ − σ‖/‖σ‖"),
    _Column(
        "angle U/V,",
        "degrees",
        lambda row: f"{degrees_text(row.angle_output)}/{degrees_text(row.angle_input)}",
        "the largest between the top-k left (U) and right (V) singular subspaces",
    ),
    _Column(
        "energy/",
        "sizes",
        lambda row: times_text(row.energy),
        "share of ‖ΔW‖² inside the top-k subspaces, over that of the same entry sizes with random signs",
    ),
    _Column(
        "M_princ/",
        "chance",
        lambda row: times_text(ratio(row.principal)),
        "share of the changed entries on the principal mask, over its density",
    ),
    _Column(
        "M_low/",
        "chance",
        lambda row: times_text(ratio(row.low)),
        "share of the changed entries on the mask of the smallest weights, over its density",
    ),
    _Column(
        "on/off",
        "M_princ",
        lambda row: times_text(row.matched.ratio if row.matched else None),
        "changed entries on and off the principal mask, among those of equal magnitude",
    ),
)
_ASCII = {
    "‖ΔW‖": "|dW|",
    "‖W‖": "|W|",
    "‖σ⁺ − σ‖/‖σ‖": "|s+ - s|/|s|",
    "‖": "|",
    "Δ": "d",
    "σ": "s",
    "⁺": "+",
    "²": "^2",
    "₂": "_2",
    "−": "-",
    "–": "-",
    "×": "x",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "…": "...",
    "°": " deg",
    "’": "'",
}


def terminal_report(
    report: AuditReport, width: int = WIDTH, color: bool = False, *, layers: bool = False, encoding: str = "utf-8"
) -> str:
    """The report in lines of at most ``width`` characters (40 or more), without a newline at its end.

    ``layers``: also a row for each layer. ``color``: headings in bold by ANSI codes, which do not count for the width.
    ``encoding``: the stream's; where it cannot hold the text, all is written in ASCII. Raises ``ValueError`` for less
    width.
    """
    if width < _LEAST:
        raise ValueError(f"the report needs {_LEAST} columns, got a width of {width}")
    text = _text(report, _Writer(width, color), layers)
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _text(report, _Writer(width, color, ascii=True), layers)
    return text


def _text(report: AuditReport, writer: _Writer, layers: bool) -> str:
    blocks: list[str] = []
    notes: dict[str, str] = {}
    for tuned, name in enumerate(labels(report)):
        lines = [writer.bold(writer.cut(f"{name} against {report.sources[0].label}", writer.width))]
        sentences = report.verdicts[tuned].sentences if tuned < len(report.verdicts) else []
        lines += [writer.wrapped(sentence, "- ") for sentence in sentences]
        tables = [("kind", [*by_kind(report, tuned), total(report, tuned)])] if report.weights else []
        tables += [("layer", by_layer(report, tuned))] if layers and report.weights else []
        for what, rows in tables:
            shown, table = _table(what, rows, writer)
            lines += ["", *table]
            notes |= {column.name.replace(", %", ""): column.note for column in shown if column.note}
        blocks.append("\n".join(lines))
    if notes:
        blocks.append(writer.wrapped(". ".join(f"{name}: {note}" for name, note in notes.items()) + "."))
    closing = (part(report, writer) for part in (_consensus, _skipped, _remarked, _closing))
    blocks += [part for part in closing if part]
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class _Writer:
    """How lines are made: their width, with or without ANSI codes, in ASCII alone or not."""

    width: int
    color: bool
    ascii: bool = False

    def plain(self, text: str) -> str:
        # Names come from files: none may move a terminal's cursor.
        text = "".join(c if c.isprintable() else "�" for c in text)
        if self.ascii:
            for character, other in _ASCII.items():
                text = text.replace(character, other)
            text = text.encode("ascii", "replace").decode("ascii")
        return text

    def wrapped(self, text: str, bullet: str = "") -> str:
        text, indent = self.plain(" ".join(text.split())), " " * len(bullet)
        return textwrap.fill(text, self.width, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)

    def cut(self, text: str, most: int) -> str:
        text, dots = self.plain(" ".join(text.split())), self.plain("…")
        return text if len(text) <= most else text[: most - len(dots)] + dots

    def bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self.color and text else text


def _table(what: str, rows: Sequence[Pooled], writer: _Writer) -> tuple[list[_Column], list[str]]:
    """The columns shown and the lines: without columns that no row fills, and those that do not fit."""
    filled: list[tuple[_Column, list[str], int]] = []
    for column in _COLUMNS:
        cells = [writer.plain(text if text.strip("–/") else NONE) for text in map(column.read, rows)]
        if set(cells) - {writer.plain(NONE)}:
            cells = [writer.plain(column.first), writer.plain(column.second), *cells]
            filled.append((column, cells, 2 + max(map(len, cells))))
    longest = min(30, max(len(name) for name in (what, *(row.name for row in rows))))
    kept = len(filled)
    while min(longest, 12) + sum(size for _, _, size in filled[:kept]) > writer.width:
        kept -= 1
    taken = sum(size for _, _, size in filled[:kept])
    longest = min(longest, writer.width - taken)
    lines = []
    for i, name in enumerate((what, "", *(row.name for row in rows))):
        cells = [column[i].rjust(size) for _, column, size in filled[:kept]]
        line = "".join([writer.cut(name, longest).ljust(longest), *cells]).rstrip()
        lines.append(writer.bold(line) if i < 2 else line)
    rule = "-" * (longest + taken)
    lines.insert(2, rule)
    if rows[-1].name == "all":
        lines.insert(-1, rule)
    if missing := [column.name for column, _, _ in filled[kept:]]:
        lines.append(writer.wrapped(f"No room for: {'; '.join(missing)}."))
    return [column for column, _, _ in filled[:kept]], lines


def _skipped(report: AuditReport, writer: _Writer) -> str:
    if not report.skipped:
        return ""
    count = len(report.skipped)
    lines = [writer.bold(f"Not compared: {count} tensor{'s' if count > 1 else ''}")]
    for reason, names in by_reason(report.skipped):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(writer.wrapped(f"{len(names)}: {reason} ({shown})", "- "))
    return "\n".join(lines)


def _consensus(report: AuditReport, writer: _Writer) -> str:
    """Whether the tuned checkpoints changed the same entries: the mean over weights, by their entries."""
    found = [(weight.agreement, weight.entries) for weight in report.weights if weight.agreement is not None]
    if not found:
        return ""
    entries = sum(size for _, size in found)
    seen, chance = (sum(getattr(a, name) * size for a, size in found) / entries for name in ("jaccard", "baseline"))
    return writer.wrapped(
        f"Consensus of {len(report.sources) - 1} checkpoints: the Jaccard index of their changed entries is "
        f"{seen:.3f}, that of independent changes {chance:.3f} (means over pairs and weights)."
    )


def _remarked(report: AuditReport, writer: _Writer) -> str:
    """What is to be known of single weights, by what it is; that embeddings and norms are only counted goes unsaid."""
    found = [(weight.name, note) for weight in report.weights for note in weight.notes if not note.startswith(COUNTED)]
    for tuned, label in enumerate(labels(report)):
        of = f"{label}: " if len(report.sources) > 2 else ""
        found += [(weight.name, of + note) for weight in report.weights for note in weight.changes[tuned].notes]
    if not found:
        return ""
    lines = [writer.bold("Notes")]
    for note, names in by_reason(found):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(writer.wrapped(f"{len(names)}: {note} ({shown})", "- "))
    return "\n".join(lines)


def _closing(report: AuditReport, writer: _Writer) -> str:
    seconds = f"{report.seconds:.3g}" if report.seconds < 999.5 else f"{report.seconds:,.0f}"
    parts = [f"Error: {report.error}" if report.error else "", f"{seconds} s on {report.settings.device}"]
    return writer.wrapped(". ".join(part.rstrip(".") for part in parts if part) + ".")
