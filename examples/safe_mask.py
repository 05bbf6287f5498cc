"""Fine-tune only the weights that the paper's safe mask names (low in magnitude, or not principal), beside other masks:
python examples/safe_mask.py [--model FOLDER] [--precision split]   # without a folder: a small random Llama
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.tuners import PrincipalSparseLinear


def load(folder: str | None) -> torch.nn.Module:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 352}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).bfloat16()


def batches(steps: int, vocab: int) -> list[torch.Tensor]:
    """Sums written as bytes: something to learn, and nothing to download."""
    pairs = torch.randint(0, 50, (steps, 16, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [torch.tensor([list(b"%2d+%2d=%3d" % (a, b, a + b)) for a, b in step]) % vocab for step in pairs]


def train(model: torch.nn.Module, steps: int) -> list[float]:
    # Any optimiser trains an fp32 update; precision="split" needs this one.
    optimizer = MaskedAdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4, moments="bf16")
    losses: list[float] = []
    for ids in batches(steps, model.config.vocab_size):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(model: PeftModel, base: dict[str, torch.Tensor]) -> tuple[float, float, int]:
    """Fractions of all bf16 weights that are trained and that differ, and how many differ outside the masks."""
    trained = changed = outside = total = 0
    model.merge_adapter()  # the weights as a server would get them
    for layer in (m for m in model.modules() if isinstance(m, PrincipalSparseLinear)):
        mask = layer.delta("default").layout.mask()
        differs = layer.stored_matrix() != base[f"{layer.name}.weight"]
        trained, total = trained + int(mask.sum()), total + mask.numel()
        changed, outside = changed + int(differs.sum()), outside + int((differs & ~mask).sum())
    model.unmerge_adapter()  # and back, bit for bit
    return trained / total, changed / total, outside


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "split"))
    args = parser.parse_args()
    print("mask                trained   loss                changed   outside the mask   adapter file")
    for mask in ("safe", "random(safe)", "principal", "low & ~principal"):
        model = load(args.model)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        model = get_peft_model(model, PrincipalSparseConfig(mask=mask, precision=args.precision, task_type="CAUSAL_LM"))
        losses = train(model, args.steps)
        trained, changed, outside = compare(model, base)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = Path(folder, "adapter_model.safetensors").stat().st_size / 2**20
        loss = f"{losses[0]:6.3f} -> {losses[-1]:6.3f}"
        print(f"{mask:18s}  {trained:7.2%}   {loss}   {changed:7.2%}   {outside:16d}   {size:8.1f} MiB")
        assert all(torch.equal(p, base[name]) for name, p in model.unload().named_parameters())


if __name__ == "__main__":
    main()
