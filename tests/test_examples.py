"""Every example runs as its docstring says, stays under 80 lines and prints what it is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {"adapt_and_inspect.py": ["--steps", "12"], "safe_mask.py": ["--steps", "6"]}


def _run(example: Path) -> str:
    command = [sys.executable, "-W", "ignore", str(example), *ARGUMENTS[example.name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_short_enough_to_be_read(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 80


def test_adapt_and_inspect_shows_what_the_projection_does() -> None:
    output = _run(ROOT / "examples" / "adapt_and_inspect.py")
    rows = {}
    for line in output.splitlines():
        found = re.match(r"(lora|pissa|offprincipal) .*?([\d.]+)% +([\d.]+)% +([\d.]+)°", line)
        if found:
            rows[found[1]] = [float(value) for value in found.groups()[1:]]
    assert set(rows) == {"lora", "pissa", "offprincipal"}
    assert rows["offprincipal"][:2] == [0.0, 0.0]
    assert rows["offprincipal"][2] < 0.01 < rows["lora"][2]
    assert rows["pissa"][0] > 3 * rows["lora"][0]


def test_safe_mask_trains_what_the_masks_name_and_nothing_else() -> None:
    rows = {}
    for line in _run(ROOT / "examples" / "safe_mask.py").splitlines():
        found = re.match(r"(safe|random\(safe\)|principal|low & ~principal) +([\d.]+)% .*?([\d.]+)% +(\d+) ", line)
        if found:
            rows[found[1]] = [float(value) for value in found.groups()[1:]]
    assert set(rows) == {"safe", "random(safe)", "principal", "low & ~principal"}
    assert all(outside == 0 for _, _, outside in rows.values())
    assert all(0 < changed <= trained for trained, changed, _ in rows.values())
    assert rows["principal"][0] == 50.0
    assert rows["safe"][0] == rows["random(safe)"][0] > 58.59
