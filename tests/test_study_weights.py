"""What the study says of saved weights: predicted overlaps against draws, carried updates, audits of trials."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_trials import save_tiny_task, tiny_trial

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import _study_weight_tables  # noqa: E402
import study  # noqa: E402
import study_inputs  # noqa: E402
import study_weights  # noqa: E402

from offprincipal_peft.geometry import find_layouts, jaccard  # noqa: E402
from offprincipal_peft.rlvr.config import TrialConfig  # noqa: E402
from offprincipal_peft.rlvr.trial import run_trial  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a third layer's worth of blocks to turn: its weights hold numbers that bf16 can hold."""
    folder = save_tiny_task(tmp_path_factory.mktemp("model"))
    found = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(parameter.bfloat16())
    found.save_pretrained(folder)
    (folder / "other_text.txt").write_text("the 1+2=3 cat sees the dog.\n" * 8)
    return folder


def drawn(probability: Tensor, seed: int) -> Tensor:
    return torch.rand(probability.shape, generator=torch.Generator().manual_seed(seed)) < probability


# ---- what an explanation predicts


def test_magnitude_predicts_the_overlap_of_draws_that_follow_it_and_chance_does_not() -> None:
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    small = torch.sigmoid(4 * (0.5 - weight.abs())) * 0.8
    bins = {"w": study_weights.magnitude_bins(weight)}
    a, b = (study_weights.Model({"w": drawn(small, seed)}, bins) for seed in (1, 2))
    found = study_weights.agreement(a, b, ["w"])
    assert found["observed"] == pytest.approx(jaccard(a.changed["w"], b.changed["w"]))
    assert found["magnitude"] == pytest.approx(found["observed"], abs=0.01)  # observed: 0.001
    assert found["stripes"] == pytest.approx(found["observed"], abs=0.01)  # observed: 0.002
    assert found["independent"] < found["observed"] - 0.1  # observed: 0.23 and 0.44


def test_rows_and_columns_are_explained_by_stripes_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 96, generator=generator)
    rows, columns = (torch.rand(n, generator=generator) for n in weight.shape)
    both = rows[:, None] * columns
    bins = {"w": study_weights.magnitude_bins(weight)}
    a, b = (study_weights.Model({"w": drawn(both, seed)}, bins) for seed in (1, 2))
    found = study_weights.agreement(a, b, ["w"])
    assert found["stripes"] == pytest.approx(found["observed"], abs=0.02)
    assert found["magnitude"] < found["observed"] - 0.05
    uneven = study_weights._unevenness([a, b], ["w"])["w"]
    assert min(uneven.values()) > 3  # observed: 6.0 and 6.9; without stripes 1
    flat = study_weights.Model({"w": drawn(torch.full_like(both, 0.3), 3)}, bins)
    assert study_weights._unevenness([flat], ["w"])["w"] == pytest.approx({"rows": 1, "columns": 1}, abs=0.3)


def test_fitted_probabilities_keep_every_margin() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    bins = study_weights.magnitude_bins(weight)
    changed = drawn(torch.sigmoid(-weight.abs() * 2 + weight[:, :1]), 1)
    fitted = study_weights.by_stripes(changed, bins)
    assert float(fitted.max()) <= 1 and float(fitted.min()) >= 0
    for dim in (0, 1):
        assert (fitted.sum(dim) - changed.sum(dim)).abs().max() < 0.2  # observed: 0.03
    for each in bins.unique():
        kept = float(fitted[bins == each].sum())
        assert kept == pytest.approx(float(changed[bins == each].sum()), abs=0.01)  # observed: 0.001


def test_bins_hold_equal_shares_of_the_entries() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    bins = study_weights.magnitude_bins(weight)
    counts = torch.bincount(bins.flatten())
    assert counts.numel() == 64 and int(counts.min()) > 800  # observed: 865 to 1189 of 1024
    assert weight.abs()[bins == 0].max() <= weight.abs()[bins == 1].min()


# ---- another basis


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_weights, "ROTATED", 0)
    monkeypatch.setattr(study_weights, "PERMUTED", 1)


def test_the_turned_model_computes_the_same(model: Path, tmp_path: Path, layers: None) -> None:
    found = study_weights.turn(model, tmp_path / "turned")
    assert found["largest_change_of_log_probability"] < 1e-5  # fp32
    assert found["largest_change_of_log_probability"] < found["after_rounding"] < 0.05
    before, after = study_weights.matrices(model), study_weights.matrices(tmp_path / "turned")
    moved = {name.split(".", 2)[2] for name in before if not torch.equal(before[name], after[name])}
    rotated = {f"0.self_attn.{kind}_proj.weight" for kind in "vo"}
    assert moved == rotated | {f"1.self_attn.{kind}_proj.weight" for kind in "qkvo"}


def test_an_update_that_was_trained_in_the_other_basis_is_whole_again_when_carried_back(
    model: Path, tmp_path: Path, layers: None
) -> None:
    """One update, written into both models: what is compared as it is differs, what is carried back does not."""
    study_weights.turn(model, tmp_path / "turned")
    each = study_weights.changes_of_basis(find_layouts(AutoModelForCausalLM.from_pretrained(model)))
    configs, saved = [], {}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        before = study_weights.matrices(model)
        updates = {name: 2e-5 * torch.randn(weight.shape, generator=generator) for name, weight in before.items()}
        for name in (str(model), str(tmp_path / "turned")):
            config = TrialConfig("full", 1e-4, model=name, seed=seed)
            configs.append(config)
            saved[config.trial_id] = tmp_path / config.trial_id
            tuned = AutoModelForCausalLM.from_pretrained(name)
            with torch.no_grad():
                for key, parameter in tuned.named_parameters():
                    if key in updates:
                        there = [one for one in each if key in one.moved_names() and name != str(model)]
                        parameter += there[0].carry_update(updates[key], key) if there else updates[key]
            tuned.save_pretrained(saved[config.trial_id])
    found = study_weights.interventions(configs, lambda config: saved[config.trial_id])
    assert {row["seed"] for row in found["rows"]} == {0, 1} and len(found["rows"]) == 8
    for row in found["rows"]:
        assert row["cosine"]["carried"] > 0.999999
        assert row["carried"]["observed"] > 0.99  # a rotation there and back rounds
        if row["place"] in ("rotated", "permuted"):
            assert row["as_is"]["observed"] < 0.9 and abs(row["cosine"]["as_is"]) < 0.6
        else:
            assert row["as_is"]["observed"] == 1.0 and row["cosine"]["as_is"] > 0.999999


# ---- specs that keep weights


def write_spec(path: Path, model: Path, audits: str, **values: Any) -> Path:
    base = {**tiny_trial(model), "steps": 2}
    threads = base.pop("threads")
    grid = {"learning_rate": [1e-5]}
    path.write_text(yaml.safe_dump({"audits": audits, "base": base, "methods": ["full"], "grid": grid} | values))
    assert threads == 1
    return path


def test_a_spec_with_audits_keeps_weights_and_collects_what_they_say(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    spec = write_spec(tmp_path / "some.yaml", model, "pairs", methods=["full", "lora"], seeds=[0, 1])
    study.run(spec, folder, 1)
    study.collect(spec, folder, tmp_path / "some.json")
    found = json.loads((tmp_path / "some.json").read_text())
    configs = study.trials_of(spec)
    assert [row["id"] for row in found["pairs"]] == [c.trial_id for c in configs if c.method == "full"]
    for row, trial in zip(found["pairs"], found["trials"], strict=False):
        assert set(_study_weight_tables.PAIRS) <= row.keys() and 0 < row["sparsity"] < 1
        assert row["relative_norm"] == pytest.approx(
            trial["geometry"]["relative_norm"], rel=0.01
        )  # which counts the head
    kept = folder / "some" / "weights" / configs[-1].trial_id
    assert (kept / "adapter_model.safetensors").is_file() and not list(kept.glob("*.bin"))
    spec = write_spec(tmp_path / "other.yaml", model, "consensus", seeds=[0, 1, 2])
    study.run(spec, folder, 1)
    study.collect(spec, folder, tmp_path / "other.json")
    found = json.loads((tmp_path / "other.json").read_text())["consensus"]
    assert [(row["first"], row["second"]) for row in found["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert all(0 < row["magnitude"] < 1 for row in found["pairs"]) and len(found["by_kind"]) == 21


def test_an_audit_that_there_is_not_is_refused(model: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "some.yaml", model, "pears")
    with pytest.raises(ValueError, match=r"some\.yaml: audits: 'pears'; there are pairs, consensus, interventions"):
        study.trials_of(spec)


def test_a_trial_without_a_folder_saves_nothing_and_a_full_folder_says_so(model: Path, tmp_path: Path) -> None:
    config = TrialConfig.from_dict({**tiny_trial(model), "method": "lora", "learning_rate": 1e-3, "steps": 1})
    (tmp_path / "file").write_text("")
    record = run_trial(config, weights=tmp_path / "file")
    assert record["status"] == "failed" and record["error"]["stage"] == "save"
    assert record["result"]["test_accuracy"] is not None  # what was measured before is kept


# ---- what reaches the directions of a start


def test_energies_along_rows_are_those_of_the_inputs_themselves(model: Path) -> None:
    """Against every token's input, one after the other; a second batch of pieces counts by its tokens."""
    found = AutoModelForCausalLM.from_pretrained(model).eval()
    pieces = [[3, 5, 7, 9], [4, 6]]
    moments = study_inputs.second_moments(found, pieces)
    name = next(name for name in moments if name.endswith("down_proj"))
    seen: list[Tensor] = []
    handle = found.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach()))
    for piece in pieces:
        found(torch.tensor([piece]))
    handle.remove()
    tokens = torch.cat(seen).double()
    assert tokens.shape[0] == 6
    weight = found.get_submodule(name).weight.detach()
    draws = study_inputs.directions(weight)
    assert {start: len(rows) for start, rows in draws.items()} == {
        "top": 1,
        "bottom": 1,
        "random": study_inputs.SEEDS,
        "random, off the top n/32": study_inputs.SEEDS,
    }
    top, bottom = draws["top"][0], draws["bottom"][0]
    singular = torch.linalg.svdvals(weight.double())
    assert (weight.double() @ top.T).norm(dim=0) == pytest.approx(singular[: len(top)], rel=1e-9)
    assert (weight.double() @ bottom.T).norm() < (weight.double() @ draws["random"][0].T).norm()
    assert max(float((rows @ top[0]).abs().max()) for rows in draws["random, off the top n/32"]) < 1e-12
    for rows in (rows for each in draws.values() for rows in each):
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)
        slow = sum(float((rows @ x).square().mean()) for x in tokens) / 6
        fast = float((rows @ moments[name] * rows).sum()) / len(rows)
        assert fast == pytest.approx(slow, rel=1e-12)
    means = study_inputs.energies(found, {"one": moments, "other": {key: 4 * each for key, each in moments.items()}})
    for by_inputs in means.values():  # a scale of the inputs is no difference between directions
        assert by_inputs["one"] == pytest.approx(by_inputs["other"], rel=1e-12)
    white = {key: torch.eye(len(each), dtype=torch.float64) for key, each in moments.items()}
    assert [by["white"] for by in study_inputs.energies(found, {"white": white}).values()] == pytest.approx([1.0] * 4)


def test_the_table_of_inputs_has_a_ratio() -> None:
    values = {"energies": {"top": {"task": 4.0, "other text": 3.0}, "bottom": {"task": 0.25, "other text": 0.5}}}
    lines = _study_weight_tables.inputs(values)
    assert lines[2:] == ["| top | 4.00 | 3.00 | 0.75 |", "| bottom | 0.25 | 0.50 | 2.00 |"]
