"""Where the heads of an attention block lie in its tensors, and which blocks may be given another basis.

Layouts are found by the names that tensors carry, and a block is refused unless every tensor of it is known: a gate, a
norm on the values or a second projection that was overlooked would turn a change of basis into a change of function.
A module tree says more than the names and shapes of a checkpoint (child modules without tensors, settings such as
``clip_qkv``): prefer it where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Role = Literal["query", "key", "value", "output", "query_norm", "key_norm", "per_head"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = {"c_attn": "c_proj", "qkv_proj": "o_proj"}
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj")
_UNKNOWN = ("query_key_value", "Wqkv", "W_pack", "in_proj_weight", "qkv", "query", "to_q", "wq")
_MARKERS = frozenset((*_SEPARATE[:3], *_FUSED, *_LATENT, *_UNKNOWN, "q_attn"))
_BUFFERS = ("bias", "masked_bias")  # GPT-2's causal mask, one for all heads: (1, 1, n, n), and a number
_CHILDREN = frozenset((*_SEPARATE, "c_attn", "c_proj", "qkv_proj", "q_norm", "k_norm", "rotary_emb"))
_QUANTISED = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "weight_scale",
    "weight_scale_inv",
    "weight_format",
    "weight_packed",
)


class Part(NamedTuple):
    """A run of head channels in one tensor: `heads` times `width` of them along `axis`, from `start`."""

    name: str
    role: Role
    axis: int
    start: int
    heads: int
    width: int


@dataclass(frozen=True)
class AttentionLayout:
    """Where the heads of one attention block lie. Names are those of the model's tensors, in full.

    A weight is (d_out, d_in), or (d_in, d_out) where `transposed` (GPT-2's Conv1D). The heads are rows of q, k, v and
    columns of o; query head i reads key and value head i // (n_heads / n_kv_heads).

    Raises:
        ValueError: head numbers that do not divide, or a `fused` that is not an order of q, k and v in one tensor.
    """

    name: str  # the block's path: model.layers.0.self_attn
    n_heads: int
    n_kv_heads: int
    head_dim: int
    query: str
    key: str
    value: str
    output: str
    query_bias: str | None = None
    key_bias: str | None = None
    value_bias: str | None = None
    output_bias: str | None = None  # on the residual stream's side: no change of basis touches it
    fused: tuple[str, ...] = ()  # the order of "q", "k", "v" where one tensor holds all three
    transposed: bool = False
    query_norm: str | None = None  # gains of qk-norms
    key_norm: str | None = None
    norm_width: Literal["head", "all"] | None = None  # one gain of head_dim for every head, or one for every channel
    per_head: tuple[str, ...] = ()  # tensors of one number a query head: attention sinks
    rotary: bool = True  # q and k are rotated by position

    def __post_init__(self) -> None:
        sizes = (self.n_heads, self.n_kv_heads, self.head_dim)
        if min(sizes) < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.name}: n_heads, n_kv_heads, head_dim = {sizes}: n_kv_heads must divide n_heads")
        one = len({self.query, self.key, self.value}) == 1
        if self.fused and (sorted(self.fused) != ["k", "q", "v"] or not one):
            raise ValueError(f"{self.name}: fused = {self.fused} must order 'q', 'k' and 'v', which share one tensor")
        if not self.fused and len({self.query, self.key, self.value, self.output}) != 4:
            raise ValueError(f"{self.name}: q, k, v and o must be four tensors where they are not fused")
        if (self.query_norm is None and self.key_norm is None) != (self.norm_width is None):
            raise ValueError(
                f"{self.name}: norm_width = {self.norm_width!r} must be given with the norms, and only then"
            )

    @property
    def n_rep(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def layer(self) -> int | None:
        """The layer's index: the last number in the block's path."""
        numbers = [int(part) for part in self.name.split(".") if part.isdecimal()]
        return numbers[-1] if numbers else None

    def parts(self) -> tuple[Part, ...]:
        """Every run of head channels. A norm of one head's width is none: it is the same for every head."""
        return tuple(self._parts())

    def _parts(self) -> Iterator[Part]:
        inputs, outputs = (0, 1) if self.transposed else (1, 0)
        heads = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        roles: dict[str, Role] = {"q": "query", "k": "key", "v": "value"}
        weights = {"q": self.query, "k": self.key, "v": self.value}
        biases = {"q": self.query_bias, "k": self.key_bias, "v": self.value_bias}
        start = 0
        for letter in self.fused or ("q", "k", "v"):
            yield Part(weights[letter], roles[letter], outputs, start, heads[letter], self.head_dim)
            if (bias := biases[letter]) is not None:
                yield Part(bias, roles[letter], 0, start, heads[letter], self.head_dim)
            start += heads[letter] * self.head_dim if self.fused else 0
        yield Part(self.output, "output", inputs, 0, self.n_heads, self.head_dim)
        if self.norm_width == "all":
            if self.query_norm is not None:
                yield Part(self.query_norm, "query_norm", 0, 0, self.n_heads, self.head_dim)
            if self.key_norm is not None:
                yield Part(self.key_norm, "key_norm", 0, 0, self.n_kv_heads, self.head_dim)
        for name in self.per_head:
            yield Part(name, "per_head", 0, 0, self.n_heads, 1)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether the block's tensors are there, plain, floating point, of the right sizes, and its own.

        Raises ``ValueError`` naming the tensor: missing, of another size, quantised, a slice of a distributed
        tensor, or sharing memory with any other tensor of the mapping.
        """
        parts = self.parts()
        for part in parts:
            if part.name not in tensors:
                raise ValueError(f"{self.name}: there is no tensor {part.name!r}")
            _check_plain(tensors[part.name], part.name)
        for name in dict.fromkeys(part.name for part in parts):
            tensor, here = tensors[name], [part for part in parts if part.name == name]
            dims = 2 if name in (self.query, self.key, self.value, self.output) else 1
            wanted = sum(part.heads * part.width for part in here)
            if tensor.ndim != dims or tensor.shape[here[0].axis] != wanted:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, but {wanted} head channels on axis {here[0].axis} of {dims} "
                    f"are expected of {self.n_heads} query and {self.n_kv_heads} key and value heads of "
                    f"{self.head_dim}: another layout, or a tensor-parallel slice"
                )
        _check_own({part.name for part in parts}, tensors)


def _check_plain(tensor: Tensor, name: str) -> None:
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} is a {kind.__name__}: a quantised or distributed tensor has no plain rows to move")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is stored as {tensor.dtype}: a quantised weight cannot be moved to another basis")


def _check_own(names: set[str], tensors: Mapping[str, Tensor]) -> None:
    """No two names of memory that overlaps: writing one of them would change the other."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize, name))
    furthest = ("", 0, "")  # of the spans so far: device, end, name
    for device, start, end, name in sorted(spans):
        if device == furthest[0] and start < furthest[1] and names & {name, furthest[2]}:
            raise ValueError(f"{furthest[2]} and {name} share memory (tied): one cannot change without the other")
        if device != furthest[0] or end > furthest[1]:
            furthest = (device, end, name)


# ---- finding


def find_layouts(
    source: nn.Module | Mapping[str, Tensor],
    *,
    within: str = "",
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
) -> tuple[AttentionLayout, ...]:
    """The layout of every attention block of a model, or of a state dict (tensors on "meta" will do).

    Known: `q_proj`, `k_proj`, `v_proj`, `o_proj` with biases, qk-norms and sinks (Llama, Qwen2, Qwen3, Mistral, Gemma
    to Gemma 3, OLMo 2, gpt-oss), `qkv_proj` with `o_proj` (Phi-3), and GPT-2's `c_attn` with `c_proj`. Numbers that
    are not given come from the block or its `config`; a state dict has neither, so it needs `num_attention_heads`, and
    what only a config or a module without tensors tells (`clip_qkv`, ALiBi, keys and values that other layers read, as
    in Gemma 3n) is not seen there.
    Without `num_key_value_heads` there are as many as query heads; without `head_dim` it is d_in / heads.

    Args:
        within: only blocks under this path (the text part of a model with a vision tower, for instance).

    Raises:
        ValueError: no block, or one that cannot be transformed, with every block's reason: an unknown layout or
            tensor, cross attention, multi-head latent attention, sizes that contradict the numbers (tensor-parallel
            slices), quantised, tied or adapted tensors.
    """
    tensors = named_tensors(source)
    given = {"num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads}
    layouts, refused = [], []
    for block in _blocks(tensors, within):
        try:
            layouts.append(_layout(block, tensors, _facts(source, block, given | {"head_dim": head_dim})))
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("these attention blocks cannot be given another basis:\n" + "\n".join(refused))
    if not layouts:
        names = ", ".join(sorted(_MARKERS))
        raise ValueError(f"no attention block under {within!r} among {len(tensors)} tensors: looked for {names}")
    return tuple(layouts)


def named_tensors(source: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All parameters and buffers of a module, tied ones by every name; a mapping is returned as it is."""
    if not isinstance(source, nn.Module):
        return source
    parameters = source.named_parameters(remove_duplicate=False)
    return dict([*parameters, *source.named_buffers(remove_duplicate=False)])


def _blocks(tensors: Mapping[str, Tensor], within: str) -> list[str]:
    """Paths that hold a projection by a known name, in order."""
    blocks: dict[str, None] = {}
    for name in tensors:
        path = name.split(".")
        place = next((i for i, part in enumerate(path) if part in _MARKERS), None)
        if place is not None and (not within or f"{name}.".startswith(f"{within}.")):
            blocks[".".join(path[:place])] = None
    return list(blocks)


@dataclass
class _Facts:
    """What is known of a block beside its tensors."""

    numbers: Mapping[str, int | None]
    module: nn.Module | None
    config: Any

    def number(self, name: str, default: int | None) -> int:
        for value in (self.numbers.get(name), getattr(self.module, name, None), getattr(self.config, name, None)):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if default is None:
            raise ValueError(f"{name} is not known: give it as a number")
        return default


def _facts(source: nn.Module | Mapping[str, Tensor], block: str, numbers: Mapping[str, int | None]) -> _Facts:
    if not isinstance(source, nn.Module):
        return _Facts(numbers, None, None)
    module = source.get_submodule(block)
    config = getattr(module, "config", None)
    return _Facts(numbers, module, getattr(source, "config", None) if config is None else config)


def _layout(block: str, tensors: Mapping[str, Tensor], facts: _Facts) -> AttentionLayout:
    where = f"{block or 'the block'}: "
    prefix = f"{block}." if block else ""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    children = {name.partition(".")[0] for name in inside}
    if reason := _refusal(block, children, facts):
        raise ValueError(where + reason)
    fused = next((name for name in _FUSED if name in children), None)
    projections = (fused, fused, fused, _FUSED[fused]) if fused else _SEPARATE
    if missing := [name for name in dict.fromkeys(projections) if f"{name}.weight" not in inside]:
        raise ValueError(where + _why_missing(missing, inside))
    known = {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
    known |= {"q_norm.weight", "k_norm.weight", "sinks"}
    known |= {name for name in _BUFFERS if name in inside and tuple(inside[name].shape[:2]) in ((), (1, 1))}
    unknown = [name for name in inside if name not in known and not name.startswith("rotary_emb.")]
    if unknown:
        raise ValueError(where + _why_unknown(unknown))
    for name in projections:
        _check_plain(inside[f"{name}.weight"], f"{prefix}{name}.weight")
    if fused == "c_attn" and inside["c_attn.weight"].shape[0] != inside["c_proj.weight"].shape[1]:
        shape = tuple(inside["c_attn.weight"].shape)
        raise ValueError(
            f"{where}c_attn.weight {shape} is not (d_in, 3 d_in): programs that store it otherwise order its rows "
            "differently; write the AttentionLayout yourself"
        )
    try:
        built = _build(block, prefix, projections, inside, facts)
    except ValueError as error:
        raise ValueError(where + str(error)) from None
    built.check(tensors)
    return built


def _build(
    block: str, prefix: str, projections: tuple[str, ...], inside: Mapping[str, Tensor], facts: _Facts
) -> AttentionLayout:
    fused = projections[0] == projections[1]
    transposed = projections[0] == "c_attn" or type(getattr(facts.module, projections[0], None)).__name__ == "Conv1D"
    heads = facts.number("num_attention_heads", None)
    kv_heads = heads if projections[0] == "c_attn" else facts.number("num_key_value_heads", heads)
    d_in = inside[f"{projections[0]}.weight"].shape[0 if transposed else 1]
    head_dim = facts.number("head_dim", d_in // heads)

    def place(name: str, kind: str = "weight") -> str | None:
        return f"{prefix}{name}.{kind}" if f"{name}.{kind}" in inside else None

    q, k, v, o = projections
    norms = {inside[f"{n}.weight"].numel() for n in ("q_norm", "k_norm") if place(n)}
    rotates = hasattr(facts.module, "rotary_emb") or any(name.startswith("rotary_emb.") for name in inside)
    return AttentionLayout(
        name=block,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        query=f"{prefix}{q}.weight",
        key=f"{prefix}{k}.weight",
        value=f"{prefix}{v}.weight",
        output=f"{prefix}{o}.weight",
        query_bias=place(q, "bias"),
        key_bias=place(k, "bias"),
        value_bias=place(v, "bias"),
        output_bias=place(o, "bias"),
        fused=("q", "k", "v") if fused else (),
        transposed=transposed,
        query_norm=place("q_norm"),
        key_norm=place("k_norm"),
        norm_width=None if not norms else "head" if norms == {head_dim} else "all",
        per_head=(f"{prefix}sinks",) if "sinks" in inside else (),
        rotary=q != "c_attn" or rotates,
    )


def _refusal(block: str, children: set[str], facts: _Facts) -> str | None:
    """Why the block cannot be transformed, from what it is rather than from its sizes."""
    if found := sorted(children & set(_LATENT)):
        return f"multi-head latent attention ({', '.join(found)}): heads share a compressed key and value"
    crossed = "cross" in block.rpartition(".")[2].lower() or "encoder_attn" in block or "q_attn" in children
    if crossed or getattr(facts.module, "is_cross_attention", False):
        return "cross attention: its keys and values are of another sequence"
    if found := sorted(children & set(_UNKNOWN)):
        return f"unknown layout ({', '.join(found)}): the order of its heads differs between programs"
    if facts.module is not None:
        strange = [
            name
            for name, child in facts.module.named_children()
            if name not in _CHILDREN and not isinstance(child, nn.Dropout | nn.Identity)
        ]
        if strange:
            return f"unknown modules {', '.join(strange)}: they may not commute with a change of basis"
    if getattr(facts.config, "clip_qkv", None) is not None:
        return f"clip_qkv = {facts.config.clip_qkv}: clipped values do not rotate"
    if getattr(facts.config, "num_kv_shared_layers", None):
        return "num_kv_shared_layers: other layers read this one's keys and values"
    if getattr(facts.config, "alibi", False) or getattr(facts.config, "position_embedding_type", "") == "alibi":
        return "ALiBi: every head has its own slope, which is no tensor that could move with it"
    return None


def _why_missing(missing: list[str], inside: Mapping[str, Tensor]) -> str:
    reason = _why_unknown([name for name in inside if name.partition(".")[0] in missing])
    return reason if "quantised" in reason or "adapter" in reason else f"it has no {'.weight, '.join(missing)}.weight"


def _why_unknown(unknown: list[str]) -> str:
    some = ", ".join(unknown[:4]) + (", …" if len(unknown) > 4 else "")
    if any(name.split(".")[-1] in _QUANTISED or ".weight." in name for name in unknown):
        return f"quantised: {some}"
    if any("base_layer" in name.split(".") or "lora_" in name for name in unknown):
        return f"an adapter is on it ({some}): merge or unload it first"
    return f"unknown tensors {some}: they may not commute with a change of basis"
