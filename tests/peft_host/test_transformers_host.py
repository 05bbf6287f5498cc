"""transformers' own adapter methods on a PreTrainedModel, without a PeftModel."""

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import assert_same_base, base_bytes
from lifecycle import config as off_config
from lifecycle import logits, no_decomposition, train, trainable
from peft_host.surface import COLUMNS, EVERY, OFFPRINCIPAL, OURS, tiny
from sparse_models import no_new_mask

by_method = pytest.mark.parametrize("key", EVERY)
WEIGHTS = "adapter_model.safetensors"


def adapted(key: str, steps: int = 2):
    torch.manual_seed(0)
    model = tiny()
    model.add_adapter(COLUMNS[key].config(), "one")
    train(model, steps)
    return model


def frozen_by_the_method(model) -> list[str]:
    return [n for n, p in model.named_parameters() if ("start" in n or "basis" in n) and p.requires_grad]


@by_method
def test_add_adapter_trains_as_in_a_peft_model(key):
    model = adapted(key)
    assert model.active_adapters() == ["one"]
    host = COLUMNS[key].fresh("one")
    train(host, 2)
    assert torch.equal(logits(model), logits(host))
    assert not torch.equal(logits(model), logits(tiny()))


@by_method
def test_disable_and_enable(key):
    model = adapted(key)
    want, before = logits(model), base_bytes(tiny())
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny()))
    assert_same_base(before, base_bytes(model))
    model.enable_adapters()
    assert torch.equal(logits(model), want)


@by_method
def test_two_adapters_and_delete(key):
    model = adapted(key)
    want = logits(model)
    model.add_adapter(COLUMNS[key].config(), "two")  # which activates it
    assert model.active_adapters() == ["two"] and torch.equal(logits(model), logits(tiny()))
    train(model, 1)
    other = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), want)
    model.set_adapter("two")
    assert torch.equal(logits(model), other)
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), want)
    model.delete_adapter("one")
    assert torch.equal(logits(model), logits(tiny()))
    assert not [n for n, _p in model.named_parameters() if ".one." in n or ".two." in n]


def saved(key: str, folder):
    model = adapted(key)
    model.save_pretrained(folder)
    assert {WEIGHTS, "adapter_config.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    return model


@pytest.mark.parametrize("low", [False, True], ids=["filled", "empty"])
@by_method
def test_load_adapter_from_a_folder(tmp_path, key, low):
    want = logits(saved(key, tmp_path))
    with no_decomposition(), no_new_mask():
        other = tiny()
        other.load_adapter(str(tmp_path), adapter_name="mine", low_cpu_mem_usage=low)
        found = logits(other)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert other.active_adapters() == ["mine"] and not trainable(other)


@by_method
def test_load_adapter_from_a_state_dict(tmp_path, key):
    model = saved(key, tmp_path)
    values = {name: value.clone() for name, value in model.get_adapter_state_dict("one").items()}
    assert values.keys() == model.get_adapter_state_dict().keys()  # of the active one
    with no_decomposition(), no_new_mask():
        other = tiny()
        other.load_adapter(adapter_state_dict=values, peft_config=PeftConfig.from_pretrained(tmp_path))
        assert torch.equal(logits(other), logits(model))


@by_method
def test_a_folder_that_transformers_wrote_loads_in_peft(tmp_path, key):
    model = saved(key, tmp_path)
    with no_decomposition(), no_new_mask():
        host = PeftModel.from_pretrained(tiny(), tmp_path)
        assert torch.equal(logits(host), logits(model))


@by_method
def test_load_adapter_to_train_on(tmp_path, key):
    model = saved(key, tmp_path)
    other = tiny()
    other.load_adapter(str(tmp_path), adapter_name="one", is_trainable=True)
    assert not frozen_by_the_method(other)
    assert set(trainable(other)) == set(trainable(model))
    train(model, 2)
    train(other, 2)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_the_factor_that_does_not_train_stays_frozen(tmp_path):
    model = tiny()
    model.add_adapter(off_config("mica"), "one")
    model.save_pretrained(tmp_path)
    other = tiny()
    other.load_adapter(str(tmp_path), adapter_name="one", is_trainable=True)
    assert set(trainable(other)) == set(trainable(model)) and all("lora_A" in name for name in trainable(other))


@by_method
def test_from_pretrained_of_an_adapter_folder(tmp_path, key):
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    host = COLUMNS[key].fresh(base=base)
    train(host, 2)
    host.save_pretrained(tmp_path / "adapter")
    with no_decomposition(), no_new_mask():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        found = logits(loaded)
    torch.testing.assert_close(found, logits(host), rtol=1e-5, atol=1e-6)
    assert loaded.active_adapters() == ["default"]


@pytest.mark.parametrize("key", OURS)
@pytest.mark.parametrize("gone", ["a layer", "what is frozen"])
def test_an_incomplete_folder_is_refused(tmp_path, key, gone):
    """Starts, bases and masks are never made up for an adapter that was saved with its own."""
    saved(key, tmp_path)
    kept = load_file(tmp_path / WEIGHTS)
    parts = ("layers.0.mlp.down_proj",) if gone == "a layer" else ("lora_start", "lora_basis", ".entries")
    save_file({n: v for n, v in kept.items() if not any(part in n for part in parts)}, tmp_path / WEIGHTS)
    other = tiny()
    with pytest.raises(ValueError, match=r"incomplete|truncated|has no values"):
        other.load_adapter(str(tmp_path))
        logits(other)


def test_hotswap_through_transformers(tmp_path):
    """transformers asks for PEFT's own LoRA; `peft.utils.hotswap.hotswap_adapter` asks for a LoRA-like method."""
    for key in OFFPRINCIPAL:
        saved(key, tmp_path / key)
        other = tiny()
        other.load_adapter(str(tmp_path / key), adapter_name="one")
        with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
            other.load_adapter(str(tmp_path / key), adapter_name="one", hotswap=True)
        other.delete_adapter("one")
        other.load_adapter(str(tmp_path / key), adapter_name="one")  # what to do instead


def test_enable_peft_hotswap_then_a_second_adapter(tmp_path):
    """Called for any model, it must not break adapters that cannot be swapped."""
    want = logits(saved("projected", tmp_path))
    other = tiny()
    other.enable_peft_hotswap(target_rank=8)
    other.load_adapter(str(tmp_path), adapter_name="one")
    other.load_adapter(str(tmp_path), adapter_name="two")
    for name in ("one", "two"):
        other.set_adapter(name)
        assert torch.equal(logits(other), want)


@pytest.mark.parametrize("key", OURS)
def test_a_model_keeps_transformers_own_loader(tmp_path, key):
    """Loading an adapter of this package leaves nothing behind that a later load of another method would meet."""
    saved(key, tmp_path / "ours")
    plain = saved("lora", tmp_path / "lora")
    model = tiny()
    PeftModel.from_pretrained(model, tmp_path / "ours").unload()
    model.load_adapter(str(tmp_path / "lora"), adapter_name="two")
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("deleted", [False, True], ids=["beside", "after delete"])
@pytest.mark.parametrize("key", OFFPRINCIPAL)
def test_plain_lora_on_an_adapted_model_is_refused_by_name(key, deleted):
    """The layers are LoRA layers of another kind; transformers leaves them there when their adapter is deleted."""
    model = adapted(key, 0)
    if deleted:
        model.delete_adapter("one")
    with pytest.raises(ValueError, match=r"(?s)off-principal.*unload"):
        model.add_adapter(COLUMNS["lora"].config(), "two")


@pytest.mark.parametrize("key", OURS)
def test_an_adapted_layer_of_lora_is_refused_by_name(key):
    model = adapted("lora", 0)
    with pytest.raises(ValueError, match=r"already carries a peft\.tuners\.lora\.layer\.Linear adapter; unload"):
        model.add_adapter(COLUMNS[key].config(), "two")
