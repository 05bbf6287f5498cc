"""Planted updates: each is given its words and its sentence, and is told from every other one by its figures."""

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.planted import KINDS, base_model, plant, write
from offprincipal_peft.audit import AuditReport, audit, summary
from offprincipal_peft.audit.pooling import total

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": F32, "bf16": BF16}

# density, visible, direction, magnitude, stripes: of a base on the bf16 grid, kept and trained in fp32
WORDS = {
    "none": ("none", "none", "unknown", "unknown", "unknown"),
    "off-principal": ("dense", "part", "off-principal", "no overlap", "no"),
    "off-left": ("dense", "part", "off-principal", "no overlap", "no"),
    "principal": ("dense", "part", "principal", "no overlap", "no"),
    "sub-ULP": ("sparse", "none", "no preference", "unknown", "unknown"),
    "rows": ("sparse", "part", "no preference", "no overlap", "rows"),
    "columns": ("sparse", "part", "no preference", "no overlap", "columns"),
    "blocks": ("sparse", "part", "no preference", "no overlap", "both"),
    "magnitude": ("sparse", "all", "no preference", "explained", "no"),
    "on-mask": ("sparse", "part", "no preference", "not explained", "no"),
    "off-mask": ("sparse", "part", "no preference", "not explained", "no"),
    "dense": ("dense", "part", "no preference", "no overlap", "no"),
    "random": ("sparse", "part", "no preference", "no overlap", "no"),
}
# What is read of each where it is stored in bf16: all of what is stored is visible, and what is not visible is gone.
STORED = {kind: (words[0], "all", *words[2:]) for kind, words in WORDS.items()}
STORED |= {kind: WORDS["none"] for kind in ("none", "sub-ULP")}
SENTENCES = {
    "none": "No entry of any compared weight changed.",
    "off-principal": "Off-principal: the update avoids the principal subspaces",
    "off-left": "Off-principal: the update avoids the principal subspaces",
    "principal": "Principal: the update prefers the principal subspaces",
    "sub-ULP": "the update is below half a unit in the last place",
    "rows": "Striped by rows:",
    "columns": "Striped by columns:",
    "blocks": "Striped by rows and columns:",
    "magnitude": "what is seen on the principal mask is only magnitude.",
    "on-mask": "magnitude alone does not explain it.",
    "off-mask": "magnitude alone does not explain it.",
    "dense": "Dense in bf16:",
    "random": "Sparse in bf16:",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, "fp32" or "bf16", mode) -> the report, found once."""
    root = tmp_path_factory.mktemp("planted")
    bases = {name: write(root / name / "base", base_model(dtype)) for name, dtype in DTYPES.items()}

    @cache
    def tuned(kind: str, name: str) -> Path:
        return plant(root / name / kind, kind, DTYPES[name])

    @cache
    def of(kind: str, name: str = "fp32", mode: str = "fast") -> AuditReport:
        layers = () if mode == "fast" else (r"layers\.1\.",)  # all shapes, and half of the work
        return audit(bases[name], tuned(kind, name), mode=mode, layers=layers)

    return of


def words(verdict: Any) -> tuple[str, ...]:
    return (verdict.density, verdict.visible, verdict.direction, verdict.magnitude, verdict.stripes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_update_is_named(found: Any, kind: str) -> None:
    verdict = found(kind).verdicts[0]
    assert words(verdict) == WORDS[kind]
    assert any(SENTENCES[kind] in sentence for sentence in verdict.sentences), verdict.sentences


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_update_that_is_stored_in_bf16(found: Any, kind: str) -> None:
    verdict = found(kind, "bf16").verdicts[0]
    assert words(verdict) == STORED[kind]
    said = SENTENCES["none"] if kind == "sub-ULP" else SENTENCES[kind]
    assert any(said in sentence for sentence in verdict.sentences), verdict.sentences


@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_says_the_same(found: Any, kind: str) -> None:
    report = found(kind, "fp32", "exact")
    assert words(report.verdicts[0]) == WORDS[kind]
    assert {change.route for weight in report.weights for change in weight.changes} <= {"exact", ""}


def figures(report: AuditReport) -> dict[str, float]:
    """What tells the kinds apart, from the pooled figures."""
    row = total(report, 0)
    matrices = [w for w in report.weights if w.changes[0].rows is not None]
    values = {"changed": row.changed / row.entries, "stored": row.stored_changed / row.entries}
    values |= {side: share.value / share.sizes for side, share in row.shares.items() if share.sizes}
    for axis in ("rows", "columns") if row.changed else ():
        values[axis] = summary._excess([(getattr(w.changes[0], axis), w.entries) for w in matrices])
    if row.principal is not None and row.matched is not None and row.matched.ratio is not None:
        values |= {"raw": row.principal.value / row.principal.baseline, "matched": row.matched.ratio}
    return values


# (figure, at least, at most), and what was seen
FIGURES = {
    "none": [("changed", 0, 0), ("stored", 0, 0)],
    "off-principal": [("output", 0, 1e-9), ("input", 0, 1e-9)],  # 2e-12, 2e-12
    "off-left": [("output", 0, 1e-9), ("input", 0.9, 1.1)],  # 2e-12, 1.00
    "principal": [("output", 10, 20), ("input", 10, 20), ("both", 150, 300)],  # 14, 15, 228
    "sub-ULP": [("changed", 0, 0), ("stored", 0.5, 1.0)],  # 0, 1.00
    "rows": [("rows", 1, 3), ("columns", 0, 0.1)],  # 1.79, 0.00
    "columns": [("rows", 0, 0.1), ("columns", 1, 3)],  # 0.00, 1.85
    "blocks": [("rows", 0.5, 2), ("columns", 0.5, 2)],  # 1.01, 0.96
    "magnitude": [("raw", 0.5, 0.75), ("matched", 0.97, 1.03)],  # 0.63, 1.00
    "on-mask": [("raw", 1.3, 1.8), ("matched", 3.5, 4.5)],  # 1.58, 4.00
    "off-mask": [("raw", 0.2, 0.6), ("matched", 0.2, 0.3)],  # 0.38, 0.25
    "dense": [("changed", 0.85, 1), ("both", 0.9, 1.1), ("rows", 0, 0.1), ("columns", 0, 0.1), ("matched", 0.95, 1.05)],
    "random": [
        *(("changed", 0.2, 0.35), ("both", 0.8, 1.3), ("rows", 0, 0.1), ("columns", 0, 0.1)),
        *(("raw", 0.9, 1.1), ("matched", 0.95, 1.05)),
    ],
}


def fits(kind: str, values: dict[str, float]) -> bool:
    return all(low <= values.get(name, math.nan) <= high for name, low, high in FIGURES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_probes_find_what_was_planted(found: Any, kind: str) -> None:
    values = figures(found(kind))
    print(kind, {name: float(f"{value:.3g}") for name, value in values.items()})
    assert fits(kind, values), values


def test_each_kind_is_told_from_each_other(found: Any) -> None:
    values = {kind: figures(found(kind)) for kind in KINDS}
    alike = [(a, b) for a, b in itertools.permutations(KINDS, 2) if fits(a, values[b])]
    assert not alike


# threshold, its wrong value, a kind that it decides, and the word (of WORDS) that must then be another
BROKEN = [
    ("DENSE", 0.01, "dense", 0),
    ("SPARSE", 0.6, "magnitude", 0),
    ("VISIBLE", 0.99, "magnitude", 1),
    ("VISIBLE", 0.5, "dense", 1),
    ("INVISIBLE", -1.0, "sub-ULP", 1),
    ("PREFERS", 1e4, "principal", 2),
    ("PREFERS", 0.5, "random", 2),
    ("AVOIDS", -1.0, "off-principal", 2),
    ("AVOIDS", -1.0, "off-left", 2),
    ("AVOIDS", 1.2, "dense", 2),
    ("SIGMAS", 1e4, "principal", 2),
    ("MATCHED", 9.0, "on-mask", 3),
    ("MATCHED", 9.0, "off-mask", 3),
    ("DEPARTS", 0.5, "magnitude", 3),
    ("DEPARTS", 1e-4, "random", 3),
    ("FEW", 1.0, "random", 3),
    ("STRIPED", 9.0, "rows", 4),
    ("STRIPED", 9.0, "columns", 4),
    ("STRIPED", 9.0, "blocks", 4),
    ("STRIPED", 0.05, "magnitude", 4),
]


@pytest.mark.parametrize(("name", "value", "kind", "place"), BROKEN)
def test_every_threshold_decides(
    found: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: float, kind: str, place: int
) -> None:
    """A threshold that nothing depends on would be a verdict that nothing tests."""
    report = found(kind)
    monkeypatch.setattr(summary, name, value)
    if name in ("PREFERS", "AVOIDS"):  # the larger of two thresholds decides, so the other is out of the way
        monkeypatch.setattr(summary, "SIGMAS", 0.0)
    now = words(summary.judge(report, 0))
    assert now[place] != WORDS[kind][place]


def test_several_planted_updates_in_one_audit(found: Any, tmp_path: Path) -> None:
    """Each gets its own verdict, in the order given."""
    kinds = ("principal", "rows", "off-principal")
    base = write(tmp_path / "base", base_model(BF16))
    tuned = [plant(tmp_path / kind, kind, BF16) for kind in kinds]
    report = audit(base, *tuned, layers=[r"layers\.0\."])
    assert [source.label for source in report.sources] == ["base", *kinds]
    assert [words(verdict) for verdict in report.verdicts] == [STORED[kind] for kind in kinds]
