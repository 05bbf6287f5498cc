"""From trial records to what a report shows: which trials form a comparison, and each method's figures with intervals.

One :class:`Study` is one model (a quantised one is another), task and algorithm. Each method enters with its selected
learning rate; the other rates appear only where their effect is shown. Numbers that a record lacks stay None all the
way to the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from .config import LATER
from .slopes import run_slope
from .statistics import (
    Difference,
    Interval,
    at_level,
    common_range,
    holm,
    levels,
    mean_accuracy,
    mean_interval,
    method_names,
    model_name,
    paired_difference,
    select_learning_rates,
)

Record = dict[str, Any]
REFERENCE = "lora"
# Config fields that a comparison is not about; all others are told apart into shared and differing.
_NOT_SHARED = {
    "label",
    "method",
    "method_options",
    "learning_rate",
    "seed",
    "model",
    "quantization",
    "task",
    "algorithm",
}


@dataclass
class Method:
    """One method at its selected learning rate: its finished trials, by seed, and the figures over them."""

    name: str
    colour: int
    rate: float
    trials: list[Record]
    rates: dict[float, list[Record]]  # every rate that was tried, finished trials only

    @property
    def seeds(self) -> list[int]:
        return [int(trial["config"]["seed"]) for trial in self.trials]

    def over_seeds(self, read: Callable[[Record], Any]) -> Interval | None:
        """Mean over seeds of a number of a record; None where a trial lacks it."""
        values = [read(trial) for trial in self.trials]
        return None if not values or any(not _is_number(value) for value in values) else mean_interval(values)

    def result(self, name: str) -> Interval | None:
        return self.over_seeds(lambda trial: (trial.get("result") or {}).get(name))

    def geometry(self, name: str) -> Interval | None:
        return self.over_seeds(lambda trial: figure((trial.get("geometry") or {}).get("summary"), name))

    def correct(self, split: str = "test", first: bool = False) -> np.ndarray | None:
        """(seeds, items) of 0 and 1 at the last (or first) evaluation; None where a trial lacks it."""
        rows = []
        for trial in self.trials:
            found = [e for e in evaluations(trial, split) if e.get("correct")]
            if not found:
                return None
            rows.append(found[0 if first else -1]["correct"])
        return np.asarray(rows, dtype=float) if rows and len({len(row) for row in rows}) == 1 else None


@dataclass
class Row:
    """What the tables say of one method."""

    method: Method
    accuracy: Interval | None
    difference: Difference | None = None  # to the reference, on the same items
    adjusted_p: float | None = None
    gain: Difference | None = None  # to the untrained model, on the same items
    slope: Interval | None = None


@dataclass
class LevelTable:
    """Accuracy of every method where its curve first crosses each level of ``quantity``."""

    quantity: str  # "kl" or "update_norm"
    span: tuple[float, float] | None
    levels: list[float] = field(default_factory=list)
    # method name → per level: (accuracy, difference to the reference), None where not reached
    cells: dict[str, list[tuple[Interval, Difference | None] | None]] = field(default_factory=dict)
    smallest: str = ""  # the method that ends the common range


@dataclass
class Study:
    """One model, task and algorithm."""

    model: str
    task: str
    algorithm: str
    rows: list[Row]
    reference: Method | None
    records: list[Record]
    failed: list[Record]
    left_out: list[str]
    matched: list[LevelTable]

    @property
    def methods(self) -> list[Method]:
        return [row.method for row in self.rows]

    @property
    def base_accuracy(self) -> float | None:
        values = [(trial.get("result") or {}).get("base_accuracy") for m in self.methods for trial in m.trials]
        known = [float(value) for value in values if _is_number(value)]
        return sum(known) / len(known) if known else None

    @property
    def comparisons(self) -> int:
        return sum(row.difference is not None for row in self.rows)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def figure(values: Any, name: str) -> float | None:
    """A number of the geometry's summary or of one of its layers; None where it is missing or null."""
    value = values.get(name) if isinstance(values, dict) else None
    return float(value) if _is_number(value) else None


def evaluations(record: Record, split: str = "test") -> list[dict[str, Any]]:
    """The record's evaluations on ``split``, by step."""
    found = [e for e in record.get("evaluations") or [] if e.get("split") == split]
    return sorted(found, key=lambda e: e["step"])


def curve(record: Record, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the training curve, without points that have no number."""
    found = [(p["step"], p[name]) for p in record.get("curve") or [] if _is_number(p.get(name))]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def mean_curve(trials: Sequence[Record], name: str) -> tuple[list[float], np.ndarray]:
    """Steps that every trial has and the values there, (seeds, steps)."""
    curves = [dict(zip(*curve(trial, name), strict=True)) for trial in trials]
    steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    return steps, np.asarray([[c[step] for step in steps] for c in curves])


def build_studies(records: Sequence[Record]) -> list[Study]:
    """The comparisons in ``records``, ordered by model, task and algorithm."""
    names = method_names(records)
    ordered = sorted(set(names.values()), key=lambda name: (name != REFERENCE, name))
    colours = {name: index for index, name in enumerate(ordered)}
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        config = record["config"]
        key = model_name(config), str(config["task"]), str(config["algorithm"])
        groups.setdefault(key, []).append(record)
    return [_study(key, groups[key], names, colours) for key in sorted(groups)]


def _study(key: tuple[str, str, str], records: list[Record], names: dict[str, str], colours: dict[str, int]) -> Study:
    selection = select_learning_rates(records)
    methods = []
    for name in sorted({names[record["id"]] for record in records}):
        finished = [r for r in records if names[r["id"]] == name and r["status"] == "finished"]
        rates: dict[float, list[Record]] = {}
        for record in sorted(finished, key=lambda r: r["config"]["seed"]):
            rates.setdefault(float(record["config"]["learning_rate"]), []).append(record)
        if not rates:
            continue
        # Without a validation accuracy there is nothing to select by; left_out says so.
        rate = selection.rates.get((name, *key), min(rates))
        methods.append(Method(name, colours[name], rate, rates[rate], rates))
    reference = next((m for m in methods if m.name == REFERENCE), None)
    if reference is None and methods:
        reference = max(methods, key=lambda m: (len(m.trials), -m.colour))
    rows = [_row(method, reference) for method in methods]
    compared = [row for row in rows if row.difference is not None]
    for row, p in zip(compared, holm([row.difference.p for row in compared if row.difference]), strict=True):
        row.adjusted_p = p
    rows.sort(key=lambda row: (row.method is not reference, -(row.accuracy.value if row.accuracy else -1.0)))
    matched = [_matched(methods, reference, quantity) for quantity in ("kl", "update_norm")]
    matched = matched if len(methods) > 1 else []  # with whom?
    failed = [record for record in records if record["status"] == "failed"]
    return Study(*key, rows, reference, records, failed, selection.left_out, matched)


def _row(method: Method, reference: Method | None) -> Row:
    correct = method.correct()
    accuracy = mean_accuracy(correct) if correct is not None else method.result("test_accuracy")
    row = Row(method, accuracy, slope=_reward_slope(method))
    before = method.correct(first=True)
    if correct is not None and before is not None and evaluations(method.trials[0])[0]["step"] == 0:
        row.gain = paired_difference(correct, before)
    other = reference.correct() if reference is not None and reference is not method else None
    if reference is not None and correct is not None and other is not None and correct.shape[1] == other.shape[1]:
        row.difference = paired_difference(correct, other, same_seeds=method.seeds == reference.seeds)
    return row


def _reward_slope(method: Method) -> Interval | None:
    steps, values = mean_curve(method.trials, "reward")
    return run_slope(values.mean(axis=0).tolist(), steps) if len(steps) >= 2 else None


def _matched(methods: Sequence[Method], reference: Method | None, quantity: str) -> LevelTable:
    """Each trial's own curve, read where it first crosses levels that every trial reaches."""
    curves = {}
    for method in methods:
        found = [_level_curve(trial, quantity) for trial in method.trials]
        if all(len(x) > 1 for x, _ in found):
            curves[method.name] = found
    span = common_range([x for found in curves.values() for x, _ in found])
    ends = {name: min(max(x) for x, _ in found) for name, found in curves.items()}
    table = LevelTable(quantity, span, smallest=min(ends, key=lambda name: ends[name]) if ends else "")
    if span is None:
        return table
    table.levels = levels(span)
    by_name = {method.name: method for method in methods}
    at = {name: [_read(found, level, quantity) for level in table.levels] for name, found in curves.items()}
    for name, cells in at.items():
        table.cells[name] = []
        for place, cell in enumerate(cells):
            other = at.get(reference.name, [None] * len(cells))[place] if reference else None
            difference = None
            if cell is not None and other is not None and reference and name != reference.name:
                same = by_name[name].seeds == reference.seeds
                if cell.shape[1] == other.shape[1]:
                    difference = paired_difference(cell, other, same_seeds=same)
            table.cells[name].append(None if cell is None else (mean_accuracy(cell), difference))
    return table


def _level_curve(trial: Record, quantity: str) -> tuple[list[float], np.ndarray]:
    found = [e for e in evaluations(trial) if _is_number(e.get(quantity)) and e.get("correct")]
    same = [e for e in found if len(e["correct"]) == len(found[0]["correct"])]
    return [float(e[quantity]) for e in same], np.asarray([e["correct"] for e in same], dtype=float)


def _read(curves: Sequence[tuple[list[float], np.ndarray]], level: float, quantity: str) -> np.ndarray | None:
    """(seeds, items): each item's correctness where each seed's curve crosses ``level``.

    By straight lines in the norm of the update, or in the root of the KL, which grows like the norm: in the KL itself a
    method whose first evaluation is already far away would be read too low.
    """
    root: Callable[[float], float] = math.sqrt if quantity == "kl" else float
    rows = [at_level([root(max(value, 0.0)) for value in x], y, root(level)) for x, y in curves]
    return None if any(row is None for row in rows) or len({len(row) for row in rows}) > 1 else np.asarray(rows)


def config_fields(records: Sequence[Record]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(fields that all trials share, fields in which they differ with the values), method and seed apart."""
    shared: dict[str, Any] = {}
    differing: dict[str, list[Any]] = {}
    for name in sorted({key for record in records for key in record["config"]} - _NOT_SHARED):
        values: list[Any] = []
        for record in records:
            value = record["config"].get(name, LATER.get(name))
            if value not in values:
                values.append(value)
        if len(values) == 1:
            shared[name] = values[0]
        else:
            differing[name] = values
    return shared, differing
