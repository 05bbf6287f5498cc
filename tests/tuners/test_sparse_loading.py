"""Saving and loading a masked adapter: the same bits, the mask from the file and never anew, training that goes on."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from helpers import assert_same_base, base_bytes, token_batch
from lifecycle import FAMILIES, IDS, assert_same_tensors, logits, tiny, train, trainable
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.geometry.mask_storage import unpack_units
from sparse_models import (
    BLOCKS,
    SOME,
    STORED,
    STRUCTURES,
    MaskRecomputedError,
    adapted,
    deltas,
    masked,
    names,
    no_new_mask,
    packed_values,
    restored_bytes,
    sparse_config,
    sparse_layers,
    train_masked,
    trained,
)

WEIGHTS = "adapter_model.safetensors"


def assert_same_adapter(loaded, host, adapter: str = "default") -> None:
    assert_same_tensors(packed_values(loaded, adapter), packed_values(host))
    assert torch.equal(logits(loaded), logits(host))


# -- every way of loading ---------------------------------------------------------------------------------------------

SPREAD = [
    (family, dtype, precision, STRUCTURES[(2 * i + j) % 3])
    for i, (dtype, precision) in enumerate(STORED)
    for j, family in enumerate(FAMILIES)
]


@pytest.mark.parametrize(("family", "dtype", "precision", "structure"), SPREAD, ids=names)
def test_every_way_of_loading_gives_the_same_bits_without_a_new_mask(tmp_path, family, dtype, precision, structure):
    base = tiny(family, dtype)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    host = get_peft_model(base, sparse_config(precision=precision, structure=structure))
    train_masked(host, 2)
    host.save_pretrained(tmp_path / "adapter")
    folder, before = tmp_path / "adapter", base_bytes(tiny(family, dtype))
    with no_new_mask():
        for trains in (False, True):
            loaded = PeftModel.from_pretrained(tiny(family, dtype), folder, is_trainable=trains)
            assert_same_adapter(loaded, host)
            assert set(trainable(loaded)) == (set(trainable(host)) if trains else set())
        low = PeftModel.from_pretrained(tiny(family, dtype), folder, low_cpu_mem_usage=True)
        assert_same_adapter(low, host)
        auto = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert_same_adapter(auto, host)
        for low_memory in (False, True):
            loaded.load_adapter(folder, f"other {low_memory}", low_cpu_mem_usage=low_memory)
            loaded.set_adapter(f"other {low_memory}")
            assert_same_adapter(loaded, host, f"other {low_memory}")
    for model in (host, loaded, low, auto):
        assert_same_base(before, restored_bytes(model))


def test_the_guard_against_new_masks_works(tmp_path):
    with no_new_mask():
        with pytest.raises(MaskRecomputedError):
            adapted(mask="low")
        with pytest.raises(AssertionError, match="was called"):
            adapted(mask="principal")
    adapted().save_pretrained(tmp_path)
    reused = PrincipalSparseConfig.from_pretrained(tmp_path)
    with no_new_mask():
        host = get_peft_model(tiny(), reused)  # values may follow
        with pytest.raises(AssertionError, match="was called"):
            logits(host)


def test_blocks_load_too(tmp_path):
    host = trained(dtype=torch.bfloat16, precision="split", structure="block")
    host.save_pretrained(tmp_path)
    with no_new_mask():
        assert_same_adapter(PeftModel.from_pretrained(tiny(dtype=torch.bfloat16, **BLOCKS), tmp_path), host)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_the_file_is_the_same_from_a_written_a_disabled_and_a_merged_model(tmp_path, dtype, precision):
    host = trained(dtype=dtype, precision=precision)
    logits(host)
    host.save_pretrained(tmp_path / "written")
    logits(host)
    with host.disable_adapter():
        host.save_pretrained(tmp_path / "disabled")
    host.merge_adapter()
    host.save_pretrained(tmp_path / "merged")
    files = [load_file(tmp_path / state / WEIGHTS) for state in ("written", "disabled", "merged")]
    for other in files[1:]:
        assert_same_tensors(other, files[0])


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_loading_into_an_existing_adapter_keeps_the_parameter(tmp_path, dtype, precision, written):
    host = trained(dtype=dtype, precision=precision)
    host.save_pretrained(tmp_path)
    other = trained(dtype=dtype, precision=precision, steps=1)
    parameters = trainable(other)
    if written:
        logits(other)
    by = masked(other)
    with no_new_mask():
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(p is parameters[name] for name, p in trainable(other).items()) and len(trainable(other)) == 14
    assert_same_adapter(other, host)
    train(other, 1, by=by)
    train_masked(host, 1)
    assert_same_adapter(other, host)


# -- what is in the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "structure", "dtype"),
    [
        ("~principal", "element", torch.uint8),
        ("random", "element", torch.int32),  # 1 %: 40 bytes of positions and 128 of bits
        ("~principal", "row", torch.uint8),
    ],
    ids=names,
)
@pytest.mark.parametrize(("base_dtype", "precision"), SOME, ids=names)
def test_a_mask_is_stored_as_bits_or_positions_whichever_is_smaller(
    tmp_path, mask, structure, dtype, base_dtype, precision
):
    host = trained("gpt2", base_dtype, mask=mask, structure=structure, precision=precision)
    host.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 3 * 8
    for name, delta in deltas(host).items():
        start = f"base_model.model.{name}.princsparse_delta."
        found = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        value = "master" if precision == "split" else "weight"
        assert set(found) == {value, "entries", "base"}
        assert found[value].dtype == torch.float32 and found[value].shape == (delta.count,)
        assert found["base"].dtype == torch.uint8 and found["base"].shape == (16,)
        d_in, d_out = delta.layout.shape  # Conv1D
        total = d_in * d_out if structure == "element" else d_out
        chosen = delta.count if structure == "element" else delta.count // d_in
        assert found["entries"].dtype == dtype
        assert found["entries"].nbytes == min(4 * chosen, -(-total // 8))
        units = unpack_units(found["entries"], (d_out, d_in) if structure == "element" else (d_out,))
        want = delta.layout.mask().T
        assert torch.equal(units if structure == "element" else units[:, None].expand(d_out, d_in), want)


# -- training goes on -------------------------------------------------------------------------------------------------

WAYS_ON = {
    "torch AdamW": (torch.float32, "fp32", lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)),
    "MaskedAdamW": (torch.bfloat16, "split", lambda ps: MaskedAdamW(ps, lr=1e-2, weight_decay=0.1, moments="bf16")),
    "stochastic": (torch.bfloat16, "bf16-stochastic", lambda ps: MaskedAdamW(ps, lr=1e-2, moments="bf16", seed=5)),
}


@pytest.mark.parametrize("way", WAYS_ON)
@pytest.mark.parametrize("low_memory", [False, True])
def test_training_goes_on_after_loading_as_if_it_had_not_stopped(tmp_path, way, low_memory):
    dtype, precision, build = WAYS_ON[way]
    straight, host = (adapted(dtype=dtype, precision=precision) for _ in range(2))
    train(straight, 5, by=build(list(trainable(straight).values())))
    by = train(host, 2, by=build(list(trainable(host).values())))
    host.save_pretrained(tmp_path)
    torch.save(by.state_dict(), tmp_path / "optimizer.pt")
    loaded = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_memory)
    by = build(list(trainable(loaded).values()))
    by.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(loaded, 3, by=by, first=2)
    assert_same_adapter(loaded, straight)


@pytest.mark.parametrize("way", WAYS_ON)
def test_going_on_without_the_optimizer_state_would_be_seen(way):
    dtype, precision, build = WAYS_ON[way]
    straight, host = (adapted(dtype=dtype, precision=precision) for _ in range(2))
    train(straight, 3, by=build(list(trainable(straight).values())))
    train(host, 2, by=build(list(trainable(host).values())))
    train(host, 1, by=build(list(trainable(host).values())), first=2)
    assert not torch.equal(logits(host), logits(straight))


def trainer(host: PeftModel, folder, optimizer, steps: int) -> Trainer:
    rows = token_batch(128, batch=12, length=8, seed=3)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        logging_strategy="no",
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=host, args=arguments, train_dataset=data, optimizers=(optimizer, None))


@pytest.mark.parametrize("way", ["torch AdamW", "MaskedAdamW"])
def test_trainer_resumes_bit_for_bit(tmp_path, way):
    dtype, precision, build = WAYS_ON[way]
    straight, resumed = (adapted(dtype=dtype, precision=precision) for _ in range(2))
    trainer(straight, tmp_path, build(list(trainable(straight).values())), 4).train()
    parameters = trainable(resumed)
    run = trainer(resumed, tmp_path, build(list(parameters.values())), 4)
    with no_new_mask():
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    assert all(p is parameters[name] for name, p in trainable(resumed).items())
    straight.eval(), resumed.eval()
    assert_same_adapter(resumed, straight)
    halfway = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    last = load_file(tmp_path / "checkpoint-4" / WEIGHTS)
    assert any(not torch.equal(halfway[key], last[key]) for key in last)
    assert_same_base(base_bytes(tiny(dtype=dtype)), restored_bytes(resumed))


# -- other things that travel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_a_module_to_save_trains_and_comes_back(tmp_path, dtype, precision, low_memory):
    host = trained(dtype=dtype, precision=precision, modules_to_save=["lm_head"])
    head = host.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    host.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(
        loaded.base_model.model.lm_head.modules_to_save["default"].weight, head.modules_to_save["default"].weight
    )
    assert_same_adapter(loaded, host)
    assert_same_base(base_bytes(tiny(dtype=dtype)), restored_bytes(loaded))


OPTIONS = {
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "exclude": {"exclude_modules": ["q_proj", "gate_proj"]},
    "regex": {"target_modules": r".*\.0\..*(k|v)_proj"},
    "matched": {"mask": "matched(low & ~principal)", "low_density": 0.3, "seed": 7},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_survive_the_folder(tmp_path, option):
    host = trained(**OPTIONS[option])
    host.save_pretrained(tmp_path)
    with no_new_mask():
        loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert sparse_layers(loaded).keys() == sparse_layers(host).keys()
    assert_same_adapter(loaded, host)
    assert len(sparse_layers(host)) == {"some layers": 2, "exclude": 10, "regex": 2, "matched": 14}[option]


@pytest.mark.parametrize(("dtype", "precision"), STORED, ids=names)
@pytest.mark.parametrize("seed", [0, 1], ids=["same base", "other base"])
def test_a_full_state_dict_round_trip(dtype, precision, seed):
    """With the base's weights in it, a state dict may come from another base: mask and values follow it."""
    host = trained(dtype=dtype, precision=precision)
    state = {key: value.clone() for key, value in host.state_dict().items()}
    other = get_peft_model(tiny(dtype=dtype, seed=seed), sparse_config(precision=precision))
    logits(other)
    with no_new_mask():
        assert not any(other.load_state_dict(state))
    assert_same_adapter(other, host)
    assert_same_tensors(other.state_dict(), state)
    assert_same_base(restored_bytes(host), restored_bytes(other))


def test_a_state_dict_of_another_base_without_values_for_the_adapter_is_refused():
    host, other = trained(), tiny(seed=1)
    before, want = restored_bytes(host), logits(host)
    layers = sparse_layers(host)
    state = {
        f"base_model.model.{key.replace('.weight', '.base_layer.weight') if key[:-7] in layers else key}": value
        for key, value in other.state_dict().items()
    }
    with pytest.raises(ValueError, match="made for a base weight with other bytes"):
        host.load_state_dict(state, strict=False)
    assert_same_base({n: h for n, h in before.items() if n[:-7] in layers}, _of(layers, restored_bytes(host)))
    host.load_state_dict({f"base_model.model.{k}": v for k, v in tiny().state_dict().items()}, strict=False)
    assert torch.equal(logits(host), want)


def _of(layers, digests: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if name.removesuffix(".weight") in layers}


FIRST_USES = {
    "forward": logits,
    "merge": lambda host: (host.merge_adapter(), host.unmerge_adapter()),
    "state dict": lambda host: host.state_dict(),
    "second adapter": lambda host: host.add_adapter("second", sparse_config(mask="low")),
    "train": lambda host: host(input_ids=IDS, labels=IDS).loss.backward(),
}


@pytest.mark.parametrize("how", FIRST_USES)
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_a_config_read_from_a_folder_starts_a_fresh_adapter_at_its_first_use(tmp_path, how, dtype, precision):
    trained(dtype=dtype, precision=precision).save_pretrained(tmp_path)
    fresh = adapted(dtype=dtype, precision=precision)
    reused = PrincipalSparseConfig.from_pretrained(tmp_path)
    reused.inference_mode = False  # PEFT saves every config as one for inference
    with no_new_mask():
        again = get_peft_model(tiny(dtype=dtype), reused)
    FIRST_USES[how](again)
    logits(again)
    assert_same_tensors(packed_values(again), packed_values(fresh))
    again.zero_grad()
    train_masked(again, 2)
    train_masked(fresh, 2)
    assert_same_adapter(again, fresh)
