"""What the numbers say, in sentences that claim no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from .report_data import Record, Row, Study, config_fields, evaluations
from .report_tables import digits, per_cent, show
from .statistics import LEVEL, Difference, Interval, holm, paired_difference, points, statement

MOST_SENTENCES = 6  # more findings of one kind are put in one
# Differences in these do not make one method's training easier than another's.
_HARMLESS = {"threads", "device", "geometry", "k", "evaluation_batch", "evaluate_every"}


def findings(study: Study) -> list[str]:
    """Sentences, the most important first."""
    if not study.rows:
        return ["No trial finished, so there is nothing to compare."]
    return [*_learned(study), *_compared(study), *_best(study), *_matched(study), *_where(study)]


def cautions(study: Study) -> list[str]:
    """What limits the findings."""
    found = []
    single = [row.method.name for row in study.rows if len(row.method.trials) == 1]
    if single:
        who = "Every method" if len(single) == len(study.rows) else names(single)
        found.append(
            f"{who} ran with one seed: intervals cover other test items, not other seeds. "
            "More seeds can change any order."
        )
    if len({tuple(row.method.seeds) for row in study.rows}) > 1:
        found.append("Methods ran with different seeds, so their runs are compared unpaired.")
    found += _tuning(study)
    chosen = [trial for row in study.rows for trial in row.method.trials]
    differing = {name: values for name, values in config_fields(chosen)[1].items() if name not in _HARMLESS}
    if differing:
        text = "; ".join(f"{name} ({', '.join(map(str, values[:6]))})" for name, values in differing.items())
        found.append(f"The compared trials differ in more than the method: {text}.")
    if study.comparisons > 1:
        found.append(
            f"{study.comparisons} methods are compared with {study.reference.name if study.reference else ''}: each "
            "interval is for its own pair, so among many some exclude zero by chance; Holm's p accounts for that."
        )
    unpaired = [row.method.name for row in study.rows if row.difference is None and row.method is not study.reference]
    if unpaired:
        found.append(
            f"{names(unpaired)} could not be compared item by item: the test items differ or are not recorded."
        )
    fewest = min((len(evaluations(trial)) for trial in chosen), default=0)
    if any(table.cells for table in study.matched) and fewest < 4:
        found.append(f"Matched figures are read between only {fewest} evaluations of a trial: evaluate more often.")
    missing = [row.method.name for row in study.rows if row.method.geometry("share_output") is None]
    if missing and len(missing) < len(study.rows):
        found.append(f"No geometry was recorded for {names(missing)}.")
    return found


def progress(records: Sequence[Record], expected: Sequence[str] | None) -> str:
    """ "12 of 15 trials finished, 1 failed, 2 are still to run."."""
    finished = sum(record["status"] == "finished" for record in records)
    failed = len(records) - finished
    total = len({*(expected or []), *(str(record["id"]) for record in records)})
    parts = [f"{finished} of {total} trial{'s' if total != 1 else ''} finished"]
    parts += [f"{failed} failed"] if failed else []
    rest = total - len(records)
    parts += [f"{rest} {'is' if rest == 1 else 'are'} still to run"] if rest else []
    return ", ".join(parts) + "."


def names(found: Sequence[str], most: int = 6) -> str:
    """ "a, b and c", shortened where there are many."""
    if len(found) > most:
        return f"{', '.join(found[:most])} and {len(found) - most} others"
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def _learned(study: Study) -> list[str]:
    """Against the untrained model."""
    rows = [row for row in study.rows if row.gain is not None]
    if not rows:
        return []
    better = [row.method.name for row in rows if row.gain and row.gain.excludes(0) and row.gain.value > 0]
    worse = [row.method.name for row in rows if row.gain and row.gain.excludes(0) and row.gain.value < 0]
    unclear = [row.method.name for row in rows if row.method.name not in {*better, *worse}]
    base = study.base_accuracy
    start = f"The untrained model solves {per_cent(base)} % of the test items. " if base is not None else ""
    parts = []
    if better:
        everyone = "Both methods" if len(rows) == 2 else f"All {len(rows)} methods"
        all_of = everyone if len(better) == len(rows) > 1 else names(better)
        parts.append(f"{all_of} improved on {'that' if start else 'the untrained model'}")
    if unclear:
        parts.append(f"for {names(unclear)} no clear change is seen")
    if worse:
        parts.append(f"{names(worse)} became worse")
    text = "; ".join(parts)
    return [start + text.replace("for ", "For ", 1) + "." if text.startswith("for ") else start + text + "."]


def _compared(study: Study) -> list[str]:
    """Each method against the reference; what cannot be told apart in one sentence where there is much of it."""
    reference = study.reference.name if study.reference else ""
    rows = [row for row in study.rows if row.difference is not None]
    clear = [row for row in rows if row.difference and row.difference.excludes(0)]
    unclear = [row for row in rows if row not in clear]
    found = [_statement(row, reference, study.comparisons) for row in clear]
    if len(clear) > MOST_SENTENCES:
        found = _grouped(clear, reference, study.comparisons)
    if len(unclear) <= 3:
        return found + [_statement(row, reference, study.comparisons) for row in unclear]
    low = min(row.difference.low for row in unclear if row.difference and row.difference.low is not None)
    high = max(row.difference.high for row in unclear if row.difference and row.difference.high is not None)
    one = any(row.difference.seeds == 1 for row in unclear if row.difference)
    tail = ", conditional on the one seed that was run" if one else ""
    who = names([row.method.name for row in unclear], most=20)
    return [
        *found,
        f"The data cannot tell {who} apart from {reference} (intervals between {points(low)} and {points(high)} "
        f"points){tail}.",
    ]


def _grouped(rows: Sequence[Row], reference: str, comparisons: int) -> list[str]:
    """Many clear differences in a sentence for each side."""
    found = []
    for word, sign in (("Better", 1), ("Worse", -1)):
        side = [row for row in rows if row.difference and sign * row.difference.value > 0]
        held = [row for row in side if row.adjusted_p is not None and row.adjusted_p <= 1 - LEVEL]
        for group, after in ((held, "also after"), ([row for row in side if row not in held], "but not after")):
            if group:
                who = ", ".join(
                    f"{row.method.name} ({points(row.difference.value)})" for row in group if row.difference
                )
                one = any(row.difference.seeds == 1 for row in group if row.difference)
                found.append(
                    f"{word} than {reference}, {after} Holm's correction for {comparisons} comparisons, in "
                    f"points: {who}{', conditional on the one seed that was run' if one else ''}."
                )
    return found


def _statement(row: Row, reference: str, comparisons: int) -> str:
    assert row.difference is not None
    return statement(row.method.name, reference, row.difference, row.adjusted_p, comparisons)


def _best(study: Study) -> list[str]:
    """The highest number, with those whose intervals it does not leave behind."""
    rows = [row for row in study.rows if row.accuracy is not None]
    if len(rows) < 3:
        return []
    ordered = sorted(rows, key=lambda row: -row.accuracy.value if row.accuracy else 0.0)
    best = ordered[0]
    assert best.accuracy is not None
    mine = best.method.correct()
    others, p_values = [], []
    for row in ordered[1:]:
        other = row.method.correct()
        if mine is not None and other is not None and mine.shape[1] == other.shape[1]:
            others.append(row.method.name)
            same = best.method.seeds == row.method.seeds
            p_values.append(paired_difference(mine, other, same_seeds=same).p)
    # Holm, because the best of many was picked by looking.
    near = [name for name, p in zip(others, holm(p_values), strict=True) if p > 1 - LEVEL]
    text = f"The highest test accuracy is that of {best.method.name}, {show(best.accuracy, per_cent)} %"
    if not others:
        return [text + "."]
    if not near:
        return [f"{text}; all others are clearly below it (Holm's correction for {len(others)} comparisons)."]
    return [f"{text}; {names(near)} cannot be told apart from it."]


def _matched(study: Study) -> list[str]:
    """Whether a difference remains where methods moved equally far."""
    found = []
    for table in study.matched:
        what = "the same KL" if table.quantity == "kl" else "the same norm of the update"
        if table.span is None or not table.levels or study.comparisons == 0 or study.reference is None:
            continue
        clear: list[str] = []
        one = False
        for name, cells in sorted(table.cells.items(), key=lambda item: _last(item[1]), reverse=True):
            if cells and cells[-1] is not None and (difference := cells[-1][1]) is not None:
                one = one or difference.seeds == 1
                if difference.excludes(0):
                    clear.append(f"{name} by {show(difference, points)}")
        if len(clear) > MOST_SENTENCES:  # the table has the intervals
            clear = [text.partition(" [")[0] for text in clear]
        level = digits(table.levels[-1])
        tail = "; conditional on one seed" if one else ""
        text = f"these differ from {study.reference.name}, in points: {'; '.join(clear)}"
        text = text if clear else f"no method can be told apart from {study.reference.name}"
        found.append(f"At {what} ({level}), {text}{tail}.")
    return found


def _last(cells: Sequence[tuple[Interval, Difference | None] | None]) -> float:
    return cells[-1][1].value if cells and cells[-1] is not None and cells[-1][1] is not None else 0.0


def _where(study: Study) -> list[str]:
    """The share of the update in the principal subspaces, against an update without direction."""
    inside, outside = [], []
    for method in study.methods:
        share, random = method.geometry("share_output"), method.geometry("random_output")
        if share is None or random is None or random.value <= 0:
            continue
        ratio = share.value / random.value
        text = f"{method.name} ({digits(ratio)} ×)"
        if ratio >= 1.5:
            inside.append(text)
        elif ratio <= 1 / 1.5:
            outside.append(text)
    parts = [f"more for {names(inside)}"] if inside else []
    parts += [f"less for {names(outside)}"] if outside else []
    if not parts:
        return []
    return [
        "The leading left singular vectors of the weights hold another share of the update than they would of an "
        f"undirected one: {'; '.join(parts)}."
    ]


def _tuning(study: Study) -> list[str]:
    """Learning rates that may not be the best ones."""
    found = []
    counts = {len(row.method.rates) for row in study.rows}
    if counts == {1} and len(study.rows) > 1:
        found.append("Each method ran at one learning rate: a method can lose by its rate alone.")
    elif len(counts) > 1:
        found.append("Methods were tried at different numbers of learning rates: more tries give a better best.")
    low = [r.method.name for r in study.rows if len(r.method.rates) > 1 and r.method.rate == min(r.method.rates)]
    high = [r.method.name for r in study.rows if len(r.method.rates) > 1 and r.method.rate == max(r.method.rates)]
    for who, end in ((low, "smallest"), (high, "largest")):
        if who:
            found.append(f"{names(who)} did best at the {end} learning rate that was tried: the best may lie beyond.")
    return found
