"""Whether every process of a run holds the same base weights, masks, starts and bases.

DDP sends rank 0's parameters to the others when it is made, FSDP2 cuts each rank's own; neither sends masks, which are
no parameters. They are computed from the weights, so they agree where the weights and the arithmetic do; ranks on
different hardware may round a score differently and would then train other entries under the same positions, without
an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base_weight import identity
from .offprincipal_lora.layer import OffPrincipalLinear
from .principal_sparse.layer import PrincipalSparseLinear
from .sharding import is_dtensor

_SIZE = 16  # bytes of a digest


def check_same_on_every_rank(model: nn.Module, group: dist.ProcessGroup | None = None) -> int:
    """Compare the adapted layers' base weights, masks, frozen starts and bases with rank 0's.

    Every rank of ``group`` (default: all) must call it; it sends 16 bytes for each tensor. Call it before DDP or
    ``fully_shard`` takes the model. A sharded sparse layer is compared by its mask and the identity of the weight that
    the mask was made for. Values written into base weights are taken out first.

    Returns the number of tensors compared.

    Raises:
        ValueError: a tensor differs (on every rank, with the layers' names), the model has no adapted layer, or its
            starts and bases are sharded already.
        RuntimeError: no process group is initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("there are no ranks to compare: torch.distributed is not initialised")
    named = list(_digests(model))
    ranks = _gathered([hashlib.blake2b(name.encode() + d, digest_size=_SIZE).digest() for name, d in named], group)
    if not any(ranks):
        raise ValueError("the model has no layer of this package's methods, so there is nothing to compare")
    first, wrong = ranks[0], [rank for rank, own in enumerate(ranks) if own != ranks[0]]
    if wrong:
        own = ranks[dist.get_rank(group)]
        compared = ranks[wrong[0]] if own == first else first
        names = [name for (name, _), d in zip(named, own, strict=True) if d not in set(compared)]
        raise ValueError(
            f"rank {', '.join(map(str, wrong))} differs from rank 0 in {len(names)} of {len(named)} tensors: "
            f"{'; '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Load the same base model in the same dtype on "
            "every rank, and the same saved adapter (save a fresh one on rank 0 and load it everywhere): masks and "
            "bases computed on different hardware may differ."
        )
    return len(named)


def _digests(model: nn.Module) -> Iterator[tuple[str, bytes]]:
    for layer in model.modules():
        if isinstance(layer, PrincipalSparseLinear):
            if not layer.sharded:
                if not layer.merged:
                    layer.restore()
                yield f"{layer.name}: base weight", _bytes(identity(layer.get_base_layer()))
            for delta in layer.packed():
                if delta.plan is not None:
                    yield f"{layer.name}: mask of {delta.adapter!r}", _digest(delta.plan.packed(), delta.plan.base)
        elif isinstance(layer, OffPrincipalLinear):
            yield from _frozen(layer)


def _frozen(layer: OffPrincipalLinear) -> Iterator[tuple[str, bytes]]:
    base = layer.get_base_layer()
    if is_dtensor(base.weight):
        raise ValueError(f"{layer._name} is sharded already: compare the ranks before fully_shard.")
    yield f"{layer._name}: base weight", _bytes(identity(base))
    for part in ("lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V"):
        for adapter, module in getattr(layer, part).items():
            layer.ensure_started(adapter)
            yield f"{layer._name}: {part} of {adapter!r}", _digest(module.weight)


def _bytes(identity: Tensor) -> bytes:
    return bytes(identity.tolist())


def _digest(*tensors: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=_SIZE)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{flat.dtype} {tuple(flat.shape)} ".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _gathered(digests: list[bytes], group: dist.ProcessGroup | None) -> list[list[bytes]]:
    """Every rank's digests, in rank order."""
    device = (
        "cpu" if "gloo" in dist.get_backend(group) else torch.device(torch.accelerator.current_accelerator() or "cpu")
    )
    world = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(digests)], device=device), group=group)
    most = max(int(count) for count in counts)
    own = torch.zeros(most * _SIZE, dtype=torch.uint8, device=device)
    own[: len(digests) * _SIZE] = torch.tensor(list(b"".join(digests)), dtype=torch.uint8)
    parts = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=group)
    rows = [bytes(part.cpu().tolist()) for part in parts]
    return [
        [row[i * _SIZE : (i + 1) * _SIZE] for i in range(int(count))] for row, count in zip(rows, counts, strict=True)
    ]
