"""A trial in milliseconds, for tests of what runs trials: the same command line, events and record, made-up numbers.

``fake_trial.py [OPTIONS] CONFIG.json OUT.json``. The numbers depend on the config and nothing else. It loads the two
modules that it needs by their files, so that torch is not imported.

--ledger FILE       a line for every start and end, and for a start while an earlier run of that trial still lives
--hold TRIAL:EVENT  stop for good after this event of this trial, such as ``step:2`` or ``torn``
--die TRIAL:TIMES   be killed in the middle of the first TIMES runs of this trial
--fail TRIAL        write a record that says "failed"
--wait FILE         wait for this file after the first step
--deaf              ignore SIGTERM
TRIAL is a label. Of several processes under torchrun the first is the trial; the others only note that they ran.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).parents[2] / "offprincipal_peft" / "rlvr"
STEPS = 3
EVENTS = ("stage:1", *(f"step:{step}" for step in range(1, STEPS + 1)), "evaluation:1", "torn:1", "written:1")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PACKAGE / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("ledger", "hold", "die", "fail", "wait"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    return parser.parse_args()


def stay() -> None:
    """As long as a test may take: whoever asked for it ends this process."""
    time.sleep(120)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def write(ledger: str, *words: object) -> None:
    if ledger:
        with open(ledger, "a") as file:
            file.write(" ".join(map(str, words)) + "\n")


def earlier_runs(ledger: str, trial_id: str) -> list[int]:
    lines = [line.split() for line in Path(ledger).read_text().splitlines()] if ledger and Path(ledger).exists() else []
    return [int(words[2]) for words in lines if words[:2] == ["start", trial_id]]


def times_to_die(option: str, label: str) -> int:
    name, _, times = option.partition(":")
    return int(times) if name == label else 0


def main() -> int:
    options = arguments()
    if options.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = load("config").TrialConfig.from_dict(json.loads(options.config.read_text()))
    trial_id, label, seen = config.trial_id, config.label, dict.fromkeys(("stage", "step", "evaluation"), 0)

    def event(name: str, **values: Any) -> None:
        print(json.dumps({"event": name, "id": trial_id, **values}), flush=True)
        seen[name] = seen.get(name, 0) + 1
        if options.hold == f"{label}:{name}:{seen[name]}":
            stay()

    if int(os.environ.get("RANK", "0")):
        write(options.ledger, "rank", trial_id, os.getpid())
        if options.hold:
            stay()
        return 0
    runs = earlier_runs(options.ledger, trial_id)
    if any(map(is_alive, runs)):
        write(options.ledger, "overlap", trial_id, os.getpid())
    write(options.ledger, "start", trial_id, os.getpid())
    print(f"run {len(runs) + 1} of {trial_id}", file=sys.stderr)
    event("stage", stage="train")
    numbers = random.Random(int(hashlib.sha256(trial_id.encode()).hexdigest(), 16))
    curve = []
    for step in range(1, STEPS + 1):
        curve.append({"step": step, "reward": numbers.random(), "step_s": time.perf_counter()})
        event("step", steps=STEPS, **curve[-1])
        if step == 2 and len(runs) < times_to_die(options.die, label):
            print("about to die", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
        while options.wait and not Path(options.wait).exists():
            time.sleep(0.01)
    evaluations = [{"step": STEPS, "split": "test", "accuracy": numbers.random()}]
    event("evaluation", **evaluations[0])
    failed = options.fail == label
    record = {
        "schema": 1,
        "id": trial_id,
        "status": "failed" if failed else "finished",
        "config": config.to_dict(),
        "environment": {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")},
        "started": time.time(),
        "curve": curve,
        "evaluations": evaluations,
        "result": {"test_accuracy": evaluations[0]["accuracy"]},
        "error": {"stage": "train", "type": "FakeError", "message": "asked to"} if failed else None,
    }
    torn = options.out.parent / f".{options.out.name}.torn.tmp"
    torn.write_text(json.dumps(record)[:100])
    event("torn")
    load("records").write_record(options.out, record)
    torn.unlink()
    write(options.ledger, "end", trial_id, os.getpid())
    event("written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
