"""The comparison of a sweep as one page: ``build_report`` makes it, ``write_report`` puts it beside the trials.

The HTML holds everything it shows (no scripts, no requests), the Markdown the same sentences and tables. Both are made
from the records alone, so a report of a half-finished sweep is a report of what is there, and says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..html.charts import escape
from ..html.page import page
from ..html.tables import Table, plain
from .records import read_records
from .report_data import Record, Study, build_studies, config_fields
from .report_figures import layer_maps, overview, rate_sensitivity, reward_curves, trade_off
from .report_findings import cautions, findings, progress
from .report_tables import (
    accuracy_table,
    cost_table,
    failed_table,
    level_table,
    movement_table,
    update_table,
)
from .report_tables import rate_table as rates_of


class ReportError(ValueError):
    """A folder that no report can be made of: which one, and what it lacks."""


@dataclass(frozen=True)
class Report:
    """The same report twice."""

    html: str
    markdown: str


def build_report(folder: Path, records: Sequence[Record] | None = None) -> Report:
    """The report of ``folder/trials`` (or of ``records``), with ``folder/sweep.json`` for what is still to come.

    Raises:
        ReportError: no records, or an unreadable ``sweep.json``.
        RecordError: a record that cannot be read.
    """
    folder = Path(folder)
    found = list(read_records(folder) if records is None else records)
    expected = _expected(folder)
    if not found:
        waiting = f"; sweep.json expects {len(expected)}, none has ended yet" if expected else ""
        raise ReportError(f"{folder / 'trials'} holds no trial's record (*.json){waiting}")
    if expected is not None:
        foreign = sorted({str(record["id"]) for record in found} - set(expected))
        if foreign:
            expected = [*expected, *foreign]
    studies = build_studies(found)
    title = _title(studies)
    html = [_head(title, studies, found, expected)]
    markdown = [f"# {plain(title)}", progress(found, expected)]
    for number, study in enumerate(studies):
        name = f"{study.model}, {study.task}, {study.algorithm}"
        if len(studies) > 1:
            html.append(f'<h2 id="study{number}">{escape(name)}</h2>')
            markdown.append(f"## {plain(name)}")
        part = _study_html(study)
        html.append(part.replace("<h2>", "<h3>").replace("</h2>", "</h3>") if len(studies) > 1 else part)
        markdown.append(_study_markdown(study))
    html.append(_details(found))
    return Report(page(title, "".join(html)), "\n\n".join(markdown) + "\n")


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into ``folder``; their paths. Raises as :func:`build_report`."""
    folder = Path(folder)
    report = build_report(folder)
    paths = (folder / "report.html", folder / "report.md")
    for path, text in zip(paths, (report.html, report.markdown), strict=True):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def _expected(folder: Path) -> list[str] | None:
    path = folder / "sweep.json"
    if not path.exists():
        return None
    try:
        trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: no sweep's description ({type(error).__name__}: {error})") from None
    if not isinstance(trials, list):
        raise ReportError(f"{path}: 'trials' is a list of trial ids, not {type(trials).__name__}")
    return [str(trial) for trial in trials]


def _title(studies: Sequence[Study]) -> str:
    if len(studies) > 1:
        return f"Comparison of methods: {len(studies)} settings"
    study = studies[0]
    methods = len(study.rows)
    what = f"{methods} methods" if methods > 1 else study.rows[0].method.name if methods else "no trial finished"
    return f"{study.algorithm.upper()} on {study.task} with {study.model}: {what}"


def _head(title: str, studies: Sequence[Study], records: Sequence[Record], expected: Sequence[str] | None) -> str:
    seeds = {r["config"]["seed"] for r in records if r["status"] == "finished"} or {
        r["config"]["seed"] for r in records
    }
    facts = [
        (len({record["config"]["label"] for record in records}), "methods"),
        (len(records), "trials"),
        (len(seeds), "seeds"),
        (len({record["config"]["learning_rate"] for record in records}), "learning rates"),
        (_range([record["config"]["steps"] for record in records]), "steps each"),
    ]
    test = [n for r in records if (n := (r.get("checks") or {}).get("test"))]
    facts += [(_range(test), "test items")] if test else []
    items = "".join(
        f"<li><b>{escape(value)}</b><span>{escape(_plural(value, name))}</span></li>" for value, name in facts
    )
    where = ""
    if len(studies) > 1:
        links = " · ".join(
            f'<a href="#study{i}">{escape(f"{s.model}, {s.task}, {s.algorithm}")}</a>' for i, s in enumerate(studies)
        )
        where = f"<nav>{links}</nav>"
    lead = f'<p class="lead">{escape(progress(records, expected))}</p>'
    return f'<header><h1>{escape(title)}</h1>{lead}<ul class="facts">{items}</ul>{where}</header>'


def _plural(value: object, name: str) -> str:
    first, _, rest = name.partition(" ")
    return name if str(value) != "1" or rest == "each" else f"{first} {rest}".strip().removesuffix("s")


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _tables(study: Study) -> list[Table | str]:
    """In the order of the page; a sentence where a table has no rows."""
    found: list[Table | str | None] = []
    if study.rows:
        found = [accuracy_table(study), *(level_table(study, table) for table in study.matched)]
        found += [movement_table(study), update_table(study), rates_of(study), cost_table(study)]
    return [table for table in [*found, failed_table(study)] if table is not None]


def _study_html(study: Study) -> str:
    parts = ["<h2>Findings</h2>", _list(findings(study), "findings")]
    if study.rows and (limits := cautions(study)):
        parts.append(f'<div class="cautions"><p>Read with care</p>{_list(limits, "")}</div>')
    failed = failed_table(study)
    if study.rows:
        matched = [level_table(study, table) for table in study.matched]
        rates = rates_of(study)
        parts += [overview(study), accuracy_table(study).html(), reward_curves(study)]
        parts.append("<h2>How far for how much</h2>")
        parts.append(f'<div class="pair">{trade_off(study, "kl")}{trade_off(study, "update_norm")}</div>')
        parts += [table.html() if isinstance(table, Table) else f"<p>{escape(table)}</p>" for table in matched]
        parts.append(movement_table(study).html())
        if (update := update_table(study)) is not None:
            parts += ["<h2>Where the update lies</h2>", update.html(), layer_maps(study)]
        if rates is not None:
            pair = f'<div class="pair">{rate_sensitivity(study)}<div>{rates.html()}</div></div>'
            parts += ["<h2>Learning rates</h2>", pair]
        parts += ["<h2>Cost</h2>", cost_table(study).html()]
    if failed is not None:
        parts += ["<h2>Failures</h2>", failed.html().replace("<table>", '<table class="text">')]
    if study.left_out:
        parts.append(f"<details><summary>Left out of the selection</summary>{_list(study.left_out, '')}</details>")
    return "".join(parts)


def _study_markdown(study: Study) -> str:
    parts = ["### Findings", "\n".join(f"- {plain(text)}" for text in findings(study))]
    if study.rows and (limits := cautions(study)):
        parts += ["Read with care:", "\n".join(f"- {plain(text)}" for text in limits)]
    parts.append("### Tables")
    parts += [table.markdown() if isinstance(table, Table) else plain(table) for table in _tables(study)]
    if study.left_out:
        parts += ["Left out of the selection:", "\n".join(f"- {plain(text)}" for text in study.left_out)]
    return "\n\n".join(parts)


def _list(items: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _details(records: Sequence[Record]) -> str:
    """What every trial shares, what differs, and where they ran."""
    shared, differing = config_fields(records)
    environments: list[Any] = []
    for record in records:
        if record["environment"] not in environments:
            environments.append(record["environment"])
    parts = [f"<p>Shared by all trials</p><pre>{escape(json.dumps(shared, indent=1, ensure_ascii=False))}</pre>"]
    if differing:
        text = json.dumps(differing, indent=1, ensure_ascii=False)
        parts.append(f"<p>Differing between trials</p><pre>{escape(text)}</pre>")
    for environment in environments[:4]:
        text = json.dumps(environment, indent=1, ensure_ascii=False)
        parts.append(f"<p>Environment</p><pre>{escape(text)}</pre>")
    if len(environments) > 4:
        parts.append(f"<p>… and {len(environments) - 4} other environments</p>")
    return f"<details><summary>Configuration and environment</summary>{''.join(parts)}</details>"
