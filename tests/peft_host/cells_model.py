"""Cells of the table: the methods and properties of ``PeftModel`` that run, switch and describe adapters."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModelForCausalLM

from helpers import assert_same_base, base_bytes, token_batch
from lifecycle import IDS, logits, train, trainable
from peft_host.surface import Method, check, tiny

PROMPTS = IDS[:, :4]
LAYERS = 7  # adapted in the tiny Llama


def generated(model, **options):
    with torch.no_grad():
        return model.generate(input_ids=PROMPTS, max_new_tokens=3, do_sample=False, **options)


def moved(model) -> torch.Tensor:
    """The adapted model's logits, which are not the bare model's."""
    found = logits(model)
    assert not torch.equal(found, logits(tiny()))
    return found


@check("PeftModel.peft_config")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    assert list(host.peft_config) == ["default"]
    config = host.peft_config["default"]
    assert type(config) is type(m.config()) and config.peft_type == m.config().peft_type
    assert json.loads(json.dumps(config.to_dict(), default=sorted))["peft_type"] == config.peft_type.value
    host.peft_config = dict(host.peft_config)  # it has a setter
    assert host.base_model.peft_config["default"] is config


@check("PeftModel.active_adapters")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.add_adapter("two", m.config())
    assert host.active_adapters == ["default"] and host.active_adapter == "default"
    host.set_adapter("two")
    assert host.active_adapters == ["two"] and host.active_adapter == "two"


@check("PeftModel.has_active_enabled_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    assert host.has_active_enabled_adapter
    with host.disable_adapter():
        assert not host.has_active_enabled_adapter
    assert host.has_active_enabled_adapter


@check("PeftModel.active_peft_config")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.add_adapter("two", m.config(**m.other_rank()))
    assert host.active_peft_config is host.peft_config["default"]
    host.set_adapter("two")
    assert host.active_peft_config is host.peft_config["two"]


@check("PeftModel.forward")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    assert torch.equal(logits(host), logits(tiny()))  # every method starts as the base model
    train(host, 2)
    out = host(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert out.logits.shape == (*IDS.shape, 128) and out.loss.requires_grad and len(out.hidden_states) == 2
    torch.testing.assert_close(host(IDS).logits, out.logits)  # positional arguments


@check("PeftModel.generate")
def _(m: Method, tmp: Path) -> None:
    host = m.host(4)
    tokens = generated(host)
    assert tokens.shape == (2, 7)
    ids = PROMPTS
    for _step in range(3):  # greedy by hand, without a cache
        ids = torch.cat([ids, logits(host, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids)


@check("PeftModel.disable_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    with host.disable_adapter():
        assert torch.equal(logits(host), logits(tiny()))
        assert generated(host).tolist() == generated(tiny()).tolist()
    assert torch.equal(logits(host), want)


@check("PeftModel.get_base_model")
def _(m: Method, tmp: Path) -> None:
    base = tiny()
    host = m.fresh(base=base)
    assert host.get_base_model() is base
    train(host, 2)
    torch.testing.assert_close(logits(base), logits(host))  # it carries the adapter


@check("PeftModel.get_nb_trainable_parameters")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    trained, total = host.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in trainable(host).values()) > 0
    assert total == sum(p.numel() for p in host.parameters()) > tiny().num_parameters()
    if not m.is_sparse:
        assert trained == COUNT_OF_LORA


COUNT_OF_LORA = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 88))  # r times d_in + d_out


@check("PeftModel.print_trainable_parameters")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        host.print_trainable_parameters()
    trained, total = host.get_nb_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {total:,d}" in out.getvalue()


@check("PeftModel.prepare_model_for_gradient_checkpointing")
def _(m: Method, tmp: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        base = tiny()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        host = m.fresh(base=base)  # which calls the method where checkpointing is on
        if checkpointing:
            assert base._require_grads_hook is not None
            host.prepare_model_for_gradient_checkpointing(base)
        host.train()
        host(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in trainable(host).items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@check("PeftModel.get_prompt", no_use="prompt learning only; raises")
def _(m: Method, tmp: Path) -> None:
    with pytest.raises(AttributeError, match="prompt_encoder"):
        m.fresh().get_prompt(2)


@check("PeftModel.get_prompt_embedding_to_save", no_use="prompt learning only; raises")
def _(m: Method, tmp: Path) -> None:
    with pytest.raises(AttributeError, match="prompt_encoder"):
        m.fresh().get_prompt_embedding_to_save("default")


@check("PeftModel.add_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = logits(host)
    host.add_adapter("two", m.config(**m.other_rank()))
    assert torch.equal(logits(host), want) and set(host.peft_config) == {"default", "two"}
    host.set_adapter("two")
    assert torch.equal(logits(host), logits(tiny()))
    train(host, 2)
    moved(host)
    host.set_adapter("default")
    assert torch.equal(logits(host), want)
    with pytest.raises(ValueError, match="already exists"):
        host.add_adapter("two", m.config())


@check("PeftModel.delete_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = logits(host)
    host.add_adapter("two", m.config())
    host.delete_adapter("two")
    assert torch.equal(logits(host), want) and list(host.peft_config) == ["default"]
    host.delete_adapter("default")
    assert torch.equal(logits(host.base_model.model), logits(tiny()))  # a PeftModel needs an adapter to run
    assert not [name for name, _p in host.named_parameters() if ".default." in name or ".two." in name]
    with pytest.raises(ValueError, match="does not exist"):
        host.delete_adapter("default")


@check("PeftModel.set_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want, names = logits(host), set(trainable(host))
    host.add_adapter("two", m.config())
    host.set_adapter("two")
    assert torch.equal(logits(host), logits(tiny()))
    assert set(trainable(host)) == {name.replace(".default.", ".two.") for name in names}
    host.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(host), want) and not trainable(host)
    with pytest.raises(ValueError, match="not found"):
        host.set_adapter("three")


@check("PeftModel.set_requires_grad")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    names = set(trainable(host))
    host.set_requires_grad("default", requires_grad=False)
    assert not trainable(host)
    host.set_requires_grad("default")
    assert set(trainable(host)) == names  # what is frozen by the method stays frozen


@check("PeftModel.modules_to_save")
def _(m: Method, tmp: Path) -> None:
    assert m.fresh().modules_to_save is None
    host = m.host(modules_to_save=["embed_tokens"])
    assert host.modules_to_save == {"embed_tokens"}
    assert any("embed_tokens.modules_to_save.default" in name for name in trainable(host))
    want, before = moved(host), base_bytes(tiny())
    with host.disable_adapter():
        assert torch.equal(logits(host), logits(tiny()))
        assert_same_base(before, base_bytes(host))
    assert torch.equal(logits(host), want)


@check("PeftModel.get_layer_status")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.add_adapter("two", m.config())
    status = host.get_layer_status()
    assert len(status) == LAYERS
    for layer in status:
        assert layer.enabled and layer.active_adapters == ["default"] and layer.merged_adapters == []
        assert layer.available_adapters == ["default", "two"]
        assert layer.requires_grad == {"default": True, "two": False}
        assert set(layer.devices) == {"default", "two"} and layer.devices["default"] == ["cpu"]
    host.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in host.get_layer_status())


@check("PeftModel.get_model_status")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.add_adapter("two", m.config())
    status = host.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == type(host.base_model).__name__
    assert status.peft_types == dict.fromkeys(("default", "two"), m.config().peft_type.value)
    assert (status.trainable_params, status.total_params) == host.get_nb_trainable_parameters()
    assert status.num_adapter_layers == LAYERS and status.enabled is True and status.merged_adapters == []
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "two"]
    assert status.requires_grad == {"default": True, "two": False} and status.devices["two"] == ["cpu"]
    with host.disable_adapter():
        assert host.get_model_status().enabled is False


@check("PeftModel.base_model_torch_dtype")
def _(m: Method, tmp: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert m.fresh(base=tiny(dtype=dtype)).base_model_torch_dtype == dtype


@check("PeftModelForCausalLM.forward")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    assert isinstance(host, PeftModelForCausalLM)
    mask = torch.ones_like(IDS)
    embedded = host.get_input_embeddings()(IDS)
    want = host(input_ids=IDS).logits
    torch.testing.assert_close(host(inputs_embeds=embedded, attention_mask=mask).logits, want)
    assert host(IDS, mask, labels=IDS, return_dict=False)[0].dim() == 0


@check("PeftModelForCausalLM.generate")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    plain = generated(host)
    assert torch.equal(generated(host, use_cache=False), plain)
    beams = generated(host, num_beams=2, attention_mask=torch.ones_like(PROMPTS))
    assert beams.shape == plain.shape
    host.merge_adapter()
    assert torch.equal(generated(host), plain)


@check("PeftModelForCausalLM.prepare_inputs_for_generation")
def _(m: Method, tmp: Path) -> None:
    host, bare = m.fresh(), tiny()
    ids = token_batch(128, batch=1)
    want = bare.prepare_inputs_for_generation(ids, use_cache=False, is_first_iteration=True)
    found = host.prepare_inputs_for_generation(ids, use_cache=False, is_first_iteration=True)
    assert found.keys() == want.keys() and torch.equal(found["input_ids"], want["input_ids"])
