"""A browser opens the report: it loads nothing, complains about nothing, fits wide and narrow, draws everything."""

from pathlib import Path

import pytest

from browser import WIDTHS, WITHOUT, faults, look, luminance
from rlvr.records_sample import failed_record, record, sweep

pytest.importorskip("scipy")

from offprincipal_peft.rlvr.report import build_report

CASES = {
    "five methods": [*sweep(rates=(5e-5, 2e-4, 8e-4), depth=30), failed_record(seed=9)],
    "one trial": [record("offprincipal")],
    "failed": [failed_record("lora", "a_very_long_word_" * 30)],
    "twenty methods": sweep(tuple(f"method-with-a-name-{i:02d}" for i in range(20)), seeds=2, depth=30),
    "long name": sweep(("matched(principal)&~low|thinned(principal)_and_no_space_anywhere", "lora"), seeds=1),
}
BROKEN = (
    '<!doctype html><html><body><div style="width:900px">wide</div><svg width="0" height="0"></svg>'
    '<table><tr><td style="max-width:20px">overlap</td></tr></table><img src="http://127.0.0.1:9/outside.png">'
    '<script>console.error("broken on purpose")</script></body></html>'
)


pytestmark = [pytest.mark.slow, WITHOUT]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_every_report_whole(tmp_path: Path, dark: bool) -> None:
    pages = {name: build_report(tmp_path, records).html for name, records in CASES.items()}
    frames, console = look(tmp_path, pages, dark)
    assert console == []
    assert len(frames) == len(CASES) * len(WIDTHS)
    assert {name: faults(frame) for name, frame in frames.items() if faults(frame)} == {}
    for name, frame in frames.items():
        assert frame["width"] == int(name.rpartition("/")[2])
        assert frame["outside"] == 0, name
        assert len(frame["sizes"]) >= frame["figures"] >= (0 if name.startswith("failed") else 4)
        assert (luminance(frame["paper"]) < 0.1) == dark


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    frames, console = look(
        tmp_path, {"broken": BROKEN, "blank ink": "<!doctype html><body style='color:#eee;background:#fff'>x"}
    )
    found = " ".join(faults(frames["broken/400"]))
    assert "loads http://127.0.0.1:9/outside.png" in found
    assert "needs 9" in found and "an empty figure" in found
    assert "runs out of its cell: overlap" in found
    assert any("broken on purpose" in line for line in console)
    assert "rgb(238, 238, 238) on" in " ".join(faults(frames["blank ink/1200"]))
