"""Peak memory of the whole command, in a process of its own: the bar of docs/audit.md for any number of shards.

Read from /proc: getrusage's peak survives exec, so a child would report the test runner's own size.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")

FLOOR = 500_000_000  # bytes: the process with torch and peft, and buffers
ENTRY = 16  # bytes for each entry of the largest tensor: four fp32 copies
EXACT = 32  # bytes more for each entry of the largest matrix that is decomposed: eight fp32 copies
WIDE, EMBEDDING = (1024, 4096), (60_000, 1024)
COMMAND = """
import json, sys
from offprincipal_peft import cli
from offprincipal_peft.interop import audit_source
def sizes():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}
before = sizes()
code = cli.main(sys.argv[1:])
print(json.dumps({"code": code, "before": before["VmRSS"], "peak": sizes()["VmHWM"]}), file=sys.stderr)
"""


def draw(shape: tuple[int, int], seed: int) -> Iterator[torch.Tensor]:
    """A bf16 weight, and it with a third of its entries moved by a step or so."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator).mul_(0.02)
    yield base
    for part in base.view(-1).split(1 << 22):
        kept = torch.rand(part.shape, generator=generator) < 0.67
        part.mul_(torch.where(kept, 1.0, 1.01).bfloat16())
    yield base


def pair_of_folders(root: Path, shards: dict[str, dict[str, tuple[int, int]]]) -> list[str]:
    """The same shapes before and after, one file after the other so that this process stays small as well."""
    folders = [root / "base", root / "tuned"]
    places = {name: file for file, tensors in shards.items() for name in tensors}
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for file, tensors in shards.items():
        sides = {name: draw(shape, seed) for seed, (name, shape) in enumerate(tensors.items())}
        for folder in folders:
            save_file({name: next(side) for name, side in sides.items()}, folder / file)
    return [str(folder) for folder in folders]


def measured(words: list[str]) -> dict[str, int]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", COMMAND, "audit", *words], capture_output=True, text=True, env=env)
    found = json.loads(done.stderr.splitlines()[-1])
    assert found.pop("code") == 0, done.stderr
    print(found, f"above the start: {(found['peak'] - found['before']) / 1e6:.0f} MB")
    return found


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of one matrix, wide ones and a tall one."""
    shards = {f"model-{i}.safetensors": {f"model.layers.{i}.mlp.x.weight": WIDE[:: (1, -1)[i % 2]]} for i in range(3)}
    return pair_of_folders(tmp_path_factory.mktemp("matrices"), shards)


def entries(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def test_matrices_in_fast_mode(matrices: list[str], tmp_path: Path) -> None:
    found = measured([*matrices, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")])
    assert found["peak"] <= FLOOR + ENTRY * entries(WIDE)


def test_matrices_in_exact_mode(matrices: list[str]) -> None:
    found = measured([*matrices, "--mode", "exact", "--layers", r"layers\.0\."])
    assert found["peak"] <= FLOOR + (ENTRY + EXACT) * entries(WIDE)


def test_an_embedding_of_60_million_entries(tmp_path: Path) -> None:
    shards = {
        "model-1.safetensors": {"model.embed_tokens.weight": EMBEDDING},
        "model-2.safetensors": {"model.layers.0.mlp.down_proj.weight": WIDE},
        "model-3.safetensors": {"model.layers.1.mlp.down_proj.weight": WIDE},
    }
    found = measured(pair_of_folders(tmp_path, shards))
    assert found["peak"] <= FLOOR + ENTRY * entries(EMBEDDING)
