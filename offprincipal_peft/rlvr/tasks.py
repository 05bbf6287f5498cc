"""Tasks with verifiable rewards: items in three disjoint splits, and a verifier that proves itself before training.

Built in are short few-shot prompts that a small pretrained model can learn in minutes on a CPU. Any dataset of
reasoning-gym (``reasoning-gym:NAME``) and any JSON-lines file with prompts and answers is a task too
(:mod:`.task_sources`). Items depend on the task's own seed, never on the trial's: all trials of a comparison are scored
on the same ones.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .rewards import Verifier, first_integer, score

PROVED = 32  # items of each split that the verifier is proved on


class TaskError(ValueError):
    """A task that cannot be trained on: what is wrong and with which item."""


@dataclass(frozen=True)
class Item:
    """One question. Items with equal keys are the same question, however they are written."""

    prompt: str | list[dict[str, str]]
    answer: str
    key: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Splits:
    train: list[Item]
    validation: list[Item]
    test: list[Item]

    def items(self) -> dict[str, list[Item]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        splits: disjoint by the items' keys.
        verifier: scores completions.
        stop: text after which a completion is over, where the prompt's format has one.
        gold: writes the completion that should earn 1.
        wrong: writes completions that must not.
    """

    name: str
    splits: Splits
    verifier: Verifier
    stop: str | None = None
    gold: Callable[[Item], str] = lambda item: item.answer
    wrong: Callable[[Item], list[str]] = lambda item: [""]

    def columns(self, items: list[Item]) -> dict[str, list[Any]]:
        """What the verifier sees of ``items`` beside the completions, as TRL would hand it over."""
        extra = {name: [item.columns[name] for item in items] for name in (items[0].columns if items else ())}
        return {"prompts": [item.prompt for item in items], "answer": [item.answer for item in items], **extra}

    def prove(self) -> dict[str, int]:
        """Check the splits and the verifier; the numbers of what was checked.

        Raises:
            TaskError: an item in two splits, a gold answer that does not earn 1, a wrong one that does.
            RewardError: the verifier breaks its contract.
        """
        assert_disjoint(self.splits)
        checks = {name: len(items) for name, items in self.splits.items().items()}
        sample = [item for items in self.splits.items().values() for item in items[:PROVED]]
        for item, value in zip(sample, self._score([(self.gold(i), i) for i in sample]), strict=True):
            if value < 1:
                raise TaskError(
                    f"task {self.name}: the gold answer {self.gold(item)!r} to {item.key!r} earns {value:g}"
                )
        wrong = [(text, item) for item in sample for text in self.wrong(item)]
        rejected = self._reject(wrong) + self._reject_others(sample)
        return {**checks, "gold_correct": len(sample), "wrong_rejected": rejected}

    def _reject(self, wrong: list[tuple[str, Item]]) -> int:
        for (text, item), value in zip(wrong, self._score(wrong), strict=True):
            if value >= 1:
                gold = f"{item.key!r} (gold {item.answer!r})"
                raise TaskError(f"task {self.name}: the wrong answer {text!r} to {gold} earns {value:g}")
        return len(wrong)

    def _reject_others(self, sample: list[Item]) -> int:
        """The gold of another item is wrong, unless the verifier takes the two for equal both ways (0.5 and 0.50)."""
        pairs = _neighbours(sample)
        if not pairs:
            return 0
        there = self._score([(self.gold(other), item) for item, other in pairs])
        back = self._score([(self.gold(item), other) for item, other in pairs])
        accepted = [pair for pair, value in zip(pairs, there, strict=True) if value >= 1]
        one_way = [p for p, a, b in zip(pairs, there, back, strict=True) if (a >= 1) != (b >= 1)]
        if one_way or len(accepted) == len(pairs):
            item, other = (one_way or accepted)[0]
            if (item, other) not in accepted:
                item, other = other, item
            gold = f"{item.key!r} (gold {item.answer!r})"
            raise TaskError(f"task {self.name}: the wrong answer {self.gold(other)!r} to {gold} earns 1")
        return len(pairs) - len(accepted)

    def _score(self, pairs: list[tuple[str, Item]]) -> list[float]:
        return score(self.verifier, [text for text, _ in pairs], self.columns([item for _, item in pairs]))


def assert_disjoint(splits: Splits) -> None:
    """Raises :class:`TaskError` where a split is empty, repeats an item or shares one with another split."""
    seen: dict[str, str] = {}
    for name, items in splits.items().items():
        if not items:
            raise TaskError(f"no {name} items")
        for item in items:
            if item.key in seen:
                raise TaskError(f"the item {item.key!r} is in {seen[item.key]} and again in {name}")
            seen[item.key] = name


def _neighbours(sample: list[Item]) -> list[tuple[Item, Item]]:
    """Each item with the one whose different answer comes next in the alphabet: wrong by little."""
    ordered = sorted({item.answer: item for item in sample}.values(), key=lambda item: item.answer)
    return list(itertools.pairwise(ordered))


def _integer_neighbours(item: Item) -> list[str]:
    value = int(item.answer)
    return [f"{value + 1}", f"{value - 1}", f"1{item.answer}", f"{item.answer}0", "", "?", f"{value + 1} {value}"]


Draw = Callable[[random.Random], Item]
SHOWN = ("24+31", "7*8")  # the worked examples: their answers stand in every prompt


def _sums(largest: int = 50) -> Draw:
    def draw(generator: random.Random) -> Item:
        a, b = generator.randint(1, largest), generator.randint(1, largest)
        return Item(f"31+24=55\n{a}+{b}=", str(a + b), f"{min(a, b)}+{max(a, b)}")

    return draw


def _products(largest: int = 99) -> Draw:
    def draw(generator: random.Random) -> Item:
        a, b = generator.randint(2, 9), generator.randint(2, largest)
        return Item(f"7*8=56\n{a}*{b}=", str(a * b), f"{min(a, b)}*{max(a, b)}")

    return draw


def _largest_of_n(n: int = 4, largest: int = 99) -> Draw:
    if n < 2:
        raise TaskError(f"n={n}: the largest of at least 2 numbers")

    def draw(generator: random.Random) -> Item:
        numbers = generator.sample(range(largest + 1), n)
        lines = [f"{' '.join(map(str, shown))} -> {max(shown)}" for shown in _shots(n, largest)]
        prompt = "\n".join([*lines, f"{' '.join(map(str, numbers))} ->"])
        return Item(prompt, str(max(numbers)), " ".join(map(str, sorted(numbers))))

    return draw


def _shots(n: int, largest: int) -> Iterator[list[int]]:
    generator = random.Random(12345)
    for _ in range(2):
        yield generator.sample(range(largest + 1), n)


BUILT_IN: dict[str, tuple[Callable[..., Draw], str]] = {
    "sums": (_sums, "sums of two numbers after one worked example; largest=50"),
    "products": (_products, "a digit times a number, after one worked example; largest=99"),
    "largest-of-n": (_largest_of_n, "the largest of n numbers, after two worked examples; n=4, largest=99"),
}


def load_task(name: str, sizes: dict[str, int], options: dict[str, Any] | None = None) -> Task:
    """The task called ``name`` with at most ``sizes`` items in its train, validation and test splits.

    Where a task has fewer different items, validation and test are filled first.

    Raises:
        TaskError: an unknown name or option (naming what exists), or too few items.
    """
    options = dict(options or {})
    if name.startswith("reasoning-gym:") or name.endswith((".jsonl", ".json")):
        from .task_sources import jsonl_task, reasoning_gym_task

        if name.startswith("reasoning-gym:"):
            return reasoning_gym_task(name.removeprefix("reasoning-gym:"), sizes, **options)
        _known_options(name, jsonl_task, options)
        return jsonl_task(name, sizes, **options)
    if name not in BUILT_IN:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise TaskError(
            f"unknown task {name!r}{hint}; there are {', '.join(BUILT_IN)}, reasoning-gym:NAME and PATH.jsonl"
        )
    seed = options.pop("seed", 0)
    try:
        splits = draw_splits(BUILT_IN[name][0](**options), sizes, seed)
    except (TypeError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"task {name}: {error}; its options are {BUILT_IN[name][1].split('; ')[1]}, seed=0") from None
    space = " " if name == "largest-of-n" else ""  # as the worked examples have it
    return Task(name, splits, first_integer, "\n", lambda item: f"{space}{item.answer}\n", _integer_neighbours)


def _known_options(name: str, function: Callable[..., Task], options: dict[str, Any]) -> None:
    known = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("path", "sizes")]
    for option in options:
        if option not in known:
            raise TaskError(f"task {name}: no option {option!r}; its options are {', '.join(known)}")


def draw_splits(draw: Draw, sizes: dict[str, int], seed: int, attempts: int = 1000) -> Splits:
    """Different items for test and validation first, then for training, until ``attempts`` draws in a row repeat.

    The worked examples in the prompts are no items.
    """
    generator = random.Random(seed)
    seen = set(SHOWN)
    parts: dict[str, list[Item]] = {}
    for part in ("test", "validation", "train"):
        parts[part] = []
        failures = 0
        while len(parts[part]) < sizes[part] and failures < attempts:
            item = draw(generator)
            failures = failures + 1 if item.key in seen else 0
            if item.key not in seen:
                seen.add(item.key)
                parts[part].append(item)
    splits = Splits(**parts)
    if not splits.train:
        raise TaskError(
            f"{len(seen) - len(SHOWN)} different items, and {sizes['test']} + {sizes['validation']} are held out"
        )
    return splits
