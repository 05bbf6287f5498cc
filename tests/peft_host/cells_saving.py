"""Cells of the table: what is written, and every way to read it back."""

import json
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file, save_file

from lifecycle import logits, no_decomposition, train, trainable
from peft_host.surface import OFFPRINCIPAL, Method, check, refused_by, tiny
from sparse_models import no_new_mask

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(m: Method, folder: Path, **overrides):
    """A trained adapter in `folder` and its logits."""
    host = m.host(**overrides)
    host.save_pretrained(folder)
    return host, logits(host)


def assert_loads(m: Method, want: torch.Tensor, load, **options) -> PeftModel:
    """Loading gives the same logits and computes no start, basis or mask anew."""
    with no_decomposition(), no_new_mask():
        loaded = load(**options)
        assert torch.equal(logits(loaded), want)
    return loaded


def from_folder(folder: Path, **options) -> PeftModel:
    return PeftModel.from_pretrained(tiny(), folder, **options)


@check("PeftModel.save_pretrained")
def _(m: Method, tmp: Path) -> None:
    host, _want = saved(m, tmp)
    assert {p.name for p in tmp.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    kept = load_file(tmp / WEIGHTS)
    assert all(m.prefix in name and ".default" not in name for name in kept)
    written = json.loads((tmp / CONFIG).read_text())
    assert written["peft_type"] == m.config().peft_type.value and written["inference_mode"] is True
    assert trainable(host)  # saving does not freeze


@check("PeftModel.save_pretrained(selected_adapters=…)")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.add_adapter("two", m.config())
    host.set_adapter("two")
    train(host, 1)
    want = logits(host)
    host.save_pretrained(tmp, selected_adapters=["two"])
    assert not (tmp / WEIGHTS).exists()
    assert_loads(m, want, lambda: from_folder(tmp / "two"))


@check("PeftModel.save_pretrained(safe_serialization=False)")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.save_pretrained(tmp, safe_serialization=False)
    assert (tmp / "adapter_model.bin").exists() and not (tmp / WEIGHTS).exists()
    assert_loads(m, logits(host), lambda: from_folder(tmp))


@check("PeftModel.save_pretrained(state_dict=…)")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.save_pretrained(tmp, state_dict={k: v.clone() for k, v in host.state_dict().items()})
    assert_loads(m, logits(host), lambda: from_folder(tmp))


@check("PeftModel.create_or_update_model_card")
def _(m: Method, tmp: Path) -> None:
    m.fresh().create_or_update_model_card(str(tmp))
    card = (tmp / "README.md").read_text()
    assert "library_name: peft" in card and "text-generation" in card


@check("PeftModel.from_pretrained")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    loaded = assert_loads(m, want, lambda: from_folder(tmp))
    assert isinstance(loaded, PeftModelForCausalLM) and not trainable(loaded) and not loaded.training


@check("PeftModel.from_pretrained(is_trainable=True)")
def _(m: Method, tmp: Path) -> None:
    host, want = saved(m, tmp)
    loaded = assert_loads(m, want, lambda: from_folder(tmp, is_trainable=True))
    assert set(trainable(loaded)) == set(trainable(host))
    train(host, 1)
    train(loaded, 1)
    assert torch.equal(logits(loaded), logits(host))


@check("PeftModel.from_pretrained(adapter_name=…)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    assert assert_loads(m, want, lambda: from_folder(tmp, adapter_name="mine")).active_adapters == ["mine"]


@check("PeftModel.from_pretrained(config=…)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    config = PeftConfig.from_pretrained(tmp)
    assert_loads(m, want, lambda: from_folder(tmp, config=config))
    assert torch.equal(logits(from_folder(tmp, config=m.config())), want)  # a fresh one, whose start is overwritten


@check("PeftModel.from_pretrained(subfolder=…)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp / "inner")
    assert_loads(m, want, lambda: from_folder(tmp, subfolder="inner"))


@check("PeftModel.from_pretrained(low_cpu_mem_usage=True)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    with no_decomposition(), no_new_mask():
        loaded = from_folder(tmp, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in loaded.parameters())
        # The file's tensors are used in place and need not be aligned, which may change a product's last bit.
        torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-6)


@check("PeftModel.from_pretrained(torch_device='cpu')")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    assert_loads(m, want, lambda: from_folder(tmp, torch_device="cpu"))


@check("PeftModel.from_pretrained(autocast_adapter_dtype=False)")
def _(m: Method, tmp: Path) -> None:
    torch.manual_seed(0)
    host = m.fresh(base=tiny(dtype=torch.bfloat16))
    train(host, 2)
    host.save_pretrained(tmp)
    dtypes = {}
    for autocast in (True, False):
        loaded = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp, autocast_adapter_dtype=autocast)
        dtypes[autocast] = {p.dtype for n, p in loaded.named_parameters() if "_A.default" in n or "delta.default" in n}
        torch.testing.assert_close(logits(loaded), logits(host), rtol=0.05, atol=0.05)
    # A sparse method's values have the dtype of their precision, whatever is asked for.
    assert dtypes[True] == {torch.float32} and dtypes[False] == {torch.float32 if m.is_sparse else torch.bfloat16}


@check("PeftModel.from_pretrained(key_mapping=…)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    renamed = {k.replace("model.layers", "model.blocks"): v for k, v in load_file(tmp / WEIGHTS).items()}
    save_file(renamed, tmp / WEIGHTS)
    assert_loads(m, want, lambda: from_folder(tmp, key_mapping={r"^model\.blocks": "model.layers"}))


@check(
    "PeftModel.from_pretrained(ignore_mismatched_sizes=True)",
    refused=refused_by(OFFPRINCIPAL, ValueError, "incomplete", "never recomputed", reason="starts are never invented")
    | refused_by(["sparse"], ValueError, "values are needed", reason="values are never invented"),
)
def _(m: Method, tmp: Path) -> None:
    saved(m, tmp)
    kept = load_file(tmp / WEIGHTS)
    name = next(n for n in kept if n.endswith("q_proj.lora_A.weight") or n.endswith("q_proj.princsparse_delta.weight"))
    kept[name] = kept[name][:-1].clone()
    save_file(kept, tmp / WEIGHTS)
    logits(from_folder(tmp, ignore_mismatched_sizes=True))


@check("PeftModel.from_pretrained(ephemeral_gpu_offload=True)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    assert_loads(m, want, lambda: from_folder(tmp, ephemeral_gpu_offload=True))  # without effect but for DoRA


@check("PeftModel.load_adapter")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    host = m.fresh()

    def load() -> PeftModel:
        result = host.load_adapter(tmp, "two")
        assert not result.missing_keys and not [k for k in result.unexpected_keys if "two" in k]
        host.set_adapter("two")
        return host

    assert_loads(m, want, load)
    host.set_adapter("default")
    assert torch.equal(logits(host), logits(tiny()))


@check("PeftModel.load_adapter(over an adapter)")
def _(m: Method, tmp: Path) -> None:
    _host, want = saved(m, tmp)
    host = m.host(1)
    assert_loads(m, want, lambda: host.load_adapter(tmp, "default") and host)


@check("PeftModel.load_adapter(is_trainable=True)")
def _(m: Method, tmp: Path) -> None:
    saved_host, want = saved(m, tmp)
    host = m.fresh()
    host.load_adapter(tmp, "two", is_trainable=True)
    host.set_adapter("two")
    assert set(trainable(host)) == {n.replace(".default.", ".two.") for n in trainable(saved_host)}
    assert torch.equal(logits(host), want)


@check("AutoPeftModelForCausalLM.from_pretrained")
def _(m: Method, tmp: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp / "base")
    base.name_or_path = str(tmp / "base")
    host = m.fresh(base=base)
    train(host, 2)
    host.save_pretrained(tmp / "adapter")
    want = logits(host)
    loaded = assert_loads(m, want, lambda: AutoPeftModelForCausalLM.from_pretrained(tmp / "adapter"))
    assert isinstance(loaded, PeftModelForCausalLM)


@check("PeftConfig.from_pretrained")
def _(m: Method, tmp: Path) -> None:
    m.config(inference_mode=False).save_pretrained(tmp)
    read = PeftConfig.from_pretrained(tmp)
    assert type(read) is type(m.config()) and read.to_dict() == m.config().to_dict()


@check("load_peft_weights")
def _(m: Method, tmp: Path) -> None:
    from peft import get_peft_model_state_dict, load_peft_weights

    host, _want = saved(m, tmp)
    weights, held = load_peft_weights(str(tmp), device="cpu"), get_peft_model_state_dict(host)
    assert weights.keys() == held.keys() and all(torch.equal(weights[k], held[k]) for k in held)
