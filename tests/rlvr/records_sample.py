"""Seeded, made-up trial records that look like real ones; the report's tests draw on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal_peft.rlvr.config import TrialConfig

# label → (final accuracy of a large run, KL in nats per token, share of the update in the top subspaces)
METHODS: dict[str, tuple[float, float, float]] = {
    "lora": (0.42, 0.05, 0.075),
    "offprincipal": (0.47, 0.03, 0.001),
    "pissa": (0.12, 0.40, 0.55),
    "milora": (0.36, 0.06, 0.12),
    "safe": (0.44, 0.02, 0.05),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 14


def record(
    label: str = "lora",
    *,
    seed: int = 0,
    learning_rate: float = 2e-4,
    quality: tuple[float, float, float] | None = None,
    steps: int = STEPS,
    items: int = 256,
    depth: int = 6,
    geometry: bool = True,
    **config: Any,
) -> dict[str, Any]:
    """One finished trial. The same arguments give the same record; all methods share the difficulty of the items."""
    accuracy, kl, share = quality or METHODS.get(label, METHODS["lora"])
    values = TrialConfig.from_dict(
        {"method": label, "learning_rate": learning_rate, "seed": seed, "steps": steps, "k": 0.0625} | config
    )
    rng = np.random.default_rng([seed, sum(map(ord, label)), round(1e7 * learning_rate)])
    final = accuracy * math.exp(-((math.log10(learning_rate / 2e-4)) ** 2) / 0.8) + 0.015 * rng.standard_normal()
    evaluations = _evaluations(rng, final, kl * (learning_rate / 2e-4), steps, items)
    last = evaluations[-1]
    return {
        "schema": 1,
        "id": values.trial_id,
        "status": "finished",
        "config": values.to_dict(),
        "environment": _ENVIRONMENT,
        "started": "2026-01-02T03:04:05+00:00",
        "wall_s": 190.0 + 10 * rng.random(),
        "checks": {"train": 1024, "validation": 128, "test": items, "gold_correct": 1408, "wrong_rejected": 1408},
        "curve": _curve(rng, final, steps, learning_rate),
        "evaluations": evaluations,
        "geometry": _geometry(rng, share, depth) if geometry else None,
        "result": {
            "test_accuracy": evaluations[-2]["accuracy"],
            "validation_accuracy": last["accuracy"],
            "base_accuracy": evaluations[0]["accuracy"],
            "kl": evaluations[-2]["kl"],
            "forgetting": evaluations[-2]["forgetting"],
            "forgetting_base": evaluations[0]["forgetting"],
            "entropy": evaluations[-2]["entropy"],
            "completion_length": evaluations[-2]["completion_length"],
            "update_norm": evaluations[-2]["update_norm"],
            "trainable_parameters": 4_884_480,
            "state_bytes": 58_613_760,
            "peak_memory_bytes": 1_450_000_000 + int(1e7 * rng.random()),
            "step_s": 6.0 + rng.random(),
            "reward_slope": {"value": 0.02, "low": 0.01, "high": 0.03},
        },
        "error": None,
    }


def failed_record(label: str = "pissa", message: str = "loss is not finite at step 3", **values: Any) -> dict[str, Any]:
    """A trial that failed in training."""
    broken = record(label, **values)
    error = {"stage": "train", "type": "FloatingPointError", "message": message, "traceback": "Traceback …"}
    return broken | {"status": "failed", "result": None, "geometry": None, "evaluations": [], "error": error}


def sweep(
    labels: tuple[str, ...] = tuple(METHODS), seeds: int = 3, rates: tuple[float, ...] = (2e-4,), **values: Any
) -> list[dict[str, Any]]:
    """Finished trials of every label, seed and learning rate."""
    return [
        record(label, seed=seed, learning_rate=rate, **values)
        for label in labels
        for seed in range(seeds)
        for rate in rates
    ]


def write(folder: Path, records: list[dict[str, Any]], expected: list[str] | None = None) -> Path:
    """The records as a sweep's folder."""
    (folder / "trials").mkdir(parents=True)
    for item in records:
        (folder / "trials" / f"{item['id']}.json").write_text(json.dumps(item), encoding="utf-8")
    if expected is not None:
        (folder / "sweep.json").write_text(json.dumps({"schema": 1, "trials": expected}), encoding="utf-8")
    return folder


_ENVIRONMENT = {
    "python": "3.11.2",
    "packages": {"torch": "2.13.0", "trl": "1.16.0", "peft": "0.21.2"},
    "machine": {"cpu": "A processor", "cores": 2, "system": "Linux", "device": None},
    "threads": 1,
    "git": {"commit": "0" * 40, "dirty": False},
}


def _evaluations(rng: np.random.Generator, final: float, kl: float, steps: int, items: int) -> list[dict[str, Any]]:
    found = []
    difficulty = np.random.default_rng(5).normal(size=items)  # the same items in every trial
    luck = rng.normal(size=items)
    for step in sorted({*range(0, steps, max(1, steps // 4)), steps}):
        part = step / steps
        level = 0.05 + (max(final, 0.02) - 0.05) * part**0.7
        score = 0.8 * difficulty + 0.6 * luck + 0.15 * rng.normal(size=items)
        correct = (score < np.quantile(score, min(max(level, 0.0), 1.0))).astype(int)
        found.append(_evaluation(rng, step, "test", correct, kl * part**1.5, part))
    right = (np.random.default_rng(6).normal(size=128) < np.quantile(luck, min(max(final, 0.02), 1.0))).astype(int)
    return [*found, _evaluation(rng, steps, "validation", right, kl, 1.0)]


def _evaluation(
    rng: np.random.Generator, step: int, split: str, correct: np.ndarray, kl: float, part: float
) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "accuracy": float(correct.mean()),
        "correct": correct.tolist(),
        "kl": float(kl * (1 + 0.1 * rng.random())) if step else 0.0,
        "forgetting": 3.1 + 0.4 * kl + (0.002 * rng.normal() if step else 0.0),
        "entropy": 1.2 - 0.5 * part,
        "completion_length": 5.0 - part,
        "update_norm": float(3 * math.sqrt(kl) * (1 + 0.05 * rng.random())) if step else 0.0,
    }


def _curve(rng: np.random.Generator, final: float, steps: int, learning_rate: float) -> list[dict[str, Any]]:
    points, noise = [], 0.0
    for step in range(1, steps + 1):
        noise = 0.5 * noise + 0.03 * rng.normal()
        points.append(
            {
                "step": step,
                "reward": float(0.08 + (final - 0.05) * (step / steps) ** 0.7 + noise),
                "reward_std": 0.2,
                "loss": float(0.01 * rng.normal()),
                "entropy": 1.2 - 0.5 * step / steps,
                "completion_length": 5.0 - step / steps,
                "grad_norm": 1.0,
                "learning_rate": learning_rate,
                "kl": None,
                "step_s": 6.0,
            }
        )
    return points


def _geometry(rng: np.random.Generator, share: float, depth: int) -> dict[str, Any]:
    layers = []
    for block in range(depth):
        for module in MODULES:
            place = "self_attn" if module in MODULES[:4] else "mlp"
            noise = math.exp(0.3 * rng.normal())
            layers.append(
                {
                    "name": f"model.layers.{block}.{place}.{module}",
                    "shape": [576, 576],
                    "update_norm": 0.05 * noise,
                    "relative_norm": 0.002 * noise * (1 + block / depth),
                    "share_output": min(1.0, share * noise * (1 + 0.5 * (module == "o_proj"))),
                    "share_input": min(1.0, share * noise),
                    "random_output": 0.0625,
                    "random_input": 0.0625,
                    "update_sparsity": 0.6 + 0.1 * rng.random(),
                    "spectral_shift": 1e-4 * noise,
                }
            )
    names = [name for name in layers[0] if name not in ("name", "shape")] if layers else []
    summary = {name: float(np.mean([layer[name] for layer in layers])) for name in names}
    summary |= {"spectral_shift_mean": summary.pop("spectral_shift"), "angle_output_max": 0.4, "angle_input_max": 0.3}
    history = [{"step": 1, "geometry/update_norm": 0.1}]
    return {"history": history, "layers": layers, "summary": summary}
