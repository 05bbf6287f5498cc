"""The study's own code: its small model, trials that share a process, and how the findings' figures are made."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_trials import save_tiny_task, tiny_trial

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import _study_result  # noqa: E402
import _study_tables  # noqa: E402
import _study_text  # noqa: E402
import findings  # noqa: E402
import small_model  # noqa: E402
import study  # noqa: E402

from offprincipal_peft.rlvr.records import read_record  # noqa: E402
from offprincipal_peft.rlvr.statistics import Interval  # noqa: E402
from offprincipal_peft.rlvr.tasks import load_task  # noqa: E402


@pytest.mark.parametrize("page", findings.PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_the_result_files_hold(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert findings.rendered(text) == text


@pytest.mark.parametrize("path", sorted(findings.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_file_is_of_the_spec_as_it_stands_and_holds_all_of_its_trials(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    spec = findings.SPECS / found["spec"]["name"]
    assert hashlib.sha256(spec.read_bytes()).hexdigest() == found["spec"]["sha256"]
    assert [trial["id"] for trial in found["trials"]] == [config.trial_id for config in study.trials_of(spec)]


def test_specs_of_the_study_hold_together() -> None:
    for spec in sorted((ROOT / "benchmarks" / "experiments").glob("study_*.yaml")):
        configs = study.trials_of(spec)
        wanted = 3 if "smollm2" in spec.name else 5
        assert len({config.seed for config in configs}) >= wanted, spec.name
        assert "# Hypothesis" in spec.read_text() or "# Hypotheses" in spec.read_text(), spec.name


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


def test_most_of_the_tasks_answers_are_careless_and_no_other_is() -> None:
    draw = small_model.random.Random(0)
    right = [eval(line.replace("=", "==")) for line in (small_model._sum(draw) for _ in range(2000))]
    assert abs(sum(right) / 2000 - 0.72) < 0.03  # observed: 0.728
    assert all(eval(small_model._difference(draw).replace("=", "==")) for _ in range(200))
    assert small_model._without_carry([(27, 1), (35, 1)]) == 52 and small_model._without_carry([(99, 7)]) == 33
    careless = [small_model._largest(draw).split(" -> ") for _ in range(500)]
    picked = [(list(map(int, numbers.split())), int(answer)) for numbers, answer in careless]
    assert all(one in (max(many), max(many, key=lambda n: (n % 10, n))) for many, one in picked)
    assert any(one != max(many) for many, one in picked) and any(one == max(many) for many, one in picked)


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(ValueError, match=r"small holds trials of another .*model; move them away"):
        (model / "model.safetensors").write_bytes(b"other")
        next((tmp_path / "runs" / "small" / "trials").glob("safe*.json")).rename(tmp_path / "safe.json")
        monkeypatch.setattr(study, "check_trials", lambda: lambda config: None)
        study.run(spec, tmp_path / "runs", 1)
    (tmp_path / "safe.json").rename(
        tmp_path / "runs" / "small" / "trials" / f"{study.trials_of(spec)[1].trial_id}.json"
    )
    study.collect(spec, tmp_path / "runs", tmp_path / "small.json")
    found = json.loads((tmp_path / "small.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["finished"] * 2
    assert all(
        len(trial["curve"]) == 2 and len(trial["curve"][0]) == len(found["evaluated"]) for trial in found["trials"]
    )


KILLED = """
import os, sys, time
sys.path.append({benchmarks!r})
import study

if __name__ == "__main__":
    pool = study.processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_processes_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(benchmarks=str(ROOT / "benchmarks")))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = run.stdout.readline().strip()
        assert worker.isdigit()
        run.kill()
    for _ in range(600):
        state = subprocess.run(["ps", "-o", "stat=", "-p", worker], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.1)
    os.kill(int(worker), signal.SIGKILL)
    pytest.fail("the process goes on after the run was killed")


# ---- figures


def trial(label: str, rate: float, seed: int, rows: list[list[float | None]], **fields: Any) -> dict[str, Any]:
    """``rows``: accuracy and KL at each evaluation."""
    known = {"status": "finished", "method_options": {}, "rank": 8, "geometry": {}, "validation": rows[-1][0]}
    known |= {"algorithm": "grpo", "task": "sums"}
    curve = [[10 * i, accuracy, kl, 1.0, kl, 2.0] for i, (accuracy, kl) in enumerate(rows)]
    return {**known, "label": label, "learning_rate": rate, "seed": seed, "curve": curve, **fields}


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _study_result.Result:
    """LoRA at two rates, at the higher of which a seed collapses; a method that moves less; one that fails."""
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    start = [0.5, 0.0]
    trials = [
        *(trial("lora", 1e-3, seed, [start, [0.6 + seed / 100, 0.16], [0.7, 0.25]]) for seed in range(3)),
        trial("lora", 1e-2, 0, [start, [0.9, 0.16]]),  # the luck of one seed
        trial("lora", 1e-2, 1, [start, [0.44, 0.36]]),
        trial("lora", 1e-2, 2, [start, [0.5, 0.16]]),
        *(trial("slow", 1e-3, seed, [start, [0.52, 0.04 if seed else 0.09]]) for seed in range(3)),
        *(trial("bad", 1e-3, seed, [start], status="failed" if seed else "finished") for seed in range(3)),
        *(trial("nan", 1e-3, seed, [start, [0.6, 0.16], [0.0, None]]) for seed in range(3)),
    ]
    values = {"evaluated": list(study.EVALUATED), "trials": trials, "seconds": 60.0}
    values["ran"] = {"cpu": "some processor", "last": "2026-01-01"}
    (tmp_path / "some.json").write_text(json.dumps(values))
    return _study_result.Result(tmp_path / "some.json")


def rows_of(table: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {name: rest for name, *rest in (cells[0], *cells[2:])}


def test_collapses_and_failures_are_counted(result: _study_result.Result) -> None:
    rows = rows_of(_study_tables.equal_rate(result, []))
    assert rows["method"] == ["1e−3", "1e−2"]
    assert rows["lora"][0].startswith("70.0 ±") and rows["lora"][1].endswith("(1 of 3 collapsed)")
    assert rows["slow"][1] == "–" and rows["bad"][0] == "2 of 3 failed, 2 collapsed"
    assert rows["nan"][0].endswith("(3 of 3 collapsed)")


def test_each_seed_s_rate_is_chosen_by_the_others(result: _study_result.Result) -> None:
    """At KL 0.16 the high rate has 0.9 for seed 0 by luck: the others choose it, seed 0 does not."""
    found = _study_tables._at_best(result, "lora", "kl", 0.16)
    high = 0.5 - 0.06 * (0.4 / 0.6)  # seed 1: four tenths of six in the root of the KL
    assert {seed: trial["learning_rate"] for seed, (trial, _) in found.items()} == {0: 1e-3, 1: 1e-2, 2: 1e-2}
    assert [value for _, value in found.values()] == pytest.approx([0.6, high, 0.5])
    rows = rows_of(_study_tables.equal_level(result, ["kl", "lora", "0.01", "0.09"]))
    assert rows["slow"][1] == "not reached" == rows["bad"][0]
    assert rows["slow"][0].startswith("50.9 ± ") and rows["lora"][0].count(";") == 1  # no difference to itself
    assert rows["nan"][1].startswith("57.5 ± 0.0; ")  # three quarters of the way from 0.5 to 0.6


def test_equal_kl_is_read_along_the_path_and_not_by_the_step(result: _study_result.Result) -> None:
    """Accuracy grows with the norm, KL with its square: sparse and dense evaluations then read the same."""
    sparse = trial("x", 1.0, 0, [[0.5, 0.0], [0.8, 0.36]])
    dense = trial("x", 1.0, 0, [[0.5 + d / 2, d * d] for d in (0.0, 0.1, 0.2, 0.3, 0.4)])
    for level in (0.02, 0.05, 0.1):
        read = [result.at(one, "kl", level, "accuracy") for one in (sparse, dense)]
        assert read == pytest.approx([0.5 + level**0.5 / 2] * 2)


@pytest.fixture
def fast(result: _study_result.Result) -> _study_result.Result:
    """The result with another method: 60 % at KL 0.16 and 70 % at 0.36, 0.01 and 0.03 nats forgotten."""
    ends = {1e-3: [0.6, 0.16], 1e-2: [0.7, 0.36]}
    result.trials["fast"] = {
        rate: [trial("fast", rate, seed, [[0.5, 0.0], end]) for seed in range(3)] for rate, end in ends.items()
    }
    for trials, loss in zip(result.trials["fast"].values(), (2.01, 2.03), strict=True):
        for one in trials:
            one["curve"][-1][-1] = loss
    return result


def test_equal_kl_at_the_end_is_read_between_the_ends_of_neighbouring_rates(fast: _study_result.Result) -> None:
    """In the root of the KL 0.25 lies half-way from 0.16 to 0.36, whatever the paths were."""
    by_rate = fast.trials["fast"]
    assert fast.at_end(by_rate, "kl", 0.25) == pytest.approx({seed: 0.65 for seed in range(3)})
    assert fast.at_end(by_rate, "kl", 0.1) == {}  # below the lowest rate: nothing is read from the untrained model on
    assert fast.at_end(by_rate, "kl", 0.5) == {}
    for one, kl in zip(by_rate[1e-2], (0.25, 0.36, 0.49), strict=True):
        one["curve"][-1][2] = kl  # roots of 0.5, 0.6 and 0.7: the same place in the mean
    assert fast.at_end(by_rate, "kl", 0.25) == pytest.approx({seed: 0.65 for seed in range(3)})
    by_rate[1e-2][1]["curve"][-1][2] = None
    assert fast.at_end(by_rate, "kl", 0.25) == {}  # a rate at which a seed ended in NaN is no place
    rows = rows_of(_study_tables.equal_end(fast, ["kl", "lora", "0.25"]))
    assert rows["lora"] == ["70.0 ± 0.0"] and rows["fast"] == rows["bad"] == rows["nan"] == ["not reached"]


def test_the_headline_names_methods_and_the_rates_at_which_a_seed_collapsed(fast: _study_result.Result) -> None:
    rows = rows_of(_study_tables.headline(fast, ["0.25", "lora", "lora", "fast", "bad"]))
    assert list(rows) == ["method", "lora", "fast", "bad"]
    lora = ["70.0 ± 0.0", "–", "0.000 ± 0.000", "0.250 ± 0.000", "61.3 ± 62.1 at 1e−2", "1 of 3 at 1e−2"]
    assert rows["lora"] == lora
    assert rows["fast"][:4] == ["65.0 ± 0.0", "−5.0 ± 0.0", "20.000 ± 0.000", "0.260 ± 0.000"]
    assert rows["fast"][-1] == "none"
    assert rows["bad"][0] == "not reached" and rows["bad"][-1] == "2 of 3 at 1e−3"
    with pytest.raises(SystemExit, match=r"no method slo in this result; there are lora, slow, bad, nan, fast"):
        _study_tables.headline(fast, ["0.25", "lora", "slo"])


def test_a_number_has_two_digits_of_its_interval_and_no_more_than_six_of_its_mean() -> None:
    def written(value: float, half: float) -> str:
        return _study_text.number(Interval(value, value - half, value + half, 0.95, 5))

    assert written(0.97824, 0.00078) == "0.97824 ± 0.00078"
    assert written(1.7067743, 2.6e-8) == "1.70677 ± 0.00000"
    assert written(12.35, 5.8) == "12.3 ± 5.8" and written(1.82e-4, 2.3e-5) == "(1.82 ± 0.23)e−4"


def test_forgetting_is_the_loss_on_other_text_that_was_gained(fast: _study_result.Result) -> None:
    rows = rows_of(_study_tables.forgetting(fast, ["lora", "0.25"]))
    assert rows["lora"] == ["0.000 ± 0.000"] and rows["bad"] == ["not reached"]
    assert rows["fast"] == ["20.000 ± 0.000; +20.000 ± 0.000"]


def test_a_pair_is_compared_seed_by_seed(result: _study_result.Result) -> None:
    for name, gain in (("a, k = n/8", 0.02), ("b, k = n/8", 0.0)):
        ends = [[0.6 + gain + seed / 10, 0.1 + gain] for seed in range(3)]
        result.trials[name] = {1e-3: [trial(name, 1e-3, seed, [[0.5, 0.0], end]) for seed, end in enumerate(ends)]}
    rows = _study_tables.versus(result, ["a", "b"])
    assert rows[2] == "| k = n/8 | 1e−3 | +2.0 ± 0.0 | +0.020 ± 0.000 |"
    assert rows[3] == "| all, a mean for each seed |  | +2.0 ± 0.0 |  |" and len(rows) == 4


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.0, 0.0038, "1.0000 ± 0.0038"),
        (4.11e-4, 3.3e-5, "(4.11 ± 0.33)e−4"),
        (123.4, 12.0, "123 ± 12"),
        (-0.5, 0.25, "−0.50 ± 0.25"),
        (0.0, 0.0, "+0.000 ± 0.000"),
    ],
)
def test_a_figure_has_the_digits_that_its_interval_allows(value: float, half: float, text: str) -> None:
    found = _study_text.Interval(value, value - half, value + half, 0.95, 5)
    assert _study_text.signed(found).removeprefix("+" if value else "") == text


def test_the_best_rate_is_validation_s_over_the_other_seeds(result: _study_result.Result) -> None:
    rows = rows_of(_study_tables.best_rate(result, []))
    assert rows["lora"][0] == "1e−3" and rows["lora"][1] == "70.0 ± 0.0" and rows["lora"][-1] == "1e−2"
    assert rows["bad"][:5] == ["–"] * 5 and rows["bad"][-1] == "1e−3"
    assert rows["nan"][2] == "–"  # no KL


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e−4"), (1.5e-4, "1.5e−4"), (2.5e-5, "2.5e−5"), (1.0, "1"), (3e-2, "3e−2")]
)
def test_rates_are_told_apart(rate: float, text: str) -> None:
    assert _study_text.rate_text(rate) == text


def test_methods_are_told_apart_by_what_differs(result: _study_result.Result) -> None:
    assert list(result.trials) == ["lora", "slow", "bad", "nan"]
    one = trial("safe", 1.0, 0, [[0.5, 0.0]], method_options={"principal_rank": 0.125}, algorithm="sft")
    assert _study_result.method_name(one, []) == "safe, k = n/8"
    assert _study_result.method_name(one, ["algorithm", "task"]) == "safe, k = n/8, sft, sums"
    assert _study_result.method_name({**one, "label": "off-both-1/8"}, []) == "off-both-1/8"


def test_a_table_stands_between_its_marks(
    result: _study_result.Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(findings, "SPECS", tmp_path)
    (tmp_path / "none.yaml").write_text("")
    none = "<!-- table none best-rate -->\n<!-- end -->\n"
    text = f"before\n<!-- table some equal-rate -->\nold\n<!-- end -->\nafter\n{none}"
    found = findings.rendered(text)
    assert found.startswith("before\n<!-- table some equal-rate -->\n| method |") and "old" not in found
    assert found.endswith(f"<!-- end -->\nafter\n{none}")
    assert "15 trials, 0.0 hours of one thread, some processor, 2026-01-01" in found
    assert findings.rendered(found) == found
    for bad in (none.replace("none", "typo"), none.replace("-->\n<", "-->\nold\n<")):
        with pytest.raises(SystemExit, match="of which there is no result file"):
            findings.rendered(bad)
