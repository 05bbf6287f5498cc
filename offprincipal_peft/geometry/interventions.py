"""Changes of basis inside attention blocks that leave the model's function as it is.

The channels between the projections belong to nobody: values may be rotated inside a head if the output projection is
rotated back, and heads may change places. Training in another basis tells an effect of the weights' geometry from one
of the coordinates, on one condition: what is compared is carried into the new basis. An overlap of update masks
entry by entry falls under any rotation, so a fall alone says nothing. For that every :class:`Intervention` carries
weights, updates and masks along:

- an update (and a gradient) maps linearly and exactly: dW' = T(dW) with the same orthogonal T as W' = T(W);
- under a permutation a mask of entries maps exactly too;
- under a rotation it does not: the image of one entry is spread over the head's head_dim channels, and the image of a
  set of entries is a subspace that no set of entries spans. Masks that are *made from the weight* can be made again
  from the rotated weight (:meth:`Intervention.recompute_mask`), and figures that do not depend on coordinates, such as
  :func:`energy_shares`, can be compared as they are.

Trade-off: fp64 copies of one tensor at a time, so that a rotation costs a single rounding to the storage dtype (for 16
bits torch's own, which passes through fp32). Permutations move bytes and round nothing.

Source: 2511.08567, its Proposition D.1 for the rotation and the permutation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention_layout import FLOATS, AttentionLayout, Part, named_tensors
from .masks import MaskOptions, build_mask

ORTHOGONAL_TOLERANCE = 1e-10  # max |R^T R - I| in fp64: a rotation made in fp32 would change the function by 1e-7


# ---- interventions


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of basis of one attention block. Made by the three class methods, `inverse` and `then`.

    New key and value head j is old head `kv_order[j]`, its values turned by R = `value_rotation[j]` (v' = R^T v, and
    the columns of o alike), its keys and queries by `query_key_rotation[j]`; new query head i is old `query_order[i]`.
    """

    layout: AttentionLayout
    kv_order: tuple[int, ...]
    query_order: tuple[int, ...]
    value_rotation: Tensor | None = None  # fp64 (n_kv_heads, head_dim, head_dim)
    query_key_rotation: Tensor | None = None  # the same

    @classmethod
    def rotate_values(cls, layout: AttentionLayout, rotation: Tensor) -> Intervention:
        """W_v' = R^T W_v, b_v' = R^T b_v, and W_o' = W_o R for every query head of the group.

        Args:
            rotation: orthogonal, (head_dim, head_dim) for all heads or (n_kv_heads, head_dim, head_dim).

        Raises ``ValueError`` for another shape, or one that is not orthogonal within 1e-10.
        """
        return cls(*_identity(layout), value_rotation=_checked_rotation(rotation, layout))

    @classmethod
    def rotate_queries_and_keys(cls, layout: AttentionLayout, rotation: Tensor) -> Intervention:
        """W_q' = R^T W_q and W_k' = R^T W_k with their biases: the scores q . k stay. `rotation` as `rotate_values`.

        Only without rotary embedding and qk-norm (GPT-2), which stand between the projection and the score: R would
        have to commute with a turn by every position, and with the norm's gains.

        Raises ``ValueError`` where the layout has either, naming it, and as `rotate_values`.
        """
        if layout.rotary:
            raise ValueError(
                f"{layout.name}: queries and keys pass a rotary embedding, which turns channel pairs by the position; "
                "a rotation of the head does not commute with it"
            )
        if layout.norm_width is not None:
            raise ValueError(
                f"{layout.name}: queries and keys pass a qk-norm, whose gains are those of single channels"
            )
        return cls(*_identity(layout), query_key_rotation=_checked_rotation(rotation, layout))

    @classmethod
    def permute(
        cls, layout: AttentionLayout, kv_order: Sequence[int], within: Sequence[Sequence[int]] | None = None
    ) -> Intervention:
        """Heads in another order: new key and value head j is old head `kv_order[j]`, its query heads with it.

        Args:
            kv_order: a permutation of range(n_kv_heads).
            within: for each new head j a permutation of range(n_rep): which of the group's query heads comes when.

        Raises ``ValueError`` for anything that is no such permutation.
        """
        kv = _checked_order(kv_order, layout.n_kv_heads, "kv_order", layout)
        groups = [range(layout.n_rep)] * layout.n_kv_heads if within is None else list(within)
        if len(groups) != layout.n_kv_heads:
            raise ValueError(f"{layout.name}: within has {len(groups)} orders for {layout.n_kv_heads} groups")
        inner = [_checked_order(g, layout.n_rep, f"within[{j}]", layout) for j, g in enumerate(groups)]
        query = tuple(old * layout.n_rep + r for old, order in zip(kv, inner, strict=True) for r in order)
        return cls(layout, kv, query)

    @property
    def is_permutation(self) -> bool:
        """No rotation in it: bytes move, nothing is rounded, every mask has an exact image."""
        return self.value_rotation is None and self.query_key_rotation is None

    def inverse(self) -> Intervention:
        """The intervention that undoes this one: bit for bit for permutations, up to rounding for rotations."""
        kv = _inverse_order(self.kv_order)
        rotations = [
            None if R is None else rearrange(R[list(kv)], "h c d -> h d c").contiguous()
            for R in (self.value_rotation, self.query_key_rotation)
        ]
        return Intervention(self.layout, kv, _inverse_order(self.query_order), *rotations)

    def then(self, other: Intervention) -> Intervention:
        """This one and after it `other`, as one (which rounds once). Raises ``ValueError`` for different layouts."""
        if self.layout != other.layout:
            raise ValueError(f"interventions on {self.layout.name} and {other.layout.name} with different layouts")
        kv = tuple(self.kv_order[j] for j in other.kv_order)
        query = tuple(self.query_order[i] for i in other.query_order)
        pairs = [(R if R is None else R[list(other.kv_order)]) for R in (self.value_rotation, self.query_key_rotation)]
        rotations = [
            second if first is None else first if second is None else first @ second
            for first, second in zip(pairs, (other.value_rotation, other.query_key_rotation), strict=True)
        ]
        return Intervention(self.layout, kv, query, *rotations)

    # ---- on tensors

    def transform(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New tensors for the block, by name, in their dtypes; those that keep their place are left out.

        Raises ``ValueError`` as :meth:`AttentionLayout.check`, for tensors without data ("meta"), and where a
        rotation meets values that are not finite or makes one (fp16).
        """
        self.layout.check(tensors)
        return {name: self._moved(tensors[name], name) for name in self.moved_names()}

    def moved_names(self) -> tuple[str, ...]:
        """The tensors that change, in the layout's order."""
        return tuple(dict.fromkeys(part.name for part in self.layout.parts() if self._moves(part)))

    def carry_weight(self, weight: Tensor, name: str) -> Tensor:
        """The block's tensor `name` in the new basis: `weight` in its stored shape, rounded once to its dtype.

        Raises ``ValueError`` for a name or a size that is not the layout's, and as :meth:`transform`.
        """
        return self._moved(weight, name)

    def carry_update(self, update: Tensor, name: str) -> Tensor:
        """dW' of an update dW of the tensor `name`: the same linear map, orthogonal, so gradients map so too.

        Of a gradient in the old basis it is the gradient in the new one. One step of gradient descent, with momentum
        or weight decay, therefore carries over; Adam's, which divides entry by entry, does so under permutations only.
        Rounded once to the update's dtype. Errors as :meth:`carry_weight`.
        """
        return self._moved(update, name)

    def carry_mask(self, mask: Tensor, name: str) -> Tensor:  # bool, the stored shape of the tensor -> bool, the same
        """The image of a mask of entries of the tensor `name`: the entries of dW' that an update on `mask` can reach.

        Exact for permutations. Under a rotation it exists only where the mask takes all or none of a head's channels
        in each input column of v (each output row of o): refused otherwise. What to compare instead: the carried
        update, `unchanged(W', W' + dW')` with W' and dW' from `carry_weight` and `carry_update` (mind its baseline: it
        is dense in each head that it touches), or :meth:`recompute_mask`.

        Raises ``ValueError`` for a mask without an exact image, and as :meth:`carry_weight`; ``TypeError`` where the
        mask is not boolean.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: a mask must be boolean, got {mask.dtype}; updates go through carry_update")
        result = mask.clone()
        for part in self._parts_of(mask, name):
            heads = _heads(mask, part)
            if self._rotation(part) is not None and bool((heads.any(1) != heads.all(1)).any()):
                raise ValueError(
                    f"{name}: under a rotation this mask has no image: it takes some of a head's channels and leaves "
                    "others, and the rotation mixes them; carry the update, or use recompute_mask"
                )
            _heads(result, part).copy_(heads[list(self._order(part))])
        return result

    def recompute_mask(self, weight: Tensor, name: str, expression: str, options: MaskOptions | None = None) -> Tensor:
        """The mask that a mask expression gives for the carried weight: bool, in the tensor's stored shape.

        Of an old weight (stored shape) under a permutation this is `carry_mask` of its mask. Under a rotation it is
        `build_mask` of the new weight. The principal score moves with the basis: W' = T W with T orthogonal has the
        reconstruction W'_(k) = T W_(k), so `principal` is the mask of |T W_(k)|: not the old mask carried, which does
        not exist, but what the same rule says of the same matrix in new coordinates. `low` is made again likewise;
        `random` is drawn as for the old weight and does not move. Draws go by the layer's name (`name` without
        ``.weight``), as those of the sparse method do, whose masks therefore compare with these.

        Raises ``ValueError`` for a tensor that is not 2-D, and as :func:`build_mask` and :meth:`carry_weight`.
        """
        turned = any(self._rotation(part) is not None for part in self._parts_of(weight, name))
        weight = self._moved(weight, name) if turned else weight
        flip = self.layout.transposed and weight.ndim == 2
        layer = name.removesuffix(".weight")
        entries = build_mask(weight.T.contiguous() if flip else weight, expression, options, name=layer).entries
        entries = entries.T.contiguous() if flip else entries
        return entries if turned else self.carry_mask(entries, name)

    def _moved(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.is_meta or tensor.dtype not in FLOATS:
            what = "has no data (it is on 'meta')" if tensor.is_meta else f"is {tensor.dtype}, not floating point"
            raise ValueError(f"{name} {what}: nothing can be moved")
        tensor = tensor.detach()
        result = tensor.clone()
        for part in self._parts_of(tensor, name):
            heads = _heads(tensor, part)[list(self._order(part))]
            if (R := self._rotation(part)) is not None:
                if not bool(heads.isfinite().all()):
                    raise ValueError(f"{name} holds NaN or infinite entries, which a rotation would spread")
                heads = torch.einsum("hcd,hc...->hd...", R.to(tensor.device), heads.double()).to(tensor.dtype)
                if not bool(heads.isfinite().all()):
                    raise ValueError(f"{name}: rotated entries are too large for {tensor.dtype}")
            _heads(result, part).copy_(heads)
        return result

    def _parts_of(self, tensor: Tensor, name: str) -> list[Part]:
        parts = [part for part in self.layout.parts() if part.name == name]
        if not parts:
            known = ", ".join(dict.fromkeys(part.name for part in self.layout.parts()))
            raise ValueError(f"{self.layout.name} has no head channels in a tensor {name!r}; it has them in {known}")
        wanted, axis = sum(part.heads * part.width for part in parts), parts[0].axis
        if tensor.ndim <= axis or tensor.shape[axis] != wanted:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but axis {axis} must hold {wanted} head channels")
        return [part for part in parts if self._moves(part)]

    def _moves(self, part: Part) -> bool:
        return self._rotation(part) is not None or self._order(part) != tuple(range(part.heads))

    def _order(self, part: Part) -> tuple[int, ...]:
        return self.kv_order if part.role in ("key", "value", "key_norm") else self.query_order

    def _rotation(self, part: Part) -> Tensor | None:
        """(heads, head_dim, head_dim): one a head of the part, n_rep copies for query heads."""
        R = {
            "value": self.value_rotation,
            "output": self.value_rotation,
            "query": self.query_key_rotation,
            "key": self.query_key_rotation,
        }.get(part.role)
        copies = 1 if part.role in ("key", "value") else self.layout.n_rep
        return None if R is None else repeat(R, "h c d -> (h r) c d", r=copies)


def _heads(tensor: Tensor, part: Part) -> Tensor:
    """A view (heads, width, …) of the part."""
    run = tensor.narrow(part.axis, part.start, part.heads * part.width).movedim(part.axis, 0)
    return run.unflatten(0, (part.heads, part.width))


def _identity(layout: AttentionLayout) -> tuple[AttentionLayout, tuple[int, ...], tuple[int, ...]]:
    return layout, tuple(range(layout.n_kv_heads)), tuple(range(layout.n_heads))


def _inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _checked_order(order: Sequence[int], count: int, what: str, layout: AttentionLayout) -> tuple[int, ...]:
    found = tuple(int(i) for i in order)
    if sorted(found) != list(range(count)):
        raise ValueError(f"{layout.name}: {what} = {found} is no permutation of 0 to {count - 1}")
    return found


def _checked_rotation(rotation: Tensor, layout: AttentionLayout) -> Tensor:
    n, d = layout.n_kv_heads, layout.head_dim
    if tuple(rotation.shape) not in ((d, d), (n, d, d)):
        raise ValueError(
            f"{layout.name}: the rotation has shape {tuple(rotation.shape)}, but ({d}, {d}) for all heads or "
            f"({n}, {d}, {d}) is expected"
        )
    R = rotation.detach().to("cpu", torch.float64).expand(n, d, d).clone()
    error = float((R.mT @ R - torch.eye(d, dtype=torch.float64)).abs().max())
    if not error <= ORTHOGONAL_TOLERANCE:
        raise ValueError(
            f"{layout.name}: the rotation is not orthogonal within {ORTHOGONAL_TOLERANCE:.0e}: max |R^T R - I| = "
            f"{error:.1e}; make it in fp64"
        )
    return R


# ---- on blocks and models


def rotate(tensors: Mapping[str, Tensor], layout: AttentionLayout, rotation: Tensor) -> dict[str, Tensor]:
    """New value and output tensors of a block: :meth:`Intervention.rotate_values` on `tensors`, which stay as they are.

    The attention block's output is unchanged up to one rounding of each tensor to its dtype. Errors as there and as
    :meth:`Intervention.transform`. Source: 2511.08567, Proposition D.1.
    """
    return Intervention.rotate_values(layout, rotation).transform(tensors)


def permute_heads(
    tensors: Mapping[str, Tensor],
    layout: AttentionLayout,
    kv_order: Sequence[int],
    within: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """New tensors of a block with its heads in another order, exactly: :meth:`Intervention.permute` on `tensors`."""
    return Intervention.permute(layout, kv_order, within).transform(tensors)


def apply_interventions(
    target: nn.Module | Mapping[str, Tensor],
    interventions: Iterable[Intervention],
    *,
    layers: Iterable[int] | None = None,
) -> tuple[str, ...]:
    """Write interventions into a model's or a state dict's own tensors; the names of those that changed.

    Several on one block follow each other in order and round once. Every block is checked before the first is written,
    and a block is written whole or left as it was. Optimiser states and cached keys and values stay in the old basis.

    Args:
        layers: only the blocks of these layer indices.

    Raises:
        ValueError: a layer without an intervention, and as :meth:`Intervention.transform`.
    """
    blocks: dict[str, Intervention] = {}
    for each in interventions:
        known = blocks.get(each.layout.name)
        blocks[each.layout.name] = each if known is None else known.then(each)
    if layers is not None:
        wanted = set(layers)
        if missing := sorted(wanted - {each.layout.layer for each in blocks.values()}):
            raise ValueError(f"no intervention on layers {missing}; there are some on {', '.join(blocks) or 'none'}")
        blocks = {name: each for name, each in blocks.items() if each.layout.layer in wanted}
    tensors = named_tensors(target)
    for each in blocks.values():
        each.layout.check(tensors)
    changed: list[str] = []
    for each in blocks.values():
        new = each.transform(tensors)
        _write(tensors, new)
        changed += new
    return tuple(changed)


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """All of `new` in place, or none of it."""
    old: dict[str, Tensor] = {}
    try:
        for name, value in new.items():
            old[name] = tensors[name].detach().clone()
            tensors[name].copy_(value)
    except BaseException:
        for name, value in old.items():
            with contextlib.suppress(RuntimeError):  # the tensor that refused the write: it is as it was
                tensors[name].copy_(value)
        raise
