"""An audit as one page that stands alone: the verdict first, then the paper's figures, then every number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..html.charts import escape
from ..html.page import page
from ..html.tables import NONE, Table, count_text
from . import figures, figures_maps, figures_masks, figures_spectral
from .figures import View, views
from .pooling import total
from .results import AuditReport
from .storing import write_text
from .tables import (
    bounds_table,
    checkpoint_table,
    kind_table,
    layer_table,
    skipped_table,
    source_table,
    weight_table,
)


def write_page(report: AuditReport, path: str | Path) -> None:
    """Write :func:`page_of` to ``path`` in one step."""
    write_text(path, page_of(report))


def page_of(report: AuditReport) -> str:
    """The whole HTML document: no scripts, no requests, light and dark. Figures without data are left out."""
    found = views(report)
    names = [view.label for view in found]
    title = f"What training changed: {', '.join(names)}" if names else "What training changed"
    parts = [_head(report, title), *_verdicts(report, found)]
    if found and report.weights:
        parts += _figures(report, found)
    parts += _numbers(report, found)
    return page(title, "".join(parts))


def _head(report: AuditReport, title: str) -> str:
    settings, count = report.settings, len(report.weights)
    entries = count_text(sum(weight.entries for weight in report.weights))
    base = report.sources[0].label if report.sources else "the base"
    lead = f"Against {base}: {count} weight{'s' if count != 1 else ''}, {entries} entries, {settings.mode} mode."
    return f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'


def _verdicts(report: AuditReport, found: list[View]) -> list[str]:
    parts = ["<h2>Verdict</h2>"]
    for view in found:
        if len(found) > 1:
            parts.append(f"<h3>{escape(view.label)}</h3>")
        sentences = report.verdicts[view.tuned].sentences if view.tuned < len(report.verdicts) else []
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        parts.append(f'<ul class="findings">{items}</ul>' if items else "<p>No verdict was stored.</p>")
    if len(found) > 1:
        parts.append(checkpoint_table(report).html())
    for view in found if len(found) == 1 else ():
        facts = figures.facts(total(report, view.tuned))
        cells = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in facts)
        parts.append(f'<ul class="facts">{cells}</ul>' if cells else "")
    return [*parts, f'<p class="small">{escape(report.error)}</p>' if report.error else ""]


def _figures(report: AuditReport, found: list[View]) -> list[str]:
    sections = [
        (
            "Which entries changed",
            [
                _pair(found, figures.sparsity(found), figures_masks.magnitudes(found)),
                _pair(found, figures_masks.overlaps(found), figures_masks.matched(found)),
            ],
        ),
        (
            "Subspaces and spectra",
            [
                figures_spectral.angle_curves(found),
                _pair(found, figures_spectral.wedin(found), figures.shift(found)),
                figures_spectral.singular_values(found),
            ],
        ),
        ("Directions of the update", _energy(found)),
        ("Where in the matrices", [figures_maps.update_maps(found), figures.stripes(found)]),
        ("Do the checkpoints agree?", [figures_maps.agreement(found)]),
        ("By kind of module", [kind_table(report, view.tuned, _only(view, found)).html() for view in found]),
    ]
    bounds = [bounds_table(report, view.tuned, _only(view, found), by_kind=False) for view in found]
    sections.append(("Do the inequalities hold?", [table.html() for table in bounds if table is not None]))
    return [f"<h2>{escape(name)}</h2>{''.join(parts)}" for name, parts in sections if any(parts)]


def _energy(found: list[View]) -> list[str]:
    if len(found) > 1:
        return [figures.energy_by_kind(found), figures.energy_by_layer(found)]
    sides, both = figures.energy_by_kind(found, ("output", "input")), figures.energy_by_kind(found, ("both",))
    return [sides, _pair(found, both, figures.energy_by_layer(found))]


def _pair(found: list[View], *made: str) -> str:
    """Side by side where each figure is one chart."""
    there = [figure for figure in made if figure]
    return f'<div class="pair">{"".join(there)}</div>' if len(found) == 1 and len(there) > 1 else "".join(there)


def _only(view: View, found: list[View]) -> str:
    return view.label if len(found) > 1 else ""


def _numbers(report: AuditReport, found: list[View]) -> list[str]:
    """Every number in tables that open, what was skipped, and what was asked for."""
    parts = []
    for view in found:
        label = _only(view, found)
        tables = [layer_table(report, view.tuned, label), weight_table(report, view.tuned, label)]
        bounds = bounds_table(report, view.tuned, label)
        for table in [*tables, bounds]:
            if table is not None and table.rows:
                parts.append(_details(table))
    skipped = skipped_table(report)
    head = ["<h2>All numbers</h2>", *parts] if parts else []
    if skipped is not None:
        count = len(report.skipped)
        text = skipped.html()
        name = f"Not compared: {count} tensor{'s' if count > 1 else ''}"
        head += ["<h2>Not compared</h2>", f"<details><summary>{name}</summary>{text}</details>" if count > 20 else text]
    settings = dataclasses.asdict(report.settings) | {"seconds": round(report.seconds, 1)}
    rows = [[name.replace("_", " "), _setting(value)] for name, value in settings.items()]
    asked = Table("Settings", ["setting", "value"], rows, kind="text").html() + source_table(report).html()
    return [*head, f"<details><summary>Settings and checkpoints</summary>{asked}</details>"]


def _details(table: Table) -> str:
    return f"<details><summary>{escape(table.caption)}</summary>{table.html()}</details>"


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) or NONE if isinstance(value, list | tuple) else str(value)
