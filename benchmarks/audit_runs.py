"""Trained weights to audit: RL and SFT of a small real model by this package's harness, and the reports on them.

``train`` writes a folder of checkpoints, ``audit`` compares them and writes the JSON reports:

    python benchmarks/audit_runs.py train RUNS
    python benchmarks/audit_runs.py audit RUNS benchmarks/results/audit

Every run of ``benchmarks/experiments/audit_runs.yaml`` is one trial of the comparison harness in a process of its own,
saved by the trainer after its last step. In the folder:

| | |
|---|---|
| ``base`` | the pretrained weights in bf16: every run starts at exactly these |
| ``base-fp32`` | the same values stored as fp32 |
| ``NAME`` | full fine-tuning: the tuned weights in bf16; otherwise the PEFT adapter as saved |
| ``NAME-fp32`` | full fine-tuning: the fp32 weights that were trained, before that rounding |
| ``trials/NAME.json`` | the harness's own record of the run, also for ``offprincipal report RUNS`` |
| ``runs.json`` | of each run its settings, what it learned, and the sha256 of its files |

*Precision.* The paper compares bf16 checkpoints, before and after a training whose master weights are fp32. The
small model comes dequantised from 4 bits to fp32 values that mostly lie between two bf16 numbers; from there any step,
however small, may cross a rounding boundary, which no bf16 checkpoint would show. So the base is rounded to bf16
first, the harness trains fp32 masters that start at these values, and the result is rounded once. An
audit of ``NAME-fp32`` beside ``base-fp32`` also tells what that rounding hides.

*A run that is there is kept*: what was killed goes on with the next one. A run whose settings differ is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from _common import environment, write_result

from offprincipal_peft.audit import AdapterFolder, Checkpoint, audit, open_checkpoint, without_curves
from offprincipal_peft.audit import write_json as write_report
from offprincipal_peft.interop.audit_source import open_adapter
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.models import load_model, load_tokenizer
from offprincipal_peft.rlvr.records import read_record, write_json

ROOT = Path(__file__).parent.parent
RUNS = Path(__file__).parent / "experiments" / "audit_runs.yaml"
BASE = "base"
MASTER = "-fp32"
EDGE = 5  # steps at either end of a run whose mean reward is reported


def configs(study: dict[str, Any]) -> dict[str, TrialConfig]:
    """The trial of each run. The trainer saves once, after the last step, and the model alone.

    Paths in them are relative to the folder of the runs, where the trials are started.
    """
    found = {}
    for name, fields in study["runs"].items():
        merged = {**study["base"], **fields, "label": name, "model": BASE}
        saving = {"output_dir": f".saving/{name}", "save_strategy": "steps", "save_steps": merged["steps"]}
        merged["trainer_options"] = {**merged.get("trainer_options", {}), **saving, "save_only_model": True}
        found[name] = TrialConfig.from_dict(merged)
    return found


def train_all(study: dict[str, Any], folder: Path, only: list[str] | None = None) -> None:
    """Train what ``folder`` lacks, in the study's order.

    Raises:
        ValueError: a name in ``only`` that is no run, or a run in ``folder`` that was made with other settings.
        RuntimeError: a run failed; with its error.
    """
    wanted = configs(study)
    unknown = sorted(set(only or ()) - set(wanted))
    if unknown:
        raise ValueError(f"no run {', '.join(unknown)}; there are {', '.join(wanted)}")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BASE).is_dir():
        save_as("bfloat16", study["base"]["model"], folder / BASE)
    if not (folder / (BASE + MASTER)).is_dir():
        save_as("float32", str(folder / BASE), folder / (BASE + MASTER))
    for name, config in wanted.items():
        if only and name not in only:
            continue
        record = _finished(folder, name, config)
        if record is None:
            record = train(folder, name, config)
        print(f"{name}: {_line(record)}", flush=True)
    _write_summary(folder, study["base"]["model"])


def train(folder: Path, name: str, config: TrialConfig) -> dict[str, Any]:
    """One trial in a process of its own; its record. Its weights are in ``folder/name`` once the record is there."""
    saving = folder / ".saving" / name
    for left in (saving, folder / name, folder / (name + MASTER)):
        shutil.rmtree(left, ignore_errors=True)
    saving.mkdir(parents=True)
    write_json(saving / "config.json", config.to_dict())
    (folder / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "offprincipal_peft.rlvr.trial", "config.json", "record.json"]
    command[-2:] = [f".saving/{name}/{file}" for file in command[-2:]]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(config.threads or 1)}
    with (folder / "logs" / f"{name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=offline, check=True)
    record = read_record(saving / "record.json")
    if record["error"] is not None:
        raise RuntimeError(f"{name}: {record['error']['stage']}: {record['error']['message']} (logs/{name}.log)")
    saved = saving / f"checkpoint-{config.steps}"
    (saved / "training_args.bin").unlink()  # a pickle, of no use here
    if config.method == "full":
        saved.rename(folder / (name + MASTER))
        save_as("bfloat16", str(folder / (name + MASTER)), folder / name)
    else:
        saved.rename(folder / name)
    write_json(folder / "trials" / f"{name}.json", record)  # last: a record without weights would never be mended
    shutil.rmtree(saving)
    return record


def save_as(dtype: str, model: str, target: Path) -> None:
    """Write ``model`` (a name or folder, as the harness takes it) into ``target``, its weights cast to ``dtype``."""
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    weights: Any = load_model(model, dtype, torch.device("cpu"))
    weights.save_pretrained(temporary)
    load_tokenizer(model).save_pretrained(temporary)
    temporary.rename(target)


def _finished(folder: Path, name: str, config: TrialConfig) -> dict[str, Any] | None:
    path = folder / "trials" / f"{name}.json"
    if not (path.is_file() and (folder / name).is_dir()):
        return None
    record = read_record(path)
    if TrialConfig.from_dict(record["config"]) != config:
        raise ValueError(f"{path}: made with other settings; move it and {folder / name} away, or take another folder")
    return record


def _summary(folder: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """What the report of an audit cites of a run; rewards are means over the first and the last steps."""
    config, result = record["config"], record["result"]
    rewards = [row["reward"] for row in record["curve"]]
    losses = [row["loss"] for row in record["curve"]]
    edges = {"first": rewards[:EDGE], "last": rewards[-EDGE:]}
    rewarded = config["algorithm"] != "sft"
    return {
        **{key: config[key] for key in ("method", "algorithm", "learning_rate", "seed", "steps", "optimizer")},
        **{key: config[key] for key in ("weight_decay", "prompts_per_step", "group_size", "beta", "threads")},
        "trained_in": config["dtype"],
        "reward": {end: sum(part) / len(part) for end, part in edges.items()} if rewarded else None,
        "reward_slope": result["reward_slope"],
        "loss": {"first": losses[0], "last": losses[-1]},
        "test_accuracy": {"before": result["base_accuracy"], "after": result["test_accuracy"]},
        **{key: result[key] for key in ("validation_accuracy", "kl", "update_norm", "trainable_parameters", "step_s")},
        "seconds": record["wall_s"],
        "files": _files(folder, name, name + MASTER),
    }


def _line(record: dict[str, Any]) -> str:
    result, slope = record["result"], record["result"]["reward_slope"]
    text = f"accuracy {result['base_accuracy']:.3f} -> {result['test_accuracy']:.3f}, {record['wall_s']:.0f} s"
    if slope is None:
        return text
    return f"reward slope {slope['value']:.4f} [{slope['low']:.4f}, {slope['high']:.4f}] a step, " + text


def _files(folder: Path, *names: str) -> dict[str, str]:
    """The sha256 of every weights file below ``folder/name``."""
    found = {}
    for path in (path for name in names for path in sorted((folder / name).glob("*.safetensors"))):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _write_summary(folder: Path, model: str) -> None:
    records = {path.stem: read_record(path) for path in sorted((folder / "trials").glob("*.json"))}
    write_json(
        folder / "runs.json",
        {
            "benchmark": "audit_runs",
            "base": {"model": model, "stored": "bfloat16", "files": _files(folder, BASE)},
            "runs": {name: _summary(folder, name, record) for name, record in records.items()},
        },
    )


def audit_all(study: dict[str, Any], folder: Path, out: Path) -> None:
    """Audit every group of the study whose runs are all in ``folder``: one report ``out/GROUP.json`` each.

    ``out/runs.json`` says how the audited weights were made and what each audit took.
    """
    runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    out, seconds = out.resolve(), {}
    for group, fields in study["audits"].items():
        base, names = Path(fields.get("base", BASE)), fields["tuned"]
        missing = [name for name in names if not (folder / name).is_dir()]
        if missing:
            print(f"{group}: not audited, {folder} lacks {', '.join(missing)}")
            continue
        with contextlib.chdir(folder), contextlib.ExitStack() as stack:  # so that reports name no machine's paths
            tuned = [stack.enter_context(_opened(Path(name), base)) for name in names]
            report = audit(base, *tuned)
        write_report(without_curves(report), out / f"{group}.json")
        seconds[group] = report.seconds
        print(f"{group}: {report.seconds:.0f} s")
        for name, verdict in zip(names, report.verdicts, strict=True):
            print("\n- ".join([f"  {name}", *verdict.sentences]), flush=True)
    write_result(out / "runs.json", {**runs, "environment": environment("cpu"), "audit_seconds": seconds})


def _opened(path: Path, base: Path) -> Checkpoint:
    try:
        return open_checkpoint(path)
    except AdapterFolder:
        return open_adapter(path, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=RUNS, help="the YAML file of runs and audits")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train what the folder lacks")
    training.add_argument("folder", type=Path)
    training.add_argument("--only", nargs="+", metavar="NAME")
    auditing = commands.add_parser("audit", help="write the reports")
    auditing.add_argument("folder", type=Path)
    auditing.add_argument("out", type=Path)
    args = parser.parse_args()
    study = yaml.safe_load(args.study.read_text(encoding="utf-8"))
    if args.command == "train":
        train_all(study, args.folder, args.only)
    else:
        audit_all(study, args.folder, args.out)


if __name__ == "__main__":
    main()
