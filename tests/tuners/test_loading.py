"""Saving and loading: the same bits without a decomposition, training that goes on, and folders that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import assert_same_base, base_bytes
from lifecycle import (
    DTYPES,
    FAMILIES,
    IDS,
    PRESETS,
    DecompositionError,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    config,
    logits,
    no_decomposition,
    off_layers,
    optimizer,
    tiny,
    train,
    trainable,
)
from offprincipal_peft import OffPrincipalLoraConfig

WEIGHTS = "adapter_model.safetensors"
DECOMPOSING = [preset for preset in PRESETS if preset != "lora"]


def saved(preset: str, folder: Path, family: str = "llama", dtype=torch.float32, **overrides) -> PeftModel:
    """A trained adapter on a tiny model and its folder."""
    host = adapted(preset, family, dtype, **overrides)
    train(host, 2)
    host.save_pretrained(folder)
    return host


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_way_of_loading_gives_the_same_bits_without_a_decomposition(tmp_path, preset, family, dtype):
    base = tiny(family, dtype)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    host = get_peft_model(base, config(preset))
    train(host, 2)
    host.save_pretrained(tmp_path / "adapter")
    want, tensors, before = logits(host), adapter_tensors(host), base_bytes(host)
    folder = str(tmp_path / "adapter")
    with no_decomposition():
        for trains in (False, True):
            loaded = PeftModel.from_pretrained(tiny(family, dtype), folder, is_trainable=trains)
            assert_same_tensors(adapter_tensors(loaded), tensors)
            assert torch.equal(logits(loaded), want)
            assert set(trainable(loaded)) == (set(trainable(host)) if trains else set())
        auto = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert_same_tensors(adapter_tensors(auto), tensors)
        assert torch.equal(logits(auto), want)
        loaded.load_adapter(folder, "other")
        assert_same_tensors(adapter_tensors(loaded, "other"), tensors)
        loaded.set_adapter("other")
        assert torch.equal(logits(loaded), want)
        low = PeftModel.from_pretrained(tiny(family, dtype), folder, low_cpu_mem_usage=True)
        assert_same_tensors(adapter_tensors(low), tensors)
        # The file's tensors are used in place and need not be aligned, which may change a product's last bit.
        for parameter in low.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(logits(low), want)
    for other in (loaded, auto, low):
        assert_same_base(before, base_bytes(other))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_guard_against_decompositions_works(preset):
    """A fresh adapter needs one wherever its start or its bases come from the weight."""
    with no_decomposition():
        if preset in DECOMPOSING:
            with pytest.raises(DecompositionError):
                adapted(preset)
        else:
            adapted(preset)


def test_adapters_in_the_base_dtype_come_back_in_it(tmp_path):
    host = get_peft_model(tiny(dtype=torch.bfloat16), config(), autocast_adapter_dtype=False)
    train(host, 2)
    host.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    dtypes = {name.split(".lora_")[1].split(".")[0]: t.dtype for name, t in adapter_tensors(loaded).items()}
    assert dtypes["A"] == dtypes["B"] == dtypes["start_A"] == torch.bfloat16
    assert dtypes["basis_U"] == dtypes["basis_V"] == torch.float32
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(host))
    assert torch.equal(logits(loaded), logits(host))


@pytest.mark.parametrize(
    ("preset", "dtype"), [*((p, torch.float32) for p in PRESETS), ("geora", torch.bfloat16)], ids=str
)
def test_training_goes_on_after_loading_as_if_it_had_not_stopped(tmp_path, preset, dtype):
    straight = adapted(preset, dtype=dtype)
    train(straight, 5)
    host = adapted(preset, dtype=dtype)
    state = train(host, 2).state_dict()
    host.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path, is_trainable=True)
    by = optimizer(loaded)
    by.load_state_dict(state)
    train(loaded, 3, by=by, first=2)
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(straight))
    assert torch.equal(logits(loaded), logits(straight))


def test_resuming_without_the_optimizer_state_would_be_seen(tmp_path):
    straight = adapted()
    train(straight, 3)
    host = adapted()
    train(host, 2)
    train(host, 1, first=2)
    assert not torch.equal(logits(host), logits(straight))


# -- a saved config, a fresh adapter ----------------------------------------------------------------------------


def merge_and_unmerge(host: PeftModel) -> None:
    host.merge_adapter()
    host.unmerge_adapter()


def step_without_update(host: PeftModel) -> None:
    host.train()
    host(input_ids=IDS, labels=IDS).loss.backward()
    host.zero_grad()
    host.eval()


FIRST_USES = {
    "forward": logits,
    "train": step_without_update,
    "merge": merge_and_unmerge,
    "state dict": lambda host: host.state_dict(),
    "second adapter": lambda host: host.add_adapter("second", config("rlmo", r=2)),
}


@pytest.mark.parametrize("how", FIRST_USES)
@pytest.mark.parametrize("preset", ["lora", "pissa", "offprincipal"])
def test_a_config_read_from_a_folder_starts_a_fresh_adapter_at_its_first_use(tmp_path, preset, how):
    saved(preset, tmp_path)
    fresh = adapted(preset)
    reused = OffPrincipalLoraConfig.from_pretrained(tmp_path)
    reused.inference_mode = False  # PEFT saves every config as one for inference
    with no_decomposition():
        again = get_peft_model(tiny(), reused)
    if preset in DECOMPOSING:
        with no_decomposition(), pytest.raises(DecompositionError):
            FIRST_USES[how](again)
    FIRST_USES[how](again)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(fresh))
    assert torch.equal(logits(again), logits(tiny()))


@pytest.mark.parametrize("preset", PRESETS)
def test_its_state_dict_and_its_folder_before_any_forward_hold_the_start(tmp_path, preset):
    saved(preset, tmp_path / "trained")
    fresh = {name: t for name, t in adapted(preset).state_dict().items() if ".lora_" in name}
    reused = OffPrincipalLoraConfig.from_pretrained(tmp_path / "trained")
    unused = get_peft_model(tiny(), reused).state_dict()
    assert_same_tensors({name: t for name, t in unused.items() if ".lora_" in name}, fresh)
    get_peft_model(tiny(), OffPrincipalLoraConfig.from_pretrained(tmp_path / "trained")).save_pretrained(
        tmp_path / "unused"
    )
    written = load_file(tmp_path / "unused" / WEIGHTS)
    assert_same_tensors(written, {name.replace(".default.", "."): t for name, t in fresh.items()})


def test_a_reused_config_trains_as_a_fresh_one(tmp_path):
    saved("geora", tmp_path)
    fresh = adapted("geora")
    reused = OffPrincipalLoraConfig.from_pretrained(tmp_path)
    reused.inference_mode = False
    again = get_peft_model(tiny(), reused)
    assert set(trainable(again)) == set(trainable(fresh))
    train(fresh, 3)
    train(again, 3)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(fresh))


# -- options that travel with the folder ------------------------------------------------------------------------


OPTIONS = {
    "patterns": {"rank_pattern": {"q_proj": 3, "0.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 12, "down_proj": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "exclude": {"exclude_modules": ["q_proj", "gate_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("preset", ["geora", "offprincipal"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_survive_the_folder(tmp_path, option, preset):
    host = saved(preset, tmp_path, **OPTIONS[option])
    with no_decomposition():
        loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(host))
    assert torch.equal(logits(loaded), logits(host))
    assert [m.scaling for m in off_layers(loaded)] == [m.scaling for m in off_layers(host)]


def named_layers(host: PeftModel) -> dict[str, torch.nn.Module]:
    return {m.geometry["default"].request.name: m for m in off_layers(host)}


def test_the_options_have_their_effect():
    layers = named_layers(adapted("geora", **OPTIONS["patterns"]))
    query, up = layers["model.layers.0.self_attn.q_proj"], layers["model.layers.0.mlp.up_proj"]
    assert (query.r["default"], query.scaling["default"]) == (3, 12 / 3)
    assert (up.r["default"], up.scaling["default"]) == (6, 8 / 6)
    assert layers["model.layers.1.mlp.up_proj"].r["default"] == 4
    assert layers["model.layers.1.mlp.down_proj"].scaling["default"] == 5 / 4
    value = named_layers(adapted("geora", **OPTIONS["rslora"]))["model.layers.0.self_attn.v_proj"]
    assert value.scaling["default"] == 8 / 2**0.5
    excluded = {name.rsplit(".", 1)[1] for name in named_layers(adapted(**OPTIONS["exclude"]))}
    assert excluded == {"k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    some = set(named_layers(adapted(**OPTIONS["some layers"])))
    assert some == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_a_module_to_save_trains_and_comes_back(tmp_path):
    host = saved("offprincipal", tmp_path, modules_to_save=["lm_head"])
    head = host.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).base_model.model.lm_head
    assert torch.equal(loaded.modules_to_save["default"].weight, head.modules_to_save["default"].weight)
    assert_same_base(base_bytes(tiny()), base_bytes(host))


@pytest.mark.parametrize("preset", PRESETS)
def test_inference_mode_trains_nothing(preset):
    host = adapted(preset, inference_mode=True)
    assert trainable(host) == {}
    assert torch.equal(logits(host), logits(tiny()))


# -- folders that do not fit ------------------------------------------------------------------------------------


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def edited(source: Path, target: Path, edit) -> Path:
    """A copy of a saved adapter whose tensors went through `edit` (a dict, changed in place)."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    edit(tensors)
    save_file(tensors, target / WEIGHTS)
    return target


def drop(*parts: str):
    def edit(tensors):
        doomed = [name for name in tensors if all(part in name for part in parts)]
        assert doomed, f"nothing matches {parts}"
        for name in doomed:
            del tensors[name]

    return edit


WAYS = {
    "from_pretrained": lambda folder, **o: PeftModel.from_pretrained(tiny(**o), folder),
    "trainable": lambda folder, **o: PeftModel.from_pretrained(tiny(**o), folder, is_trainable=True),
    "low memory": lambda folder, **o: PeftModel.from_pretrained(tiny(**o), folder, low_cpu_mem_usage=True),
    "load_adapter": lambda folder, **o: get_peft_model(tiny(**o), config("lora")).load_adapter(folder, "other"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", ["lora", "geora", "offprincipal"])
def test_a_folder_for_other_shapes_is_refused(tmp_path, preset, way):
    saved(preset, tmp_path)
    with pytest.raises(ValueError) as caught:
        WAYS[way](tmp_path, hidden=48)
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj (weight 48 x 48)" in message
    assert "lora_A" in message and "(4, 32)" in message and "(4, 48)" in message
    assert "other shapes" in message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["lora_B", "lora_start_A"])
def test_one_missing_tensor_is_refused(tmp_path, part, way):
    saved("pissa", tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", drop(QUERY, part))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj \(weight 32 x 32\).*lacks.*" + part):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", ["lora", "geora", "offprincipal"])
def test_a_missing_layer_is_refused(tmp_path, preset, way):
    saved(preset, tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", drop(QUERY))
    with pytest.raises(ValueError, match=r"no values for 1 of the 14 layers.*layers\.1\.self_attn\.q_proj"):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
def test_missing_bases_are_refused_and_never_recomputed(tmp_path, way):
    saved("offprincipal", tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", drop("lora_basis_"))
    with (
        no_decomposition(),
        pytest.raises(ValueError, match=r"q_proj .*lacks .*lora_basis_U.*lora_basis_V.*never recomputed"),
    ):
        WAYS[way](folder) if way != "load_adapter" else PeftModel.from_pretrained(tiny(), folder)


@pytest.mark.parametrize("way", WAYS)
def test_another_rank_in_the_config_than_in_the_tensors_is_refused(tmp_path, way):
    saved("offprincipal", tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"r": 5}))
    with pytest.raises(ValueError, match=r"lora_A.*\(4, 32\).*r = 5 and k = 5 needs \(5, 32\)"):
        WAYS[way](tmp_path)


def test_a_refused_load_leaves_the_other_adapter_as_it_was(tmp_path):
    saved("pissa", tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", drop(QUERY, "lora_start_A"))
    host = adapted()
    train(host, 1)
    want, tensors, before = logits(host), adapter_tensors(host), base_bytes(host)
    with pytest.raises(ValueError, match="lacks"):
        host.load_adapter(folder, "other")
    assert host.active_adapter == "default"
    assert_same_tensors(adapter_tensors(host), tensors)
    assert torch.equal(logits(host), want)
    host.delete_adapter("other")
    assert list(host.peft_config) == ["default"]
    assert_same_base(before, base_bytes(host))
    host.load_adapter(tmp_path / "whole", "other")  # the name is free again
