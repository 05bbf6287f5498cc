"""Pure functions on tensors: spectra and bases, subspaces, masks. Imports torch, never peft or transformers."""

from .masks import lowest_mask
from .spectrum import (
    Report,
    Triplets,
    WeightSpectrum,
    bottom_basis,
    null_basis,
    singular_values,
    top_basis,
)
from .subspace import (
    EnergyShares,
    Leak,
    energy_shares,
    factored_energy_shares,
    factored_leak,
    leak,
    principal_angles,
    project_off,
    projector,
)

__all__ = [
    "EnergyShares",
    "Leak",
    "Report",
    "Triplets",
    "WeightSpectrum",
    "bottom_basis",
    "energy_shares",
    "factored_energy_shares",
    "factored_leak",
    "leak",
    "lowest_mask",
    "null_basis",
    "principal_angles",
    "project_off",
    "projector",
    "singular_values",
    "top_basis",
]
