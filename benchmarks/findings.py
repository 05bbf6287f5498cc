"""The tables of docs/findings.md from the study's result files: ``python benchmarks/findings.py`` rewrites them.

A table stands between ``<!-- table NAME KIND ... -->`` and ``<!-- end -->``; NAME is a file of ``results/study``. With
``--check`` nothing is written and a page that no longer fits the files is an error. How the figures are made:

- a *collapse*: the test accuracy ends more than five points below the untrained model's, or the trial failed;
- *at an equal rate*: mean over the seeds of the last test accuracy, with Student's 95 % interval;
- *at equal KL* (or norm of the update): each trial's curve of evaluations is read where it first crosses the level, by
  straight lines. Of a method's rates, those count at which every seed gets there; the best one is chosen on the even
  test items, and the odd ones are reported;
- differences to the reference are by seed: equal seeds share prompts and sampling seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _common import median

from offprincipal_peft.rlvr.statistics import Interval, at_level, mean_interval

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "findings.md"
RESULTS = HERE / "results" / "study"
COLLAPSE = 0.05
BLOCK = re.compile(r"<!-- table (?P<words>[^>]*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
Trial = dict[str, Any]


class Result:
    """One result file: its trials by method, rate and seed."""

    def __init__(self, name: str) -> None:
        self.values = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        self.columns = {column: i for i, column in enumerate(self.values["evaluated"])}
        self.trials: dict[str, dict[float, list[Trial]]] = {}
        ranks = {trial["rank"] for trial in self.values["trials"]}
        for trial in self.values["trials"]:
            name = method_name(trial, ranks)
            self.trials.setdefault(name, {}).setdefault(trial["learning_rate"], []).append(trial)

    @property
    def rates(self) -> list[float]:
        return sorted({rate for by_rate in self.trials.values() for rate in by_rate})

    def curve(self, trial: Trial, column: str) -> list[float]:
        return [row[self.columns[column]] for row in trial["curve"]]

    def last(self, trial: Trial, column: str) -> float:
        return self.curve(trial, column)[-1]

    def collapsed(self, trial: Trial) -> bool:
        if trial["status"] != "finished":
            return True
        accuracy = self.curve(trial, "accuracy")
        return not math.isfinite(accuracy[-1]) or accuracy[-1] < accuracy[0] - COLLAPSE

    def at(self, trial: Trial, by: str, level: float, column: str) -> float | None:
        """The column where the trial's curve first crosses ``level`` of ``by``; None where it does not."""
        x, y = self.curve(trial, by), self.curve(trial, column)
        if any(value is None for value in (*x, *y)):
            return None
        return at_level(x, y, level)


def method_name(trial: Trial, ranks: set[int]) -> str:
    name = trial["label"]
    k = (trial["method_options"] or {}).get("principal_rank")
    if k is not None and not name.startswith("off-"):
        name += f", k = {fraction(k)}"
    return name + (f", r = {trial['rank']}" if len(ranks) > 1 else "")


def fraction(k: float) -> str:
    return f"n/{round(1 / k)}" if k < 1 else str(int(k))


# ---- tables: each takes a result and the words behind its name, and gives the lines of a table


def equal_rate(result: Result, words: list[str]) -> list[str]:
    """Rows are methods, columns rates: the last accuracy, and how many seeds collapsed."""
    rows = [["method", *(rate_text(rate) for rate in result.rates)]]
    for name, by_rate in result.trials.items():
        cells = []
        for rate in result.rates:
            trials = by_rate.get(rate, [])
            finished = [trial for trial in trials if trial["status"] == "finished"]
            collapsed = sum(result.collapsed(trial) for trial in trials)
            text = percent(mean_interval([result.last(t, "accuracy") for t in finished])) if finished else "–"
            cells.append(text + (f" ({collapsed} of {len(trials)} collapsed)" if collapsed else ""))
        rows.append([name, *cells])
    return markdown(rows)


def best_rate(result: Result, words: list[str]) -> list[str]:
    """Each method at the rate with the best validation accuracy."""
    rows = [["method", "rate", "test accuracy, %", "KL", "norm of the update", "forgetting, nats", "collapsed rates"]]
    for name, by_rate in result.trials.items():
        good = {rate: trials for rate, trials in by_rate.items() if all(t["status"] == "finished" for t in trials)}
        bad = [rate for rate, trials in by_rate.items() if any(result.collapsed(t) for t in trials)]
        if not good:
            rows.append([name, *["–"] * 5, ", ".join(map(rate_text, bad))])
            continue
        rate = max(good, key=lambda rate: sum(t["validation"] for t in good[rate]))
        trials = good[rate]
        forgot = [result.last(t, "forgetting") - result.curve(t, "forgetting")[0] for t in trials]
        rows.append(
            [
                name,
                rate_text(rate),
                percent(mean_interval([result.last(t, "accuracy") for t in trials])),
                number(mean_interval([result.last(t, "kl") for t in trials])),
                number(mean_interval([result.last(t, "update_norm") for t in trials])),
                number(mean_interval(forgot)),
                ", ".join(map(rate_text, sorted(bad))) or "none",
            ]
        )
    return markdown(rows)


def equal_level(result: Result, words: list[str]) -> list[str]:
    """At levels of ``kl`` or ``update_norm``: accuracy on the odd items, and the difference to the reference."""
    by, reference, *levels = words
    rows = [
        [
            "method",
            *(f"{'KL' if by == 'kl' else 'norm'} {level}: accuracy, %; to {reference}; rate" for level in levels),
        ]
    ]
    chosen = {name: [_at_best(result, name, by, float(level)) for level in levels] for name in result.trials}
    for name, cells in chosen.items():
        texts = []
        for place, cell in enumerate(cells):
            other = chosen[reference][place]
            if cell is None:
                texts.append("not reached")
                continue
            rate, odd = cell
            difference = ""
            if other is not None and name != reference:
                difference = f"; {points(mean_interval([odd[s] - other[1][s] for s in odd if s in other[1]]))}"
            texts.append(f"{percent(mean_interval(list(odd.values())))}{difference}; {rate_text(rate)}")
        rows.append([name, *texts])
    return markdown(rows)


def _at_best(result: Result, name: str, by: str, level: float) -> tuple[float, dict[int, float]] | None:
    """The rate whose even items are best at the level, and its odd accuracy by seed."""
    best: tuple[float, float, dict[int, float]] | None = None
    for rate, trials in result.trials[name].items():
        even = [result.at(t, by, level, "even") for t in trials if t["status"] == "finished"]
        odd = {t["seed"]: result.at(t, by, level, "odd") for t in trials if t["status"] == "finished"}
        if len(even) < len(trials) or any(value is None for value in even):
            continue
        score = sum(value for value in even if value is not None) / len(even)
        if best is None or score > best[0]:
            best = score, rate, {seed: value for seed, value in odd.items() if value is not None}
    return None if best is None else best[1:]


def geometry(result: Result, words: list[str]) -> list[str]:
    """Medians over the seeds of the geometry's figures, by method and rate."""
    rows = [["method", "rate", *words]]
    for name, by_rate in result.trials.items():
        for rate, trials in sorted(by_rate.items()):
            values = [
                [t["geometry"].get(word) for t in trials if t["geometry"].get(word) is not None] for word in words
            ]
            rows.append([name, rate_text(rate), *(f"{median(v):.3g}" if v else "–" for v in values)])
    return markdown(rows)


TABLES: dict[str, Callable[[Result, list[str]], list[str]]] = {
    "equal-rate": equal_rate,
    "best-rate": best_rate,
    "equal-level": equal_level,
    "geometry": geometry,
}


# ---- text


def rate_text(rate: float) -> str:
    mantissa, _, exponent = f"{rate:.0e}".partition("e")
    return f"{mantissa}e−{abs(int(exponent))}"


def percent(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} ± {50 * (found.high - found.low):.1f}"


def points(found: Interval) -> str:
    sign = "+" if found.value >= 0 else "−"
    half = "" if found.low is None or found.high is None else f" ± {50 * (found.high - found.low):.1f}"
    return f"{sign}{abs(100 * found.value):.1f}{half}"


def number(found: Interval) -> str:
    half = "" if found.low is None or found.high is None else f" ± {(found.high - found.low) / 2:.2g}"
    return f"{found.value:.3g}{half}"


def markdown(rows: Iterable[list[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def rendered(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        name, kind, *words = shlex.split(match["words"])
        if not (RESULTS / f"{name}.json").is_file():
            return match[0]
        result = Result(name)
        env, size = result.values["environment"], len(result.values["trials"])
        scale = f"{size} trials, {result.values['seconds'] / 3600:.1f} hours of one thread, {env['cpu']}, {env['date']}"
        lines = [*TABLES[kind](result, words), "", f"`benchmarks/results/study/{name}.json`: {scale}."]
        return f"<!-- table {match['words']} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = rendered(text)
    if options.check:
        if new != text:
            print(
                "docs/findings.md does not show what benchmarks/results/study holds; run `make tables`", file=sys.stderr
            )
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
