"""How a sweep's trials ended: the one place that turns an end into a record, a retry or a loss."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import TrialConfig
from .records import write_record
from .sweep_folder import Progress, SweepError, SweepFolder
from .sweep_process import describe_end, log_tail, lost_record


@dataclass(frozen=True)
class SweepOutcome:
    """How the trials of a sweep stand, as ids in the order of the spec.

    Attributes:
        folder: of the sweep.
        finished, failed: every trial is in one of them.
        skipped: those of both that had a record before.
    """

    folder: Path
    finished: list[str]
    failed: list[str]
    skipped: list[str]


@dataclass
class Results:
    """The trials' states while a sweep runs.

    ``status`` maps the id of every trial that has a record to its status; ``report`` is told of every change.
    """

    folder: SweepFolder
    total: int
    retries: int
    report: Progress
    status: dict[str, str] = field(default_factory=dict)

    def queued(self, trial_id: str, attempt: int) -> None:
        """A cluster has the trial and starts it when there is room."""
        self._tell(trial_id, "queued", attempt=attempt)

    def started(self, trial_id: str, attempt: int) -> None:
        """The trial's process runs."""
        self._tell(trial_id, "started", attempt=attempt)

    def skipped(self, before: dict[str, str]) -> None:
        """These had a record when the sweep began."""
        self.status.update(before)
        for trial_id in before:
            self._tell(trial_id, "skipped")

    def settle(self, config: TrialConfig, attempt: int, code: int, stage: str, started: float) -> bool:
        """Take the record that an ended process left. False where it left none and is to start again."""
        trial_id, reason = config.trial_id, describe_end(code)
        try:
            record = self.folder.admit(trial_id)
        except SweepError as error:
            record, reason = None, f"left a record that cannot be used: {error}"
        if record is not None:
            self.done(trial_id, record["status"])
            return True
        message = f"the trial's process {reason}"
        if attempt <= self.retries:
            self._tell(trial_id, "retry", attempt=attempt, reason=message)
            return False
        tail = log_tail(self.folder.log_path(trial_id))
        self.lose(config, stage, "ProcessDied", message, tail, started, attempt)
        return True

    def lose(
        self, config: TrialConfig, stage: str, kind: str, message: str, log: str, started: float | None, attempts: int
    ) -> None:
        """Record a trial as failed whose process could not do it itself."""
        message = f"{message} (attempts: {attempts})"
        record = lost_record(config, stage, kind, message, log, started or time.time())
        write_record(self.folder.record_path(config.trial_id), record)
        self.done(config.trial_id, "failed", reason=message)

    def done(self, trial_id: str, status: str, **details: Any) -> None:
        """The trial's record is in its place."""
        self.status[trial_id] = status
        self._tell(trial_id, status, **details)

    def _tell(self, trial_id: str, state: str, **details: Any) -> None:
        counts = {"done": len(self.status), "total": self.total}
        self.report({"event": "trial", "id": trial_id, "state": state, **counts, **details})
