"""A browser opens pages: what they load, whether they fit, and what a person would object to.

All pages are shown in frames of one window, so that one start of the browser looks at all of them. Where there is no
chromium the tests are skipped; tests/install_chromium.sh installs it on Debian.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1200, 400)
WITHOUT = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; tests/install_chromium.sh installs it on Debian")
# What each frame shows, measured by the window around it.
MEASURE = """
window.addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow;
    page.querySelectorAll("details").forEach(d => d.open = true);
    const style = view.getComputedStyle(page.body);
    const sizes = [...page.querySelectorAll("svg")].map(s => [s.clientWidth, s.clientHeight]);
    const texts = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
    return {
      name: frame.name, width: view.innerWidth, needed: page.documentElement.scrollWidth,
      sizes: sizes, figures: page.querySelectorAll("figure").length,
      smallest: Math.min(...texts.map(t => Math.min(t.width, t.height)), 99),
      outside: texts.filter(t => t.left < 0 || t.right > view.innerWidth + 0.5).length,
      cut: [...page.querySelectorAll("th, td, li")]
        .filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.textContent),
      loaded: view.performance.getEntriesByType("resource").map(e => e.name),
      ink: style.color, paper: style.backgroundColor,
    };
  });
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
"""


def look(folder: Path, pages: dict[str, str], dark: bool = False) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(frame name → what it shows, lines of the browser's console)."""
    frames = "".join(
        f'<iframe name="{name}/{width}" style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}">'
        "</iframe>"
        for name, text in pages.items()
        for width in WIDTHS
    )
    window = folder / "window.html"
    window.write_text(f"<!doctype html><meta charset=utf-8><script>{MEASURE}</script><body>{frames}", encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=1300,900"]
    command += ["--virtual-time-budget=20000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [*command, "--dump-dom", window.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HOME": str(folder)},
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the browser measured nothing:\n{done.stderr[-2000:]}"
    found = json.loads(html.unescape(match[1]))
    return {frame.pop("name"): frame for frame in found}, [x for x in done.stderr.splitlines() if "CONSOLE" in x]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of "rgb(r, g, b)"."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def faults(frame: dict[str, Any]) -> list[str]:
    """What a person would object to."""
    found = [f"loads {name}" for name in frame["loaded"]]
    if frame["needed"] > frame["width"]:
        found.append(f"needs {frame['needed']} px of {frame['width']}")
    found += [f"runs out of its cell: {text}" for text in frame["cut"]]
    if any(min(size) < 20 for size in frame["sizes"]):
        found.append(f"an empty figure: {frame['sizes']}")
    if frame["smallest"] < 2:
        found.append(f"text of {frame['smallest']} px")
    light, dark = sorted((luminance(frame["ink"]), luminance(frame["paper"])), reverse=True)
    if (light + 0.05) / (dark + 0.05) < 7:
        found.append(f"{frame['ink']} on {frame['paper']}")
    return found
