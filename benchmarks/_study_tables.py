"""The study's tables of accuracies: each takes a result and the words behind its name, and gives lines."""

from __future__ import annotations

from collections.abc import Callable

from _common import median
from _study_result import Result, Trial, chosen_methods
from _study_text import interval, markdown, number, percent, points, rate_text, rates_text, signed

from offprincipal_peft.rlvr.statistics import Interval, mean_interval


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
    return markdown(rows + _beside(read, reference, percent, points))


def forgetting(result: Result, words: list[str]) -> list[str]:
    """At levels of ``kl`` at the end: the loss on other text that was gained, in thousandths of a nat per token."""
    reference, *levels = words
    rows = [["method", *(f"KL {level}: forgetting, 10⁻³ nats; to {reference}" for level in levels)]]
    read = {
        name: [_forgotten(result, by_rate, float(level)) for level in levels] for name, by_rate in result.trials.items()
    }
    return markdown(rows + _beside(read, reference, number, signed))


def _forgotten(result: Result, by_rate: dict[float, list[Trial]], kl: float) -> dict[int, float]:
    """By seed: thousandths of a nat per token, at ``kl`` at the end."""
    base = result.curve(next(iter(by_rate.values()))[0], "forgetting")[0]
    ends = result.at_end(by_rate, "kl", kl, "forgetting")
    return {seed: 1000 * (value - base) for seed, value in ends.items()}


def _beside(
    read: dict[str, list[dict[int, float]]],
    reference: str,
    written: Callable[[Interval], str],
    difference: Callable[[Interval], str],
) -> list[list[str]]:
    """A row a method: in each cell the seeds' mean, and its difference by seed to the reference's."""
    rows = []
    for name, cells in read.items():
        texts = []
        for found, other in zip(cells, read[reference], strict=True):
            shared = [found[seed] - other[seed] for seed in found if seed in other]
            text = written(mean_interval(list(found.values()))) if found else "not reached"
            texts.append(text + (f"; {difference(mean_interval(shared))}" if shared and name != reference else ""))
        rows.append([name, *texts])
    return rows


def headline(result: Result, words: list[str]) -> list[str]:
    """Chosen methods at one level of KL at the end, beside the seeds that collapsed at each rate."""
    level, reference, *names = words
    head = [
        "method",
        f"accuracy at KL {level}, %",
        f"to {reference}",
        "forgetting there, 10⁻³ nats",
        "norm of the update there",
        "accuracy at the highest rate, %",
    ]
    rows = [[*head, "seeds that collapsed"]]
    other = result.at_end(result.trials[reference], "kl", float(level))
    for name, by_rate in chosen_methods(result, names):
        found = result.at_end(by_rate, "kl", float(level))
        norms = result.at_end(by_rate, "kl", float(level), "update_norm")
        cells = ["not reached", "–", "–", "–"]
        if found:
            shared = [found[seed] - other[seed] for seed in found if seed in other]
            cells = [
                percent(interval(list(found.values()))),
                points(mean_interval(shared)) if shared and name != reference else "–",
                number(interval(list(_forgotten(result, by_rate, float(level)).values()))),
                number(interval(list(norms.values()))),
            ]
        highest = max(by_rate)
        ends = [result.last(trial, "accuracy") for trial in by_rate[highest]]
        cells.append(f"{percent(interval(ends))} at {rate_text(highest)}")
        counts = [(rate, sum(map(result.collapsed, trials)), len(trials)) for rate, trials in sorted(by_rate.items())]
        bad = [f"{bad} of {size} at {rate_text(rate)}" for rate, bad, size in counts if bad]
        rows.append([name, *cells, ", ".join(bad) or "none"])
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
