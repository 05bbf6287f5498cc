"""Time and quality of the bases that an adapter starts from, against a full SVD of every layer.

PEFT's `mica` (and `pissa`) call `torch.linalg.svd(weight.float(), full_matrices=False)` per layer; that call is the
baseline. Competitors run interleaved on the same synthetic bf16 weights. Each distinct shape is timed once per
round and counted as often as the model has it; `--weights decaying` adds 256 directions that fall off as j^-0.7.

On a machine that others use, `--threads 1 --clock cpu` counts this process's own CPU seconds instead of waiting
time (with more threads it would count their idle spinning too).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from torch import Tensor

from offprincipal_peft.geometry import WeightSpectrum

Shapes = dict[str, tuple[tuple[int, int], int]]  # name -> ((d_out, d_in), how many the model has)

MODELS: dict[str, Shapes] = {
    "qwen2.5-7b-block": {
        "q, o": ((3584, 3584), 2),
        "k, v": ((512, 3584), 2),
        "gate, up": ((18944, 3584), 2),
        "down": ((3584, 18944), 1),
    },
    "smollm2-135m": {
        "q, o": ((576, 576), 60),
        "k, v": ((192, 576), 60),
        "gate, up": ((1536, 576), 60),
        "down": ((576, 1536), 30),
    },
}
LEADING = 256  # the exact principal subspace that a bottom basis must not leak into


def synthetic_weight(shape: tuple[int, int], kind: str, seed: int, device: str) -> Tensor:
    """N(0, 0.02) in bf16, plus a decaying part whose first singular value is eight times the bulk's edge."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator) * 0.02
    if kind == "decaying":
        k = min(LEADING, *shape)
        U = torch.linalg.qr(torch.randn(shape[0], k, generator=generator))[0]
        V = torch.linalg.qr(torch.randn(shape[1], k, generator=generator))[0]
        edge = 0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5)
        W += (U * (8 * edge * torch.arange(1, k + 1).float() ** -0.7)) @ V.T
    return W.bfloat16().to(device)


def interleaved(
    competitors: Mapping[str, Callable[[], object]], rounds: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each competitor, one after the other in every round."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            start = clock()
            run()
            if torch.device(options.device).type == "cuda":
                torch.cuda.synchronize(options.device)
            seconds[name].append(clock() - start)
    return seconds


def peft_way(W: Tensor, r: int) -> Tensor:
    return torch.linalg.svd(W.float(), full_matrices=False)[0][:, -r:].contiguous()


def mica(W: Tensor, r: int) -> Tensor:
    return WeightSpectrum(W).minor(r, "output")


def offprincipal(W: Tensor, r: int, k: int, cache_dir: str | Path | None = None) -> Tensor:
    """Both principal bases and the minor one of the input side: what the `offprincipal` preset needs."""
    spectrum = WeightSpectrum(W, cache_dir=cache_dir)
    spectrum.top(min(k, min(W.shape) // 2))
    return spectrum.minor(r, "input")


def quality(W: Tensor, r: int, k: int) -> dict[str, Any]:
    """||W^T B||_F against exact, leaks into the exact leading subspace, worst well-separated top angle."""
    spectrum = WeightSpectrum(W)
    top, sides = spectrum.top(min(k, min(W.shape) // 2)), {}
    U, S, V = WeightSpectrum(W.double(), method="exact").top(min(W.shape))
    for side, basis, matrix in (("output", U, W.double().T), ("input", V, W.double())):
        B = spectrum.minor(r, "output" if side == "output" else "input").double()
        null = basis.shape[0] - S.shape[0]
        exact = float(S[S.shape[0] - r + null :].norm()) if null < r else 0.0
        found = float((matrix @ B).norm())
        leading = basis[:, : min(LEADING, S.shape[0] // 2)]
        sides[side] = {
            "size": found / exact if exact > 0 else None,
            "size_over_sigma_1": found / float(S[0]),
            "leak": float((leading.T @ B).norm() / B.norm()),
        }
    worst = 0.0
    for edge in range(1, top.S.shape[0] + 1):
        if float((S[edge - 1] - S[edge]) / S[0]) >= 1e-3:
            for found_basis, basis in ((top.U, U), (top.V, V)):
                Q = torch.linalg.qr(found_basis[:, :edge].double())[0]
                rest = Q - basis[:, :edge] @ (basis[:, :edge].T @ Q)
                worst = max(worst, float(torch.linalg.matrix_norm(rest, ord=2)))
    routes = [f"{report.what}: {report.route}, residual {report.residual:.1e}" for report in spectrum.reports]
    fell_back = any(report.fell_back for report in spectrum.reports)
    return {**sides, "top_sine": worst, "routes": routes, "fell_back": fell_back}


def measure_model(shapes: Shapes, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per layer and for the whole model, and their ratios to PEFT's way."""
    totals: dict[str, list[float]] = {}
    layers: dict[str, Any] = {}
    for index, (name, (shape, count)) in enumerate(shapes.items()):
        W = synthetic_weight(shape, kind, index, options.device)
        competitors: dict[str, Callable[[], object]] = {
            "peft": lambda W=W: peft_way(W, options.r),  # type: ignore[misc]
            "mica": lambda W=W: mica(W, options.r),  # type: ignore[misc]
            "offprincipal": lambda W=W: offprincipal(W, options.r, options.k),  # type: ignore[misc]
        }
        seconds = interleaved(competitors, options.rounds, options)
        layers[name] = {"shape": shape, "count": count, "seconds": seconds}
        if options.quality:
            layers[name]["quality"] = quality(W, options.r, options.k)
        for competitor, values in seconds.items():
            totals.setdefault(competitor, [0.0] * options.rounds)
            totals[competitor] = [total + count * v for total, v in zip(totals[competitor], values, strict=True)]
    ratios = {name: paired_ratio(totals["peft"], totals[name]) for name in ("mica", "offprincipal")}
    return {"layers": layers, "total_seconds": totals, "times_faster_than_peft": ratios}


def measure_cache(shapes: Shapes, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds for every layer of a model, first with an empty cache and then with a warm one."""
    weights = [
        synthetic_weight(shape, kind, seed, options.device) for shape, count in shapes.values() for seed in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:

        def whole_model() -> None:
            for W in weights:
                offprincipal(W, options.r, options.k, folder)

        first = interleaved({"pass": whole_model}, 1, options)["pass"][0]
        warm = interleaved({"pass": whole_model}, options.rounds, options)["pass"]
    return {"first_seconds": first, "warm_seconds": median(warm)}


def print_table(results: dict[str, Any]) -> None:
    for title, result in results.items():
        ratios = ", ".join(f"{name} {ratio['ratio']:.1f}x" for name, ratio in result["times_faster_than_peft"].items())
        medians = {name: median(values) for name, values in result["total_seconds"].items()}
        print(f"{title}: " + ", ".join(f"{name} {value:.2f} s" for name, value in medians.items()) + f" ({ratios})")
        for name, layer in result["layers"].items():
            times = ", ".join(f"{key} {median(value):.3f}" for key, value in layer["seconds"].items())
            print(f"  {name:9s} x{layer['count']:<3d} {times}")
            if "quality" in layer:
                found = layer["quality"]
                for side in ("output", "input"):
                    size = found[side]["size"]
                    shown = "null space" if size is None else f"{size:.6f} of exact"
                    print(
                        f"    {side}: {shown}, {found[side]['size_over_sigma_1']:.1e} sigma_1, "
                        f"leak {found[side]['leak']:.1e}"
                    )
                print(f"    top sine {found['top_sine']:.1e}, fell back: {found['fell_back']}")
        if "cache" in result:
            print("  cache: " + ", ".join(f"{key} {value:.2f}" for key, value in result["cache"].items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--weights", nargs="+", choices=["random", "decaying"], default=["random", "decaying"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--r", type=int, default=16, help="minor directions")
    parser.add_argument("--k", type=int, default=112, help="principal directions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--quality", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "init_time.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    for model in options.models:
        for kind in options.weights:
            result = measure_model(MODELS[model], kind, options)
            if model == "smollm2-135m":
                result["cache"] = measure_cache(MODELS[model], kind, options)
            results[f"{model}, {kind}"] = result
    settings = {"r": options.r, "k": options.k, "rounds": options.rounds, "clock": options.clock}
    settings["load_average"] = [round(load, 2) for load in os.getloadavg()]
    write_result(options.out, {"environment": environment(options.device), "settings": settings, "results": results})
    print_table(results)


if __name__ == "__main__":
    main()
