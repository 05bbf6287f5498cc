"""The report's first table and its findings as plain text, for the end of a run."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .records import read_records
from .report_data import build_studies
from .report_findings import findings
from .report_tables import Table, accuracy_table, failed_table

WIDTH = 118


def terminal_summary(folder: Path) -> str:
    """Accuracy with intervals and what follows from it, for each setting that ``folder`` holds."""
    parts: list[str] = []
    for study in build_studies(read_records(folder)):
        parts.append(f"\n{study.model}, {study.task}, {study.algorithm}")
        tables = [accuracy_table(study) if study.rows else None, failed_table(study)]
        parts += [aligned(table) for table in tables if table is not None]
        parts += [textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in findings(study)]
    return "\n".join(parts)


def aligned(table: Table) -> str:
    """The table in columns as wide as their widest cell."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * min(WIDTH, len(lines[0])), *lines[1:], ""])
