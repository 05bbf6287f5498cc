"""The report's figures: what each one shows of a study, and the words beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..html.charts import Bar, Frame, Series, escape, forest, heatmap, layer_place, limits, lines, number, style
from ..html.page import figure_html, legend
from .report_data import Method, Study, curve, evaluations, figure, mean_curve
from .statistics import mean_accuracy

MOST_TOGETHER = 5  # more lines than this get a panel each


def overview(study: Study) -> str:
    """Accuracy of every method and its difference to the reference, with intervals."""
    bars = [
        Bar(row.method.name, row.method.colour, *(_scaled(row.accuracy.value, row.accuracy.low, row.accuracy.high)))
        for row in study.rows
        if row.accuracy is not None
    ]
    if not bars:
        return ""
    base = study.base_accuracy
    line = None if base is None else 100 * base
    text = "Test items solved, with 95 % intervals." + (" Dashed: the untrained model." if line is not None else "")
    parts = [figure_html("Accuracy.", text, forest("Test accuracy", "test accuracy, %", bars, line, text))]
    differences = [
        Bar(row.method.name, row.method.colour, *_scaled(row.difference.value, row.difference.low, row.difference.high))
        for row in study.rows
        if row.difference is not None
    ]
    if differences and study.reference:
        text = "On the same items; an interval over the dashed line leaves open which of the two is better."
        name = f"Difference to {study.reference.name}"
        parts.append(figure_html(f"{name}.", text, forest(name, "points of accuracy", differences, 0.0, text)))
    return f'<div class="pair">{"".join(parts)}</div>'


def _scaled(value: float, low: float | None, high: float | None) -> tuple[float, float | None, float | None]:
    return 100 * value, None if low is None else 100 * low, None if high is None else 100 * high


def reward_curves(study: Study) -> str:
    """Training reward by step with bands."""
    series, bands = [], set()
    for method in study.methods:
        steps, values = mean_curve(method.trials, "reward")
        if not steps:
            continue
        mean = values.mean(axis=0)
        low: np.ndarray | None = values.min(axis=0)
        high: np.ndarray | None = values.max(axis=0)
        if len(values) == 1:
            spread = dict(zip(*curve(method.trials[0], "reward_std"), strict=True))
            known = all(step in spread for step in steps)
            config = method.trials[0]["config"]
            completions = config["prompts_per_step"] * config["group_size"]
            width = 2 * np.asarray([spread.get(step, 0.0) for step in steps]) / math.sqrt(completions)
            low, high = (mean - width, mean + width) if known else (None, None)
            bands |= {"two standard errors, completions taken as independent (one seed)"} if known else set()
        else:
            bands.add("from the lowest to the highest seed")
        band = [None if side is None else side.tolist() for side in (low, high)]
        series.append(Series(method.name, method.colour, steps, mean.tolist(), band[0], band[1]))
    if not series:
        return ""
    text = "Mean reward of each step's completions."
    text += f" Band: {' or '.join(sorted(bands))}." if bands else ""
    frame = Frame("Training reward", "step", "reward", whole_x=True, width=560.0)
    apart = len(series) > 4 and bool(bands)
    return _together_or_apart("Training reward.", text, frame, series, study.methods, apart)


def trade_off(study: Study, quantity: str) -> str:
    """Test accuracy against how far the model went, along each trial."""
    series = []
    for method in study.methods:
        paths = []
        for trial in method.trials:
            found = [(e[quantity], e["accuracy"]) for e in evaluations(trial) if e.get(quantity) is not None]
            if len(found) > 1:
                paths.append(found)
        series += [
            Series(method.name, method.colour, [x for x, _ in path], [y for _, y in path], dots=True) for path in paths
        ]
    if not series:
        return ""
    ends = [s.x[-1] for s in series if s.x[-1] > 0]
    log = bool(ends) and max(ends) > 20 * min(ends)
    if log:
        series = [s for s in map(_positive, series) if len(s.x)]
    label, title = (
        ("KL from the untrained model, nats per token", "Accuracy against KL.")
        if quantity == "kl"
        else ("norm of the update, ‖ΔW‖", "Accuracy against the size of the update.")
    )
    base = study.base_accuracy
    text = "One line a trial, from its start to its end; higher and further left is better."
    text += " Dashed: the untrained model." if base is not None else ""
    frame = Frame(title.rstrip("."), label, "test accuracy, %", log_x=log, percent=True, base=base)
    return _together_or_apart(title, text, frame, series, study.methods)


def _positive(series: Series) -> Series:
    """Without its points at zero, which a logarithmic axis does not have."""
    kept = [(x, y) for x, y in zip(series.x, series.y, strict=True) if x > 0]
    return Series(series.name, series.colour, [x for x, _ in kept], [y for _, y in kept], dots=True)


def rate_sensitivity(study: Study) -> str:
    """Validation accuracy by learning rate, where a method ran at several."""
    series = []
    for method in study.methods:
        points = []
        for rate, trials in sorted(method.rates.items()):
            rows = [e[-1]["correct"] for t in trials if (e := evaluations(t, "validation")) and e[-1].get("correct")]
            values = [(t.get("result") or {}).get("validation_accuracy") for t in trials]
            known = [float(value) for value in values if value is not None]
            if len(rows) == len(trials) and len({len(row) for row in rows}) == 1:
                found = mean_accuracy(np.asarray(rows, dtype=float))
                points.append((rate, found.value, found.low or 0.0, found.high or 1.0))
            elif known:
                mean = sum(known) / len(known)
                points.append((rate, mean, mean, mean))
        if points:
            x, y, low, high = (list(column) for column in zip(*points, strict=True))
            ring = x.index(method.rate) if method.rate in x else None
            series.append(Series(method.name, method.colour, x, y, low, high, dots=True, ring=ring))
    if not any(len(s.x) > 1 for s in series):
        return ""
    rates = sorted({x for s in series for x in s.x})
    frame = Frame("Learning rate", "learning rate", "validation accuracy, %", log_x=True, percent=True)
    frame.x_ticks = rates if len(rates) <= 6 else ()
    text = "Validation accuracy with 95 % intervals; the ring marks the rate that is compared."
    if 2 < len(series) <= MOST_TOGETHER:  # bands would cover each other
        series = [Series(s.name, s.colour, s.x, s.y, dots=True, ring=s.ring) for s in series]
        text = text.replace(" with 95 % intervals", ", mean over seeds")
    return _together_or_apart("Learning rate.", text, frame, series, study.methods)


def _together_or_apart(
    title: str, text: str, frame: Frame, series: list[Series], methods: Sequence[Method], apart: bool = False
) -> str:
    """One chart for few methods; for many a panel each, with the others behind it in grey."""
    present = {s.name for s in series}
    shown = [method for method in methods if method.name in present]
    if len(shown) <= MOST_TOGETHER and not apart:
        ends = ", ".join(f"{s.name} ends at {number(s.y[-1])}" for s in series[:MOST_TOGETHER])
        return figure_html(title, text, lines(frame, series, ends) + legend([(m.name, m.colour) for m in shown]))
    span = limits(frame, series)
    panels = []
    for method in shown:
        mine = [s for s in series if s.name == method.name]
        others = [Series(s.name, s.colour, s.x, s.y, faint=True) for s in series if s.name != method.name]
        small = Frame(method.name, frame.x_label, frame.y_label, frame.log_x, frame.whole_x, frame.percent)
        small.width, small.height, small.limits, small.base = 230.0, 165.0, span, frame.base
        small.x_ticks = frame.x_ticks[:: max(1, len(frame.x_ticks) // 2)]
        small.x_label, small.y_label = frame.x_label.split(",")[0].replace(" from the untrained model", ""), ""
        head = f'<p class="panel"><i class="swatch {style(method.colour)}"></i>{escape(method.name)}</p>'
        panels.append(f"<div>{head}{lines(small, others + mine)}</div>")
    note = f"{text} Up: {frame.y_label}. Grey: the other methods."
    return figure_html(title, note, f'<div class="panels">{"".join(panels)}</div>', "wide")


def layer_maps(study: Study) -> str:
    """Where in the network the update lies: principal share against random, and relative size."""
    cells = {method.name: _layer_cells(method) for method in study.methods}
    shown = [method for method in study.methods if cells[method.name]]
    if not shown:
        return ""
    places = [place for method in shown for place in cells[method.name]]
    modules = list(dict.fromkeys(module for module, _ in places))
    depth = max(block for _, block in places) + 1
    norms = [norm for method in shown for _, norm in cells[method.name].values() if norm is not None]
    top = max(norms, default=0.0)
    shares = _maps(
        shown,
        modules,
        depth,
        ("cold", "hot"),
        lambda m: {p: v[0] for p, v in cells[m.name].items() if v[0] is not None},
    )
    sizes = _maps(
        shown,
        modules,
        depth,
        ("hot", "accent"),
        lambda m: {p: math.sqrt(v[1] / top) for p, v in cells[m.name].items() if v[1] is not None and top > 0},
    )
    parts = []
    if shares:
        text = (
            "Share of the update's energy in the leading left singular vectors, against that of an undirected update. "
            "Columns are depth."
        )
        key = '<p class="key">8 × less<i class="shares"></i>8 × more</p>'
        parts.append(figure_html("Principal share by layer.", text, key + shares, "wide"))
    if sizes:
        text = (
            f"‖ΔW‖/‖W‖ of each layer; the full colour is {number(float(f'{100 * top:.2g}'))} %, on a square root scale."
        )
        parts.append(figure_html("Relative size by layer.", text, sizes, "wide"))
    return "".join(parts)


def _maps(
    methods: Sequence[Method],
    modules: list[str],
    depth: int,
    classes: tuple[str, str],
    read: Callable[[Method], dict[tuple[str, int], float]],
) -> str:
    panels = []
    for method in methods:
        if found := read(method):
            head = f'<p class="panel"><i class="swatch {style(method.colour)}"></i>{escape(method.name)}</p>'
            panels.append(f"<div>{head}{heatmap(method.name, found, modules, depth, classes)}</div>")
    return f'<div class="panels maps">{"".join(panels)}</div>' if panels else ""


def _layer_cells(method: Method) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    """(module, depth) → (log₈ of share / random share, relative norm), means over seeds."""
    found: dict[tuple[str, int], list[tuple[float | None, float | None]]] = {}
    for trial in method.trials:
        for layer in (trial.get("geometry") or {}).get("layers") or []:
            place = layer_place(str(layer.get("name", "")))
            if place is None:
                continue
            share, random = figure(layer, "share_output"), figure(layer, "random_output")
            ratio = None
            if share is not None and random:
                ratio = math.log(max(share / random, 1e-3), 8)
            found.setdefault(place, []).append((ratio, figure(layer, "relative_norm")))
    return {place: (_mean([r for r, _ in v]), _mean([n for _, n in v])) for place, v in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
