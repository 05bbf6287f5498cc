"""Jobs in processes of their own: one that imported the package once is copied for each (Python's "forkserver")."""

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["offprincipal_peft.interop.sparse_patch"])
# What changes files or what a folder lists, or makes it last: a process can die before and after each call.
CALLS = ((os, "replace"), (os, "unlink"), (os, "fsync"), (os, "open"), (io, "open"))


def begin(job: Callable[..., Any], *words: Any) -> BaseProcess:
    process = CONTEXT.Process(target=job, args=words)
    process.start()
    return process


def finish(job: Callable[..., Any], *words: Any, seconds: float = 120) -> int:
    """Run a job to its end; its exit code, minus the signal where it was killed."""
    process = begin(job, *words)
    process.join(seconds)
    assert process.exitcode is not None, f"the job took more than {seconds} s"
    return process.exitcode


def apply(target: str, patches: list[str], done: str = "") -> None:
    """Apply; then write how long it took, in seconds, into the file ``done``."""
    from offprincipal_peft.interop.sparse_patch import apply_patch

    if done:
        Path(done).with_suffix(".begun").touch()
    start = time.perf_counter()
    apply_patch(target, *patches)
    if done:
        Path(done).write_text(str(time.perf_counter() - start))


def apply_until(target: str, patches: list[str], call: int, after: bool) -> None:
    """Apply, and kill this process at the ``call``-th of the calls that change a folder: before it, or after it."""
    count = 0

    def counted(module: Any, name: str) -> Callable[..., Any]:
        real = getattr(module, name)

        def wrapped(*words: Any, **options: Any) -> Any:
            nonlocal count
            if name == "open" and not (words[1] & os.O_CREAT if module is os else "w" in words[1]):
                return real(*words, **options)  # which reads
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*words, **options)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    from offprincipal_peft.interop.sparse_patch import apply_patch

    for module, name in CALLS:
        setattr(module, name, counted(module, name))
    apply_patch(target, *patches)


def sizes() -> dict[str, int]:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}


def measure(words: dict[str, Any], block: int, result: str) -> None:
    """Make or apply with blocks of so many entries; how far the peak was above the start, into the file ``result``."""
    from offprincipal_peft.interop.sparse_patch import apply_patch, file, make_anchor, make_patch, states, writer

    file.BLOCK = states.BLOCK = block
    writer._SPOOLED = 1 << 20
    before = sizes()["VmRSS"]
    {"make": make_patch, "anchor": make_anchor, "apply": apply_patch}[words.pop("what")](*words["of"])
    Path(result).write_text(json.dumps(sizes()["VmHWM"] - before))
