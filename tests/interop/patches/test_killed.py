"""A process that is killed while it applies leaves the old state or the new, and the next one removes what it left."""

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from interop.patches import jobs
from interop.patches.twins import LAYOUTS, State, changed, draw, listing, load, same, write
from offprincipal_peft.audit import open_checkpoint
from offprincipal_peft.interop.sparse_patch import apply_patch, make_patch

KILLS = 10  # for each of two layouts: 20


def pair(size: int) -> tuple[State, State]:
    old = {f"layer.{i}": draw(torch.bfloat16, (size, 8), i) for i in range(3)}
    new = {name: changed(value, size, 9) for name, value in old.items() if name != "layer.1"}
    return old, old | new


def setup(root: Path, layout: str, size: int) -> tuple[Path, Path, tuple[State, State], set[str]]:
    """A target, a patch for it, both states, and the names in its folder."""
    states = pair(size)
    (root / "made").mkdir()
    first, second = (write(root / "made" / str(i), state, "file") for i, state in enumerate(states))
    patch = make_patch(first, second, root / "made/patch.safetensors").path
    (root / "here").mkdir()
    target = write(root / "here/t", states[0], layout)
    return target, patch, states, set(listing(target))


def check(target: Path, patch: Path, states: tuple[State, State], names: set[str]) -> int:
    """Old or new, then apply again or go on; 0 for the old state, 1 for the new."""
    with open_checkpoint(target) as opened:  # by the package's own reader too
        own = {name: opened.read(name) for name in opened.tensors}
    found = load(target)
    assert same(found, own)
    state = next(i for i, state in enumerate(states) if same(found, state))
    back = make_patch(
        target, patch.with_name(f"{state}.safetensors"), patch.with_name("idle.safetensors"), overwrite=True
    )
    assert back.count == 0
    if state == 0:
        apply_patch(target, patch)
    else:
        apply_patch(target, back.path)  # changes nothing, and removes what was left
    assert same(load(target), states[1])
    left = set(listing(target))
    assert len(left) == len(names) and not [name for name in left if name.startswith(".")]
    return state


def restored(target: Path, source: Path) -> None:
    folder = target if target.is_dir() else target.parent
    shutil.rmtree(folder)
    shutil.copytree(source, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_each_step_of_the_commit(layout: str, tmp_path: Path) -> None:
    target, patch, states, names = setup(tmp_path, layout, 64)
    folder = target if target.is_dir() else target.parent
    shutil.copytree(folder, tmp_path / "kept")
    seen = []
    for call in itertools.count(1):
        codes = []
        for after in (False, True):
            restored(target, tmp_path / "kept")
            codes.append(jobs.finish(jobs.apply_until, str(target), [str(patch)], call, after))
            if codes[-1] == -signal.SIGKILL:
                seen.append(check(target, patch, states, names))
        if codes == [0, 0]:
            break
    # Killed before and after each of lock, draft, fsync, rename, journal, index and removal; once the new state is
    # there it stays.
    assert seen == sorted(seen) and set(seen) == {0, 1}
    assert len(seen) >= (40 if layout == "sharded" else 12)  # observed: 45 and 15


@pytest.mark.parametrize("layout", ["file", "sharded"])
def test_at_random_moments(layout: str, tmp_path: Path) -> None:
    target, patch, states, names = setup(tmp_path, layout, 1 << 19)  # three tensors of 8 MiB
    folder = target if target.is_dir() else target.parent
    shutil.copytree(folder, tmp_path / "kept")
    done, begun = tmp_path / "done", tmp_path / "done.begun"
    assert jobs.finish(jobs.apply, str(target), [str(patch)], str(done)) == 0
    seconds, generator, killed = float(done.read_text()), random.Random(layout), 0
    while killed < KILLS:
        restored(target, tmp_path / "kept")
        done.unlink(missing_ok=True)
        begun.unlink()
        process = jobs.begin(jobs.apply, str(target), [str(patch)], str(done))
        while not begun.exists():
            time.sleep(0.0002)
        time.sleep(generator.random() * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if done.exists() and done.read_text():  # it was faster than the kill
            seconds = min(seconds, float(done.read_text()))
        check(target, patch, states, names)
