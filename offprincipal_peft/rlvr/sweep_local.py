"""Trials on this machine, one after another or several at once, each a process of its own."""

from __future__ import annotations

import os
import selectors
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .config import TrialConfig
from .records import write_json
from .sweep_folder import SweepError, SweepFolder
from .sweep_process import TrialProcess, trial_command, trial_environment
from .sweep_results import Results
from .sweep_spec import SweepSpec


@dataclass
class LocalRunner:
    """Runs trials as processes of this one.

    Attributes:
        lock: descriptor of the folder's lock, which the trials hold as well.
        command: what runs one trial, without its two paths; None is the package's own.
        slots: what CUDA_VISIBLE_DEVICES is for each trial that runs at once; None leaves it as it is.
    """

    folder: SweepFolder
    spec: SweepSpec
    results: Results
    lock: int
    command: Sequence[str] | None = None
    slots: list[str | None] = field(init=False)
    _running: dict[int, tuple[TrialProcess, str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = device_slots(self.spec.resources.gpus, self.spec.parallel)
        trial_command(self.spec.resources, 1, self.command, Path("config.json"), Path("out.json"))  # raises early

    def run(self, pending: list[TrialConfig]) -> None:
        """Run every trial; returns when each has a record. An exception, Ctrl-C as well, ends those that run."""
        queue = deque((config, 1) for config in pending)
        try:
            with selectors.DefaultSelector() as selector:
                while queue or self._running:
                    while queue and self.slots:
                        selector.register(self._start(*queue.popleft()), selectors.EVENT_READ)
                    for key, _ in selector.select():
                        trial = self._running[key.fd][0]
                        if data := os.read(key.fd, 1 << 16):
                            for event in trial.feed(data):
                                self.results.report(event)
                            continue
                        selector.unregister(key.fd)
                        if not self._finish(key.fd):
                            queue.appendleft((trial.config, trial.attempt + 1))
        finally:
            for trial, _ in self._running.values():
                trial.end()
            for trial, _ in self._running.values():
                trial.wait()

    def _start(self, config: TrialConfig, attempt: int) -> int:
        """Start a trial; the descriptor of its output."""
        trial_id, devices = config.trial_id, self.slots.pop(0)
        paths = self.folder.config_path(trial_id), self.folder.output_path(trial_id)
        write_json(paths[0], config.to_dict())
        paths[1].unlink(missing_ok=True)
        command = trial_command(self.spec.resources, self.spec.threads, self.command, *paths)
        env = trial_environment(self.spec.threads, devices)
        trial = TrialProcess.start(config, attempt, command, env, self.folder.log_path(trial_id), self.lock)
        self._running[trial.output] = trial, devices
        self.results.started(trial_id, attempt)
        return trial.output

    def _finish(self, descriptor: int) -> bool:
        """Settle a trial whose output ended; False where it is to start again."""
        # Ctrl-C between these lines must find the trial still in the table: waiting twice does no harm.
        trial, devices = self._running[descriptor]
        code = trial.wait()
        settled = self.results.settle(trial.config, trial.attempt, code, trial.stage, trial.started)
        del self._running[descriptor]
        self.slots.append(devices)
        if settled:
            self.folder.config_path(trial.config.trial_id).unlink(missing_ok=True)
        return settled


def device_slots(gpus: float, parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of ``parallel`` trials with ``gpus`` devices each, fractions sharing one.

    Raises :class:`SweepError` where this machine has too few.
    """
    if not gpus:
        return [None] * parallel
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    if gpus >= 1:
        size = int(gpus)
        groups = [devices[start : start + size] for start in range(0, len(devices) - size + 1, size)]
    else:
        groups = [[device] for _ in range(int(1 / gpus)) for device in devices]
    if len(groups) < parallel:
        raise SweepError(
            f"{parallel} trials at once with {gpus:g} GPUs each do not fit the {count} CUDA devices here; lower "
            f"'parallel', or 'gpus' in 'resources:' (0 for trials on the CPU)"
        )
    return [",".join(group) for group in groups[:parallel]]
