"""A new adapter from a weighted sum of others: PEFT's ``add_weighted_adapter``, on updates instead of raw factors.

PEFT concatenates or decomposes ``lora_B @ lora_A``. Here an update also subtracts its start and is projected, so the
folded factors, whose product it is, take their place. The result is a plain product with scaling 1; it keeps the
guarantee of its parts where they share one.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from peft.utils.other import _freeze_adapter
from torch import Tensor

from ...geometry.numerics import full_precision
from ..combining import check_saved_modules, check_weights, copy_saved_modules, exact_targets
from .config import OffPrincipalLoraConfig
from .layer import OffPrincipalLinear
from .state import weight_of

if TYPE_CHECKING:
    from .model import OffPrincipalLoraModel

EXACT = ("svd", "cat")
ELEMENTWISE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
ON_RAW_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

Factors = tuple[Tensor, Tensor]  # (d_out, R), (R, d_in)


@dataclasses.dataclass(frozen=True)
class Combination:
    """How updates are combined; the options are those of PEFT's ``LoraModel.add_weighted_adapter``."""

    kind: str
    rank: int | None  # of "svd" kinds
    clamp: float | None
    density: float | None
    majority_sign: str


@full_precision()
def combined_factors(updates: list[Factors], weights: list[float], how: Combination, default_rank: int) -> Factors:
    """``left`` (d_out, R) and ``right`` (R, d_in) of the combined update of one layer, fp32.

    "cat" is exact; "svd" the best approximation of its rank, from a decomposition of R x R numbers.
    """
    left = torch.cat([w * f[0] for w, f in zip(weights, updates, strict=True)], dim=1)
    right = torch.cat([f[1] for f in updates], dim=0)
    if how.kind == "cat":
        return left, right
    rank = min(how.rank or default_rank, left.shape[0], right.shape[1])
    if how.kind == "svd":
        rank = min(rank, right.shape[0])  # the sum has no more
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        U, S, Vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        left, right = q_left @ (U[:, :rank] * S[:rank]), Vh[:rank] @ q_right.T
    else:
        U, S, Vh = torch.linalg.svd(_elementwise(updates, weights, how), full_matrices=False)
        left, right = U[:, :rank] * S[:rank], Vh[:rank]
    if how.clamp is not None:
        bound = torch.quantile(torch.cat([left.flatten(), right.flatten()]), how.clamp)
        left, right = left.clamp(-bound, bound), right.clamp(-bound, bound)
    return left, right


def _elementwise(updates: list[Factors], weights: list[float], how: Combination) -> Tensor:
    dense = [left @ right for left, right in updates]
    factors = torch.tensor(weights, device=dense[0].device)
    if how.density is None:
        raise ValueError(f"combination_type={how.kind!r} needs density, the fraction of entries to keep.")
    if how.kind == "ties_svd":
        out: Tensor = ties(dense, factors, how.density, how.majority_sign)
    elif how.kind == "dare_linear_svd":
        out = dare_linear(dense, factors, how.density)
    elif how.kind == "dare_ties_svd":
        out = dare_ties(dense, factors, how.density, how.majority_sign)
    else:
        out = magnitude_prune(dense, factors, how.density)
    return out


def add_weighted(
    tuner: OffPrincipalLoraModel, adapters: list[str], weights: list[float], name: str, how: Combination
) -> None:
    """Add adapter ``name``; see :meth:`~.model.OffPrincipalLoraModel.add_weighted_adapter`."""
    check_weights(tuner.peft_config, adapters, weights, name)
    how = dataclasses.replace(how, kind=_checked_kind(tuner, adapters, how))
    check_saved_modules(tuner.model, adapters)
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    default_rank = max(max([c.r, *(c.rank_pattern or {}).values()]) for c in configs)
    combined: dict[str, Factors] = {}
    for key, layer in tuner.model.named_modules():
        if isinstance(layer, OffPrincipalLinear):
            present = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.lora_A]
            if present:
                with torch.no_grad():
                    updates = [layer.effective_factors(adapter) for adapter, _ in present]
                    combined[key] = combined_factors(updates, [w for _, w in present], how, default_rank)
    tuner.peft_config[name] = _config(configs, {key: f[1].shape[0] for key, f in combined.items()})
    try:
        tuner.inject_adapter(tuner.model, name)
    except BaseException:  # interrupted or out of memory: no layer keeps half of it
        tuner.delete_adapter(name)
        raise
    _freeze_adapter(tuner.model, name)
    for key, (left, right) in combined.items():
        layer = tuner.model.get_submodule(key)
        assert isinstance(layer, OffPrincipalLinear)
        weight_of(layer.lora_B, name).data.copy_(left)
        weight_of(layer.lora_A, name).data.copy_(right)
    copy_saved_modules(tuner.model, adapters, name)


def _config(configs: list[OffPrincipalLoraConfig], ranks: dict[str, int]) -> OffPrincipalLoraConfig:
    """Plain factors with scaling 1; off-principal where all parts are, in the same directions."""
    kept = {(c.projection, c.principal_rank) for c in configs}
    projection, k = kept.pop() if len(kept) == 1 else ("none", 0)
    r = Counter(ranks.values()).most_common(1)[0][0]
    # ^ and the escape: a pattern matches the ends of names
    others = {f"^{re.escape(key)}": rank for key, rank in ranks.items() if rank != r}
    changes: dict[str, Any] = {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        **exact_targets(list(ranks), configs),
        "init_subspace": "kaiming",
        "init_source": "weight",
        "init_scale": "native",
        "init_factors": "A",
        "train_factors": "both",
        "projection": projection,
        "principal_rank": k,
    }
    return dataclasses.replace(configs[0], **changes)


def _checked_kind(tuner: OffPrincipalLoraModel, adapters: list[str], how: Combination) -> str:
    """The kind of combination. Raises ``ValueError`` for what would not be a combination of the updates."""
    kind = how.kind
    projected = [a for a in adapters if tuner.peft_config[a].projection != "none"]
    if kind in ON_RAW_FACTORS and not (kind == "linear" and len(adapters) == 1):
        pruning = "" if projected else f", or {', '.join(map(repr, ELEMENTWISE))}"
        raise ValueError(
            f"combination_type={kind!r} combines lora_A and lora_B separately, whose product is not the combination of "
            "the updates, and these updates also subtract starts and are projected. Use 'cat' (exact; the ranks add "
            f"up) or 'svd' (the best of svd_rank){pruning}."
        )
    known = (*EXACT, *ELEMENTWISE)
    if kind not in (*known, "linear"):
        raise ValueError(f"combination_type must be one of {', '.join(map(repr, known))}, got {kind!r}.")
    if kind in ELEMENTWISE and projected:
        raise ValueError(
            f"combination_type={kind!r} drops entries of the dense update, which would carry the projected adapter "
            f"{projected[0]!r} back into the leading singular directions. Use 'cat' or 'svd', which keep it off them."
        )
    rank = how.rank
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"svd_rank must be a positive integer, got {rank!r}.")
    return "cat" if kind == "linear" else kind
