"""One result file of the study, and how its trials are read: ends, levels, rates. ``findings.py`` says what is what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offprincipal_peft.rlvr.statistics import at_level

COLLAPSE = 0.05
Trial = dict[str, Any]


class Result:
    """One result file: its trials by method, rate and seed."""

    def __init__(self, path: Path) -> None:
        self.values = json.loads(path.read_text(encoding="utf-8"))
        self.columns = {column: i for i, column in enumerate(self.values["evaluated"])}
        self.trials: dict[str, dict[float, list[Trial]]] = {}
        told_apart = [
            field for field in ("algorithm", "task") if len({str(t[field]) for t in self.values["trials"]}) > 1
        ]
        for trial in self.values["trials"]:
            name = method_name(trial, told_apart)
            self.trials.setdefault(name, {}).setdefault(trial["learning_rate"], []).append(trial)

    @property
    def rates(self) -> list[float]:
        return sorted({rate for by_rate in self.trials.values() for rate in by_rate})

    def curve(self, trial: Trial, column: str) -> list[float]:
        return [row[self.columns[column]] for row in trial["curve"]]

    def last(self, trial: Trial, column: str) -> float:
        return number_or_nan(self.curve(trial, column)[-1])

    def collapsed(self, trial: Trial) -> bool:
        if trial["status"] != "finished":
            return True
        accuracy = self.curve(trial, "accuracy")
        return not accuracy[-1] >= accuracy[0] - COLLAPSE

    def at(self, trial: Trial, by: str, level: float, column: str) -> float | None:
        """The column where the trial's curve first crosses ``level`` of ``by``; None where it does not."""
        points_ = []
        for x, y in zip(self.curve(trial, by), self.curve(trial, column), strict=True):
            if x is None or y is None:
                break  # NaN from there on
            points_.append((x, y))
        root = math.sqrt if by == "kl" else float
        return at_level([root(max(x, 0.0)) for x, _ in points_], [y for _, y in points_], root(level))

    def at_end(
        self, by_rate: dict[float, list[Trial]], by: str, level: float, column: str = "accuracy"
    ) -> dict[int, float]:
        """By seed: the column at ``level`` of ``by``, between the ends of the trials at neighbouring rates.

        Where a rate lies is the mean of its seeds, of whose ``by`` one alone is a noisy measurement. Empty where the
        level lies outside of the rates.
        """
        root = math.sqrt if by == "kl" else float
        places: list[float] = []
        ends: list[dict[int, float]] = []
        for _, trials in sorted(by_rate.items()):
            found = {trial["seed"]: self._end(trial, by, column) for trial in trials}
            known = {seed: end for seed, end in found.items() if end is not None}
            if len(known) < len(trials):
                break  # no point of this rate, and none beyond it
            places.append(sum(root(max(x, 0.0)) for x, _ in known.values()) / len(known))
            ends.append({seed: y for seed, (_, y) in known.items()})
        shared = set.intersection(*map(set, ends)) if ends else set()
        read = {seed: at_level(places, [end[seed] for end in ends], root(level)) for seed in sorted(shared)}
        return {seed: value for seed, value in read.items() if value is not None}

    def _end(self, trial: Trial, by: str, column: str) -> tuple[float, float] | None:
        """(``by``, column) of the last evaluation; None for a failure and for NaN."""
        end = self.curve(trial, by)[-1], self.curve(trial, column)[-1]
        return None if trial["status"] != "finished" or None in end else end

    def by_other_seeds(
        self, score: Callable[[Trial], float | None], by_rate: dict[float, list[Trial]]
    ) -> dict[int, Trial]:
        """Each seed's trial at the rate whose mean score is best over the other seeds.

        Rates at which a trial has no score are left out; empty where no rate is left.
        """
        scores = {
            rate: {t["seed"]: found for t in trials if t["status"] == "finished" and (found := score(t)) is not None}
            for rate, trials in by_rate.items()
        }
        whole = {rate: values for rate, values in scores.items() if len(values) == len(by_rate[rate])}
        chosen: dict[int, Trial] = {}
        for seed in sorted({seed for values in whole.values() for seed in values}):
            others = {
                rate: sum(v for s, v in values.items() if s != seed) / max(1, len(values) - 1)
                for rate, values in whole.items()
                if seed in values
            }
            rate = max(others, key=lambda rate: others[rate])
            chosen[seed] = next(t for t in by_rate[rate] if t["seed"] == seed)
        return chosen


def chosen_methods(result: Result, words: list[str]) -> list[tuple[str, dict[float, list[Trial]]]]:
    """The methods called ``words`` in that order, all without words; raises ``SystemExit`` for an unknown one."""
    if unknown := [word for word in words if word not in result.trials]:
        raise SystemExit(f"no method {', '.join(unknown)} in this result; there are {', '.join(result.trials)}")
    return [(name, result.trials[name]) for name in words or result.trials]


def method_name(trial: Trial, told_apart: list[str]) -> str:
    """The label, the k of a mask or projection that the label does not tell, and the fields that differ."""
    name = trial["label"]
    k = (trial["method_options"] or {}).get("principal_rank")
    if k is not None and not name.startswith("off-"):
        name += f", k = {fraction(k)}"
    return ", ".join([name, *(str(trial[field]) for field in told_apart)])


def fraction(k: float) -> str:
    whole = round(1 / k) if k < 1 else 0
    return f"n/{whole}" if whole and abs(k * whole - 1) < 1e-3 else f"{k:g}"


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value
