"""What GeometryCallback costs: its time beside the time of the training steps between two observations.

A model with random weights of SmolLM2-135M's shapes takes GRPO-like steps (a group of completions is sampled without
gradients, then one forward, backward and AdamW step on them). Each round takes one step and one observation and gives
one ratio, observation / (interval x step), so that a drift of the machine's speed cancels. What is paid once (the
bases before the first step, the final report) is given in seconds. Run:

    python benchmarks/geometry_callback.py --out benchmarks/results/geometry_callback.json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from offprincipal_peft import MaskedAdamW, OffPrincipalLoraConfig, PrincipalSparseConfig
from offprincipal_peft.rlvr.callbacks import DEFAULT_INTERVAL, GeometryCallback

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def adapters(rank: int) -> dict[str, Callable[[], Any]]:
    common: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    sparse: dict[str, Any] = {"mask": "random", "random_density": 0.05, "task_type": "CAUSAL_LM"}
    return {
        "lora": lambda: LoraConfig(**common),
        "dora": lambda: LoraConfig(**common, use_dora=True),
        "offprincipal": lambda: OffPrincipalLoraConfig.preset("offprincipal", **common, principal_rank=1 / 16),
        "sparse": lambda: PrincipalSparseConfig(**sparse),
        "full": lambda: None,
    }


def build(method: str, args: argparse.Namespace, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.model], tie_word_embeddings=True, pad_token_id=0)
    model = LlamaForCausalLM(config).to(args.device, dtype)
    adapter = adapters(args.rank)[method]()
    return model if adapter is None else get_peft_model(model, adapter)


def grpo_like_step(model: Any, args: argparse.Namespace) -> Callable[[], None]:
    """Sampling, then a policy gradient with advantages that sum to zero over the group."""
    vocabulary = model.config.vocab_size
    optimizer = MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    advantages = torch.linspace(-1, 1, args.rollouts, device=args.device)

    def step() -> None:
        prompts = torch.randint(3, vocabulary, (args.rollouts, args.prompt), generator=generator).to(args.device)
        model.eval()
        length: dict[str, int] = {"max_new_tokens": args.completion, "min_new_tokens": args.completion}
        with torch.no_grad():
            ids = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, **length)
        model.train()
        logits = model(input_ids=ids).logits[:, args.prompt - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[:, args.prompt :, None])[..., 0]
        (-(advantages[:, None] * chosen).mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(method: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    model = build(method, args, DTYPES[dtype])
    step = grpo_like_step(model, args)
    callback = GeometryCallback(interval=1, final=args.final)
    arguments = TrainingArguments("unused", report_to="none", use_cpu=args.device == "cpu")
    state, control = TrainerState(), TrainerControl()
    setup = timed(lambda: callback.on_train_begin(arguments, state, control, model=model), args.device)

    def observe() -> None:
        state.global_step += 1
        callback.on_step_end(arguments, state, control, model=model)

    for _ in range(args.warmup):
        step()
        observe()
    steps: list[float] = []
    observations: list[float] = []
    order = random.Random(0)
    for _ in range(args.rounds):
        parts = [(steps, step), (observations, observe)]
        order.shuffle(parts)
        for times, work in parts:
            times.append(timed(work, args.device))
    final = timed(lambda: callback.on_train_end(arguments, state, control, model=model), args.device)
    amortised = paired_ratio(observations, [DEFAULT_INTERVAL * s for s in steps])
    return {
        "method": method,
        "dtype": dtype,
        "layers": len(callback.layer_history[-1]["layers"]),
        "step_s": median(steps),
        "observation_s": median(observations),
        "amortised": amortised,
        "setup_s": setup,
        "end_s": final,
        "update_norm": callback.history[-1]["geometry/update_norm"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(adapters(1)), choices=list(adapters(1)))
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=18)
    parser.add_argument("--completion", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--final", action="store_true", help="time the final report too (minutes on two cores)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/geometry_callback.json"))
    args = parser.parse_args()
    cases = []
    for dtype in args.dtypes:
        for method in args.methods:
            cases.append(measure(method, dtype, args))
            row = cases[-1]
            low, high = row["amortised"]["interval"]
            print(
                f"{method:13s} {dtype} step {row['step_s']:.2f} s, observation {row['observation_s']:.3f} s, every "
                f"{DEFAULT_INTERVAL} steps {100 * row['amortised']['ratio']:.2f} % "
                f"[{100 * low:.2f}, {100 * high:.2f}], bases {row['setup_s']:.1f} s, end {row['end_s']:.1f} s"
            )
    settings = {k: v for k, v in vars(args).items() if k != "out"} | {"interval": DEFAULT_INTERVAL}
    write_result(args.out, {"settings": settings, "environment": environment(args.device), "cases": cases})


if __name__ == "__main__":
    main()
