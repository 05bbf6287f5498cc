"""The study's own code: its small model, trials that share a process, and how the findings' figures are made."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_trials import save_tiny_task, tiny_trial

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import findings  # noqa: E402
import small_model  # noqa: E402
import study  # noqa: E402

from offprincipal_peft.rlvr.records import read_record  # noqa: E402
from offprincipal_peft.rlvr.tasks import load_task  # noqa: E402


def test_the_page_shows_what_the_result_files_hold() -> None:
    text = findings.PAGE.read_text(encoding="utf-8")
    assert findings.rendered(text) == text


def test_specs_of_the_study_hold_together() -> None:
    for spec in sorted((ROOT / "benchmarks" / "experiments").glob("study_*.yaml")):
        configs = study.trials_of(spec)
        assert len({config.seed for config in configs}) >= 5, spec.name
        assert "Hypothesis" in spec.read_text(), spec.name


# ---- the small model


def test_text_of_every_task_is_in_the_small_model_s_vocabulary() -> None:
    tokenizer = small_model.tokenizer()
    texts = [small_model.other_text(1), *(next(small_model.documents(seed)) for seed in range(50))]
    for name in ("sums", "products", "largest-of-n"):
        task = load_task(name, {"train": 20, "validation": 5, "test": 5})
        texts += [str(item.prompt) + task.gold(item) for item in task.splits.train]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode("\n", add_special_tokens=False) == [2]


def test_a_share_of_the_tasks_answers_is_wrong_and_no_other() -> None:
    draw = small_model.random.Random(0)
    sums = [small_model._sum(draw).replace("=", "==") for _ in range(2000)]
    wrong = sum(not eval(line) for line in sums) / len(sums)
    assert abs(wrong - small_model.WRONG) < 0.03  # observed: 0.21
    assert all(eval(small_model._difference(draw).replace("=", "==")) for _ in range(200))


def test_pretraining_is_its_seed_s() -> None:
    torch.set_num_threads(1)
    first, losses = small_model.pretrain(3, 4, 1e-3, 0)
    again, _ = small_model.pretrain(3, 4, 1e-3, 0)
    other, _ = small_model.pretrain(3, 4, 1e-3, 1)
    hashes = [small_model.weights_hash(model) for model in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2] and len(losses) == 3
    batch = next(small_model.batches(1, 4))
    assert batch.shape == (4, small_model.LENGTH + 1) and int(batch.max()) < len(small_model.CHARACTERS) + 2


# ---- trials that share a process


def test_a_trial_is_the_same_in_a_process_of_its_own_and_finished_ones_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_task(tmp_path / "model")
    base = {**tiny_trial(model), "steps": 1}
    threads = base.pop("threads")
    values = {"base": base, "methods": ["lora", "safe"], "grid": {"learning_rate": [1e-3]}, "threads": threads}
    spec = tmp_path / "small.yaml"
    spec.write_text(yaml.safe_dump(values))
    study.run(spec, tmp_path / "runs", 1)
    study.verify(spec, tmp_path / "runs", 1)
    capsys.readouterr()
    study.run(spec, tmp_path / "runs", 1)
    assert capsys.readouterr().out == "small: 2 trials, 0 to run\n"
    path = next((tmp_path / "runs" / "small" / "trials").glob("lora*.json"))
    record = read_record(path)
    record["evaluations"][0]["accuracy"] += 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="another record in a process of its own"):
        study.verify(spec, tmp_path / "runs", 1)
    study.collect(spec, tmp_path / "runs", tmp_path / "small.json")
    found = json.loads((tmp_path / "small.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["finished"] * 2
    assert all(
        len(trial["curve"]) == 2 and len(trial["curve"][0]) == len(found["evaluated"]) for trial in found["trials"]
    )


# ---- figures


def trial(label: str, rate: float, seed: int, rows: list[list[float]], **fields: Any) -> dict[str, Any]:
    """``rows``: accuracy, even, odd, KL at each evaluation."""
    known = {"status": "finished", "method_options": {}, "rank": 8, "geometry": {}, "validation": rows[-1][0]}
    curve = [[10 * i, a, even, odd, kl, 1.0, 10 * kl, 2.0 + kl] for i, (a, even, odd, kl) in enumerate(rows)]
    return {**known, "label": label, "learning_rate": rate, "seed": seed, "curve": curve, **fields}


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> findings.Result:
    """LoRA at two rates, of which the higher one collapses for one seed, and another method that moves less."""
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    start = [0.5, 0.5, 0.5, 0.0]
    trials = [
        trial("lora", 1e-3, 0, [start, [0.6, 0.7, 0.5, 0.1], [0.7, 0.9, 0.5, 0.2]]),
        trial("lora", 1e-3, 1, [start, [0.6, 0.7, 0.5, 0.2]]),
        trial("lora", 1e-2, 0, [start, [0.9, 0.6, 0.9, 0.2]]),
        trial("lora", 1e-2, 1, [start, [0.44, 0.44, 0.44, 0.3]]),
        trial("slow", 1e-3, 0, [start, [0.52, 0.52, 0.52, 0.05]]),
        trial("slow", 1e-3, 1, [start, [0.56, 0.56, 0.56, 0.2]]),
    ]
    values = {"evaluated": list(study.EVALUATED), "trials": trials, "seconds": 60.0}
    values["environment"] = {"cpu": "some processor", "date": "2026-01-01"}
    (tmp_path / "some.json").write_text(json.dumps(values))
    return findings.Result("some")


def test_a_collapse_is_counted(result: findings.Result) -> None:
    table = findings.equal_rate(result, [])
    assert table[0] == "| method | 1e−3 | 1e−2 |"
    assert "(1 of 2 collapsed)" in table[2] and table[2].count("collapsed") == 1
    assert table[3].endswith("| – |")
    failed = trial("lora", 1.0, 0, [[0.5, 0.5, 0.5, 0.0]], status="failed")
    assert result.collapsed(failed)


def test_the_rate_is_chosen_on_one_half_and_reported_on_the_other(result: findings.Result) -> None:
    """At KL 0.1 LoRA's even items are best at the low rate (0.7 and 0.6), its odd ones at the high rate."""
    assert findings._at_best(result, "lora", "kl", 0.1) == (1e-3, {0: 0.5, 1: 0.5})
    assert findings._at_best(result, "slow", "kl", 0.1) is None  # one seed does not get there
    (_, _, lora, slow) = findings.equal_level(result, ["kl", "lora", "0.05", "0.1"])
    assert slow.count("not reached") == 1 and "1e−3" in lora
    assert "; +1.8 ±" in slow  # odd items at KL 0.05: 0.52 and 0.515, LoRA's 0.5


def test_the_best_rate_is_validation_s(result: findings.Result) -> None:
    table = findings.best_rate(result, [])
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:2] == ["lora", "1e−2"]  # 0.9 and 0.44 against 0.7 and 0.6
    assert cells[2].startswith("67.0 ±") and cells[-1] == "1e−2"  # where one seed collapsed


def test_a_table_stands_between_its_marks(result: findings.Result) -> None:
    none = "<!-- table none best-rate -->\n<!-- end -->\n"
    text = f"before\n<!-- table some equal-rate -->\nold\n<!-- end -->\nafter\n{none}"
    found = findings.rendered(text)
    assert found.startswith("before\n<!-- table some equal-rate -->\n| method |") and "old" not in found
    assert found.endswith(f"<!-- end -->\nafter\n{none}")
    assert "6 trials, 0.0 hours of one thread, some processor, 2026-01-01" in found
    assert findings.rendered(found) == found
