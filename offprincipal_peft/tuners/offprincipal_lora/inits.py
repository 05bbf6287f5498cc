"""Where an adapter starts: from a weight, a rank and the axes of the config to factor values and bases.

Everything a layer needs is computed here before the model is touched, so that a layer that cannot be started (too
large an r or k, NaN, no null space) leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...geometry.masks import lowest_mask
from ...geometry.numerics import full_precision
from ...geometry.spectrum import Triplets, WeightSpectrum
from ...geometry.subspace import project_off
from .config import OffPrincipalLoraConfig

Side = Literal["output", "input"]

# Norm of a row of LoRA's Kaiming draw: d_in entries of variance 1 / (3 d_in).
LORA_ROW_NORM = 1 / math.sqrt(3)

# A start whose projected norm is below this fraction of its norm lies inside the projected-out subspace.
_DEAD_FRACTION = 1e-3


class LayerStart(NamedTuple):
    """Starting values of one adapter on one layer, fp32 (fp64 for an fp64 weight), on the weight's device."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    U: Tensor | None  # (d_out, k) orthonormal columns, where the output side is projected
    V: Tensor | None  # (d_in, k) orthonormal columns, where the input side is projected


class Bases(NamedTuple):
    """Top-k bases already known for a layer (from another adapter on it); ``None`` where they are not."""

    U: Tensor | None
    V: Tensor | None


@dataclass(frozen=True)
class StartRequest:
    """What one layer is asked for: the rank, k and scaling after patterns and fractions were resolved."""

    name: str
    shape: tuple[int, int]  # (d_out, d_in)
    r: int
    k: int
    scaling: float
    config: OffPrincipalLoraConfig

    @property
    def where(self) -> str:
        return f"{self.name} (weight {self.shape[0]} x {self.shape[1]})"

    @property
    def start_key(self) -> tuple[object, ...]:
        """Two adapters of a layer with equal keys start at the same values."""
        c = self.config
        scaling = self.scaling if c.init_scale == "spectral" else None
        rho = c.geora_rho if c.init_source == "geora" else None
        axes = (c.init_subspace, c.init_source, c.init_scale, c.init_factors, c.seed)
        return (self.r, scaling, rho, *axes)


def check_request(request: StartRequest) -> None:
    """Refuse an r or k that the weight's shape cannot hold. Raises ``ValueError`` naming the layer and the option."""
    d_out, d_in = request.shape
    c, r, k, smaller = request.config, request.r, request.k, min(request.shape)
    if k >= smaller:
        raise ValueError(
            f"{request.where}: principal_rank gives k = {k}, which must be below min(weight.shape) = {smaller}; "
            "with every direction projected out the update would be identically zero."
        )
    if c.init_subspace == "kaiming":
        return
    if c.paired or c.init_subspace == "top":
        limit, what = smaller, "min(weight.shape)"
        taken = r + k if c.init_subspace == "bottom" else r
        if taken > limit:
            _refuse_rank(request, taken, limit, what)
        return
    for factor, limit, what in (("A", d_in, "d_in"), ("B", d_out, "d_out")):
        if c.init_factors not in (factor, "both"):
            continue
        taken = r + k if c.init_subspace in ("bottom", "null") else r
        if taken > limit:
            _refuse_rank(request, taken, limit, what)


def _refuse_rank(request: StartRequest, taken: int, limit: int, what: str) -> None:
    asked = f"r = {request.r}" if taken == request.r else f"r + k = {request.r} + {request.k} = {taken}"
    raise ValueError(
        f"{request.where}: init_subspace={request.config.init_subspace!r} with init_factors="
        f"{request.config.init_factors!r} needs {asked} directions, but {what} is {limit}. Lower r"
        + (" or principal_rank" if request.k else "")
        + " (rank_pattern sets them per layer), or exclude the layer."
    )


@full_precision()
def compute_start(weight: Tensor, request: StartRequest, known: Bases | None = None) -> LayerStart:
    """Starting factors and bases of one layer.

    Args:
        weight: (d_out, d_in), the layer's original weight, any floating dtype, with values.
        request: the resolved rank, k, scaling and config.
        known: top-k bases to reuse instead of computing them.

    Raises:
        ValueError: NaN or infinite entries, too small a null space, or a start that the projection or a zero
            spectrum leaves with no gradient; each names the layer.
    """
    config = request.config
    spectrum = WeightSpectrum(weight, seed=config.seed, name=request.name)
    needs_u = config.projection in ("output", "both")
    needs_v = config.projection in ("input", "both")
    U, V = known or Bases(None, None)
    if (needs_u and U is None) or (needs_v and V is None):
        top = spectrum.top(request.k)
        U, V = top.U, top.V
    U, V = U if needs_u else None, V if needs_v else None
    A, B = _started_factors(weight, spectrum, request)
    _check_alive(A, B, U, V, request)
    return LayerStart(A.contiguous(), B.contiguous(), U, V)


def needs_decomposition(request: StartRequest, known: Bases) -> bool:
    """Whether :func:`compute_start` would decompose the weight, given the bases already known."""
    config = request.config
    return (
        config.init_subspace in ("top", "bottom", "null")
        or (config.projection in ("output", "both") and known.U is None)
        or (config.projection in ("input", "both") and known.V is None)
    )


def _started_factors(weight: Tensor, spectrum: WeightSpectrum, request: StartRequest) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r): the start where ``init_factors`` says so, zero elsewhere."""
    config, (d_out, d_in), r = request.config, request.shape, request.r
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A = torch.zeros(r, d_in, dtype=dtype, device=weight.device)
    B = torch.zeros(d_out, r, dtype=dtype, device=weight.device)
    start_A, start_B = config.init_factors in ("A", "both"), config.init_factors in ("B", "both")
    if config.paired or config.init_subspace == "top":
        source = spectrum if config.init_source == "weight" else _geora_spectrum(weight, spectrum, request)
        triplets = source.top(r) if config.init_subspace == "top" else source.bottom(r)
        rows, columns = _scaled_triplets(triplets, request)
        if start_A:
            A.copy_(rows)
        if start_B:
            B.copy_(columns)
        return A, B
    if start_A:
        A.copy_(_one_sided_start(weight, spectrum, request, "input"))
    if start_B:
        B.copy_(_one_sided_start(weight, spectrum, request, "output").T)
    return A, B


def _scaled_triplets(triplets: Triplets, request: StartRequest) -> tuple[Tensor, Tensor]:
    """Unit: V_r^T and U_r. Spectral: sqrt(sigma / s) V^T and U sqrt(sigma / s), so that s B0 A0 = U_r S_r V_r^T.

    Lora: the unit start over sqrt(3).
    """
    if request.config.init_scale != "spectral":
        norm = LORA_ROW_NORM if request.config.init_scale == "lora" else 1.0
        return norm * triplets.V.T, norm * triplets.U
    root = (triplets.S / request.scaling).sqrt()  # (r,)
    return root[:, None] * triplets.V.T, triplets.U * root


def _one_sided_start(weight: Tensor, spectrum: WeightSpectrum, request: StartRequest, side: Side) -> Tensor:
    """Rows (r, d_side) that need no partner on the other side: bottom, null, random or kaiming."""
    rows = _unscaled_rows(weight, spectrum, request, side)
    scale = request.config.init_scale
    if request.config.init_subspace == "kaiming" and scale != "native":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows * LORA_ROW_NORM if scale == "lora" else rows


def _unscaled_rows(weight: Tensor, spectrum: WeightSpectrum, request: StartRequest, side: Side) -> Tensor:
    """Rows (r, d_side) of norm 1, and LoRA's draw as it is drawn."""
    config, r = request.config, request.r
    d = request.shape[1] if side == "input" else request.shape[0]
    if config.init_subspace == "bottom":
        source = spectrum if config.init_source == "weight" else _geora_spectrum(weight, spectrum, request)
        return source.minor(r, side).T
    if config.init_subspace == "null":
        try:
            return spectrum.null(r, side).T
        except ValueError as error:
            raise ValueError(
                f"{error}; use init_subspace='bottom', which takes what null space there is first"
            ) from None
    factor = "A" if side == "input" else "B"
    generator = torch.Generator().manual_seed(layer_seed(config.seed, request.name, factor))
    if config.init_subspace == "random":
        gauss = torch.randn(d, r, generator=generator, dtype=torch.float64)
        q, upper = torch.linalg.qr(gauss)  # Haar once the signs of R's diagonal are absorbed
        return (q * torch.sign(torch.diagonal(upper))).T
    # LoRA's draw: kaiming_uniform_ with a = sqrt(5) on an nn.Linear weight, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    fan_in = d if factor == "A" else r
    return (torch.rand(r, d, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(fan_in)


def layer_seed(seed: int, name: str, factor: str) -> int:
    """A 63-bit seed that differs per layer and factor and does not depend on the order of the layers."""
    digest = hashlib.sha256(f"{seed}/{name}/{factor}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def geora_weight(weight: Tensor, triplets: Triplets, rho: float) -> Tensor:
    """GeoRA's masked weight: W on the lowest rho of |W_(r)| together with the lowest rho of |W|, zero elsewhere.

    Args:
        weight: (d_out, d_in).
        triplets: the top-r singular triplets of ``weight``, whose product is W_(r).
        rho: fraction of entries that each mask keeps, in (0, 1).

    Source: GeoRA (2601.09361), the geometry-aware mask before its SVD.
    """
    W = weight.to(triplets.U.dtype)
    reconstruction = (triplets.U * triplets.S) @ triplets.V.T
    mask = lowest_mask(reconstruction.abs(), rho) | lowest_mask(W.abs(), rho)
    return torch.where(mask, W, torch.zeros_like(W))


def _geora_spectrum(weight: Tensor, spectrum: WeightSpectrum, request: StartRequest) -> WeightSpectrum:
    masked = geora_weight(weight, spectrum.top(request.r), request.config.geora_rho)
    return WeightSpectrum(masked, seed=request.config.seed, name=f"{request.name}, GeoRA-masked,")


def _check_alive(A: Tensor, B: Tensor, U: Tensor | None, V: Tensor | None, request: StartRequest) -> None:
    """Some factor must receive a gradient at the start: B does through A0 (I - V V^T), A through (I - U U^T) B0."""
    config = request.config
    routes = []
    for factor, start, basis, other in (("A", A.T, V, "B"), ("B", B, U, "A")):
        if config.init_factors not in (factor, "both") or config.train_factors not in (other, "both"):
            continue
        norm = start.norm()
        kept = norm if basis is None else project_off(start, basis).norm()
        routes.append((bool(norm == 0), bool(kept <= _DEAD_FRACTION * norm)))
    if any(not zero and not dead for zero, dead in routes):
        return
    if all(zero for zero, _ in routes):
        raise ValueError(
            f"{request.where}: every singular value that init_scale={config.init_scale!r} would use is zero, so both "
            "factors would start at zero and never receive a gradient; use init_scale='unit' or exclude the layer."
        )
    raise ValueError(
        f"{request.where}: projection={config.projection!r} with principal_rank k = {request.k} removes the whole "
        f"start (init_subspace={config.init_subspace!r}, init_factors={config.init_factors!r}), so no factor would "
        "receive a gradient; use init_subspace='bottom', a smaller principal_rank, or project the other side."
    )
