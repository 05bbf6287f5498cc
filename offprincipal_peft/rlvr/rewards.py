"""Verifiers: what a completion earns, and the checks around functions that somebody else wrote.

Every verifier has the signature of TRL's reward functions, ``f(completions, answer, **columns) -> list of floats``: a
function written for ``GRPOTrainer`` works here unchanged. 1 means correct; what is between 0 and 1 is partial credit.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INTEGER = re.compile(r"-?\d+")


class RewardError(ValueError):
    """A reward function broke its contract: which one, how, and on what."""


Verifier = Callable[..., Sequence[float]]  # f(completions, answer, **columns), all as keywords


def first_integer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the first integer of the completion is the answer."""
    found = (INTEGER.search(completion) for completion in completions)
    return [float(match is not None and match.group() == a) for match, a in zip(found, answer, strict=True)]


def math_verify(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where math-verify finds the completion's final expression equal to the answer."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError(
            "checking answers with math-verify needs it: pip install 'offprincipal-peft[compare]'"
        ) from None
    return [
        float(bool(verify(parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None)))
        for text, gold in zip(completions, answer, strict=True)
    ]


def load_function(name: str) -> Verifier:
    """The function that ``module:function`` or ``file.py:function`` names.

    Raises:
        RewardError: nothing by that name, with what the module holds.
    """
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name:
        raise RewardError(f"reward {name!r}: write module:function or path/to/file.py:function")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise RewardError(f"reward {name!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise RewardError(
            f"reward {name!r}: {module_name} has no function {function_name!r}; it has {', '.join(names)}"
        )
    return function


def score(verifier: Verifier, completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """What ``verifier`` gives, as finite floats, one a completion; raises :class:`RewardError` for anything else.

    An exception of the verifier itself passes through with its traceback.
    """
    name = getattr(verifier, "__name__", type(verifier).__name__)
    values = verifier(completions=completions, **columns)
    if (
        isinstance(values, (str, bytes, dict, set))
        or getattr(values, "shape", None) == ()
        or not hasattr(values, "__len__")
    ):
        raise RewardError(f"reward function {name} returned {type(values).__name__}; it returns a list of floats")
    if len(values) != len(completions):
        raise RewardError(f"reward function {name} returned {len(values)} values for {len(completions)} completions")
    return [_finite(value, name, text) for value, text in zip(values, completions, strict=True)]


def as_trl(verifier: Verifier, name: str) -> Callable[..., list[float]]:
    """The verifier as a reward function for TRL's trainers, checked at every call."""

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        columns.pop("completion_ids", None)
        kept = {key: value for key, value in columns.items() if isinstance(value, list)}
        return score(verifier, [text_of(completion) for completion in completions], {**kept, "prompts": prompts})

    reward.__name__ = re.sub(r"\W+", "_", name)  # what TRL calls it in its logs
    return reward


def text_of(completion: str | list[dict[str, str]]) -> str:
    """A completion's text: conversational tasks give a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _finite(value: Any, name: str, completion: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward function {name} returned {value!r} for {completion[:80]!r}; it returns finite floats"
        )
    return number


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"offprincipal_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and pickles of that file work
    spec.loader.exec_module(module)
    return module
