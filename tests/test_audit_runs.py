"""benchmarks/audit_runs.py: the weights that it saves are those that were trained."""

import contextlib
import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from offprincipal_peft.audit import read_json_report
from offprincipal_peft.rlvr import trial
from tiny_trials import save_tiny_task, tiny_trial

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
AUDITS = {
    "full": {"tuned": ["full-grpo", "full-sft"]},
    "hidden": {"base": "base-fp32", "tuned": ["full-sft-fp32", "safe-grpo"]},
    "lacking": {"tuned": ["full-grpo", "full-dpo"]},
}


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def script(patch):
    """The script with its trials in this process: a new one imports for seconds."""
    patch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("audit_runs", BENCHMARKS / "audit_runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    system = subprocess.run

    def run(command, **options):
        if command[:3] != [sys.executable, "-m", "offprincipal_peft.rlvr.trial"]:
            return system(command, **options)  # git, of the record's environment
        with contextlib.chdir(options["cwd"]), contextlib.redirect_stdout(options["stdout"]):
            return subprocess.CompletedProcess(command, trial.main(command[3:]))

    patch.setattr(module.subprocess, "run", run)
    return module


@pytest.fixture(scope="module")
def study(script, tmp_path_factory, patch):
    patch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path_factory.mktemp("cache")))
    base = tiny_trial(save_tiny_task(tmp_path_factory.mktemp("tiny"))) | {"steps": 2}
    runs = {
        "full-grpo": {"method": "full", "algorithm": "grpo", "learning_rate": 1e-3},
        "full-sft": {"method": "full", "algorithm": "sft", "learning_rate": 1e-3},
        "safe-grpo": {"method": "safe", "algorithm": "grpo", "learning_rate": 1e-3},
    }
    return {"base": base, "runs": runs, "audits": AUDITS}


@pytest.fixture(scope="module")
def folder(script, study, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    script.train_all(study, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def recorded(folder: Path, name: str) -> float:
    return json.loads((folder / "runs.json").read_text())["runs"][name]["update_norm"]


def linear(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name.endswith("_proj.weight")]


def test_the_base_is_the_model_rounded_once(folder: Path, study) -> None:
    own, base = load_file(Path(study["base"]["model"]) / "model.safetensors"), weights(folder / "base")
    assert own.keys() == base.keys()
    assert all(torch.equal(own[name].bfloat16(), base[name]) for name in own)
    wide = weights(folder / "base-fp32")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert own.keys() == wide.keys() and all(torch.equal(wide[name], base[name].float()) for name in own)


@pytest.mark.parametrize("name", ["full-grpo", "full-sft"])
def test_full_weights_are_the_trained_ones_in_bf16_and_before_rounding(name: str, folder: Path) -> None:
    base, tuned, master = (weights(folder / each) for each in ("base", name, name + "-fp32"))
    assert base.keys() == tuned.keys() == master.keys()
    assert {t.dtype for t in base.values()} == {t.dtype for t in tuned.values()} == {torch.bfloat16}
    assert {t.dtype for t in master.values()} == {torch.float32}
    assert all(torch.equal(master[key].bfloat16(), tuned[key]) for key in master)
    # The harness measured the update in memory after the last step: what was saved is that, from exactly this base.
    matrices = [*linear(base), "lm_head.weight"]
    squares = sum(float((master[key].double() - base[key].double()).square().sum()) for key in matrices)
    assert squares**0.5 == pytest.approx(recorded(folder, name), rel=1e-8)  # seen: 4e-11
    assert not list(folder.rglob("*.bin"))


def test_an_adapter_loads_onto_the_base(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, folder / "safe-grpo").merge_and_unload().state_dict()
    squares = sum(float((after[key].double() - before[key].double()).square().sum()) for key in linear(before))
    assert squares**0.5 == pytest.approx(recorded(folder, "safe-grpo"), rel=1e-8)  # seen: 2e-11


def test_what_is_there_is_kept_and_other_settings_are_refused(script, study, folder: Path, monkeypatch) -> None:
    def never(*args, **options):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(script, "train", never)
        script.train_all(study, folder)
        other = copy.deepcopy(study)
        other["runs"]["full-sft"]["learning_rate"] = 2e-3
        with pytest.raises(ValueError, match=r"full-sft\.json: made with other settings"):
            script.train_all(other, folder)
    with pytest.raises(ValueError, match="no run nothing; there are full-grpo"):
        script.train_all(study, folder, ["nothing"])


def test_a_failed_run_says_why_and_leaves_no_record(script, study, folder: Path) -> None:
    broken = copy.deepcopy(study)
    broken["runs"]["broken"] = {"method": "lora", "learning_rate": 1e-3, "method_options": {"rnk": 3}}
    with pytest.raises(RuntimeError, match=r"broken: model: .*rnk"):
        script.train_all(broken, folder, ["broken"])
    assert not (folder / "trials" / "broken.json").exists() and not (folder / "broken").exists()


def test_audits_are_of_the_saved_weights_and_cite_how_they_were_made(script, study, folder, tmp_path, capsys) -> None:
    script.audit_all(study, folder, tmp_path / "out")
    assert "lacking: not audited" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full.json", "hidden.json", "runs.json"]
    reports = {name: read_json_report(tmp_path / "out" / f"{name}.json") for name in ("full", "hidden")}
    assert [source.path for source in reports["full"].sources] == ["base", "full-grpo", "full-sft"]
    assert str(folder) not in (tmp_path / "out" / "hidden.json").read_text()
    base = weights(folder / "base")
    for place, name in enumerate(("full-grpo", "full-sft")):
        changed = {weight.name: weight.changes[place].changed for weight in reports["full"].weights}
        tuned = weights(folder / name)
        assert changed == {key: int((tuned[key] != base[key]).sum()) for key in base}
    stored = sum(weight.changes[0].stored_changed for weight in reports["hidden"].weights)
    visible = sum(weight.changes[0].changed for weight in reports["hidden"].weights)
    assert 0 < visible < stored  # seen: 18,411 of 18,560
    norm = sum(weight.changes[1].norm ** 2 for weight in reports["hidden"].weights) ** 0.5
    assert norm == pytest.approx(recorded(folder, "safe-grpo"), rel=1e-9)  # seen: 2e-16
    cited = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert cited["runs"].keys() == study["runs"].keys() and cited["environment"]["torch"] == torch.__version__
