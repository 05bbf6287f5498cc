"""Pairs of small checkpoints whose answer is known, because the update was planted."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from offprincipal_peft.geometry import WeightSpectrum, project_off
from offprincipal_peft.geometry.masks import MaskOptions, build_mask
from offprincipal_peft.geometry.precision import ulp

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 384, 4, 2, 2, 320
K = 16  # of the planted principal subspaces; min(shape) / 16 of most
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": False,
}
KINDS = (
    *("none", "off-principal", "off-left", "principal", "sub-ULP", "rows", "columns", "blocks"),
    *("magnitude", "on-mask", "off-mask", "dense", "random"),
)


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        kv = HIDDEN // HEADS * KV_HEADS
        for name, out in (("q_proj", HIDDEN), ("k_proj", kv), ("v_proj", kv), ("o_proj", HIDDEN)):
            found[f"{layer}self_attn.{name}.weight"] = (out, HIDDEN)
        for name, shape in (
            ("gate_proj", (INNER, HIDDEN)),
            ("up_proj", (INNER, HIDDEN)),
            ("down_proj", (HIDDEN, INNER)),
        ):
            found[f"{layer}mlp.{name}.weight"] = shape
        found[f"{layer}input_layernorm.weight"] = (HIDDEN,)
    return found | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def base_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp32; a matrix has a principal part: 24 strong directions with few large entries above noise."""
    if len(shape) == 1:
        return torch.ones(shape)
    noise = torch.randn(shape, generator=generator) * 0.02
    left = torch.linalg.qr(torch.randn(shape[0], 24, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 24, generator=generator)).Q
    return noise + (left * torch.linspace(3.0, 1.2, 24)) @ right.T


def update(kind: str, weight: Tensor, generator: torch.Generator) -> Tensor:  # fp32, as the weight
    """An update of about 2 % of the weight's norm (``sub-ULP``: below half a bf16 step everywhere)."""
    if kind == "none" or weight.ndim != 2:
        return torch.zeros_like(weight)
    noise = torch.randn(weight.shape, generator=generator)
    step = 0.02 * weight.norm() / noise.norm()
    if kind in ("off-principal", "off-left", "principal"):
        top = WeightSpectrum(weight, method="exact").top(K)
        if kind == "off-left":  # one side alone, as an update that starts in the left null space
            return project_off(noise, top.U) * step
        off = project_off(project_off(noise, top.U).T, top.V).T
        inside = top.U @ (top.U.T @ noise @ top.V) @ top.V.T
        found = off if kind == "off-principal" else inside
        return found * (0.02 * weight.norm() / found.norm())
    if kind == "sub-ULP":
        return noise.sign() * (ulp(weight) / 5).float() * torch.rand(weight.shape, generator=generator)
    if kind in ("rows", "columns"):
        axis = 0 if kind == "rows" else 1
        chosen = torch.rand(weight.shape[axis], generator=generator) < 0.25
        return noise * step * (chosen[:, None] if axis == 0 else chosen[None, :])
    if kind == "blocks":
        rows, columns = (torch.rand(d, generator=generator) < 0.5 for d in weight.shape)
        return noise * step * (rows[:, None] & columns[None, :])
    if kind in ("on-mask", "off-mask"):  # four times as often on (off) the principal mask, whatever the magnitude
        on = build_mask(weight, "principal", MaskOptions(principal_rank=min(weight.shape) // 16)).entries
        often = on if kind == "on-mask" else ~on
        return noise * step * (torch.rand(weight.shape, generator=generator) < torch.where(often, 0.4, 0.1))
    if kind == "magnitude":  # the smallest half of the entries, whatever their direction, with random signs
        return noise * step * (weight.abs() <= weight.abs().median())
    if kind == "random":
        return noise * step * (torch.rand(weight.shape, generator=generator) < 0.3)
    return noise * step


def write(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def plant(folder: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A tuned checkpoint of :func:`base_model` with the update ``kind``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tuned = {name: (weight + update(kind, weight, generator)).to(dtype) for name, weight in base_model(dtype).items()}
    return write(folder, tuned)


def base_model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rounded to bf16 and kept in ``dtype``, as trainers that load a bf16 checkpoint into fp32 do."""
    generator = torch.Generator().manual_seed(7)
    return {name: base_weight(shape, generator).bfloat16().to(dtype) for name, shape in shapes().items()}
