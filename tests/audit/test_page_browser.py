"""A browser opens audits' pages: they load nothing, complain about nothing, fit wide and narrow, draw everything."""

from pathlib import Path

import pytest

from audit.reports import report
from browser import WIDTHS, WITHOUT, faults, look, luminance
from offprincipal_peft.audit.page import page_of

CASES = {
    "one": report(28),
    "five": report(4, ("rl", "rl-b", "sft", "d", "e")),
    "one layer": report(1, outside=False),
    "still": report(2, still=True),
    "counts": report(2, probes=("bf16",)),
    "long names": report(1, ("a-checkpoint-with-a-long-name-and-no-space-anywhere-in-it/step-001000", "b" * 80)),
}

pytestmark = [pytest.mark.slow, WITHOUT]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_every_audit_whole(tmp_path: Path, dark: bool) -> None:
    frames, console = look(tmp_path, {name: page_of(made) for name, made in CASES.items()}, dark)
    assert console == []
    assert len(frames) == len(CASES) * len(WIDTHS)
    assert {name: found for name, frame in frames.items() if (found := faults(frame))} == {}
    for name, frame in frames.items():
        assert frame["outside"] == 0, name
        assert (luminance(frame["paper"]) < 0.1) == dark
