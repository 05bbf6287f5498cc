"""Patches of real GRPO runs: is every step restored bit for bit, and how large are the patches?

SmolLM2-135M, 50 GRPO steps each of full fine-tuning (fp32 masters, sent in bf16), off-principal LoRA and principal-
masked sparse fine-tuning on a bf16 base, with a patch at every step. The twin beside the patches knows nothing of them:
at every step a deep copy of the model is merged whole, cast to bf16, and its bytes are hashed with SHA-256, name by
name. Afterwards one checkpoint is brought from step to step by ``apply_patch``, every tenth step is restored from the
chain, and the bytes that lie on disk are hashed the same way. Run:

    python benchmarks/patch_grpo.py --out benchmarks/results/patch_grpo.json
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, write_result
from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerCallback

from offprincipal_peft import PatchCallback
from offprincipal_peft.interop.sparse_patch import PatchChain, apply_patch, bytes_of
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.methods import build_config
from offprincipal_peft.rlvr.models import load_model, load_tokenizer
from offprincipal_peft.rlvr.tasks import load_task
from offprincipal_peft.rlvr.trainers import build_trainer

# name -> method, dtype that is trained on, learning rate
RUNS = {
    "full": ("full", "float32", 5e-6),
    "offprincipal": ("offprincipal", "bfloat16", 1e-4),
    "safe": ("safe", "bfloat16", 5e-6),
}


def content(tensors: Any) -> str:
    """SHA-256 of named tensors, ascending by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors):
        whole = tensor.detach().contiguous()
        found.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        found.update(bytes_of(whole))
    return found.hexdigest()


def on_disk(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return content((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  no mapping


class Twin(TrainerCallback):
    """The merged model's bytes at every step, by merging a copy of all of it."""

    def __init__(self) -> None:
        self.states: dict[int, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._take(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._take(state.global_step, model)

    def _take(self, step: int, model: Any) -> None:
        other = copy.deepcopy(model)
        other = (other.merge_and_unload() if isinstance(other, PeftModel) else other).to(torch.bfloat16)
        values = {id(value): (name, value) for name, value in reversed(list(other.state_dict(keep_vars=True).items()))}
        self.states[step] = content(values.values())


def measure(name: str, steps: int, folder: Path) -> dict[str, Any]:
    method, dtype, rate = RUNS[name]
    config = TrialConfig(
        method=method,
        model="smollm2-135m",
        task="sums",
        dtype=dtype,
        device="cpu",
        steps=steps,
        learning_rate=rate,
        prompts_per_step=2,
        group_size=4,
        max_completion_length=8,
    )
    torch.manual_seed(0)
    model = load_model(config.model, config.dtype, torch.device("cpu"))
    task = load_task(config.task, {"train": 256, "validation": 8, "test": 8})
    twin = Twin()
    patches = PatchCallback(folder / "chain", anchor_every=25, dtype=torch.bfloat16)
    begin = time.perf_counter()
    trainer = build_trainer(
        config, model, load_tokenizer(config.model), task, build_config(config), str(folder / "run"), [twin, patches]
    )
    trainer.train()
    trained = time.perf_counter() - begin
    chain = PatchChain.read(folder / "chain")
    chain.verify()
    chain.restore(folder / "work", 0)
    exact = [on_disk(folder / "work") == twin.states[0]]
    for info in chain.patches:
        apply_patch(folder / "work", info.path)
        exact.append(on_disk(folder / "work") == twin.states[info.step])
    for step in range(10, steps + 1, 10):
        chain.restore(folder / "restored", step)
        exact.append(on_disk(folder / "restored") == twin.states[step])
        shutil.rmtree(folder / "restored")
    dense = (folder / "work" / "model.safetensors").stat().st_size
    # the positions of masks are sent by the first patch after an anchor; they are no part of what later ones say
    by_kind = {
        kind: [row for row in patches.history if row["kind"] == kind and row["step"]] for kind in ("sparse", "values")
    }
    return {
        "method": method,
        "dtype": dtype,
        "learning_rate": rate,
        "checks": len(exact),
        "restored_bit_for_bit": sum(exact),
        "dense_bytes": dense,
        "patches": {kind: sizes(rows, dense) for kind, rows in by_kind.items() if rows},
        "seconds_of_a_patch": median([row["seconds"] for row in patches.history[1:]]),
        "seconds_of_training": trained,
    }


def sizes(rows: list[dict[str, Any]], dense: int) -> dict[str, Any]:
    """Of some patches beside a checkpoint of ``dense`` bytes."""
    ratios = [row["bytes"] / dense / row["density"] for row in rows if row["entries"]]
    return {
        "count": len(rows),
        "density": [row["density"] for row in rows],
        "bytes": [row["bytes"] for row in rows],
        "size_over_dense_over_density_largest": max(ratios),
        "size_over_dense_over_density_median": median(ratios),
        "density_median": median([row["density"] for row in rows]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            found = results[name] = measure(name, options.steps, Path(folder))
        summary = {k: {a: b for a, b in v.items() if not isinstance(b, list)} for k, v in found["patches"].items()}
        print(name, found["restored_bit_for_bit"], "of", found["checks"], summary, found["seconds_of_a_patch"])
    if options.out:
        settings = {"steps": options.steps, "model": "smollm2-135m", "sequences_per_step": 8}
        write_result(options.out, {"settings": settings, "results": results, "environment": environment("cpu")})


if __name__ == "__main__":
    main()
