"""A tiny model with questions and a reward in its folder, and the settings of a trial on it that takes a second."""

import json
from pathlib import Path
from typing import Any

from tiny_models import save_tiny_model

# A random model never answers right: credit that differs within a group, so that something is learned.
PARTIAL = """
def reward(completions, answer, **columns):
    return [1.0 if a == c else sum(map(ord, c)) % 7 / 10 for a, c in zip(answer, completions)]
"""


def save_tiny_task(folder: Path) -> Path:
    """Write the model, its tokenizer, 40 questions and the reward into ``folder``."""
    save_tiny_model(folder)
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "partial.py").write_text(PARTIAL)
    return folder


def tiny_trial(folder: Path) -> dict[str, Any]:
    """Fields of a trial on what :func:`save_tiny_task` wrote; its method, rate and steps are the caller's."""
    return {
        "model": str(folder),
        "task": str(folder / "items.jsonl"),
        "task_options": {"verifier": f"{folder / 'partial.py'}:reward"},
        "device": "cpu",
        "rank": 4,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_completion_length": 3,
        "train_items": 16,
        "validation_items": 6,
        "test_items": 5,
        "threads": 1,
    }
