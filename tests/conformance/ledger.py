"""Skips and deselections of PEFT's tests, held against the explanations in explained.py.

A test that PEFT's own code skips must have an explanation with that reason, and one that is explained as skipped must
skip: anything else is a failure. A deselected test is not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

from conformance.explained import DESELECTED, SKIPPED, Deselected, Skipped

SEEN = pytest.StashKey[set[str]]()


def identity(item: pytest.Item) -> str:
    """``module::class::test[case]``, with the module's name alone."""
    return f"{item.path.stem}::{item.nodeid.split('::', 1)[1]}"


def is_adopted(item: pytest.Item) -> bool:
    """Whether PEFT wrote the test."""
    function = getattr(item, "function", None)
    return getattr(function, "__module__", "").startswith("peft_own_tests.")


def matches(pattern: str, name: str) -> bool:
    """``pattern`` is ``test`` or ``test[case]`` with ``*``; it must match the whole name from some ``::`` on.

    A case's brackets are literal.
    """
    test, bracket, case = pattern.partition("[")
    own, _, own_case = name.partition("[")
    starts = [own, *(own[m.end() :] for m in re.finditer("::", own))]
    if not any(fnmatchcase(start, test) for start in starts):
        return False
    return not bracket or fnmatchcase(own_case.removesuffix("]"), case.removesuffix("]").replace("[", "[[]"))


def deselection(name: str) -> Deselected | None:
    return next((each for each in DESELECTED if any(matches(p, name) for p in each.tests)), None)


def expected_skip(name: str) -> Skipped | None:
    return next((each for each in SKIPPED if any(matches(p, name) for p in each.tests)), None)


def judge(name: str, report: pytest.TestReport) -> str | None:
    """What is wrong with the outcome of an adopted test's call or setup, if anything is beside its own failure."""
    expected = expected_skip(name)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if expected is None or not re.search(expected.reason, reason):
            return f"PEFT's test skipped itself, which explained.py does not explain: {reason}"
    elif report.passed and expected is not None and report.when == "call":
        return f"explained.py says that this test skips itself ({expected.reason!r}), but it ran: remove that."
    return None


def unused(names: Iterable[str]) -> list[str]:
    """Patterns of explanations that match none of the collected tests, for the modules that were collected."""
    names = list(names)
    patterns = [pattern for each in (*DESELECTED, *SKIPPED) for pattern in each.tests]
    return [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
