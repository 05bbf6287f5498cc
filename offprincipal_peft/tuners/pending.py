"""What both methods know about adapters whose values are still to come."""

from __future__ import annotations

import torch
from torch import nn


class PendingStarts:
    """An adapter whose config came from a saved one: values are expected, so no decomposition is done yet.

    If none ever arrive (the config alone was reused) a layer computes its start at its first use. If some layers
    were filled and others not, the saved adapter does not fit the model, which is an error and not a reason to draw
    new starts or masks.
    """

    def __init__(self, adapter_name: str, layers: set[str]) -> None:
        self.adapter_name = adapter_name
        self.layers = layers
        self.filled: set[str] = set()
        self.unstarted: set[str] = set()
        self.keys_only = False  # a state dict is being read for its keys, values need not be there yet

    def check_complete(self) -> None:
        """Raises ``ValueError`` where a load filled some layers and left others out."""
        missing = sorted(self.layers - self.filled)
        if self.filled and missing:
            raise ValueError(
                f"the saved adapter has no values for {len(missing)} of the {len(self.layers)} layers that adapter "
                f"{self.adapter_name!r} targets (first: {missing[0]}); it is truncated or was made for another model."
            )


def built_empty() -> bool:
    """Whether modules are created without memory right now, as ``get_peft_model(low_cpu_mem_usage=True)`` does."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return bool(next(probe.parameters()).is_meta)
