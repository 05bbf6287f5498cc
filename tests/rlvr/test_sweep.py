"""What a sweep makes of its spec and its folder, where nobody is killed; the trials are fake_trial.py's."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offprincipal_peft.rlvr import sweep_folder, sweep_process
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.records import numeric_fields, read_record, read_records
from offprincipal_peft.rlvr.sweep import Resources, SpecError, SweepError, SweepSpec, run_sweep
from offprincipal_peft.rlvr.sweep_local import device_slots
from offprincipal_peft.rlvr.sweep_process import describe_end, trial_command, trial_environment

FAKE = Path(__file__).with_name("fake_trial.py")
COMMAND = [sys.executable, str(FAKE)]
TWO = {"base": {"learning_rate": 1e-3}, "methods": ["lora", "pissa"]}


def spec_of(text: str) -> SweepSpec:
    return SweepSpec.from_yaml(text.strip("\n") + "\n")


def test_grid_methods_and_seeds_are_crossed() -> None:
    trials = spec_of("""
base: {steps: 3, method_options: {shared: 1}}
methods:
  - lora
  - {method: offprincipal, label: away, options: {principal_rank: [16, 32], rho: 0.2}, learning_rate: [2e-4]}
grid: {rank: [8, 16], learning_rate: [1e-3, 1e-4]}
seeds: [0, 7]
threads: 2
""").trials()
    rows = [(t.label, t.rank, t.learning_rate, t.method_options.get("principal_rank"), t.seed) for t in trials]
    expected = [("lora", rank, rate, None, seed) for rank in (8, 16) for rate in (1e-3, 1e-4) for seed in (0, 7)]
    expected += [("away", rank, 2e-4, k, seed) for rank in (8, 16) for k in (16, 32) for seed in (0, 7)]
    assert rows == expected
    assert {(t.steps, t.threads, t.method_options["shared"]) for t in trials} == {(3, 2, 1)}
    assert trials[-1].method_options == {"shared": 1, "principal_rank": 32, "rho": 0.2}
    assert len({t.trial_id for t in trials}) == 16


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("{method: lora, target_modules: [q_proj, v_proj]}", [["q_proj", "v_proj"]]),
        ("{method: lora, target_modules: [[q_proj, v_proj], [o_proj]]}", [["q_proj", "v_proj"], ["o_proj"]]),
        ("{method: lora, target_modules: [[q_proj], all-linear]}", [["q_proj"], "all-linear"]),
    ],
)
def test_list_of_module_names_is_one_value(entry: str, values: list[Any]) -> None:
    trials = spec_of(f"methods:\n  - {entry}\nbase: {{learning_rate: 1e-3}}").trials()
    assert [trial.target_modules for trial in trials] == values


def test_option_in_the_grid_and_list_as_an_option() -> None:
    trials = spec_of("""
base: {learning_rate: 1e-3, method_options: {layers: [1, 2]}}
methods: [lora]
grid: {method_options.principal_rank: [4, 8]}
""").trials()
    assert [t.method_options for t in trials] == [{"layers": [1, 2], "principal_rank": k} for k in (4, 8)]


def test_trials_are_the_same_from_yaml_json_and_themselves(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("base: {learning_rate: 1e-3}\nmethods: [lora, {method: pissa, rank: [4, 8]}]\nseeds: [0, 1]\n")
    spec = SweepSpec.from_yaml(path)
    again = SweepSpec.from_dict(json.loads(json.dumps(spec.source)))
    assert [t.trial_id for t in again.trials()] == [t.trial_id for t in spec.trials()]
    assert SweepSpec.from_yaml(str(path)) == spec


LORA = "methods: [lora]\nbase: {learning_rate: 1e-3}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bsae: {}\n", "<text>:1: unknown 'bsae' of a sweep (did you mean 'base'?); it knows base, methods, grid, "),
        ("methods: [lora]\nbase:\n  rank: 4\n  lerning_rate: 1\n", "<text>:4: unknown 'lerning_rate' of a trial (did "),
        (
            "methods:\n- method: lora\n  ranq: 4\n",
            "<text>:3: unknown 'ranq' of a method's entry (did you mean 'rank'?)",
        ),
        ("methods: [lora]\ngrid:\n  method_option.k: [4]\n", "<text>:3: unknown 'method_option.k' of a trial"),
        ("methods: [lora]\n\n", "<text>:1: a trial needs learning_rate (in the trials of 'lora')"),
        (LORA + "grid:\n  rank: [4, 0]\n", "<text>:4: rank=0: it is a whole number of at least 1 (in the trials of"),
        (LORA + "grid:\n  rank: 4\n", "<text>:4: 4: a grid lists the values to try, such as rank: [4]"),
        (LORA + "grid:\n  rank: [4, 8, 4]\n", "<text>:4: 4 is listed twice; the same trial would run twice"),
        (LORA + "grid:\n  k: [1e-1, 0.1]\n", "<text>:4: 0.1 is listed twice"),
        (LORA + "grid: {seed: [1]}\n", "<text>:3: seed does not belong here; it is set with 'seeds: [0, 1]'"),
        (LORA + "seeds: 3\n", "<text>:3: 3: seeds is a list such as [0, 1]"),
        (LORA + "seeds: [-1]\n", "<text>:3: seed=-1: it is a whole number of at least 0"),
        (LORA + "threads: 0\n", "<text>:3: threads=0: it is a whole number of at least 1"),
        (LORA + "resources: {gpus: 1.5}\n", "<text>:3: gpus=1.5: above 1 it is a whole number"),
        (LORA + "resources:\n  accelerate: {cpu: true}\n", "<text>:4: num_processes=None: accelerate needs"),
        (
            "methods: [lora, lora]\nbase: {learning_rate: 1}\n",
            "<text>:1: two entries are called 'lora'; give each a 'la",
        ),
        (
            "methods:\n- {method: lora, label: off}\n",
            "<text>:2: YAML reads on, off, yes and no as true or false; quote",
        ),
        (
            "methods:\n- {method: lora,\n   options: 3}\nbase: {learning_rate: 1}\n",
            "<text>:3: method_options=3: it is a",
        ),
        ("base: {rank: 4, rank: 8}\n", "<text>:1: 'rank' stands twice in one mapping"),
        ("methods: [lora\nbase: 3\n", "<text>:2: not YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "<text>:1: not YAML: could not determine a constructor"),
        ("- 1\n- 2\n", "<text>:1: a sweep is a mapping of names to values, not list"),
        ("no-such-file.yaml", "no-such-file.yaml: No such file or directory"),
        ("methods: [lora]\nbase: {learning_rate: 1, task_options: {day: 2026-01-01}}\n", "date is not JSON"),
        (f"methods: [lora]\nseeds: {list(range(10_001))}\nbase: {{learning_rate: 1}}\n", "over 10000 trials"),
    ],
)
def test_bad_spec_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        SweepSpec.from_yaml(text)
    assert message in str(caught.value)


def test_folder_holds_all_of_it(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    spec = SweepSpec.from_dict({**TWO, "seeds": [0, 1], "threads": 3})
    outcome = run_sweep(spec, tmp_path / "new" / "sweep", command=COMMAND, progress=events.append)
    ids = [trial.trial_id for trial in spec.trials()]
    assert outcome.finished == ids and not outcome.failed and not outcome.skipped
    folder = outcome.folder
    assert json.loads((folder / "sweep.json").read_text()) == {"schema": 1, "spec": spec.source, "trials": ids}
    assert sorted(path.stem for path in (folder / "trials").iterdir()) == sorted(ids)
    assert (folder / "logs" / f"{ids[0]}.log").read_text().splitlines()[-1] == f"run 1 of {ids[0]}"
    records = read_records(folder)
    assert {record["environment"]["threads"] for record in records} == {"3"}
    assert {TrialConfig.from_dict(record["config"]).threads for record in records} == {3}
    states = [(event["id"], event["state"], event["done"]) for event in events if event["event"] == "trial"]
    assert states == [
        (name, state, done + (state == "finished"))
        for done, name in enumerate(ids)
        for state in ("started", "finished")
    ]
    assert sum(event["event"] == "step" for event in events) == 12


def test_second_start_runs_nothing_and_new_trials_are_added(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    command = [*COMMAND, "--ledger", str(ledger)]
    run_sweep(SweepSpec.from_dict(TWO), tmp_path / "sweep", command=command)
    before = [numeric_fields(record) for record in read_records(tmp_path / "sweep")]
    assert len(run_sweep(SweepSpec.from_dict(TWO), tmp_path / "sweep", command=command).skipped) == 2
    assert ledger.read_text().count("start") == 2
    more = SweepSpec.from_dict({**TWO, "seeds": [0, 1]})
    outcome = run_sweep(more, tmp_path / "sweep", command=command)
    assert (len(outcome.skipped), len(outcome.finished)) == (2, 4)
    assert ledger.read_text().count("start") == 4
    after = [numeric_fields(record) for record in read_records(tmp_path / "sweep")]
    assert [record for record in after if record["config"]["seed"] == 0] == before


def test_other_sweep_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND)
    other = SweepSpec.from_dict({"base": {"learning_rate": 1e-3, "rank": 8}, "methods": ["lora", "pissa"]})
    with pytest.raises(SweepError, match=r"holds another sweep: 2 of its 2 trials are not .*: rank 16 → 8\)"):
        run_sweep(other, tmp_path, command=COMMAND)
    assert len(read_records(tmp_path)) == 2


def test_several_at_once_give_the_same_numbers(tmp_path: Path) -> None:
    one = SweepSpec.from_dict({**TWO, "seeds": [0, 1]})
    three = SweepSpec.from_dict({**TWO, "seeds": [0, 1], "parallel": 3})
    events: list[dict[str, Any]] = []
    run_sweep(one, tmp_path / "one", command=COMMAND)
    run_sweep(three, tmp_path / "three", command=COMMAND, progress=events.append)
    assert [event.get("state") for event in events[:3]] == ["started"] * 3
    numbers = [[numeric_fields(record) for record in read_records(tmp_path / name)] for name in ("one", "three")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4


def test_failed_trial_is_kept_until_asked_for(tmp_path: Path) -> None:
    spec = SweepSpec.from_dict(TWO)
    outcome = run_sweep(spec, tmp_path, command=[*COMMAND, "--fail", "lora"])
    assert [trial_id[:4] for trial_id in outcome.failed] == ["lora"]
    assert read_record(tmp_path / "trials" / f"{outcome.failed[0]}.json")["error"]["type"] == "FakeError"
    assert run_sweep(spec, tmp_path, command=COMMAND).failed == outcome.failed
    mended = run_sweep(spec, tmp_path, command=COMMAND, rerun_failed=True)
    assert not mended.failed and len(mended.skipped) == 1
    assert read_record(tmp_path / "trials" / f"{outcome.failed[0]}.json")["status"] == "finished"


@pytest.mark.parametrize(("name", "value"), [("rank", 99), ("label", "other"), ("nonsense", 1)])
def test_record_of_another_trial_is_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    outcome = run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND)
    path = tmp_path / "trials" / f"{outcome.finished[0]}.json"
    record = json.loads(path.read_text())
    record["config"][name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(SweepError, match=rf"{path.name}: .*move"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND)


def test_stray_record_is_refused_by_name(tmp_path: Path) -> None:
    outcome = run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND)
    shutil.copy(tmp_path / "trials" / f"{outcome.finished[0]}.json", tmp_path / "trials" / "stray.json")
    with pytest.raises(SweepError, match=r"stray\.json: no trial of this sweep"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND)


def test_leftovers_are_taken_or_cleaned(tmp_path: Path) -> None:
    """A whole record on its way is a finished trial; half of one, or a temporary, is nothing."""
    spec = SweepSpec.from_dict(TWO)
    whole, half = (trial.trial_id for trial in spec.trials())
    run_sweep(spec, tmp_path, command=COMMAND)
    os.replace(tmp_path / "trials" / f"{whole}.json", tmp_path / "work" / f"{whole}.out.json")
    text = (tmp_path / "trials" / f"{half}.json").read_text()
    (tmp_path / "trials" / f"{half}.json").unlink()
    (tmp_path / "work" / f"{half}.out.json").write_text(text[:100])
    (tmp_path / "trials" / f".{half}.json.x.tmp").write_text(text[:100])
    outcome = run_sweep(spec, tmp_path, command=COMMAND)
    assert (outcome.skipped, len(outcome.finished)) == ([whole], 2)
    assert not list((tmp_path / "work").iterdir())
    assert len(list((tmp_path / "trials").iterdir())) == 2


def test_nothing_starts_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"file/sweep: \d+ bytes for the records cannot be written here: Not a dir"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path / "file" / "sweep", command=COMMAND)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sweep_folder.os, "fsync", full)
    with pytest.raises(SweepError, match=r"full: \d+ bytes for the records cannot be written here: No space left"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path / "full", command=COMMAND)
    assert not list((tmp_path / "full" / "work").iterdir())


def test_disk_that_fills_up_ends_the_sweep(tmp_path: Path) -> None:
    def full(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SweepError, match="No space left on device; with room there, the same command goes on"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND, progress=full)
    assert len(run_sweep(SweepSpec.from_dict(TWO), tmp_path, command=COMMAND).finished) == 2


def test_every_config_is_checked_before_anything_starts(tmp_path: Path) -> None:
    def check(config: TrialConfig) -> None:
        if config.method == "pissa":
            raise ValueError("no such method")

    with pytest.raises(SpecError, match=r"the trial pissa-\S+: no such method"):
        run_sweep(SweepSpec.from_dict(TWO), tmp_path / "sweep", command=COMMAND, check=check)
    assert not (tmp_path / "sweep").exists()


def test_trial_that_writes_no_record_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import sys\nprint('plain words')\nsys.exit('out of luck')\n")
    spec = SweepSpec.from_dict({**TWO, "retries": 0})
    outcome = run_sweep(spec, tmp_path / "sweep", command=[sys.executable, str(script)])
    assert len(outcome.failed) == 2
    record = read_records(tmp_path / "sweep")[0]
    assert record["error"]["message"] == "the trial's process ended with status 1 and left no record (attempts: 1)"
    assert {"plain words", "out of luck"} <= set(record["error"]["traceback"].splitlines())


def test_command_of_a_trial_on_several_processes() -> None:
    resources = Resources(accelerate={"num_processes": 4, "mixed_precision": "bf16", "main_process_port": 7})
    command = trial_command(resources, 2, None, Path("c.json"), Path("o.json"))
    assert command == [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "2"),
        *("--num_processes", "4", "--mixed_precision", "bf16", "--main_process_port", "7", "--multi_gpu"),
        *("-m", "offprincipal_peft.rlvr.trial", "c.json", "o.json"),
    ]
    sharded = Resources(accelerate={"num_processes": 2, "use_fsdp": True, "debug": False})
    assert trial_command(sharded, 1, None, Path("c"), Path("o"))[5:] == [
        *("--num_processes", "2", "--use_fsdp", "--main_process_port", "0", "-m", sweep_process.MODULE, "c", "o")
    ]
    assert trial_command(Resources(), 2, None, Path("c"), Path("o"))[1:] == ["-m", sweep_process.MODULE, "c", "o"]
    with pytest.raises(ValueError, match="accelerate launches Python modules and scripts only"):
        trial_command(resources, 2, ["/bin/true"], Path("c"), Path("o"))


def test_environment_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    environment = trial_environment(2, "1,3")
    assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")} == {"2"}
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["PYTHONHASHSEED"]) == ("1,3", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in trial_environment(2)


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_slots(0, 2) == [None, None]
    assert device_slots(1, 3) == ["0", "1", "2"]
    assert device_slots(2, 2) == ["0,1", "2,3"]
    assert device_slots(0.5, 6) == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")
    assert device_slots(2, 2) == ["5,6", "7,8"]
    with pytest.raises(SweepError, match="3 trials at once with 2 GPUs each do not fit the 4 CUDA devices here"):
        device_slots(2, 3)


def test_ends_in_words() -> None:
    assert describe_end(3) == "ended with status 3 and left no record"
    assert describe_end(137) == "was ended by SIGKILL; the system does that when memory runs out"
    assert describe_end(139) == "was ended by SIGSEGV"


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_guard_passes_the_exit_status_on(script: str, code: int) -> None:
    command = [sys.executable, "-I", "-S", str(sweep_process._GUARD), "/bin/sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(60) == code


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group is ended")
@pytest.mark.parametrize("rest", ["", "; sleep 98"])
def test_guard_leaves_nothing_behind(rest: str) -> None:
    """A worker in a session of its own, left by a command that ended, or by one whose caller is gone."""
    command = [sys.executable, "-I", "-S", str(sweep_process._GUARD), "/bin/sh", "-c"]
    command.append("setsid sleep 97 & echo $!" + rest)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guard:
        assert guard.stdin and guard.stdout
        worker = Path("/proc") / guard.stdout.readline().strip()
        if rest:
            assert worker.exists() and worker.name.isdigit()
            guard.stdin.close()
        guard.wait(60)
    assert worker.name.isdigit() and not worker.exists()


def test_guard_says_what_cannot_be_started(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(sweep_process._GUARD), str(tmp_path / "nothing")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 127
    assert "nothing: " in done.stderr and "No such file" in done.stderr
