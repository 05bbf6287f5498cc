"""What the page's figures show is where the report's numbers are, and nothing that the report does not know."""

import dataclasses
import math
import re
from collections.abc import Callable

import pytest

from audit.reports import report
from offprincipal_peft.audit.figures import views
from offprincipal_peft.audit.page import page_of
from offprincipal_peft.audit.pooling import total
from offprincipal_peft.audit.results import AuditReport, Change, Inequality, Magnitudes, Share
from offprincipal_peft.audit.storing import without_curves
from pages import Page

BOTTOM = 230.0  # where the axis of a chart of 270 units lies


def changed(made: AuditReport, edit: Callable[[Change], Change]) -> AuditReport:
    """``made`` with every change replaced by what ``edit`` makes of it."""
    weights = [dataclasses.replace(w, changes=[edit(change) for change in w.changes]) for w in made.weights]
    return dataclasses.replace(made, weights=weights)


def figure(text: str, name: str) -> str:
    """The figure of this title; empty without one."""
    found = [f for f in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if f"<b>{name}</b>" in f]
    return found[0] if found else ""


def points(drawn: str, name: str) -> list[tuple[float, float]]:
    """The first line of this name, in the chart's units."""
    match = re.search(rf"<title>{re.escape(name)}</title><path d=\"M([^\"]*)\"", drawn)
    return [(float(x), float(y)) for x, y in (pair.split() for pair in match[1].split("L"))] if match else []


def legend(drawn: str) -> list[str]:
    return re.findall(r'<li><i class="swatch[^>]*></i>(.*?)</li>', drawn)


def by_magnitude(*bins: Magnitudes) -> str:
    made = report(len(bins), kinds=("q_proj",), outside=False)
    for i, found in enumerate(bins):
        change = dataclasses.replace(made.weights[i].changes[0], magnitudes=found)
        made.weights[i] = dataclasses.replace(made.weights[i], changes=[change])
    return figure(page_of(made), "By magnitude.")


class TestMagnitudes:
    def test_a_bin_is_as_wide_as_what_it_holds(self) -> None:
        """Half of the entries are zero, so in one bin, and did not change."""
        line = points(by_magnitude(Magnitudes([0.0, 1.0, 2.0], [512, 256, 256], [0.0, 1.0, 0.5], None)), "all entries")
        assert len(line) == 64
        x = [at for at, _ in line]
        levels = [round((BOTTOM - y) / (BOTTOM - line[32][1]), 2) for _, y in line]
        assert levels == [0.0] * 32 + [1.0] * 16 + [0.5] * 16
        assert x[32] - x[0] == pytest.approx((x[-1] - x[0]) * 32 / 63, abs=0.2)

    def test_the_first_and_the_last_bin_are_drawn(self) -> None:
        rates = [1.0, *[0.5] * 62, 0.25]
        line = points(by_magnitude(Magnitudes([1.0] * 64, [16] * 64, rates, None)), "all entries")
        assert [y for _, y in line[1:-1]] == [line[1][1]] * 62 and line[0][1] < line[1][1] < line[-1][1]

    def test_principal_entries_that_never_changed_are_no_missing_ones(self) -> None:
        bins = Magnitudes([1.0, 2.0, 3.0, 4.0], [256] * 4, [0.8, 0.8, 0.4, 0.4], [None, 0.0, 0.0, 0.4])
        drawn = by_magnitude(bins)
        everything, on_mask = points(drawn, "all entries"), points(drawn, "on M_princ")
        assert [x for x, _ in on_mask] == [x for x, _ in everything[16:]]
        assert [y == BOTTOM for _, y in on_mask] == [True] * 32 + [False] * 16
        assert legend(drawn) == ["all entries", "on M_princ"]

    def test_without_a_mask_nothing_is_said_of_it(self) -> None:
        drawn = by_magnitude(Magnitudes([1.0, 2.0], [512, 512], [0.8, 0.4], None))
        assert legend(drawn) == ["all entries"] and points(drawn, "on M_princ") == []

    def test_weights_are_put_together_by_their_entries(self) -> None:
        """One knows its principal entries, the other does not; its entries are no principal ones that stayed."""
        known = Magnitudes([1.0, 2.0], [512, 512], [0.8, 0.8], [0.6, 0.6])
        drawn = by_magnitude(known, dataclasses.replace(known, rate=[0.4, 0.4], principal_rate=None))
        everything, on_mask = points(drawn, "all entries"), points(drawn, "on M_princ")
        assert everything == on_mask  # the mean of 0.8 and 0.4; 0.6 alone


def test_a_legend_names_what_is_drawn() -> None:
    made = changed(report(3), lambda change: dataclasses.replace(change, low=None))
    assert legend(figure(page_of(made), "Which entries changed.")) == ["on M_princ", "chance, M_princ"]
    assert len(legend(figure(page_of(report(3)), "Which entries changed."))) == 4


def test_an_angle_alone_is_no_curve() -> None:
    """Without its curves a report has the largest angles: they are those of index k, not of index 1."""
    text = page_of(without_curves(report(3)))
    assert "Principal angles" not in text and figure(text, "Largest angle and its bound.")
    assert "Principal angles, U." in page_of(report(3))


def test_small_angles_that_are_drawn_higher_are_said_to_be() -> None:
    def edit(change: Change) -> Change:
        angles = change.angles and dataclasses.replace(change.angles, output=[1e-9] * 6 + [1e-2] * 6)
        return dataclasses.replace(change, angles=angles)

    text = page_of(changed(report(2), edit))
    assert "Below 5.73e−5 degrees" in figure(text, "Principal angles, U.")
    assert "Below" not in figure(text, "Principal angles, V.")


def test_checkpoints_side_by_side_have_one_scale() -> None:
    def ticks(name: str) -> list[list[str]]:
        charts = re.findall(r"<svg.*?</svg>", figure(text, name), re.DOTALL)
        return [re.findall(r'y="[\d.]+" text-anchor="middle">([^<]*)<', chart)[:-1] for chart in charts]

    made = report(4, ("rl", "sft"))
    for weight in made.weights:
        if weight.changes[1].rows is not None:
            rows = dataclasses.replace(weight.changes[1].rows, std=0.5)
            weight.changes[1] = dataclasses.replace(weight.changes[1], rows=rows)
    text = page_of(made)
    one, two = ticks("Stripes.")
    assert one == two and len(one) > 2
    sides = ticks("Energy in the principal subspaces.")
    assert sides[::2] == sides[1::2] and len(sides) == 6  # the same side on the same scale, in one row
    assert sides[0] != sides[4]


def test_facts_are_what_they_are_called() -> None:
    """Twice: an update that hardly reaches into the subspaces, and rates whose quotient is no overlap over chance."""

    def edit(change: Change) -> Change:
        return dataclasses.replace(change, both=change.both and Share(2e-7, 0.01, 0.01))

    made = changed(report(2), edit)
    cells = re.search(r'<ul class="facts">(.*?)</ul>', page_of(made))
    assert cells is not None
    found = {what: value for value, what in re.findall(r"<b>(.*?)</b><span>(.*?)</span>", cells[1])}
    assert found["energy in top-k, over sizes alone"] == "2e−5 ×"
    row = total(made, 0)
    assert row.matched is not None and row.matched.ratio is not None and row.principal is not None
    assert found["on M_princ, over chance"] == f"{row.principal.value / row.principal.baseline:.2f} ×"
    assert found["changed on / off M_princ, at equal size"] == f"{row.matched.ratio:.2f} ×"


def test_weights_that_stayed_are_not_the_worst_case() -> None:
    """0 ≤ 0 is an equality of every weight that did not change, and says nothing."""
    made = report(3, kinds=("q_proj",), outside=False)
    for i, bound in enumerate([Inequality(0.0, 0.0, 1e-9), Inequality(0.5, 1.0), Inequality(0.2, 1.0)]):
        change = dataclasses.replace(made.weights[i].changes[0], bounds={"weyl": bound})
        made.weights[i] = dataclasses.replace(made.weights[i], changes=[change])
    for table in (t for t in Page(page_of(made)).tables if t[0][0].startswith("inequality")):
        row = next(row for row in table if row[0].startswith("Weyl"))
        assert row[1:5] == ["0.5", "1", "0.5", "50 %"] and row[-1] == made.weights[1].name


def test_a_right_side_of_zero_has_no_quotient() -> None:
    made = report(1, kinds=("q_proj",), outside=False)
    change = dataclasses.replace(made.weights[0].changes[0], bounds={"weyl": Inequality(1e-12, 0.0, 1e-9)})
    made.weights[0] = dataclasses.replace(made.weights[0], changes=[change])
    table = next(t for t in Page(page_of(made)).tables if t[0][0] == "inequality")
    row = next(row for row in table if row[0].startswith("Weyl"))
    assert row[1:6] == ["1e−12", "0", "−1e−12", "–", "yes"]


def test_consensus_counts_the_weights_it_knows() -> None:
    made = report(2, ("a", "b"))
    made.weights[1] = dataclasses.replace(made.weights[1], agreement=None)
    assert "Without weights that no checkpoint changed." in figure(page_of(made), "How many changed an entry.")
    assert "Without weights" not in figure(page_of(report(2, ("a", "b"), outside=False)), "How many changed an entry.")


def test_names_of_modules_are_escaped_everywhere() -> None:
    made = report(2, ("a", "b"), kinds=("q_proj", "down_proj"))
    hostile = '<b onclick="x">&amp;\x1b'
    weights = [dataclasses.replace(w, kind=w.kind + hostile, name=w.name + hostile) for w in made.weights]
    page = Page(page_of(dataclasses.replace(made, weights=weights, skipped=[(hostile, hostile)])))  # sees the onclick
    kinds = ["q_proj" + hostile, "down_proj" + hostile]
    assert all(page.text.count(kind) > 10 for kind in kinds)
    assert list(views(dataclasses.replace(made, weights=weights))[0].colours) == kinds


def test_curves_without_a_number_are_left_out() -> None:
    def edit(change: Change) -> Change:
        angles = change.angles and dataclasses.replace(change.angles, output=[1e-3] * 11 + [math.nan])
        return dataclasses.replace(change, angles=angles)

    assert not re.search(r'[ "ML]nan', page_of(changed(report(1), edit)))
