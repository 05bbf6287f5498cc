"""kill -9 at any moment: the sweep goes on where it was, no finished trial is lost or run twice, nothing runs on.

The moments are events, not seconds: the trial or the sweep stops at the event, is killed there, and what a moment is
does not depend on how fast this machine is. The trials are fake_trial.py's.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offprincipal_peft.rlvr import sweep_folder, sweep_process
from offprincipal_peft.rlvr.records import numeric_fields, read_records
from offprincipal_peft.rlvr.sweep import SweepError, SweepSpec, run_sweep
from offprincipal_peft.rlvr.sweep_folder import SweepFolder

FAKE = Path(__file__).with_name("fake_trial.py")
TRIAL_MOMENTS = ("stage:1", "step:1", "step:2", "step:3", "evaluation:1", "torn:1", "written:1")
SWEEP_MOMENTS = ("started", "finished")
SPEC = {
    "base": {"learning_rate": 1e-3, "steps": 3},
    "methods": [{"method": "lora", "label": f"t{index}", "rank": index + 1} for index in range(6)],
}
ACCELERATE = {"num_processes": 2}
PATIENCE = 60.0  # seconds until a test gives up; no result depends on it


@dataclass
class Killable:
    """A sweep in a process of its own that reports its events here. With ``hold`` it stops after that event."""

    spec: SweepSpec
    folder: Path
    options: list[str] = field(default_factory=list)
    hold: Callable[[dict[str, Any]], bool] = lambda event: False
    pid: int = 0

    def __enter__(self) -> "Killable":
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.reader)
            os._exit(self._run(writer))
        os.close(writer)
        self.rest, self.code = b"", None
        return self

    def _run(self, writer: int) -> int:
        def report(event: dict[str, Any]) -> None:
            held = self.hold(event)
            os.write(writer, json.dumps({**event, "held": held}).encode() + b"\n")
            if held:
                time.sleep(PATIENCE)

        try:
            run_sweep(self.spec, self.folder, command=[sys.executable, str(FAKE), *self.options], progress=report)
        except BaseException as error:
            os.write(writer, json.dumps({"event": "error", "message": str(error)}).encode() + b"\n")
            if not isinstance(error, SweepError | KeyboardInterrupt):
                traceback.print_exc()
            return 1
        return 0

    def events(self) -> Iterator[dict[str, Any]]:
        """What it reports, until it is gone."""
        while select.select([self.reader], [], [], PATIENCE)[0]:
            data = os.read(self.reader, 1 << 16)
            if not data:
                return
            *lines, self.rest = (self.rest + data).split(b"\n")
            yield from map(json.loads, lines)
        raise AssertionError("the sweep is silent")

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> bool:
        return any(wanted(event) for event in self.events())

    def kill(self, number: int = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.kill()
        os.close(self.reader)


@dataclass
class Ledger:
    """What the trials themselves say about their runs, and what was done at each kill."""

    path: Path
    done_at: list[tuple[int, str]] = field(default_factory=list)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def note_done(self, folder: Path) -> None:
        whole = [path.stem for path in (folder / "trials").glob("*.json")]
        whole += [path.name.removesuffix(".out.json") for path in (folder / "work").glob("*.out.json")]
        self.done_at += [(len(self.lines()), trial_id) for trial_id in whole]

    def check(self) -> None:
        """No finished trial ran again, and no trial ran beside itself."""
        lines = self.lines()
        for position, trial_id in self.done_at:
            again = [line for line in lines[position:] if line[:2] == ["start", trial_id]]
            assert not again, f"{trial_id} had a record and was started again"
        ends = [line[1] for line in lines if line[0] == "end"]
        assert len(ends) == len(set(ends)), "a trial ended twice"
        assert not [line for line in lines if line[0] == "overlap"], "a trial ran beside itself"

    def pids(self) -> list[int]:
        return [int(line[2]) for line in self.lines() if line[0] == "start"]


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def results(folder: Path) -> list[dict[str, Any]]:
    return [numeric_fields(record) for record in read_records(folder)]


def kill_at(random_moment: random.Random, spec: SweepSpec, folder: Path, ledger: Ledger, spare: bool) -> str:
    """Start or go on with the sweep and kill it at a moment of one of the next two trials; which moment it was."""
    ledger.note_done(folder)
    done = {trial_id for _, trial_id in ledger.done_at}
    pending = [trial for trial in spec.trials() if trial.trial_id not in done]
    trial = random_moment.choice(pending[:2] if spare else pending[:1])
    moments = [*TRIAL_MOMENTS, *SWEEP_MOMENTS] if spare else list(TRIAL_MOMENTS[:-1])
    moment = random_moment.choice(moments)
    options = ["--ledger", str(ledger.path)]
    if moment in SWEEP_MOMENTS:
        with Killable(
            spec, folder, options, lambda e: (e.get("id"), e.get("state")) == (trial.trial_id, moment)
        ) as sweep:
            assert sweep.until(lambda event: event["held"])
            sweep.kill()
    else:
        name, _, count = moment.partition(":")
        left = [int(count)]

        def reached(event: dict[str, Any]) -> bool:
            left[0] -= event["event"] == name and event["id"] == trial.trial_id
            return left[0] == 0

        with Killable(spec, folder, [*options, "--hold", f"{trial.label}:{moment}"]) as sweep:
            assert sweep.until(reached)
            sweep.kill()
    ledger.note_done(folder)
    return f"{trial.label}:{moment}"


def ten_kills(seed: int, folder: Path, ledger: Ledger) -> list[str]:
    spec, rng, moments = SweepSpec.from_dict(SPEC), random.Random(seed), []
    for kill in range(10):
        finished = len({trial_id for _, trial_id in ledger.done_at})
        # The last two trials are kept for later kills: a moment needs a trial that is still to run.
        moments.append(kill_at(rng, spec, folder, ledger, spare=finished < 3 or kill == 9))
    ledger.note_done(folder)
    with Killable(spec, folder, ["--ledger", str(ledger.path)]) as sweep:
        message = [event for event in sweep.events() if event["event"] == "error"]
        assert sweep.wait() == 0, message
    return moments


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)])
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_change_no_number(seed: int, tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    moments = ten_kills(seed, folder, ledger)
    assert len(set(moments)) >= 6, moments  # kills that all fall on one moment would say little
    ledger.check()
    assert results(folder) == uninterrupted
    assert len(uninterrupted) == 6
    assert not [pid for pid in ledger.pids() if is_alive(pid)]
    assert not list((folder / "work").iterdir())
    assert not [path for path in (folder / "trials").iterdir() if path.suffix != ".json"]


def held_at(moment: str, folder: Path, ledger: Ledger, *options: str) -> Killable:
    """A sweep of which a trial stops at ``t0:step:2`` or the like."""
    return Killable(SweepSpec.from_dict(SPEC), folder, ["--ledger", str(ledger.path), "--hold", moment, *options])


def is_event(name: str, step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == name and event.get("step") == step


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_alive, pids))


def test_check_sees_a_sweep_that_forgets_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = SweepFolder.clean

    def forgetful(self: SweepFolder, expected: set[str]) -> dict[str, str]:
        clean(self, expected)
        return {}

    monkeypatch.setattr(SweepFolder, "clean", forgetful)
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t1:step:2", folder, ledger) as sweep:
        assert sweep.until(lambda event: event.get("state") == "finished")
        sweep.kill()
    ledger.note_done(folder)
    with Killable(SweepSpec.from_dict(SPEC), folder, ["--ledger", str(ledger.path)]) as sweep:
        list(sweep.events())
        assert sweep.wait() == 0
    with pytest.raises(AssertionError, match="had a record and was started again"):
        ledger.check()


def test_check_sees_a_record_that_was_not_moved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: SweepFolder, trial_id: str) -> None:
        content = self.output_path(trial_id).read_bytes()
        self.output_path(trial_id).unlink()
        self.record_path(trial_id).write_bytes(content[:200])
        os.kill(os.getpid(), signal.SIGKILL)

    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with monkeypatch.context() as patch:
        patch.setattr(SweepFolder, "admit", torn)
        with Killable(SweepSpec.from_dict(SPEC), folder, ["--ledger", str(ledger.path)]) as sweep:
            list(sweep.events())
            assert sweep.wait() == -signal.SIGKILL
    with pytest.raises(SweepError, match=r"t0-lr0\.001-s0-\w+\.json: not a JSON file"):
        run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)])


def test_trial_without_a_guard_keeps_the_folder_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is what ends an orphan; where there is none, the lock still keeps a second run away."""
    bare = tmp_path / "no_guard.py"
    bare.write_text("import os, sys\nos.set_inheritable(int(sys.argv[2]), True)\nos.execv(sys.argv[3], sys.argv[3:])\n")
    monkeypatch.setattr(sweep_process, "_GUARD", bare)
    monkeypatch.setattr(sweep_folder, "LOCK_WAIT", 0.1)
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t0:step:2", folder, ledger) as sweep:
        assert sweep.until(is_event("step", 2))
        sweep.kill()
    orphan = ledger.pids()[-1]
    try:
        assert is_alive(orphan)
        with pytest.raises(SweepError, match="trials of a killed sweep still run"):
            run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)])
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_trial_ends_with_its_guard(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t0:step:2", folder, ledger) as sweep:
        assert sweep.until(is_event("step", 2))
        trial = ledger.pids()[-1]
        guard = int((Path("/proc") / str(trial) / "stat").read_text().rpartition(")")[2].split()[1])
        assert guard not in (sweep.pid, os.getpid())
        sweep.hold = lambda event: False
        os.kill(guard, signal.SIGKILL)
        assert gone([trial])
        assert sweep.until(is_event("step", 2))  # the second attempt
        sweep.kill()
    assert gone(ledger.pids())


@pytest.mark.slow
def test_deaf_trial_is_killed(tmp_path: Path) -> None:
    """It ignores SIGTERM, so the guard waits its grace and kills it, and the next sweep waits for that."""
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t0:step:2", folder, ledger, "--deaf") as sweep:
        assert sweep.until(is_event("step", 2))
        sweep.kill()
    assert is_alive(ledger.pids()[-1])
    events: list[dict[str, Any]] = []
    run_sweep(
        SweepSpec.from_dict(SPEC),
        folder,
        command=[sys.executable, str(FAKE), "--ledger", str(ledger.path)],
        progress=events.append,
    )
    assert events[0]["event"] == "waiting"
    ledger.check()


def test_interrupt_ends_the_trials_and_says_how_to_go_on(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t2:step:2", folder, ledger) as sweep:
        assert sweep.until(lambda event: event["event"] == "step" and "t2-" in event["id"] and event["step"] == 2)
        os.kill(sweep.pid, signal.SIGINT)
        message = next(event["message"] for event in sweep.events() if event["event"] == "error")
        assert sweep.wait() == 1
    assert message == f"interrupted with 4 of 6 trials to go; the same command with {folder} goes on"
    assert not [pid for pid in ledger.pids() if is_alive(pid)]
    outcome = run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)])
    assert len(outcome.skipped) == 2
    assert results(folder) == uninterrupted


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    with held_at("t0:step:2", folder, ledger) as sweep:
        assert sweep.until(is_event("step", 2))
        with pytest.raises(SweepError, match=rf"another sweep runs in this folder \(process {sweep.pid} on "):
            run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)])
        assert is_alive(ledger.pids()[-1])


def test_killed_trial_is_started_again(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    folder, ledger, events = tmp_path / "sweep", Ledger(tmp_path / "ledger"), []
    command = [sys.executable, str(FAKE), "--ledger", str(ledger.path), "--die", "t1:1"]
    outcome = run_sweep(SweepSpec.from_dict(SPEC), folder, command=command, progress=events.append)
    assert [event["id"][:2] for event in events if event.get("state") == "retry"] == ["t1"]
    assert len(outcome.finished) == 6
    assert results(folder) == uninterrupted
    ledger.check()


def test_trial_that_is_always_killed_is_recorded_as_failed(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    command = [sys.executable, str(FAKE), "--ledger", str(ledger.path), "--die", "t1:9"]
    outcome = run_sweep(SweepSpec.from_dict(SPEC), folder, command=command)
    assert (len(outcome.finished), len(outcome.failed)) == (5, 1)
    record = next(record for record in read_records(folder) if record["id"] == outcome.failed[0])
    assert record["error"]["type"] == "ProcessDied"
    assert record["error"]["stage"] == "train"
    assert "ended by SIGKILL" in record["error"]["message"] and "(attempts: 2)" in record["error"]["message"]
    assert record["error"]["traceback"].splitlines()[-1] == "about to die"
    again = run_sweep(SweepSpec.from_dict(SPEC), folder, command=command)
    assert len(again.skipped) == 6
    assert len([line for line in ledger.lines() if line[:2] == ["start", outcome.failed[0]]]) == 2
    mended = run_sweep(SweepSpec.from_dict(SPEC), folder, command=[sys.executable, str(FAKE)], rerun_failed=True)
    assert (mended.failed, len(mended.skipped)) == ([], 5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher is only asked to end its workers")
def test_launched_workers_end_with_the_sweep(tmp_path: Path) -> None:
    """torchrun puts its workers in sessions of their own; a trial on two processes leaves none of them behind."""
    folder, ledger = tmp_path / "sweep", Ledger(tmp_path / "ledger")
    spec = SweepSpec.from_dict({**SPEC, "methods": SPEC["methods"][:1], "resources": {"accelerate": ACCELERATE}})
    with Killable(spec, folder, ["--ledger", str(ledger.path), "--hold", "t0:step:2"]) as sweep:
        assert sweep.until(is_event("step", 2))
        deadline = time.monotonic() + PATIENCE
        while len(ledger.lines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [int(line[2]) for line in ledger.lines()]
        assert len(workers) == 2 and all(map(is_alive, workers))
        assert len({os.getsid(pid) for pid in workers}) == 2
        sweep.kill()
    outcome = run_sweep(spec, folder, command=[sys.executable, str(FAKE), "--ledger", str(ledger.path)])
    assert not any(map(is_alive, workers))
    assert len(outcome.finished) == 1
    ledger.check()
