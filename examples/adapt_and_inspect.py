"""Adapt one model with three methods and look at what each update did to the weights' geometry:
python examples/adapt_and_inspect.py [--model FOLDER]   # a Hugging Face causal LM; without, a small random Llama
"""

import argparse
import math

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.geometry import energy_shares, principal_angles, singular_values, top_basis
from offprincipal_peft.tuners import OffPrincipalLinear


def load(folder: str | None) -> torch.nn.Module:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 352}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))
    for weight in (p for p in model.model.layers.parameters() if p.dim() == 2):  # decaying, as in trained ones
        U, S, Vh = torch.linalg.svd(weight.data, full_matrices=False)
        weight.data = (U * (S[0] / (1 + torch.arange(len(S))) ** 0.5)) @ Vh
    return model


def batches(steps: int, vocab: int) -> list[torch.Tensor]:
    """Sums written as bytes: something to learn, and nothing to download."""
    pairs = torch.randint(0, 50, (steps, 16, 2), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [[f"{a:2d}+{b:2d}={a + b:3d}".encode() for a, b in step] for step in pairs]
    return [torch.tensor([list(line) for line in step]) % vocab for step in lines]


def train(model: torch.nn.Module, steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5), []
    for ids in batches(steps, model.config.vocab_size):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def inspect(layer: OffPrincipalLinear) -> list[float]:
    """Energy shares of dW in the top-k subspaces (%), largest angle (degrees), spectral shift and norm of dW."""
    W, delta = layer.original_weight(), layer.get_delta_weight("default")
    k = max(1, min(W.shape) // 32)
    before, after = top_basis(W, k), top_basis(W + delta, k)
    shares = energy_shares(delta, before.U, before.V)
    angle = math.degrees(max(principal_angles(before.U, after.U).max(), principal_angles(before.V, after.V).max()))
    s0, s1 = singular_values(W), singular_values(W + delta)
    shift, size = float((s1 - s0).norm() / s0.norm()), float(delta.norm() / W.norm())
    return [100 * shares.output, 100 * shares.input, angle, shift, size]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print("mean over layers, k = min(shape) / 32      energy of dW in    largest   spectral")
    print("method        loss                 top-k out   top-k in   angle     shift      |dW|/|W|")
    for preset in ("lora", "pissa", "offprincipal"):
        torch.manual_seed(0)
        config = OffPrincipalLoraConfig.preset(preset, r=8, lora_alpha=16, task_type="CAUSAL_LM")
        model = get_peft_model(load(args.model), config)
        losses = train(model, args.steps)
        layers = [m for m in model.modules() if isinstance(m, OffPrincipalLinear)]
        out, inp, angle, shift, size = torch.tensor([inspect(layer) for layer in layers]).mean(0).tolist()
        row = f"{preset:13s} {losses[0]:6.3f} -> {losses[-1]:6.3f}   {out:9.4f}%  {inp:9.4f}%"
        print(f"{row}  {angle:6.3f}°  {shift:.2e}  {size:.2e}")


if __name__ == "__main__":
    main()
