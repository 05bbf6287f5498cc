"""What every benchmark shares: the environment of a result, paired ratios, atomic result files."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offprincipal_peft.rlvr.records import cpu_name, write_json


def environment(device: str) -> dict[str, Any]:
    """Versions, threads and hardware that a result was measured with."""
    env: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "platform": platform.system() + " " + platform.machine(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("peft", "transformers")},
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        env["gpu"] = torch.cuda.get_device_name()
        env["cuda"] = torch.version.cuda
    return env


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def paired_ratio(times: list[float], baseline: list[float], *, resamples: int = 2000) -> dict[str, Any]:
    """Median over rounds of ``times[i] / baseline[i]`` with its 95 % bootstrap interval over rounds."""
    if len(times) != len(baseline) or not times:
        raise ValueError(f"a paired ratio needs as many rounds on both sides, got {len(times)} and {len(baseline)}")
    ratios = torch.tensor([t / b for t, b in zip(times, baseline, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ratios), (resamples, len(ratios)), generator=generator)
    medians = torch.quantile(ratios[picks], 0.5, dim=1)
    low, high = torch.quantile(medians, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"ratio": median(ratios.tolist()), "interval": [low, high], "rounds": len(times)}


def write_result(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` as JSON, complete or not at all."""
    write_json(path, payload)
    print(f"wrote {path}")
