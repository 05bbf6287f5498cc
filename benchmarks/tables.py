"""Render the README's figures from the committed result files: ``python benchmarks/tables.py`` rewrites the section.

With ``--check`` nothing is written and a section that no longer fits the files is an error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offprincipal_peft.rlvr.report import write_report
from offprincipal_peft.rlvr.report_terminal import terminal_summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo"
PICTURE = "1200,1960"  # pixels


def load(name: str) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return payload


def interval(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def step_table() -> list[str]:
    result = load("adapter_step")
    names = {"lora": "`lora`", "pissa (both starts)": "`pissa`", "offprincipal both": "`offprincipal`, k = 64"}
    lines = ["| time of a training step / PEFT's LoRA | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for case in result["cases"]:
        cells = [interval(case["methods"][name]) for name in names]
        lines.append(f"| {case['shape'].replace('x', ' × ')}, {case['dtype']} | " + " | ".join(cells) + " |")
    return lines


def generation_table() -> list[str]:
    result = load("generation")
    names = {"lora": "`lora`", "offprincipal": "`offprincipal`, k = 64"}
    lines = ["| time of greedy generation / PEFT's LoRA | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for case in result["cases"]:
        cells = [interval(case["methods"][name]) for name in names]
        lines.append(
            f"| 135M-shaped model, batch {result['settings']['batch']}, {case['dtype']} | {' | '.join(cells)} |"
        )
    return lines


def start_table() -> list[str]:
    lines = ["| computing starts and bases, seconds | full SVDs (PEFT) | `mica` | `offprincipal` | from the cache |"]
    lines.append("|---|---|---|---|---|")
    for name in ("init_time_qwen2.5-7b-block_decaying", "init_time_qwen2.5-7b-block_random", "init_time_smollm2-135m"):
        for model, row in load(name)["results"].items():
            total = {who: min(seconds) for who, seconds in row["total_seconds"].items()}
            warm = f"{row['cache']['warm_seconds']:.1f}" if "cache" in row else "–"
            cells = " | ".join(f"{total[who]:.1f}" for who in ("peft", "mica", "offprincipal"))
            lines.append(f"| {model} | {cells} | {warm} |")
    return lines


MASKED = {
    "ours element": "entries",
    "ours element split": "entries, split",
    "ours row": "rows",
    "ours column": "columns",
    "ours block": "blocks",
    "PEFT SHiRA": "SHiRA",
    "PEFT Super-Tuning": "Super-Tuning",
    "PEFT LoRA r16": "LoRA r16",
    "three products": "three products",
    "floor": "frozen layer",
}


def masked_step_table(result: dict[str, Any]) -> list[str]:
    """Every density of the first shape, and the middle density of the others."""
    cases = result["cases"]
    first, densities = cases[0]["shape"], sorted({case["density"] for case in cases})
    middle = densities[len(densities) // 2]
    lines = ["| masked step / full fine-tuning, fused bf16 AdamW | " + " | ".join(MASKED.values()) + " |"]
    lines.append("|---" * (len(MASKED) + 1) + "|")
    for case in cases:
        if case["shape"] == first or case["density"] == middle:
            cells = [interval(case["methods"][name]) for name in MASKED]
            lines.append(f"| {case['shape'].replace('x', ' × ')}, {case['density']:g} % | {' | '.join(cells)} |")
    return lines


def masked_memory_table(result: dict[str, Any]) -> list[str]:
    """What stays between steps and what a step adds at its peak, in units of the weight's bytes, at the first shape."""
    names = {"dense bf16": "full, bf16", "dense fp32 master": "full, fp32 master", **MASKED}
    shape = result["cases"][0]["shape"]
    lines = [f"| {shape.replace('x', ' × ')}: kept + transient, in weights | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for case in (case for case in result["cases"] if case["shape"] == shape):
        cells = [f"{row['state']:.2f} + {row['transient']:.2f}" for row in (case["methods"][name] for name in names)]
        lines.append(f"| {case['density']:g} % | {' | '.join(cells)} |")
    return lines


def masked_update_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| update alone / its DRAM floor | fp32 delta | split, bf16 moments | bandwidth, GB/s |",
        "|---|---|---|---|",
    ]
    for case in result["update"]:
        cells = [interval(case["methods"][name]["over_floor"]) for name in ("packed fp32", "split, bf16 moments")]
        speed = case["gigabytes_per_s"]["add in place"]
        lines.append(
            f"| {case['shape'].replace('x', ' × ')}, {case['density']:g} % | {' | '.join(cells)} | {speed:.1f} |"
        )
    return lines


def masked_tables() -> list[list[str]]:
    if not (RESULTS / "masked_update.json").exists():
        return []
    result = load("masked_update")
    memory = load("masked_update_memory")  # counts the gradient memory that large layers keep
    return [masked_step_table(result), masked_memory_table(memory), masked_update_table(result)]


def harness_lines() -> list[str]:
    harness, geometry = load("harness_overhead"), load("geometry_callback")
    shares = [f"{row['method']} {row['amortised']['ratio']:.1%}" for row in geometry["cases"]]
    return [
        f"Training in the comparison harness takes {interval(harness['overhead'])} of the time of the same GRPO run "
        "written by hand with TRL (LoRA, SmolLM2-135M). `GeometryCallback` at its default interval costs, as a share "
        f"of the step time: {', '.join(shares)}."
    ]


def section() -> str:
    env = load("adapter_step")["environment"]
    head = (
        f"Measured on {env['cores']} cores of an {env['cpu']} ({env['cpu_capability']}), torch {env['torch']}, "
        f"PEFT {env['peft']}; medians of interleaved rounds with 95 % intervals; r = 16, 512 tokens a step. The files "
        "are in `benchmarks/results/`, `make tables` renders this section from them, and the same scripts run with "
        "`--device cuda`."
    )
    blocks = [[head], step_table(), generation_table(), start_table(), *masked_tables(), harness_lines()]
    return "\n\n".join("\n".join(block) for block in blocks)


def demo() -> str:
    """What `make demo` printed at its end, from the records of that run."""
    return f"```text\n{terminal_summary(DEMO).strip()}\n```"


def picture() -> None:
    """docs/demo.png: the top of the report of those records, as a browser shows it."""
    browser = shutil.which("chromium")
    if browser is None:
        print("no chromium: docs/demo.png stays as it is (tests/install_chromium.sh installs it)", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEMO / "trials", Path(folder, "trials"))
        page, _ = write_report(Path(folder))
        target = f"--screenshot={ROOT / 'docs' / 'demo.png'}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={PICTURE}"]
        subprocess.run([browser, *options, target, page.as_uri()], check=True, capture_output=True, timeout=120)


SECTIONS: dict[str, Callable[[], str]] = {"figures": section, "demo": demo}


def rendered(text: str) -> str:
    """``text`` with what stands between each section's markers replaced; ``ValueError`` where markers are missing."""
    for name, render in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must contain {begin!r} and {end!r} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{render()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rendered(text)
    if parser.parse_args().check:
        if new != text:
            print("README.md does not show what benchmarks/results/ holds; run `make tables`", file=sys.stderr)
        return int(new != text)
    readme.write_text(new)
    picture()
    return 0


if __name__ == "__main__":
    sys.exit(main())
