"""The command line: what it lists, runs, reports, refuses, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offprincipal_peft import cli
from offprincipal_peft.rlvr import checks
from offprincipal_peft.rlvr.methods import METHODS
from tiny_models import save_tiny_model

SMALL = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2", "--max-completion-length", "3"]
SMALL += ["--test-items", "4", "--validation-items", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path / "cache"))


def test_methods_are_listed_with_a_line_each(capsys):
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert len(re.findall(rf"^  {re.escape(method.name)} +{re.escape(method.summary)}$", printed, re.M)) == 1


def test_compare_then_again_then_report(model, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["compare", "--methods", "lora,safe", "--rates", "1e-3", "--model", str(model), "--device", "cpu"]
    command += [*SMALL, "--set", "train_items=16", "--rank", "4", "--seeds", "0,1", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "4 trials into" in printed and "4/4 done" in printed and "report.html" in printed
    files = {path: path.read_bytes() for path in (out / "trials").iterdir()}
    records = [json.loads(text) for text in files.values()]
    assert {(r["config"]["label"], r["config"]["seed"]) for r in records} == {
        (label, seed) for label in ("lora", "safe") for seed in (0, 1)
    }
    assert all(r["status"] == "finished" and r["config"]["rank"] == 4 for r in records)
    assert cli.main(command) == 0  # nothing is run twice
    assert files == {path: path.read_bytes() for path in (out / "trials").iterdir()}
    assert "done before" in capsys.readouterr().out
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert "test, % [95 %]" in capsys.readouterr().out


def test_a_failed_trial_is_told_and_the_others_go_on(model, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"""
base:
  {{model: "{model}", device: cpu, steps: 2, prompts_per_step: 2, group_size: 2, max_completion_length: 3,
    train_items: 16, validation_items: 4, test_items: 4}}
methods:
  - {{method: lora, learning_rate: 1e-3, label: broken, options: {{target_modules: [no_such_layer]}}}}
  - {{method: lora, learning_rate: 1e-3}}
"""
    )
    out = tmp_path / "run"
    assert cli.main(["sweep", str(spec), "--out", str(out)]) == cli.SOME_FAILED
    printed = capsys.readouterr().out
    assert "no_such_layer" in printed
    records = [json.loads(path.read_text()) for path in (out / "trials").iterdir()]
    assert sorted((r["config"]["label"], r["status"]) for r in records) == [("broken", "failed"), ("lora", "finished")]
    assert "no_such_layer" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["compare", "--methods", "lorra", "--out", "OUT"], "did you mean 'lora'"),
        (["compare", "--task", "sum", "--out", "OUT"], "did you mean 'sums'"),
        (["compare", "--task", "none.jsonl", "--out", "OUT"], "none.jsonl: No such file"),
        (["compare", "--set", "rnak=4", "--out", "OUT"], "the fields are method, learning_rate"),
        (["compare", "--model", "no/where", "--out", "OUT"], "neither 'smollm2-135m', nor a folder"),
        (["compare", "--algorithm", "ppo", "--out", "OUT"], "grpo, rloo, sft"),
        (["compare", "--steps", "0", "--out", "OUT"], "steps=0"),
        (["sweep", "none.yaml", "--out", "OUT"], "no file none.yaml"),
        (["report", "OUT"], "holds no trial"),
    ],
)
def test_mistakes_are_told_before_anything_trains(command, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([str(out) if part == "OUT" else part for part in command]) == cli.MISTAKE
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
    assert not (out / "trials").exists() or not list((out / "trials").iterdir())


def test_an_unwritable_folder_is_found_before_training(model, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    command = [
        "compare",
        "--methods",
        "lora",
        "--rates",
        "1e-3",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "file" / "x"),
    ]
    assert cli.main(command) == cli.MISTAKE
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_installed_command_has_help():
    done = subprocess.run(
        [sys.executable, "-m", "offprincipal_peft.cli", "compare", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--methods" in done.stdout and "--ray" in done.stdout


def test_a_package_that_only_the_evaluation_needs_is_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "scipy" else real(name))
    assert cli.main(["compare", "--methods", "lora", "--out", str(tmp_path / "run")]) == cli.MISTAKE
    assert "scipy, which is not installed: pip install 'offprincipal-peft[compare]'" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("trials/*.json"))


def test_options_are_not_guessed_from_their_beginnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--method", "lora", "--out", str(tmp_path)])
    assert "unrecognized arguments: --method" in capsys.readouterr().err
