"""`import offprincipal_peft` pulls in no heavy package that `import peft` has not pulled in already."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("bitsandbytes", "datasets", "matplotlib", "pandas", "pyarrow", "ray", "scipy", "sklearn", "trl")

PROBE = """
import json, sys
import peft
before = {name.partition(".")[0] for name in sys.modules}
__import__(sys.argv[1])
assert sys.argv[1] in sys.modules
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - before)))
"""


def newly_imported(package: str, root: Path) -> set[str]:
    """Top-level packages that `package` imports beyond those of `peft`, in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROBE, package]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_is_light():
    new = newly_imported("offprincipal_peft", ROOT)
    assert "offprincipal_peft" in new
    assert not new & set(HEAVY)


def test_a_heavy_import_is_seen(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    (tmp_path / "heavy_package.py").write_text("import ray\n")
    assert newly_imported("heavy_package", tmp_path) & set(HEAVY) == {"ray"}
