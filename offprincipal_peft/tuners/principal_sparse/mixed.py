"""Batches whose samples name their adapters: PEFT's ``adapter_names`` argument of ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import PrincipalSparseLinear


@contextmanager
def named_batch(model: nn.Module, adapter_names: Any, num_beams: Any) -> Iterator[None]:
    """Hand every layer the names, for as long as this is open.

    Args:
        model: with sparse layers.
        adapter_names: one of its adapters, or ``"__base__"``, for each sample.
        num_beams: of a beam search, which repeats every sample that often (in a decoder, not in an encoder).

    Raises:
        ValueError: in training mode, and for a name that is no adapter.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval() first.")
    layers = [m for m in model.modules() if isinstance(m, PrincipalSparseLinear)]
    known = {name for layer in layers for name in layer.princsparse_delta}
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
            f"{', '.join(sorted(known))}."
        )
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in adapter_names for _ in range(beams)]
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = None if get_encoder is None else get_encoder()
    inside = {id(m) for m in encoder.modules()} if encoder is not None and encoder is not model else set()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PrincipalSparseLinear | AuxiliaryTrainingWrapper):
                names = list(adapter_names) if id(module) in inside else repeated
                handle = module.register_forward_pre_hook(partial(_add_names, names), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _add_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
