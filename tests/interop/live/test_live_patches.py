"""Patches of a model in training: every step restored bit for bit, the run itself unchanged, a model that follows."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

import grpo
import quantized
from lifecycle import config, tiny
from offprincipal_peft import PatchCallback
from offprincipal_peft.interop.sparse_patch import (
    PatchChain,
    PatchError,
    PatchFile,
    PatchFollower,
    PatchRecorder,
)
from sparse_models import sparse_config

BF16, F32 = torch.bfloat16, torch.float32
ROOT = Path(__file__).resolve().parents[3]


def merged(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The slow twin: a deep copy, merged whole, cast and saved as a checkpoint."""
    other: Any = copy.deepcopy(model)
    if isinstance(other, PeftModel):
        other = other.merge_and_unload()
    if dtype is not None:
        other = other.to(dtype)
    other.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        if first[name].dim()
        else torch.equal(first[name], second[name])
        for name in first
    )


CASES: dict[str, tuple[Any, torch.dtype]] = {
    "offprincipal": (lambda: config("offprincipal"), BF16),
    "pissa": (lambda: config("pissa"), BF16),
    "offprincipal-fp32": (lambda: config("offprincipal"), F32),
    "sparse": (sparse_config, BF16),
    "split": (lambda: sparse_config(precision="split"), BF16),
    "lora": (lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), BF16),
    "oft": (lambda: OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"], task_type="CAUSAL_LM"), F32),
    "head": (
        lambda: LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
        BF16,
    ),
    "full": (None, BF16),
}


def model_for(name: str, seed: int = 0) -> nn.Module:
    make, dtype = CASES[name]
    torch.manual_seed(seed)
    base = tiny("llama", dtype)
    return base if make is None else get_peft_model(base, make())


def nudge(model: nn.Module, seed: int) -> None:
    """A step of training: every trained parameter moves, by a size at which bf16 keeps many entries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * 1e-3).to(parameter.dtype))


@pytest.mark.parametrize("name", [case for case in CASES if case != "split"])
def test_every_step_is_the_merged_checkpoint(tmp_path: Path, name: str) -> None:
    model = model_for(name)
    recorder = PatchRecorder(model, tmp_path / "chain", anchor_every=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {}
    for step in range(6):
        if step:
            nudge(model, step)
            before = {key: value.clone() for key, value in model.state_dict().items()}
        recorder.record(step)
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())  # nothing is left behind
        expected[step] = merged(model, tmp_path / f"merged-{step}")
    chain = PatchChain.read(tmp_path / "chain")
    chain.verify()
    assert chain.steps == list(range(6)) and [info.step for info in chain.anchors] == [0, 3]
    for step, tensors in expected.items():
        chain.restore(tmp_path / f"restored-{step}", step)
        assert same(load_file(tmp_path / f"restored-{step}" / "model.safetensors"), tensors)
        assert (tmp_path / f"restored-{step}" / "config.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "restored-5", dtype="auto")
    assert same(merged(loaded, tmp_path / "again"), expected[5])


def test_masters_in_fp32_are_sent_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("llama", F32)
    recorder = PatchRecorder(model, tmp_path / "chain", dtype=BF16)
    recorder.record(0)
    nudge(model, 1)
    info = recorder.record(1)
    assert 0 < info.density < 1
    PatchChain.read(tmp_path / "chain").restore(tmp_path / "restored")
    assert same(load_file(tmp_path / "restored" / "model.safetensors"), merged(model, tmp_path / "m", BF16))


def test_positions_of_masks_are_sent_once(tmp_path: Path) -> None:
    model = model_for("sparse")
    recorder = PatchRecorder(model, tmp_path, anchor_every=3)
    kinds = [recorder.record(0).kind]
    for step in range(1, 7):
        nudge(model, step)
        kinds.append(recorder.record(step).kind)
    # after the anchor at step 3 a chain may begin, so that its next patch has the positions again
    assert kinds == ["full", "sparse", "values", "values", "sparse", "values", "values"]
    chain = PatchChain.read(tmp_path)
    first, second = chain.patches[:2]
    entries = sum(layer.delta("default").count for layer in model.modules() if hasattr(layer, "princsparse_delta"))
    assert first.count == second.count == entries
    assert second.indices_of == first.digest
    # 2 bytes an entry and a header, against 6
    assert second.nbytes - 2 * entries < 8_000 < first.nbytes - 2 * entries


def test_a_step_that_changes_little_is_sent_as_changed_entries(tmp_path: Path) -> None:
    model = model_for("sparse")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    nudge(model, 1)
    recorder.record(1)
    with torch.no_grad():
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        first[:3] += 1.0
    info = recorder.record(2)
    assert (info.kind, info.count) == ("sparse", 3)
    PatchChain.read(tmp_path).restore(tmp_path / "restored")
    assert same(load_file(tmp_path / "restored" / "model.safetensors"), merged(model, tmp_path / "m"))


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("name", ["offprincipal", "element"])
def test_a_quantised_base_is_sent_as_the_float_model_that_a_merge_gives(tmp_path: Path, kind: str, name: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(quantized.quantized(kind, BF16), quantized.ADAPTERS[name]())
    recorder = PatchRecorder(model, tmp_path / "chain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recorder.record(0)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    nudge(model, 1)
    info = recorder.record(1)
    PatchChain.read(tmp_path / "chain").restore(tmp_path / "restored")
    twin: Any = get_peft_model(quantized.quantized(kind, BF16), quantized.ADAPTERS[name]())
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    expected = {key: value.clone() for key, value in twin.merge_and_unload().state_dict().items()}
    assert same(load_file(tmp_path / "restored" / "model.safetensors"), expected)
    assert 0 < info.density < 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype="auto")
    assert loaded.dtype == BF16 and not hasattr(loaded.config, "quantization_config")


def test_a_quantised_layer_without_an_adapter_is_refused(tmp_path: Path) -> None:
    some = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(PatchError, match="is quantised and has no adapter"):
        PatchRecorder(get_peft_model(quantized.quantized("nf4"), some), tmp_path)


# ---- a real trainer


class Snapshots(TrainerCallback):
    """Merged checkpoints of every step, the slow way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        merged(model, self.folder / f"step-{state.global_step}")


@pytest.mark.parametrize("name", ["offprincipal", "sparse", "full"])
def test_grpo_steps_are_restored_bit_for_bit_and_the_run_is_the_same(tmp_path: Path, name: str) -> None:
    weights, beta = {}, 0.0 if name == "full" else 0.1  # a reference model would be loaded from a hub
    for sync in (False, True):
        model = model_for(name)
        trainer = grpo.trainer_for(model, tmp_path / f"run-{sync}", steps=4, learning_rate=1e-4, beta=beta)
        if sync:
            callback = PatchCallback(tmp_path / "chain", every=1, anchor_every=2)
            trainer.add_callback(callback)
            trainer.add_callback(Snapshots(tmp_path))
        trainer.train()
        weights[sync] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        logged = [entry for entry in trainer.state.log_history if "patch/bytes" in entry]
    assert all(torch.equal(value, weights[True][key]) for key, value in weights[False].items())
    assert [row["step"] for row in callback.history] == [0, 1, 2, 3, 4]
    assert [entry["patch/bytes"] for entry in logged] == [row["bytes"] for row in callback.history]
    chain = PatchChain.read(tmp_path / "chain")
    for step in range(1, 5):
        chain.restore(tmp_path / f"restored-{step}", step)
        found = load_file(tmp_path / f"restored-{step}" / "model.safetensors")
        assert same(found, load_file(tmp_path / f"step-{step}" / "model.safetensors"))


def test_the_last_step_is_sent_whatever_the_interval(tmp_path: Path) -> None:
    trainer = grpo.trainer_for(model_for("offprincipal"), tmp_path / "run", steps=5)
    callback = PatchCallback(tmp_path / "chain", every=3)
    trainer.add_callback(callback)
    trainer.train()
    assert [row["step"] for row in callback.history] == [0, 3, 5]


# ---- following


def test_a_model_follows(tmp_path: Path) -> None:
    model = model_for("offprincipal")
    recorder = PatchRecorder(model, tmp_path / "chain")
    recorder.record(0)
    PatchChain.read(tmp_path / "chain").restore(tmp_path / "start")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype="auto").eval()
    follower = PatchFollower(served, tmp_path / "chain")
    assert follower.poll() == 0 and follower.poll() is None
    ids = torch.arange(12).view(2, 6)
    for step in range(1, 6):
        nudge(model, step)
        info = recorder.record(step)
        if step == 2:
            continue  # two patches at once are taken at the next look
        assert follower.poll() == step and follower.state == info.result
        twin = copy.deepcopy(model).merge_and_unload().eval()
        assert torch.equal(served(ids).logits, twin(ids).logits)


def test_a_follower_in_no_state_of_the_chain_takes_the_anchor(tmp_path: Path) -> None:
    model = model_for("offprincipal")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    nudge(model, 1)
    info = recorder.record(1)
    torch.manual_seed(7)
    follower = PatchFollower(tiny("llama", BF16), tmp_path)
    assert follower.poll() == 1 and follower.state == info.result


def test_a_damaged_patch_leaves_the_followed_model_as_it_was(tmp_path: Path) -> None:
    model = model_for("offprincipal")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    follower = PatchFollower(copy.deepcopy(model).merge_and_unload(), tmp_path)
    follower.poll()
    state = follower.state
    nudge(model, 1)
    path = recorder.record(1).path
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(PatchError, match="is damaged"):
        follower.poll()
    assert follower.state == state and follower.step == 0
    data[-5] ^= 4
    path.write_bytes(data)
    assert follower.poll() == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """The example server on a chain that has its first anchor; a function that asks it."""
    model = model_for("offprincipal")
    recorder = PatchRecorder(model, tmp_path / "chain")
    recorder.record(0)
    command = [sys.executable, str(ROOT / "examples" / "patch_server.py"), str(tmp_path / "chain"), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--interval", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        address = None
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                address = found.group()
                break
        assert address is not None, "the server ended before it served"

        def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=60) as answer:
                return json.load(answer)

        yield model, recorder, ask
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def test_the_example_server_answers_with_the_logits_of_each_step(server: Any) -> None:
    model, recorder, ask = server
    ids = [[1, 5, 9, 2], [3, 3, 8, 7]]
    for step in range(3):
        if step:
            nudge(model, step)
            recorder.record(step)
        for _ in range(600):
            if ask("/state")["step"] == step:
                break
            time.sleep(0.1)
        answer = ask("/logits", {"input_ids": ids})
        assert answer["step"] == step
        twin = copy.deepcopy(model).merge_and_unload().eval()
        with torch.no_grad():
            expected = twin(torch.tensor(ids)).logits
        assert torch.equal(torch.tensor(answer["logits"]), expected.float())
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask("/logits", {"ids": ids})


# ---- refusals


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    prompts = get_peft_model(tiny("llama", F32), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(PatchError, match="changes no weight"):
        PatchRecorder(prompts, tmp_path / "a")
    offloaded = tiny("llama", F32)
    offloaded.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(PatchError, match="meta tensor"):
        PatchRecorder(offloaded, tmp_path / "b")
    with pytest.raises(PatchError, match="anchor_every must not be negative"):
        PatchRecorder(tiny("llama", F32), tmp_path / "c", anchor_every=-1)
    recorder = PatchRecorder(model_for("offprincipal"), tmp_path / "d")
    recorder.record(4)
    with pytest.raises(PatchError, match="step 4 does not come after step 4"):
        recorder.record(4)
    with pytest.raises(PatchError, match="holds patches already"):
        PatchRecorder(model_for("offprincipal"), tmp_path / "d")
    with pytest.raises(ValueError, match="every=0"):
        PatchCallback(tmp_path / "e", every=0)


def test_a_frozen_tensor_that_changes_is_told(tmp_path: Path) -> None:
    model = model_for("offprincipal")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1.0)
    with pytest.raises(PatchError, match=r"model.norm.weight changed though it is frozen"):
        recorder.record(1)
    assert PatchChain.read(tmp_path).steps == [0]


def test_a_patch_that_was_not_written_is_not_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for("sparse")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    nudge(model, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            recorder.record(1)
    assert PatchChain.read(tmp_path).steps == [0]
    recorder.record(1)
    PatchChain.read(tmp_path).restore(tmp_path / "restored")
    assert same(load_file(tmp_path / "restored" / "model.safetensors"), merged(model, tmp_path / "m"))


def test_an_adapter_on_a_tied_weight_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(PatchError, match="lm_head shares its weight"):
        PatchRecorder(model, tmp_path)


def test_models_that_are_saved_under_other_names_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(PatchError, match="saved under other names"):
        PatchRecorder(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)), tmp_path)


def test_patches_of_the_recorder_are_patch_files(tmp_path: Path) -> None:
    model = model_for("full")
    recorder = PatchRecorder(model, tmp_path)
    recorder.record(0)
    nudge(model, 1)
    with PatchFile(recorder.record(1).path) as patch:
        patch.check_digest()
        tensors = load_file(patch.info.path)
    name = patch.names[0]
    assert tensors[f"{name}.indices"].dtype == torch.int32
    assert torch.equal(model.state_dict()[name].view(-1)[tensors[f"{name}.indices"].long()], tensors[f"{name}.values"])
