"""What training a decoder under each method holds and sends, in bytes, from its shape alone.

Activations, what a library allocates for a moment and the caching of allocators are not in it. Linear layers of the
blocks are adapted, embeddings, norms and the head are not.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_PACKED = 0.6  # above this share of a layer, frozen entries are carried along, at other figures


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped key and value heads and a gated MLP, as its ``config.json`` gives it.

    Attributes:
        parameters: what the published checkpoint holds; 0 for a shape that is nobody's.
        qkv_bias: whether the query, key and value projections have biases (Qwen2 does, Llama does not).
        tied: whether the head is the embedding.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool
    parameters: int = 0
    source: str = ""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def block(self) -> list[tuple[int, int]]:
        """(d_out, d_in) of the linear layers of one block: q, k, v, o, gate, up, down."""
        kv, hidden, wide = self.kv_heads * self.head_dim, self.hidden, self.intermediate
        attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        return [*attention, (wide, hidden), (wide, hidden), (hidden, wide)]

    def linears(self) -> list[tuple[int, int]]:
        return self.block() * self.layers

    def tensors(self) -> list[int]:
        """Numbers in each parameter of the model."""
        kv = self.kv_heads * self.head_dim
        biases = [self.hidden, kv, kv] if self.qkv_bias else []
        inside = [rows * columns for rows, columns in self.block()] + biases + [self.hidden] * 2
        head = [] if self.tied else [self.vocab * self.hidden]
        return [self.vocab * self.hidden, *inside * self.layers, self.hidden, *head]

    def count(self) -> int:
        return sum(self.tensors())


def _hub(name: str) -> str:
    return f"https://huggingface.co/{name}/blob/main/config.json"


# hidden, blocks, heads, key and value heads, MLP, vocabulary; the totals are those of the published checkpoints
MODELS = [
    ModelShape("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151_936, True, True, 1_543_714_304, _hub("Qwen/Qwen2.5-1.5B")),
    ModelShape("Qwen2.5-7B", 3584, 28, 28, 4, 18_944, 152_064, False, True, 7_615_616_512, _hub("Qwen/Qwen2.5-7B")),
    ModelShape("Qwen2.5-14B", 5120, 48, 40, 8, 13_824, 152_064, False, True, 14_770_033_664, _hub("Qwen/Qwen2.5-14B")),
    ModelShape("Qwen2.5-32B", 5120, 64, 40, 8, 27_648, 152_064, False, True, 32_763_876_352, _hub("Qwen/Qwen2.5-32B")),
    ModelShape(
        "Llama-3-70B",
        8192,
        80,
        64,
        8,
        28_672,
        128_256,
        False,
        False,
        70_553_706_496,
        _hub("meta-llama/Meta-Llama-3-70B"),
    ),
    ModelShape("Qwen2.5-72B", 8192, 80, 64, 8, 29_568, 152_064, False, True, 72_706_203_648, _hub("Qwen/Qwen2.5-72B")),
]
SMOL = ModelShape(
    "SmolLM2-135M", 576, 30, 9, 3, 1536, 49_152, True, False, 134_515_008, _hub("HuggingFaceTB/SmolLM2-135M")
)


@dataclass(frozen=True)
class Method:
    """One way to train. ``kind``: full, master, lora, projected, entries, split or rows.

    Attributes:
        rank: of the low-rank kinds.
        density: share of a layer's entries (of its rows) that the sparse kinds train.
    """

    name: str
    kind: str
    rank: int = 16
    density: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: it is one of {', '.join(KINDS)}")
        if not 0 < self.density <= MOST_PACKED:
            raise ValueError(f"density={self.density}: the formulas are for more than 0 and at most {MOST_PACKED}")

    @property
    def is_sparse(self) -> bool:
        return self.kind in ("entries", "split", "rows")


KINDS = ("full", "master", "lora", "projected", "entries", "split", "rows")
METHODS = [
    Method("full, bf16", "full"),
    Method("full, fp32 masters", "master"),
    Method("LoRA, r = 16", "lora"),
    Method("off-principal, r = 16", "projected"),
    Method("entries, 5 %, fp32", "entries"),
    Method("entries, 5 %, split", "split"),
    Method("rows, 5 %", "rows"),
]


@dataclass(frozen=True)
class Memory:
    """Bytes at the end of a backward, where the most is held.

    Attributes:
        weights: the model's parameters, bf16.
        trained: trained numbers beside them: masters, factors, packed values.
        gradients: of what trains.
        optimiser: moments and step counts.
        other: starts, bases, positions, original entries, marks of the base.
    """

    weights: int
    trained: int
    gradients: int
    optimiser: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimiser + self.other


def trained_entries(shape: tuple[int, int], method: Method) -> int:
    """Of one (d_out, d_in) layer under a sparse method."""
    rows, columns = shape
    if method.kind == "rows":
        return round(method.density * rows) * columns
    return round(method.density * rows * columns)


def memory(model: ModelShape, method: Method) -> Memory:
    """What one process holds that trains the whole of ``model`` alone."""
    P, layers = model.count(), model.linears()
    step = 4  # the optimiser's count of steps, one fp32 number a tensor
    if method.kind in ("full", "master"):
        counts = step * len(model.tensors())
        if method.kind == "full":
            return Memory(2 * P, 0, 2 * P, 4 * P + counts, 0)
        return Memory(2 * P, 4 * P, 2 * P, 8 * P + counts, 0)
    if not method.is_sparse:
        r = method.rank
        factors = sum(r * (d_out + d_in) for d_out, d_in in layers)
        other = 0
        if method.kind == "projected":  # A's start, and two bases of min(shape) / 32 directions
            other = sum(4 * r * d_in + 4 * max(1, min(d_out, d_in) // 32) * (d_out + d_in) for d_out, d_in in layers)
        return Memory(2 * P, 4 * factors, 4 * factors, 8 * factors + 2 * step * len(layers), other)
    n = sum(trained_entries(shape, method) for shape in layers)
    mark = 16 * len(layers)  # which weight the mask was made for
    counts = step * len(layers)
    if method.kind == "rows":
        stripes = sum(round(method.density * d_out) for d_out, _ in layers)
        return Memory(2 * P, 4 * n, 4 * n, 8 * n + counts, 2 * n + 8 * stripes + mark)
    if method.kind == "entries":
        return Memory(2 * P, 4 * n, 4 * n, 8 * n + counts, 2 * n + 4 * n + mark)
    sample = sum(2 * _sample(trained_entries(shape, method)) for shape in layers)
    return Memory(2 * P, 2 * n, 4 * n, 4 * n + counts, 2 * n + 4 * n + mark + sample)


def _sample(count: int) -> int:
    """Low halves that are remembered of a layer, to notice a foreign write."""
    every = max(1, count // 256)
    return -(-count // every)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each of N processes sends (and receives) in one step, and that one sync of a server takes.

    Attributes:
        ddp: ring all-reduce of the trained numbers' gradients.
        fsdp: all-gather of all parameters for the forward and again for the backward, reduce-scatter of
            the gradients; None where the package refuses FSDP2.
        sync: to a server that holds the model's state of the step before: the dense bf16 checkpoint, the factors, or
            the changed entries with their positions.
        sync_known: the same once the server knows the positions.
    """

    ddp: int
    fsdp: int | None
    sync: int
    sync_known: int


def traffic(model: ModelShape, method: Method, processes: int = 8) -> Traffic:
    """Raises ``ValueError`` for less than one process."""
    if processes < 1:
        raise ValueError(f"processes={processes}: at least 1")
    held = memory(model, method)
    share = (processes - 1) / processes
    gradients = held.gradients // 2 if method.kind == "split" else held.gradients  # DDP's buckets are bf16 there
    parameters = held.weights + (held.trained if method.kind != "master" else 0)  # masters stay with their owner
    if method.kind == "projected":
        parameters += held.other  # frozen parameters are gathered too
    ddp = round(2 * share * gradients)
    fsdp = None if method.kind == "split" else round(share * (2 * parameters + held.gradients))
    if method.is_sparse:
        n = sum(trained_entries(shape, method) for shape in model.linears())
        return Traffic(ddp, fsdp, 6 * n, 2 * n)
    if method.kind in ("lora", "projected"):
        return Traffic(ddp, fsdp, held.trained, held.trained)
    return Traffic(ddp, fsdp, held.weights, held.weights)
