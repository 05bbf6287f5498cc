"""Merging into a float copy of a quantised layer, and what else a quantised model goes through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import IDS, config, logits, off_layers, train, trainable
from offprincipal_peft import OffPrincipalLoraConfig, PrincipalSparseConfig
from offprincipal_peft.tuners.base_weight import DequantizedLinear
from quantized import (
    ADAPTERS,
    KINDS,
    SPARSE,
    by_bitsandbytes,
    folder,
    quantization_config,
    quantized,
    quantized_layers,
)
from sparse_models import names, sparse_config, sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
DTYPES = (torch.float32, torch.bfloat16)


def trained(kind: str, adapter: str, dtype: torch.dtype = torch.float32, steps: int = 2, **options: Any) -> PeftModel:
    """In train mode, where bitsandbytes computes in one way."""
    host = get_peft_model(quantized(kind, dtype, **options), ADAPTERS[adapter]())
    train(host, steps)
    return host.train()


def updates(host: PeftModel) -> dict[str, torch.Tensor]:
    """(d_out, d_in) by the layer's name in the bare model, fp32."""
    if any("lora_" in name for name in trainable(host)):
        return {
            layer.geometry["default"].request.name: layer.get_delta_weight("default").float()
            for layer in off_layers(host)
        }
    return {name: layer.get_delta_weight("default").float() for name, layer in sparse_layers(host).items()}


def saved_and_loaded(model: PreTrainedModel, path: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    model.save_pretrained(path)
    return kind.from_pretrained(path).train()


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_the_dequantised_weight_plus_the_update_rounded_once(kind, dtype, adapter):
    host = trained(kind, adapter, dtype)
    bare, deltas = quantized(kind, dtype), updates(host)
    merged = host.merge_and_unload()
    for name, delta in deltas.items():
        layer = merged.get_submodule(name)
        assert type(layer) is DequantizedLinear and layer.weight.dtype == dtype
        assert not layer.weight.requires_grad
        exact = by_bitsandbytes(bare.get_submodule(name)).float() + delta
        off, nearest = ((weight.float() - exact).abs() for weight in (layer.weight, exact.to(dtype)))
        # no further off than the nearest number, but for sums in the middle of two: seen 1.5e-7 of the largest
        assert (off - nearest).max() < 1e-6 * exact.abs().max(), name


@pytest.mark.parametrize("adapter", ["pissa", "offprincipal", "element", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unmerging(kind, dtype, adapter):
    host = trained(kind, adapter, dtype)
    want, before = logits(host), base_bytes(host)
    layers = dict(quantized_layers(host))
    host.merge_adapter()
    assert not [m for m in host.modules() if m in layers.values()]
    merged = logits(host)
    # in bf16: seen 1.0e-2
    assert relative_error(merged, want) < (1e-5 if dtype == torch.float32 else 5e-2)
    host.merge_adapter()  # once more: nothing left to merge
    assert torch.equal(logits(host), merged)
    with host.disable_adapter():
        assert torch.equal(logits(host), logits(quantized(kind, dtype)))
    assert torch.equal(logits(host), want)
    assert_same_base(before, base_bytes(host))
    assert dict(quantized_layers(host)).keys() == layers.keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("make", [config, sparse_config])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_state_dict_has_the_checkpoints_names_and_shapes(kind, make, family):
    """What an engine that is fed from it (vLLM) expects."""
    host = get_peft_model(quantized(kind, family=family), make())
    host.merge_adapter()
    checkpoint = AutoModelForCausalLM.from_pretrained(folder(family)).state_dict()
    stored = {
        key.replace(".base_layer.", ".").removeprefix("base_model.model."): value
        for key, value in host.state_dict().items()
        if "lora_" not in key and "princsparse_" not in key
    }
    assert {key: tuple(value.shape) for key, value in stored.items()} == {
        k: tuple(v.shape) for k, v in checkpoint.items()
    }


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unmerged_layer_is_in_its_models_mode(kind, adapter):
    host = trained(kind, adapter)
    host.merge_adapter()
    host.eval()
    host.unmerge_adapter()
    assert not [name for name, module in host.named_modules() if module.training]
    host.merge_adapter()
    host.train()
    host.unmerge_adapter()
    assert not [name for name, module in host.named_modules() if not module.training]


@pytest.mark.parametrize("adapter", ["pissa", "offprincipal", "element"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_safe_merge_of_broken_values_leaves_the_quantised_layer(kind, adapter):
    host = trained(kind, adapter)
    before, want = base_bytes(host), logits(host)
    broken = next(iter(trainable(host).values()))
    held = broken.data.clone()
    broken.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs.*q_proj"):
        host.merge_adapter(safe_merge=True)
    assert quantized_layers(host).keys() == {
        name.replace(".default", "") for name in quantized_layers(trained(kind, adapter, steps=1))
    }
    assert_same_base(before, base_bytes(host))
    broken.data.copy_(held)
    assert torch.equal(logits(host), want)
    host.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_two_adapters_merged_together(kind):
    host = trained(kind, "pissa")
    host.add_adapter("second", config("offprincipal"))
    host.base_model.set_adapter("second")
    train(host, 2)
    host.train().base_model.set_adapter(["default", "second"])
    want, before = logits(host), base_bytes(host)
    host.merge_adapter(["default"])
    host.merge_adapter(["second"])
    # seen 4.5e-7
    assert relative_error(logits(host), want) < 1e-5
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    assert_same_base(before, base_bytes(host))


# -- the merged model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_a_float_model_on_disk(kind, family, tmp_path):
    """GPT-2's layers are `Conv1D`: its checkpoint has the transposed weights."""
    host = get_peft_model(quantized(kind, family=family), config("pissa"))
    train(host, 2)
    want = logits(host.train())
    merged = host.merge_and_unload().train()
    # seen 5.3e-7
    assert relative_error(logits(merged), want) < 1e-5
    assert not [name for name, p in merged.named_parameters() if p.requires_grad]
    assert not hasattr(merged.config, "quantization_config")
    assert not getattr(merged, "is_quantized", False)
    loaded = saved_and_loaded(merged, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(loaded), logits(merged))
    assert not [m for m in loaded.modules() if isinstance(m, DequantizedLinear)]
    second = get_peft_model(merged, config("offprincipal"))  # adapts like any other
    train(second, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_was_loaded_quantised_merges_and_saves(kind, tmp_path):
    """transformers keeps how it read a quantised checkpoint, and would undo that on saving."""
    quantized(kind).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
    host = get_peft_model(model, sparse_config())
    train(host, 1)
    merged = host.merge_and_unload().train()
    loaded = saved_and_loaded(merged, tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_partly_adapted_model_stays_quantised_elsewhere(kind, adapter, tmp_path):
    make = config if adapter == "pissa" else sparse_config
    options = {"target_modules": ["q_proj", "down_proj"]}
    host = get_peft_model(quantized(kind), make("pissa", **options) if adapter == "pissa" else make(**options))
    train(host, 2)
    merged = host.merge_and_unload().train()
    floats = {name for name, m in merged.named_modules() if isinstance(m, DequantizedLinear)}
    assert len(floats) == 4
    assert floats | {"lm_head"} <= set(merged.config.quantization_config.llm_int8_skip_modules)
    loaded = saved_and_loaded(merged, tmp_path)
    assert quantized_layers(loaded).keys() == quantized_layers(merged).keys()
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_partly_adapted_classifier_keeps_its_float_head(kind, tmp_path):
    torch.manual_seed(0)
    settings = {"num_labels": 3, "quantization_config": quantization_config(kind), "device_map": "cpu"}
    model = AutoModelForSequenceClassification.from_pretrained(folder(), **settings)
    host = get_peft_model(model, config("pissa", target_modules=["q_proj"], task_type="SEQ_CLS"))
    merged = host.merge_and_unload().train()
    assert type(merged.score) is nn.Linear
    loaded = saved_and_loaded(merged, tmp_path, AutoModelForSequenceClassification)
    assert type(loaded.score) is nn.Linear
    assert torch.equal(loaded(input_ids=IDS).logits, merged(input_ids=IDS).logits)


# -- adapters come and go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["mica", "offprincipal", "column", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_switched_disabled_and_deleted(kind, adapter):
    host, base = trained(kind, adapter), logits(quantized(kind))
    first = logits(host)
    other = config("rlmo", seed=3) if adapter not in SPARSE else sparse_config(mask="low", low_density=0.2)
    host.add_adapter("second", other)
    host.set_adapter("second")
    assert torch.equal(logits(host), base)
    train(host, 2)
    second = logits(host.train())
    assert not torch.equal(second, base) and not torch.equal(second, first)
    host.set_adapter("default")
    assert torch.equal(logits(host), first)
    with host.disable_adapter():
        assert torch.equal(logits(host), base)
    host.merge_adapter(["second"])
    with pytest.raises(ValueError, match="merged"):
        host.delete_adapter("second")
    host.unmerge_adapter()
    host.delete_adapter("second")
    assert torch.equal(logits(host), first)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("adapter", ["pissa", "offprincipal", "element", "row"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_prepared_for_kbit_training(kind, adapter, checkpointing):
    """What is trained is the same with and without checkpoints."""
    tensors = []
    for use in (checkpointing, None):
        options = {} if use is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use}}
        base = prepare_model_for_kbit_training(quantized(kind), use_gradient_checkpointing=use is not None, **options)
        host = get_peft_model(base, ADAPTERS[adapter]())
        before = base_bytes(host)
        train(host, 2)
        assert_same_base(before, base_bytes(host))
        tensors.append({name: p.detach().clone() for name, p in trainable(host).items()})
    for name, value in tensors[0].items():
        assert value.abs().max() > 0 and torch.equal(value, tensors[1][name]), name


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_modules_to_save(kind, adapter, tmp_path):
    options = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]}
    made = config("pissa", **options) if adapter == "pissa" else sparse_config(**options)
    host = get_peft_model(quantized(kind), made)
    train(host, 2)
    head = host.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    want = logits(host.train())
    host.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(kind), tmp_path).train()), want)
    # seen 3.2e-7
    assert relative_error(logits(host.merge_and_unload()), want) < 1e-5


@pytest.mark.parametrize("adapter", ["pissa", "offprincipal", "element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, adapter):
    bare, host = quantized(kind), get_peft_model(quantized(kind), ADAPTERS[adapter]())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(host(input_ids=IDS).logits, bare(input_ids=IDS).logits)
        host(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in trainable(host).values()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["split", "bf16", "bf16-stochastic"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_cannot_live_in_a_quantised_weight(kind, precision):
    model = quantized(kind, torch.bfloat16)
    before = base_bytes(model)
    with pytest.raises(ValueError, match=rf"q_proj: precision='{precision}'.*quantised here.*precision='fp32'"):
        get_peft_model(model, sparse_config(precision=precision))
    assert_same_base(before, base_bytes(model))


@pytest.mark.parametrize("make", [config, sparse_config])
def test_a_layer_that_is_not_quantised_yet(make):
    import bitsandbytes as bnb

    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=r"0 is a bitsandbytes.*no quantised values yet.*from_pretrained"):
            get_peft_model(model, make(task_type=None, target_modules=["0"]))
        assert model[0] is layer


class PackedLinear(nn.Linear):
    """As other quantisers make them: an int8 tensor in the place of the weight."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [OffPrincipalLoraConfig, PrincipalSparseConfig])
def test_another_quantisation_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"0 .*PackedLinear.*torch.int8.*bitsandbytes 4-bit or 8-bit.*not supported"):
        get_peft_model(nn.Sequential(PackedLinear()), kind(target_modules=["0"]))
