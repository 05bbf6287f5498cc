"""The named points of the design space: each preset is a choice on the axes of :class:`OffPrincipalLoraConfig`.

Formulas and sources stand in ``docs/methods.md``. A preset fixes where the factors start, at which scale, which of
them train and what is projected; rank, alpha, learning rate and targets stay the user's.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "lora": {"init_subspace": "kaiming", "init_scale": "native", "init_factors": "A"},
    "pissa": {"init_subspace": "top", "init_scale": "spectral", "init_factors": "both"},
    "milora": {"init_subspace": "bottom", "init_scale": "spectral", "init_factors": "both"},
    "olora-tail": {"init_subspace": "bottom", "init_scale": "unit", "init_factors": "both"},
    "mica": {"init_subspace": "bottom", "init_scale": "unit", "init_factors": "B", "train_factors": "A"},
    "rlpo": {"init_subspace": "top", "init_scale": "unit", "init_factors": "A"},
    "rlmo": {"init_subspace": "bottom", "init_scale": "unit", "init_factors": "A"},
    "geora": {
        "init_subspace": "top",
        "init_source": "geora",
        "init_scale": "spectral",
        "init_factors": "both",
    },
    "offprincipal": {
        "init_subspace": "bottom",
        "init_scale": "unit",
        "init_factors": "A",
        "projection": "both",
        "principal_rank": 1 / 32,
    },
    "offprincipal-random": {
        "init_subspace": "random",
        "init_scale": "lora",
        "init_factors": "A",
        "projection": "both",
        "principal_rank": 1 / 32,
    },
}


def preset_axes(name: str) -> dict[str, Any]:
    """The axes that preset ``name`` sets, as keyword arguments. Raises ``ValueError`` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return dict(PRESETS[name])
