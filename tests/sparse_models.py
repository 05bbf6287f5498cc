"""What the tests of masked sparse fine-tuning share: adapters on tiny models, dense twins, bytes held, guards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from helpers import base_bytes
from lifecycle import no_decomposition, tiny, train, trainable
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.geometry import masks
from offprincipal_peft.tuners.principal_sparse import PrincipalSparseLinear, plan
from offprincipal_peft.tuners.principal_sparse.packed import PackedDelta

STRUCTURES = ("element", "row", "column", "block")
BF16_PRECISIONS = ("split", "bf16", "bf16-stochastic")
# (base dtype, precision): every form of trained value.
STORED = (
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "split"),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "bf16-stochastic"),
)
SOME = STORED[:3]  # without the ablations
BLOCKS = {"hidden": 256, "layers": 1, "intermediate": 320}  # the least that has more than one 64 x 64 block each way


def names(value: Any) -> str:
    """Short parametrize ids: `torch.bfloat16` -> `bfloat16`."""
    return str(value).removeprefix("torch.")


def sparse_config(**overrides: Any) -> PrincipalSparseConfig:
    defaults = {"task_type": "CAUSAL_LM", "principal_rank": 4, "principal_density": 0.6, "mask": "~principal"}
    return PrincipalSparseConfig(**defaults | overrides)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PeftModel:
    """A fresh adapter on a tiny model; blocks need, and get, a wider one."""
    sizes = dict(BLOCKS) if overrides.get("structure") == "block" else {}
    if family == "gpt2":
        sizes.pop("intermediate", None)
    return peft.get_peft_model(tiny(family, dtype, **sizes), sparse_config(**overrides))


def sparse_layers(host: nn.Module) -> dict[str, PrincipalSparseLinear]:
    """By their name in the bare model."""
    found = {m.name: m for m in host.modules() if isinstance(m, PrincipalSparseLinear)}
    assert found, "no masked layer in the model"
    return found


def deltas(host: nn.Module, adapter: str = "default") -> dict[str, PackedDelta]:
    return {name: layer.delta(adapter) for name, layer in sparse_layers(host).items()}


def packed_values(host: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of all that an adapter saves, by layer and tensor."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, delta in deltas(host, adapter).items()
        for key, tensor in delta.stored().items()
    }


def masked(host: PeftModel, lr: float = 1e-2, **options: Any) -> MaskedAdamW:
    return MaskedAdamW(trainable(host).values(), lr=lr, **options)


def train_masked(host: PeftModel, steps: int = 3, lr: float = 1e-2, **options: Any) -> MaskedAdamW:
    by = masked(host, lr, **options)
    train(host, steps, by=by)
    return by


def trained(family: str = "llama", dtype: torch.dtype = torch.float32, steps: int = 3, **overrides: Any) -> PeftModel:
    host = adapted(family, dtype, **overrides)
    train_masked(host, steps)
    return host


def restored_bytes(host: PeftModel) -> dict[str, str]:
    """The base's bytes with the adapter switched off for the moment."""
    with host.disable_adapter():
        return base_bytes(host)


def pristine_weights(model: PreTrainedModel, host: nn.Module) -> dict[str, Tensor]:
    """The weights of the bare `model` at the layers that `host` adapts, as they are stored."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in sparse_layers(host)}


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def held_bytes(root: object) -> int:
    """Bytes of every tensor that is reached from an object through attributes, lists and dicts, each storage once.

    A `PackedDelta` keeps its layer in `owner`, which is not followed; a view counts with all that it keeps alive.
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, PrincipalSparseLinear):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(storages.values())


class MaskRecomputedError(AssertionError):
    """A mask was evaluated where that is forbidden."""


@contextmanager
def no_new_mask() -> Iterator[None]:
    """Within it nothing is decomposed and no mask is evaluated."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise MaskRecomputedError("build_mask was called")

    with no_decomposition(), pytest.MonkeyPatch.context() as patch:
        for module in (masks, plan):
            patch.setattr(module, "build_mask", forbidden)
        yield


@contextmanager
def counted_writes() -> Iterator[dict[str, int]]:
    """How often each layer's values are written into its base weight, by layer name."""
    counts: dict[str, int] = {}
    real = PackedDelta.write

    def write(self: PackedDelta, matrix: Tensor) -> None:
        counts[self.owner[0].name] = counts.get(self.owner[0].name, 0) + 1
        real(self, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedDelta, "write", write)
        yield counts


class _Sum(nn.Module):
    """weight = round(W0 + D), with the gradient of D masked by a hook."""

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        self.register_buffer("W0", original)

    def forward(self, D: Tensor) -> Tensor:
        return (self.W0 + D).to(self.W0.dtype)


def dense_twin(host: PeftModel, bare: nn.Module) -> dict[str, nn.Parameter]:
    """Make the bare model train dense updates D, fp32, at the layers that `host` adapts; their gradients are masked.

    What a fast path must agree with: the whole weight gradient exists, and then the mask is applied.
    """
    updates = {}
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    for name, delta in deltas(host).items():
        layer, mask = bare.get_submodule(name), delta.layout.mask()
        original = layer.weight.detach().clone()
        layer.weight = nn.Parameter(torch.zeros(original.shape))
        parametrize.register_parametrization(layer, "weight", _Sum(original), unsafe=True)
        updates[name] = layer.parametrizations.weight.original
        updates[name].register_hook(lambda grad, mask=mask: grad * mask)
    return updates
