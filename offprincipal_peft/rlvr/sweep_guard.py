"""Runs one command and ends it, with everything it started, as soon as whoever asked for it is gone.

``python -I -S sweep_guard.py [--keep FD] COMMAND…``; standard library only and run as a file, so that it starts in
milliseconds. Its standard input is a pipe that only the caller holds: the end of the file means that the caller died,
also by SIGKILL, which no handler in the caller could answer. A trial that outlived its sweep would otherwise be run
a second time beside itself by the resumed sweep.

What ends the command: SIGTERM to its process group, and after ``GRACE`` seconds SIGKILL. On Linux the guard adopts
orphans (PR_SET_CHILD_SUBREAPER), so that workers that moved to a session of their own, as torchrun's do, are found and
killed as well, and a guard that is itself killed takes the command along (PR_SET_PDEATHSIG). On other POSIX systems
only the process group is ended. ``--keep FD`` leaves a descriptor open in the command: a lock on it is held until
guard and command are both gone.

The exit status is the command's; 128 + the signal's number where a signal ended it, as shells have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(arguments: list[str]) -> int:
    keep: tuple[int, ...] = ()
    if arguments[:1] == ["--keep"]:
        keep, arguments = (int(arguments[1]),), arguments[2:]
    if not arguments:
        print("usage: sweep_guard.py [--keep FD] COMMAND...", file=sys.stderr)
        return 2
    wake = _wake_on_child()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, pass_fds=keep, process_group=0, preexec_fn=_dies_with(os.getpid())
        )
    except OSError as error:
        print(f"cannot start {arguments[0]}: {error}", file=sys.stderr)
        return 127
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the pipe of the output is the command's alone
    orphaned = _wait(child, wake)
    if orphaned:
        _end(child)
    _kill_rest(child.pid)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _wake_on_child() -> int:
    """A descriptor that becomes readable when a child ends."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _wait(child: subprocess.Popen[bytes], wake: int) -> bool:
    """Wait for the command's end (False) or the caller's (True)."""
    while child.poll() is None:
        # The timeout is for a signal between poll and select only; the wake-up descriptor does the work.
        ready, _, _ = select.select([0, wake], [], [], 1.0)
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready and not os.read(0, 4096):
            return True
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal_group(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()


def _kill_rest(group: int) -> None:
    """Kill what the command left behind: its group, and on Linux every descendant."""
    _signal_group(group, signal.SIGKILL)
    deadline = time.monotonic() + GRACE
    while (pids := _descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.01)
    _reap()


def _descendants(root: int) -> list[int]:
    """Processes below ``root`` that still run; an empty list where there is no /proc."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # it ended just now
            continue
        pid = int(entry.parent.name)
        children.setdefault(int(parent), []).append(pid)
        if state in "ZX":
            zombies.add(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        queue += below
        found += [pid for pid in below if pid not in zombies]
    return found


def _reap() -> None:
    """Collect adopted orphans. The command itself was collected before, so none of its status is taken here."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS: EPERM for a group of zombies
        os.killpg(group, number)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _dies_with(guard: int) -> Callable[[], None]:
    def ask() -> None:
        # SIGTERM, not SIGKILL: a launcher ends its workers on it, and only then itself.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:  # it died before the request
            os._exit(1)

    return ask


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
