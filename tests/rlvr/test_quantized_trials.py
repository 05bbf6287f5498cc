"""Trials on bases that bitsandbytes quantised: which methods train there, what is measured, what is refused and how."""

import importlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import base_bytes
from offprincipal_peft import cli
from offprincipal_peft.rlvr import measure, models
from offprincipal_peft.rlvr.checks import check_trials
from offprincipal_peft.rlvr.config import QUANTIZATIONS, TrialConfig
from offprincipal_peft.rlvr.methods import METHODS, MethodError, build_config
from offprincipal_peft.rlvr.models import ModelError, load_model, load_tokenizer
from offprincipal_peft.rlvr.records import numeric_fields
from offprincipal_peft.rlvr.report_data import build_studies
from offprincipal_peft.rlvr.tasks import load_task
from offprincipal_peft.rlvr.trainers import build_trainer
from offprincipal_peft.rlvr.trial import run_trial
from quantized import by_bitsandbytes, quantized_layers
from rlvr.records_sample import record
from tiny_trials import save_tiny_task, tiny_trial

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
CPU = torch.device("cpu")
KINDS = QUANTIZATIONS[1:]
REFUSED = {"full": "cannot train", "peft-pissa": "'pissa' has", "peft-supertuning": "codes", "osf": "codes"}
UNSEEN = ("dora", "peft-shira")  # what they add is measured by a merge, which needs floats
OURS = [name for name in METHODS if name not in (*REFUSED, *UNSEEN)]
# every method once, some on every kind of base
TRAINED = [("nf4", name) for name in OURS]
TRAINED += [(kind, name) for kind in ("nf4-double", "int8") for name in ("pissa", "offprincipal", "safe")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = save_tiny_task(tmp_path_factory.mktemp("tiny"))
        # wider: where rows are no whole blocks of 64, bitsandbytes' CPU kernel dequantises with the wrong scales
        config = LlamaConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128, head_dim=16)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        yield folder


def tiny(folder: Path, **fields: Any) -> TrialConfig:
    small = {"method": "lora", "learning_rate": 1e-2, "alpha": 8, "steps": 1, "evaluation_batch": 6}
    sizes = {"validation_items": 2, "test_items": 2, "train_items": 4}
    options = {"method_options": {"principal_rank": 2}} if fields.get("method") == "offprincipal" else {}
    return TrialConfig.from_dict({**tiny_trial(folder), **small, **sizes, **options, **fields})


def finished(config: TrialConfig) -> dict[str, Any]:
    found = run_trial(config)
    assert found["error"] is None, found["error"]["traceback"]
    return found


# ---- loading


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised(kind, folder):
    model = load_model(str(folder), "float32", CPU, kind)
    layers = quantized_layers(model)
    assert len(layers) == 14 and type(model.lm_head) is nn.Linear
    plain = load_model(str(folder), "float32", CPU)
    for name, layer in layers.items():
        assert (type(layer) is bnb.nn.Linear8bitLt) == (kind == "int8")
        if kind != "int8":
            assert layer.weight.quant_state.nested == (kind == "nf4-double")
            assert layer.weight.quant_state.quant_type == "nf4" and layer.compute_dtype == torch.float32
        weight = plain.get_submodule(name).weight
        error = (by_bitsandbytes(layer).float() - weight).norm() / weight.norm()
        # seen: 0.089 to 0.095 (nf4), 0.006 (int8)
        assert 1e-3 < error < (0.02 if kind == "int8" else 0.12), (name, error)


def test_layers_compute_in_the_models_dtype(folder):
    model = load_model(str(folder), "bfloat16", CPU, "nf4")
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_leaves_the_weights_as_they_are(kind, folder):
    """On some CPUs bitsandbytes reorders 4-bit weights in evaluation mode; then training has other gradients."""
    model = load_model(str(folder), "float32", CPU, kind).train()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        want = model(ids).logits
        before = base_bytes(model)
        got = model.eval()(ids).logits
        assert kind == "int8" or torch.equal(got, want)  # int8 layers do not round activations in evaluation mode
    assert base_bytes(model) == before


def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))


def test_without_bitsandbytes_the_way_to_install_it_is_said(folder, monkeypatch):
    without_bitsandbytes(monkeypatch)
    words = r"quantization='nf4' needs bitsandbytes, .* not installed: pip install 'offprincipal-peft\[quant\]'"
    with pytest.raises(ModelError, match=words):
        load_model(str(folder), "float32", CPU, "nf4")
    with pytest.raises(ModelError, match=words):  # before anything trains
        check_trials()(tiny(folder, quantization="nf4"))
    check_trials()(tiny(folder))
    load_model(str(folder), "float32", CPU)


def test_on_a_gpu_each_process_loads_onto_its_own(monkeypatch):
    """Quantised models are not moved after loading: a second process would find its model on the first one's device."""
    asked: list[Any] = []

    def loading(cls: Any, name: str, **options: Any) -> nn.Module:
        asked.append(options["device_map"])
        return nn.Linear(1, 1)

    monkeypatch.setattr(models, "_from_pretrained", loading)
    load_model("x", "bfloat16", torch.device("cuda"), "nf4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    load_model("x", "bfloat16", torch.device("cuda"), "nf4")
    load_model("x", "bfloat16", torch.device("cuda:1"), "nf4")
    assert asked == [{"": 0}, {"": 3}, {"": 1}]


# ---- what trains


@pytest.mark.parametrize(("kind", "method"), TRAINED, ids=str)
def test_a_method_trains_and_is_measured(kind, method, folder):
    found = finished(tiny(folder, method=method, quantization=kind))
    tests = [e for e in found["evaluations"] if e["split"] == "test"]
    assert tests[0]["kl"] == 0.0  # exactly the quantised model
    assert found["result"]["kl"] > 1e-6  # seen: 0.009 (geora) to 0.034
    assert found["result"]["update_norm"] > 0.1  # seen: 0.58 (milora) to 3.7
    assert found["config"]["quantization"] == kind
    # fp32 values and two fp32 moments, as on other bases: TRL alone would make all three bf16
    assert found["result"]["state_bytes"] >= 12 * found["result"]["trainable_parameters"]


@pytest.mark.parametrize(("kind", "method"), [("nf4", "dora"), ("nf4-double", "peft-shira"), ("int8", "peft-shira")])
def test_methods_whose_update_is_not_seen_train_without_the_geometry(kind, method, folder):
    with pytest.raises(
        MethodError, match=f"^{method}: the geometry .* quantization='{kind}'; geometry=false trains it"
    ):
        build_config(tiny(folder, method=method, quantization=kind))
    found = finished(tiny(folder, method=method, quantization=kind, geometry=False))
    assert found["geometry"] is None and found["result"]["kl"] > 1e-4  # seen: 0.012 (dora), 0.016 (shira)
    build_config(tiny(folder, method=method))


def test_the_first_kl_of_training_is_zero_too(folder):
    found = finished(tiny(folder, method="pissa", quantization="nf4", beta=0.1, steps=2, geometry=False))
    assert found["curve"][0]["kl"] == 0.0 and found["curve"][1]["kl"] > 0


@pytest.mark.parametrize("algorithm", ["rloo", "sft"])
def test_the_other_trainers(algorithm, folder):
    fields = {"algorithm": algorithm, "quantization": "nf4-double", "geometry": False}
    found = finished(tiny(folder, method="offprincipal", **fields))
    assert found["result"]["kl"] > 1e-5


def test_a_quantised_trial_twice_has_the_same_numbers(folder):
    config = tiny(folder, method="safe", quantization="nf4")
    first, again = (numeric_fields(finished(config)) for _ in range(2))
    assert json.dumps(first, sort_keys=True) == json.dumps(again, sort_keys=True)


def test_a_config_files_method_is_compared_with_a_quantised_copy(folder, tmp_path, monkeypatch):
    """Its reference is a second model, which has to be quantised the same way: a float one is not at KL 0."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"peft_type": "LORA"}))
    loaded: list[str] = []
    for module in (measure, models):
        monkeypatch.setattr(module, "load_model", lambda *a: (loaded.append(a[3]), load_model(*a))[1])
    found = finished(tiny(folder, method=str(path), quantization="nf4"))
    assert loaded == ["nf4", "nf4"]
    assert abs(found["evaluations"][0]["kl"]) < 1e-6


@pytest.mark.parametrize("method", ["lora", "pissa", "offprincipal", "mica", "safe"])
def test_adapters_train_in_fp32_from_their_exact_starts(method, folder, tmp_path):
    config = tiny(folder, method=method, quantization="nf4")
    task = load_task(config.task, {"train": 4, "validation": 2, "test": 2}, config.task_options)
    model = load_model(config.model, config.dtype, CPU, config.quantization)
    tokenizer = load_tokenizer(config.model)
    host = build_trainer(config, model, tokenizer, task, build_config(config), str(tmp_path), []).model
    trained = {name: p for name, p in host.named_parameters() if p.requires_grad}
    assert trained and {p.dtype for p in trained.values()} == {torch.float32}
    parts = dict(host.named_parameters())
    starts = {name: p for name, p in parts.items() if ".lora_start_" in name}
    assert bool(starts) == (method in ("pissa", "offprincipal"))
    for name, start in starts.items():
        assert torch.equal(parts[name.replace("lora_start_", "lora_")], start), name


# ---- what is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_floats_are_refused_before_anything_is_loaded(kind, method, folder):
    config = tiny(folder, method=method, quantization=kind)
    words = f"^{method}: not on a base with quantization='{kind}': .*{REFUSED[method]}"
    with pytest.raises(MethodError, match=words):
        check_trials()(config)
    found = run_trial(config)
    assert found["status"] == "failed" and found["error"]["type"] == "MethodError"
    check_trials()(tiny(folder, method=method))


def test_dora_on_int8(folder):
    with pytest.raises(MethodError, match=r"dora: not on a base with quantization='int8': .* nf4 works"):
        build_config(tiny(folder, method="dora", quantization="int8", geometry=False))


@pytest.mark.parametrize("precision", ["split", "bf16", "bf16-stochastic"])
def test_values_cannot_live_in_quantised_weights(precision, folder):
    options = {"method": "safe", "method_options": {"precision": precision}, "dtype": "bfloat16"}
    with pytest.raises(MethodError, match=f"safe: precision='{precision}' .*quantization='nf4'.*precision='fp32'"):
        build_config(tiny(folder, **options, quantization="nf4"))
    build_config(tiny(folder, **options))


def test_the_refusals_name_what_really_fails(folder, monkeypatch):
    """Each of them, let through, ends in an error of another kind: the table refuses nothing that works."""
    for method in (*REFUSED, "dora"):
        kind = "int8" if method == "dora" else "nf4"
        config = tiny(folder, method=method, quantization=kind, geometry=False)
        with monkeypatch.context() as patch:
            patch.setattr("offprincipal_peft.rlvr.methods._check_quantized", lambda *a: None)
            found = run_trial(config)
        assert found["status"] == "failed" and found["error"]["type"] != "MethodError", method


def test_a_sweep_is_refused_as_a_whole(folder, tmp_path, capsys):
    """By the command, with `--set`, before any trial of it starts."""
    data = [f"{name}={json.dumps(value)}" for name, value in tiny_trial(folder).items() if name not in ("threads",)]
    arguments = ["compare", "--methods", "lora,full", "--out", str(tmp_path / "out"), "--set", "quantization=nf4"]
    for text in data:
        arguments += ["--set", text]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "full: not on a base with quantization='nf4': a quantised weight cannot train" in error
    assert not list(tmp_path.rglob("trials/*.json"))


# ---- reports


def test_a_quantised_model_is_another_model_in_a_report():
    """Its accuracy before training and its KL are those of the quantised model."""
    old = record("lora", seed=1)
    del old["config"]["quantization"]  # written before the field was there
    found = [
        record("lora"),
        old,
        record("offprincipal"),
        record("lora", quantization="nf4"),
        record("pissa", quantization="nf4"),
    ]
    studies = {study.model: study for study in build_studies(found)}
    assert set(studies) == {"smollm2-135m", "smollm2-135m (nf4)"}
    plain, quantised = studies["smollm2-135m"], studies["smollm2-135m (nf4)"]
    assert {m.name: len(m.trials) for m in plain.methods} == {"lora": 2, "offprincipal": 1}
    assert {m.name for m in quantised.methods} == {"lora", "pissa"}


def test_this_file_knows_every_method():
    assert set(METHODS) == {*OURS, *UNSEEN, *REFUSED}
