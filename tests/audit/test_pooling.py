"""Pooled figures are those of the weights as one, and broken numbers stay out of them."""

import dataclasses
import math

import pytest

from audit.reports import KINDS, report
from offprincipal_peft.audit.pooling import by_layer, by_place, by_reason, kinds, labels, pool, total
from offprincipal_peft.audit.results import AuditReport, Change, Matched, Overlap, Share, Spectrum, WeightAudit


def weight(change: Change, entries: int = 100, norm: float = 1.0, name: str = "w") -> WeightAudit:
    return WeightAudit(name, "q_proj", 0, (10, entries // 10), ["BF16", "BF16"], entries, norm, [change])


def test_counts_norms_and_shifts() -> None:
    first = Change(10, 12, norm=3.0, largest=1.0, spectrum=Spectrum(0.5, 0.1, 1.0, 2.0, 0.0))
    second = Change(50, 50, norm=4.0, largest=1.0, spectrum=Spectrum(0.25, 0.1, 1.0, 2.0, 0.0))
    row = pool("x", [weight(first, 100, 6.0), weight(second, 300, 8.0)], 0)
    assert (row.weights, row.entries, row.changed, row.stored_changed) == (2, 400, 60, 62)
    assert row.sparsity == pytest.approx(0.85)
    assert row.relative_norm == pytest.approx(0.5)  # 5 / 10
    assert row.shift == pytest.approx(math.hypot(3.0, 2.0) / 10)  # the shift of both spectra together


def test_shares_are_weighted_by_what_they_are_shares_of() -> None:
    first = Change(10, 10, 1.0, 1.0, low=Overlap(0.5, 0.2), both=Share(0.1, 0.2, 0.4))
    second = Change(30, 30, 2.0, 1.0, low=Overlap(0.9, 0.4), both=Share(0.6, 0.2, 0.8))
    row = pool("x", [weight(first), weight(second)], 0)
    assert row.low is not None and row.principal is None
    assert (row.low.value, row.low.baseline) == pytest.approx((0.8, 0.35))
    assert row.shares["both"].value == pytest.approx((0.1 + 4 * 0.6) / 5)
    assert row.energy == pytest.approx(0.5 / 0.72)


def test_matched_rates_count_the_entries_with_partners() -> None:
    first = Change(10, 10, 1.0, 1.0, matched=Matched(0.2, 0.4, 1.0, 1.0, 0.5, 0.1))
    second = Change(10, 10, 1.0, 1.0, matched=Matched(0.6, 0.4, 1.0, 1.0, 0.5, 0.2))
    row = pool("x", [weight(first, 300), weight(second, 100)], 0)
    assert row.matched is not None
    assert (row.matched.rate, row.matched.other_rate, row.matched.coverage) == pytest.approx((0.3, 0.4, 0.5))
    assert row.matched.ratio == pytest.approx(0.75)
    assert row.matched.error == pytest.approx(math.hypot(0.5 * 0.1, 0.5 * 0.2))
    none = dataclasses.replace(second, matched=Matched(0.6, 0.4, 1.0, 1.0, 0.5, None))
    pooled = pool("x", [weight(first, 300), weight(none, 100)], 0).matched
    assert pooled is not None and pooled.error is None


def test_what_is_not_a_number_stays_out() -> None:
    good = Change(10, 10, 2.0, 1.0, principal=Overlap(0.5, 0.5), output=Share(0.1, 0.1, 0.1))
    bad = Change(10, 10, math.nan, math.inf, principal=Overlap(math.nan, 0.5), output=Share(math.nan, 0.1, 0.1))
    row = pool("x", [weight(good, norm=4.0), weight(bad)], 0)
    assert row.relative_norm == 0.5 and row.shares["output"] == Share(0.1, 0.1, 0.1)
    assert row.principal is not None and row.principal.value == 0.5
    alone = pool("x", [weight(bad)], 0)
    assert alone.relative_norm is None and alone.principal is None and alone.shares == {} and alone.energy is None


def test_nothing_pools_to_nothing() -> None:
    row = pool("x", [], 0)
    assert row.sparsity is None and row.relative_norm is None and row.matched is None
    still = pool("x", [weight(Change(0, 0, 0.0, 0.0, low=Overlap(0.0, 0.3), both=Share(0.0, 0.1, 0.0)))], 0)
    assert still.sparsity == 1.0 and still.relative_norm == 0.0 and still.low is None and still.energy is None


def test_rows_are_in_order_and_hold_every_weight() -> None:
    made = report(12, ("a", "b", "a"))
    rows = by_layer(made, 1)
    assert [row.name for row in rows] == [*(f"layer {i}" for i in range(12)), "outside"]
    assert sum(row.weights for row in rows) == len(made.weights) == total(made, 1).weights
    assert kinds(made) == [*KINDS, "embed_tokens", "norm"]
    by_name = dataclasses.replace(made, weights=sorted(made.weights, key=lambda weight: weight.name))
    assert kinds(by_name) == kinds(made)
    assert labels(made) == ["a (1)", "b", "a (3)"]
    assert by_reason(made.skipped)[0][0] == "missing in tuned"


def test_experts_of_a_layer_are_one_place() -> None:
    made = report(1, kinds=("up_proj",), outside=False)
    twins: AuditReport = dataclasses.replace(made, weights=[made.weights[0], made.weights[0]])
    assert by_place(twins, 0)["up_proj", 0].weights == 2
