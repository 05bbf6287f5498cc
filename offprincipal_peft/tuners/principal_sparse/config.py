"""Configuration of principal-masked sparse fine-tuning: which entries train, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from ...geometry.mask_expression import parse
from ...geometry.masks import MaskOptions
from ..registration import extend_peft_type

PEFT_TYPE_NAME = "PRINCIPAL_SPARSE"

_CHOICES: dict[str, tuple[str, ...]] = {
    "structure": ("element", "row", "column", "block"),
    "precision": ("fp32", "split", "bf16", "bf16-stochastic"),
    "principal_method": ("exact", "randomized"),
    "packing": ("auto", "packed", "dense"),
}


@dataclass
class PrincipalSparseConfig(PeftConfig):
    """Train only the weights that a mask names, with state in proportion to the mask.

    On the mask the layer computes with ``W = round(W0 + delta)``, elsewhere with ``W0``. ``delta`` is a packed vector,
    one number per masked entry, zero at the start; any optimiser trains it, and weight decay acts on the update. The
    base weight's original entries are kept, so that disabling, unmerging and unloading restore it bit for bit.

    Args:
        target_modules: names, a regular expression or ``"all-linear"``; ``nn.Linear`` and ``Conv1D`` modules.
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: further modules to train and save whole.
        layers_to_transform: indices of the layers to adapt, where ``target_modules`` is a list.
        layers_pattern: name of the layer list that ``layers_to_transform`` counts in.
        mask: an expression over the atoms ``principal``, ``low``, ``safe`` (``low | ~principal``) and ``random``, with
            ``~ & | ( )``, ``random(x)``, ``matched(x)`` and ``thinned(x)``; see ``docs/methods.md``.
        principal_rank: k of the rank-k reconstruction that scores entries: an int, or a float in (0, 1) as a fraction
            of ``min(weight.shape)``. The paper does not state it: sweep it.
        principal_density: fraction of each weight that ``principal`` names, the entries largest in that score.
        low_density: fraction that ``low`` names, the entries smallest in magnitude.
        random_density: fraction that ``random`` names.
        principal_method: ``"exact"``, or ``"randomized"`` for a faster score that misses some entries; its overlap
            with the exact mask is then measured on one layer of each weight shape and reported
            (``model.base_model.mask_reports``).
        structure: what a mask is made of: ``"element"``, or whole ``"row"`` (outputs), ``"column"`` (inputs) or 64 x 64
            ``"block"`` units, scored by the mean of their entries' scores. Structured masks avoid most of the weight
            gradient's work.
        precision: ``"fp32"`` (delta in fp32, for any optimiser), ``"split"`` (the fp32 value as the bf16 weight plus 16
            more bits; needs :class:`~offprincipal_peft.MaskedAdamW` and bf16 weights), or, as ablations with the same
            needs, ``"bf16"`` and ``"bf16-stochastic"`` (the trained entries kept in bf16 alone).
        packing: how masks of single elements are stored. ``"packed"``: the trained entries and their positions, 18
            bytes each (fp32). ``"dense"``: a slot for every entry of the weight and a mask, 16 bytes for each, faster
            where most entries train. ``"auto"``: dense on layers of which more than 60 % train. A saved adapter does
            not depend on it.
        seed: of random draws, per layer, independently of torch's global generator.

    Raises:
        ValueError: a malformed expression (with the position), a density outside (0, 1), a value outside its choices.

    Source: 2511.08567, section 4 and its sparse fine-tuning case study (the safe mask); the packed form is this
    package's.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default="all-linear", metadata={"help": "Linear or Conv1D modules to adapt."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts in."}
    )
    mask: str = field(default="safe", metadata={"help": "Mask expression."})
    principal_rank: int | float = field(default=1 / 16, metadata={"help": "k, or a fraction of min(weight.shape)."})
    principal_density: float = field(default=0.5, metadata={"help": "Fraction that 'principal' names."})
    low_density: float = field(default=0.5859, metadata={"help": "Fraction that 'low' names."})
    random_density: float = field(default=0.01, metadata={"help": "Fraction that 'random' names."})
    principal_method: Literal["exact", "randomized"] = field(
        default="exact", metadata={"help": "How the rank-k score is computed."}
    )
    structure: Literal["element", "row", "column", "block"] = field(
        default="element", metadata={"help": "The units a mask is made of."}
    )
    precision: Literal["fp32", "split", "bf16", "bf16-stochastic"] = field(
        default="fp32", metadata={"help": "How the trained values are stored."}
    )
    packing: Literal["auto", "packed", "dense"] = field(
        default="auto", metadata={"help": "How element masks are stored while they train."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of random draws, per layer."})

    def __post_init__(self) -> None:
        # A config read from JSON carries its peft_type as a plain string: a saved mask may follow (pending.py).
        self._values_may_follow: bool = type(getattr(self, "peft_type", None)) is str
        super().__post_init__()
        self.peft_type = extend_peft_type(PEFT_TYPE_NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check()

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}.")
        if not isinstance(self.mask, str):
            raise ValueError(f"mask must be an expression such as 'safe' or 'low & ~principal', got {self.mask!r}.")
        parse(self.mask)
        for name in ("principal_density", "low_density", "random_density"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be a fraction strictly between 0 and 1, got {value!r}.")
        k = self.principal_rank
        if isinstance(k, bool) or not isinstance(k, int | float):
            raise ValueError(f"principal_rank must be an int or a float, got {k!r}.")
        if isinstance(k, float) and not 0.0 < k < 1.0:
            raise ValueError(
                f"principal_rank={k!r}: a float is a fraction of min(weight.shape) and must lie in (0, 1); give an int "
                "for a number of directions."
            )
        if isinstance(k, int) and k < 1:
            raise ValueError(f"principal_rank must be at least 1, got {k}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules to be a list of names, not a pattern.")

    def mask_options(self, *, compare_with_exact: bool = True) -> MaskOptions:
        """The options of :func:`~offprincipal_peft.geometry.masks.build_mask` that this config stands for."""
        return MaskOptions(
            principal_rank=self.principal_rank,
            principal_density=self.principal_density,
            low_density=self.low_density,
            random_density=self.random_density,
            structure=self.structure,
            seed=self.seed,
            principal_method=self.principal_method,
            compare_with_exact=compare_with_exact,
        )
