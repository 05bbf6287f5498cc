"""Masks over the entries of a weight.

Trade-off: an exact count with a fixed tie rule, at the price of a sort; a threshold alone would keep too many or
too few entries wherever values repeat, as they do in bf16.
"""

import torch
from torch import Tensor


def lowest_mask(score: Tensor, fraction: float) -> Tensor:  # score: any shape -> bool, same shape
    """Exactly round(fraction * numel) entries with the smallest score; ties go to the lowest flat index.

    Raises ValueError for a fraction outside (0, 1) and for a score that holds NaN.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    not_a_number = int(score.isnan().sum())
    if not_a_number:
        raise ValueError(f"the score of shape {tuple(score.shape)} holds {not_a_number} NaN entries")
    order = score.flatten().argsort(stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[: round(fraction * score.numel())]] = True
    return mask.view(score.shape)
