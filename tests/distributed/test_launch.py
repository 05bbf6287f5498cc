"""No run of several processes outlives its limit, and a failure of one is told."""

import os
import time
from pathlib import Path

import pytest

from distributed.launch import RankFailedError, run_ranks


def running(folder: Path) -> list[str]:
    """Processes whose command names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if str(folder) in command and int(process.name) != os.getpid():
            found.append(command)
    return found


def test_processes_that_hang_are_killed(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"\[None, None\] \(None: killed after 1 s\)"):
        run_ranks("distributed.stuck:sleeps", tmp_path, limit=1.0)
    assert running(tmp_path) == []


def test_a_failure_of_one_ends_the_other(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="planted"):
        run_ranks("distributed.stuck:one_fails", tmp_path, limit=120.0)
    assert time.monotonic() - start < 100  # the other would have waited for the whole of its patience
    assert running(tmp_path) == []
