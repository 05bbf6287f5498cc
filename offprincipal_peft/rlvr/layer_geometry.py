"""The figures of one watched layer: cheap ones while training runs, full decompositions once at the end.

What they are measured against is fixed at the start and kept on the CPU: the top-k bases of the starting weight, its
norm, and a seeded sample of its rows. An observation moves one layer's bases to its device at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..geometry.drift import (
    column_update_ratios,
    effective_rank,
    normalized_spectral_shift,
    row_update_ratios,
    stable_rank,
)
from ..geometry.precision import unchanged
from ..geometry.spectrum import WeightSpectrum
from ..geometry.subspace import principal_angles
from .observers import LayerObserver

FIGURES = 5  # of an observation: the four energies and the changed entries of the sample


class LayerGeometry:
    """One observer with its references. Raises ``ValueError`` for a k that the layer's shape does not have."""

    def __init__(
        self, observer: LayerObserver, k: int | float, sample_rows: int, cache_dir: str | Path | None, seed: int
    ) -> None:
        self.observer, self.name, self.cache_dir = observer, observer.name, cache_dir
        start = observer.start()
        d_out, d_in = start.shape
        self.shape = (d_out, d_in)
        self.k = directions(k, self.shape, self.name)
        top = WeightSpectrum(start, cache_dir=cache_dir, name=self.name).top(self.k)
        self.U, self.V = top.U.float().cpu(), top.V.float().cpu()  # (d_out, k), (d_in, k)
        self.norm = float(torch.linalg.vector_norm(start, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        self.index = torch.randperm(d_out, generator=generator)[:sample_rows].sort().values
        self.rows = start[self.index.to(start.device)].cpu()

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def random_shares(self) -> tuple[float, float, float]:
        """The shares (output, input, both) of an update without a preferred direction."""
        output, into = self.k / self.shape[0], self.k / self.shape[1]
        return output, into, output * into

    def observe(self) -> Tensor:
        """(FIGURES,) fp64 on the layer's device: ||dW||^2, its parts inside U_k, V_k and both, changed sample entries.

        An entry of the sample counts as changed where the bf16 roundings of the weight before and after differ.
        """
        update = self.observer.update()
        index = self.index
        delta = update.rows(index)
        device = delta.device
        energies = update.energies(self.U.to(device), self.V.to(device))
        before = self.rows.to(device)
        changed = before.numel() - unchanged(before, before.to(delta.dtype) + delta).sum()
        return torch.cat([energies, changed.double()[None]])

    def figures(self, observed: list[float]) -> dict[str, float]:
        """An observation's numbers as norms (units of the weight) and shares of ||dW||^2."""
        total, output, into, both, changed = observed
        shares = [min(part / total, 1.0) if total else 0.0 for part in (output, into, both)]
        norm = math.sqrt(total)
        return {
            "update_norm": norm,
            "relative_norm": norm / self.norm if self.norm else math.nan,
            "share_output": shares[0],
            "share_input": shares[1],
            "share_both": shares[2],
            "update_sparsity": 1.0 - changed / max(1, self.rows.numel()),
        }

    def final(self) -> dict[str, Any]:
        """Everything about the update, from the whole weight; JSON values, None where a weight is not finite."""
        update = self.observer.update()
        start, delta = self.observer.start(), update.dense().double()
        observed = update.energies(self.U.to(delta.device), self.V.to(delta.device)).tolist()
        random_output, random_input, random_both = self.random_shares()
        report: dict[str, Any] = {
            "name": self.name,
            "shape": list(self.shape),
            "kind": self.observer.kind,
            "k": self.k,
            **self.figures([*observed, 0.0]),
            "random_output": random_output,
            "random_input": random_input,
            "random_both": random_both,
        }
        after = start.double() + delta  # fp64: shifts of 1e-8 of the spectrum are to be seen
        changed = ~unchanged(start, after)
        count = int(changed.count_nonzero())
        report["changed"] = count
        report["update_sparsity"] = 1.0 - count / self.size
        report["row_ratios"] = _spread(row_update_ratios(changed), count / self.size, self.shape[1])
        report["column_ratios"] = _spread(column_update_ratios(changed), count / self.size, self.shape[0])
        if not bool(after.isfinite().all()):
            return report | dict.fromkeys(_SPECTRAL)
        return report | self._spectral(start, after, update.values())

    def _spectral(self, start: Tensor, after: Tensor, update_values: Tensor) -> dict[str, float]:
        before = WeightSpectrum(start, cache_dir=self.cache_dir, name=self.name)
        moved = WeightSpectrum(after, name=self.name)
        top = moved.top(self.k)
        return {
            "spectral_shift": normalized_spectral_shift(before.values(), moved.values()),
            "angle_output": math.degrees(float(principal_angles(self.U, top.U.cpu())[-1])),
            "angle_input": math.degrees(float(principal_angles(self.V, top.V.cpu())[-1])),
            "effective_rank": effective_rank(update_values),
            "stable_rank": stable_rank(update_values),
        }


_SPECTRAL = ("spectral_shift", "angle_output", "angle_input", "effective_rank", "stable_rank")


def directions(k: int | float, shape: tuple[int, int], name: str) -> int:
    """k itself, or its fraction of ``min(shape)`` rounded down, at least 1.

    Raises ``ValueError`` for a k that is the whole space or more.
    """
    if isinstance(k, float):
        return max(1, int(k * min(shape)))
    if k >= min(shape):
        raise ValueError(
            f"{name} has shape {shape[0]} x {shape[1]}: k={k} directions are its whole space. Use a smaller k, a "
            "fraction of min(shape), or narrow `layers`."
        )
    return k


def _spread(ratios: Tensor, density: float, length: int) -> dict[str, float]:
    """How uneven rows (or columns) are: ``random_std`` is the spread of independent entries with the same density."""
    return {
        "mean": float(ratios.mean()),
        "std": float(ratios.std(correction=0)),
        "random_std": math.sqrt(density * (1 - density) / length),
        "least": float(ratios.min()),
        "most": float(ratios.max()),
    }


def model_figures(layers: list[LayerGeometry], observed: list[list[float]]) -> dict[str, float]:
    """All layers as one: the global Frobenius norm, shares of the whole energy, sparsity of the whole sample.

    The random shares weigh each layer by its energy, as the shares do, so that the two are comparable.
    """
    totals = [row[0] for row in observed]
    energy, size = sum(totals), sum(layer.norm**2 for layer in layers)
    weights = [total / energy if energy else 1 / len(layers) for total in totals]
    random = [layer.random_shares() for layer in layers]
    sizes = [layer.size for layer in layers]
    sparsities = [layer.figures(row)["update_sparsity"] for layer, row in zip(layers, observed, strict=True)]
    figures = {
        "update_norm": math.sqrt(energy),
        "relative_norm": math.sqrt(energy / size) if size else 0.0,
        "update_sparsity": sum(s * n for s, n in zip(sparsities, sizes, strict=True)) / sum(sizes),
    }
    for i, side in enumerate(("output", "input", "both")):
        inside = sum(row[1 + i] for row in observed)
        figures[f"share_{side}"] = min(inside / energy, 1.0) if energy else 0.0
        figures[f"random_{side}"] = sum(w * shares[i] for w, shares in zip(weights, random, strict=True))
    return figures


def final_figures(reports: list[dict[str, Any]]) -> dict[str, float]:
    """The layers' final reports in one line each: exact sparsity, means over layers, the largest angles."""
    figures = {
        "update_sparsity": 1.0 - sum(r["changed"] for r in reports) / sum(math.prod(r["shape"]) for r in reports)
    }
    for name in _SPECTRAL:
        values = [report[name] for report in reports if report[name] is not None]
        if values:
            figures[f"{name}_mean"] = sum(values) / len(values)
            figures[f"{name}_max"] = max(values)
    return figures
