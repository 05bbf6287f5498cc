"""Trials on a Ray cluster: one task each, with cores and (fractions of) GPUs that Ray places.

A task runs the same process as a local trial, under the same guard, and hands its record back; the driver writes it,
so workers need this package but no shared disk. Where a worker does see the sweep's folder it leaves the record there
itself, and a driver that is killed just then finds it when it is started again; without a shared disk such a record is
lost and its trial runs again.

A worker or node that is lost is Ray's to retry, a trial whose process dies is the driver's; both up to ``retries``.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import TrialConfig
from .records import write_json
from .sweep_folder import SweepError, SweepFolder
from .sweep_process import TrialProcess, trial_command, trial_environment
from .sweep_results import Results
from .sweep_spec import Resources, SweepSpec

_LOCAL: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 * 1024 * 1024}  # records are small
CONNECT_WAIT = 10.0  # seconds for the cluster's port to answer
_MOST_LOG = 1 << 20  # bytes of a trial's log that travel


def import_ray() -> Any:
    """Ray, or a :class:`SweepError` that says how to get it."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise SweepError(f"--ray needs Ray ({error}): pip install 'offprincipal-peft[ray]'") from None


@dataclass
class RayRunner:
    """Runs trials as tasks of a cluster.

    Attributes:
        address: as ``ray.init`` takes it; "local" starts a cluster on this machine.
        command: as for local trials; it has to exist on every worker.
    """

    folder: SweepFolder
    spec: SweepSpec
    results: Results
    address: str
    command: Sequence[str] | None = None
    token: Path = field(init=False)

    def __post_init__(self) -> None:
        # Its name is new each time, so a worker that sees it sees this folder and not one of the same name.
        self.token = self.folder.work / f"token-{uuid.uuid4().hex}"

    def run(self, pending: list[TrialConfig]) -> None:
        """Run every trial; returns when each has a record. An exception, Ctrl-C as well, ends those that run.

        The connection is the sweep's own, because closing it is what ends the trials: ``ray.cancel`` of a task that
        gets its worker just then aborts the driver (seen with Ray 2.60, "Tried to complete task that was not pending").
        """
        ray = import_ray()
        if ray.is_initialized():
            raise SweepError("this program is connected to a Ray cluster already: call ray.shutdown() before the sweep")
        self._connect(ray)
        running: dict[Any, tuple[TrialConfig, int]] = {}
        try:
            self.token.touch()
            for config in pending:
                running[self._submit(ray, config, 1)] = config, 1
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=10.0)
                for task in ready:
                    config, attempt = running[task]
                    if not self._finish(ray, task, config, attempt):
                        running[self._submit(ray, config, attempt + 1)] = config, attempt + 1
                    del running[task]
        finally:
            self.token.unlink(missing_ok=True)
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        options = {}
        host, colon, port = self.address.removeprefix("ray://").rpartition(":")
        if colon and port.isdigit():  # Ray itself tries for minutes, and then ends the program
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WAIT).close()
            except OSError as error:
                raise SweepError(f"--ray {self.address}: nothing answers there ({error})") from None
        if self.address == "local":
            options = _LOCAL
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of this sweep's own reports to nobody
        if not self.address.startswith("ray://"):  # Ray's client takes none of these
            options = {**options, "log_to_driver": False, "logging_level": "warning"}
        try:
            ray.init(address=self.address, **options)
        except (ConnectionError, ImportError, ValueError, RuntimeError) as error:
            raise SweepError(f"--ray {self.address}: no connection to the cluster: {error}") from None

    def _submit(self, ray: Any, config: TrialConfig, attempt: int) -> Any:
        resources = self.spec.resources
        task = ray.remote(run_on_worker).options(
            name=config.trial_id,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_retries=self.spec.retries,
            retry_exceptions=False,
        )
        order = WorkOrder(
            config=config.to_dict(),
            attempt=attempt,
            resources=resources,
            threads=self.spec.threads,
            command=list(self.command) if self.command else None,
            token=str(self.token),
            shared_output=str(self.folder.output_path(config.trial_id)),
        )
        self.results.queued(config.trial_id, attempt)
        return task.remote(order)

    def _finish(self, ray: Any, task: Any, config: TrialConfig, attempt: int) -> bool:
        """Take a task's result; False where the trial is to start again."""
        try:
            end: WorkEnd = ray.get(task)
        except ray.exceptions.RayTaskError as error:  # raised by run_on_worker itself, not by the trial
            message = f"{config.trial_id} could not be run on a worker: {error.cause!r}; see that each node has "
            raise SweepError(f"{message}the same package and a writable temporary folder") from None
        except ray.exceptions.RayError as error:
            message = f"lost with its worker: {error}"
            self.results.lose(config, "start", type(error).__name__, message, "", None, self.spec.retries + 1)
            return True
        if end.log:
            with self.folder.log_path(config.trial_id).open("ab") as log:
                log.write(end.log)
        if end.record is not None:
            write_json(self.folder.output_path(config.trial_id), end.record)
        return self.results.settle(config, attempt, end.code, end.stage, end.started)


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs for one trial; ``shared_output`` is used where the worker sees the file ``token``."""

    config: dict[str, Any]
    attempt: int
    resources: Resources
    threads: int
    command: list[str] | None
    token: str
    shared_output: str


@dataclass(frozen=True)
class WorkEnd:
    """How it ended there; the record is None where there is none, or where it lies in the shared folder."""

    record: dict[str, Any] | None
    code: int
    stage: str
    started: float
    log: bytes


def run_on_worker(order: WorkOrder) -> WorkEnd:
    """Run one trial on the worker that this is called on."""
    config = TrialConfig.from_dict(order.config)
    with tempfile.TemporaryDirectory(prefix="offprincipal-") as name:
        folder = Path(name)
        shared = os.path.exists(order.token)
        output = Path(order.shared_output) if shared else folder / "out.json"
        write_json(folder / "config.json", order.config)
        command = trial_command(order.resources, order.threads, order.command, folder / "config.json", output)
        # Ray sets the devices of a task that asked for some; what it does for one that asked for none varies.
        env = trial_environment(order.threads, None if order.resources.gpus else "")
        trial = TrialProcess.start(config, order.attempt, command, env, folder / "log")
        try:
            while data := os.read(trial.output, 1 << 16):
                for _ in trial.feed(data):
                    pass
        finally:
            trial.end()
            code = trial.wait()
        record = None if shared else _read(output)
        return WorkEnd(record, code, trial.stage, trial.started, (folder / "log").read_bytes()[-_MOST_LOG:])


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a trial that died; the driver checks what there is
        return None
