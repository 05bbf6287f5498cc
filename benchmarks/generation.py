"""Greedy generation of a 135M-shaped model (random weights), off-principal LoRA against PEFT's LoRA.

Inside ``generate`` the projected factors are computed once per call, so a token costs what it costs with LoRA. Runs
are interleaved and each ratio is taken inside a round:

    python benchmarks/generation.py --out benchmarks/results/generation.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _common import environment, paired_ratio, write_result
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from offprincipal_peft import OffPrincipalLoraConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_of(config: Any, dtype: torch.dtype, device: str) -> Any:
    """SmolLM2-135M's shape: 30 layers, hidden 576, 9 heads over 3 key-value heads, intermediate 1536."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(shape)
    return get_peft_model(model.to(device, dtype).eval(), config).eval()


def configs(r: int, k: int) -> dict[str, Any]:
    common: dict[str, Any] = {
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return {
        "peft-lora": LoraConfig(**common),
        "lora": OffPrincipalLoraConfig.preset("lora", **common),
        "offprincipal": OffPrincipalLoraConfig.preset("offprincipal", **common, principal_rank=k),
    }


def timed_generation(model: Any, prompt: torch.Tensor, new_tokens: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if out.shape[1] != prompt.shape[1] + new_tokens:
        raise RuntimeError(f"{new_tokens} new tokens were asked for, {out.shape[1] - prompt.shape[1]} came")
    return seconds


def measure(dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    models = {name: model_of(c, DTYPES[dtype], args.device) for name, c in configs(args.rank, args.k).items()}
    prompt = torch.randint(3, 49152, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(args.device)
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for model in models.values():
        timed_generation(model, prompt, args.new_tokens, args.device)
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(timed_generation(models[name], prompt, args.new_tokens, args.device))
    rows = {}
    for name, s in seconds.items():
        median = sorted(s)[len(s) // 2]
        rows[name] = {
            "median_s": median,
            "tokens_per_s": args.batch * args.new_tokens / median,
            **paired_ratio(s, seconds["peft-lora"]),
        }
    return {"dtype": dtype, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generation.json"))
    args = parser.parse_args()
    cases = []
    for dtype in args.dtypes:
        cases.append(measure(dtype, args))
        print(dtype)
        for name, row in cases[-1]["methods"].items():
            low, high = row["interval"]
            print(f"  {name:14s} {row['tokens_per_s']:8.1f} tokens/s  time {row['ratio']:.3f} [{low:.3f}, {high:.3f}]")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    write_result(args.out, {"settings": settings, "environment": environment(args.device), "cases": cases})


if __name__ == "__main__":
    main()
