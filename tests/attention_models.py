"""Tiny models with random weights in fp64, one for each way in which attention blocks lay out their heads."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from offprincipal_peft.geometry import AttentionLayout, Intervention, find_layouts, haar_rotation, hadamard_rotation

VOCAB = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, Any] = {
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, COMMON),
    "llama, one head each, biases": (LlamaConfig, COMMON | {"num_key_value_heads": 4, "attention_bias": True}),
    "llama, one key head": (LlamaConfig, COMMON | {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, COMMON),
    "qwen3": (Qwen3Config, COMMON | {"head_dim": 8}),
    "mistral, wide heads": (MistralConfig, COMMON | {"head_dim": 16}),
    "gemma": (GemmaConfig, COMMON | {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (Gemma2Config, COMMON | {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, COMMON | {"head_dim": 16}),
    "gpt2": (GPT2Config, GPT2),
    "olmo2": (Olmo2Config, COMMON),
    "phi3": (Phi3Config, COMMON),
    "gpt-oss, sinks": (GptOssConfig, COMMON | EXPERTS),
}
ROTARY = [name for name in CONFIGS if name != "gpt2"]


def model_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Every parameter is drawn, norms about 1: zeros and ones would hide a bias or a gain that is moved wrongly."""
    kind, values = CONFIGS[name]
    config = kind(**values)
    config._experts_implementation = "eager"  # the fused one has no fp64
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        norm = "norm" in path or ".ln_" in path
        parameter.data = (1.0 + 0.3 * drawn if norm else 0.3 * drawn).to(dtype)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(_rms_norm, module)
    return model.eval()


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The models' own norms run in fp32, which would hide errors up to 1e-7, or make them."""
    eps = getattr(module, "eps", None) or module.variance_epsilon
    gain = 1.0 + module.weight if "Gemma" in type(module).__name__ else module.weight
    return (gain * x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def tokens(length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """(2, 9, vocab)."""
    return model(tokens()).logits


@torch.no_grad()
def cached_logits_of(model: PreTrainedModel) -> Tensor:
    """The last two positions' (2, 2, vocab), read with a cache of keys and values made from the rest."""
    ids = tokens()
    past = model(ids[:, :7], use_cache=True).past_key_values
    first = model(ids[:, 7:8], past_key_values=past, use_cache=True)
    return torch.cat([first.logits, model(ids[:, 8:], past_key_values=first.past_key_values).logits], dim=1)


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- interventions


def rotation(layout: AttentionLayout, seed: int = 0) -> Intervention:
    drawn = haar_rotation(layout.head_dim, seed, heads=layout.n_kv_heads)
    return Intervention.rotate_values(layout, drawn)


def permutation(layout: AttentionLayout, shift: int = 1) -> Intervention:
    """Moves every head where there are several; a group's order differs from its neighbour's."""
    n, r = layout.n_kv_heads, layout.n_rep
    within = [[(i + j + shift) % r for i in range(r)] for j in range(n)]
    return Intervention.permute(layout, [(j + shift) % n for j in range(n)], within)


def both(layout: AttentionLayout) -> Intervention:
    return rotation(layout).then(permutation(layout)).then(rotation(layout, seed=1))


def one_hadamard(layout: AttentionLayout) -> Intervention:
    return Intervention.rotate_values(layout, hadamard_rotation(layout.head_dim, seed=3))


KINDS = {"rotation": rotation, "hadamard": one_hadamard, "permutation": permutation, "both": both}


# ---- comparisons


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def first_block(name: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], AttentionLayout]:
    model = model_of(name, dtype)
    return state_of(model), find_layouts(model)[0]


def moved_by(model: PreTrainedModel, new: dict[str, Tensor]) -> float:
    """How far the logits go when these tensors replace the model's own."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(new, strict=False)
    return distance(logits_of(changed), logits_of(model))
