"""The report's tables."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..html.charts import number
from ..html.tables import NONE, Table, bytes_text, count_text, digits, per_cent
from .report_data import LevelTable, Method, Study
from .statistics import Interval, points

QUANTITY = {"kl": "KL from the untrained model, nats per token", "update_norm": "norm of the update ‖ΔW‖"}


def show(interval: Interval | None, form: Callable[[float], str], unit: str = "") -> str:
    """ "42.1 [37.6, 47.0]", or the value alone where there is no interval."""
    if interval is None:
        return NONE
    text = form(interval.value) + unit
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return text
    return f"{text} [{form(interval.low)}, {form(interval.high)}]"


def measured(interval: Interval | None, factor: float = 1.0) -> str:
    """A quantity times ``factor`` with one or two digits of its interval's width: "0.697 [0.672, 0.721]"."""
    if interval is None or interval.low is None or interval.high is None or interval.low == interval.high:
        return _value(interval, lambda value: digits(factor * value))
    half = factor * (interval.high - interval.low) / 2
    size = max(abs(factor * interval.value), half)
    if half < 1e-6 * size:
        return digits(factor * interval.value, 3)
    if size < 1e-3:
        return show(interval, lambda value: digits(factor * value))
    first = math.floor(math.log10(half))
    decimals = (1 if half < 3.55 * 10.0**first else 0) - first
    decimals = min(4, max(0, decimals, -math.floor(math.log10(size))))
    return show(interval, lambda value: f"{factor * value:.{decimals}f}".replace("-", "−"))


def accuracy_table(study: Study) -> Table:
    """Accuracy with intervals, and the differences that were tested."""
    other = study.reference.name if study.reference else ""
    several = study.comparisons > 0
    header = ["method", "learning rate", "seeds", "validation, %", "test, % [95 %]", "over untrained, points [95 %]"]
    header += [f"over {other}, points [95 %]", "p (Holm)"] if several else []
    header += ["reward / 10 steps [95 %]"]
    rows = []
    for row in study.rows:
        method = row.method
        validation = method.result("validation_accuracy")
        cells = [method.name, number(method.rate), str(len(method.trials))]
        cells += [per_cent(validation.value) if validation else NONE, show(row.accuracy, per_cent)]
        cells += [show(row.gain, points)]
        if several:
            reference = method is study.reference
            cells += ["reference" if reference else show(row.difference, points)]
            cells += [NONE if row.adjusted_p is None else p_text(row.adjusted_p)]
        rows.append([*cells, measured(row.slope, 10)])
    note = (
        "Each method at the learning rate of its best validation accuracy. Intervals count other items and, with "
        "several seeds, other seeds; each is for its own pair, and Holm's p is for all pairs with the reference "
        "together. The reward's slope is the run's own: its interval holds the noise of prompts and samples."
    )
    return Table("Accuracy", header, rows, [row.method.colour for row in study.rows], note)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def movement_table(study: Study) -> Table:
    """How far the model's outputs moved."""
    header = ["method", "KL, nats/token", "other text, Δ nats/token", "entropy, nats/token", "length, tokens"]
    rows = [
        [
            method.name,
            measured(method.result("kl")),
            measured(method.over_seeds(forgotten)),
            measured(method.result("entropy")),
            measured(method.result("completion_length")),
        ]
        for method in study.methods
    ]
    note = (
        "KL of the trained from the untrained model, and entropy, on the trained model's own samples. Other text: "
        "change of the loss on text that has nothing to do with the task; more is forgetting. Brackets: 95 % over "
        "seeds, where several ran."
    )
    return Table("How far the model moved", header, rows, [m.colour for m in study.methods], note)


def update_table(study: Study) -> Table | None:
    """How large the update of the weights is, and where it lies; None where that was not measured."""
    header = ["method", "‖ΔW‖", "‖ΔW‖/‖W‖, %", "in top U, % (random)", "in top V, % (random)", "unchanged in bf16, %"]
    header += ["spectral shift", "largest angle U / V, °"]
    rows = []
    for method in study.methods:
        angles = [method.geometry(f"angle_{side}_max") for side in ("output", "input")]
        rows.append(
            [
                method.name,
                measured(method.result("update_norm")),
                _value(method.geometry("relative_norm"), lambda v: digits(100 * v)),
                _share(method, "output"),
                _share(method, "input"),
                _value(method.geometry("update_sparsity"), per_cent),
                _value(method.geometry("spectral_shift_mean"), digits),
                NONE if None in angles else " / ".join(_value(angle, digits) for angle in angles),
            ]
        )
    note = (
        "In top U (V): the share of ‖ΔW‖² inside the leading left (right) singular vectors of the starting weights, "
        "and what an update without direction has there. Spectral shift: normalised change of the singular values, "
        "mean over layers. Largest angle: by which the leading left / right subspace of a layer turned."
    )
    if all(cell == NONE for row in rows for cell in row[1:]):
        return None
    return Table("The update of the weights", header, rows, [m.colour for m in study.methods], note)


def forgotten(record: dict[str, object]) -> float | None:
    """Change of the loss on other text, nats per token."""
    result = record.get("result")
    if not isinstance(result, dict):
        return None
    after, before = result.get("forgetting"), result.get("forgetting_base")
    return None if after is None or before is None else float(after) - float(before)


def _share(method: Method, side: str) -> str:
    share, random = method.geometry(f"share_{side}"), method.geometry(f"random_{side}")
    if share is None:
        return NONE
    text = digits(100 * share.value)
    return text if random is None else f"{text} ({digits(100 * random.value)})"


def _value(interval: Interval | None, form: Callable[[float], str]) -> str:
    return NONE if interval is None else form(interval.value)


def cost_table(study: Study) -> Table:
    """What a method needs."""
    header = ["method", "trained parameters", "state beyond the base", "step, s", "peak memory"]
    rows = [
        [
            method.name,
            _value(method.result("trainable_parameters"), count_text),
            _value(method.result("state_bytes"), bytes_text),
            _value(method.result("step_s"), lambda v: digits(v, 3)),
            _value(method.result("peak_memory_bytes"), bytes_text),
        ]
        for method in study.methods
    ]
    note = "Means over seeds. State: adapter and optimiser. Times are comparable only between trials of one machine."
    return Table("Parameters, memory and time", header, rows, [m.colour for m in study.methods], note)


def level_table(study: Study, table: LevelTable) -> Table | str:
    """Accuracy at matched levels, or a sentence that says why there is none."""
    what = QUANTITY[table.quantity]
    if not table.cells and not table.smallest:
        return f"No method has evaluations along the way with its {what.split(',')[0]}."
    if table.span is None:
        return f"There is no common range of {what.split(',')[0]}: {table.smallest} never leaves zero."
    header = ["method", *(f"at {digits(level)}" for level in table.levels)]
    rows, colours = [], []
    for method in study.methods:
        cells = []
        for cell in table.cells.get(method.name, [None] * len(table.levels)):
            text = NONE if cell is None else show(cell[0], per_cent)
            if cell is not None and cell[1] is not None:
                text += f"; {show(cell[1], points)}"
            cells.append(text)
        rows.append([method.name, *cells])
        colours.append(method.colour)
    reference = (
        f"; then the difference to {study.reference.name} in points" if study.comparisons and study.reference else ""
    )
    note = (
        f"Test accuracy, % [95 %]{reference}. Read off each trial's own curve where it first crosses the level, with "
        f"straight lines between evaluations; the levels end where {table.smallest}, which moved least, ends."
    )
    return Table(f"Accuracy at matched {what}", header, rows, colours, note)


def rate_table(study: Study) -> Table | None:
    """Validation accuracy at every learning rate; None where each method ran at one."""
    rates = sorted({rate for method in study.methods for rate in method.rates})
    if all(len(method.rates) < 2 for method in study.methods):
        return None
    rows = []
    for method in study.methods:
        cells = []
        for rate in rates:
            values = [(t.get("result") or {}).get("validation_accuracy") for t in method.rates.get(rate, [])]
            known = [float(value) for value in values if value is not None]
            text = f"{per_cent(sum(known) / len(known))} ({len(known)})" if known else NONE
            cells.append(f"{text} ✓" if rate == method.rate and known else text)
        rows.append([method.name, *cells])
    note = "Mean over seeds, their number in parentheses; ✓ the rate that is compared."
    header = ["method", *(number(rate) for rate in rates)]
    return Table("Validation accuracy, %, by learning rate", header, rows, [m.colour for m in study.methods], note)


def failed_table(study: Study) -> Table | None:
    """Trials that failed, with their message."""
    rows = []
    for record in study.failed:
        error = record.get("error") or {}
        message = str(error.get("message") or "no message")
        message = message if len(message) <= 300 else message[:299] + "…"
        rows.append([str(record["id"]), str(error.get("stage") or NONE), f"{error.get('type') or 'error'}: {message}"])
    return Table("Failed trials", ["trial", "stage", "error"], rows) if rows else None
