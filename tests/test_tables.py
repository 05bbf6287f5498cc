"""The README shows what the committed result files hold."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "tables.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


def test_readme_is_rendered_from_the_results() -> None:
    done = _check(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    for name in ("README.md", "benchmarks/tables.py", *_results()):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    assert _check(tmp_path).returncode == 0
    readme = tmp_path / "README.md"
    text = readme.read_text()
    begin = text.index("figures: begin")
    row = text.index("4096 × 4096, fp32 | ", begin) + len("4096 × 4096, fp32 | ")
    readme.write_text(text[:row] + "0.10" + text[row + 4 :])
    done = _check(tmp_path)
    assert done.returncode == 1
    assert "make tables" in done.stderr


def _results() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").rglob("*.json"))
