"""Tasks from elsewhere: any dataset of reasoning-gym, and any JSON-lines file of prompts and answers."""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rewards import Verifier, load_function, math_verify
from .tasks import Item, Splits, Task, TaskError

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SPLITS = ("train", "validation", "test")
INSTRUCTION = "Give the final answer between <answer> and </answer>."


def reasoning_gym_task(
    name: str,
    sizes: dict[str, int],
    *,
    seed: int = 0,
    chat: bool = True,
    instruction: str = INSTRUCTION,
    **options: Any,
) -> Task:
    """A procedural dataset of reasoning-gym, scored by its own verifier.

    Item i of such a dataset is drawn from ``Random(seed + i)``, so datasets with neighbouring seeds share nearly all
    items: the splits here are disjoint ranges of *one* dataset, and a question that comes up again is left out.

    Args:
        chat: whether the question goes through the model's chat template, with ``instruction``; otherwise it stands
            alone, followed by "Answer:".
        options: passed to the dataset.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ImportError("this task needs reasoning-gym: pip install 'offprincipal-peft[compare]'") from None
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise TaskError(f"reasoning-gym has no dataset {name!r}{hint} ({len(DATASETS)} exist)")
    wanted = sum(sizes[split] for split in SPLITS)
    try:
        dataset = reasoning_gym.create_dataset(name, size=2 * wanted, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise TaskError(f"reasoning-gym dataset {name}: {error}") from None

    def item(entry: dict[str, Any], index: int) -> Item:
        if entry["answer"] is None:
            raise TaskError(f"reasoning-gym dataset {name}: item {index} has no single gold answer to prove it on")
        question = entry["question"]
        prompt = [{"role": "user", "content": f"{question}\n{instruction}"}] if chat else f"{question}\nAnswer:"
        return Item(prompt, str(entry["answer"]), question, {"index": index})

    def verifier(completions: list[str], index: list[int], **_: Any) -> list[float]:
        return [float(dataset.score_answer(_answer(c), dataset[i])) for c, i in zip(completions, index, strict=True)]

    verifier.__name__ = name
    splits = _divide((item(dataset[index], index) for index in range(2 * wanted)), sizes)
    return Task(f"reasoning-gym:{name}", splits, verifier, gold=lambda item: f"<answer>{item.answer}</answer>")


def _answer(completion: str) -> str:
    found = ANSWER.findall(completion)
    return (found[-1] if found else completion).strip()


def jsonl_task(
    path: str,
    sizes: dict[str, int],
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    verifier: str = "math-verify",
    validation: str | None = None,
    test: str | None = None,
    seed: int = 0,
    stop: str | None = None,
    chat: bool = False,
) -> Task:
    """A JSON-lines file: one object a line with a prompt (text, or chat messages) and an answer.

    Args:
        prompt, answer: names of the columns. Every other column is handed to the verifier by its name.
        verifier: "math-verify", or ``module:function`` with the signature of TRL's reward functions.
        validation, test: files of the other splits. Without them the one file is shuffled with ``seed`` and divided.
        stop: text after which a completion is over.
        chat: whether a textual prompt goes through the model's chat template.
    """
    function: Verifier = math_verify if verifier == "math-verify" else load_function(verifier)
    read = [_read(Path(name), prompt, answer, chat) for name in (path, validation, test) if name is not None]
    shared = set.intersection(*(set(item.columns) for items in read for item in items))
    read = [[_with_columns(item, shared) for item in items] for items in read]
    if len(read) == 3:
        cut = [items[: sizes[split]] for items, split in zip(read, SPLITS, strict=True)]
        splits = Splits(*cut)
    elif len(read) == 1:
        random.Random(seed).shuffle(read[0])
        splits = _divide(read[0], sizes)
    else:
        raise TaskError(f"{path}: give both validation= and test=, or neither (the one file is then divided)")
    return Task(Path(path).stem, splits, function, stop=stop)


def _divide(items: Iterable[Item], sizes: dict[str, int]) -> Splits:
    """Test and validation first; a question that comes up again is left out."""
    seen: set[str] = set()
    parts: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        if item.key in seen:
            continue
        seen.add(item.key)
        part = next((name for name in ("test", "validation", "train") if len(parts[name]) < sizes[name]), None)
        if part is None:
            break
        parts[part].append(item)
    if not parts["train"]:
        raise TaskError(
            f"{len(seen)} different items; test_items={sizes['test']} and validation_items={sizes['validation']} "
            "are held out, and none is left to train on"
        )
    return Splits(**parts)


def _read(path: Path, prompt: str, answer: str, chat: bool) -> list[Item]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 too
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text ({error})") from None
    items = [_item(line, f"{path}, line {n}", prompt, answer, chat) for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise TaskError(f"{path}: no items")
    return items


def _with_columns(item: Item, names: set[str]) -> Item:
    """Verifiers get columns that every item has."""
    return dataclasses.replace(item, columns={name: item.columns[name] for name in sorted(names)})


def _item(line: str, place: str, prompt: str, answer: str, chat: bool) -> Item:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise TaskError(f"{place}: a {type(row).__name__}, not an object with the columns {prompt!r} and {answer!r}")
    for column in (prompt, answer):
        if column not in row:
            raise TaskError(f"{place}: no column {column!r}; there are {', '.join(map(repr, row))}")
    if row[answer] is None:
        raise TaskError(f"{place}: column {answer!r} is null; an item needs its answer")
    asked = row[prompt]
    messages = isinstance(asked, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in asked)
    if not isinstance(asked, str) and not messages:
        raise TaskError(f"{place}: column {prompt!r} is neither text nor a list of messages with role and content")
    key = asked if isinstance(asked, str) else json.dumps(asked, sort_keys=True)
    if isinstance(asked, str) and chat:
        asked = [{"role": "user", "content": asked}]
    rest = {
        name: value for name, value in row.items() if name not in (prompt, answer, "prompt", "completions", "prompts")
    }
    return Item(asked, str(row[answer]), key, rest)
