"""A sweep's folder: what is on the disk decides what still has to run.

``sweep.json`` (the spec as given and the ids of its trials), ``trials/<id>.json`` (one record each, moved there whole),
``logs/<id>.log``, ``work/`` (configs and records on their way; its contents may be lost at any moment but a finished
record in it is taken), ``sweep.lock`` and ``trials.lock``.

The locks are flocks: the kernel drops one with its last holder, so a killed sweep leaves none behind. The first is held
by the sweep alone, the second by its trials too: it is free only once nothing of a killed sweep runs any more. They
need a POSIX system; over NFS they hold against other machines, but there the trials do not share the second.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .config import TrialConfig
from .records import RecordError, read_record, write_json
from .sweep_spec import SpecError, SweepSpec

SCHEMA = 1
LOCK_WAIT = 60.0  # seconds for the trials of a killed sweep to end; the guard needs at most about ten
_PROBE = 256 * 1024  # bytes for each trial's record, log and temporaries; real records are about a tenth of it
_MOST_PROBE = 16 * 1024 * 1024

Progress = Callable[[dict[str, Any]], None]


class SweepError(RuntimeError):
    """A sweep that cannot go on: what is in the way, where, and what would help."""


class SweepFolder:
    """The paths of a sweep and what may be done to them. ``root`` is absolute."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.trials = self.root / "trials"
        self.logs = self.root / "logs"
        self.work = self.root / "work"

    def record_path(self, trial_id: str) -> Path:
        return self.trials / f"{trial_id}.json"

    def config_path(self, trial_id: str) -> Path:
        return self.work / f"{trial_id}.config.json"

    def output_path(self, trial_id: str) -> Path:
        """Where the trial's process leaves its record; :meth:`admit` moves it to :meth:`record_path`."""
        return self.work / f"{trial_id}.out.json"

    def log_path(self, trial_id: str) -> Path:
        return self.logs / f"{trial_id}.log"

    def create(self, trials: int) -> None:
        """Make the folders and prove that records of this many trials can be written to the disk."""
        size = min(_MOST_PROBE, trials * _PROBE)
        try:
            for folder in (self.root, self.trials, self.logs, self.work):
                folder.mkdir(parents=True, exist_ok=True)
            for folder, content in ((self.work, os.urandom(size)), (self.trials, b"x"), (self.logs, b"x")):
                _probe(folder, content)
        except OSError as error:
            reason = f"{error.strerror or error} ({error.filename or self.root})"
            raise SweepError(f"{self.root}: {size} bytes for the records cannot be written here: {reason}") from None

    @contextmanager
    def lock(self, report: Progress) -> Iterator[int]:
        """Hold the folder for one sweep; yields the descriptor that its trials hold as well."""
        try:
            import fcntl
        except ImportError:
            raise SweepError("a sweep needs a POSIX system: there is no flock here to lock its folder with") from None

        def taken(descriptor: int) -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                raise SweepError(f"{self.root}: cannot be locked ({error.strerror}); use a local disk") from None
            return True

        with _opened(self.root / "sweep.lock") as sweep, _opened(self.root / "trials.lock") as trials:
            if not taken(sweep):
                holder = os.pread(sweep, 200, 0).decode(errors="replace")
                raise SweepError(f"{self.root}: another sweep runs in this folder (process {holder or 'unknown'})")
            os.ftruncate(sweep, 0)
            os.pwrite(sweep, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
            deadline = time.monotonic() + LOCK_WAIT
            if not taken(trials):
                report({"event": "waiting", "reason": "the trials of a killed sweep are still ending"})
                while not taken(trials):
                    if time.monotonic() > deadline:
                        raise SweepError(
                            f"{self.root}: trials of a killed sweep still run; end them (ps ax | grep trial)"
                        )
                    time.sleep(0.05)
            yield trials

    def claim(self, spec: SweepSpec, trial_ids: list[str]) -> None:
        """Write ``sweep.json``, or check that an existing one is of this sweep or of a part of it."""
        path = self.root / "sweep.json"
        if path.exists():
            old = _read_sweep(path)
            if missing := sorted(set(old["trials"]) - set(trial_ids)):
                raise SweepError(
                    f"{self.root} holds another sweep: {len(missing)} of its {len(old['trials'])} trials are not in "
                    f"this one{_difference(old, missing, spec)}. Adding trials is fine; for others take another folder"
                )
        write_json(path, {"schema": SCHEMA, "spec": spec.source, "trials": trial_ids})

    def clean(self, expected: set[str]) -> dict[str, str]:
        """Take over what a killed sweep left, delete temporaries; the status of every trial that has a record.

        Raises :class:`SweepError` for a record that is damaged, or not of the trial that its name says.
        """
        for folder in (self.root, self.trials, self.work):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)
        for path in self.work.glob("*.out.json"):
            trial_id = path.name.removesuffix(".out.json")
            if trial_id in expected:
                with suppress(SweepError):  # not a whole record: that trial runs again
                    self.admit(trial_id)
        for path in self.work.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)
        found = {}
        for path in sorted(self.trials.glob("*.json")):
            if path.stem not in expected:
                raise SweepError(f"{path}: no trial of this sweep; move it to another folder")
            found[path.stem] = self.check(path, path.stem)["status"]
        return found

    def admit(self, trial_id: str) -> dict[str, Any] | None:
        """Move the record that the trial's process left to its place; None where there is none.

        Raises :class:`SweepError` for one that is damaged or another trial's.
        """
        path = self.output_path(trial_id)
        if not path.exists():
            return None
        record = self.check(path, trial_id)
        os.replace(path, self.record_path(trial_id))
        return record

    def check(self, path: Path, trial_id: str) -> dict[str, Any]:
        """The record at ``path``; raises :class:`SweepError` unless its config is the one that its id stands for."""
        try:
            record = read_record(path)
        except RecordError as error:
            raise SweepError(str(error)) from None
        try:
            actual = TrialConfig.from_dict(record["config"]).trial_id
        except (ValueError, TypeError) as error:
            raise SweepError(f"{path}: its config is none of this version's: {error}; move the file away") from None
        if not actual == record["id"] == trial_id:
            raise SweepError(
                f"{path}: it says it is '{record['id']}' and its config makes it '{actual}', so it is not the record "
                f"of '{trial_id}'; move it away and the trial runs again"
            )
        return record


def _probe(folder: Path, content: bytes) -> None:
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_sweep(path: Path) -> dict[str, Any]:
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SweepError(f"{path}: not readable ({error}); take another folder") from None
    if not isinstance(sweep, dict) or sweep.get("schema") != SCHEMA or not isinstance(sweep.get("trials"), list):
        raise SweepError(f"{path}: not a sweep of schema {SCHEMA}, which this version reads; take another folder")
    return sweep


def _difference(old: dict[str, Any], missing: list[str], spec: SweepSpec) -> str:
    """The fields in which a missing trial differs from the closest new one, for the message."""
    try:
        trials = {trial.trial_id: trial.to_dict() for trial in SweepSpec.from_dict(old["spec"]).trials()}
    except (SpecError, KeyError):
        trials = {}
    if missing[0] not in trials:
        return f" ({missing[0]}, …; written by another version)"
    before = trials[missing[0]]
    changes = (
        {name: f"{name} {before[name]!r} → {value!r}" for name, value in new.to_dict().items() if value != before[name]}
        for new in spec.trials()
    )
    closest = min(changes, key=len)
    return f" ({missing[0]}: {', '.join(closest.values())})"
