"""A model of a given shape under a method, one step of training, and the bytes of every tensor that there is then."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _scaling_formulas import Memory, Method, ModelShape
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from offprincipal_peft import MaskedAdamW, OffPrincipalLoraConfig, PrincipalSparseConfig
from offprincipal_peft.rlvr.memory import reachable_tensors, storages

TOKENS = 64


def build(shape: ModelShape, folder: Path | None = None) -> nn.Module:
    """A bf16 model of ``shape`` on the CPU, of random weights or of those in ``folder``.

    Raises:
        ValueError: the model has another number of parameters than the shape.
    """
    if folder is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        kinds: Any = (Qwen2Config, Qwen2ForCausalLM) if shape.qkv_bias else (LlamaConfig, LlamaForCausalLM)
        config = kinds[0](
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocab,
            tie_word_embeddings=shape.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        model = kinds[1](config).to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != shape.count():
        raise ValueError(f"{shape.name}: the model has {count} parameters, its shape says {shape.count()}")
    return model.train()


class Trained:
    """A model under a method: ``backward`` and ``step`` are what happens in a step of training."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.method = method
        self.weights = list(model.parameters())
        self.before = {id(t): t for t in reachable_tensors([model])}
        self.model, self.masters, config = model, [], _config(method)
        if config is not None:
            self.model = get_peft_model(model, config)
        values: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        if method.kind == "master":
            self.masters = [nn.Parameter(p.detach().float()) for p in values]
            # one optimiser a tensor: gradients are widened one by one
            self.optimisers: list[Any] = [torch.optim.AdamW([m], lr=1e-5, fused=True) for m in self.masters]
        elif method.kind == "split":
            self.optimisers = [MaskedAdamW(values, lr=1e-5, moments="bf16")]
        else:
            self.optimisers = [torch.optim.AdamW(values, lr=1e-5, fused=True)]
        self.values = values

    def backward(self) -> None:
        """Gradients of one batch of ``TOKENS`` tokens; they stay."""
        vocabulary = int(self.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        ids = torch.randint(3, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        self.model(input_ids=ids, labels=ids).loss.backward()

    def step(self) -> None:
        if not self.masters:
            self.optimisers[0].step()
            return
        for weight, master, optimiser in zip(self.values, self.masters, self.optimisers, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            optimiser.step()
            master.grad = None
            weight.data.copy_(master.data)

    def held(self) -> Memory:
        """Bytes of every tensor after a step whose gradients are still there, each storage once."""
        trained = self.masters if self.masters else self.values if self.method.kind != "full" else []
        weights, own = storages(self.weights), storages(trained)
        gradients = storages(p.grad for p in self.values if p.grad is not None)
        states = [entry for optimiser in self.optimisers for entry in optimiser.state.values()]
        state = storages(value for entry in states for value in entry.values() if isinstance(value, Tensor))
        everything = storages(reachable_tensors([self.model, self.masters, self.optimisers]))
        known = {*weights, *own, *gradients, *state, *storages(self.before.values())}
        other = {pointer: size for pointer, size in everything.items() if pointer not in known}
        return Memory(*map(_sum, (weights, own, gradients, state, other)))


def _sum(sizes: dict[int, int]) -> int:
    return sum(sizes.values())


def _config(method: Method) -> Any:
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method.kind in ("lora", "projected"):
        preset = "lora" if method.kind == "lora" else "offprincipal"
        return OffPrincipalLoraConfig.preset(preset, r=method.rank, lora_alpha=2 * method.rank, **shared)
    if not method.is_sparse:
        return None
    options = {"mask": "random", "random_density": method.density, **shared}
    structure: Any = "row" if method.kind == "rows" else "element"
    precision: Any = "split" if method.kind == "split" else "fp32"
    return PrincipalSparseConfig(structure=structure, precision=precision, **options)


def measured(model: nn.Module, method: Method) -> Memory:
    """Adapt ``model``, train one step, count. The model is the method's from then on."""
    trained = Trained(model, method)
    trained.backward()
    trained.step()
    return trained.held()


def resident(names: Iterable[str] = ("VmRSS", "VmHWM")) -> dict[str, int]:
    """Bytes of this process: held now, and the most since :func:`forget_peak`. Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line for line in lines}
    return {name: 1024 * int(found[name].split()[1]) for name in names}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
