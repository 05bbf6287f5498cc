"""Full disks, missing permissions, two processes at once, and what an interrupted change leaves."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interop.patches import jobs
from interop.patches.twins import LAYOUTS, State, listing, load, model_state, next_state, same, write
from offprincipal_peft.audit import open_checkpoint
from offprincipal_peft.interop.sparse_patch import PatchChain, PatchError, apply_patch, make_anchor, make_patch
from offprincipal_peft.interop.sparse_patch.commit import JOURNAL, LOCK, Target

MODULE = "offprincipal_peft.interop.sparse_patch"


def case(root: Path, layout: str) -> tuple[Path, Path, State, State]:
    """Target, patch, both states."""
    old = model_state()
    new = next_state(old, 1, ("a.weight", "c.cube", "f.codes", "e.long"))
    (root / "made").mkdir()
    first, second = write(root / "made/0", old, "file"), write(root / "made/1", new, "file")
    (root / "here").mkdir()
    patch = make_patch(first, second, root / "made/p.safetensors")
    return write(root / "here/t", old, layout), patch.path, old, new


def failing(name: str, call: int, number: int) -> tuple[Callable[..., Any], list[int]]:
    """``os.name`` that fails from its ``call``-th call on, and how often it was called."""
    real, count = getattr(os, name), [0]

    def wrapped(*words: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] >= call:
            raise OSError(number, os.strerror(number), str(words[0]))
        return real(*words, **options)

    return wrapped, count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
def test_a_full_disk_at_each_call(layout: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, patch, _, new = case(tmp_path, layout)
    before = listing(target)
    for call in range(1, 40):
        with monkeypatch.context() as context:
            broken, count = failing(name, call, errno.ENOSPC)
            context.setattr(os, name, broken)
            try:
                apply_patch(target, patch)
            except PatchError as error:
                assert "No space left on device" in str(error) and "What was there is as it was" in str(error)
                assert count[0] >= call and listing(target) == before, (name, call)
                continue
        break
    # What fails after the rename that counts (the folder's fsync) fails no change; modes are kept where they can be.
    assert same(load(target), new) and call >= {"fsync": 2, "replace": 2, "chmod": 1}[name]
    assert not [n for n in listing(target) if n.startswith(".")]


class Full:
    """A file on a full disk: it takes so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_is_full_while_weights_are_written(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offprincipal_peft.interop.sparse_patch.commit import Drafts

    target, patch, _, _ = case(tmp_path, layout)
    before, real = listing(target), Drafts.open
    monkeypatch.setattr(Drafts, "open", lambda self, path: Full(real(self, path), 700))
    with pytest.raises(PatchError, match="No space left on device"):
        apply_patch(target, patch)
    assert listing(target) == before


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the tests may run as root, whom no mode stops."""
    target, patch, _, _ = case(tmp_path, "sharded")
    before = listing(target)
    monkeypatch.setattr(os, "open", failing("open", 1, errno.EACCES)[0])
    with pytest.raises(PatchError, match=r"writing .*t failed: \[Errno 13\] Permission denied"):
        apply_patch(target, patch)
    assert listing(target) == before


def test_a_full_disk_while_a_copy_or_a_restored_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, patch, _, _ = case(tmp_path, "sharded")
    make_anchor(target, tmp_path / "made/anchor-00000000.safetensors")
    before = listing(tmp_path)
    monkeypatch.setattr(os, "fsync", failing("fsync", 1, errno.ENOSPC)[0])
    for layout_out in ("out", "here/t/out"):
        with pytest.raises(PatchError, match="No space left on device"):
            apply_patch(target, patch, out=tmp_path / layout_out)
    with pytest.raises(PatchError, match="No space left on device"):
        PatchChain.read(tmp_path / "made").restore(tmp_path / "out")
    assert listing(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_interrupt_right_after_the_new_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the rename and the next line: what the index names must not be taken for a leftover."""
    target, patch, _, new = case(tmp_path, "sharded")
    count, real = len(listing(target)), os.replace

    def replace(old: Any, new: Any) -> None:
        real(old, new)
        if str(new).endswith("index.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(target, patch)
    assert same(load(target), new) and len(listing(target)) == count


def test_old_shards_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new state is there; the next change tries again."""
    target, patch, old, new = case(tmp_path, "sharded")
    count, real = len(listing(target)), os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if str(path).endswith("of-00003.safetensors"):
            raise PermissionError(errno.EACCES, "no", str(path))
        real(path, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "unlink", unlink)
        apply_patch(target, patch)
    assert same(load(target), new) and (target / JOURNAL).is_file() and not (target / LOCK).exists()
    back = make_patch(target, tmp_path / "made/0.safetensors", tmp_path / "made/back.safetensors", step=2, base_step=1)
    refused = listing(target)
    apply_patch(target, back.path, out=tmp_path / "copy")
    assert listing(target) == refused and len(listing(tmp_path / "copy")) == count  # a copy takes nothing of it along
    apply_patch(target, back.path)
    assert same(load(target), old) and len(listing(target)) == count


@pytest.mark.parametrize(
    ("journal", "message"),
    [
        ("{", "was left by an interrupted change and cannot be used"),
        ("[]", "was left by an interrupted change and cannot be used"),
        ("{}", "was left by an interrupted change and cannot be used"),
        ('{"index": "config.json", "files": ["model-00001-of-00003.safetensors"]}', "has no weight_map with entries"),
    ],
)
def test_a_journal_that_says_nothing(journal: str, message: str, tmp_path: Path) -> None:
    target, patch, _, _ = case(tmp_path, "sharded")
    (target / JOURNAL).write_text(journal)
    before = listing(target)
    with pytest.raises(PatchError, match=message):
        apply_patch(target, patch)
    assert listing(target) == before


def test_a_journal_removes_nothing_but_what_it_names_in_its_folder(tmp_path: Path) -> None:
    target, patch, _, new = case(tmp_path, "sharded")
    (tmp_path / "here/outside.safetensors").write_bytes(b"x")
    (target / "stale.safetensors").write_bytes(b"x")
    (target / "other.safetensors").write_bytes(b"x")
    (target / ".model-00002-of-00003.safetensors.patching").write_bytes(b"x")
    files = ["../outside.safetensors", "stale.safetensors", "model-00001-of-00003.safetensors", "gone.safetensors"]
    (target / JOURNAL).write_text(json.dumps({"index": "model.safetensors.index.json", "files": files}))
    apply_patch(target, patch)
    names = set(listing(target))
    assert same(load(target), new) and (tmp_path / "here/outside.safetensors").exists()
    assert {"other.safetensors"} <= names and not {"stale.safetensors", JOURNAL} & names
    assert not [name for name in names if name.startswith(".")]


def test_a_journal_of_shards_beside_a_file(tmp_path: Path) -> None:
    """A lone file in the folder is changed: the shards' leftovers go by their own index."""
    target, patch, old, new = case(tmp_path, "sharded")
    lone = write(target / "lone", old, "file")
    (target / "stale.safetensors").write_bytes(b"x")
    journal = {
        "index": "model.safetensors.index.json",
        "files": ["stale.safetensors", "model-00001-of-00003.safetensors"],
    }
    (target / JOURNAL).write_text(json.dumps(journal))
    apply_patch(lone, patch)
    assert same(load(lone), new) and same(load(target), old)
    assert not (target / "stale.safetensors").exists() and not (target / JOURNAL).exists()
    (target / JOURNAL).write_text(json.dumps({"index": "gone.safetensors.index.json", "files": ["lone.safetensors"]}))
    apply_patch(target, patch)
    assert lone.exists() and not (target / JOURNAL).exists()


# -- two at once ------------------------------------------------------------------------------------------------------


def hold(folder: str, ready: Any, go: Any) -> None:
    with Target(Path(folder)).changing():
        ready.set()
        go.wait(60)


@pytest.mark.parametrize("layout", ["file", "sharded"])
def test_a_second_process_is_refused_and_then_is_not(layout: str, tmp_path: Path) -> None:
    target, patch, _, new = case(tmp_path, layout)
    ready, go = jobs.CONTEXT.Event(), jobs.CONTEXT.Event()
    other = jobs.begin(hold, str(target), ready, go)
    assert ready.wait(60)
    before = listing(target)
    with pytest.raises(PatchError, match=r"another process is changing a checkpoint in .*; wait until it is done"):
        apply_patch(target, patch)
    assert listing(target) == before
    apply_patch(target, patch, out=tmp_path / ("out.safetensors" if layout == "file" else "out"))
    go.set()
    other.join()
    assert other.exitcode == 0 and not (tmp_path / "here" / LOCK).exists()
    apply_patch(target, patch)
    assert same(load(target), new)


def race(target: str, patches: list[str], result: str) -> None:
    """Try until it works or the target is at the last step."""
    refusals = 0
    while True:
        try:
            apply_patch(target, *patches)
            break
        except PatchError as error:
            if "another process" not in str(error):
                Path(result).write_text(f"{refusals} {error}")
                return
            refusals += 1
            time.sleep(0.001)
    Path(result).write_text(f"{refusals} applied")


def test_processes_that_race_change_it_once(tmp_path: Path) -> None:
    """Of three that apply the same patch at once one does it, and the others see the new state."""
    target, patch, _, new = case(tmp_path, "sharded")
    for turn in range(3):
        results = [tmp_path / f"result-{turn}-{i}" for i in range(3)]
        others = [jobs.begin(race, str(target), [str(patch)], str(result)) for result in results]
        for process in others:
            process.join(60)
        said = [result.read_text() for result in results]
        assert sum(text.endswith("applied") for text in said) == 1, said
        assert sum("at step 1 already" in text for text in said) == 2, said
        assert same(load(target), new) and not [n for n in listing(target) if n.startswith(".")]
        back = tmp_path / f"made/back-{turn}.safetensors"
        make_patch(target, tmp_path / "made/0.safetensors", back, step=2, base_step=1)
        apply_patch(target, back)


def test_a_lock_that_was_removed_meanwhile_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, then its holder removed it: locking that file would lock nothing."""
    import fcntl

    target, patch, _, new = case(tmp_path, "sharded")
    real, taken = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not taken:
            (target / LOCK).unlink()
        real(handle, how)
        taken.append(os.fstat(handle).st_ino == (target / LOCK).stat().st_ino if (target / LOCK).exists() else False)

    monkeypatch.setattr(fcntl, "flock", flock)
    apply_patch(target, patch)
    assert taken == [False, True] and same(load(target), new)


def test_disks_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, patch, _, new = case(tmp_path, "sharded")

    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    apply_patch(target, patch)
    assert same(load(target), new) and not (target / LOCK).exists()


def test_a_change_between_looking_and_locking_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is read only by who is alone with it."""
    target, patch, _, new = case(tmp_path, "sharded")
    real = Target.changing
    turns = []

    def changing(self: Target) -> Any:
        if not turns:
            turns.append(1)
            apply_patch(target, patch)  # as another process would
        return real(self)

    monkeypatch.setattr(Target, "changing", changing)
    with pytest.raises(PatchError, match="it is at step 1 already"):
        apply_patch(target, patch)
    with open_checkpoint(target) as opened:
        assert same({name: opened.read(name) for name in opened.tensors}, new)
