"""A whole trial on a tiny model: every method and algorithm, the record, repetition, failures."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.methods import METHODS
from offprincipal_peft.rlvr.records import numeric_fields, read_record, write_record
from offprincipal_peft.rlvr.trial import run_trial
from tiny_trials import save_tiny_task, tiny_trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory, monkeypatch_module) -> Path:
    monkeypatch_module.setenv("OFFPRINCIPAL_CACHE", str(tmp_path_factory.mktemp("cache")))
    return save_tiny_task(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def trial(folder: Path, **fields) -> TrialConfig:
    small = {"method": "lora", "learning_rate": 1e-2, "alpha": 8, "steps": 3, "evaluation_batch": 4}
    return TrialConfig.from_dict({**tiny_trial(folder), **small, **fields})


def finished(config: TrialConfig, tmp_path: Path) -> dict:
    record = run_trial(config)
    assert record["error"] is None, record["error"]["traceback"]
    write_record(tmp_path / "record.json", record)
    return read_record(tmp_path / "record.json")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(method, folder, tmp_path):
    steps = []
    options = {"principal_rank": 2} if method == "offprincipal" else {}
    config = trial(folder, method=method, method_options=options, evaluate_every=2)
    record = run_trial(config, lambda event: steps.append(event) if event["event"] == "step" else None)
    assert record["error"] is None, record["error"]["traceback"]
    assert [event["step"] for event in steps] == [row["step"] for row in record["curve"]] == [1, 2, 3]
    tests = [e for e in record["evaluations"] if e["split"] == "test"]
    assert [e["step"] for e in tests] == [0, 2, 3]
    assert all(len(e["correct"]) == 5 and e["accuracy"] == sum(e["correct"]) / 5 for e in tests)
    # peft-pissa and OSF write the model's weights anew: a rounding error away. Every other start is the model itself.
    start = abs(tests[0]["kl"])
    assert start < 1e-6 if method in ("peft-pissa", "osf") else start == 0.0, start  # seen: 7e-8
    result = record["result"]
    assert result["trainable_parameters"] > 0
    # Two moments of every trained number at least; full fine-tuning keeps no second copy of its weights.
    least = 8 if method == "full" else 12 if method != "peft-supertuning" else 8
    assert result["state_bytes"] >= least * result["trainable_parameters"]
    assert result["update_norm"] == record["geometry"]["summary"]["update_norm"] > 0
    assert result["kl"] > 1e-6
    assert result["step_s"] > 0 and result["peak_memory_bytes"] > 1e7


def test_something_is_learned_and_moves_the_model(folder, tmp_path):
    """Supervised on the tiny model: the loss falls, the KL rises, accuracy is of the same items."""
    config = trial(folder, algorithm="sft", steps=30, prompts_per_step=8, learning_rate=1e-2, method="full")
    record = finished(config, tmp_path)
    losses = [row["loss"] for row in record["curve"]]
    assert losses[-1] < 0.5 * losses[0]  # seen: 4.41 -> 0.51
    assert record["result"]["kl"] > 0.1  # seen: 3.3
    assert record["result"]["reward_slope"] is None  # nothing is rewarded
    assert record["result"]["forgetting"] != record["result"]["forgetting_base"]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "sft"])
@pytest.mark.parametrize("method", ["lora", "safe"])
def test_the_same_trial_twice_has_the_same_numbers(algorithm, method, folder, tmp_path):
    config = trial(folder, algorithm=algorithm, method=method, beta=0.05 if algorithm != "sft" else 0.0)
    first, again = (numeric_fields(finished(config, tmp_path)) for _ in range(2))
    assert json.dumps(first, sort_keys=True) == json.dumps(again, sort_keys=True)
    other = numeric_fields(finished(replace(config, seed=1), tmp_path))
    assert other["curve"] != first["curve"]
    assert [e["correct"] for e in other["evaluations"][:1]] == [e["correct"] for e in first["evaluations"][:1]]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_with_a_penalty_the_first_kl_is_zero(algorithm, folder, tmp_path):
    for method in ("lora", "offprincipal", "safe"):
        options = {"principal_rank": 2} if method == "offprincipal" else {}
        config = trial(folder, algorithm=algorithm, method=method, beta=0.1, method_options=options)
        assert finished(config, tmp_path)["curve"][0]["kl"] == 0.0


def test_methods_start_with_the_same_prompts_and_samples(folder, tmp_path):
    """Before the first update all zero starts are one model, so all of step 1's samples and rewards agree."""
    rows = []
    for method in ("lora", "rlpo", "milora", "safe", "dora"):
        row = finished(trial(folder, method=method), tmp_path)["curve"][0]
        rows.append({name: row[name] for name in ("reward", "reward_std", "entropy", "completion_length")})
    assert all(row["entropy"] == pytest.approx(rows[0]["entropy"], abs=1e-6) for row in rows)
    assert len({(row["reward"], row["reward_std"], row["completion_length"]) for row in rows}) == 1


def test_split_precision_gets_its_optimiser(folder, tmp_path):
    config = trial(folder, method="low", method_options={"precision": "split"}, dtype="bfloat16")
    record = finished(config, tmp_path)
    assert record["result"]["update_norm"] > 0


def test_chat_prompts_and_an_own_reward(folder, tmp_path):
    data = tmp_path / "items.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"say {w}"}], "answer": w, "weight": i}
        for i, w in enumerate("abcdefghijklmnop")
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def reward(completions, answer, weight, **columns):\n"
        "    assert len(weight) == len(completions)\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    options = {"verifier": f"{tmp_path / 'mine.py'}:reward"}
    fields = {"task": str(data), "task_options": options, "train_items": 8, "validation_items": 3, "test_items": 3}
    for algorithm in ("grpo", "sft"):
        record = finished(trial(folder, algorithm=algorithm, **fields), tmp_path)
        assert record["checks"]["train"] == 8 and record["checks"]["gold_correct"] == 14


REWARDS = {
    "raises": ("raise KeyError('no such key')", "KeyError", "no such key"),
    "length": ("return [1.0]", "RewardError", "returned 1 values for 4 completions"),
    "nan": ("return [float('nan')] * len(completions)", "RewardError", "returned nan for"),
    "text": ("return ['good'] * len(completions)", "RewardError", "returned 'good' for"),
    "none": ("return None", "RewardError", "returned NoneType"),
}


@pytest.mark.parametrize("fault", REWARDS)
def test_a_reward_function_that_breaks_in_training_ends_its_trial(fault, folder, tmp_path):
    body, kind, words = REWARDS[fault]
    (tmp_path / "mine.py").write_text(
        "import inspect\n"
        "def reward(completions, answer, prompts=None, **columns):\n"
        "    if len(completions) != 4:\n"  # the proof and the evaluations are fine
        "        return [float(a == c) for a, c in zip(answer, completions)]\n"
        f"    {body}\n"
    )
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(30)))
    options = {"verifier": f"{tmp_path / 'mine.py'}:reward"}
    record = run_trial(trial(folder, task=str(data), task_options=options, evaluation_batch=3))
    assert record["status"] == "failed"
    error = record["error"]
    assert (error["stage"], error["type"]) == ("train", kind) and words in error["message"]
    assert "Traceback" in error["traceback"] and "reward" in error["traceback"]
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json")["error"] == error


@pytest.mark.parametrize(
    ("fields", "stage", "words"),
    [
        ({"method": "lorra"}, "model", "did you mean 'lora'"),
        ({"model": "no/such/folder"}, "model", "neither 'smollm2-135m', nor a folder here"),
        ({"task": "sumz", "task_options": {}}, "task", "did you mean 'sums'"),
        ({"task": "sums", "task_options": {"largst": 3}}, "task", "its options are largest=50, seed=0"),
        ({"trainer_options": {"num_generation": 3}}, "model", "trl.GRPOConfig"),
        ({"method": "lora", "method_options": {"rnk": 3}}, "model", "rnk"),
        ({"target_modules": ["nothing_like_it"]}, "model", "nothing_like_it"),
    ],
)
def test_mistakes_end_the_trial_with_the_reason(fields, stage, words, folder):
    record = run_trial(trial(folder, **fields))
    assert record["status"] == "failed"
    assert record["error"]["stage"] == stage and words in record["error"]["message"]


def test_the_command_prints_progress_and_writes_the_record(folder, tmp_path):
    config = trial(folder)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "offprincipal_peft.rlvr.trial", "config.json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]  # nothing else is printed there
    assert {event["event"] for event in events} == {"stage", "evaluation", "step", "finished"}
    assert all(event["id"] == config.trial_id for event in events)
    record = read_record(tmp_path / "out.json")
    assert record["status"] == "finished" and record["config"] == config.to_dict()
    assert record["environment"]["threads"] == 1 and record["environment"]["packages"]["torch"] == torch.__version__
    assert all(math.isfinite(row["loss"]) for row in record["curve"])


def test_a_config_that_is_none_writes_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"method": "lora", "learning_rate": 1e-4, "rnak": 3}))
    command = [sys.executable, "-m", "offprincipal_peft.rlvr.trial", "config.json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'rank'" in done.stderr
    assert not (tmp_path / "out.json").exists()
