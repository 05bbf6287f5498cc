"""Memory and communication of each method at the sizes of published models, and the formulas against real tensors.

``python benchmarks/scaling.py`` computes everything, measures a Qwen2.5-1.5B block and SmolLM2-135M on this machine
(each method in a process of its own), writes ``results/scaling.json`` and renders ``docs/scaling.md`` from it.
``--render`` only renders; ``--check`` writes nothing and fails where the page or the computed figures are out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _scaling_formulas import METHODS, MODELS, SMOL, Memory, ModelShape, memory, traffic

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
PROCESSES = 8
DETAIL = "Qwen2.5-7B"  # the model whose bytes are shown apart
CASES = {
    "one block of Qwen2.5-1.5B, random weights": dataclasses.replace(
        MODELS[0], name="qwen2.5-1.5b-block", layers=1, vocab=256, parameters=0
    ),
    "SmolLM2-135M, its own weights": SMOL,
}


def computed() -> dict[str, Any]:
    """What follows from the shapes alone."""
    rows = [
        {
            "model": model.name,
            "method": method.name,
            "memory": dataclasses.asdict(memory(model, method)),
            "traffic": dataclasses.asdict(traffic(model, method, PROCESSES)),
        }
        for model in MODELS
        for method in METHODS
    ]
    return {"processes": PROCESSES, "models": [dataclasses.asdict(model) for model in MODELS], "rows": rows}


def measure_one(case: str, name: str) -> dict[str, Any]:
    """One method of one case, in this process: bytes by the formula, of all tensors, and the peak's growth."""
    import torch
    from _scaling_measured import TOKENS, Trained, build, forget_peak, resident

    from offprincipal_peft.rlvr.models import small_model

    torch.set_num_threads(1)
    shape, method = CASES[case], next(m for m in METHODS if m.name == name)
    before = resident()["VmRSS"]
    trained = Trained(build(shape, small_model() if shape is SMOL else None), method)
    forget_peak()  # what computing starts and masks took for a while is not what training takes
    trained.backward()
    trained.step()
    return {
        "case": case,
        "method": name,
        "tokens": TOKENS,
        "formula": dataclasses.asdict(memory(shape, method)),
        "tensors": dataclasses.asdict(trained.held()),
        "peak_growth": resident()["VmHWM"] - before,
    }


def measure() -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        for method in METHODS:
            command = [sys.executable, __file__, "--one", case, method.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(case, method.name, f"{total(rows[-1]['tensors']) / total(rows[-1]['formula']):.4f}", flush=True)
    return rows


# -- the page ----------------------------------------------------------------------------------------------------------


def total(held: dict[str, int]) -> int:
    return Memory(**held).total


def size(count: float) -> str:
    """Bytes with three digits: "14.2 GiB", "80.1 MiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            value = count / factor
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    return f"{count / 2**10:.0f} KiB" if count else "0"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shapes_table(result: dict[str, Any]) -> str:
    rows = []
    for values in result["computed"]["models"]:
        model = ModelShape(**values)
        adapted = sum(d_out * d_in for d_out, d_in in model.linears())
        rows.append(
            [f"[{model.name}]({model.source})"]
            + [f"{n:,}" for n in (model.hidden, model.layers, model.heads, model.kv_heads, model.intermediate)]
            + [f"{model.vocab:,}", "yes" if model.tied else "no", f"{model.count():,}", f"{adapted:,}"]
        )
    head = ["model", "hidden", "blocks", "heads", "KV heads", "MLP", "vocabulary", "tied", "parameters", "adapted"]
    return table(head, rows)


def by_model(result: dict[str, Any], part: str, key: str | None) -> str:
    """Methods down, models across; ``key`` None is the sum of what is held."""
    models = [model["name"] for model in result["computed"]["models"]]
    rows = []
    for method in METHODS:
        found = {r["model"]: r[part] for r in result["computed"]["rows"] if r["method"] == method.name}
        values = [total(found[m]) if key is None else found[m][key] for m in models]
        rows.append([method.name, *("refused" if value is None else size(value) for value in values)])
    return table(["computed", *models], rows)


def detail_table(result: dict[str, Any]) -> str:
    rows, full = [], None
    for row in (r for r in result["computed"]["rows"] if r["model"] == DETAIL):
        held = row["memory"]
        full = full or total(held)
        rows.append([row["method"], *map(size, held.values()), size(total(held)), f"{total(held) / full:.2f}"])
    head = [
        f"computed, {DETAIL}",
        "weights",
        "trained beside",
        "gradients",
        "optimiser",
        "other",
        "sum",
        "/ full, bf16",
    ]
    return table(head, rows)


def measured_table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["measured"]:
        formula, tensors = total(row["formula"]), total(row["tensors"])
        cells = [size(formula), size(tensors), f"{tensors / formula:.4f}", size(row["peak_growth"])]
        rows.append([f"{row['case']}: {row['method']}", *cells, f"{row['peak_growth'] / formula:.2f}"])
    head = ["measured here", "formula", "tensors", "tensors / formula", "peak of the process", "peak / formula"]
    return table(head, rows)


def machine(result: dict[str, Any]) -> str:
    env = result["environment"]
    return (
        f"Measured {env['date']} on one core of an {env['cpu']} ({env['cpu_capability']}), torch {env['torch']}, PEFT "
        f"{env['peft']}: one AdamW step on {result['measured'][0]['tokens']} tokens, in bf16."
    )


def sections(result: dict[str, Any]) -> dict[str, str]:
    """What stands between each pair of markers of the page."""
    return {
        "shapes": shapes_table(result),
        "memory": by_model(result, "memory", None),
        "detail": detail_table(result),
        "measured": f"{machine(result)}\n\n{measured_table(result)}",
        "ddp": by_model(result, "traffic", "ddp"),
        "fsdp": by_model(result, "traffic", "fsdp"),
        "sync": by_model(result, "traffic", "sync"),
        "sync-known": by_model(result, "traffic", "sync_known"),
    }


def rendered(text: str, result: dict[str, Any]) -> str:
    """``text`` with its sections replaced; ``ValueError`` where markers are missing."""
    for name, body in sections(result).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE.name} must contain {begin!r} and {end!r} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{body}\n\n{end}{rest.partition(end)[2]}"
    return text


def check() -> int:
    result, text = json.loads(RESULT.read_text()), PAGE.read_text()
    if json.loads(json.dumps(computed())) != result["computed"]:
        print(f"{RESULT.name} does not hold what the formulas give; run benchmarks/scaling.py", file=sys.stderr)
        return 1
    if rendered(text, result) != text:
        print(
            f"{PAGE.name} does not show what {RESULT.name} holds; run benchmarks/scaling.py --render", file=sys.stderr
        )
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--render", action="store_true", help="the page from the committed result; nothing is measured")
    what.add_argument("--check", action="store_true")
    what.add_argument("--one", nargs=2, metavar=("CASE", "METHOD"), help="used by the script itself")
    args = parser.parse_args()
    if args.check:
        return check()
    if args.one:
        print(json.dumps(measure_one(*args.one)))
        return 0
    if not args.render:
        from _common import environment, write_result

        write_result(RESULT, {"environment": environment("cpu"), "computed": computed(), "measured": measure()})
    PAGE.write_text(rendered(PAGE.read_text(), json.loads(RESULT.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
