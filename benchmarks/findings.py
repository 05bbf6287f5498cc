"""The study's tables in README and docs from its result files: ``python benchmarks/findings.py`` rewrites them.

A table stands between ``<!-- table NAME KIND ... -->`` and ``<!-- end -->``; NAME is a file of ``results/study``. With
``--check`` nothing is written and a page that no longer fits the files is an error. How the figures are made:

- a *collapse*: the test accuracy ends more than five points below the untrained model's, or the trial failed;
- *at an equal rate*: mean over the seeds of the last test accuracy, with Student's 95 % interval; no mean where a seed
  failed;
- *at equal KL* (or norm of the update): each trial's curve of evaluations is read where it first crosses the level, by
  straight lines in the norm or in the root of the KL, which grows like the norm. A method's rates count where every
  seed gets there;
- *at equal KL (or norm) at the end*: seed by seed, the accuracies after the same number of steps, one for each rate,
  are a curve over the seeds' mean norm or root of the KL at that rate. It is read at the level by straight lines,
  between two rates and never from the untrained model on. The path to a level is shorter at a higher rate and
  accuracy lower there, so the reading along the path favours whichever method's grid of rates happens to end just
  beyond the level; this one does not. It was added when the trials of the first two of eighteen starts had been seen,
  the untrained model was left out of it when all had, and the KL of a rate became the seeds' mean when the masks had;
- *a method at its best rate*: seed by seed, at the rate that is best for the other seeds, so that no seed's luck
  chooses its own rate;
- differences to the reference are by seed: equal seeds share prompts and sampling seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _common import median
from study_weights import pooled_figures

from offprincipal_peft.audit import AuditReport, read_json_report
from offprincipal_peft.audit.pooling import labels, pool
from offprincipal_peft.rlvr.statistics import Interval, at_level, mean_interval

HERE = Path(__file__).parent
PAGES = tuple(HERE.parent / name for name in ("README.md", "docs/findings.md", "docs/choosing-a-method.md"))
RESULTS, SPECS = HERE / "results" / "study", HERE / "experiments"
COLLAPSE = 0.05
BLOCK = re.compile(r"<!-- table (?P<words>[^>]*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
Trial = dict[str, Any]


class Result:
    """One result file: its trials by method, rate and seed."""

    def __init__(self, name: str) -> None:
        self.values = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
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


# ---- tables: each takes a result and the words behind its name, and gives the lines of a table


def equal_rate(result: Result, words: list[str]) -> list[str]:
    """Rows are methods, columns rates: the last accuracy, and how many seeds collapsed."""
    rows = [["method", *(rate_text(rate) for rate in result.rates)]]
    for name, by_rate in result.trials.items():
        cells = []
        for rate in result.rates:
            trials = by_rate.get(rate, [])
            failed = sum(trial["status"] != "finished" for trial in trials)
            collapsed = sum(result.collapsed(trial) for trial in trials)
            if not trials:
                cells.append("–")
            elif failed:
                cells.append(f"{failed} of {len(trials)} failed, {collapsed} collapsed")
            else:
                text = percent(mean_interval([result.last(t, "accuracy") for t in trials]))
                cells.append(text + (f" ({collapsed} of {len(trials)} collapsed)" if collapsed else ""))
        rows.append([name, *cells])
    return markdown(rows)


def best_rate(result: Result, words: list[str]) -> list[str]:
    """Each seed at the rate whose validation accuracy is best for the other seeds; ``words``: only these methods."""
    head = ["method", "rate", "test accuracy, %", "KL", "norm of the update", "forgetting, nats", "collapsed rates"]
    rows = [head]
    for name, by_rate in chosen_methods(result, words):
        bad = [rate for rate, trials in by_rate.items() if any(result.collapsed(t) for t in trials)]
        chosen = result.by_other_seeds(lambda trial: trial["validation"], by_rate)
        figures = ["–"] * 5
        if chosen:
            trials = list(chosen.values())
            forgot = [result.last(t, "forgetting") - result.curve(t, "forgetting")[0] for t in trials]
            figures = [
                rates_text(trials),
                percent(interval([result.last(t, "accuracy") for t in trials])),
                number(interval([result.last(t, "kl") for t in trials])),
                number(interval([result.last(t, "update_norm") for t in trials])),
                number(interval(forgot)),
            ]
        rows.append([name, *figures, ", ".join(map(rate_text, sorted(bad))) or "none"])
    return markdown(rows)


def equal_level(result: Result, words: list[str]) -> list[str]:
    """At levels of ``kl`` or ``update_norm``: the accuracy, the difference to the reference, and the rate."""
    by, reference, *levels = words
    what = "KL" if by == "kl" else "norm"
    rows = [["method", *(f"{what} {level}: accuracy, %; to {reference}; rate" for level in levels)]]
    read = {name: [_at_best(result, name, by, float(level)) for level in levels] for name in result.trials}
    for name, cells in read.items():
        texts = []
        for found, other in zip(cells, read[reference], strict=True):
            if not found:
                texts.append("not reached")
                continue
            values = {seed: value for seed, (_, value) in found.items()}
            shared = [values[seed] - other[seed][1] for seed in values if seed in other]
            difference = f"; {points(mean_interval(shared))}" if shared and name != reference else ""
            rates = rates_text([trial for trial, _ in found.values()])
            texts.append(f"{percent(mean_interval(list(values.values())))}{difference}; {rates}")
        rows.append([name, *texts])
    return markdown(rows)


def equal_end(result: Result, words: list[str]) -> list[str]:
    """At levels of ``kl`` or ``update_norm`` at the end: the accuracy and its difference to the reference."""
    by, reference, *levels = words
    what = "KL" if by == "kl" else "norm"
    rows = [["method", *(f"{what} {level}: accuracy, %; to {reference}" for level in levels)]]
    read = {
        name: [result.at_end(by_rate, by, float(level)) for level in levels] for name, by_rate in result.trials.items()
    }
    for name, cells in read.items():
        texts = []
        for found, other in zip(cells, read[reference], strict=True):
            shared = [found[seed] - other[seed] for seed in found if seed in other]
            difference = f"; {points(mean_interval(shared))}" if shared and name != reference else ""
            texts.append(f"{percent(mean_interval(list(found.values())))}{difference}" if found else "not reached")
        rows.append([name, *texts])
    return markdown(rows)


def forgetting(result: Result, words: list[str]) -> list[str]:
    """At levels of ``kl`` at the end: the loss on other text that was gained, in thousandths of a nat per token."""
    reference, *levels = words
    rows = [["method", *(f"KL {level}: forgetting, 10⁻³ nats; to {reference}" for level in levels)]]
    read = {}
    for name, by_rate in result.trials.items():
        base = result.curve(next(iter(by_rate.values()))[0], "forgetting")[0]
        cells = [result.at_end(by_rate, "kl", float(level), "forgetting") for level in levels]
        read[name] = [{seed: 1000 * (value - base) for seed, value in cell.items()} for cell in cells]
    for name, cells in read.items():
        texts = []
        for found, other in zip(cells, read[reference], strict=True):
            shared = [found[seed] - other[seed] for seed in found if seed in other]
            difference = f"; {signed(mean_interval(shared))}" if shared and name != reference else ""
            texts.append(f"{number(mean_interval(list(found.values())))}{difference}" if found else "not reached")
        rows.append([name, *texts])
    return markdown(rows)


def headline(result: Result, words: list[str]) -> list[str]:
    """Chosen methods at one level of KL at the end, beside the rates at which a seed collapsed."""
    level, reference, *names = words
    rates = ", ".join(rate_text(rate) for rate in result.rates)
    head = [
        "method",
        f"accuracy at KL {level}, %",
        f"to {reference}",
        "norm of the update there",
        "at the highest rate, %",
    ]
    rows = [[*head, f"rates with a collapse, of {rates}"]]
    other = result.at_end(result.trials[reference], "kl", float(level))
    for name, by_rate in chosen_methods(result, names):
        found = result.at_end(by_rate, "kl", float(level))
        norms = result.at_end(by_rate, "kl", float(level), "update_norm")
        cells = ["not reached", "–", "–"]
        if found:
            shared = [found[seed] - other[seed] for seed in found if seed in other]
            difference = points(mean_interval(shared)) if shared and name != reference else "–"
            cells = [percent(interval(list(found.values()))), difference, number(interval(list(norms.values())))]
        ends = [result.last(trial, "accuracy") for trial in by_rate[max(by_rate)]]
        bad = [rate for rate, trials in sorted(by_rate.items()) if any(map(result.collapsed, trials))]
        rows.append([name, *cells, percent(interval(ends)), ", ".join(map(rate_text, bad)) or "none"])
    return markdown(rows)


def versus(result: Result, words: list[str]) -> list[str]:
    """Pairs of methods that differ in their first words alone: differences by seed at equal rates, and their mean."""
    first, second = words
    rows = [["pair", "rate", f"accuracy: {first} minus {second}, points", "KL: the same"]]
    of_seeds: dict[int, list[float]] = {}
    for name in (name for name in result.trials if name.startswith(first)):
        other = result.trials[second + name.removeprefix(first)]
        for rate, trials in sorted(result.trials[name].items()):
            twins = {trial["seed"]: trial for trial in other.get(rate, [])}
            both = [(trial, twins[trial["seed"]]) for trial in trials if trial["seed"] in twins]
            found = [result.last(a, "accuracy") - result.last(b, "accuracy") for a, b in both]
            for (trial, _), difference in zip(both, found, strict=True):
                of_seeds.setdefault(trial["seed"], []).append(difference)
            spread = signed(mean_interval([result.last(a, "kl") - result.last(b, "kl") for a, b in both]))
            rows.append([name.removeprefix(f"{first}, "), rate_text(rate), points(mean_interval(found)), spread])
    means = [sum(values) / len(values) for values in of_seeds.values()]
    rows.append(["all, a mean for each seed", "", points(mean_interval(means)), ""])
    return markdown(rows)


def _at_best(result: Result, name: str, by: str, level: float) -> dict[int, tuple[Trial, float]]:
    """By seed: its trial at the rate that is best there for the other seeds, and its accuracy at the level."""
    found = {}
    for seed, trial in result.by_other_seeds(
        lambda t: result.at(t, by, level, "accuracy"), result.trials[name]
    ).items():
        accuracy = result.at(trial, by, level, "accuracy")
        assert accuracy is not None
        found[seed] = trial, accuracy
    return found


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


def precision(result: Result, words: list[str]) -> list[str]:
    """By method and rate: accuracy, norm of the update, share of entries that bf16 stores unchanged."""
    rows = [["method", "rate", "test accuracy, %", "‖ΔW‖/‖W‖", "same in bf16, %"]]
    for name, by_rate in result.trials.items():
        for rate, trials in sorted(by_rate.items()):
            done = [trial for trial in trials if trial["status"] == "finished"]
            rows.append(
                [
                    name,
                    rate_text(rate),
                    percent(interval([result.last(trial, "accuracy") for trial in done])),
                    number(interval([trial["geometry"]["relative_norm"] for trial in done])),
                    percent(interval([trial["geometry"]["update_sparsity"] for trial in done])),
                ]
            )
    return markdown(rows)


TABLES: dict[str, Callable[[Result, list[str]], list[str]]] = {
    "pairs": pairs,
    "consensus": consensus,
    "interventions": interventions,
    "precision": precision,
    "equal-rate": equal_rate,
    "best-rate": best_rate,
    "equal-level": equal_level,
    "equal-end": equal_end,
    "forgetting": forgetting,
    "headline": headline,
    "versus": versus,
    "geometry": geometry,
}


# ---- text


def rate_text(rate: float) -> str:
    return f"{rate:g}" if rate >= 0.1 else re.sub(r"e-0*", "e−", f"{rate:.2e}").replace(".00e", "e").replace("0e", "e")


def rates_text(trials: list[Trial]) -> str:
    """The rates of the seeds' trials, the most frequent first."""
    counts = Counter(trial["learning_rate"] for trial in trials)
    return ", ".join(rate_text(rate) for rate, _ in counts.most_common())


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


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
    text = f"{value:.{max(0, digits)}f} ± {half:.{max(0, digits)}f}".replace("-", "−")
    return f"({text})e−{-power}" if power else text


def markdown(rows: Iterable[list[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def rendered(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        name, kind, *words = shlex.split(match["words"])
        if kind == "audited":
            lines = [
                *audited(read_json_report(RESULTS.parent / f"{name}.json")),
                "",
                f"`benchmarks/results/{name}.json`.",
            ]
            return f"<!-- table {match['words']} -->\n" + "\n".join(lines) + "\n<!-- end -->"
        if not (RESULTS / f"{name}.json").is_file():
            if not (SPECS / f"{name}.yaml").is_file() or match["body"]:
                raise SystemExit(f"a table of {name}, of which there is no result file")
            return match[0]
        result = Result(name)
        ran, size = result.values["ran"], len(result.values["trials"])
        scale = f"{size} trials, {result.values['seconds'] / 3600:.1f} hours of one thread, {ran['cpu']}, {ran['last']}"
        lines = [*TABLES[kind](result, words), "", f"`benchmarks/results/study/{name}.json`: {scale}."]
        return f"<!-- table {match['words']} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    drifted = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        if new != text and options.check:
            drifted.append(page.name)
        elif new != text:
            page.write_text(new, encoding="utf-8")
    if drifted:
        print(f"{', '.join(drifted)}: not what benchmarks/results/study holds; run `make tables`", file=sys.stderr)
    return int(bool(drifted))


if __name__ == "__main__":
    sys.exit(main())
