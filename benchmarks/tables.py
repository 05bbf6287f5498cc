"""Render the README's figures from the committed result files: ``python benchmarks/tables.py`` rewrites the section.

With ``--check`` nothing is written and a section that no longer fits the files is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


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


def section() -> str:
    env = load("adapter_step")["environment"]
    head = (
        f"Measured on {env['cores']} cores of an {env['cpu']} ({env['cpu_capability']}), torch {env['torch']}, "
        f"PEFT {env['peft']}; medians of interleaved rounds with 95 % intervals; r = 16, 512 tokens a step. The files "
        "are in `benchmarks/results/`, `make tables` renders this section from them, and the same scripts run with "
        "`--device cuda`."
    )
    blocks = [[head], step_table(), generation_table(), start_table()]
    return f"{BEGIN}\n\n" + "\n\n".join("\n".join(block) for block in blocks) + f"\n\n{END}"


def rendered(text: str) -> str:
    """``text`` with the section between the markers replaced. Raises ``ValueError`` where the markers are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must contain {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    return before + section() + rest.partition(END)[2]


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
