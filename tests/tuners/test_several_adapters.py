"""Several adapters on one base: shared starts, switching, what trains, mixed batches, deletion."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import (
    CONTAINERS,
    DTYPES,
    FAMILIES,
    FROZEN,
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
    tiny,
    train,
    trainable,
)
from offprincipal_peft import OffPrincipalLoraConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already following adapters", "ignore:Adapter .* was active", "ignore:Adapter cannot be set when"
)

# "lora" keeps no record of its cheap random start, it draws it again.
STATES = ("fresh", "trained", "merged", "loaded", "loaded low-memory", "saved config")


def first_adapter(preset: str, state: str, folder, family: str = "llama") -> PeftModel:
    host = adapted(preset, family)
    if state != "fresh":
        train(host, 2)
    if state == "merged":
        host.merge_adapter()
    if state in ("loaded", "loaded low-memory", "saved config"):
        host.save_pretrained(folder)
    if state == "saved config":
        host = get_peft_model(tiny(family), OffPrincipalLoraConfig.from_pretrained(folder))
        logits(host)
    elif state.startswith("loaded"):
        host = PeftModel.from_pretrained(tiny(family), folder, low_cpu_mem_usage=state == "loaded low-memory")
    return host


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_equal_config_starts_from_the_first_adapters_record(tmp_path, preset, state):
    host = first_adapter(preset, state, tmp_path)
    with no_decomposition():
        host.add_adapter("second", config(preset))
    assert_same_tensors(adapter_tensors(host, "second"), adapter_tensors(adapted(preset)))


def test_an_equal_config_on_conv1d_starts_from_the_record_too(tmp_path):
    host = first_adapter("offprincipal", "merged", tmp_path, "gpt2")
    with no_decomposition():
        host.add_adapter("second", config())
    assert_same_tensors(adapter_tensors(host, "second"), adapter_tensors(adapted(family="gpt2")))


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("pissa", {}), ("rlmo", {"r": 3}), ("geora", {}), ("offprincipal", {"principal_rank": 3}), ("mica", {"r": 5})],
    ids=str,
)
def test_another_config_computes_its_own_from_the_original_weight(preset, overrides, family, merged):
    """Merged, the base carries the first adapter's update; the second one's geometry is that of the original."""
    host = adapted("offprincipal", family)
    train(host)
    if merged:
        host.merge_adapter()
    with no_decomposition(), pytest.raises(DecompositionError):
        copy.deepcopy(host).add_adapter("second", config(preset, **overrides))
    host.add_adapter("second", config(preset, **overrides))
    assert_same_tensors(adapter_tensors(host, "second"), adapter_tensors(adapted(preset, family, **overrides)))


def test_the_merged_weight_would_have_given_another_start():
    """The comparison above can fail."""
    host = adapted("offprincipal")
    train(host)
    want = adapter_tensors(adapted("pissa"))
    other = config("pissa")
    plain = host.merge_and_unload()
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_tensors(adapter_tensors(get_peft_model(plain, other)), want)


def test_adding_an_adapter_while_another_is_merged_unmerges_as_peft_does():
    """PEFT sets the active adapter again when it adds one, which unmerges; here that restores the bytes."""
    host = adapted("pissa", dtype=torch.bfloat16)
    plain = get_peft_model(tiny(dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    train(host)
    before, want = base_bytes(host), logits(host)
    for model, other in ((host, config()), (plain, LoraConfig(target_modules=["q_proj"]))):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.add_adapter("second", other)
        assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert_same_base(before, base_bytes(host))
    assert torch.equal(logits(host), want)
    host.merge_adapter(["default"])
    host.merge_adapter(["second"])
    host.unmerge_adapter()
    assert_same_base(before, base_bytes(host))


# -- switching --------------------------------------------------------------------------------------------------


TRAINED_PARTS = {"mica": {"lora_A"}} | {p: {"lora_A", "lora_B"} for p in PRESETS if p != "mica"}


def trained_parts(host: PeftModel) -> set[tuple[str, str]]:
    """(adapter, container) of what requires grad."""
    found = set()
    for name in trainable(host):
        parts = name.split(".")
        part = next(p for p in parts if p in CONTAINERS)
        found.add((parts[parts.index(part) + 1], part))
    return found


def expected_parts(adapter: str, preset: str) -> set[tuple[str, str]]:
    return {(adapter, part) for part in TRAINED_PARTS[preset]}


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_active_adapters_factors_ever_train(preset):
    host = adapted(preset)
    assert trained_parts(host) == expected_parts("default", preset)
    host.add_adapter("second", config("mica"))
    assert trained_parts(host) == expected_parts("default", preset)
    host.set_adapter("second")
    assert trained_parts(host) == expected_parts("second", "mica")
    host.set_adapter("default")
    assert trained_parts(host) == expected_parts("default", preset)
    with host.disable_adapter():
        pass
    assert trained_parts(host) == expected_parts("default", preset)
    host.base_model.disable_adapter_layers()
    assert trained_parts(host) == set()
    host.base_model.enable_adapter_layers()
    assert trained_parts(host) == expected_parts("default", preset)
    host.set_requires_grad("second", requires_grad=True)
    assert trained_parts(host) == expected_parts("default", preset) | expected_parts("second", "mica")
    host.set_requires_grad(["default", "second"], requires_grad=False)
    assert trained_parts(host) == set()
    host.base_model.set_adapter(["default", "second"])
    assert trained_parts(host) == expected_parts("default", preset) | expected_parts("second", "mica")


@pytest.mark.parametrize("preset", PRESETS)
def test_training_moves_what_trains_and_nothing_else(preset):
    host = adapted(preset)
    before, base = adapter_tensors(host), base_bytes(host)
    train(host, 3, by=torch.optim.AdamW(trainable(host).values(), lr=1e-2, weight_decay=0.1))
    after = adapter_tensors(host)
    moved = {name.split(".lora_")[1].split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {part.removeprefix("lora_") for part in TRAINED_PARTS[preset]}
    assert_same_base(base, base_bytes(host))


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_changes_the_output_and_both_together_add_up(family):
    host = adapted("geora", family, torch.float64)
    host.add_adapter("second", config())
    for name in ("default", "second"):
        host.set_adapter(name)
        train(host, 2)
    second = logits(host)
    host.set_adapter("default")
    assert not torch.equal(logits(host), second)
    host.base_model.set_adapter(["default", "second"])
    both = logits(host)
    host.merge_adapter(["default", "second"])
    e = relative_error(logits(host), both)
    print("TOGETHER", e)
    assert e < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_adapters_training_leaves_the_other_alone(dtype):
    host = adapted("pissa", dtype=dtype)
    train(host, 2)
    tensors, want = adapter_tensors(host), logits(host)
    host.add_adapter("second", config("pissa"))
    host.set_adapter("second")
    train(host, 2)
    host.set_adapter("default")
    assert_same_tensors(adapter_tensors(host), tensors)
    assert torch.equal(logits(host), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_each_adapter_alone(family):
    host = adapted("pissa", family)
    for name in ("mica", "offprincipal"):
        host.add_adapter(name, config(name))
    rows = {"__base__": logits(tiny(family))}
    for name in ("default", "mica", "offprincipal"):
        host.set_adapter(name)
        train(host, 2)
        rows[name] = logits(host)
    names = ["offprincipal", "__base__", "default", "mica", "default", "offprincipal"]
    ids = IDS[:1].repeat(len(names), 1)
    with torch.no_grad():
        mixed = host(input_ids=ids, adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        e = relative_error(row, rows[name][0])
        print("MIXED", e)
        assert e < 1e-5
    assert relative_error(mixed[0], rows["default"][0]) > 0.1
    host.set_adapter("default")
    ids = IDS[:1].repeat(2, 1)
    generated = host.generate(
        input_ids=ids, adapter_names=["offprincipal", "__base__"], max_new_tokens=4, do_sample=False
    )
    host.set_adapter("offprincipal")
    alone = host.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[:1], alone)


# -- deletion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_deletion_leaves_no_trace_and_the_other_adapter_works(preset):
    host = adapted("geora")
    train(host, 2)
    tensors, want, before = adapter_tensors(host), logits(host), base_bytes(host)
    names = {n for n, _ in host.named_parameters()}
    host.add_adapter("doomed", config(preset))
    host.set_adapter("doomed")
    train(host, 2)
    host.delete_adapter("doomed")
    assert host.active_adapters == ["default"]  # the deleted one was active
    assert {n for n, _ in host.named_parameters()} == names
    for layer in off_layers(host):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "_pending", "frozen_peft_weight_names"):
            assert "doomed" not in getattr(layer, attribute), attribute
    assert trained_parts(host) == expected_parts("default", "geora")
    assert_same_tensors(adapter_tensors(host), tensors)
    assert torch.equal(logits(host), want)
    assert_same_base(before, base_bytes(host))
    host.add_adapter("doomed", config("rlmo", r=2))  # the name is free, with another geometry
    assert adapter_tensors(host, "doomed").keys() == adapter_tensors(adapted("rlmo")).keys()


def test_the_record_outlives_the_adapter_that_it_was_copied_from():
    host = adapted()
    host.add_adapter("second", config())
    host.delete_adapter("default")
    with no_decomposition():
        host.add_adapter("third", config())
    assert_same_tensors(adapter_tensors(host, "third"), adapter_tensors(adapted()))


@pytest.mark.parametrize("frozen", FROZEN)
def test_every_frozen_container_occurs_in_these_tests(frozen):
    names = {name for preset in PRESETS for name in adapter_tensors(adapted(preset))}
    assert any(f".{frozen}." in name for name in names)


def test_a_merged_adapter_cannot_be_deleted():
    host = adapted("pissa", dtype=torch.bfloat16)
    train(host, 2)
    host.add_adapter("second", config())
    before = base_bytes(host)
    host.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        host.delete_adapter("default")
    assert "default" in host.peft_config
    host.delete_adapter("second")  # one that is not merged
    host.unmerge_adapter()
    assert_same_base(before, base_bytes(host))
