"""Run Python functions in several processes that form a gloo group on this machine, with a limit on their time."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 240.0  # seconds until every process is killed; no result depends on it


class RankFailedError(AssertionError):
    """A process ended with an error or was still running at the limit."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(checks: str, folder: Path, *, world: int = 2, limit: float = LIMIT) -> list[dict[str, Any]]:
    """What ``checks`` (``"module:function"`` below tests/) returned on each rank, given the rank and ``folder``.

    Raises `RankFailedError` with the processes' output where one fails or does not end; the others are killed then.
    """
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "distributed.worker", checks, str(folder)]
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(command, env=own, cwd=TESTS, stdout=output, stderr=subprocess.STDOUT, text=True)
            )
    try:
        _wait(processes, logs, limit)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def _wait(processes: list["subprocess.Popen[str]"], logs: list[Path], limit: float) -> None:
    end = time.monotonic() + limit
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed or time.monotonic() > end:
            time.sleep(1.0 if failed else 0.0)  # the other's message may tell more
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        said = "\n".join(
            f"--- rank {rank}, exit {codes[rank]}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs)
        )
        raise RankFailedError(f"the ranks ended with {codes} (None: killed after {limit:.0f} s)\n{said}")
