"""One trial as a process: its command, its environment, its events, and what its death leaves to say.

A process for each trial, because a trial that runs out of memory or crashes must not take the sweep along, and because
seeds, threads and caches start out the same in each.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .config import TrialConfig
from .records import SCHEMA, environment
from .sweep_spec import Resources

MODULE = "offprincipal_peft.rlvr.trial"
TAIL = 4000  # characters of the log in the record of a trial that died
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_GUARD = Path(__file__).with_name("sweep_guard.py")
_LONGEST_LINE = 1 << 20
_STAGES = {"step": "train", "evaluation": "evaluate"}


def trial_command(
    resources: Resources, threads: int, command: Sequence[str] | None, config: Path, output: Path
) -> list[str]:
    """What runs one trial; ``command`` stands in for the package's own trial, without its two paths."""
    paths = [str(config), str(output)]
    command = list(command or [sys.executable, "-m", MODULE])
    if resources.accelerate is None:
        return [*command, *paths]
    if command[0] != sys.executable:
        raise ValueError(f"{command[0]}: accelerate launches Python modules and scripts only, with {sys.executable}")
    flags = {"num_cpu_threads_per_process": threads, **resources.accelerate}
    if flags["num_processes"] > 1:
        flags.setdefault("main_process_port", 0)  # a free one: trials run side by side
        if not any(name.startswith("use_") or name == "tpu" for name in flags):
            flags.setdefault("multi_gpu", True)  # without it, and without a GPU, it starts one process and says nothing
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    for name, value in flags.items():
        if value is True:
            launch.append(f"--{name}")
        elif value is not False:
            launch += [f"--{name}", str(value)]
    return [*launch, *command[1:], *paths]


def trial_environment(threads: int, devices: str | None = None) -> dict[str, str]:
    """This process's environment with what a trial's numbers depend on set: threads, hash seed, devices."""
    values = dict(os.environ)
    values |= dict.fromkeys(_THREADS, str(threads))
    # Sets of names (PEFT's target modules) are walked in hash order.
    values |= {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        values["CUDA_VISIBLE_DEVICES"] = devices
    return values


@dataclass
class TrialProcess:
    """A running trial under its guard; closing the guard's input ends it.

    Attributes:
        stage: of the trial, as far as its events tell: "start", "task", "model", "train", "evaluate".
        attempt: 1 for the first start.
    """

    config: TrialConfig
    attempt: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_path: Path
    stage: str = "start"
    started: float = field(default_factory=time.time)
    _rest: bytes = b""

    @classmethod
    def start(
        cls, config: TrialConfig, attempt: int, command: list[str], env: dict[str, str], log_path: Path, keep: int = -1
    ) -> TrialProcess:
        """Start ``command``; its stderr is added to the log. ``keep`` is a descriptor that it holds open."""
        guard = [sys.executable, "-I", "-S", str(_GUARD), *(["--keep", str(keep)] if keep >= 0 else [])]
        log = log_path.open("ab", buffering=0)
        log.write(f"=== attempt {attempt}, {datetime.datetime.now():%Y-%m-%d %H:%M:%S}: {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            pass_fds=(keep,) if keep >= 0 else (),
            start_new_session=True,
        )
        return cls(config, attempt, process, log, log_path)

    @property
    def output(self) -> int:
        """The descriptor to read the trial's events from."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events in what was read; other output goes to the log."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and "event" in event:
                self.stage = str(event.get("stage") or _STAGES.get(str(event["event"]), self.stage))
                yield {**event, "id": self.config.trial_id}
            elif line.strip():
                self.log.write(line + b"\n")

    def wait(self) -> int:
        """Wait for the end; the exit status, 128 + the signal's number where a signal ended it."""
        code = self.process.wait()
        self._close()
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """Ask the guard to end the trial, without waiting for it: :meth:`wait` does."""
        if self.process.stdin:
            self.process.stdin.close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream:
                stream.close()


def describe_end(code: int) -> str:
    """An exit status in words."""
    if code <= 128:
        return f"ended with status {code} and left no record"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        name = f"signal {code - 128}"
    hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def log_tail(path: Path) -> str:
    """The end of a log, whole lines."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= TAIL else text.partition("\n")[2]


def lost_record(config: TrialConfig, stage: str, kind: str, message: str, log: str, started: float) -> dict[str, Any]:
    """The record of a trial whose process could write none. ``started`` in seconds since the epoch."""
    return {
        "schema": SCHEMA,
        "id": config.trial_id,
        "status": "failed",
        "config": config.to_dict(),
        "environment": environment(),
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "wall_s": time.time() - started,
        "checks": {},
        "curve": [],
        "evaluations": [],
        "geometry": None,
        "result": {},
        "error": {"stage": stage, "type": kind, "message": message, "traceback": log},
    }
