"""Run a spec of the study: many short trials, each process taking one after another.

A sweep (``offprincipal sweep``) starts a process for each trial, which costs more than a trial of the small model does.
Here a few processes share them; every trial is :func:`offprincipal_peft.rlvr.trial.run_trial` all the same, and its
record equals that of a sweep to the bit (``verify`` runs some trials in processes of their own and compares). Finished
records are kept: what was killed goes on. ``collect`` writes one line a trial into a result file, failures and
collapses too. A spec with ``audits:`` keeps its trials' weights, and ``collect`` adds what ``study_weights.py`` says of
them.

    python benchmarks/study.py run benchmarks/experiments/study_starts.yaml runs/study
    python benchmarks/study.py collect benchmarks/experiments/study_starts.yaml runs/study
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from _common import environment, write_result
from study_weights import AUDITS

from offprincipal_peft.rlvr.checks import check_trials
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.records import numeric_fields, read_record, write_record
from offprincipal_peft.rlvr.sweep_process import trial_command, trial_environment
from offprincipal_peft.rlvr.sweep_spec import SweepSpec

RESULTS = Path(__file__).parent / "results" / "study"
PER_PROCESS = 60  # trials of a process, until there are fresh ones
EVALUATED = ("step", "accuracy", "kl", "entropy", "update_norm", "forgetting")  # of each evaluation
CONFIG = (
    *("label", "method", "method_options", "algorithm", "learning_rate", "rank", "alpha", "seed"),
    *("task", "beta", "model", "dtype", "steps", "optimizer", "optimizer_options"),
)


def folder_of(spec: Path, root: Path) -> Path:
    return root / spec.stem


def read_spec(spec: Path) -> tuple[SweepSpec, str | None]:
    """The sweep and what ``audits:`` says; raises ``ValueError`` for an audit that there is not."""
    values = yaml.safe_load(spec.read_text(encoding="utf-8"))
    audits = values.pop("audits", None)
    if audits is not None and audits not in AUDITS:
        raise ValueError(f"{spec}: audits: {audits!r}; there are {', '.join(AUDITS)}")
    return (SweepSpec.from_dict(values) if audits else SweepSpec.from_yaml(spec)), audits


def trials_of(spec: Path) -> list[TrialConfig]:
    return read_spec(spec)[0].trials()


def weights_of(folder: Path, config: TrialConfig) -> Path:
    return folder / "weights" / config.trial_id


# ---- running


def one(job: tuple[dict[str, Any], str, bool]) -> tuple[str, str, float]:
    """One trial in this process; (id, status, seconds)."""
    from offprincipal_peft.rlvr.trial import run_trial

    config, folder, keep = TrialConfig.from_dict(job[0]), Path(job[1]), job[2]
    name, begun = config.trial_id, time.perf_counter()
    log = folder / "logs" / f"{name}.log"
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        record = run_trial(config, weights=weights_of(folder, config) if keep else None)
    write_record(folder / "trials" / f"{name}.json", record)
    return name, record["status"], time.perf_counter() - begun


def run(spec: Path, root: Path, workers: int) -> None:
    """Every trial of ``spec`` that has no record yet."""
    folder, (sweep, audits) = folder_of(spec, root), read_spec(spec)
    configs = sweep.trials()
    for name in ("trials", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pending = [config for config in configs if not (folder / "trials" / f"{config.trial_id}.json").is_file()]
    print(f"{spec.stem}: {len(configs)} trials, {len(pending)} to run", flush=True)
    if not pending:
        return
    check = check_trials()
    for config in pending:
        check(config)
    _same_models(folder / "models.json", sorted({config.model for config in configs}))
    jobs = [(config.to_dict(), str(folder), audits is not None) for config in pending]
    os.environ.update(trial_environment(max(1, pending[0].threads)))  # spawned processes start with it
    begun, done = time.perf_counter(), 0
    # A pool for each share of the jobs: one that replaces its processes itself (max_tasks_per_child) can hang once all
    # of them have ended (python/cpython issue 115634; seen with 3.11.7).
    for start in range(0, len(jobs), PER_PROCESS * workers):
        with processes(workers) as pool:
            running = [pool.submit(one, job) for job in jobs[start : start + PER_PROCESS * workers]]
            for future in as_completed(running):  # raises where a process was killed
                name, status, seconds = future.result()
                done += 1
                left = (time.perf_counter() - begun) / done * (len(jobs) - done)
                print(f"{done}/{len(jobs)} {name}: {status}, {seconds:.0f} s; {left / 60:.0f} min left", flush=True)


def processes(workers: int) -> ProcessPoolExecutor:
    """Fresh processes that end with this one, also where it is killed; they would go on with what is queued."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _same_models(note: Path, models: list[str]) -> None:
    """Note which weights the trials start from; raises ``ValueError`` where those before started from others."""
    files = [path for model in models for path in sorted(Path(model).glob("*.safetensors"))]
    weights = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else weights
    for path in sorted(weights.keys() | known.keys()):
        if weights.get(path) != known.get(path):
            model = Path(path).parent
            raise ValueError(f"{note.parent} holds trials of another {model}; move them away, or that model back")
    note.write_text(json.dumps(weights), encoding="utf-8")


def verify(spec: Path, root: Path, count: int) -> None:
    """Run some trials in processes of their own; raises ``RuntimeError`` where a record differs in any number."""
    folder, (parsed, _) = folder_of(spec, root), read_spec(spec)
    configs = parsed.trials()
    for config in configs[:: max(1, len(configs) // count)][:count]:
        known = read_record(folder / "trials" / f"{config.trial_id}.json")
        with tempfile.TemporaryDirectory() as scratch:
            paths = Path(scratch) / "config.json", Path(scratch) / "record.json"
            paths[0].write_text(json.dumps(config.to_dict()))
            command = trial_command(parsed.resources, parsed.threads, None, *paths)
            env = trial_environment(parsed.threads)
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            fresh = read_record(paths[1])
        fresh["config"] = known["config"] = None  # the id says them; one of them may lack fields that came later
        if numeric_fields(fresh) != numeric_fields(known):
            raise RuntimeError(f"{config.trial_id}: another record in a process of its own")
        print(f"{config.trial_id}: the same record in a process of its own", flush=True)


# ---- collecting


def line(record: dict[str, Any]) -> dict[str, Any]:
    """What a table needs of one trial. The items' answers are left out; curves are kept at the evaluations."""
    config = TrialConfig.from_dict(record["config"]).to_dict()  # fields that came after the record too
    found: dict[str, Any] = {"id": record["id"], "status": record["status"], **{n: config[n] for n in CONFIG}}
    if record["error"] is not None:
        error = record["error"]
        found["error"] = {name: error[name] for name in ("stage", "type", "message")}
    tests = [e for e in record["evaluations"] if e["split"] == "test"]
    found["curve"] = [[e.get(name) for name in EVALUATED] for e in tests]
    found["validation"] = next((e["accuracy"] for e in record["evaluations"] if e["split"] == "validation"), None)
    rewards = [row["reward"] for row in record["curve"]]
    found["rewards"] = [None if value is None else round(value, 4) for value in rewards]
    summary = (record["geometry"] or {}).get("summary") or {}
    found["geometry"] = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
    found["trainable"] = (record["result"] or {}).get("trainable_parameters")
    return found


def collect(spec: Path, root: Path, out: Path) -> None:
    """One result file of all trials of ``spec``; raises ``FileNotFoundError`` where one has not run."""
    (sweep, audits), folder = read_spec(spec), folder_of(spec, root)
    configs = sweep.trials()
    records = [read_record(folder / "trials" / f"{config.trial_id}.json") for config in configs]
    model = configs[0].model
    about = Path(model) / "pretraining.json"
    write_result(
        out,
        {
            "spec": {"name": spec.name, "sha256": hashlib.sha256(spec.read_bytes()).hexdigest()},
            "model": json.loads(about.read_text()) if about.is_file() else model,
            "base": sweep.base,
            "evaluated": list(EVALUATED),
            "trials": [line(record) for record in records],
            **({audits: AUDITS[audits](configs, lambda config: weights_of(folder, config))} if audits else {}),
            "ran": {
                "cpu": records[0]["environment"]["machine"]["cpu"],
                "first": min(record["started"] for record in records)[:10],
                "last": max(record["started"] for record in records)[:10],
                "versions": records[0]["environment"]["packages"],
                "threads": configs[0].threads,
            },
            "collected": environment(configs[0].device),
            "seconds": sum(record["wall_s"] for record in records),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["run", "verify", "collect"])
    parser.add_argument("spec", type=Path, nargs="+")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int, default=3, help="trials that verify runs again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    for spec in options.spec:
        if options.command == "run":
            run(spec, options.folder, options.workers)
        elif options.command == "verify":
            verify(spec, options.folder, options.count)
        else:
            collect(spec, options.folder, options.out / f"{spec.stem}.json")


if __name__ == "__main__":
    main()
