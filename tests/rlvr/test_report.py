"""The report says what the records say, for whole, broken, tiny and huge sweeps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pages import Page
from rlvr.records_sample import METHODS, failed_record, record, sweep, write

pytest.importorskip("scipy")

from offprincipal_peft.rlvr.report import ReportError, build_report, write_report
from offprincipal_peft.rlvr.report_data import build_studies
from offprincipal_peft.rlvr.report_findings import cautions, findings
from offprincipal_peft.rlvr.report_tables import measured
from offprincipal_peft.rlvr.statistics import Interval, paired_difference

NOWHERE = Path("/nonexistent")


def markdown_tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            if not set(line) <= {"|", "-"}:
                cells = re.split(r"(?<!\\)\|", line)[1:-1]
                found[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        before = line
    return found


def built(records: list[dict[str, Any]]) -> tuple[Page, str]:
    report = build_report(NOWHERE, records)
    return Page(report.html), report.markdown


CASES: dict[str, list[dict[str, Any]]] = {
    "five methods": sweep(rates=(5e-5, 2e-4, 8e-4)),
    "one trial": [record("offprincipal")],
    "one method": sweep(("lora",), seeds=3),
    "failed only": [failed_record("lora"), failed_record("pissa", seed=1)],
    "one failed": [*sweep(("lora", "safe"), seeds=2), failed_record()],
    "no geometry": sweep(("lora", "safe"), seeds=2, geometry=False),
    "some geometry": [record("lora"), record("safe", geometry=False)],
    "twenty methods": sweep(tuple(f"method-{i:02d}" for i in range(20)), seeds=2, depth=30),
    "many seeds": sweep(("lora", "safe"), seeds=12),
    "two tasks": [*sweep(("lora", "safe")), *sweep(("lora", "safe"), task="reverse")],
    "long names": sweep(("matched(principal) & ~low | thinned(principal)", "lora"), seeds=1),
    "two steps": sweep(("lora", "safe"), steps=2),
    "one step": sweep(("lora", "safe"), steps=1),
}


@pytest.mark.parametrize("case", CASES)
def test_pages_are_whole_and_say_the_same_twice(case: str) -> None:
    page, markdown = built(CASES[case])
    assert page.outside == [] and "script" not in page.tags and "img" not in page.tags
    assert sorted(page.tables) == sorted(markdown_tables(markdown))
    assert all(len({len(row) for row in table}) == 1 for table in page.tables)
    assert page.tags.count("h1") == 1 and page.tags.count("caption") == page.tags.count("table")
    for text in (page.text, markdown):
        assert not re.search(r"\b(nan|inf|None|Interval)\b", text.split("Configuration and environment")[0])


def test_the_numbers_are_those_of_the_records() -> None:
    records = CASES["five methods"]
    page, _ = built(records)
    table = next(t for t in page.tables if "test, % [95 %]" in t[0])
    at = {name: i for i, name in enumerate(table[0])}
    rows = {row[0]: row for row in table[1:]}
    assert next(iter(rows)) == "lora" and set(rows) == set(METHODS)

    def chosen(label: str) -> list[dict[str, Any]]:
        return [r for r in records if r["config"]["label"] == label and r["config"]["learning_rate"] == 2e-4]

    def last(r: dict[str, Any]) -> list[int]:
        return max((e for e in r["evaluations"] if e["split"] == "test"), key=lambda e: e["step"])["correct"]

    for label, row in rows.items():
        accuracy = sum(r["result"]["test_accuracy"] for r in chosen(label)) / 3
        assert row[at["test, % [95 %]"]].startswith(f"{100 * accuracy:.1f} [")
        assert row[at["learning rate"]] == "2e−4" and row[at["seeds"]] == "3"
    found = paired_difference([last(r) for r in chosen("safe")], [last(r) for r in chosen("lora")])
    assert found.low is not None
    expected = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}".replace("-", "−")
    assert rows["safe"][at["over lora, points [95 %]"]].startswith(expected)
    assert rows["lora"][at["over lora, points [95 %]"]] == "reference"


def test_findings_do_not_overclaim() -> None:
    study = build_studies(CASES["five methods"])[0]
    text = " ".join(findings(study))
    assert "pissa is worse than lora by" in text and "All 5 methods improved" in text
    twins = build_studies([*sweep(("lora",), seeds=2), *sweep(("safe",), seeds=2, quality=METHODS["lora"])])[0]
    text = " ".join(findings(twins))
    assert "cannot tell safe and lora apart" in text and "better" not in text
    one = build_studies(sweep(("lora", "pissa"), seeds=1))[0]
    assert "conditional on the one seed" in " ".join(findings(one))
    assert "one seed" in " ".join(cautions(one))


def test_many_clear_differences_are_one_finding() -> None:
    records = sweep(("lora",), seeds=2)
    records += sweep(tuple(f"m{i}" for i in range(9)), seeds=2, quality=(0.1, 0.05, 0.1))
    found = findings(build_studies(records)[0])
    assert sum("than lora" in text for text in found) == 1
    assert "also after Holm's correction for 9 comparisons" in " ".join(found)
    records += sweep(tuple(f"twin{i}" for i in range(4)), seeds=2, quality=METHODS["lora"])
    found = findings(build_studies(records)[0])
    clear = next(text for text in found if "than lora" in text)
    unclear = next(text for text in found if "cannot tell" in text)
    assert all((f"twin{i}" in unclear) and (f"twin{i}" not in clear) for i in range(4))


def test_cautions_name_what_differs() -> None:
    records = [record("lora"), record("safe", rank=64)]
    assert "rank (16, 64)" in " ".join(cautions(build_studies(records)[0]))
    edge = sweep(("lora", "safe"), rates=(2e-4, 8e-4))
    assert "did best at the smallest learning rate" in " ".join(cautions(build_studies(edge)[0]))
    uneven = [*sweep(("lora",), rates=(1e-4, 2e-4, 4e-4)), *sweep(("safe",))]
    assert "different numbers of learning rates" in " ".join(cautions(build_studies(uneven)[0]))
    rare = " ".join(cautions(build_studies(sweep(("lora", "safe"), steps=1))[0]))
    assert "only 2 evaluations" in rare and "evaluations" not in " ".join(cautions(build_studies(records)[0]))
    items = [record("lora", items=256), record("safe", items=100)]
    study = build_studies(items)[0]
    assert "could not be compared item by item" in " ".join(cautions(study))
    assert all(row.difference is None for row in study.rows)


def test_a_failed_trial_is_shown_with_its_message_and_escaped() -> None:
    nasty = "<script>alert('x')</script> | `code` & \n\n# more"
    records = [
        *sweep(("lora",), seeds=1),
        failed_record("<img src=x onerror=1>", nasty),
        record('"><b>', geometry=False),
    ]
    page, markdown = built(records)
    assert "script" not in page.tags and "img" not in page.tags and page.tags.count("b") < 30
    cell = next(t for t in page.tables if t[0] == ["trial", "stage", "error"])[1]
    assert cell[1:] == ["train", f"FloatingPointError: {nasty}"]
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert "\n# more" not in markdown


def test_an_unfinished_sweep_says_what_is_missing(tmp_path: Path) -> None:
    records = [*sweep(("lora",), seeds=2), failed_record()]
    folder = write(tmp_path / "sweep", records, [r["id"] for r in records] + ["a", "b"])
    report = build_report(folder)
    text = "2 of 5 trials finished, 1 failed, 2 are still to run."
    assert text in report.html and text in report.markdown


def test_write_report_puts_both_beside_the_trials(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", sweep(("lora",), seeds=1))
    paths = write_report(folder)
    assert [p.name for p in paths] == ["report.html", "report.md"]
    assert [p.read_text(encoding="utf-8")[:9] for p in paths] == ["<!doctype", "# GRPO on"]
    before = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_report(folder)] == before
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md", "trials"]


def test_folders_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"trials holds no trial's record"):
        build_report(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "trials": ["a"]}))
    with pytest.raises(ReportError, match="expects 1, none has ended"):
        build_report(tmp_path)
    for text in ("{", "[]", '{"trials": 3}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ReportError, match=r"sweep\.json"):
            build_report(tmp_path)


def test_records_with_holes_still_make_a_report() -> None:
    records = sweep(("lora", "safe"), seeds=2)
    for made in records:
        for name in ("kl", "update_norm", "step_s", "state_bytes", "forgetting"):
            made["result"][name] = None
        for evaluation in made["evaluations"]:
            evaluation["update_norm"] = evaluation["kl"] = None
        for point in made["curve"]:
            point["reward"] = point["reward_std"] = None
        made["geometry"]["layers"][0] |= {"share_output": None, "relative_norm": None}
        made["geometry"]["layers"].append({"name": "lm_head", "shape": [4, 4]})
        made["geometry"]["summary"] = {}
    page, _ = built(records)
    assert "No method has evaluations along the way" in page.text
    for made in records:
        made |= {"geometry": {"history": [], "layers": [], "summary": {}}, "evaluations": [], "checks": {}}
        made["result"] = {"test_accuracy": 0.25}
    page, markdown = built(records)
    assert "25.0" in markdown
    assert "Where the update lies" not in page.text and "The update of the weights" not in markdown


def test_a_trial_that_never_moved_leaves_no_common_range() -> None:
    still = record("safe", quality=(0.05, 0.0, 0.1))
    page, _ = built([record("lora"), still])
    assert "There is no common range of KL from the untrained model: safe never leaves zero." in page.text


def test_a_method_keeps_its_colour_everywhere() -> None:
    report = build_report(NOWHERE, CASES["five methods"])
    for name in METHODS:
        found = re.findall(rf'class="swatch (c\d d\d)"></i>(?:<span>)?{name}<', report.html)
        found += re.findall(rf'class="(?:line|mark) (c\d d\d)"><title>{name}[<:]', report.html)
        assert len(found) > 8 and len(set(found)) == 1, name
    twenty = build_report(NOWHERE, CASES["twenty methods"]).html
    styles = set(re.findall(r'class="swatch (c\d d\d)"', twenty))
    assert len(styles) == 20


def test_intervals_are_readable() -> None:
    assert measured(Interval(0.6969, 0.6724, 0.7214, 0.95, 3)) == "0.697 [0.672, 0.721]"
    assert measured(Interval(0.7, 0.7 - 1e-16, 0.7 + 1e-16, 0.95, 3)) == "0.7" and measured(None) == "–"


def test_equal_kl_does_not_depend_on_how_often_it_was_evaluated() -> None:
    """Two methods on one path, where accuracy grows with the norm and KL with its square, one evaluated seldom."""
    records = []
    for label, points in (("lora", [0.0, 0.1, 0.2, 0.3, 0.4]), ("pissa", [0.0, 0.4])):
        one = record(label, items=1000)
        one["evaluations"] = [
            {
                "step": i,
                "split": "test",
                "accuracy": d,
                "correct": [int(item < 1000 * d) for item in range(1000)],
                "kl": d * d,
                "update_norm": d,
            }
            for i, d in enumerate(points)
        ]
        records.append(one)
    (study,) = build_studies(records)
    for table in study.matched:
        assert len(table.levels) == 3
        for level, *cells in zip(table.levels, table.cells["lora"], table.cells["pissa"], strict=True):
            expected = level**0.5 if table.quantity == "kl" else level
            for cell in cells:
                assert cell is not None and abs(cell[0].value - expected) < 1e-6  # in the KL itself: 0.1 for 0.2
