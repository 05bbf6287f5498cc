"""What the lifecycle tests share: a spread of presets, adapters on tiny models, training, bit-exact comparison."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners.offprincipal_lora import inits, model
from offprincipal_peft.tuners.offprincipal_lora import layer as layer_module

# Every shape of update: plain with a drawn or a singular start, difference of both, A alone trained, projected.
PRESETS = ("lora", "pissa", "mica", "rlmo", "geora", "offprincipal")
FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
DTYPES = (torch.float32, torch.bfloat16)

HIDDEN = 32
IDS = token_batch(128)
OTHER_IDS = token_batch(128, seed=1)

CONTAINERS = ("lora_A", "lora_B", "lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V")
FROZEN = ("lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V")


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    sizes = {"hidden": HIDDEN} | ({"intermediate": 88} if family == "llama" else {}) | sizes
    return FAMILIES[family](dtype=dtype, **sizes)


def config(preset: str = "offprincipal", **overrides: Any) -> OffPrincipalLoraConfig:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if preset.startswith("offprincipal"):
        defaults["principal_rank"] = 5
    return OffPrincipalLoraConfig.preset(preset, **defaults | overrides)


def adapted(
    preset: str = "offprincipal",
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PeftModel:
    return peft.get_peft_model(tiny(family, dtype), config(preset, **overrides))


def off_layers(host: nn.Module) -> list[layer_module.OffPrincipalLinear]:
    found = [m for m in host.modules() if isinstance(m, layer_module.OffPrincipalLinear)]
    assert found, "no off-principal layer in the model"
    return found


def trainable(host: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in host.named_parameters() if p.requires_grad}


def optimizer(host: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(host).values(), lr=lr, **options)


def train(
    host: PeftModel, steps: int = 3, by: torch.optim.Optimizer | None = None, lr: float = 1e-2, first: int = 0
) -> torch.optim.Optimizer:
    """`steps` AdamW steps, each on its own batch (numbered from `first`); leaves the model in eval mode."""
    by = by or optimizer(host, lr=lr)
    vocabulary = host.config.vocab_size
    host.train()
    for step in range(first, first + steps):
        ids = token_batch(vocabulary, seed=100 + step)
        host(input_ids=ids, labels=ids).loss.backward()
        by.step()
        by.zero_grad()
    host.eval()
    return by


@torch.no_grad()
def logits(host: nn.Module, ids: Tensor = IDS) -> Tensor:
    return host(input_ids=ids).logits


def adapter_tensors(host: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors, by parameter name without the adapter's own name."""
    found = {
        name.replace(f".{adapter}.", "."): p.detach().clone()
        for name, p in host.named_parameters()
        if f".{adapter}." in name and any(f".{part}." in name for part in CONTAINERS)
    }
    assert found, f"no tensor of adapter {adapter!r}"
    return found


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    differing = [
        name
        for name, tensor in expected.items()
        if actual[name].dtype != tensor.dtype or not torch.equal(actual[name], tensor)
    ]
    assert not differing, f"{len(differing)} of {len(expected)} tensors differ: {differing[:5]}"


def gradients(host: PeftModel, ids: Tensor = IDS) -> dict[str, Tensor]:
    host(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in trainable(host).items() if p.grad is not None}
    host.zero_grad()
    assert found.keys() == trainable(host).keys()
    assert any(g.abs().max() > 0 for g in found.values())
    return found


def update_as_written(layer: nn.Module) -> Tensor:
    """s (I − U Uᵀ) [(B − B₀) A + B₀ (A − A₀)] (I − V Vᵀ) [d_out, d_in] by its formula, rounded to fp32."""
    parts = {
        part: getattr(layer, part)["default"].weight.detach().double()
        for part in ("lora_A", "lora_B", "lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V")
        if "default" in getattr(layer, part)
    }
    A, B = parts["lora_A"], parts["lora_B"]
    update = B @ A
    if "lora_start_A" in parts and "lora_start_B" in parts:
        A0, B0 = parts["lora_start_A"], parts["lora_start_B"]
        update = (B - B0) @ A + B0 @ (A - A0)
    for part, size in (("lora_basis_U", len(B)), ("lora_basis_V", A.shape[1])):
        if part in parts:
            off = torch.eye(size, dtype=torch.float64) - parts[part] @ parts[part].T
            update = off @ update if part == "lora_basis_U" else update @ off
    return (layer.scaling["default"] * update).float()


def count_folds(host: PeftModel) -> dict[int, int]:
    """Counts each layer's `_fold` calls from now on."""
    calls: dict[int, int] = {}
    for layer in off_layers(host):
        real = layer._fold

        def counted(adapter, *, real=real, layer=layer):
            calls[id(layer)] = calls.get(id(layer), 0) + 1
            return real(adapter)

        layer._fold = counted
    return calls


class DecompositionError(AssertionError):
    """A weight was decomposed where that is forbidden."""


_LINALG = ("svd", "svdvals", "eig", "eigh", "eigvals", "eigvalsh", "qr", "cholesky", "cholesky_ex", "lstsq", "pinv")
_LINALG += ("lu", "lu_factor", "ldl_factor", "matrix_rank", "cond", "householder_product", "inv")
_TORCH = ("svd", "svd_lowrank", "pca_lowrank", "lobpcg", "qr", "geqrf", "cholesky", "ormqr", "lu")


@contextmanager
def no_decomposition() -> Iterator[None]:
    """Within it every decomposition in torch raises, and so does a start that would need one."""

    def forbidden(name: str) -> Any:
        def raising(*args: Any, **kwargs: Any) -> Any:
            raise DecompositionError(f"{name} was called")

        return raising

    def start(weight: Tensor, request: inits.StartRequest, known: inits.Bases | None = None) -> inits.LayerStart:
        if inits.needs_decomposition(request, known or inits.Bases(None, None)):
            raise DecompositionError(f"compute_start was called for {request.name}")
        return real_start(weight, request, known)

    real_start = inits.compute_start
    with pytest.MonkeyPatch.context() as patch:
        for name in _LINALG:
            patch.setattr(torch.linalg, name, forbidden(f"torch.linalg.{name}"))
        for name in _TORCH:
            patch.setattr(torch, name, forbidden(f"torch.{name}"))
        for module in (model, layer_module):
            patch.setattr(module, "compute_start", start)
        yield
