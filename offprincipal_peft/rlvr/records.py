"""One JSON file per trial: written whole or not at all, read back with checks, compared without what may vary.

A trial's record holds its config, the environment that ran it, the training curve, the evaluations, the geometry of the
update and the result. Numbers that do not exist are null: NaN and infinities are not JSON.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("finished", "failed")
PACKAGES = ("offprincipal-peft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")
# What differs between two runs of the same trial on one machine. Everything else must not.
VARYING = frozenset({"environment", "started", "wall_s", "step_s", "peak_memory_bytes", "traceback", "seconds"})


class RecordError(ValueError):
    """A record that cannot be read: the file and what is wrong with it."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that a reader, and a machine that loses power, sees the old file or the new one."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk only once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a trial's record atomically; raises :class:`RecordError` for one that could not be read back."""
    write_json(path, _checked(record, path))


def read_record(path: Path) -> dict[str, Any]:
    """The record at ``path``; raises :class:`RecordError` with the reason for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not a JSON file ({error}); delete it and the trial runs again") from None
    return _checked(record, path)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of ``folder/trials``, ordered by id; an empty list where there are none."""
    return sorted((read_record(path) for path in (folder / "trials").glob("*.json")), key=lambda record: record["id"])


def numeric_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The record without times, memory and environment: two runs of one trial on one machine agree on all of it."""
    return _without_varying(record)


def environment() -> dict[str, Any]:
    """Where this runs: versions, hardware, threads, and the state of the git checkout that the package lies in."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), "device": device},
        "threads": torch.get_num_threads(),
        "git": git_state(Path(__file__).parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout that ``folder`` lies in and whether tracked files differ; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        if not _git(folder, "ls-files", "."):  # installed below somebody else's checkout
            return None
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _checked(record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict) or "schema" not in record:
        raise RecordError(f"{path}: not a trial's record (no 'schema')")
    if record["schema"] != SCHEMA:
        raise RecordError(f"{path}: schema {record['schema']!r}; this version reads and writes schema {SCHEMA}")
    missing = [key for key in ("id", "status", "config", "environment", "curve", "evaluations") if key not in record]
    if missing:
        raise RecordError(f"{path}: lacks {', '.join(missing)}")
    if record["status"] not in STATUSES:
        raise RecordError(f"{path}: status {record['status']!r} is none of {', '.join(STATUSES)}")
    return record


def _without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_varying(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [_without_varying(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Only what JSON knows: paths as strings, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
