"""Configuration of off-principal LoRA: PEFT's ``LoraConfig`` plus the axes of where a low-rank update may live."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig

from ..registration import extend_peft_type
from .presets import preset_axes

PEFT_TYPE_NAME = "OFFPRINCIPAL_LORA"

_CHOICES: dict[str, tuple[str, ...]] = {
    "init_subspace": ("bottom", "top", "null", "random", "kaiming"),
    "init_source": ("weight", "geora"),
    "init_scale": ("unit", "lora", "spectral", "native"),
    "init_factors": ("A", "B", "both"),
    "train_factors": ("both", "A", "B"),
    "projection": ("none", "output", "input", "both"),
}

# Inherited LoraConfig options that would change the base, the start or the update in a way that contradicts this
# method, with what to use instead.
_REFUSED: dict[str, str] = {
    "init_lora_weights": "the start is set by init_subspace, init_source, init_scale and init_factors",
    "bias": "the base's biases never change under this method; keep bias='none'",
    "lora_bias": "a bias on lora_B is an update that no projection covers",
    "use_dora": "DoRA rescales the whole weight, principal directions included",
    "use_qalora": "QALoRA pools the inputs, which the bases of the weight do not describe",
    "use_bdlora": "block-diagonal factors cannot hold a singular basis",
    "alora_invocation_tokens": "activated LoRA is not implemented for this method",
    "velora_config": "VeLoRA is not implemented for this method",
    "kasa_config": "KaSA truncates the base weight",
    "monteclora_config": "MonteCLoRA is not implemented for this method",
    "arrow_config": "Arrow routing is not implemented for this method",
    "eva_config": "the start is set by the init_* axes",
    "corda_config": "the start is set by the init_* axes",
    "lora_ga_config": "the start is set by the init_* axes",
    "loftq_config": "the start is set by the init_* axes",
    "target_parameters": "only nn.Linear and Conv1D modules have the singular bases this method needs",
    "layer_replication": "replicated layers share one base weight and would share one basis",
    "megatron_config": "tensor-parallel Megatron layers hold a slice of the weight, whose bases are other bases",
    "ensure_weight_tying": "tied embeddings are not a target of this method",
}


@dataclass
class OffPrincipalLoraConfig(LoraConfig):
    """LoRA with a choice of where it starts and a guarantee of where it cannot go.

    With the scaling ``s`` (``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``), frozen starts
    ``B0`` (d_out, r) and ``A0`` (r, d_in), and top-k singular bases ``U_k`` (d_out, k), ``V_k`` (d_in, k) of the
    base weight, the update is::

        dW = s * (I - U_k U_k^T) [(B - B0) A + B0 (A - A0)] (I - V_k V_k^T)

    where each projector is present only if ``projection`` asks for it. ``dW`` is exactly zero at the start, and the
    base weight is never written.

    Args:
        r: rank of the update (default 16).
        lora_alpha: numerator of the scaling (default 32).
        target_modules: as in ``LoraConfig``; only ``nn.Linear`` and ``Conv1D`` modules can be targets.
        init_subspace: where the started factors begin: ``"bottom"`` (smallest singular directions of the side a
            factor acts on, its null space first; the thin SVD's last r pairs where both factors start or the scale
            is spectral), ``"top"``, ``"null"`` (exact null space, refused where it has fewer than r dimensions),
            ``"random"`` (Haar orthonormal) or ``"kaiming"`` (LoRA's uniform draw).
        init_source: the matrix whose SVD is taken: ``"weight"`` or ``"geora"`` (GeoRA's masked weight).
        geora_rho: GeoRA's fraction of lowest entries that each of its two masks keeps.
        init_scale: ``"unit"`` (rows of norm 1), ``"lora"`` (rows of norm 1 / sqrt(3), that of LoRA's draw: equal
            learning rates then take equal steps), ``"spectral"`` (sqrt(sigma / s) on each factor) or ``"native"``
            (as drawn: LoRA's bound for kaiming, unit for the orthonormal draws).
        init_factors: which factors start there, ``"A"``, ``"B"`` or ``"both"``; the others start at zero.
        train_factors: which factors train.
        principal_rank: k, the number of leading singular directions that the update is kept off: an int, or a
            float in (0, 1) as a fraction of ``min(weight.shape)`` (rounded down, at least 1).
        projection: the sides of the guarantee: ``"output"`` (off U_k), ``"input"`` (off V_k), ``"both"``, ``"none"``.
        seed: seeds the random parts of a start, per layer, independently of torch's global generator.

    Raises:
        ValueError: a value outside an axis, a combination that could never train, or an inherited LoRA option that
            contradicts the method.

    Source: the axes unify LoRA (2106.09685), PiSSA (2404.02948), MiLoRA (2406.09044), RLPO/RLMO (2606.31813),
    OLoRA-tail (2606.02437), MiCA (2604.01694) and GeoRA (2601.09361); the projection follows the off-principal
    finding of 2511.08567.
    """

    r: int = field(default=16, metadata={"help": "Rank of the update."})
    lora_alpha: int = field(default=32, metadata={"help": "Numerator of the scaling."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Linear or Conv1D modules to adapt, as in LoraConfig."}
    )
    init_subspace: Literal["bottom", "top", "null", "random", "kaiming"] = field(
        default="bottom", metadata={"help": "Where the started factors begin.", "is_lora_variant": True}
    )
    init_source: Literal["weight", "geora"] = field(
        default="weight",
        metadata={"help": "Whose SVD gives the start: the weight, or GeoRA's masked weight."},
    )
    geora_rho: float = field(default=0.2, metadata={"help": "Fraction of lowest entries in each of GeoRA's masks."})
    init_scale: Literal["unit", "lora", "spectral", "native"] = field(
        default="unit", metadata={"help": "Scale of the started factors."}
    )
    init_factors: Literal["A", "B", "both"] = field(default="A", metadata={"help": "Which factors start there."})
    train_factors: Literal["both", "A", "B"] = field(default="both", metadata={"help": "Which factors train."})
    principal_rank: int | float = field(
        default=0, metadata={"help": "k, or a fraction of min(weight.shape), for the projection."}
    )
    projection: Literal["none", "output", "input", "both"] = field(
        default="none",
        metadata={"help": "Sides on which the update is kept off the top-k singular directions."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of random starts, per layer."})

    def __post_init__(self) -> None:
        # A config read from JSON carries its peft_type as a plain string, a live one as the enum member: with values
        # about to be loaded the layers postpone their decompositions (see pending.PendingStarts).
        self._values_may_follow: bool = type(getattr(self, "peft_type", None)) is str
        self._check_types()
        self._refuse_inherited()  # first, because PEFT clears some of these with no more than a warning
        super().__post_init__()
        self.peft_type = extend_peft_type(PEFT_TYPE_NAME)
        self._check_axes()
        self._check_combination()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OffPrincipalLoraConfig:
        """The configuration of a named method (``docs/methods.md``), with any field overridden.

        Raises ``ValueError`` for an unknown preset, ``TypeError`` for an unknown field.
        """
        return cls(**{**preset_axes(name), **overrides})

    def resolve_principal_rank(self, shape: tuple[int, int]) -> int:
        """k for a weight of ``shape``: ``principal_rank`` itself, or its fraction of ``min(shape)``, at least 1."""
        if self.projection == "none":
            return 0
        if isinstance(self.principal_rank, float):
            return max(1, int(self.principal_rank * min(shape)))
        return self.principal_rank

    @property
    def paired(self) -> bool:
        """Whether the start takes (u, sigma, v) triplets of the thin SVD rather than one side's directions."""
        return self.init_subspace in ("top", "bottom") and (
            self.init_factors == "both" or self.init_scale == "spectral"
        )

    def _check_types(self) -> None:
        for name in ("lora_dropout", "geora_rho"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must map layer names or patterns to numbers, got {value!r}.")

    def _refuse_inherited(self) -> None:
        defaults = {f.name: f for f in fields(LoraConfig)}
        for name, why in _REFUSED.items():
            if name not in defaults:  # the installed PEFT does not have the option
                continue
            default = defaults[name].default
            value = getattr(self, name)
            if value == default or value is default or (not value and not isinstance(value, bool)):
                continue
            raise ValueError(f"OffPrincipalLoraConfig does not take {name}={value!r}: {why}.")

    def _check_axes(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        ranks = [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items())]
        for name, value in ranks:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        alphas = [("lora_alpha", self.lora_alpha)]
        alphas += [(f"alpha_pattern[{k!r}]", v) for k, v in (self.alpha_pattern or {}).items()]
        for name, alpha in alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {alpha!r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}.")
        if not 0.0 < self.geora_rho < 1.0:
            raise ValueError(f"geora_rho must lie in (0, 1), got {self.geora_rho!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")
        k = self.principal_rank
        if isinstance(k, bool) or not isinstance(k, int | float):
            raise ValueError(f"principal_rank must be an int or a float, got {k!r}.")
        if isinstance(k, float) and k in (0.0,):
            self.principal_rank = k = 0
        if isinstance(k, float) and not 0.0 < k < 1.0:
            raise ValueError(
                f"principal_rank={k!r}: a float is a fraction of min(weight.shape) and must lie in (0, 1); "
                "give an int for a number of directions."
            )
        if isinstance(k, int) and k < 0:
            raise ValueError(f"principal_rank must not be negative, got {k}.")

    def _check_combination(self) -> None:
        if self.projection != "none" and not self.principal_rank:
            raise ValueError(
                f"projection={self.projection!r} needs principal_rank > 0: with k = 0 there is nothing to keep off."
            )
        if self.projection == "none" and self.principal_rank:
            raise ValueError(
                f"principal_rank={self.principal_rank!r} has no effect with projection='none'; set projection to "
                "'output', 'input' or 'both', or leave principal_rank at 0."
            )
        if self.init_scale == "spectral" and self.init_subspace not in ("top", "bottom"):
            raise ValueError(
                f"init_scale='spectral' needs singular values, which init_subspace={self.init_subspace!r} does not "
                "have; use init_subspace 'top' or 'bottom', or init_scale 'unit'."
            )
        if self.init_source == "geora" and self.init_subspace not in ("top", "bottom"):
            raise ValueError(
                f"init_source='geora' takes an SVD, which init_subspace={self.init_subspace!r} does not use; use "
                "init_subspace 'top' (GeoRA) or 'bottom'."
            )
        if self.init_factors != "both" and self.train_factors == self.init_factors:
            other = "B" if self.init_factors == "A" else "A"
            raise ValueError(
                f"init_factors={self.init_factors!r} with train_factors={self.train_factors!r} never moves: "
                f"lora_{other} stays at zero, so the update and its gradient are zero. Train {other!r} or 'both'."
            )
