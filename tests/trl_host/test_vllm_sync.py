"""What TRL's own code sends to vLLM: the merged weights, under the checkpoint's names, without a trace in the base."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, PreTrainedModel

from helpers import assert_same_base, base_bytes
from trainers import (
    BF16,
    CASES,
    Case,
    adapter_state,
    assert_same_state,
    each,
    merged_parameters,
    pretrained,
    train_by_hand,
)
from trl_host.engine import FLAVOURS, Engine, client, generation, install

FOREIGN = ("lora_", "princsparse_", "base_layer", "modules_to_save", "original_module", "default", "base_model")
MIXED = [BF16[0], BF16[3], BF16[4], BF16[5], CASES[2], CASES[6]]
PEFT_LORA = Case(
    "peft",
    lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    torch.bfloat16,
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    install(monkeypatch, made)
    return made


def checkpoint(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What vLLM would read from the model's folder; a tied weight is in it once."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_sends_the_merged_model(
    engine: Engine, model: Any, bare: PreTrainedModel, stored: dict[str, Tensor], mode: str = "colocate"
) -> None:
    own, state = base_bytes(bare), adapter_state(model)
    merged = merged_parameters(model)
    generation(model, mode).sync_weights()
    sent = engine.last()
    assert sent.keys() == stored.keys()
    assert not [name for name in sent if any(part in name for part in FOREIGN)]
    assert_same_state(sent, merged)
    assert any(not torch.equal(sent[name], stored[name]) for name in sent), "nothing of the update was sent"
    assert_same_base(own, base_bytes(model))
    assert_same_state(adapter_state(model), state)


@pytest.mark.parametrize("mode", FLAVOURS)
@each([CASES[0], CASES[6], *BF16[1:6]])
def test_the_merged_weights_under_the_checkpoints_names(case: Case, mode: str, engine: Engine, tmp_path: Path) -> None:
    bare = case.base()
    assert_sends_the_merged_model(engine, pretrained(case), bare, checkpoint(bare, tmp_path), mode)


@each(MIXED)
@pytest.mark.parametrize("family", ["gpt2", "tied"])
def test_transposed_and_tied_weights(family: str, case: Case, engine: Engine, tmp_path: Path) -> None:
    bare = case.base("gpt2") if family == "gpt2" else case.base(tie=True)
    model = peft.get_peft_model(case.base("gpt2") if family == "gpt2" else case.base(tie=True), case.config())
    train_by_hand(case, model)
    assert_sends_the_merged_model(engine, model, bare, checkpoint(bare, tmp_path))
    assert ("lm_head.weight" in engine.last()) == (family == "gpt2")


@each(MIXED)
def test_modules_that_are_saved_whole(case: Case, engine: Engine, tmp_path: Path) -> None:
    model = pretrained(case, modules_to_save=["lm_head", "norm"])
    bare = case.base()
    assert_sends_the_merged_model(engine, model, bare, checkpoint(bare, tmp_path), "server")
    sent = engine.last()
    for name in ("lm_head.weight", "model.norm.weight"):
        assert not torch.equal(sent[name], bare.get_parameter(name)), "the trained copy is what counts"


@each(MIXED)
def test_experts_in_a_module_whose_name_resembles_ours(case: Case, engine: Engine) -> None:
    """Granite's experts lie in `block_sparse_moe`; TRL drops every name that contains the tuner's prefix."""
    bare = granite_moe(case.dtype)
    model = peft.get_peft_model(granite_moe(case.dtype), case.config(target_modules=["q_proj", "v_proj"]))
    train_by_hand(case, model)
    stored = dict(bare.named_parameters())  # its saved files name the experts as older releases did
    assert_sends_the_merged_model(engine, model, bare, stored)
    assert any("block_sparse_moe" in name for name in engine.last())


@each(MIXED)
def test_a_reference_adapter_is_not_sent(case: Case, engine: Engine, tmp_path: Path) -> None:
    """TRL adds one to a ready model."""
    model = pretrained(case)
    model.add_adapter("ref", model.peft_config["default"])
    bare = case.base()
    assert_sends_the_merged_model(engine, model, bare, checkpoint(bare, tmp_path))


@each([*CASES[1:], *BF16[:6]])
def test_twenty_syncs_leave_nothing_behind(case: Case, engine: Engine) -> None:
    model = pretrained(case)
    own, state = base_bytes(case.base()), adapter_state(model)
    sync = generation(model).sync_weights
    for _ in range(20):
        sync()
    first = dict(engine.syncs[0])
    for sent in engine.syncs[1:]:
        assert_same_state(dict(sent), first)
    assert_same_base(own, base_bytes(model))
    assert_same_state(adapter_state(model), state)
    assert_same_base(own, base_bytes(model.unload()))


@each(CASES)
@pytest.mark.parametrize("moment", ["between steps", "before backward"])
def test_training_goes_on_as_without_a_sync(moment: str, case: Case, engine: Engine) -> None:
    alone, synced = case.adapted(), case.adapted()
    train_by_hand(case, alone, 3)
    hook = generation(synced).sync_weights
    if moment == "between steps":
        synced.register_forward_pre_hook(lambda *_: hook())
    else:  # TRL scores with gradients and may sync before the backward of an accumulated step
        synced.register_forward_hook(lambda *_: hook())
    train_by_hand(case, synced, 3)
    assert len(engine.syncs) == 3
    assert_same_state(adapter_state(synced), adapter_state(alone))


def test_the_measure_sees_peft_lora_drift(engine: Engine) -> None:
    """It subtracts in bf16 what it added: the base of the next sync is another one."""
    model = pretrained(PEFT_LORA)
    before = base_bytes(model)
    sync = generation(model).sync_weights
    for _ in range(20):
        sync()
    with pytest.raises(AssertionError, match=r"changed: model\.layers\.0"):
        assert_same_base(before, base_bytes(model))
    assert not torch.equal(*(dict(engine.syncs[i])["model.layers.0.mlp.up_proj.weight"] for i in (0, -1)))


@pytest.mark.xfail(
    raises=AssertionError, reason="TRL 1.16 unmerges when its generator ends, before vLLM copies its last pack"
)
@pytest.mark.parametrize("case", [PEFT_LORA, CASES[0], CASES[5]], ids=str)
def test_a_transfer_that_copies_at_the_end(case: Case, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's packed transfer does with its last gigabyte; every method that unmerges in place is too early.

    An unmerge into other memory would serve it, and give a backward that is still to come the merged weights.
    """
    model = pretrained(case)
    merged = merged_parameters(model)
    synced = generation(model, "server")
    synced.vllm_client = client(monkeypatch, engine, send=list)
    synced.sync_weights()
    assert_same_state(engine.last(), merged)


def granite_moe(dtype: torch.dtype) -> PreTrainedModel:
    config = GraniteMoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GraniteMoeForCausalLM(config).to(dtype).eval()
