"""Cells of the table: the tuner's own methods, which a user calls on the ``PeftModel``."""

from pathlib import Path

import pytest
import torch
from peft import convert_to_lora

from helpers import assert_same_base, base_bytes
from lifecycle import IDS, logits, train, trainable
from peft_host.cells_model import generated, moved
from peft_host.surface import OFFPRINCIPAL, Method, check, refused_by, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # merged and unmerged products round differently; up to 1.2e-6 was seen


@check("LoraModel.active_adapters")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.add_adapter("two", m.config())
    host.base_model.set_adapter("two")
    assert host.base_model.active_adapters == ["two"]


@check("LoraModel.forward")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    torch.testing.assert_close(host.base_model(input_ids=IDS).logits, moved(host))


@check("LoraModel.set_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = logits(host)
    host.add_adapter("two", m.config())
    host.base_model.set_adapter("two", inference_mode=True)
    assert not trainable(host) and torch.equal(logits(host), logits(tiny()))
    host.base_model.set_adapter("default")
    assert torch.equal(logits(host), want)


@check(
    "LoraModel.set_adapter(several)",
    refused=refused_by(["sparse"], ValueError, "active together", "set_adapter()", reason="one set of values"),
)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.add_adapter("two", m.config(**m.other_rank()))
    host.set_adapter("two")
    train(host, 2, lr=3e-3)
    one_at_a_time = host.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    outs = {}
    for names in ("default", "two", ["default", "two"]):
        host.base_model.set_adapter(names)
        outs[str(names)] = one_at_a_time(x).detach()
    base = one_at_a_time.base_layer(x)
    torch.testing.assert_close(outs["['default', 'two']"], outs["default"] + outs["two"] - base, **CLOSE)


@check("LoraModel.set_requires_grad")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    names = set(trainable(host))
    host.base_model.set_requires_grad(["default"], requires_grad=False)
    assert not trainable(host)
    host.base_model.set_requires_grad(["default"])
    assert set(trainable(host)) == names


@check("LoraModel.disable_adapter_layers")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    moved(host)
    host.base_model.disable_adapter_layers()
    assert torch.equal(logits(host), logits(tiny()))
    assert_same_base(base_bytes(tiny()), base_bytes(host))


@check("LoraModel.enable_adapter_layers")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    host.base_model.disable_adapter_layers()
    host.base_model.enable_adapter_layers()
    assert torch.equal(logits(host), want)


@check("LoraModel.merge_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    host.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(host), want, **CLOSE)
    assert host.get_model_status().merged_adapters == ["default"]


@check(
    "LoraModel.merge_adapter(adapter_names=several)",
    refused=refused_by(["sparse"], ValueError, "cannot be merged together", "Merge one", reason="one set of values"),
)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.add_adapter("two", m.config(**m.other_rank()))
    host.set_adapter("two")
    train(host, 2, lr=3e-3)
    host.merge_adapter(adapter_names=["default", "two"])
    merged = logits(host)
    host.unmerge_adapter()
    host.base_model.set_adapter(["default", "two"])
    torch.testing.assert_close(merged, logits(host), **CLOSE)


@check("LoraModel.unmerge_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    host.merge_adapter()
    host.unmerge_adapter()
    torch.testing.assert_close(logits(host), want, **CLOSE)
    if m.key != "lora":  # which subtracts what it had added
        assert torch.equal(logits(host), want)
        host.disable_adapter_layers()
        assert_same_base(base_bytes(tiny()), base_bytes(host))


@check("LoraModel.merge_and_unload")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want, tokens = moved(host), generated(host)
    merged = host.merge_and_unload(progressbar=False, safe_merge=True)
    assert type(merged) is type(tiny()) and not [n for n in merged.state_dict() if "lora" in n or "princ" in n]
    assert merged.state_dict().keys() == tiny().state_dict().keys()
    torch.testing.assert_close(logits(merged), want, **CLOSE)
    assert torch.equal(generated(merged), tokens)


@check("LoraModel.unload")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    moved(host)
    bare = host.unload()
    assert type(bare) is type(tiny()) and torch.equal(logits(bare), logits(tiny()))
    assert_same_base(base_bytes(tiny()), base_bytes(bare))


@check("LoraModel.delete_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.add_adapter("two", m.config())
    host.base_model.delete_adapter("default")
    assert host.base_model.active_adapters == ["two"] and list(host.peft_config) == ["two"]
    assert torch.equal(logits(host.base_model.model), logits(tiny()))


@check("LoraModel.delete_adapter(merged)")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    host.merge_adapter()
    want = logits(host)
    with pytest.raises(ValueError, match="unmerge"):
        host.delete_adapter("default")
    assert torch.equal(logits(host), want) and list(host.peft_config) == ["default"]


@check("LoraModel.inject_adapter")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.peft_config["two"] = m.config()
    host.base_model.inject_adapter(host.base_model.model, "two")
    host.set_adapter("two")
    train(host, 2)
    moved(host)


@check("LoraModel.get_model_config")
def _(m: Method, tmp: Path) -> None:
    assert m.fresh().base_model.get_model_config(tiny())["model_type"] == "llama"


@check(
    "LoraModel.subtract_mutated_init",
    refused=refused_by(
        OFFPRINCIPAL,
        ValueError,
        "never do",
        "save_pretrained",
        reason="no base was changed; just save",
    )
    | refused_by(
        ["sparse"],
        ValueError,
        "save_pretrained",
        "not supported",
        reason="no base was changed; just save",
    ),
)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    host.save_pretrained(tmp / "start")
    train(host, 2)
    host.save_pretrained(tmp / "end", path_initial_model_for_weight_conversion=str(tmp / "start"))
    assert (tmp / "end" / "adapter_model.safetensors").exists()


NO_RANK = refused_by(
    ["sparse"],
    TypeError,
    "do not support LoRA conversion",
    "PrincipalSparseLinear",
    reason="answers False",
)


@check("LoraModel.supports_lora_conversion", refused=NO_RANK)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    if not host.base_model.supports_lora_conversion():
        convert_to_lora(host, rank=4)


@check("PeftModel.supports_lora_conversion", refused=NO_RANK)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    if not host.supports_lora_conversion():
        convert_to_lora(host, rank=4)


# -- combinations of adapters -----------------------------------------------------------------------------------------


def two_trained(m: Method):
    """Adapters "default" and "two" of the same shape with different values, and the logits of both."""
    host = m.host()
    host.add_adapter("two", m.config())
    host.set_adapter("two")
    train(host, 2, lr=3e-3, first=10)
    return host


def deltas(host, adapter: str) -> list[torch.Tensor]:
    layers = [layer for layer in host.base_model.model.modules() if hasattr(layer, "base_layer")]
    return [layer.get_delta_weight(adapter).detach() for layer in layers]


def assert_weighted_sum(host, rtol: float) -> None:
    """Adapter "sum" is 0.7 times "default" plus 0.2 times "two", as an update of every layer."""
    for a, b, c in zip(deltas(host, "default"), deltas(host, "two"), deltas(host, "sum"), strict=True):
        assert (c - 0.7 * a - 0.2 * b).norm() <= rtol * c.norm()
    host.set_adapter("sum")
    moved(host)


@check("LoraModel.add_weighted_adapter(combination_type='cat')")
def _(m: Method, tmp: Path) -> None:
    host = two_trained(m)
    host.add_weighted_adapter(["default", "two"], [0.7, 0.2], "sum", combination_type="cat")
    assert_weighted_sum(host, 1e-5)


@check(
    "LoraModel.add_weighted_adapter(combination_type='svd')",
    refused=refused_by(["sparse"], ValueError, "svd", "linear", reason="values have no rank; use 'linear'"),
)
def _(m: Method, tmp: Path) -> None:
    host = two_trained(m)
    host.add_weighted_adapter(["default", "two"], [0.7, 0.2], "sum", combination_type="svd", svd_rank=16)
    assert_weighted_sum(host, 1e-4)


@check(
    "LoraModel.add_weighted_adapter(combination_type='linear')",
    refused=refused_by(OFFPRINCIPAL, ValueError, "linear", "cat", reason="mixes factors of two starts; use 'cat'"),
)
def _(m: Method, tmp: Path) -> None:
    host = two_trained(m)
    host.add_weighted_adapter(["default", "two"], [0.7, 0.2], "sum", combination_type="linear")
    host.set_adapter("sum")
    moved(host)
    if m.is_sparse:  # LoRA's is another update than the sum
        assert_weighted_sum(host, 1e-5)


MIXED = ["default", "two", "__base__", "default"]


def mixed_batch() -> torch.Tensor:
    return torch.cat([IDS, IDS.flip(1)])


def rows_alone(host, run) -> list[torch.Tensor]:
    """What each row of the batch gives with its own adapter alone."""
    rows = []
    for name, row in zip(MIXED, mixed_batch(), strict=True):
        if name == "__base__":
            with host.disable_adapter():
                rows.append(run(row[None])[0])
            continue
        host.set_adapter(name)
        rows.append(run(row[None])[0])
    return rows


@check("PeftModel.forward(adapter_names=…)")
def _(m: Method, tmp: Path) -> None:
    host = two_trained(m)
    host.eval()
    want = rows_alone(host, lambda ids: logits(host, ids))
    with torch.no_grad():
        found = host(input_ids=mixed_batch(), adapter_names=MIXED).logits
    for row, alone in zip(found, want, strict=True):
        torch.testing.assert_close(row, alone, **CLOSE)


@check("PeftModel.generate(adapter_names=…)")
def _(m: Method, tmp: Path) -> None:
    host = two_trained(m)
    host.eval()

    def run(ids: torch.Tensor, **options: object) -> torch.Tensor:
        return host.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)

    want = rows_alone(host, run)
    assert torch.equal(run(mixed_batch(), adapter_names=MIXED), torch.stack(want))
