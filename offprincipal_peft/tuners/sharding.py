"""Who else holds a layer's tensors: DDP, FSDP, ZeRO-3. Nothing here communicates."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's part of a whole (FSDP2's parameters outside of their unit's forward)."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # such a tensor exists only where it was imported
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from every rank, which all of them must ask for; any other tensor as it is."""
    dtensor: Any = tensor
    full: Tensor = dtensor.full_tensor() if is_dtensor(tensor) else tensor
    return full


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    dtensor: Any = tensor
    part: Tensor = dtensor.to_local() if is_dtensor(tensor) else tensor
    return part


def sharded_like(values: Tensor, parameter: Tensor) -> Tensor:
    """``values``, the same on every rank, cut as ``parameter`` is; without communication."""
    if not is_dtensor(parameter) or is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    dtensor: Any = parameter
    values = values.to(parameter.device)
    return distribute_tensor(values, dtensor.device_mesh, dtensor.placements, src_data_rank=None)


def managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP gathers and drops a module's parameters, so that what is written into them is lost."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def inside_ddp() -> bool:
    """Whether this runs in the forward of a ``DistributedDataParallel``, whose buckets take gradients of their
    parameters' dtype alone."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the values elsewhere and leaves a placeholder, gathered or not."""
    return hasattr(tensor, "ds_id")


def zero3_error(where: str, what: str, ds_id: object, shape: tuple[int, ...]) -> str:
    return (
        f"{where}: DeepSpeed ZeRO-3 partitions {what} (ds_id {ds_id}, whole shape {shape}) and gathers it only for "
        "calls of the module that owns it, which this method does not make. Use FSDP2 or DDP, or ZeRO stage 1 or 2, "
        "which leave parameters whole."
    )


def check_not_partitioned(where: str, what: str, tensor: Tensor, error: type[Exception] = RuntimeError) -> None:
    """Raises ``error`` for a parameter of ZeRO-3."""
    if is_partitioned(tensor):
        shape = tuple(getattr(tensor, "ds_shape", torch.Size(())))
        raise error(zero3_error(where, what, getattr(tensor, "ds_id", "?"), shape))
