"""The spectral part of a weight's audit: shift, angles and the paper's inequalities, from one :class:`SpectralBase`."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..geometry.spectral_change import SpectralBase, SpectralChange
from .results import Angles, Inequality, Spectrum

POINTS = 128  # of a spectrum's curve


def directions(rank: int | float, shape: tuple[int, int]) -> int | None:
    """k itself, or its fraction of min(shape), at least 1; None where that is the whole space."""
    k = rank if isinstance(rank, int) else max(1, int(rank * min(shape)))
    return k if k < min(shape) else None


def spectral(base: SpectralBase, tuned: Tensor, update_norm: float, wanted: Collection[str]) -> dict[str, Any]:
    """The fields ``spectrum``, ``angles``, ``bounds`` and ``route`` of a change, those of ``wanted`` probes.

    ``update_norm``: ||dW||_F. Errors as :meth:`SpectralBase.change`.
    """
    found = base.change(tuned)
    fields: dict[str, Any] = {"route": f"exact: {found.reason}" if found.reason else found.route}
    if "spectrum" in wanted:
        fields["spectrum"] = _spectrum(found, update_norm)
    if "angles" in wanted:
        fields["angles"] = _angles(found, base.k)
    if "bounds" in wanted:
        fields["bounds"] = _bounds(found, base.k, update_norm)
    return fields


def _spectrum(found: SpectralChange, update_norm: float) -> Spectrum:
    n = len(found.before)
    positions = torch.linspace(0, n - 1, min(n, POINTS)).round().long().tolist()
    shifts = found.after - found.before
    return Spectrum(
        shift=found.shift,
        largest=found.largest,
        change_norm=found.norm,
        stable_rank=(update_norm / found.norm) ** 2 if found.norm else 0.0,
        error=found.shift_error,
        positions=positions,
        before=_rounded(found.before[positions]),
        shifts=_rounded(shifts[positions]),
    )


def _rounded(curve: Tensor) -> list[float]:
    """To seven digits: what a plot shows, at half the length in a file."""
    return [float(f"{value:.7g}") for value in curve.tolist()]


def _angles(found: SpectralChange, k: int) -> Angles:
    largest = max(float(found.output_angles[-1]), float(found.input_angles[-1]))
    gap = float(found.before[k - 1] - found.before[k])
    first = found.norm / gap if gap > 0 else math.inf
    always = math.sin(math.asin(2 * first) / 2) if 2 * first < 1 else 1.0
    sine = math.sin(largest)
    return Angles(
        k=k,
        output=found.output_angles.tolist(),
        input=found.input_angles.tolist(),
        error=found.angle_error,
        gap=gap,
        wedin=Inequality(sine, first, found.angle_error, asymptotic=True),
        wedin_always=Inequality(sine, always, found.angle_error),
    )


def _bounds(found: SpectralChange, k: int, update_norm: float) -> dict[str, Inequality]:
    before, after = found.before, found.after
    eps = torch.finfo(torch.float64).eps * len(before)
    error = found.shift_error * float(before.norm()) + eps * float(before[0])
    error += 0.0 if found.route == "exact" else 0.005 * found.norm  # which is found from below
    drift = abs(float((after - before)[:k].sum()))
    return {
        "weyl": Inequality(found.largest, found.norm, error),
        "mirsky": Inequality(float((after - before).norm()), update_norm, error),
        "ky_fan": Inequality(drift, k * found.norm, math.sqrt(k) * error),
    }
