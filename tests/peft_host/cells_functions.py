"""Cells of the table: the functional API, which also works on models that no ``PeftModel`` wraps."""

from pathlib import Path

import peft
import torch
from peft import (
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    functional,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.utils import hotswap

from helpers import assert_same_base, base_bytes
from lifecycle import IDS, logits, no_decomposition, train, trainable
from peft_host.cells_model import LAYERS, moved
from peft_host.surface import OURS, Method, check, refused_by, tiny
from sparse_models import no_new_mask

NOT_MIXED = refused_by(OURS, ValueError, "not compatible with the", reason="not in PEFT's list of mixable methods")
NO_RANK = refused_by(["sparse"], TypeError, "do not support LoRA", reason="the update has no low rank")
OTHER_BASE = refused_by(["sparse"], ValueError, "other bytes", "the same base", reason="the mask is of the old weights")


def injected(m: Method, steps: int = 2):
    """A trained adapter on a model that no PeftModel wraps."""
    torch.manual_seed(0)
    model = inject_adapter_in_model(m.config(), tiny())
    train(model, steps)
    return model


@check("get_peft_model")
def _(m: Method, tmp: Path) -> None:
    before = base_bytes(tiny())
    host = get_peft_model(tiny(), m.config(), adapter_name="mine", revision="main")
    assert isinstance(host, PeftModel) and list(host.peft_config) == ["mine"]
    assert_same_base(before, base_bytes(host))
    assert trainable(host) and all(m.prefix in name for name in trainable(host))


@check("get_peft_model(low_cpu_mem_usage=True)")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    empty = get_peft_model(tiny(), m.config(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(empty, get_peft_model_state_dict(host), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in empty.parameters())
    torch.testing.assert_close(logits(empty), logits(host), rtol=1e-5, atol=1e-6)


@check("get_peft_model(autocast_adapter_dtype=False)")
def _(m: Method, tmp: Path) -> None:
    host = get_peft_model(tiny(dtype=torch.bfloat16), m.config(), autocast_adapter_dtype=False)
    dtypes = {p.dtype for p in trainable(host).values()}
    assert dtypes == {torch.float32 if m.is_sparse else torch.bfloat16}
    assert torch.equal(logits(host), logits(tiny(dtype=torch.bfloat16)))


@check("get_peft_model(mixed=True)", refused=NOT_MIXED)
def _(m: Method, tmp: Path) -> None:
    assert torch.equal(logits(get_peft_model(tiny(), m.config(), mixed=True)), logits(tiny()))


@check("PeftMixedModel", refused=NOT_MIXED)
def _(m: Method, tmp: Path) -> None:
    host = PeftMixedModel(tiny(), m.config())
    host.add_adapter("two", m.config())
    assert torch.equal(logits(host), logits(tiny()))


@check("get_peft_config")
def _(m: Method, tmp: Path) -> None:
    read = peft.get_peft_config(m.config().to_dict())
    assert type(read) is type(m.config()) and read.to_dict() == m.config().to_dict()


@check("inject_adapter_in_model")
def _(m: Method, tmp: Path) -> None:
    model = injected(m)
    torch.testing.assert_close(logits(model), logits(m.host()))  # the same training in a PeftModel
    assert not torch.equal(logits(model), logits(tiny()))


@check("inject_adapter_in_model(low_cpu_mem_usage=True)")
def _(m: Method, tmp: Path) -> None:
    model = injected(m)
    with no_decomposition(), no_new_mask():
        empty = inject_adapter_in_model(m.config(), tiny(), low_cpu_mem_usage=True)
        set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
        torch.testing.assert_close(logits(empty), logits(model), rtol=1e-5, atol=1e-6)


@check("inject_adapter_in_model(state_dict=…)")
def _(m: Method, tmp: Path) -> None:
    part = ["q_proj", "down_proj"]
    torch.manual_seed(0)
    model = inject_adapter_in_model(m.config(target_modules=part), tiny())
    train(model, 2)
    values = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(m.config(), tiny(), state_dict=values)  # the layers of the state dict, not all
    set_peft_model_state_dict(other, values)
    assert {n for n, _p in other.named_parameters()} == {n for n, _p in model.named_parameters()}
    assert torch.equal(logits(other), logits(model))


@check("get_peft_model_state_dict")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    values = get_peft_model_state_dict(host)
    assert values and all(m.prefix in n and "default" not in n and "base_layer" not in n for n in values)
    assert get_peft_model_state_dict(host, state_dict=host.state_dict()).keys() == values.keys()
    bare = get_peft_model_state_dict(injected(m))
    assert {n.removeprefix("base_model.model.") for n in values} == set(bare)


@check("set_peft_model_state_dict")
def _(m: Method, tmp: Path) -> None:
    host, other = m.host(), m.fresh()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(host))
    assert not result.unexpected_keys and torch.equal(logits(other), logits(host))
    train(host, 1)
    train(other, 1)
    assert torch.equal(logits(other), logits(host))


@check("get_base_model_state_dict")
def _(m: Method, tmp: Path) -> None:
    found = peft.get_base_model_state_dict(m.host())
    want = tiny().state_dict()
    assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)


@check("set_base_model_state_dict")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    peft.set_base_model_state_dict(host, tiny().state_dict())
    assert torch.equal(logits(host), want)


@check("set_base_model_state_dict(other weights)", refused=OTHER_BASE)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    peft.set_base_model_state_dict(host, tiny(seed=1).state_dict())
    with host.disable_adapter():
        assert torch.equal(logits(host), logits(tiny(seed=1)))


@check("get_layer_status")
def _(m: Method, tmp: Path) -> None:
    status = peft.get_layer_status(injected(m, 0))
    assert len(status) == LAYERS and all(s.active_adapters == ["default"] and s.enabled for s in status)


@check("get_model_status")
def _(m: Method, tmp: Path) -> None:
    status = peft.get_model_status(injected(m, 0))
    assert status.num_adapter_layers == LAYERS and status.available_adapters == ["default"]


@check("set_adapter")
def _(m: Method, tmp: Path) -> None:
    model = injected(m)
    want = logits(model)
    inject_adapter_in_model(m.config(), model, "two")
    functional.set_adapter(model, "two")
    assert torch.equal(logits(model), logits(tiny()))
    functional.set_adapter(model, "default", inference_mode=True)
    assert torch.equal(logits(model), want) and not trainable(model)


@check("set_requires_grad")
def _(m: Method, tmp: Path) -> None:
    model = injected(m)
    names = set(trainable(model))
    functional.set_requires_grad(model, "default", requires_grad=False)
    assert not trainable(model)
    functional.set_requires_grad(model, "default")
    assert set(trainable(model)) == names


@check("delete_adapter")
def _(m: Method, tmp: Path) -> None:
    model = injected(m)
    functional.delete_adapter(model, "default", prefix=m.prefix)
    assert torch.equal(logits(model), logits(tiny()))
    assert not [n for n, _p in model.named_parameters() if ".default." in n]


@check("cast_adapter_dtype")
def _(m: Method, tmp: Path) -> None:
    model = inject_adapter_in_model(m.config(), tiny(dtype=torch.bfloat16))
    functional.cast_adapter_dtype(model, "default")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert torch.equal(logits(model), logits(tiny(dtype=torch.bfloat16)))
    train(model, 1)


@check("convert_to_lora", refused=NO_RANK)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    config, values = convert_to_lora(host, rank=8)  # pissa's update has rank 8
    assert config.peft_type == peft.PeftType.LORA
    plain = get_peft_model(tiny(), config)
    set_peft_model_state_dict(plain, values)
    torch.testing.assert_close(logits(plain), moved(host), rtol=1e-4, atol=1e-5)


@check("save_as_lora", refused=NO_RANK)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    save_as_lora(tmp, host, rank=8)
    loaded = PeftModel.from_pretrained(tiny(), tmp)
    torch.testing.assert_close(logits(loaded), moved(host), rtol=1e-4, atol=1e-5)


# -- swapping in place ------------------------------------------------------------------------------------------------

LOAD_INSTEAD = "PEFT swaps factors only; `load_adapter` over it"
NOT_SWAPPED = refused_by(["sparse"], ValueError, "only supports", "PRINCIPAL_SPARSE was passed", reason=LOAD_INSTEAD)


@check("hotswap_adapter", refused=NOT_SWAPPED)
def _(m: Method, tmp: Path) -> None:
    other = m.host(3)
    other.save_pretrained(tmp)
    host = m.host(1)
    with no_decomposition(), no_new_mask():
        hotswap.hotswap_adapter(host, str(tmp), "default")
        assert torch.equal(logits(host), logits(other))


@check("hotswap_adapter_from_state_dict", refused=NOT_SWAPPED)
def _(m: Method, tmp: Path) -> None:
    other, host = m.host(3), m.host(1)
    hotswap.check_hotswap_configs_compatible(host.active_peft_config, other.active_peft_config)
    values = {n.replace(".weight", ".default.weight"): v for n, v in get_peft_model_state_dict(other).items()}
    hotswap.hotswap_adapter_from_state_dict(host, values, "default", other.active_peft_config, m.prefix)
    assert torch.equal(logits(host), logits(other))


@check("check_hotswap_configs_compatible", refused=NOT_SWAPPED)
def _(m: Method, tmp: Path) -> None:
    hotswap.check_hotswap_configs_compatible(m.config(), m.config())


@check(
    "prepare_model_for_compiled_hotswap",
    refused=refused_by(["sparse"], ValueError, "No adapter layers found", reason=LOAD_INSTEAD),
)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    hotswap.prepare_model_for_compiled_hotswap(host, target_rank=8, config=host.peft_config)
    torch.testing.assert_close(logits(host), want)
    other = m.host(3, r=6)
    other.save_pretrained(tmp)
    hotswap.hotswap_adapter(host, str(tmp), "default")
    torch.testing.assert_close(logits(host), logits(other), rtol=1e-4, atol=1e-5)
    assert host(IDS).logits.shape == want.shape
