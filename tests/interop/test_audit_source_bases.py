"""Bases under other names and in other files, and what cannot be merged: refused with what would be right."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from interop.exporting import CONFIG, TENSORS, load_base, save_base, saved, settings, tensors
from interop.merging import adapter, check, lora, noisy, twin
from lifecycle import config
from offprincipal_peft.audit import AdapterFolder, CheckpointError, open_checkpoint
from offprincipal_peft.interop.audit_source import MergedCheckpoint, open_adapter
from sparse_models import sparse_config

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "llama", torch.bfloat16)


# -- bases ------------------------------------------------------------------------------------------------------------


def variant(base: Path, folder: Path, rename, **changes) -> Path:
    folder.mkdir()
    weights = {rename(name): value for name, value in load_file(base / "model.safetensors").items()}
    save_file({name: value for name, value in weights.items() if name}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    return folder


NAMES = {
    "no prefix": (lambda name: name.removeprefix("model."), {}),
    "backbone": (
        lambda name: "" if "lm_head" in name else name.removeprefix("model."),
        {"architectures": ["LlamaModel"]},
    ),
    "compiled and sharded": (lambda name: f"_orig_mod.module.{name}", {}),
    "a PEFT model's base": (lambda name: f"base_model.model.{name}", {}),
    "no class named": (lambda name: name, {"architectures": None}),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_of_the_base_s_files(llama, tmp_path, kind):
    rename, changes = NAMES[kind]
    folder, base = adapter(llama, tmp_path / "a", lora()), variant(llama, tmp_path / "b", rename, **changes)
    opened, expected = open_adapter(folder, base), twin(llama, folder)
    back = {rename(name): name for name in expected}
    assert list(opened.tensors) == list(open_checkpoint(base).tensors)
    check(base, opened, expected, 2, back.__getitem__)


def test_shards_single_files_and_a_config_elsewhere(llama, tmp_path):
    folder, shards = adapter(llama, tmp_path / "a", lora()), tmp_path / "shards"
    load_base(llama).save_pretrained(shards, max_shard_size="30KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    expected = twin(llama, folder)
    check(shards, open_adapter(folder, shards), expected, 2)
    check(llama, open_adapter(folder, llama / "model.safetensors"), expected, 2)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(llama / "model.safetensors", bare)
    with pytest.raises(CheckpointError, match=r"bare holds no config\.json.*export ADAPTER OUT --as merged"):
        open_adapter(folder, bare)
    check(bare, open_adapter(folder, bare, base_config=llama), expected, 2)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_fused_projections_and_experts_that_are_stored_together(tmp_path):
    oss = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for name, model, options, changed in (
        ("phi3", Phi3ForCausalLM(Phi3Config(**SMALL)), {"target_modules": ["qkv_proj", "gate_up_proj"]}, 2),
        ("oss", GptOssForCausalLM(GptOssConfig(**SMALL, **oss)), {"target_parameters": experts}, 3),
    ):
        model.save_pretrained(tmp_path / name)
        folder = adapter(tmp_path / name, tmp_path / f"{name} a", lora(**options))
        merged = twin(tmp_path / name, folder)
        check(tmp_path / name, open_adapter(folder, tmp_path / name), merged, changed)


def test_weights_that_transformers_puts_together(tmp_path):
    base = tmp_path / "base"
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)).save_pretrained(base)
    assert any("experts.1.w3" in name for name in open_checkpoint(base).tensors)
    attention = adapter(base, tmp_path / "a", lora())
    check(base, open_adapter(attention, base), twin(base, attention), 1)
    experts = adapter(base, tmp_path / "x", lora(target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(CheckpointError, match=r"makes it of several tensors.*experts.*--as merged"):
        open_adapter(experts, base)


# -- folders of several, and faults -----------------------------------------------------------------------------------


def test_one_of_several_adapters(llama, tmp_path):
    host = noisy(load_base(llama), lora())
    host.add_adapter("second", lora(target_modules=["up_proj", "down_proj"]))
    folder = saved(host, tmp_path / "a")
    assert len(open_adapter(folder, llama).adapted) == 2
    assert all(".mlp." in name for name in open_adapter(folder, llama, adapter_name="second").adapted)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"It holds saved adapters in second: name one"):
        open_adapter(folder, llama)


def test_a_stored_pissa_start_is_made_again_or_refused(llama, tmp_path):
    folder = adapter(llama, tmp_path / "a", lora(init_lora_weights="pissa"))
    check(llama, open_adapter(folder, llama), twin(llama, folder), 2)
    for start in ("pissa_niter_4", "corda", "loftq", "lora_ga"):
        (folder / CONFIG).write_text(json.dumps(settings(folder) | {"init_lora_weights": start}))
        with pytest.raises(
            CheckpointError, match=rf"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"
        ):
            open_adapter(folder, llama)


OTHER_BASES = {
    "fewer layers": (
        {"layers": 1},
        lora(),
        r"2 of the adapter's 4 tensors have no place.*layers\.1\.self_attn\.q_proj",
    ),
    "more layers": (
        {"layers": 3},
        lora(),
        r"incomplete, it has no tensor for model\.layers\.2\.self_attn\.q_proj\.lora_A",
    ),
    "wider": ({"hidden": 64}, lora(), r"lora_A\.weight has shape \(4, 32\), the model needs \(4, 64\)"),
    "wider, ours": ({"hidden": 64}, config("pissa"), r"has shape \(.*\), the model needs"),
    "fewer layers, sparse": ({"layers": 1}, sparse_config(), r"target_modules entry .* matches no module"),
    "more layers, sparse": (
        {"layers": 3},
        sparse_config(target_modules=["q_proj"]),
        r"no values for 1 of the 3 layers",
    ),
    "wider, sparse": ({"hidden": 64}, sparse_config(), r"made for a base weight with other bytes"),
}


@pytest.mark.parametrize("other", OTHER_BASES)
def test_another_base_is_refused(llama, tmp_path, other):
    sizes, method, message = OTHER_BASES[other]
    folder = saved(get_peft_model(load_base(llama), method), tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        open_adapter(folder, save_base(tmp_path / "other", "llama", torch.bfloat16, **sizes))


def test_another_architecture_or_names_are_refused(llama, tmp_path):
    folder = adapter(llama, tmp_path / "a", lora())
    with pytest.raises(CheckpointError, match=r"a does not fit .*gpt2: Target modules .*q_proj.* not found"):
        open_adapter(folder, save_base(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(
        CheckpointError, match=r"no tensor of .* has a name and shape of LlamaForCausalLM's: it holds tf\."
    ):
        open_adapter(folder, variant(llama, tmp_path / "tf", lambda name: f"tf.{name}"))
    with pytest.raises(CheckpointError, match=r"does not recognize this architecture.*--as merged"):
        open_adapter(folder, variant(llama, tmp_path / "b", str, model_type="mystery"))
    base = variant(llama, tmp_path / "q", str, quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"stored quantised \(awq\); give the float model"):
        open_adapter(folder, base)
    lacking = variant(llama, tmp_path / "l", lambda name: "" if name == Q else name)
    with pytest.raises(
        CheckpointError, match=r"changes model.layers.0.self_attn.q_proj.weight, but the base's files hold no"
    ):
        open_adapter(folder, lacking)


def test_methods_that_do_not_merge_layer_by_layer(llama, tmp_path):
    for name, method, message in (
        ("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "changes no weight"),
        ("osf", peft.OSFConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), r"OSF, which is not known to merge"),
        ("bias", lora(lora_bias=True), "base layer has no bias.*--as merged"),
        ("sampled", lora(monteclora_config=MontecloraConfig()), r"samplers .*monteclora_config.*--as merged"),
    ):
        model = load_base(llama)
        folder = saved(get_peft_model(model.float() if name == "osf" else model, method), tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(folder, llama)


def test_a_method_that_reads_other_weights_of_the_base_is_noticed(llama, tmp_path, monkeypatch):
    """The empty model's weights are NaN: what is computed from them cannot pass for a result."""
    folder = adapter(llama, tmp_path / "a", lora())
    opened = open_adapter(folder, llama)
    layer = peft.tuners.lora.Linear
    real = layer.get_delta_weight
    hollow = opened._skeleton.units["model.layers.1.self_attn.q_proj"].module.get_base_layer().weight
    monkeypatch.setattr(layer, "get_delta_weight", lambda self, name: real(self, name) + hollow.mean())
    with pytest.raises(CheckpointError, match=r"computes model\.layers\.0\.self_attn\.q_proj from more of the base"):
        opened.read(Q)


def test_values_that_are_not_finite_are_the_adapter_s_own(llama, tmp_path):
    """A run that diverged is what an audit is asked about: it is read, not refused."""
    folder = adapter(llama, tmp_path / "a", lora())
    values = tensors(folder)
    values["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(values, folder / TENSORS)
    assert bool(open_adapter(folder, llama).read(Q).isnan().any())


def test_damaged_and_missing_folders(llama, tmp_path):
    folder = adapter(llama, tmp_path / "a", lora())
    for given, message in ((tmp_path / "none", "no folder"), (llama, "It holds a model: give the adapter's folder")):
        with pytest.raises(CheckpointError, match=message):
            open_adapter(given, llama)
    with pytest.raises(AdapterFolder, match="holds a PEFT adapter"):
        open_adapter(folder, folder)
    values, path = tensors(folder), folder / TENSORS
    lost = values.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(values, path)
    with pytest.raises(
        CheckpointError, match=r"incomplete, it has no tensor for .*layers\.1\.self_attn\.q_proj\.lora_B"
    ):
        open_adapter(folder, llama)
    save_file(values | {"base_model.model.model.layers.1.self_attn.q_proj.lora_C.weight": lost}, path)
    with pytest.raises(
        CheckpointError, match=r"the first is base_model\..*lora_C\.weight: it was made for another model"
    ):
        open_adapter(folder, llama)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_adapter(folder, llama)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which is not read"):
        open_adapter(folder, llama)
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_adapter(folder, llama)


def test_nothing_is_left_changed(llama, tmp_path):
    """The generator, the base's and the adapter's files are as they were."""
    folder = adapter(llama, tmp_path / "a", peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    files = {path: path.read_bytes() for each in (llama, folder) for path in each.iterdir()}
    state = torch.get_rng_state()
    opened = open_adapter(folder, llama)
    assert isinstance(opened, MergedCheckpoint) and opened.read(Q).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: path.read_bytes() for each in (llama, folder) for path in each.iterdir()} == files
