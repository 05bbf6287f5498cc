"""How the study's tables write rates, means with their intervals, and rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from offprincipal_peft.rlvr.statistics import Interval, mean_interval


def rate_text(rate: float) -> str:
    return f"{rate:g}" if rate >= 0.1 else re.sub(r"e-0*", "e−", f"{rate:.2e}").replace(".00e", "e").replace("0e", "e")


def rates_text(trials: list[dict[str, Any]]) -> str:
    """The rates of the seeds' trials, the most frequent first."""
    counts = Counter(trial["learning_rate"] for trial in trials)
    return ", ".join(rate_text(rate) for rate, _ in counts.most_common())


def interval(values: list[float]) -> Interval | None:
    return mean_interval(values) if all(map(math.isfinite, values)) else None


def percent(found: Interval | None) -> str:
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} ± {50 * (found.high - found.low):.1f}"


def points(found: Interval) -> str:
    sign = "+" if found.value >= 0 else "−"
    half = "" if found.low is None or found.high is None else f" ± {50 * (found.high - found.low):.1f}"
    return f"{sign}{abs(100 * found.value):.1f}{half}"


def signed(found: Interval) -> str:
    text = number(found)
    return text if found.value < 0 else f"+{text}"


def number(found: Interval | None) -> str:
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return re.sub(r"e-0*", "e−", f"{found.value:.3g}").replace("-", "−")
    half = (found.high - found.low) / 2
    size = max(abs(found.value), half)
    power = math.floor(math.log10(size)) if 0 < size < 1e-3 else 0
    value, half = found.value / 10**power, half / 10**power
    exact = half <= 1e-9 * abs(value)  # equal in every seed, up to rounding
    digits = 3 if exact else 1 - math.floor(math.log10(half))  # two digits of the half-width
    if value:
        digits = min(digits, 5 - math.floor(math.log10(abs(value))))  # and no more than six of the mean
    text = f"{value:.{max(0, digits)}f} ± {half:.{max(0, digits)}f}".replace("-", "−")
    return f"({text})e−{-power}" if power else text


def markdown(rows: Iterable[list[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
