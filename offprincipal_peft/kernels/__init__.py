"""The masked update in plain torch: layouts of trained entries, packed products, the optimiser step."""

from .layout import BlockLayout, ColumnLayout, ElementLayout, Layout, RowLayout, layout_of
from .masked_adamw import MaskedAdamW
from .packed_delta import packed_delta_linear
from .packed_linear import packed_linear, rewritten_linear
from .packed_update import write_sum_, write_values_

__all__ = [
    "BlockLayout",
    "ColumnLayout",
    "ElementLayout",
    "Layout",
    "MaskedAdamW",
    "RowLayout",
    "layout_of",
    "packed_delta_linear",
    "packed_linear",
    "rewritten_linear",
    "write_sum_",
    "write_values_",
]
