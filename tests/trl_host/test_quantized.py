"""GRPO steps of TRL's trainer on nf4 and int8 bases: what moves, what stays, resuming, merging afterwards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from grpo import trainer_for
from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import config, off_layers, trainable
from offprincipal_peft.tuners.base_weight import DequantizedLinear
from quantized import KINDS, by_bitsandbytes, quantized, quantized_layers
from sparse_models import no_new_mask, sparse_config, sparse_layers
from trainers import adapter_state, assert_same_state, bits, logged, optimizer_state

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
ADAPTERS: dict[str, Any] = {
    "plain": lambda: config("lora"),
    "difference": lambda: config("pissa"),
    "projected": lambda: config("offprincipal"),
    "sparse": sparse_config,
    "rows": lambda: sparse_config(mask="low", low_density=0.3, structure="row"),
}
# every adapter on one kind of base, one of each method on the others
CASES = [("nf4", name) for name in ADAPTERS]
CASES += [(kind, name) for kind in KINDS[1:] for name in ("projected", "sparse")]
STEPS = 3


def grpo(model: Any, folder: Path, peft_config: PeftConfig | None = None, **options: Any) -> GRPOTrainer:
    return trainer_for(model, folder, peft_config, steps=STEPS, **options)


def updates(host: PeftModel) -> dict[str, Tensor]:
    """dW (d_out, d_in), fp32, by the layer's name in the bare model."""
    if any("lora_" in name for name, _ in host.named_parameters()):
        found = {layer.geometry["default"].request.name: layer for layer in off_layers(host)}
    else:
        found = dict(sparse_layers(host))
    return {name: layer.get_delta_weight("default").detach().float() for name, layer in found.items()}


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_steps_train_the_adapter_alone(kind: str, adapter: str, tmp_path: Path) -> None:
    base = quantized(kind)
    before = base_bytes(base)
    codes = {name: bits(layer.weight.data).clone() for name, layer in quantized_layers(base).items()}
    trainer = grpo(base, tmp_path, ADAPTERS[adapter]())
    start = adapter_state(trainer.model)
    trainer.train()

    for key in ("loss", "reward", "reward_std", "grad_norm"):
        values = logged(trainer, key)
        assert len(values) == STEPS and all(map(math.isfinite, values)), (key, values)
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0 and all(0 < value < 1 for value in kl[1:]), kl  # seen: 1.6e-3 to 0.055

    end = adapter_state(trainer.model)
    trained = [n.removeprefix("base_model.model.") for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trained) >= 14
    for name, value in end.items():
        moved = not torch.equal(bits(value), bits(start[name].to(value.dtype)))
        assert moved == (name.removeprefix("base_model.model.") in trained), name
        assert value.isfinite().all() if value.is_floating_point() else True, name
    assert all(float(delta.norm()) > 0 for delta in updates(trainer.model).values())

    assert_same_base(before, base_bytes(trainer.model))
    bare = trainer.model.unload()
    assert_same_base(before, base_bytes(bare))
    for name, layer in quantized_layers(bare).items():
        assert layer.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
        assert torch.equal(bits(layer.weight.data), codes[name]), name


def widened(trainer: GRPOTrainer) -> GRPOTrainer:
    """In fp32 again, which a run that is to be resumed exactly has to train in: see the test after next."""
    for parameter in trainable(trainer.model).values():
        parameter.data = parameter.data.float()
    return trainer


@pytest.mark.parametrize("adapter", ["projected", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_an_uninterrupted_one(kind: str, adapter: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    want = widened(grpo(quantized(kind), tmp_path, ADAPTERS[adapter](), **options))
    want.train()
    torch.manual_seed(99)  # everything is new, as in another process
    got = widened(grpo(quantized(kind), tmp_path, ADAPTERS[adapter](), **options))
    with no_new_mask():
        got.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert got.state.global_step == STEPS
    assert_same_state(adapter_state(got.model), adapter_state(want.model))
    assert_same_state(optimizer_state(got), optimizer_state(want))
    for key in ("loss", "reward", "kl"):
        assert logged(got, key) == logged(want, key), key
    assert_same_base(base_bytes(quantized(kind)), base_bytes(got.model.unload()))


@pytest.mark.parametrize("adapter", ["peft", "projected", "sparse"])
def test_as_trl_left_it_a_resumed_run_has_the_checkpoints_values_but_not_their_dtype(
    adapter: str, tmp_path: Path
) -> None:
    """TRL casts what trains to bf16 when a trainer is made, PEFT what it loads to fp32: PEFT's LoRA does not repeat
    its run either. A sparse update is fp32 in both, and does."""
    options = {"save_strategy": "steps", "save_steps": 1}
    make = ADAPTERS.get(adapter, lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    want = grpo(quantized("nf4"), tmp_path, make(), **options)
    want.train()
    got = grpo(quantized("nf4"), tmp_path, make(), **options)
    begin = AtBegin()
    got.add_callback(begin)
    got.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in trainable(got.model).items()}
    assert len(trained) >= 14 and trained.keys() <= saved.keys()
    for name in trained:
        assert torch.equal(begin.values[name].to(saved[name].dtype), saved[name]), name
    kinds = [{p.dtype for p in trainable(trainer.model).values()} for trainer in (want, got)]
    assert kinds == [{torch.float32 if adapter == "sparse" else torch.bfloat16}, {torch.float32}]
    same = logged(want, "loss")[1:] == logged(got, "loss")[1:]
    assert same == (adapter == "sparse")
    if adapter == "sparse":
        assert_same_state(adapter_state(got.model), adapter_state(want.model))


class AtBegin(TrainerCallback):
    """The adapter's values when training begins or goes on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values = {name.replace(".default", ""): p.detach().clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize("adapter", ["difference", "projected", "sparse"])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_merging_what_was_trained(kind: str, adapter: str, tmp_path: Path) -> None:
    """Each layer becomes a float one: bitsandbytes' dequantised weight plus the update, and nothing else changes."""
    trainer = grpo(quantized(kind), tmp_path, ADAPTERS[adapter]())
    trainer.train()
    deltas, bare = updates(trainer.model), quantized(kind)
    before = base_bytes(bare)
    merged = trainer.model.merge_and_unload()
    assert len(deltas) == 14
    for name, delta in deltas.items():
        layer, weight = merged.get_submodule(name), by_bitsandbytes(bare.get_submodule(name)).float()
        assert type(layer) is DequantizedLinear and layer.weight.dtype == torch.float32
        # seen: 1.7e-3, since the factors' product is shown in TRL's bf16; 2.6e-7 for the sparse one
        assert relative_error(layer.weight - weight, delta) < (5e-3 if adapter != "sparse" else 1e-5), name
        assert float(delta.norm()) > 1e-3 * float(weight.norm())  # seen: 0.096 to 0.19
    after = base_bytes(merged)
    same = [name for name in before if name.rpartition(".")[0] not in deltas and name in after]
    assert "model.embed_tokens.weight" in same and all(after[name] == before[name] for name in same)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_a_saved_policy_is_the_trained_one(kind: str, tmp_path: Path) -> None:
    for adapter in ("projected", "sparse"):
        folder = tmp_path / adapter
        trainer = grpo(quantized(kind), folder, ADAPTERS[adapter]())
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        with no_new_mask():
            loaded = PeftModel.from_pretrained(quantized(kind), folder / "adapter")
        for name, delta in updates(trainer.model).items():
            assert (
                relative_error(updates(loaded)[name], delta) < 4e-3
            )  # TRL's values are bf16, their product is rounded
        with trainer.model.disable_adapter(), torch.no_grad():
            ids = torch.arange(3, 15)[None]
            bare = quantized(kind)
            assert torch.equal(trainer.model.train()(input_ids=ids).logits, bare(input_ids=ids).logits)


@pytest.mark.parametrize("adapter", ["projected", "sparse"])
def test_a_ready_model_keeps_its_start_as_the_reference(adapter: str, tmp_path: Path) -> None:
    host = get_peft_model(quantized("nf4 double"), ADAPTERS[adapter]())
    trainer = grpo(host, tmp_path)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 0
    assert_same_base(base_bytes(quantized("nf4 double")), base_bytes(host.unload()))
