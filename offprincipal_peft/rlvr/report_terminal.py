"""The report's first table and its findings as plain text, for the end of a run."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..html.tables import aligned
from .records import read_records
from .report_data import build_studies
from .report_findings import findings
from .report_tables import accuracy_table, failed_table

WIDTH = 118


def terminal_summary(folder: Path) -> str:
    """Accuracy with intervals and what follows from it, for each setting that ``folder`` holds."""
    parts: list[str] = []
    for study in build_studies(read_records(folder)):
        parts.append(f"\n{study.model}, {study.task}, {study.algorithm}")
        tables = [accuracy_table(study) if study.rows else None, failed_table(study)]
        parts += [aligned(table, WIDTH) for table in tables if table is not None]
        parts += [textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in findings(study)]
    return "\n".join(parts)
