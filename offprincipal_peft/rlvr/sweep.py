"""Runs a sweep: every trial once, whatever happens in between.

A trial is done when its record lies in the folder; nothing else is remembered, so that a sweep that was killed at any
moment goes on where it was by being started again. Records are moved to their place whole, two sweeps cannot run in
one folder, and a trial does not outlive its sweep.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrialConfig
from .sweep_folder import Progress, SweepError, SweepFolder
from .sweep_local import LocalRunner
from .sweep_results import Results, SweepOutcome
from .sweep_spec import Resources, SpecError, SweepSpec

if TYPE_CHECKING:
    from .sweep_ray import RayRunner

__all__ = ["Resources", "SpecError", "SweepError", "SweepInterrupted", "SweepOutcome", "SweepSpec", "run_sweep"]


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep: its trials were ended, and the message says how to go on."""


def run_sweep(
    spec: SweepSpec,
    folder: Path | str,
    *,
    ray_address: str | None = None,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    rerun_failed: bool = False,
    check: Callable[[TrialConfig], None] | None = None,
) -> SweepOutcome:
    """Run the trials of ``spec`` that ``folder`` has no record of.

    Args:
        ray_address: "auto", "ray://HOST:PORT", "HOST:PORT", or "local" for a cluster of this machine alone; None runs
            without Ray.
        command: what runs one trial, without the paths of its config and its record; the package's own by default.
        progress: called with every event of the trials and of the sweep:
            ``{"event": "trial", "id", "state", "done", "total"}``, the state one of "skipped", "queued" (on Ray),
            "started", "retry", "finished", "failed". An exception in it ends the sweep.
        rerun_failed: run trials again whose record says "failed"; the old record stays until there is a new one.
        check: called with every config before anything starts; raises ``ValueError`` for one that cannot run.

    Raises:
        SweepError: the folder cannot be written, is in use, or holds another sweep or foreign records; Ray is missing.
        SpecError: ``check`` refused a trial.
        SweepInterrupted: Ctrl-C.
    """
    trials, place = spec.trials(), SweepFolder(Path(folder))
    report = progress or _silent
    for config in trials:
        _checked(config, check)
    place.create(len(trials))
    with place.lock(report) as lock:
        place.claim(spec, [config.trial_id for config in trials])
        before = place.clean({config.trial_id for config in trials})
        if rerun_failed:
            before = {name: status for name, status in before.items() if status != "failed"}
        results = Results(place, len(trials), spec.retries, report)
        results.skipped(before)
        pending = [config for config in trials if config.trial_id not in before]
        runner = _runner(place, spec, results, lock, command, ray_address)
        try:
            if pending:
                runner.run(pending)
        except KeyboardInterrupt:
            left = f"{len(trials) - len(results.status)} of {len(trials)} trials to go"
            raise SweepInterrupted(f"interrupted with {left}; the same command with {place.root} goes on") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SweepError(f"{place.root}: {error.strerror}; with room there, the same command goes on") from None
    return _outcome(place.root, trials, results.status, before)


def _runner(
    place: SweepFolder,
    spec: SweepSpec,
    results: Results,
    lock: int,
    command: Sequence[str] | None,
    ray_address: str | None,
) -> LocalRunner | RayRunner:
    if ray_address is None:
        return LocalRunner(place, spec, results, lock, command)
    from .sweep_ray import RayRunner

    return RayRunner(place, spec, results, ray_address, command)


def _checked(config: TrialConfig, check: Callable[[TrialConfig], None] | None) -> None:
    if check is None:
        return
    try:
        check(config)
    except ValueError as error:
        raise SpecError(f"the trial {config.trial_id}: {error}") from None


def _outcome(root: Path, trials: list[TrialConfig], status: dict[str, str], before: dict[str, str]) -> SweepOutcome:
    ids = [config.trial_id for config in trials]
    return SweepOutcome(
        root,
        finished=[name for name in ids if status.get(name) == "finished"],
        failed=[name for name in ids if status.get(name) == "failed"],
        skipped=[name for name in ids if name in before],
    )


def _silent(event: dict[str, Any]) -> None:
    pass
