"""What a weight is, by its name: the kind of module, its layer, and where attention heads begin and end in it."""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry.drift import head_boundaries
from .absences import EMBEDDINGS, HEADS
from .checkpoints import ModelConfig

# Names of projections -> whose heads, and whether they lie among the rows (outputs) or the columns (inputs).
_PROJECTIONS = {
    "q_proj": ("query", "rows"),
    "k_proj": ("key", "rows"),
    "v_proj": ("key", "rows"),
    "o_proj": ("query", "columns"),
    "out_proj": ("query", "columns"),
    "query": ("query", "rows"),
    "key": ("key", "rows"),
    "value": ("key", "rows"),
}
# Parts of names outside the attention that config.json's number of heads is of: other towers, other mixers.
_ELSEWHERE = ("vision", "visual", "audio", "mamba", "linear_attn", "conv")


@dataclass(frozen=True)
class Place:
    """``kind``: the module's own name ("q_proj"; with the parameter's name behind it where that is not "weight").
    ``layer``: the first number in the name, None outside the stack."""

    kind: str
    layer: int | None


def place(name: str) -> Place:
    """model.layers.3.self_attn.q_proj.weight -> q_proj of layer 3."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    layer = int(parts[numbers[0]]) if numbers else None
    words = [part for part in parts if not part.isdecimal()]
    if len(words) > 1 and words[-1] == "weight":
        return Place(words[-2], layer)
    return Place(".".join(words[-2:]), layer)


def is_embedding(name: str) -> bool:
    """Token embeddings and output heads: lookups as wide as the vocabulary, which the paper's spectra leave out."""
    return any(f".{name}".endswith(f".{ending}") for ending in (*EMBEDDINGS, *HEADS))


def heads(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[list[int], list[int]]:
    """Where heads begin and end among the rows and among the columns; empty where that is not known."""
    found = _PROJECTIONS.get(place(name).kind)
    if found is None or len(shape) != 2 or any(word in name for word in _ELSEWHERE):
        return [], []
    whose, axis = found
    count = config.num_attention_heads
    if whose == "key":
        count = config.num_key_value_heads or count
    length = shape[0 if axis == "rows" else 1]
    if count is None or count < 1 or length % count:
        return [], []
    if config.head_dim and length // count % config.head_dim:  # a multiple holds more than one vector for each head
        return [], []
    edges = head_boundaries(length, num_heads=count)
    return (edges, []) if axis == "rows" else ([], edges)
