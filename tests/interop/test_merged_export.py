"""Merged folders: the adapter's logits and bits in an ordinary model, of every kind of adapter and base."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from interop.exporting import CONFIG, TENSORS, distance, load_base, save_base, saved, tensors, trained
from lifecycle import IDS, config, logits, train
from offprincipal_peft import MaskedAdamW
from offprincipal_peft.interop import ExportError, export_merged
from quantized import quantized
from sparse_models import sparse_config, sparse_layers, train_masked
from tiny_models import save_tiny_model

# Largest difference of logits to the adapter model's, relative to the largest logit. A merged bf16 weight is rounded.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # 4.3e-7 and 1.1e-2 observed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def weights(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def merged(folder):
    """As anyone loads it, with no key missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("preset", ["lora", "pissa", "mica", "offprincipal"])
@pytest.mark.parametrize("kind", ["llama", "llama-bf16", "gpt2", "tied"])
def test_a_merged_off_principal_adapter(tmp_path, kind, preset):
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    family = "gpt2" if kind == "gpt2" else "llama"
    base = save_base(tmp_path / "base", family, dtype, **({"tie": True} if kind == "tied" else {}))
    host = trained(base, preset)
    done = export_merged(saved(host, tmp_path / "a"), tmp_path / "x")
    model = merged(tmp_path / "x")
    assert distance(logits(model), logits(host)) < TOLERANCES[dtype]
    assert distance(logits(load_base(base)), logits(host)) > 10 * TOLERANCES[dtype]
    assert model.config.tie_word_embeddings == (kind == "tied")
    assert done.dtype == model.dtype == dtype and done.layers == (8 if kind == "gpt2" else 14) and done.files == 1
    assert done.nbytes == (tmp_path / "x" / "model.safetensors").stat().st_size
    assert done.model_class == json.loads((tmp_path / "x" / "config.json").read_text())["architectures"][0]
    unloaded = dict(host.merge_and_unload(safe_merge=True).state_dict())
    assert all(torch.equal(value, unloaded[name]) for name, value in weights(tmp_path / "x").items())


@pytest.mark.parametrize("precision", ["fp32", "split", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sparse_adapter_gives_its_weights_bit_for_bit(tmp_path, family, precision):
    base = save_base(tmp_path / "base", family, torch.bfloat16)
    host = get_peft_model(load_base(base), sparse_config(precision=precision))
    train_masked(host)
    export_merged(saved(host, tmp_path / "a"), tmp_path / "x")
    model, before = merged(tmp_path / "x"), load_base(base)
    assert torch.equal(logits(model), logits(host))
    export_merged(tmp_path / "a", tmp_path / "wide", dtype="float32")  # the base is read in its own dtype all the same
    wide = weights(tmp_path / "wide")
    assert all(torch.equal(v.float(), wide[k]) for k, v in weights(tmp_path / "x").items())
    for name, layer in sparse_layers(host).items():
        W0, W = before.get_submodule(name).weight.data, model.get_submodule(name).weight.data
        dense, mask = layer.get_delta_weight("default"), layer.delta("default").layout.mask()
        assert torch.equal(W[~mask], W0[~mask]) and not torch.equal(W[mask], W0[mask])
        if precision == "fp32":  # a split master rounds ties away from zero, the ablations hold W itself
            assert torch.equal(W, (W0.float() + dense).to(W.dtype))
        layer.realise("default")
        assert torch.equal(W, layer.stored_matrix())
    changed = {f"{name}.weight" for name in sparse_layers(host)}
    old = weights(base)
    assert all(torch.equal(v, old[k]) for k, v in weights(tmp_path / "x").items() if k not in changed)


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_a_sparse_adapter_finds_the_dtype_that_its_base_was_trained_in(base, tmp_path, precision):
    """A checkpoint stored in fp32, loaded in bf16 for training, as TRL does by default."""
    in_bf16 = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    host = get_peft_model(in_bf16, sparse_config(precision=precision))
    train(host, 1, by=MaskedAdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2))
    done = export_merged(saved(host, tmp_path / "a"), tmp_path / "x", base=base)
    assert done.dtype == torch.bfloat16
    assert torch.equal(logits(load_base(tmp_path / "x")), logits(host))


def test_a_sparse_adapter_refuses_a_base_with_other_bytes(base, tmp_path):
    host = get_peft_model(load_base(base), sparse_config())
    train(host, 1)
    adapter = saved(host, tmp_path / "a")
    other = save_base(tmp_path / "other", seed=7)
    with pytest.raises(ExportError, match=r"does not fit the base model .*made for a base weight with other bytes"):
        export_merged(adapter, tmp_path / "x", base=other)
    assert not (tmp_path / "x").exists()
    done = export_merged(adapter, tmp_path / "x", dtype="bfloat16")  # its own bytes are loaded, then rounded
    assert done.dtype == torch.bfloat16
    exact, rounded = export_merged(adapter, tmp_path / "y"), weights(tmp_path / "x")
    assert all(torch.equal(v.bfloat16(), rounded[k]) for k, v in weights(exact.folder).items())


def test_any_adapter_that_can_be_merged(base, tmp_path):
    for name, method in (
        ("lora", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")),
        ("ia3", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")),
    ):
        host = get_peft_model(load_base(base), method)
        train(host, 2)
        done = export_merged(saved(host, tmp_path / name), tmp_path / f"{name} merged")
        assert done.peft_type == name.upper()
        assert distance(logits(merged(done.folder)), logits(host)) < TOLERANCES[torch.float32]


def test_dtype_is_of_the_written_weights_and_the_sum_is_the_wider(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    host = trained(base, "pissa")
    adapter = saved(host, tmp_path / "a")
    export_merged(adapter, tmp_path / "x", dtype="float32")
    wide = merged(tmp_path / "x")
    assert wide.dtype == torch.float32
    fine = load_base(base).float()
    expected = logits(peft.PeftModel.from_pretrained(fine, adapter))
    assert distance(logits(wide), expected) < TOLERANCES[torch.float32]
    old = weights(base)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert (weights(tmp_path / "x")[gate] - old[gate]).abs().max() > 0
    assert not torch.equal(weights(tmp_path / "x")[gate], weights(tmp_path / "x")[gate].bfloat16().float())


# -- tied embeddings, heads, tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"trainable_token_indices": [3, 4, 5]}, True),
    ],
    ids=["adapted head", "saved head", "saved embedding", "trained tokens"],
)
def test_tied_embeddings_of_which_one_is_trained(tmp_path, options, stays_tied):
    base = save_base(tmp_path / "base", tie=True)
    host = trained(base, "pissa", **options)
    export_merged(saved(host, tmp_path / "a"), tmp_path / "x")
    model = merged(tmp_path / "x")
    assert distance(logits(model), logits(host)) < TOLERANCES[torch.float32]
    same = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert same == stays_tied


def test_saved_copies_of_tied_embeddings_stay_tied(tmp_path):
    base = save_base(tmp_path / "base", tie=True)
    host = trained(base, "pissa")
    export_merged(saved(host, tmp_path / "a", save_embedding_layers=True), tmp_path / "x")
    assert "lm_head.weight" not in weights(tmp_path / "x") and merged(tmp_path / "x").config.tie_word_embeddings
    assert distance(logits(merged(tmp_path / "x")), logits(host)) < TOLERANCES[torch.float32]


def test_a_classifier_keeps_its_head(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, pad_token_id=0)
    host = get_peft_model(model, config("pissa", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2)
    host(input_ids=IDS, labels=torch.tensor([1, 4])).loss.backward()
    optimizer.step()
    export_merged(saved(host.eval(), tmp_path / "a"), tmp_path / "x")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x").eval()
    assert model.config.num_labels == 5
    assert distance(logits(model), logits(host)) < TOLERANCES[torch.float32]


# -- files ----------------------------------------------------------------------------------------------------------


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    GenerationConfig(max_new_tokens=7, eos_token_id=1, pad_token_id=0).save_pretrained(base)
    adapter = saved(trained(base, "rlmo", target_modules=["q_proj"]), tmp_path / "a")
    assert export_merged(adapter, tmp_path / "x").tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "x").encode("1+2") == AutoTokenizer.from_pretrained(base).encode(
        "1+2"
    )
    assert GenerationConfig.from_pretrained(tmp_path / "x").max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "the adapter's"
    tokenizer.save_pretrained(adapter)
    export_merged(adapter, tmp_path / "y")  # the adapter's own tokenizer goes before the base's
    assert AutoTokenizer.from_pretrained(tmp_path / "y").chat_template == "the adapter's"


def test_shards(base, tmp_path):
    host = trained(base, "pissa")
    done = export_merged(saved(host, tmp_path / "a"), tmp_path / "x", max_shard_size="50KB")
    assert done.files > 2 and (tmp_path / "x" / "model.safetensors.index.json").is_file()
    assert distance(logits(merged(tmp_path / "x")), logits(host)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_stored_quantised_gives_a_float_model(tmp_path, kind):
    quantized(kind).save_pretrained(tmp_path / "base")
    for name, method in (("off", config("pissa")), ("sparse", sparse_config())):
        method.base_model_name_or_path = str(tmp_path / "base")
        host = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").train(), method)
        train(host, 1)
        export_merged(saved(host, tmp_path / name), tmp_path / f"{name} merged")
        model, expected = merged(tmp_path / f"{name} merged"), host.merge_and_unload()
        assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32
        assert torch.equal(logits(model), logits(expected))
    part = config("pissa", target_modules=["q_proj"])
    host = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").train(), part)
    with pytest.raises(ExportError, match="adapts some of its layers only"):
        export_merged(saved(host, tmp_path / "part"), tmp_path / "x", base=tmp_path / "base")


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_told(base, tmp_path):
    host = trained(base, "lora")
    adapter = saved(host, tmp_path / "a")
    small = save_base(tmp_path / "small", hidden=16)
    quantised = save_base(tmp_path / "quantised")
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(settings))
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora = saved(get_peft_model(load_base(base), lora), tmp_path / "lora")
    prompt = get_peft_model(load_base(base), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    for options, words in (
        ({"base": tmp_path / "nowhere"}, r"no folder .*nowhere; give the base model's folder or id \(base=, --base\)"),
        ({"base": small}, r"does not fit the base model .*small: model\.layers\.0.*r = 4 and k = 0 needs \(4, 16\)"),
        ({"base": adapter}, "base model .*a: .*Give its folder or id"),
        (
            {"base": quantised, "adapter_folder": lora},
            "is stored quantised.* give the float model",
        ),
        ({"dtype": "int4"}, "dtype 'int4': the choices are"),
        ({"adapter_folder": saved(prompt, tmp_path / "p")}, "PROMPT_TUNING, which changes no weight"),
        ({"adapter_folder": base}, "It holds a model: give the adapter's folder"),
        ({"folder": base}, "exists and is not empty"),
        ({"folder": base, "overwrite": True}, "is the base model's own folder"),
    ):
        arguments = {"adapter_folder": adapter, "folder": tmp_path / "x", **options}
        with pytest.raises(ExportError, match=words):
            export_merged(**arguments)
        assert not (tmp_path / "x").exists()
    assert torch.equal(logits(load_base(base)), logits(host.unload()))


def test_incomplete_and_broken_adapters_are_told(base, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = saved(get_peft_model(load_base(base), lora), tmp_path / "a")
    values = tensors(adapter)
    some = {k: v for k, v in values.items() if "layers.1" not in k}
    save_file(some, adapter / TENSORS)
    with pytest.raises(ExportError, match=r"is incomplete for the base model .*missing adapter keys"):
        export_merged(adapter, tmp_path / "x")
    first = next(iter(values))
    save_file(values | {first: values[first] * float("nan")}, adapter / TENSORS)
    with pytest.raises(ExportError, match="cannot be merged: NaNs detected"):
        export_merged(adapter, tmp_path / "x")
    save_file(values, adapter / TENSORS)
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="does not name its base model; give one"):
        export_merged(adapter, tmp_path / "x")
    export_merged(adapter, tmp_path / "x", base=base)
