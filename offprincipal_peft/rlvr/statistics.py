"""How sure a comparison is: intervals for accuracies and differences, and the sentences that they allow.

Every interval was chosen by its simulated coverage (``tests/rlvr/test_statistics.py`` repeats the simulations). Those
of a reward curve's slope are in :mod:`.slopes`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import LATER

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """``value`` with its interval, whose ends are None where the data allow none; ``n`` is the number of points."""

    value: float
    low: float | None
    high: float | None
    level: float
    n: int

    def excludes(self, point: float) -> bool:
        """Whether ``point`` lies outside of the interval; False where there is none."""
        return self.low is not None and self.high is not None and not self.low <= point <= self.high


@dataclass(frozen=True)
class Difference(Interval):
    """An interval of a difference; ``n`` items, ``seeds`` runs of each side (the fewer), ``p`` two-sided for zero."""

    p: float
    seeds: int


def proportion(correct: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Share of ones in ``correct`` (items,) with Wilson's score interval (Wilson 1927)."""
    x = _matrix(correct, "correct")[0] if np.ndim(correct) == 1 else None
    if x is None:
        raise ValueError(f"a proportion needs one row of 0 and 1, not shape {np.shape(correct)}")
    n, share = len(x), float(x.mean())
    z = float(scipy_module("stats").norm.ppf(tails(level)[1]))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level, n)


def mean_accuracy(correct: np.ndarray | Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """Mean of ``correct`` (seeds, items), for other items and other seeds: Wilson with one seed, else crossed effects.

    Two right and two wrong pseudo-items keep the interval open at 0 and 1 (Agresti & Coull 1998).
    """
    x = _matrix(correct, "correct")
    if len(x) == 1:
        return proportion(x[0], level)
    padded = np.concatenate([x, np.tile([1.0, 1.0, 0.0, 0.0], (len(x), 1))], axis=1)
    variance, df = _crossed([padded], [1.0])
    half = float(scipy_module("stats").t.ppf(tails(level)[1], df)) * math.sqrt(variance)
    centre = float(padded.mean())
    return Interval(float(x.mean()), max(0.0, centre - half), min(1.0, centre + half), level, x.shape[1])


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of one number per seed with Student's t interval; none with one value."""
    x = _matrix(values, "values")[0]
    if len(x) == 1:
        return Interval(float(x[0]), None, None, level, 1)
    half = float(scipy_module("stats").t.ppf(tails(level)[1], len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, level, len(x))


def paired_difference(a: Any, b: Any, *, same_seeds: bool = True, level: float = LEVEL) -> Difference:
    """Mean of ``a`` minus mean of ``b``, each (seeds, items) or (items,) with the same items in the same order.

    Items and seeds are crossed random effects (for other items and other seeds): the variance is that of the item
    means plus that of the seed means less their shared rest, each from its mean square, with Satterthwaite's degrees of
    freedom. With one seed on either side only items vary and the result is conditional on that seed. One pseudo-item
    won by each side keeps the interval open where all items agree (Bonett & Price 2012).

    Args:
        same_seeds: row s of ``a`` and of ``b`` share a seed, so their difference is one number per seed. Rows of
            unequal count are never paired.

    Raises ``ValueError`` for other items, empty input or numbers that are not finite.
    """
    first, second = _matrix(a, "a"), _matrix(b, "b")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a has {first.shape[1]} items and b {second.shape[1]}: a pair is compared on the same items in one order"
        )
    seeds = min(len(first), len(second))
    value = float(first.mean() - second.mean())
    sides = [np.concatenate([x, np.tile(pad, (len(x), 1))], axis=1) for x, pad in ((first, [1, 0]), (second, [0, 1]))]
    if len(first) == len(second) and (same_seeds or seeds == 1):
        variance, df = _crossed([sides[0] - sides[1]], [1.0])
    elif seeds == 1:
        variance, df = _crossed([sides[0].mean(axis=0, keepdims=True) - sides[1].mean(axis=0, keepdims=True)], [1.0])
    else:
        variance, df = _crossed(sides, [1.0, -1.0])
    t = scipy_module("stats").t
    centre, error = float(sides[0].mean() - sides[1].mean()), math.sqrt(variance)
    half = float(t.ppf(tails(level)[1], df)) * error
    p = float(2 * t.sf(abs(centre) / error, df))
    return Difference(value, max(-1.0, centre - half), min(1.0, centre + half), level, first.shape[1], p, seeds)


def _crossed(sides: list[np.ndarray], signs: list[float]) -> tuple[float, float]:
    """Variance of the signed sum of the sides' means and its degrees of freedom; a side is (seeds, items).

    The sides share their items and not their seeds. With one seed (and then one side) only items count.
    """
    items = sides[0].shape[1]
    by_item = sum(sign * side.mean(axis=0) for sign, side in zip(signs, sides, strict=True))
    v_items = float(np.var(by_item, ddof=1)) / items
    parts = [(v_items, items - 1)]
    v_rest = 0.0
    v_seeds = 0.0
    if min(len(side) for side in sides) > 1:
        for side in sides:
            by_seed = side.mean(axis=1)
            seeds = len(by_seed)
            rest = side - side.mean(axis=0) - by_seed[:, None] + side.mean()
            shared = float(np.square(rest).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
            own = float(np.var(by_seed, ddof=1)) / seeds
            parts += [(own, seeds - 1), (shared, (seeds - 1) * (items - 1))]
            v_seeds, v_rest = v_seeds + own, v_rest + shared
    variance = max(v_items + v_seeds - v_rest, v_items, v_seeds)
    return variance, variance**2 / sum(part**2 / df for part, df in parts)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the given order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def statement(a: str, b: str, difference: Difference, adjusted_p: float | None = None, comparisons: int = 1) -> str:
    """One plain sentence on the difference of accuracy ``a`` − ``b``, in points (hundredths).

    Args:
        adjusted_p: Holm's p among ``comparisons`` of them; above 1 − level it is said that the finding does not hold.
    """
    assert difference.low is not None and difference.high is not None
    low, high = difference.low, difference.high
    tail = "" if difference.seeds > 1 else ", conditional on the one seed that was run"
    if not difference.excludes(0.0):
        width = f"{points(difference.value)} points [{points(low)}, {points(high)}]"
        return f"The data cannot tell {a} and {b} apart (difference {width}){tail}."
    ends = sorted((abs(100 * low), abs(100 * high)))
    size = f"{abs(100 * difference.value):.1f} points [{ends[0]:.1f}, {ends[1]:.1f}]"
    if comparisons > 1 and adjusted_p is not None:
        p = "< 0.001" if adjusted_p < 0.001 else f"= {adjusted_p:.2g}"
        held = adjusted_p <= 1 - difference.level + 1e-12
        outcome = "" if held else f", but not after Holm's correction for {comparisons} comparisons"
        tail += f"{outcome} (Holm's p {p})"
    return f"{a} is {'better' if difference.value > 0 else 'worse'} than {b} by {size}{tail}."


def points(share: float) -> str:
    """A difference of shares in points with its sign: 0.045 → "+4.5"."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def common_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The x values that every curve reaches, without zero: (low, high], or None where there are none.

    Each curve is a trial's x (KL, norm of the update) at its evaluations, in their order.
    """
    if not curves or any(len(curve) == 0 for curve in curves):
        return None
    low = max(0.0, *(min(curve) for curve in curves))
    high = min(max(curve) for curve in curves)
    return (low, high) if high > low else None


def levels(span: tuple[float, float], parts: Sequence[float] = (0.25, 0.5, 1.0)) -> list[float]:
    """Levels at these parts of the way through ``span``, rounded down to two digits where that stays inside."""
    found: list[float] = []
    for part in parts:
        exact = span[0] + part * (span[1] - span[0])
        unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
        rounded = float(f"{math.floor(exact / unit * (1 + 1e-12)) * unit:.12g}")
        level = rounded if rounded > span[0] else exact
        if level not in found:
            found.append(level)
    return found


def at_level(curve_x: Sequence[float], curve_y: Any, level: float) -> Any:
    """y where the curve first crosses ``level``: a float, or (items,) for y of shape (points, items); None if never.

    Straight lines between neighbouring points, never beyond them.
    """
    x, y = np.asarray(curve_x, dtype=float), np.asarray(curve_y, dtype=float)
    if x.ndim != 1 or len(y) != len(x):
        raise ValueError(f"x and y need one length, not {x.shape} and {y.shape}")
    for i in range(len(x)):
        if x[i] == level:
            return y[i] if y.ndim > 1 else float(y[i])
        if i + 1 < len(x) and min(x[i], x[i + 1]) < level < max(x[i], x[i + 1]):
            part = (level - x[i]) / (x[i + 1] - x[i])
            value = y[i] + part * (y[i + 1] - y[i])
            return value if y.ndim > 1 else float(value)
    return None


def model_name(config: dict[str, Any]) -> str:
    """The model that a trial began with; quantised it is another model, with figures of its own before training."""
    kind = config.get("quantization", LATER["quantization"])
    return str(config["model"]) if kind == "none" else f"{config['model']} ({kind})"


def method_names(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """trial id → how a comparison calls its method: the label, and what else tells trials of this label apart.

    A label that was run at several ranks, say, is several methods: "lora (rank=8)", "lora (rank=32)".
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_key(record, record["config"]["label"]), []).append(record)
    names = {}
    for (label, *_), members in groups.items():
        fields = sorted({name for member in members for name in member["config"]} - _NOT_A_METHOD)
        value = {m["id"]: {field: m["config"].get(field, LATER.get(field)) for field in fields} for m in members}
        seen = {field: {repr(value[member["id"]][field]) for member in members} for field in fields}
        differ = [field for field in fields if len(seen[field]) > 1]
        for member in members:
            extra = ", ".join(f"{field}={value[member['id']][field]}" for field in differ)
            names[member["id"]] = f"{label} ({extra})" if extra else label
    return names


@dataclass(frozen=True)
class Selection:
    """(method, model, task, algorithm) → learning rate; ``left_out`` has a line for each trial or rate set aside."""

    rates: dict[tuple[str, str, str, str], float]
    left_out: list[str]


def select_learning_rates(records: Sequence[dict[str, Any]]) -> Selection:
    """The rate of the best *validation* accuracy, averaged over seeds, for each method; the smaller one of a tie.

    Failed trials are ignored. A rate at which fewer seeds finished than at another is not considered: the survivors
    would be compared with everyone. The test items are never looked at.
    """
    names = method_names(records)
    found: dict[tuple[str, str, str, str], dict[float, list[float]]] = {}
    left_out = []
    for record in sorted(records, key=lambda record: str(record["id"])):
        accuracy = (record.get("result") or {}).get("validation_accuracy")
        if record["status"] != "finished" or accuracy is None:
            why = "failed" if record["status"] != "finished" else "has no validation accuracy"
            left_out.append(f"{record['id']} {why}")
            continue
        rates = found.setdefault(_key(record, names[record["id"]]), {})
        rates.setdefault(float(record["config"]["learning_rate"]), []).append(float(accuracy))
    chosen = {}
    for key, rates in found.items():
        most = max(len(values) for values in rates.values())
        for rate, values in sorted(rates.items()):
            if len(values) < most:
                left_out.append(f"{key[0]} at learning rate {rate:g}: {len(values)} of {most} seeds finished")
        full = sorted(rate for rate, values in rates.items() if len(values) == most)
        # Rounded, so that the order of a sum does not decide a tie.
        chosen[key] = max(full, key=lambda rate: (round(math.fsum(rates[rate]) / most, 12), -rate))
    return Selection(chosen, left_out)


_NOT_A_METHOD = {"label", "learning_rate", "seed", "model", "quantization", "task", "algorithm", "device", "threads"}


def _key(record: dict[str, Any], name: str) -> tuple[str, str, str, str]:
    config = record["config"]
    return name, model_name(config), str(config["task"]), str(config["algorithm"])


def _matrix(values: Any, name: str) -> np.ndarray:
    """(seeds, items) of finite floats; one row from a flat sequence."""
    x = np.asarray(values, dtype=float)
    x = x[None, :] if x.ndim == 1 else x
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{name} needs the shape (seeds, items) with at least one of each, not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return x


def tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: a confidence level lies between 0 and 1")
    return (1 - level) / 2, (1 + level) / 2


def scipy_module(module: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise ImportError("the statistics need scipy: pip install 'offprincipal-peft[compare]'") from None
