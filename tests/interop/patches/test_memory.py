"""Peak memory of making and applying in processes of their own: a number of blocks, however long a tensor is."""

import json
from pathlib import Path

import pytest
import torch

from interop.patches import jobs
from interop.patches.twins import write

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")

ENTRIES = 18_000_000  # fp32: 72 MB
BLOCK = 1 << 16
BOUND = 45_000_000  # bytes over the start. Observed: at most 29 MB


def measured(what: str, of: list[str], tmp_path: Path) -> int:
    result = tmp_path / "peak.json"
    assert jobs.finish(jobs.measure, {"what": what, "of": of}, BLOCK, str(result)) == 0
    peak: int = json.loads(result.read_text())
    print(f"{what}: {peak / 1e6:.1f} MB over the start")
    return peak


@pytest.mark.parametrize("every", [1, 100], ids=["everything changed", "one in a hundred"])
def test_far_below_a_tensor(every: int, tmp_path: Path) -> None:
    value = torch.zeros(ENTRIES)
    before = write(tmp_path / "before", {"x": value}, "file", metadata={})
    value[::every] = 1
    after = write(tmp_path / "after", {"x": value}, "file", metadata={})
    del value
    patch, anchor = (str(tmp_path / f"{name}.safetensors") for name in ("patch", "anchor"))
    assert measured("make", [str(before), str(after), patch], tmp_path) < BOUND
    assert measured("anchor", [str(before), anchor], tmp_path) < BOUND
    back = str(tmp_path / "back.safetensors")
    assert measured("make", [str(after), str(before), back], tmp_path) < BOUND
    assert measured("apply", [str(before), anchor, patch], tmp_path) < BOUND
    assert before.read_bytes() == after.read_bytes()


def test_many_patches_at_once(tmp_path: Path) -> None:
    """A hundred patches of a tensor share the memory of one."""
    from offprincipal_peft.interop.sparse_patch import make_patch

    value = torch.zeros(200_000, dtype=torch.int64)
    paths, patches = [write(tmp_path / "0", {"x": value}, "file", metadata={})], []
    for step in range(1, 101):
        value[step::2] = step
        paths.append(write(tmp_path / str(step), {"x": value}, "file", metadata={}))
        out = tmp_path / f"patch-{step}.safetensors"
        patches.append(str(make_patch(paths[-2], paths[-1], out, step=step, base_step=step - 1).path))
    # 100 readers of 65,536 entries each would hold 100 MB; observed: 29 MB
    assert measured("apply", [str(paths[0]), *patches], tmp_path) < 45_000_000
    assert paths[0].read_bytes() == paths[-1].read_bytes()
