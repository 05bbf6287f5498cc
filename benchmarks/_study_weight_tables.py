"""The study's tables of what trials did to the weights: each takes a result and gives lines."""

from __future__ import annotations

from typing import Any

from _study_result import Result
from _study_text import interval, markdown, number, percent, rate_text
from study_weights import pooled_figures

from offprincipal_peft.audit import AuditReport
from offprincipal_peft.audit.pooling import labels, pool


def pairs(result: Result, words: list[str]) -> list[str]:
    """What the saved weights say, mean over the seeds, by method and rate."""
    audits = {row["id"]: row for row in result.values["pairs"]}
    rows = [["method", "rate", "test accuracy, %", *PAIRS.values()]]
    for name, by_rate in result.trials.items():
        for rate, trials in sorted(by_rate.items()):
            found = [audits[trial["id"]] for trial in trials if trial["id"] in audits]
            if not found:
                continue
            accuracy = percent(interval([result.last(trial, "accuracy") for trial in trials]))
            cells = [_scaled(key, [row[key] for row in found]) for key in PAIRS]
            rows.append([name, rate_text(rate), accuracy, *cells])
    return markdown(rows)


PAIRS = {
    "relative_norm": "‖ΔW‖/‖W‖",
    "sparsity": "same in bf16, %",
    "shift": "NSS",
    "angle": "largest angle, degrees",
    "share_both_sizes": "energy in U_k and V_k / by its sizes",
    "principal": "on M_princ / chance",
    "low": "on M_low / chance",
    "matched": "on / off M_princ at equal magnitude",
}


def _scaled(key: str, values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    return percent(interval(known)) if key == "sparsity" else number(interval(known))


def audited(report: AuditReport) -> list[str]:
    """The figures of :func:`pairs` from a report of ``offprincipal audit``, one run a row."""
    rows = [["run", *PAIRS.values()]]
    weights = [weight for weight in report.weights if weight.layer is not None and len(weight.shape) == 2]
    for position, label in enumerate(labels(report)):
        found = pooled_figures(pool("all", weights, position), weights, position)
        rows.append([label, *(_scaled(key, [found[key]]) for key in PAIRS)])
    return markdown(rows)


def inputs(values: dict[str, Any]) -> list[str]:
    """What ``study_inputs.py`` found: by start the energy of each kind of inputs, and the last over the first."""
    kinds = list(next(iter(values["energies"].values())))
    rows = [["rows of A", *(f"energy of inputs: {kind}" for kind in kinds), f"{kinds[-1]} / {kinds[0]}"]]
    for start, found in values["energies"].items():
        cells = [found[kind] for kind in kinds] + [found[kinds[-1]] / found[kinds[0]]]
        rows.append([start, *(f"{cell:.2f}" for cell in cells)])
    return markdown(rows)


def consensus(result: Result, words: list[str]) -> list[str]:
    """Jaccard of the trials' changed entries by kind of matrix: same task and others, and what predicts it."""
    found = result.values["consensus"]
    tasks = [trial["task"] for trial in found["trials"]]
    columns = ["observed", "independent", "magnitude", "stripes"]
    head = ["observed", "chance", "magnitude", "magnitude and stripes"]
    spread = ["rows", "columns"]
    groups = ["equal tasks", "different tasks"]
    rows = [
        ["matrices", *(f"{group}: {word}" for group in groups for word in head), *(f"uneven {side}" for side in spread)]
    ]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in found["by_kind"]:
        by_kind.setdefault(row["kind"], []).append(row)
    for kind, pairs_ in {**by_kind, "all": found["pairs"]}.items():
        cells = []
        for same in (True, False):
            chosen = [row for row in pairs_ if (tasks[row["first"]] == tasks[row["second"]]) is same]
            cells += [f"{sum(row[column] for row in chosen) / len(chosen):.3f}" for column in columns]
        uneven = found["unevenness"].get(kind, {})
        rows.append([kind, *cells, *(f"{uneven[side]:.2f}" if side in uneven else "–" for side in spread)])
    return markdown(rows)


def interventions(result: Result, words: list[str]) -> list[str]:
    """By place: overlap with the run in the old basis, entries as they are and carried back; mean over the seeds."""
    rows = [
        [
            "matrices",
            "rate",
            "Jaccard, as it is",
            "as magnitude predicts",
            "Jaccard, carried back",
            "as magnitude predicts",
            "cosine, as it is",
            "cosine, carried back",
        ]
    ]
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result.values["interventions"]["rows"]:
        found.setdefault((row["place"], row["rate"]), []).append(row)
    for (place, rate), group in found.items():
        paths = [(kind, word) for kind in ("as_is", "carried") for word in ("observed", "magnitude")]
        paths += [("cosine", "as_is"), ("cosine", "carried")]
        cells = [number(interval([row[kind][word] for row in group])) for kind, word in paths]
        rows.append([place, rate_text(rate), *cells])
    return markdown(rows)
