"""The study's tables in README and docs from its result files: ``python benchmarks/findings.py`` rewrites them.

A table stands between ``<!-- table NAME KIND ... -->`` and ``<!-- end -->``; NAME is a file of ``results/study``. With
``--check`` nothing is written and a page that no longer fits the files is an error. How the figures are made:

- a *collapse*: the test accuracy ends more than five points below the untrained model's, or the trial failed;
- *at an equal rate*: mean over the seeds of the last test accuracy, with Student's 95 % interval; no mean where a seed
  failed;
- *at equal KL* (or norm of the update): each trial's curve of evaluations is read where it first crosses the level, by
  straight lines in the norm or in the root of the KL, which grows like the norm. A method's rates count where every
  seed gets there;
- *at equal KL (or norm) at the end*: seed by seed, the accuracies after the same number of steps, one for each rate,
  are a curve over the seeds' mean norm or root of the KL at that rate. It is read at the level by straight lines,
  between two rates and never from the untrained model on. The path to a level is shorter at a higher rate and
  accuracy lower there, so the reading along the path favours whichever method's grid of rates happens to end just
  beyond the level; this one does not. It was added when the trials of the first two of eighteen starts had been seen,
  the untrained model was left out of it when all had, and the KL of a rate became the seeds' mean when the masks had;
- *a method at its best rate*: seed by seed, at the rate that is best for the other seeds, so that no seed's luck
  chooses its own rate;
- differences to the reference are by seed: equal seeds share prompts and sampling seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import _study_tables as tables
import _study_weight_tables as weight_tables
from _study_result import Result

from offprincipal_peft.audit import read_json_report

HERE = Path(__file__).parent
PAGES = tuple(HERE.parent / name for name in ("README.md", "docs/findings.md", "docs/choosing-a-method.md"))
RESULTS, SPECS = HERE / "results" / "study", HERE / "experiments"
BLOCK = re.compile(r"<!-- table (?P<words>[^>]*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)

TABLES: dict[str, Callable[[Result, list[str]], list[str]]] = {
    "pairs": weight_tables.pairs,
    "consensus": weight_tables.consensus,
    "interventions": weight_tables.interventions,
    "precision": tables.precision,
    "equal-rate": tables.equal_rate,
    "best-rate": tables.best_rate,
    "equal-level": tables.equal_level,
    "equal-end": tables.equal_end,
    "forgetting": tables.forgetting,
    "headline": tables.headline,
    "versus": tables.versus,
    "geometry": tables.geometry,
}

# Tables of files that no spec has made.
ELSEWHERE: dict[str, Callable[[Path], list[str]]] = {
    "audited": lambda path: weight_tables.audited(read_json_report(path)),
    "inputs": lambda path: weight_tables.inputs(json.loads(path.read_text(encoding="utf-8"))),
}


def rendered(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        name, kind, *words = shlex.split(match["words"])
        if kind in ELSEWHERE:
            lines = [*ELSEWHERE[kind](RESULTS.parent / f"{name}.json"), "", f"`benchmarks/results/{name}.json`."]
            return f"<!-- table {match['words']} -->\n" + "\n".join(lines) + "\n<!-- end -->"
        if not (RESULTS / f"{name}.json").is_file():
            if not (SPECS / f"{name}.yaml").is_file() or match["body"]:
                raise SystemExit(f"a table of {name}, of which there is no result file")
            return match[0]
        result = Result(RESULTS / f"{name}.json")
        ran, size = result.values["ran"], len(result.values["trials"])
        scale = f"{size} trials, {result.values['seconds'] / 3600:.1f} hours of one thread, {ran['cpu']}, {ran['last']}"
        lines = [*TABLES[kind](result, words), "", f"`benchmarks/results/study/{name}.json`: {scale}."]
        return f"<!-- table {match['words']} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    drifted = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        if new != text and options.check:
            drifted.append(page.name)
        elif new != text:
            page.write_text(new, encoding="utf-8")
    if drifted:
        print(f"{', '.join(drifted)}: not what benchmarks/results/study holds; run `make tables`", file=sys.stderr)
    return int(bool(drifted))


if __name__ == "__main__":
    sys.exit(main())
